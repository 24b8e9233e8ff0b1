"""What a run writes while it goes on: its log, its record, and snapshots of the model for curves over training.

In: a training that goes on. Out: `metrics.jsonl`, a line for every log line, made of means over all pairs and ranks;
`run.yaml`; `snapshots/step-000010/` and so on, each a model folder that is there whole or not at all.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from ...cache.files import naming, write_atomically
from .checkpoints import check_weights, copy_processor, saving
from .distributed import gather_weights


class PairMeans:
    """Means over pairs since they were last read, without a synchronisation with the device in between."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one value a pair under each name."""
        for name, value in values.items():
            value = value.detach().double().flatten()
            entry = torch.stack([value.sum(), value.new_full((), value.numel())])
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def read(self, accelerator: Any) -> dict[str, float]:
        """The means over all ranks, by name; starts anew. A rank that had no pairs knows no names."""
        sums, self._sums = self._sums, {}
        names = sorted(set(gather_object(list(sums))))
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        totals = accelerator.reduce(torch.stack([sums.get(name, nothing) for name in names]), "sum").tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True)}


class MetricsFile(TrainerCallback):
    """Writes every log line to `metrics.jsonl` in the output folder, without the lines that a resumed run repeats."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drops the lines that the checkpoint which training goes on from does not know; all, where there is none."""
        path = Path(args.output_dir) / "metrics.jsonl"
        if state.is_world_process_zero and path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            write_atomically(path, b"".join(lines[: len(state.log_history)]))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Appends one line; numbers that are not finite become null."""
        if not state.is_world_process_zero or logs is None:
            return
        path = Path(args.output_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in logs.items()
        }
        with naming(path), path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **line}) + "\n")


class ParityLog(TrainerCallback):
    """Logs what the parity check measured when training begins: a run that fails before leaves no file."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs it once, at step 0."""
        if state.global_step == 0:
            self._trainer.log(self._trainer.parity)


class RunRecord(TrainerCallback):
    """Writes `run.yaml` when training begins, so that a run which was refused leaves no record of itself."""

    def __init__(self, text: str) -> None:
        self._text = text

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the text as it is."""
        if state.is_world_process_zero:
            write_atomically(Path(args.output_dir) / "run.yaml", self._text.encode())


class Snapshots(TrainerCallback):
    """Saves the model every `every` steps, but not at the last one: the result itself is at the top of the folder."""

    def __init__(self, every: int) -> None:
        self._every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves what was the last step of a shorter run that now goes on."""
        self._save_if_due(args, state, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves, in place of a snapshot that a stopped run left of this step."""
        self._save_if_due(args, state, **kwargs)

    def _save_if_due(self, args: Any, state: Any, *, model: Any, processing_class: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every or not 0 < state.global_step < state.max_steps:
            return
        weights = gather_weights(model)  # every rank gives its part
        if not state.is_world_process_zero:
            return
        check_weights(weights or model.state_dict(), f"step {state.global_step}")
        folder = snapshot_folder(Path(args.output_dir), state.global_step)
        new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        with saving(folder):
            model.save_pretrained(new, state_dict=weights)
            if processing_class is not None:
                processing_class.save_pretrained(new)
                copy_processor(processing_class, new)
        if folder.exists():  # a folder that is not empty cannot be replaced in one move
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def snapshot_folder(out: Path, step: int) -> Path:
    """Where a run in `out` leaves its snapshot of a step."""
    return out / "snapshots" / f"step-{step:06d}"


class LiveLine(ProgressCallback):
    """Shows a training on rank 0: one live line on a terminal; elsewhere a line of text at each logging step.

    An evaluation leaves a line of its own in both cases.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the line, at the step that a resumed run has reached."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            hidden = True if args.disable_tqdm else None  # None: where there is no terminal
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, disable=hidden
            )
            self._first, self._started = state.global_step, time.monotonic()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Shows how far an evaluation is, on a terminal."""
        if self.training_bar is not None and not self.training_bar.disable:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows the metrics of a step or of an evaluation; other log lines are for the files."""
        if self.training_bar is None or logs is None:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            _say(f"{step}, held out: {metrics_text(logs, 'eval_')}")
        elif "loss" in logs:
            text = f"{metrics_text(logs)}, {self._trainer.tokens_per_second():,.0f} tokens/s"
            if self.training_bar.disable:
                _say(f"{step}: {text}, {self._time_left(state)} left")
            else:
                self.training_bar.set_postfix_str(text)

    def _time_left(self, state: Any) -> str:
        done = state.global_step - self._first
        seconds = (time.monotonic() - self._started) * (state.max_steps - state.global_step) / max(1, done)
        return str(tqdm.format_interval(seconds))


def _say(line: str) -> None:
    tqdm.write(line)  # above the live line, where there is one
    sys.stdout.flush()


# What the live line shows of a log line, and how.
SHOWN = {
    "loss": "loss {:.4g}",
    "rewards/margins": "margin {:.4g}",
    "rewards/accuracies": "accuracy {:.1%}",
    "constraint/delta": "δ {:.3g}",
}


def metrics_text(logs: Mapping[str, float], prefix: str = "") -> str:
    """Loss, margin, accuracy and δ of a log line, as far as it has them; `prefix` goes before the names of its keys."""
    return ", ".join(form.format(logs[prefix + key]) for key, form in SHOWN.items() if prefix + key in logs)


def summary(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a training changed and how fast it was, a line each.

    Args:
        log: the Trainer's `log_history`. Held-out metrics before training are those of an evaluation at step 0.
    """
    lines = []
    held_out = [line for line in log if "eval_loss" in line]
    for name, key, form in (("accuracy", "rewards/accuracies", "{:.1%}"), ("margin", "rewards/margins", "{:.4g}")):
        found = {line["step"]: form.format(line[f"eval_{key}"]) for line in held_out if f"eval_{key}" in line}
        if found:
            before = f"{found[0]} before, " if 0 in found else ""
            lines.append(f"held-out {name}: {before}{found[max(found)]} after")
    for key, where in (("eval_features/mse", "held-out pairs"), ("features/mse", "the last logged steps")):
        if drifts := [line for line in log if f"{key}_chosen" in line]:
            chosen, rejected = (drifts[-1][f"{key}_{side}"] for side in ("chosen", "rejected"))
            lines.append(f"feature drift D_F on {where}: {chosen:.3g} chosen, {rejected:.3g} rejected")
            break
    lines += [f"{line['train_tokens_per_second']:,.0f} tokens/s" for line in log if "train_tokens_per_second" in line][
        -1:
    ]
    return lines
