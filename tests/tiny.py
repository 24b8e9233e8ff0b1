"""Models and SAEs of a few thousand parameters, with random weights from a seed."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from fpo.stages.model.sae import Site, SiteSAE, load_sae
from torch.nn.functional import normalize
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)


def tiny_gemma2(seed: int = 0, **overrides: Any) -> Gemma2ForCausalLM:
    """Alternating sliding (window 8) and full attention; logits large enough for both soft-caps to bend them."""
    config = Gemma2Config(
        **{
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "max_position_embeddings": 512,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attn_implementation": "eager",
            **overrides,
        }
    )
    return randomize(Gemma2ForCausalLM(config), seed, embedding_std=0.12, norm_mean=-0.3, final_norm_mean=9.0)


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        **{
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            **overrides,
        }
    )
    return randomize(LlamaForCausalLM(config), seed, embedding_std=0.7, norm_mean=1.0, final_norm_mean=1.5)


def tiny_family(name: Literal["gemma3", "mistral", "qwen2"], seed: int = 0, attention: str = "eager") -> Any:
    """Models of other families, whose layers have a sliding window of 8: some of them, or all (Mistral)."""
    sizes: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    }
    config = {
        "gemma3": lambda: Gemma3TextConfig(**sizes, sliding_window_pattern=2, query_pre_attn_scalar=8),
        "mistral": lambda: MistralConfig(**sizes),
        "qwen2": lambda: Qwen2Config(**sizes, use_sliding_window=True, max_window_layers=2),
    }[name]()
    norm_mean = -0.3 if name == "gemma3" else 1.0
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return randomize(model, seed, embedding_std=0.2, norm_mean=norm_mean, final_norm_mean=norm_mean)


def randomize(model: Any, seed: int, *, embedding_std: float, norm_mean: float, final_norm_mean: float) -> Any:
    """Fills every weight from `seed` alone, whatever the library's initialisation and torch's state."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "embed_tokens" in name:
            weight.data = embedding_std * noise
        elif "norm" in name:
            weight.data = (final_norm_mean if name == "model.norm.weight" else norm_mean) + 0.2 * noise
        elif "q_proj" in name or "k_proj" in name:
            weight.data = 2.5 * noise / weight.shape[-1] ** 0.5
        else:
            weight.data = noise / weight.shape[-1] ** 0.5
    return model.eval()


def tiny_sae(
    d_in: int = 32,
    width: int = 64,
    seed: int = 0,
    architecture: Literal["jumprelu", "standard", "topk"] = "jumprelu",
    site: Site = Site(2, "resid_post"),  # noqa: B008
) -> SiteSAE:
    """10 to 30 % of its features fire on the activations of the tiny models at `site`, and explain some of them."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_sae(Path(folder), d_in, width, seed, architecture, site)
        return replace(load_sae(folder), spec=f"tiny-{architecture}-{seed}")


def save_tiny_sae(folder: Path, d_in: int, width: int, seed: int, architecture: str, site: Site | None) -> None:
    """Saves the SAE of `tiny_sae` as SAELens does, without a site in its metadata if `site` is None."""
    from sae_lens import SAE

    cfg: dict[str, Any] = {"architecture": architecture, "d_in": d_in, "d_sae": width}
    cfg |= {"jumprelu": {"apply_b_dec_to_input": False}, "topk": {"k": width // 5}}.get(architecture, {})
    cfg["metadata"] = {"hook_name": site.name, "model_name": "tiny"} if site else {}
    sae = SAE.from_dict(cfg)
    # The root mean square of the tiny models' activations, measured: the residual stream grows with the layers.
    rms = (1.6 + 1.1 * site.layer) ** 0.5 if site and site.kind == "resid_post" else 0.75
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(weight.shape, generator=generator) for name, weight in sae.named_parameters()}
    cutoff = rms * (0.5 + 0.7 * torch.rand(width, generator=generator))
    weights = {"W_enc": noise["W_enc"] / d_in**0.5, "W_dec": 0.5 * normalize(noise["W_enc"].T, dim=-1)}
    weights["b_dec"] = 0.1 * rms * noise["b_dec"]
    weights["b_enc"] = -cutoff if architecture == "standard" else 0.1 * rms * noise["b_enc"]
    if architecture == "jumprelu":
        weights["threshold"] = cutoff
    sae.load_state_dict(weights)
    sae.save_model(folder)
