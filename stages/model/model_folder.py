"""What a folder must hold to be taken for a model's, which may be a stranger's.

In: a folder. Out: nothing, or a `ValueError`. Weights are safetensors: a pickle would run code, and so it is not read.
"""

import json
from contextlib import suppress
from pathlib import Path

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"


def check_model_folder(folder: Path, name: str) -> None:
    """Checks that a folder holds a model of its own, whole.

    Args:
        folder: the folder.
        name: what the user calls it.

    Raises:
        ValueError: it lacks configuration or weights, has an adapter, or takes weights from elsewhere.
    """
    if (folder / ADAPTER_CONFIG).exists():  # transformers would load it too, whatever it changes
        raise ValueError(
            f"model {name}: expected a model in {folder}, found an adapter ({ADAPTER_CONFIG}); merge it into its "
            f"model with `fpo merge {name} --out MODEL`, and give that"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {name}: expected config.json in {folder}, found none; give a transformers model")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"model {name}: expected *.safetensors weights in {folder}, found none; pickled weights are not read: "
            "convert them with save_pretrained"
        )
    for file in _files_in_index(folder / INDEX):
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"model {name}: expected {INDEX} to name *.safetensors files of its folder, found {file!r}; give "
                "another copy"
            )


def _files_in_index(index: Path) -> list[object]:
    """The files that an index of weights names; none if there is no index, or one that transformers will refuse."""
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return list(json.loads(index.read_bytes())["weight_map"].values())
    return []
