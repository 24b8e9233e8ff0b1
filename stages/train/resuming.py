"""A Trainer that goes on from a checkpoint, and not beyond its last step, as long as that holds only plain data.

In: a checkpoint's folder. Out: the state of a Trainer, or one line that says what is wrong. Plain data are tensors,
numbers and text: transformers reads pickles with torch's `weights_only`, which makes nothing else of them; what it
raises is made a `ValueError` here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers import Trainer, TrainerState

from .reading import reading


class ResumingTrainer(Trainer):
    """A Trainer whose checkpoints may be damaged or a stranger's; what it overrides raises a `ValueError` then."""

    def _init_training_state(self, max_steps: int, *others: Any) -> Any:
        found = super()._init_training_state(max_steps, *others)
        if self.state.global_step > max_steps:
            raise ValueError(
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
        with _reading(resume_from_checkpoint):
            _check_state(Path(resume_from_checkpoint) / "trainer_state.json")
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    with reading(f"--resume: expected a checkpoint to go on from in {checkpoint}, remove it to go on from another"):
        try:
            yield
        except UnpicklingError:  # torch's own message says how to run it nonetheless
            raise ValueError("found a pickle of more than tensors and numbers, which could run code") from None


def _check_state(path: Path) -> None:
    state = TrainerState.load_from_json(str(path))
    steps = [state.global_step, *(line["step"] for line in state.log_history)]
    if not all(type(step) is int and step >= 0 for step in steps) or not isinstance(state.stateful_callbacks, dict):
        raise ValueError(f"expected steps as numbers in {path.name}, found others")
