"""A tiny random model of every causal architecture that the installed transformers has, built from its configuration.

Sizes are shrunk by the names that configurations give them; what is left is in `SPECIAL`. Weights are drawn large
enough for a mistake in any part to show in the logits.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VOCABULARY, HIDDEN, WINDOW = 100, 32, 8
LARGEST = 8_000_000

SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "text_vocab_size"], VOCABULARY),
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "dim", "dim_model", "embedding_size", "word_embed_proj_dim"], 32
    ),
    **dict.fromkeys(["attention_hidden_size", "input_embedding_size", "emb_dim", "lru_width", "mamba_d_ssm"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_inner", "dim_ff"], 64),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "shared_expert_intermediate_size"], 64),
    **dict.fromkeys(
        ["intermediate_size_mlp", "mlp_hidden_size", "expert_ffn_hidden_size", "dense_intermediate_size"], 64
    ),
    **dict.fromkeys(["moe_intermediate_size", "moe_shared_expert_intermediate_size", "expert_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "attention_head_dim", "kv_channels", "dim_head", "global_head_dim", "d_kv"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"], 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["sliding_window", "window_size", "attention_window_size", "local_attention"], WINDOW),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"], 256),
    **dict.fromkeys(["max_target_positions", "context_length"], 256),
    **dict.fromkeys(["mamba_n_heads", "num_mamba_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim"], 8),
    **dict.fromkeys(["mamba_d_state", "ssm_state_size", "state_size"], 8),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["pad_token_id"], 0),
    **dict.fromkeys(["bos_token_id"], 1),
    **dict.fromkeys(["eos_token_id", "decoder_start_token_id", "sep_token_id"], 2),
    **dict.fromkeys(["rotary_dim", "rotary_pct_dim"], 4),
    "query_pre_attn_scalar": 8,
}
# What the rules above leave wrong for one architecture.
_MULTIPLIED = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.4,
    "logits_scaling": 8.0,
}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
_GEMMA4 = _PER_LAYER | {"global_head_dim": 8, "num_global_key_value_heads": 2}
_WINDOWS = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
_SET_WHERE_OFF = ("sliding_window", "pad_token_id")
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gemma3n_text": _PER_LAYER | {"num_kv_shared_layers": 0},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granite": _MULTIPLIED,
    "granite_swa": _MULTIPLIED,
    "granitemoe": _MULTIPLIED,
    "granitemoe_swa": _MULTIPLIED,
    "granitemoehybrid": _MULTIPLIED | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "granitemoeshared": _MULTIPLIED,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "phimoe": {"sliding_window": WINDOW},
    "qwen2": _WINDOWS,
    "qwen2_moe": _WINDOWS,
    "qwen3": _WINDOWS,
    "qwen3_moe": {"use_sliding_window": True},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 2},
    "roc_bert": {
        "shape_vocab_size": 50,
        "pronunciation_vocab_size": 50,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "mamba_expand": 2,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str, **settings: Any) -> Any:
    """The configuration of a tiny model of this type, with settings beside those of the tiny ones."""
    config_class: Any = CONFIG_MAPPING[kind]
    return _shrunk(config_class, SPECIAL.get(kind, {}) | settings)


def _shrunk(config_class: Any, special: dict[str, Any]) -> Any:
    default = config_class()
    known = {name: _value(default, name) for name in SIZES}
    sizes = {name: value for name, value in SIZES.items() if known[name] is not None or name in _SET_WHERE_OFF}
    sizes = {name: value for name, value in sizes.items() if _is_setting(config_class, name)}
    if known["num_key_value_heads"] == _value(default, "num_attention_heads") and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if kinds := list(dict.fromkeys(_value(default, "layer_types") or ())):
        sizes["num_hidden_layers"] = max(2, len(kinds))
        sizes["layer_types"] = (kinds * 2)[: sizes["num_hidden_layers"]]
    for name in getattr(config_class, "sub_configs", {}):
        if (sub := _value(default, name)) is not None:
            sizes[name] = _shrunk(type(sub), special.get(name, {}))
    sizes = {name: value for name, value in sizes.items() if _is_setting(config_class, name)}
    return config_class(
        **{
            **sizes,
            **{name: value for name, value in special.items() if name not in sizes or not isinstance(value, dict)},
        }
    )


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 (it differs from layer to layer)
        return SIZES[name]


def _is_setting(config_class: Any, name: str) -> bool:
    """Whether a configuration takes a setting of this name, and does not derive it from others."""
    name = config_class.attribute_map.get(name, name)
    attribute = getattr(config_class, name, None)
    fields = getattr(config_class, "__dataclass_fields__", {})
    return not (isinstance(attribute, property) and attribute.fset is None) and (name in fields or not fields)


def tiny_model(config: Any, seed: int = 0) -> Any:
    """The model, in eager attention and eval mode, its weights drawn from `seed`."""
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters; SPECIAL has to make it smaller")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for _, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.data = noise / weight.shape[-1] ** 0.5
        else:
            weight.data = weight.data + 0.2 * noise
    return model.eval()
