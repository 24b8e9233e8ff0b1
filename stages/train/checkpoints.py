"""A run's files: written so that a folder is a model's only once it is whole, and read back as plain data.

In: the folder that a library writes, or the checkpoint that it reads. Out: a full disk as an `OSError` that names the
folder; a damaged checkpoint, or a stranger's pickle, as a `UserError`. Plain data are tensors, numbers and text: the
Trainer reads its pickles with torch's `weights_only`, which makes nothing else of them.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor
from transformers import TrainerState

from ...cache.errors import UserError, reading
from ...cache.files import naming

# Without one of these nothing takes a folder for a model's, an adapter's or an SAE's.
CONFIGS = ("config.json", "adapter_config.json", "cfg.json")

# What a model that sees or hears has beside its tokenizer, by the names under which transformers looks for it.
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

_RUST = re.compile(r"\(os error (\d+)\)")
# Of a file that it could not write torch says where in its own source, and not why.
_TORCH = re.compile(r"PytorchStreamWriter|inline_container|iostream error|basic_ios")


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Names the folder in whatever a library raises because it could not write there.

    Raises:
        OSError: it could not be written.
    """
    try:
        with naming(folder):
            yield
    except OSError:
        raise
    except Exception as error:
        said = str(error)
        if number := _RUST.search(said):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        if isinstance(error, RuntimeError) and _TORCH.search(said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def move_model(new: Path, folder: Path) -> None:
    """Moves a saved model's files into a folder, which is a model's only while all of them are there."""
    for name in CONFIGS:
        (folder / name).unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name in CONFIGS):
        file.replace(folder / file.name)
    new.rmdir()


def copy_processor(tokenizer: Any, folder: Path) -> None:
    """Copies what lies beside a tokenizer for pictures and sounds, which training leaves alone, to a saved model."""
    for name in PROCESSOR:
        source = Path(tokenizer.name_or_path) / name
        if source.is_file():
            shutil.copyfile(source, folder / name)


def check_weights(weights: Mapping[str, Tensor], when: str) -> None:
    """Checks weights that are about to be saved.

    Args:
        weights: by name.
        when: how far training has come, for the message.

    Raises:
        FloatingPointError: one is not finite.
    """
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"{when}: {bad[0]} and {len(bad) - 1} more of {len(weights)} weights are not finite and are not saved; "
            "lower --lr, or raise --warmup-steps, and start again"
        )


@contextmanager
def reading_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Turns what transformers raises for a checkpoint that it cannot read into one line.

    Raises:
        UserError: it is damaged, or holds more than plain data.
    """
    with reading(f"--resume: expected a checkpoint to go on from in {checkpoint}, remove it to go on from another"):
        try:
            yield
        except UnpicklingError:  # torch's own message says how to run it nonetheless
            raise UserError("found a pickle of more than tensors and numbers, which could run code") from None


def check_state(path: Path) -> None:
    """Checks the numbers of a `trainer_state.json`, which transformers takes as they are.

    Raises:
        UserError: a step is not a number.
    """
    state = TrainerState.load_from_json(str(path))
    steps = [state.global_step, *(line["step"] for line in state.log_history)]
    if not all(type(step) is int and step >= 0 for step in steps) or not isinstance(state.stateful_callbacks, dict):
        raise UserError(f"expected steps as numbers in {path.name}, found others")
