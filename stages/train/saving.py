"""Around what libraries write.

In: the folder that is written. Out: whatever they raise for a disk that takes no more as an `OSError` that names it; a
model's files moved to where they are found all at once.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

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
    """Around what writes into a folder.

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
