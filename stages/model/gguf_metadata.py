"""What a GGUF file says of its model, carried over to the configuration that transformers makes of it.

In: a GGUF file and that configuration. Out: the configuration with every number that the file states or implies, or one
line that says which part of the file is not known here. transformers reads some keys of an architecture and takes its
own defaults for the rest, in silence; here every key under the architecture's name is carried over, is known to change
nothing, or is refused. What a key means, and what its absence means, is llama.cpp's rule (src/llama-model.cpp).
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.errors import reading
from .gguf_rope import FACTOR_TENSORS, ROPE_KEYS, rope_parameters

# By GGUF key, the attribute of the configuration that is the same number.
SHAPE = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
RMS_NORM = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        names: by GGUF key, the attribute of the configuration.
        rotary: positions are rotations.
        partial: the rotation may leave out a part of a head.
        biases: by tensor, the attribute that says that layers have it.
        period: every so manieth layer attends to all tokens, the others within the window; 0 if all are alike.
        deepest: number of layers of the one model whose queries are scaled by hidden size over heads; 0 if the
            configuration has no scale of queries.
        absent: attributes that are so where the file does not say otherwise.
    """

    names: Mapping[str, str]
    rotary: bool = True
    partial: bool = False
    biases: tuple[tuple[str, str], ...] = ()
    period: int = 0
    deepest: int = 0
    absent: tuple[tuple[str, Any], ...] = ()


LLAMA_BIASES = (("blk.0.attn_q.bias", "attention_bias"), ("blk.0.ffn_up.bias", "mlp_bias"))
ARCHITECTURES = {
    "llama": Architecture(SHAPE | RMS_NORM, biases=LLAMA_BIASES, absent=(("sliding_window", None),)),
    "qwen2": Architecture(SHAPE | RMS_NORM),
    "qwen2moe": Architecture(
        SHAPE | RMS_NORM | EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
    ),
    "qwen3": Architecture(SHAPE | RMS_NORM),
    "qwen3moe": Architecture(SHAPE | RMS_NORM | EXPERTS),
    "gemma2": Architecture(SHAPE | RMS_NORM | WINDOW | CAPS, period=2, deepest=46),
    "gemma3": Architecture(SHAPE | RMS_NORM | WINDOW | CAPS, period=6, deepest=62),
    "phi3": Architecture(SHAPE | RMS_NORM | WINDOW, partial=True),
    "starcoder2": Architecture(SHAPE | {"attention.layer_norm_epsilon": "norm_epsilon"}),
    "stablelm": Architecture(SHAPE | {"attention.layer_norm_epsilon": "layer_norm_eps"}, partial=True),
    "nemotron": Architecture(SHAPE | {"attention.layer_norm_epsilon": "norm_eps"}, partial=True),
    "gpt2": Architecture(
        {key: name for key, name in SHAPE.items() if key != "attention.head_count_kv"}
        | {"feed_forward_length": "n_inner", "attention.layer_norm_epsilon": "layer_norm_epsilon"},
        rotary=False,
    ),
}
# Carried over below, each in a way of its own.
DERIVED = {"attention.key_length", "attention.value_length", "attention.scale", "attention.sliding_window_pattern"}
# Says nothing of what is computed: of StableLM's layers it is the tensors that say whether they run side by side.
IRRELEVANT = {"tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual"}
# Changes nothing where it has this value.
NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_weights_scale": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "attention.causal": True,
    "attention.max_alibi_bias": 0.0,
    "attention.clamp_kqv": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
}
REQUIRED = {"context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count"}


@dataclass(frozen=True)
class GGUFHeader:
    """The part of a GGUF file that is no weight.

    Attributes:
        architecture: llama.cpp's name.
        metadata: what stands under it, without the name and its dot.
        tensors: names of all tensors.
        factors: by name, the tensors that are factors of rotary frequencies, float64.
    """

    architecture: str
    metadata: Mapping[str, Any]
    tensors: frozenset[str]
    factors: Mapping[str, np.ndarray]


