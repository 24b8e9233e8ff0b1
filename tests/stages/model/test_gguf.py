"""A GGUF file means the model that it was made of, whatever its metadata say, or it is refused by name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fpo.stages.model.models import find_model, load_model
from gguf_files import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TYPES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# What a converter would find in a configuration that this architecture's files do not state.
USUAL: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8, "head_dim": 8, "sliding_window": 6},
    "gemma3": {"query_pre_attn_scalar": 8, "head_dim": 8, "sliding_window": 6, "num_hidden_layers": 7},
    "qwen3": {"head_dim": 8},
    "phi3": {"vocab_size": 32_064},  # its own padding token is one of them
    "qwen2moe": {**EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3moe": {**EXPERTS, "head_dim": 8, "norm_topk_prob": True},
    "nemotron": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
    "stablelm": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}},
    "gpt2": {"num_key_value_heads": None, "n_inner": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
ARCHITECTURES = (
    *("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3"),
    *("phi3", "starcoder2", "stablelm", "nemotron", "gpt2"),
)


def model_of(architecture: str, **changes: Any) -> Any:
    settings = SIZES | USUAL.get(architecture, {}) | changes
    settings = {key: value for key, value in settings.items() if not (architecture == "gpt2" and value is None)}
    if architecture == "gpt2":
        settings = {
            key: value for key, value in settings.items() if key not in ("intermediate_size", "attention_dropout")
        }
    config = AutoConfig.for_model(TYPES.get(architecture, architecture), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name and "lm_head" not in name:
            weight.data = 1.5 * torch.randn_like(weight) / weight.shape[-1] ** 0.5
        elif "norm" in name or "ln_" in name or "bias" in name:
            weight.data += 0.2 * torch.randn_like(weight)
    return model


def logits(model: Any) -> torch.Tensor:
    tokens = (torch.arange(40)[None] * 7) % 90 + 3
    with torch.no_grad():
        return model(tokens, use_cache=False).logits[0]


def loaded(path: Path) -> Any:
    return load_model(find_model(str(path)), attention="eager", device="cpu")


def assert_same_model(tmp_path: Path, path: Path, plain: Any) -> None:
    """As loaded, and once more as saved and loaded by transformers, which is what a trained model goes through."""
    model = loaded(path)
    assert torch.allclose(logits(model), logits(plain), atol=2e-5), (logits(model) - logits(plain)).abs().max()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_of_every_known_architecture_is_the_model_it_was_made_of(tmp_path, architecture):
    plain = model_of(architecture)
    assert_same_model(tmp_path, write_gguf(tmp_path / "x.gguf", plain, architecture), plain)


def rope(**scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **scaling}}


def llama3_factors(length: int, factor: float, low: float, high: float, size: int = 8) -> np.ndarray:
    """As convert_hf_to_gguf.py has them."""
    made = []
    for frequency in 1.0 / (10_000.0 ** (torch.arange(0, size, 2, dtype=torch.float32) / size)):
        wave = 2 * math.pi / frequency.item()
        smooth = (length / wave - low) / (high - low)
        made.append(
            1.0 if wave < length / high else factor if wave > length / low else 1 / ((1 - smooth) / factor + smooth)
        )
    return np.array(made, np.float32)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG, SHORT = [1.0, 2.0, 4.0, 8.0], [1.0, 1.5, 2.0, 3.0]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
# Architecture, what differs from the usual configuration, metadata, tensors: each as a converter writes it.
STATED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, np.ndarray]]] = {
    "Llama 3.1's frequencies": (
        "llama",
        rope(**LLAMA3, original_max_position_embeddings=32),
        {},
        {"rope_freqs.weight": llama3_factors(32, 8.0, 1.0, 4.0)},
    ),
    "frequency factors of another making": (
        "llama",
        rope(**LLAMA3 | {"high_freq_factor": 9.0}, original_max_position_embeddings=50),
        {},
        {"rope_freqs.weight": llama3_factors(50, 8.0, 1.0, 9.0)},
    ),
    "frequency factors of 1": ("llama", {}, {}, {"rope_freqs.weight": np.ones(4)}),
    "linear scaling": (
        "llama",
        rope(rope_type="linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "linear scaling without its type": ("qwen2", rope(rope_type="linear", factor=2.0), {"rope.scale_linear": 2.0}, {}),
    "yarn": ("qwen2", rope(**YARN), YARN_KEYS, {}),
    "yarn with its bounds": (
        "qwen3",
        rope(**YARN, beta_fast=16.0, beta_slow=2.0),
        YARN_KEYS | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        {},
    ),
    "no scaling": ("llama", {}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "Gemma-3's scaling of its global layers": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        {},
    ),
    "soft-caps": (
        "gemma2",
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        {},
    ),
    "no soft-caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0},
        {},
    ),
    "a soft-cap of Gemma-3": ("gemma3", {"final_logit_softcapping": 2.0}, {"final_logit_softcapping": 2.0}, {}),
    "a scale of queries": ("gemma2", {"query_pre_attn_scalar": 32}, {"attention.scale": 32**-0.5}, {}),
    "the scale of queries of 27B": (
        "gemma2",
        {"num_hidden_layers": 46, "head_dim": 12, "query_pre_attn_scalar": 8},
        {},
        {},
    ),
    "the scale of queries of another size": ("gemma3", {"head_dim": 12, "query_pre_attn_scalar": 12}, {}, {}),
    "another pattern of windows": (
        "gemma3",
        {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"]},
        {"attention.sliding_window_pattern": 3},
        {},
    ),
    "windows layer by layer": (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
        {"attention.sliding_window_pattern": [False, True, True, False]},
        {},
    ),
    "a window of Phi-3": ("phi3", {"sliding_window": 5}, {}, {}),
    "heads of a size of their own": ("qwen2", {"head_dim": 12}, {}, {}),
    "a base of the frequencies": (
        "starcoder2",
        rope(rope_type="default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 999_999.0}},
        {},
        {},
    ),
    "rotations of another part": (
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {},
        {},
    ),
    "StableLM's word on its layers": (
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}},
        {"use_parallel_residual": False},
        {},
    ),
    "Phi-3's frequencies, for long texts": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            **rope(rope_type="longrope", long_factor=LONG, short_factor=SHORT, attention_factor=1.19),
        },
        {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.19},
        {"rope_factors_long.weight": np.array(LONG), "rope_factors_short.weight": np.array(SHORT)},
    ),
    "another epsilon": ("nemotron", {"norm_eps": 0.1}, {}, {}),
    "biases of attention": ("llama", {"attention_bias": True, "mlp_bias": True}, {}, {}),
    "no grouping of heads": ("qwen2", {"num_key_value_heads": 4}, {"attention.head_count_kv": None}, {}),
    "scales that do nothing": ("llama", {}, {"logit_scale": 1.0, "residual_scale": 1.0, "expert_count": 0}, {}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if "27B" in case else case for case in STATED]
)
def test_what_a_file_states_is_what_is_computed(tmp_path, case):
    architecture, changes, metadata, tensors = STATED[case]
    plain = model_of(architecture, **changes)
    assert_same_model(tmp_path, write_gguf(tmp_path / "x.gguf", plain, architecture, metadata, tensors), plain)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray], str]] = {
    "a scale of the logits": ("llama", {"logit_scale": 0.5}, {}, "llama.logit_scale = 0.5"),
    "a scale of the residuals": ("llama", {"residual_scale": 0.2}, {}, "llama.residual_scale = 0.2"),
    "a scale of attention": ("qwen2", {"attention.scale": 0.5}, {}, "qwen2.attention.scale"),
    "experts": ("llama", {"expert_count": 8}, {}, "llama.expert_count = 8"),
    "a window": ("qwen2", {"attention.sliding_window": 8}, {}, "qwen2.attention.sliding_window = 8"),
    "a key of tomorrow": ("gemma2", {"attention.twist": 2}, {}, "gemma2.attention.twist = 2"),
    "layers of two sizes": ("llama", {"feed_forward_length": [48, 48, 48, 24]}, {}, "[48, 48, 48, 24]"),
    "a rotation of half a head": ("llama", {"rope.dimension_count": 4}, {}, "rope.dimension_count 8"),
    "a scaling of tomorrow": ("llama", {"rope.scaling.type": "spiral"}, {}, "'spiral'"),
    "longrope without its tensors": ("llama", {"rope.scaling.type": "longrope"}, {}, "rope_factors_long.weight"),
    "yarn's own attention": ("llama", YARN_KEYS | {"rope.scaling.yarn_attn_factor": 2.0}, {}, "yarn_attn_factor"),
    "values of another length": ("qwen2", {"attention.value_length": 4}, {}, "one length"),
    "a tensor that nothing reads": ("llama", {}, {"blk.1.attn_q_norm.weight": np.ones(8)}, "blk.1.attn_q_norm.weight"),
    "a missing epsilon": ("llama", {"attention.layer_norm_rms_epsilon": None}, {}, "layer_norm_rms_epsilon"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(tmp_path, case):
    architecture, metadata, tensors, named = REFUSED[case]
    path = write_gguf(tmp_path / "x.gguf", model_of(architecture), architecture, metadata, tensors)
    with pytest.raises(ValueError, match=r"\Amodel [^\n]+\Z") as raised:
        loaded(path)
    assert named in str(raised.value)


def test_an_architecture_whose_metadata_nobody_checked_is_refused(tmp_path):
    plain = model_of("llama")
    path = write_gguf(tmp_path / "x.gguf", plain, "llama")
    path.write_bytes(path.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(ValueError, match=r"\Amodel [^\n]+\Z"):
        loaded(path)
