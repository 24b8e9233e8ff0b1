"""Snapshots: the model as it is every so many steps, for curves over training.

In: a training that goes on. Out: `snapshots/step-000010/` in its folder, and so on: model folders with weights,
configuration and tokenizer, without any state of the optimiser. A snapshot is there whole or not at all.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..precompute.shares import gather_weights
from .saving import check_weights, copy_processor, saving


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
