"""Writes GGUF files of tiny models, as llama.cpp's convert_hf_to_gguf.py would.

In: a transformers model. Out: a file with its weights in fp32 under llama.cpp's names, and whatever metadata is given.
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

# What its converter writes for every model of an architecture, by key, as it reads a configuration.
SHAPE = {
    "context_length": lambda c: c.max_position_embeddings,
    "block_count": lambda c: c.num_hidden_layers,
    "embedding_length": lambda c: c.hidden_size,
    "feed_forward_length": lambda c: getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
    "attention.head_count": lambda c: c.num_attention_heads,
    "attention.head_count_kv": lambda c: getattr(c, "num_key_value_heads", None),
    "attention.key_length": lambda c: getattr(c, "head_dim", None),
    "attention.value_length": lambda c: getattr(c, "head_dim", None),
    "vocab_size": lambda c: c.vocab_size,
    "rope.freq_base": lambda c: _theta(c),
    "attention.layer_norm_rms_epsilon": lambda c: getattr(c, "rms_norm_eps", None),
    "attention.layer_norm_epsilon": lambda c: next(
        (
            getattr(c, name)
            for name in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
            if hasattr(c, name)
        ),
        None,
    ),
    "expert_count": lambda c: getattr(c, "num_experts", None),
    "expert_used_count": lambda c: getattr(c, "num_experts_per_tok", None),
    "expert_feed_forward_length": lambda c: getattr(c, "moe_intermediate_size", None),
    "expert_shared_feed_forward_length": lambda c: getattr(c, "shared_expert_intermediate_size", None),
}
WINDOWED = ("gemma2", "gemma3", "phi3")


def _theta(config: Any) -> float | None:
    rope = getattr(config, "rope_parameters", None)
    return None if rope is None else rope.get("full_attention", rope)["rope_theta"]


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    more: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Writes a file.

    Args:
        path: the file.
        model: a causal LM.
        architecture: llama.cpp's name.
        more: metadata under the architecture's name, in place of or beside what the configuration gives; None for
            keys to leave out.
        tensors: more of them, by llama.cpp's names.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    config = model.config
    metadata = {key: read(config) for key, read in SHAPE.items()}
    if architecture in WINDOWED:
        metadata["attention.sliding_window"] = config.sliding_window
    if architecture in ("phi3", "stablelm", "nemotron"):
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        metadata["rope.dimension_count"] = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
    writer = GGUFWriter(str(path), architecture)
    for key, value in (metadata | (more or {})).items():
        if value is not None:
            _add(writer, f"{architecture}.{key}", value)
    arch = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for theirs, data in _as_llama_cpp(name, weight.float().numpy(), architecture, config):
            stored = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            assert stored is not None, theirs
            writer.add_tensor(stored, np.ascontiguousarray(data))
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kind.get(type(value), writer.add_array)(key, value)


def _as_llama_cpp(name: str, weight: np.ndarray, architecture: str, config: Any) -> list[tuple[str, np.ndarray]]:
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return [(name, halves.swapaxes(1, 2).reshape(weight.shape))]
    if architecture in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return [(name, weight + 1)]
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return [(name, weight.T)]
    if name.endswith("shared_expert_gate.weight"):
        return [(name, weight[0])]
    if name.endswith("experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), weight.shape[1] // 2
        return [(f"{stem}gate_proj.weight", weight[:, :half]), (f"{stem}up_proj.weight", weight[:, half:])]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", weight)]
    return [(name, weight)]
