"""What `check_model` lets pass is right; what it refuses, it refuses in one line that says what would be wrong."""

from functools import partial
from typing import Any

import pytest
import torch
from fpo.stages.model.models import attentions_to_try, find_model, load_model
from fpo.stages.scoring import supported
from fpo.stages.scoring.supported import check_length, check_model, load_supported
from pairs import calm_gemma2, calm_llama
from tiny import randomize, tiny_family, tiny_gemma2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    DogeConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    NemotronConfig,
    OPTConfig,
    PersimmonConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    RwkvConfig,
    StableLmConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 9}
MOE = {"intermediate_size": 64, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def made(config: Any, attention: str = "eager") -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return randomize(model, 0, embedding_std=0.5, norm_mean=1.0, final_norm_mean=1.0)


def gpt_neo(window: int) -> Any:
    """With the published models' 256 nothing shows before a pair is longer."""
    attention = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return made(GPTNeoConfig(**sizes, **attention, window_size=window))


def bart() -> Any:
    sizes = {"vocab_size": 128, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
    return made(BartConfig(**sizes, encoder_layers=2, is_decoder=True, is_encoder_decoder=False))


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_llama(attn_implementation="packed"),
        lambda: tiny_llama(attn_implementation="eager"),
        lambda: tiny_gemma2(),
        lambda: tiny_gemma2(sliding_window=4096),
        lambda: tiny_family("qwen2", attention="packed"),
        lambda: tiny_family("mistral", attention="packed"),
        lambda: made(
            MistralConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, sliding_window=4096), "packed"
        ),
        lambda: made(PersimmonConfig(**SIZES, intermediate_size=64), "eager"),
    ],
)
def test_what_scores_as_separate_sequences_passes_and_is_left_as_it_was(make):
    model = make().train()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    windows = (
        [getattr(part, "sliding_window", None) for part in model.modules()],
        model.config.__dict__.get("sliding_window"),
    )
    attention = model.config._attn_implementation
    check_model(model)
    assert windows == ([getattr(part, "sliding_window", None) for part in model.modules()], windows[1])
    assert model.config.__dict__.get("sliding_window") == windows[1]
    assert model.config._attn_implementation == attention
    assert all(part.training for part in model.modules())
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: made(Qwen2MoeConfig(**SIZES, **MOE, **WINDOWS, num_experts=4), "packed"), "log-probs that differ by"),
        (
            lambda: made(PhimoeConfig(**SIZES, **MOE, num_local_experts=4, sliding_window=9), "packed"),
            "log-probs that differ",
        ),
        (
            lambda: made(DogeConfig(**SIZES, intermediate_size=64)),
            "log-probs that differ by",
        ),  # keeps 2048 keys, of equal ones any
        (lambda: gpt_neo(8), "log-probs that differ by"),
        (lambda: gpt_neo(256), "activations after 2 layers, 309 tokens that differ by"),
        (bart, "log-probs that differ by"),
        (lambda: made(MptConfig(vocab_size=128, d_model=32, n_layers=2, n_heads=4)), "log-probs that differ by"),
        (lambda: made(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)), "Error: "),
        (lambda: made(RwkvConfig(**SIZES)), "log-probs that differ by"),
        (
            lambda: made(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)),
            "linear_attention",
        ),
    ],
)
def test_what_would_be_wrong_is_refused_in_one_line(make, reason):
    with pytest.raises(ValueError, match=rf"\Amodel [^\n]*{reason}[^\n]*not supported: give a model of another\Z"):
        check_model(make())


def test_a_window_of_the_real_size_that_is_not_heeded_is_found():
    sizes = SIZES | MOE | WINDOWS | {"sliding_window": 4096, "num_experts": 4}
    with pytest.raises(ValueError, match="log-probs that differ by"):
        check_model(made(Qwen2MoeConfig(**sizes), "packed"))
    check_model(made(Qwen2MoeConfig(**sizes), "eager"))


@pytest.mark.parametrize(
    "config",
    [
        StableLmConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, attention_dropout=0.1),
        PersimmonConfig(**SIZES, intermediate_size=64, attention_dropout=0.1),
        NemotronConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8),
        FalconConfig(**SIZES, new_decoder_architecture=False),
        Qwen2MoeConfig(**SIZES, **MOE, **WINDOWS, num_experts=4),
        OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.1),
    ],
    ids=lambda config: config.model_type,
)
def test_attention_falls_back_to_what_is_right_and_says_so(tmp_path, config):
    made(config).save_pretrained(tmp_path)
    source, lines = find_model(str(tmp_path)), []
    load = partial(load_model, source, device="cpu")
    model = load_supported(load, attentions_to_try("auto", source, "cpu"), lines.append)
    used = model.config._attn_implementation
    assert (used == "packed") == (not lines)
    for line in lines:
        assert line.startswith("attention: eager; not packed: ")
        assert "\n" not in line
    if used == "eager":
        with pytest.raises(ValueError, match=r"\Amodel [^\n]+\Z"):
            load_supported(load, ("packed",))
    ids = torch.arange(3, 20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_the_output_head_is_refused():
    from peft import LoraConfig, get_peft_model

    def adapted(*targets: str, **more: Any) -> Any:
        config = LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM", **more)
        return get_peft_model(calm_llama(tie_word_embeddings=False), config)

    check_model(adapted("q_proj", "down_proj"))
    with pytest.raises(
        ValueError, match=r"\A[^\n]*adapter on the output head, found one \(lora_A[^\n]*leave the head out[^\n]*\Z"
    ):
        check_model(adapted("q_proj", "lm_head"))
    model = calm_llama(tie_word_embeddings=False)
    check_model(model)  # what was found right before is not right with the adapter
    with pytest.raises(ValueError, match="adapter on the output head"):
        check_model(get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")))


def test_weights_that_are_not_finite_are_left_to_scoring_which_names_the_pair():
    model = calm_gemma2(tie_word_embeddings=False)
    model.lm_head.weight.data[0] = torch.nan
    check_model(model)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=40), 40),
        (OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=40), 40),
        (LlamaConfig(**SIZES, intermediate_size=64, max_position_embeddings=40), None),
        (LlamaConfig(**SIZES | {"vocab_size": 40}, intermediate_size=64, max_position_embeddings=40), None),
    ],
)
def test_texts_longer_than_the_positions_that_a_model_learnt_are_refused(config, limit):
    model = made(config)
    check_length(model, 40)
    ids = torch.arange(41)[None] % 40
    if limit is None:
        check_length(model, 41)
        model(ids)
        return
    with pytest.raises(ValueError, match=r"\A--max-length: expected at most 40,[^\n]* found 41; lower it\Z"):
        check_length(model, 41)
    with pytest.raises(IndexError):
        model(ids)


def test_a_model_that_was_found_right_is_not_tried_again_under_the_same_attention(monkeypatch):
    model, tried = calm_llama(attn_implementation="packed"), []
    real = supported._fault
    monkeypatch.setattr(
        supported, "_fault", lambda inner: tried.append(inner.config._attn_implementation) or real(inner)
    )
    for attention in ("packed", "packed", "eager"):
        model.set_attn_implementation(attention)
        check_model(model)
    assert tried == ["packed", "eager"]
