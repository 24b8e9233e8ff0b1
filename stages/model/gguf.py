"""Settings of a GGUF file, carried over to transformers' configuration.

In: a GGUF file and the configuration that transformers makes of it. Out: the configuration with every number that the
file states or implies. transformers reads some keys of an architecture and silently takes defaults for the rest. This
module carries over every key under the architecture's name, knows that it changes nothing, or refuses it by name. What
a key means, and what its absence means, follows llama.cpp (src/llama-model.cpp).

Shapes: F rotary frequencies of a head, half of its rotated size.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.errors import UserError, reading

# By GGUF key, the attribute of the configuration for the same number.
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
CAPS = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        names: by GGUF key, the attribute of the configuration.
        rotary: whether positions are encoded as rotations.
        partial: whether the rotation may cover only a part of a head.
        biases: pairs of a tensor and the attribute that says whether layers have it.
        period: one layer in `period` attends to all tokens, the others to the window; 0 if all layers are alike.
        deepest: layers of the one model that scales queries by hidden size over heads; 0 if the configuration has no
            scale of queries.
        absent: attributes and their values, unless the file states others.
    """

    names: Mapping[str, str]
    rotary: bool = True
    partial: bool = False
    biases: tuple[tuple[str, str], ...] = ()
    period: int = 0
    deepest: int = 0
    absent: tuple[tuple[str, Any], ...] = ()


ARCHITECTURES = {
    "llama": Architecture(
        SHAPE | RMS_NORM,
        biases=(("blk.0.attn_q.bias", "attention_bias"), ("blk.0.ffn_up.bias", "mlp_bias")),
        absent=(("sliding_window", None),),
    ),
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
# Keys with rules of their own, below.
DERIVED = {"attention.key_length", "attention.value_length", "attention.scale", "attention.sliding_window_pattern"}
ROPE = {
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_log_multiplier"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
# Keys that change no result: StableLM's tensors say whether its layers run in parallel.
IRRELEVANT = {"tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual"}
# Keys that change no result if they have this value.
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale"), 1.0),
    **dict.fromkeys(("expert_count", "expert_used_count", "attention.max_alibi_bias", "attention.clamp_kqv"), 0),
    **dict.fromkeys(CAPS, 0.0),
    "attention.causal": True,
}
REQUIRED = {"context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count"}
# Tensors of frequency factors.
LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class GGUFHeader:
    """A GGUF file without its weights.

    Attributes:
        architecture: llama.cpp's name.
        metadata: the keys under that name, without the name.
        tensors: names of all tensors.
        factors: by name, the tensors [F] of rotary frequency factors, float64.
    """

    architecture: str
    metadata: Mapping[str, Any]
    tensors: frozenset[str]
    factors: Mapping[str, np.ndarray]


def _header(path: Path) -> GGUFHeader:
    return _read_header(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_header(path: Path, mtime: int) -> GGUFHeader:
    from gguf import GGUFReader, dequantize

    with reading(f"model {path}: gguf cannot read it"):
        reader = GGUFReader(str(path))
        architecture = str(reader.fields["general.architecture"].contents())
        prefix = f"{architecture}."
        metadata = {
            key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)
        }
        factors = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64).ravel()
            for tensor in reader.tensors
            if tensor.name in (LLAMA3, LONG, SHORT)
        }
        return GGUFHeader(architecture, metadata, frozenset(tensor.name for tensor in reader.tensors), factors)


