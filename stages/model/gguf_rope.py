"""Rotary frequencies as GGUF files write them, as transformers' parameters.

In: the metadata of a GGUF file and its tensors of frequency factors. Out: the entry of `rope_parameters` that gives the
same frequencies.

Shapes: F frequencies of a head, half of its rotated size.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

ROPE_KEYS = {
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
}
LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (LLAMA3, LONG, SHORT)

# Settings of Llama 3.1 to 3.3, by which its factors are made; the factors alone do not hold them.
LOW, HIGH = 1.0, 4.0
FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
LENGTHS = tuple(2**power for power in range(3, 21))


def rope_parameters(
    metadata: Mapping[str, Any], factors: Mapping[str, np.ndarray], head_dim: int, *, partial: bool
) -> dict[str, Any]:
    """The rotary parameters of a file.

    Args:
        metadata: by key, without the architecture's name.
        factors: by name, tensors of frequency factors [F].
        head_dim: size of a head.
        partial: whether the architecture can rotate a part of a head.

    Raises:
        ValueError: transformers has no parameters that mean the same.
    """
    rotated = metadata.get("rope.dimension_count", head_dim)
    theta = float(metadata.get("rope.freq_base", 10_000.0))
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if partial:
        found["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise ValueError(f"expected rope.dimension_count {head_dim}, the size of a head, found {rotated}")
    scaling = _scaling(metadata)
    if factors and scaling["rope_type"] not in ("default", "longrope"):
        raise ValueError(f"expected {', '.join(factors)} without rope.scaling, found {scaling['rope_type']} as well")
    if LONG in factors or SHORT in factors:
        scaling = _long(metadata, factors)
    elif LLAMA3 in factors:
        scaling = _llama3(factors[LLAMA3].ravel(), theta, rotated, metadata)
    elif scaling["rope_type"] == "longrope":
        raise ValueError(f"expected the tensors {LONG} and {SHORT} with rope.scaling.type longrope, found none")
    return found | scaling


def _scaling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling that the metadata states; without a type it is a linear one, by a factor of 1."""
    kind = metadata.get("rope.scaling.type", "linear")
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0)) or 1.0)
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor"):
        if metadata.get(key, 1.0) != 1.0 and not (kind == "longrope" or key == "rope.scaling.attn_factor"):
            raise ValueError(f"expected {key} 1, found {metadata[key]:g}")
    if multiplier := metadata.get("rope.scaling.yarn_log_multiplier", 0.0):
        raise ValueError(f"expected no rope.scaling.yarn_log_multiplier, found {multiplier:g}")
    if kind == "longrope":
        return {"rope_type": "longrope"}
    if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        length = int(metadata.get("rope.scaling.original_context_length", metadata["context_length"]))
        given = float(metadata.get("rope.scaling.attn_factor", 1.0))
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": length,
            "attention_factor": given * (1 + 0.1 * math.log(factor)),
            "beta_fast": float(metadata.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(metadata.get("rope.scaling.yarn_beta_slow", 1.0)),
        }
    raise ValueError(f"expected rope.scaling.type none, linear, yarn or longrope, found {kind!r}")


def _long(metadata: Mapping[str, Any], factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if not {LONG, SHORT} <= factors.keys():
        raise ValueError(f"expected {LONG} and {SHORT}, found one of them")
    return {
        "rope_type": "longrope",
        "long_factor": factors[LONG].ravel().tolist(),
        "short_factor": factors[SHORT].ravel().tolist(),
        "original_max_position_embeddings": int(
            metadata.get("rope.scaling.original_context_length", metadata["context_length"])
        ),
        "attention_factor": float(metadata.get("rope.scaling.attn_factor", 1.0)),
    }


def _llama3(factors_F: np.ndarray, theta: float, rotated: int, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling, whose settings are found from the factors that they make; or else these very factors.

    The latter are written as longrope's for both of its ranges of lengths, which have nothing to choose then.
    """
    if np.allclose(factors_F, 1.0, rtol=1e-6):
        return {"rope_type": "default"}
    stated = metadata.get("rope.scaling.original_context_length")
    lengths = [*([stated] if stated else []), *LENGTHS]
    waves_F = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    for factor, length in itertools.product([float(factors_F.max()), *FACTORS], lengths):
        smooth_F = (length / waves_F - LOW) / (HIGH - LOW)
        made_F = 1 / ((1 - smooth_F) / factor + smooth_F)
        made_F = np.where(waves_F < length / HIGH, 1.0, np.where(waves_F > length / LOW, factor, made_F))
        if made_F.shape == factors_F.shape and np.allclose(made_F, factors_F, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": int(length),
            }
    same = factors_F.tolist()
    length = int(stated or metadata["context_length"])
    return {
        "rope_type": "longrope",
        "long_factor": same,
        "short_factor": same,
        "original_max_position_embeddings": length,
        "attention_factor": 1.0,
    }
