"""LoRA adapters on disk, each with its base model.

In: the folder or hub id of an adapter, and perhaps its base model. Out: a causal LM whose layers compute with the
adapter, as a policy under training does; hashes that identify both.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...cache.errors import UserError, reading
from ...cache.files import canonical_json
from .models import (
    ADAPTER_CONFIG,
    ModelSource,
    check_model_folder,
    find_files,
    find_model,
    load_model,
    remembered_sha256,
)

WEIGHTS = "adapter_model.safetensors"
# Settings that do not change what the adapter computes.
_PLACES = ("base_model_name_or_path", "revision", "inference_mode")


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter comes from.

    Attributes:
        name: as the user gave it.
        folder: local folder of its files.
        base: its base model.
    """

    name: str
    folder: Path
    base: ModelSource

    @property
    def tokenizer(self) -> ModelSource:
        """Where the tokenizer is: beside the adapter, with the chat template of its training, else at its base."""
        return ModelSource(self.name, self.folder, None) if list(self.folder.glob("tokenizer*")) else self.base

    @cached_property
    def sha256(self) -> str:
        """Hash of the adapter's weights and configuration and of its base model."""
        settings = {key: value for key, value in _settings(self.folder, self.name).items() if key not in _PLACES}
        content = [self.base.sha256, remembered_sha256(self.folder / WEIGHTS), settings]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def find_policy(name: str, base: str | None = None) -> ModelSource | AdapterSource:
    """Resolves the name of a model or of an adapter to local files, downloading from the hub if need be.

    Args:
        name: as `find_model` takes it, or the same of an adapter.
        base: an adapter's base model; default the one that its configuration names.

    Raises:
        UserError: as `find_model`; the adapter or its base model cannot be used; `base` is given for a model.
    """
    source = find_files(name)
    if source.gguf_file is not None or not (source.folder / ADAPTER_CONFIG).exists():
        if base is not None:
            raise UserError(f"--base: {name} is a model, not an adapter ({ADAPTER_CONFIG}); leave it out")
        if source.gguf_file is None:
            check_model_folder(source.folder, name)
        return source
    if not (source.folder / WEIGHTS).is_file():
        raise UserError(
            f"adapter {name}: expected {WEIGHTS} in {source.folder}, found none; pickles are not read: save it as "
            "safetensors"
        )
    settings = _settings(source.folder, name)
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"adapter {name}: expected a LoRA adapter, found peft_type {settings.get('peft_type')!r}; give another"
        )
    if base is not None:
        return AdapterSource(name, source.folder, find_model(base))
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"adapter {name}: its {ADAPTER_CONFIG} names no base model; give --base")
    try:
        return AdapterSource(name, source.folder, find_model(named))
    except UserError as error:
        raise UserError(f"adapter {name}: its base model cannot be used: {error}; or give --base") from error


def _settings(folder: Path, name: str) -> dict[str, Any]:
    with reading(f"adapter {name}: cannot read {ADAPTER_CONFIG}"):
        settings = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        if not isinstance(settings, dict):
            raise UserError(f"expected a mapping, found {type(settings).__name__}")
    return settings


def load_adapter(source: AdapterSource, *, attention: str, device: torch.device | str) -> Any:
    """Loads the base model and puts the adapter into its layers, in fp32 and eval mode.

    Args:
        source: from `find_policy`.
        attention: as `load_model` takes it.
        device: where it goes.

    Returns:
        A `peft.PeftModel`.

    Raises:
        UserError: as `load_model`; the adapter does not fit the model, or one lacks weights of the other.
        FloatingPointError: a weight is not finite.
    """
    from peft import LoraConfig, PeftModel

    model = load_model(source.base, attention=attention, device=device)
    with reading(f"adapter {source.name}: PEFT cannot put it into {source.base.name}"):
        config = LoraConfig.from_pretrained(str(source.folder))
        config.inference_mode = True
        adapted = PeftModel(model, config)
        report = adapted.load_adapter(str(source.folder), "default", torch_device=str(device))
        if wrong := [*report.missing_keys, *report.unexpected_keys]:
            raise UserError(
                f"expected one set of LoRA weights, found {len(wrong)} in the file or in the model alone, such as "
                f"{wrong[0]}; give another --base"
            )
    if infinite := [name for name, weight in adapted.named_parameters() if not weight.isfinite().all()]:
        raise FloatingPointError(
            f"adapter {source.name}: expected finite weights, found {len(infinite)} with other values, such as "
            f"{infinite[0]}; give another copy"
        )
    return adapted.to(device).eval()
