"""What a run writes while it goes on: its log, its record, and snapshots of the model for curves over training.

In: a training that goes on. Out: `metrics.jsonl`, a line for every log line, made of means over all pairs and ranks;
`run.yaml`; `snapshots/step-000010/` and so on, each a model folder that is there whole or not at all.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

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
            entry = torch.stack([value.sum(), value.new_tensor(value.numel())])
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