def settle_config(config: Any, path: Path, name: str) -> None:
    """Sets every attribute of a configuration that its file states or implies.

    Args:
        config: what transformers made of the file; changed in place.
        path: the file.
        name: what the user calls the model.

    Raises:
        UserError: the architecture, or a key that may change results, is not known here; names it.
    """
    header = _header(path)
    try:
        if (rule := ARCHITECTURES.get(header.architecture)) is None:
            known = ", ".join(sorted(ARCHITECTURES))
            raise UserError(f"expected a GGUF file of {known}, found {header.architecture!r}, which is not known here")
        _check_keys(header, rule)
        wanted = _attributes(header, rule)
        if rule.rotary:
            wanted |= _rope_attributes(config, header.metadata, _rope(header, wanted["head_dim"], rule.partial))
    except UserError as error:
        raise UserError(f"model {name}: {error}; give the model as safetensors") from error
    implied = {"head_dim": config.hidden_size // config.num_attention_heads, "n_inner": 4 * config.hidden_size}
    for attribute, value in wanted.items():
        stated = getattr(config, attribute, None)
        if not _same(implied.get(attribute) if stated is None else stated, value):
            setattr(config, attribute, value)


def _check_keys(header: GGUFHeader, rule: Architecture) -> None:
    metadata, architecture = header.metadata, header.architecture
    known = set(rule.names) | DERIVED | IRRELEVANT | (ROPE if rule.rotary else set())
    unknown = sorted(key for key, value in metadata.items() if key not in known and not _same(NEUTRAL.get(key), value))
    if unknown:
        found = ", ".join(f"{architecture}.{key} = {metadata[key]!r:.40}" for key in unknown)
        raise UserError(f"expected metadata whose meaning is known for {architecture}, found {found}")
    epsilon = {key for key in rule.names if key.endswith("epsilon")}
    if missing := sorted((REQUIRED | epsilon) - set(metadata)):
        raise UserError(f"expected {', '.join(f'{architecture}.{key}' for key in missing)} in the metadata, found none")


def _attributes(header: GGUFHeader, rule: Architecture) -> dict[str, Any]:
    """The attributes of the configuration that the file states or implies, without rotary parameters."""
    metadata = header.metadata
    wanted = dict(rule.absent) | {name: metadata[key] for key, name in rule.names.items() if key in metadata}
    wanted |= {name: wanted[name] or None for name in CAPS if name in wanted}  # 0 means none
    wanted |= {name: tensor in header.tensors for tensor, name in rule.biases}
    heads, layers = metadata["attention.head_count"], metadata["block_count"]
    if "attention.head_count_kv" in rule.names:
        wanted.setdefault("num_key_value_heads", heads)
    wanted["head_dim"] = head_dim = metadata.get("attention.key_length", metadata["embedding_length"] // heads)
    if (values := metadata.get("attention.value_length", head_dim)) != head_dim:
        raise UserError(f"expected keys and values of one length, found {head_dim} and {values}")
    scale = metadata.get("attention.scale")
    if rule.deepest:
        scalar = metadata["embedding_length"] // heads if layers == rule.deepest else head_dim
        if scale and not _same(scalar := round(1 / scale**2), 1 / scale**2):
            scalar = 1 / scale**2
        wanted["query_pre_attn_scalar"] = scalar
    elif scale is not None and not _same(scale, head_dim**-0.5):
        raise UserError(f"expected {header.architecture}.attention.scale of 1/√{head_dim}, found {scale:g}")
    pattern = metadata.get("attention.sliding_window_pattern", rule.period)
    if rule.period:
        period = pattern or layers + 1  # 0: no layer attends to all tokens
        sliding = pattern if isinstance(pattern, list) else [i % period != period - 1 for i in range(layers)]
        if len(sliding) != layers:
            raise UserError(f"expected attention.sliding_window_pattern of {layers} layers, found {len(sliding)}")
        wanted["layer_types"] = ["sliding_attention" if within else "full_attention" for within in sliding]
    elif pattern:
        raise UserError(f"expected no {header.architecture}.attention.sliding_window_pattern, found {pattern}")
    return wanted


def _rope_attributes(config: Any, metadata: Mapping[str, Any], main: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters in the form of this configuration: one set, or one a type of layer (Gemma-3)."""
    local = metadata.get("rope.freq_base_swa", 10_000.0)
    if "full_attention" in config.rope_parameters:
        within = {"rope_type": "default", "rope_theta": local}
        return {"rope_parameters": {"full_attention": main, "sliding_attention": within}}
    if "rope.freq_base_swa" in metadata and local != main["rope_theta"]:
        raise UserError(f"expected one base of the rotary frequencies, found {main['rope_theta']:g} and {local:g}")
    wanted: dict[str, Any] = {"rope_parameters": main}
    length = "original_max_position_embeddings"  # an attribute of this name takes precedence over the parameters
    if getattr(config, length, None) is not None and length in main:
        wanted[length] = main[length]
    return wanted


def _rope(header: GGUFHeader, head_dim: int, partial: bool) -> dict[str, Any]:
    """The `rope_parameters` of transformers for the file's frequencies; `partial` as in `Architecture`."""
    metadata, factors = header.metadata, header.factors
    rotated = metadata.get("rope.dimension_count", head_dim)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(metadata.get("rope.freq_base", 10_000.0))}
    if partial:
        rope["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise UserError(f"expected rope.dimension_count {head_dim}, the size of a head, found {rotated}")
    length = int(metadata.get("rope.scaling.original_context_length", metadata["context_length"]))
    scaling = _scaling(metadata, length)
    if factors and scaling["rope_type"] not in ("default", "longrope"):
        raise UserError(f"expected {', '.join(factors)} without rope.scaling, found {scaling['rope_type']} as well")
    if set(factors) == {LLAMA3}:
        if (known := _llama3(factors[LLAMA3], rope["rope_theta"], rotated, metadata)) is not None:
            return rope | known
        factors = dict.fromkeys((LONG, SHORT), factors[LLAMA3])  # longrope with the same factors at all lengths
    if factors or scaling["rope_type"] == "longrope":
        if missing := [name for name in (LONG, SHORT) if name not in factors]:
            raise UserError(f"expected the tensors {LONG} and {SHORT}, found no {' and no '.join(missing)}")
        scaling = {
            "rope_type": "longrope",
            "long_factor": factors[LONG].tolist(),
            "short_factor": factors[SHORT].tolist(),
            "original_max_position_embeddings": length,
            "attention_factor": float(metadata.get("rope.scaling.attn_factor", 1.0)),
        }
    return rope | scaling


def _scaling(metadata: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The scaling that the metadata states; the default is linear with factor 1."""
    kind = metadata.get("rope.scaling.type", "linear")
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0)) or 1.0)
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        if metadata.get(key, 1.0) != 1.0 and kind != "longrope":
            raise UserError(f"expected {key} 1, found {metadata[key]:g}")
    if multiplier := metadata.get("rope.scaling.yarn_log_multiplier", 0.0):
        raise UserError(f"expected no rope.scaling.yarn_log_multiplier, found {multiplier:g}")
    if kind == "longrope":
        return {"rope_type": "longrope"}
    if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": length,
            "attention_factor": float(metadata.get("rope.scaling.attn_factor", 1.0)) * (1 + 0.1 * math.log(factor)),
            "beta_fast": float(metadata.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(metadata.get("rope.scaling.yarn_beta_slow", 1.0)),
        }
    raise UserError(f"expected rope.scaling.type none, linear, yarn or longrope, found {kind!r}")


def _llama3(factors_F: np.ndarray, theta: float, rotated: int, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3.1's scaling, its settings recovered from its factors; None for factors of another scaling."""
    if np.allclose(factors_F, 1.0, rtol=1e-6):
        return {"rope_type": "default"}
    low, high, factor = 1.0, 4.0, float(factors_F.max())  # Llama 3.1 to 3.3; the lowest frequency has the whole factor
    stated = metadata.get("rope.scaling.original_context_length")
    waves_F = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    for length in (*([stated] if stated else []), *(2**power for power in range(3, 21))):
        smooth_F = (length / waves_F - low) / (high - low)
        made_F = 1 / ((1 - smooth_F) / factor + smooth_F)
        made_F = np.where(waves_F < length / high, 1.0, np.where(waves_F > length / low, factor, made_F))
        if made_F.shape == factors_F.shape and np.allclose(made_F, factors_F, rtol=1e-5):
            settings = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", **settings, "original_max_position_embeddings": int(length)}
    return None


def _same(found: Any, wanted: Any) -> bool:
    """Whether two values are equal, numbers up to the rounding of the file's float32."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[key], wanted[key]) for key in found)
    if found is None:
        return wanted is None or wanted is False  # the configuration has no such attribute
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def check_tensors(model: Any, path: Path, name: str) -> None:
    """Checks that every tensor of the file is a weight of the model or was carried into its configuration.

    Raises:
        UserError: there are others, which transformers would ignore.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    header = _header(path)
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    known = {*header.factors, "output.weight"}
    for weight in model.state_dict():
        stem = weight.rpartition(".")[0]
        packed = [f"{stem}.{part}_proj.weight" for part in ("gate", "up", "down")]  # three tensors in the file
        parts = packed if stem.endswith("experts") else [weight]
        known |= {names.get_name(part, try_suffixes=(".weight", ".bias")) for part in parts}
    if left_out := sorted(header.tensors - known):
        some = ", ".join(left_out[:3]) + (" …" if len(left_out) > 3 else "")
        raise UserError(
            f"model {name}: expected tensors that {type(model).__name__} has, found {len(left_out)} others ({some}), "
            "which transformers leaves out; give the model as safetensors"
        )
