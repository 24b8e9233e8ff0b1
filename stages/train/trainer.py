"""What every training on packed rows shares: its settings, one backward a row, metrics, cost.

In: batches of packed rows from a collator, and a subclass that says what the loss of a row is. Out: a
`transformers.Trainer` whose memory is set by the token budget, whose loss is a mean over all items (pairs, or learnt
tokens) of all ranks and accumulated batches, and which logs means over pairs and what training cost.
"""

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ...cache.errors import UserError, reading
from ..model.anatomy import causal_lm, decoder_layers
from ..model.compile import CheckpointEvery, compile_layers
from ..model.sae import Site
from ..scoring.forward import RowScores, attach_scoring
from ..scoring.packing import named
from ..scoring.supported import check_model, check_repeats, policy_mode
from .callbacks import LiveLine, MetricsFile, PairMeans
from .checkpoints import check_state, check_weights, copy_processor, move_model, reading_checkpoint, saving
from .config import RowConfig
from .distributed import check_fsdp, counts_of_ranks, forget_ties, share_of_batches
from .memory import PeakMemory
from .model_card import is_adapter, model_card, training_facts
from .rehearsal import rehearse
from .schedules import check_rates, own_length


class RowTrainer(Trainer):
    """Trains a model on batches of packed rows: objects with `tokens`, `names` and `to`, under `rows` of a batch.

    Args:
        model: a causal LM or a PEFT model around one, weights in fp32.
        args: the settings.
        data_collator: makes `{"rows": [...]}` of a batch.
        train_dataset: the items that a batch is made of.
        eval_dataset: held-out items, for subclasses that evaluate.
        processing_class: the tokenizer that is saved beside the weights.
        callbacks: as the Trainer's.

    Raises:
        UserError: if weights are not fp32; if the architecture is not supported (`check_model`); if FSDP is asked for
            in a way that would change what is computed or saved (`check_fsdp`).
    """

    args: RowConfig
    noun = "pair"  # what `names` of a row names
    sites: Sequence[Site] = ()  # of the activations that the loss reads

    def __init__(
        self,
        model: nn.Module,
        args: RowConfig,
        *,
        data_collator: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        dtypes = {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}
        if dtypes != {"torch.float32"}:
            raise UserError(f"model: expected float32 weights, found {', '.join(sorted(dtypes))}; load it so")
        check_model(model)
        layers = decoder_layers(causal_lm(model))
        if args.compile_layers:
            compile_layers(layers, self.sites)
        attach_scoring(model)
        self._started_from = model  # merging takes another object
        self._means = {"train": PairMeans(), "eval": PairMeans()}
        self._tokens, self._started = 0, time.monotonic()
        self._losses: list[tuple[Any, Tensor]] = []
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            # The run's record goes before its log.
            callbacks=[*(callbacks or []), MetricsFile(), CheckpointEvery(layers, args.checkpoint_every)],
        )
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        self.add_callback(LiveLine(self))
        several = self.args.world_size > 1
        self._ranks = torch.distributed.new_group(backend="gloo") if several else None  # for counts alone

    @cached_property
    def _spare(self) -> Any:
        """The row that a rank runs, with weight 0, while others have more rows than it."""
        return self.data_collator([self.train_dataset[0]])["rows"][0].to(self.args.device)  # type: ignore[index]

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator; under FSDP weights are gathered, and gradients summed, in fp32 as elsewhere."""
        super().create_accelerator_and_postprocess()
        plugin = check_fsdp(self.accelerator)
        if plugin is not None:
            plugin.mixed_precision_policy = None  # accelerate's would be pure bf16; `score_row` does its own autocast
            # Gradients that wait for the last accumulated batch would wait whole on every device.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the schedule of the learning rate, once its rates over the whole run have been checked."""
        args, settings = self.args, self.args.schedule_settings
        check_rates(
            str(args.lr_scheduler_type.value),  # type: ignore[attr-defined]  # an enumeration by now
            settings,
            lr=args.learning_rate,
            warmup_steps=args.get_warmup_steps(num_training_steps),
            steps=num_training_steps,
        )
        with own_length(settings):
            return super().create_scheduler(num_training_steps, optimizer)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository to upload to, when the Trainer is made.

        Raises:
            UserError: the hub does not answer, or does not know who asks.
        """
        with reading("--push-to-hub: expected a hub to upload to, log in with `hf auth login` or leave it out"):
            super().init_hf_repo(token, private)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, *others: Any, **settings: Any
    ) -> Any:
        sampler = (sampler_fn and sampler_fn(dataset)) or SequentialSampler(dataset)
        return share_of_batches(dataset, self.data_collator, sampler, batch_size, self.args, self.accelerator)

    def score(self, model: nn.Module, row: Any) -> RowScores:
        """Scores one row, inside the forward of what wraps the model."""
        raise NotImplementedError

    def row_loss(self, model: nn.Module, row: Any) -> Tensor:
        """The loss of one row, float64, summed over its items; adds its metrics to the running sums."""
        raise NotImplementedError

    def row_items(self, row: Any) -> int:
        """How many items of a row the loss is a mean over."""
        raise NotImplementedError

    def train(  # type: ignore[override]  # the Trainer's other arguments pass through
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Trains; see `Trainer.train`.

        Raises:
            UserError: the model is random in training mode (`check_repeats`), or the end of the run would fail
                (`rehearse`).
        """
        model: Any = self.model
        checkpointing = bool(self.args.activation_checkpointing)
        check_repeats(model, lambda: self.score(model, self._spare).token_logps_T, checkpointing=checkpointing)
        rehearse(self, resumed=bool(resume_from_checkpoint))
        self._tokens, self._started = 0, time.monotonic()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self._memory:
                self._memory.stop()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One backward a packed row, so that memory is set by the token budget, not by the batch size.

        The loss is summed over items and divided by their number over all ranks and accumulated batches; DDP averages
        gradients over ranks, which the factor `num_processes` undoes.
        """
        assert num_items_in_batch is not None
        policy_mode(model, checkpointing=bool(self.args.activation_checkpointing))
        rows: Any = self._prepare_inputs(inputs)["rows"]
        scale = self.accelerator.num_processes / num_items_in_batch
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        passes = len(rows) + inputs["spares"]
        for number in range(passes):
            # Under FSDP gradients are summed over ranks at once: those that wait would be whole on every device.
            with nullcontext() if number == passes - 1 or self.is_fsdp_enabled else self.accelerator.no_sync(model):
                if number < len(rows):
                    loss = self.row_loss(model, rows[number]) * scale
                    self._losses.append((rows[number], loss.detach()))
                    self._tokens += rows[number].tokens
                else:
                    loss = 0.0 * self.score(model, self._spare).logps_R.sum()
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of a step's gradient, once all its rows are through and before the weights change.

        The one place at which a step waits for its device: with one number that is not finite all weights would be lost
        at the next step, and no later one could say where it came from.

        Raises:
            FloatingPointError: the loss of a row or the gradient is not finite; names the step and pairs.
        """
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        losses, self._losses = self._losses, []
        step = self.state.global_step + 1
        self.check_losses(losses, f"step {step}")
        if not math.isfinite(value := float(norm)):
            names = [name for row, _ in losses for name in row.names]
            what = f"the gradient's norm is {value}, although all losses are finite"
            raise self._stopped(f"step {step}", names, what)
        return norm

    def check_losses(self, losses: Sequence[tuple[Any, Tensor]], when: str) -> None:
        """Checks the losses of rows.

        Raises:
            FloatingPointError: one is not finite; names the pairs of its row.
        """
        values = torch.stack([loss for _, loss in losses]).tolist() if losses else []
        for (row, _), value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                raise self._stopped(when, row.names, f"the loss is {value}")

    def _stopped(self, when: str, names: Sequence[str], what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{when}, {named(names, self.noun)}: {what}; lower --lr, or raise --warmup-steps, and start again"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics gathered since the last line of the same kind: means over pairs, over all ranks."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        if "train_runtime" in logs:
            logs |= self._cost()
        elif mode == "eval" or "loss" in logs:
            logs |= {prefix + name: mean for name, mean in self._means[mode].read(self.accelerator).items()}
        super().log(logs, start_time)

    def _cost(self) -> dict[str, float]:
        """Tokens of all ranks over the time of training, saving included, and peak memory where it is measured."""
        seconds = time.monotonic() - self._started
        tokens = float(self.accelerator.reduce(torch.tensor(float(self._tokens), device=self.args.device), "sum"))
        memory = self._memory or (PeakMemory() if self.args.device.type == "cuda" else None)  # a GPU counts anyway
        measured = memory.read(self.args.device) if memory else {}
        return {"train_tokens_per_second": round(tokens / seconds, 1), **measured}

    def tokens_per_second(self) -> float:
        """Tokens of all ranks over the time of training so far, taking the other ranks to be as fast as this one."""
        return float(self._tokens * self.args.world_size / (time.monotonic() - self._started))

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates; before the first step, without a trace in the random numbers or the speed of training."""
        if self.state.global_step:
            return super()._evaluate(*args, **kwargs)
        begun = time.monotonic()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            metrics = super()._evaluate(*args, **kwargs)
        self._started += time.monotonic() - begun
        return metrics

    @property
    def _memory(self) -> PeakMemory | None:
        return next((one for one in self.callback_handler.callbacks if isinstance(one, PeakMemory)), None)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        return self._even_out(batch_samples)

    def _even_out(self, batches: list[Any]) -> int:
        """Notes in each batch how many `spares` this rank runs after its rows, so that all ranks run as many passes.

        With sharded weights each pass is one of all ranks together; without, the others would be waiting anyway.

        Returns:
            The number of items over all batches and ranks.
        """
        items = sum(self.row_items(row) for batch in batches for row in batch["rows"])
        rows = [len(batch["rows"]) for batch in batches]
        counts = counts_of_ranks([items, *rows], self._ranks)
        for batch, most, own in zip(batches, counts.amax(0).tolist()[1:], rows, strict=True):
            batch["spares"] = most - own
        return int(counts[:, 0].sum())

    def _init_training_state(self, max_steps: int, *others: Any) -> Any:
        found = super()._init_training_state(max_steps, *others)
        if self.state.global_step > max_steps:
            raise UserError(
                f"--resume: expected a run of {self.state.global_step} steps or more, which its checkpoint has behind "
                f"it, found {max_steps}; give a larger --max-steps or --epochs, or another --out"
            )
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing once all steps are done: transformers looks at their number after a step, never before the first."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading_checkpoint(resume_from_checkpoint):
            check_state(Path(resume_from_checkpoint) / "trainer_state.json")
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:
            forget_ties(self.model, state_dict)
        assert self.model is not None
        check_weights(state_dict or self.model.state_dict(), f"step {self.state.global_step}")
        folder = Path(output_dir or self.args.output_dir or "")
        new = folder / ".new"
        if self.args.should_save:
            shutil.rmtree(new, ignore_errors=True)  # of a run that was stopped while it saved
        with saving(folder):
            super()._save(str(new), state_dict)
            if self.args.should_save:
                (new / "README.md").write_text(self.model_card())  # PEFT leaves one of blanks
                # A pickle of the settings: nothing here reads it, and run.yaml holds them.
                (new / "training_args.bin").unlink(missing_ok=True)
                if self.processing_class is not None:
                    copy_processor(self.processing_class, new)
                move_model(new, folder)

    def model_card(self) -> str:
        """The card of what is saved: what it stands on, how it was trained, and how it is loaded."""
        started = causal_lm(self._started_from)
        return model_card(
            str(started.name_or_path),
            self.facts() | training_facts(self.args, self._started_from),
            adapter=is_adapter(self.model),
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: every saved model has its card."""

    def facts(self) -> dict[str, str]:
        """What a card says of the method, which comes first, and of what was learnt from."""
        raise NotImplementedError

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with saving(Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)
