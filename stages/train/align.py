"""Stage two: the policy, trained against a cache.

In: a cache, a policy, the SAEs of the chosen sites (and a live reference for the methods whose constraint is the KL).
Out: a `transformers.Trainer` that trains any objective of `objectives.py`, logs under TRL's names, and refuses to start
from a policy that is not the cache's reference.

Shapes: R responses of a packed row, B pairs of a packed row (R = 2B, chosen and rejected in turn).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ...cache.errors import UserError
from ...cache.identity import Meaning
from ...cache.reader import Cache
from ..model.anatomy import causal_lm, decoder_layers
from ..model.models import attentions_to_try, find_model, load_model
from ..model.sae import SiteSAE
from ..model.tokenizer import check_tokens, load_tokenizer, tokenizer_sha256
from ..scoring.batches import RowBatch, RowCollator
from ..scoring.forward import RowScores, live_reference, row_layout
from ..scoring.parity import check_cache, check_parity
from ..scoring.supported import freeze, load_supported
from .callbacks import ParityLog
from .config import FPOConfig
from .objectives import PairLosses, PairScores, pair_losses
from .trainer import RowTrainer


class FPOTrainer(RowTrainer):
    """Trains a policy on cached preference pairs.

    Args:
        model: the policy, a causal LM or a PEFT model around one, weights in fp32; or what `find_model` takes.
        args: the settings.
        train_dataset: the cache to train on, opened with the sites of `saes`.
        eval_dataset: a cache of another split that agrees with it otherwise.
        saes: SAEs of the sites that the constraint reads, in the cache's order; empty for other methods. They are
            moved to the trainer's device.
        reference: a live reference, for methods whose constraint is the KL.
        processing_class: the tokenizer that is saved beside the weights, with the cache's chat template; default that
            of a model given by name.
        callbacks: as the Trainer's.

    Raises:
        UserError: if the method lacks its SAEs or its reference, or was given one that it does not read; if weights
            are not fp32; if data are no cache; if a cache does not fit (`check_cache`, `with_template`); as
            `RowTrainer`.
    """

    args: FPOConfig

    def __init__(
        self,
        model: nn.Module | str,
        args: FPOConfig,
        train_dataset: Cache,
        eval_dataset: Cache | None = None,
        saes: Sequence[SiteSAE] = (),
        reference: nn.Module | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        divergence = args.objective.rule.divergence
        if (divergence == "features") != bool(saes):
            raise UserError(f"method {args.method}: expected {'SAEs' if divergence == 'features' else 'no SAE'}")
        if (divergence == "kl") != (reference is not None):
            raise UserError(f"method {args.method}: expected {'a' if divergence == 'kl' else 'no'} live reference")
        for name, cache in {"train_dataset": train_dataset, "eval_dataset": eval_dataset}.items():
            if cache is not None:
                _check_is_cache(name, cache)
                check_cache(cache, saes, args.recipe, args.top_k)
        policy: Any = model
        if isinstance(model, str):
            source = find_model(model)
            policy = load_supported(
                partial(load_model, source, device=args.device), attentions_to_try("auto", source, args.device)
            )
            policy.name_or_path = source.lasting_name
            processing_class = load_tokenizer(source) if processing_class is None else processing_class
        for cache in (train_dataset, eval_dataset):
            if cache is not None:
                name, token = cache.largest_token()
                check_tokens(causal_lm(policy), [(f"cache {cache.folder}, pair {name}", [token])], processing_class)
        if processing_class is not None:
            with_template(processing_class, train_dataset.manifest.meaning, args.allow_different_start)
        for sae in saes:
            sae.sae.to(args.device)
        self.policy, self.train_cache, self.saes = policy, train_dataset, tuple(saes)
        self._constraint_step = -1
        self.sites = [sae.site for sae in self.saes]
        super().__init__(
            policy,
            args,
            data_collator=RowCollator(args.token_budget, tuple(sae.width for sae in self.saes), row_layout(policy)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.parity: dict[str, float] = {}
        self.add_callback(ParityLog(self))
        self.reference = None if reference is None else reference.to(args.device)
        if self.reference is not None:
            freeze(self.reference, args.recipe, compiled=args.compile_layers)

    def train(  # type: ignore[override]  # the Trainer's other arguments pass through
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Checks parity (not on resume), then trains; see `RowTrainer.train`."""
        if not resume_from_checkpoint:
            self.parity = self._check_parity()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _check_parity(self) -> dict[str, float]:
        return check_parity(
            self.policy,
            self.train_cache,
            self.saes,
            self.args.recipe,
            pairs=self.args.parity_pairs,
            token_budget=self.args.token_budget,
            allow_different_start=self.args.allow_different_start,
        )

    def score(self, model: nn.Module, row: RowBatch) -> RowScores:
        """Scores one row with the policy, inside the forward of what wraps it."""
        reference = None
        if self.reference is not None:
            reference = live_reference(self.reference, row.packed, self.args.recipe)
        return model(  # type: ignore[no-any-return]
            packed=row.packed,
            saes=self.saes,
            recipe=self.args.recipe,
            cached=row.cached,
            top_k=self.args.top_k,
            reference=reference,
        )

    def row_losses(self, model: nn.Module, row: RowBatch, mode: str) -> PairLosses:
        """The losses of one row's pairs; adds its metrics to the running sums."""
        losses, scores, divergence_R = self._losses_of(model, row)
        self._count(mode, losses, scores, divergence_R)
        return losses

    def _losses_of(self, model: nn.Module, row: RowBatch) -> tuple[PairLosses, RowScores, Tensor]:
        """The losses of one row's pairs, and the scores and divergences that they are made of."""
        scores = self.score(model, row)
        divergence = self.args.objective.rule.divergence
        if divergence == "features":
            divergence_R = torch.stack([drift.mse_R for drift in scores.drifts]).mean(0)
        else:
            divergence_R = scores.kl_R
        losses = pair_losses(
            self.args.objective,
            PairScores(
                chosen_logp=scores.logps_R[::2],
                rejected_logp=scores.logps_R[1::2],
                chosen_ref_logp=row.ref_logps_R[::2],
                rejected_ref_logp=row.ref_logps_R[1::2],
                chosen_tokens=row.lengths_R[::2],
                rejected_tokens=row.lengths_R[1::2],
                chosen_divergence=divergence_R[::2] if divergence else None,
                rejected_divergence=divergence_R[1::2] if divergence else None,
            ),
        )
        return losses, scores, divergence_R

    @torch.no_grad()
    def _count(self, mode: str, losses: PairLosses, scores: RowScores, divergence_R: Tensor) -> None:
        margins = losses.chosen_reward - losses.rejected_reward
        values = {
            "rewards/chosen": losses.chosen_reward,
            "rewards/rejected": losses.rejected_reward,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).double() + 0.5 * (margins == 0).double(),
            "logps/chosen": scores.logps_R[::2],
            "logps/rejected": scores.logps_R[1::2],
        }
        if mode == "eval":
            values["loss"] = losses.loss
        divergence = self.args.objective.rule.divergence
        if divergence:
            name = "features/mse" if divergence == "features" else "kl"
            values |= {
                f"{name}_chosen": divergence_R[::2],
                f"{name}_rejected": divergence_R[1::2],
                "constraint/delta": losses.constraint,
            }
        if divergence == "features":
            values["features/miss_rate"] = torch.stack([drift.miss_rate_R for drift in scores.drifts]).mean(0)
            values["features/error_bound"] = torch.stack([drift.error_bound_R for drift in scores.drifts]).mean(0)
        self._means[mode].add(values)

    def row_loss(self, model: nn.Module, row: RowBatch) -> Tensor:
        """The losses of one row's pairs, summed."""
        if self._logs_this_step() and self._constraint_step != self.state.global_step:
            self._constraint_step = self.state.global_step
            self._measure_constraint(row)
        return self.row_losses(model, row, "train").loss.sum()

    def row_items(self, row: RowBatch) -> int:
        """Pairs."""
        return len(row.packed.pairs)

    def facts(self) -> dict[str, str]:
        """The objective, the cache and the SAEs."""
        objective, meaning = self.args.objective, self.train_cache.manifest.meaning
        settings = (f"{name} = {getattr(objective, name)}" for name in objective.rule.defaults)
        found = {
            "method": f"{self.args.method}, {', '.join(settings)}",
            "data": f"{len(self.train_cache)} pairs of split {meaning.split}",
            "cache": f"fingerprint `{meaning.fingerprint()}`",
        }
        if self.saes:
            found["constraint"] = ", ".join(f"{sae.site.name}, SAE {sae.sha256[:12]}" for sae in self.saes)
            found["constraint"] += f", k = {self.args.top_k}"
        return found

    def _logs_this_step(self) -> bool:
        step, every = self.state.global_step + 1, max(1, self.state.logging_steps)
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

    def _measure_constraint(self, row: RowBatch) -> None:
        """Logs by how much the constraint pulls: the norm of its gradient over that of the rest of the loss.

        Taken at the weights of the lowest layer that the constraint reads (the last one for the KL) on the step's first
        row, so that it costs two forwards and a backward through the layers above only. Each gradient has a graph of
        its own: compiled code allows one backward a forward. At the start it is 0 without measuring: policy and
        reference are the same. Not under FSDP, where a layer's weights are whole only while it runs.
        """
        if not self.args.objective.rule.divergence or self.is_fsdp_enabled:
            return
        if self.state.global_step == 0 and not self.args.allow_different_start:
            self._means["train"].add({"constraint/grad_ratio": torch.zeros((), device=self.args.device)})
            return
        layers = decoder_layers(causal_lm(self.policy))
        layer = layers[min((sae.site.layer for sae in self.saes), default=len(layers) - 1)]
        weights = [weight for weight in layer.parameters() if weight.requires_grad]
        if not weights:
            return
        norms = []
        for name in ("constraint", "lpd"):
            losses, _, _ = self._losses_of(self.policy, row)
            slope_B = -torch.expm1(-losses.loss.detach())  # -dL/du of L = -log σ(u)
            grads = torch.autograd.grad((slope_B * getattr(losses, name)).sum(), weights, allow_unused=True)
            norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads if g is not None])))
        self._means["train"].add({"constraint/grad_ratio": norms[0] / norms[1]})

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Runs one batch without gradient; what is logged are means over all pairs, the loss among them."""
        self._even_out([inputs])
        losses = []
        with torch.no_grad():
            for row in self._prepare_inputs(inputs)["rows"]:
                losses.append((row, self.row_losses(model, row, "eval").loss.sum()))
            for _ in range(inputs["spares"]):
                self.score(model, self._spare)
        self.check_losses(losses, f"evaluation at step {self.state.global_step}")
        return torch.zeros((), device=self.args.device), None, None


def _check_is_cache(name: str, data: Any) -> None:
    """Refuses what TRL's trainers take: pairs without what the reference said of them."""
    if not isinstance(data, Cache):
        found = f"{type(data).__module__.split('.')[0]}.{type(data).__name__}"
        raise UserError(
            f"{name}: expected a cache, found {found}; a cache holds preference pairs and what the reference said of "
            "them: make it once with `fpo precompute --model … --dataset … --sae … --out CACHE` and open it with "
            "fpo.open_cache('CACHE', sites=[sae.site.name])"
        )


def with_template(processing_class: Any, meaning: Meaning, allow_different_start: bool) -> None:
    """Gives a tokenizer the cache's chat template, in which the policy learns.

    Raises:
        UserError: if it is not the cache's tokenizer, or has a template of its own, unless that is allowed.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)  # of a processor
    found = tokenizer_sha256(tokenizer)
    if found != meaning.tokenizer:
        raise UserError(
            f"processing_class: expected the cache's tokenizer, found another (hashes {meaning.tokenizer[:12]} and "
            f"{found[:12]}); give that of the model that the cache was made with"
        )
    template = tokenizer.chat_template
    if template is not None and template != meaning.chat_template and not allow_different_start:
        raise UserError(
            "processing_class: expected the cache's chat template, found another: the policy would learn in a format "
            "that it is not asked in; leave it to the trainer (chat_template = None), or make the cache with it"
        )
    tokenizer.chat_template = meaning.chat_template
