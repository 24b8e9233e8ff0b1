"""Heads and sites of other architectures: what is found by running a model is what its own forward pass does."""

from typing import Any

import pytest
import torch
from fpo.stages.evaluate.token_bound import token_bound
from fpo.stages.model.anatomy import anatomy, decoder_layers
from fpo.stages.model.sae import Site, capture_sites
from fpo.stages.scoring.forward import live_reference, score_row
from fpo.stages.scoring.measure import measure_pairs
from fpo.stages.scoring.packing import pack
from fpo.stages.scoring.supported import check_model
from pairs import assert_same_gradients, calm_gemma2, calm_llama, gradients, random_pairs
from tiny import randomize, tiny_gemma2, tiny_llama, tiny_sae
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    FalconConfig,
    Glm4Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    NanoChatConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TWO = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def made(config: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomize(model, 0, embedding_std=0.5, norm_mean=1.0, final_norm_mean=1.0)


HEADS: dict[str, Any] = {
    "a bias": lambda: made(PhiConfig(**SIZES)),
    "a factor": lambda: made(CohereConfig(**SIZES, logit_scale=0.25)),
    "a divisor": lambda: made(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "a soft-cap": lambda: tiny_gemma2(),
    "a soft-cap of another name": lambda: made(NanoChatConfig(**SIZES)),
    "a bias, GPT-J": lambda: made(GPTJConfig(**TWO, rotary_dim=4)),
    "nothing": lambda: tiny_llama(),
}


@pytest.mark.parametrize("name", HEADS)
def test_log_probs_and_their_gradients_are_those_of_the_model_s_own_logits(name):
    model, pairs = HEADS[name](), random_pairs(3, 3, longest=9)
    weights = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    packed = torch.zeros((), dtype=torch.float64)
    for row in pack(pairs, 100):
        logps_R = score_row(model, row, [], "fp32").logps_R
        packed = packed + (logps_R.unflatten(0, (-1, 2)) * weights.unflatten(0, (-1, 2))[list(row.pairs)]).sum()
    plain = sum(
        _plain_logp(model, pair, side) * weights[2 * n + side] for n, pair in enumerate(pairs) for side in (0, 1)
    )
    torch.testing.assert_close(packed, plain, rtol=1e-6, atol=1e-4)
    assert_same_gradients(gradients(model, packed), gradients(model, plain), 1e-4)
    check_model(model)


def _plain_logp(model: Any, pair: Any, side: int) -> Tensor:
    response = (pair.chosen_ids, pair.rejected_ids)[side]
    ids = torch.tensor([[*pair.prompt_ids.tolist(), *response.tolist()]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
    logps = logits.double().log_softmax(-1).gather(1, ids[0, len(pair.prompt_ids) :, None])
    total: Tensor = logps.sum()
    return total


def test_the_kl_knows_bias_and_scale_of_both_models():
    for make in (lambda: made(PhiConfig(**SIZES)), lambda: made(CohereConfig(**SIZES, logit_scale=0.25))):
        policy, reference, pairs = make(), make(), random_pairs(3, 2, longest=9)
        for weight in reference.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        (row,) = pack(pairs, 1000)
        with torch.no_grad():
            found = score_row(policy, row, [], "fp32", reference=live_reference(reference, row, "fp32")).kl_R
            expected = []
            for pair in pairs:
                for ids in (pair.chosen_ids, pair.rejected_ids):
                    whole = torch.tensor([[*pair.prompt_ids.tolist(), *ids.tolist()]])
                    own, held = (
                        torch.distributions.Categorical(logits=model(whole).logits[0, len(pair.prompt_ids) - 1 : -1])
                        for model in (policy, reference)
                    )
                    expected.append(torch.distributions.kl_divergence(held, own).sum().double())
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
            sae = tiny_sae(site=Site(1, "resid_post"))
            bound = token_bound(policy, reference, pairs, sae, "fp32", token_budget=100)
        assert bound.kl.sum() == pytest.approx(float(torch.stack(expected).sum()), rel=1e-4)
        scale = 0.25 if policy.config.model_type == "cohere" else 1.0
        product = scale * reference.get_output_embeddings().weight.detach() @ sae.sae.W_dec.T
        assert bound.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-4)


def test_a_head_that_changes_what_it_takes_in_is_refused():
    model = made(BertConfig(**SIZES, is_decoder=True))
    with pytest.raises(
        ValueError,
        match=r"\Amodel bert: expected logits that are its head's output[^\n]*not supported: give a model of another\Z",
    ):
        check_model(model)


def test_logits_that_no_number_of_the_configuration_explains_are_refused(monkeypatch):
    model = tiny_llama()
    real = type(model).forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        output = real(self, *args, **more)
        output.logits = 1.2345 * output.logits
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match="expected logits that are its head's output"):
        check_model(model)


SITES: dict[str, tuple[Any, bool]] = {
    "Llama": (lambda: tiny_llama(), True),
    "Gemma-2": (lambda: tiny_gemma2(), True),
    "Phi-3": (lambda: made(Phi3Config(**SIZES, resid_pdrop=0.1)), True),
    "GLM-4": (lambda: made(Glm4Config(**SIZES, num_key_value_heads=2, head_dim=8)), True),
    "GPT-2": (lambda: made(GPT2Config(**TWO)), True),
    "GPT-J, attention and MLP side by side": (lambda: made(GPTJConfig(**TWO, rotary_dim=4)), True),
    "Phi, likewise": (lambda: made(PhiConfig(**SIZES)), True),
    "Cohere, likewise": (lambda: made(CohereConfig(**SIZES)), True),
    "Granite": (lambda: made(GraniteConfig(**SIZES, residual_multiplier=0.22)), False),
    "OPT, whose MLP is no module": (lambda: made(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32)), False),
    "Falcon, which adds in place": (lambda: made(FalconConfig(**SIZES)), False),
}


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_a_site_is_what_goes_into_the_next_layer_and_what_the_mlp_adds_to_it(name):
    make, has_mlp_out = SITES[name]
    model = make().eval()
    ids, last = torch.arange(3, 15)[None], len(decoder_layers(model)) - 1
    for layer in range(last + 1):
        with capture_sites(model, [Site(layer, "resid_post")]) as captured:
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        resid_post = captured[Site(layer, "resid_post")]
        if layer < last:
            assert torch.equal(states[layer + 1], resid_post)
        if not has_mlp_out:
            with pytest.raises(ValueError, match=r"\Athe site blocks\.\d\.hook_mlp_out: [^\n]*\Z"):
                capture_sites(model, [Site(layer, "mlp_out")]).__enter__()
            continue
        with capture_sites(model, [Site(layer, "mlp_out")]) as captured:
            model(input_ids=ids)
        without = _resid_post_without_mlp(model, layer, ids)
        torch.testing.assert_close(resid_post - captured[Site(layer, "mlp_out")], without, rtol=1e-4, atol=1e-5)


def _resid_post_without_mlp(model: Any, layer: int, ids: Tensor) -> Tensor:
    """What leaves a layer whose MLP puts out nothing; a norm makes nothing of nothing."""
    mlp = decoder_layers(model)[layer].mlp
    handle = mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with capture_sites(model, [Site(layer, "resid_post")]) as captured:
        model(input_ids=ids)
    handle.remove()
    return captured[Site(layer, "resid_post")]


def test_gpt2_is_measured_at_its_sites_as_plain_transformers_has_them():
    model, pairs = made(GPT2Config(**TWO)), random_pairs(3, 3, longest=9)
    sae = tiny_sae(site=Site(0, "resid_post"))
    for cached in measure_pairs(model, pairs, [sae], "fp32", token_budget=100, keep_features=None):
        pair = cached.pair
        for ids, side in ((pair.chosen_ids, cached.chosen), (pair.rejected_ids, cached.rejected)):
            whole = torch.tensor([[*pair.prompt_ids.tolist(), *ids.tolist()]])
            with torch.no_grad():
                plain = model(whole, output_hidden_states=True)
                pooled = sae.sae.encode(plain.hidden_states[1][0, len(pair.prompt_ids) - 1 : -1]).mean(0)
            (features,) = side.features
            assert features.ids.tolist() == pooled.nonzero().squeeze(1).tolist()
            torch.testing.assert_close(torch.from_numpy(features.values), pooled[pooled > 0], rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was():
    for make in (calm_gemma2, calm_llama):
        model = make().train()
        model.model.norm.eval()
        found = anatomy(model)
        assert found is anatomy(model)
        assert model.training
        assert not model.model.norm.training
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
        assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("weight", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_not_finite_does_not_make_another_part_look_like_the_mlp_s(weight):
    model = tiny_gemma2()
    sound = anatomy(tiny_gemma2())
    with torch.no_grad():
        model.get_parameter(weight).fill_(torch.nan)
    assert anatomy(model).mlp_out == sound.mlp_out == ("post_feedforward_layernorm",) * len(sound.mlp_out)
    assert anatomy(model).resid_post == sound.resid_post