def read_header(path: Path) -> GGUFHeader:
    """Reads the header of a GGUF file.

    Raises:
        ValueError: it cannot be read.
    """
    stat = path.stat()
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_header(path: Path, size: int, mtime: int) -> GGUFHeader:
    from gguf import GGUFReader, dequantize

    with reading(f"model {path}: gguf cannot read it"):
        reader = GGUFReader(str(path))
        architecture = str(reader.fields["general.architecture"].contents())
        prefix = f"{architecture}."
        metadata = {
            key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)
        }
        factors = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
            if tensor.name in FACTOR_TENSORS
        }
        return GGUFHeader(architecture, metadata, frozenset(tensor.name for tensor in reader.tensors), factors)


def settle_config(config: Any, path: Path, name: str) -> None:
    """Gives a configuration every number that its file states or implies.

    Args:
        config: what transformers made of the file; changed in place.
        path: the file.
        name: what the user calls the model.

    Raises:
        ValueError: the architecture, or a key that may change what is computed, is not known here; names it.
    """
    header = read_header(path)
    rule = ARCHITECTURES.get(header.architecture)
    if rule is None:
        raise ValueError(
            f"model {name}: expected a GGUF file of {', '.join(sorted(ARCHITECTURES))}, found {header.architecture!r}, "
            "whose metadata is not known here; give the model as safetensors"
        )
    _check_keys(header, rule, name)
    try:
        wanted = _wanted(header, rule)
        if rule.rotary:
            main = rope_parameters(header.metadata, header.factors, wanted["head_dim"], partial=rule.partial)
            wanted |= _rope_by_layer(config, header.metadata, main)
    except ValueError as error:
        raise ValueError(f"model {name}: {error}; give the model as safetensors") from error
    for attribute, value in wanted.items():
        if not _same(_current(config, attribute), value):
            setattr(config, attribute, value)


def _check_keys(header: GGUFHeader, rule: Architecture, name: str) -> None:
    metadata = header.metadata
    known = set(rule.names) | DERIVED | IRRELEVANT | (ROPE_KEYS if rule.rotary else set())
    unknown = sorted(key for key, value in metadata.items() if key not in known and not _same(NEUTRAL.get(key), value))
    if unknown:
        found = ", ".join(f"{header.architecture}.{key} = {metadata[key]!r:.40}" for key in unknown)
        raise ValueError(
            f"model {name}: expected metadata whose meaning is known for {header.architecture}, found {found}; "
            "give the model as safetensors"
        )
    epsilon = {key for key in rule.names if key.endswith("epsilon")}
    if missing := sorted((REQUIRED | epsilon) - set(metadata)):
        raise ValueError(
            f"model {name}: expected {', '.join(f'{header.architecture}.{key}' for key in missing)} in the file's "
            "metadata, found none; give another copy"
        )


