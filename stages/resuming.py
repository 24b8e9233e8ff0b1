"""A Trainer that goes on from a checkpoint as long as that holds nothing but tensors, numbers and text.

In: a checkpoint's folder. Out: the state of a Trainer, or one line that says what is wrong. transformers reads pickles
with torch's `weights_only`, which makes nothing else of them; what it raises is made a `ValueError` here.
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