def _wanted(header: GGUFHeader, rule: Architecture) -> dict[str, Any]:
    """By attribute of the configuration, what the file says of it.

    Raises:
        ValueError: no configuration can say that.
    """
    metadata = header.metadata
    wanted = dict(rule.absent)
    wanted |= {name: metadata[key] for key, name in rule.names.items() if key in metadata}
    wanted |= {name: wanted[name] or None for name in CAPS if name in wanted}  # 0 is none
    heads = metadata["attention.head_count"]
    if "attention.head_count_kv" in rule.names:
        wanted.setdefault("num_key_value_heads", heads)
    head_dim = metadata.get("attention.key_length", metadata["embedding_length"] // heads)
    if (values := metadata.get("attention.value_length", head_dim)) != head_dim:
        raise ValueError(f"expected keys and values of one length, found {head_dim} and {values}")
    wanted["head_dim"] = head_dim
    wanted |= {name: tensor in header.tensors for tensor, name in rule.biases}
    layers = metadata["block_count"]
    if rule.deepest:
        default = metadata["embedding_length"] // heads if layers == rule.deepest else head_dim
        scale = metadata.get("attention.scale")
        wanted["query_pre_attn_scalar"] = default if not scale else _whole(1 / scale**2)
    elif not _same(metadata.get("attention.scale", head_dim**-0.5), head_dim**-0.5):
        raise ValueError(f"expected {header.architecture}.attention.scale of 1/√{head_dim}, found another")
    pattern = metadata.get("attention.sliding_window_pattern", rule.period)
    if rule.period:
        period = pattern or layers + 1  # none attends to all
        sliding = pattern if isinstance(pattern, list) else [i % period != period - 1 for i in range(layers)]
        if len(sliding) != layers:
            raise ValueError(f"expected attention.sliding_window_pattern of {layers} layers, found {len(sliding)}")
        wanted["layer_types"] = ["sliding_attention" if within else "full_attention" for within in sliding]
    elif pattern:
        raise ValueError(f"expected no {header.architecture}.attention.sliding_window_pattern, found {pattern}")
    return wanted


def _rope_by_layer(config: Any, metadata: Mapping[str, Any], main: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters as this configuration holds them: once, or for each type of layer (Gemma-3)."""
    local = metadata.get("rope.freq_base_swa", 10_000.0)
    if "full_attention" in config.rope_parameters:
        within = {"rope_type": "default", "rope_theta": local}
        return {"rope_parameters": {"full_attention": main, "sliding_attention": within}}
    if "rope.freq_base_swa" in metadata and local != main["rope_theta"]:
        raise ValueError(f"expected one base of the rotary frequencies, found {main['rope_theta']:g} and {local:g}")
    outside = getattr(config, "original_max_position_embeddings", None)  # goes before the one among the parameters
    inside = main.get("original_max_position_embeddings")
    return {"rope_parameters": main} | (
        {"original_max_position_embeddings": inside} if outside is not None and inside is not None else {}
    )


def _current(config: Any, attribute: str) -> Any:
    """What a configuration says, or implies where it may leave it open."""
    value = getattr(config, attribute, None)
    if value is None and attribute == "head_dim":
        return config.hidden_size // config.num_attention_heads
    if value is None and attribute == "n_inner":
        return 4 * config.hidden_size
    return value


def _whole(value: float) -> float | int:
    """A number as an integer where it is one but for the rounding of the file's float32."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-6) else value


def _same(found: Any, wanted: Any) -> bool:
    """Whether two values are equal, numbers but for the rounding of the file's float32."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[key], wanted[key]) for key in found)
    if found is None:
        return wanted is None or wanted is False  # an attribute that a configuration does not have
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def check_tensors(model: Any, path: Path, name: str) -> None:
    """Checks that every tensor of the file is a weight of the model, or is in its configuration by now.

    Raises:
        ValueError: there are others, which transformers leaves out.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    header = read_header(path)
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    known = {*header.factors, "output.weight"}
    for weight in model.state_dict():
        known.add(names.get_name(weight, try_suffixes=(".weight", ".bias")))
        if weight.endswith("experts.gate_up_proj"):  # two tensors there
            for part in ("gate_proj.weight", "up_proj.weight"):
                known.add(names.get_name(weight.replace("gate_up_proj", part), try_suffixes=(".weight",)))
        elif weight.endswith("experts.down_proj"):
            known.add(names.get_name(f"{weight}.weight", try_suffixes=(".weight",)))
    left_out = sorted(header.tensors - known)
    if left_out:
        raise ValueError(
            f"model {name}: expected tensors that {type(model).__name__} has, found {len(left_out)} others "
            f"({', '.join(left_out[:3])}{' …' if len(left_out) > 3 else ''}), which transformers leaves out; give the "
            "model as safetensors"
        )
