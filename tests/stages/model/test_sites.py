import pytest
import torch
from fpo.stages.model.sae import Site, capture_sites, parse_site
from tiny import randomize, tiny_gemma2, tiny_llama
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

ALL_SITES = [Site(layer, kind) for layer in range(4) for kind in ("resid_post", "mlp_out")]


def capture(model: PreTrainedModel, sites: list[Site], length: int = 24) -> dict[Site, Tensor]:
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(0))
    with capture_sites(model, sites) as captured:
        model(input_ids=ids)
    return captured


@pytest.mark.parametrize("site", [Site(0, "resid_post"), Site(25, "mlp_out")])
def test_a_sites_name_is_read_back(site):
    assert parse_site(site.name) == site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("model.layers.1", Site(1, "resid_post")),
        ("model.layers.15.output", Site(15, "resid_post")),
        ("model.layers.12.post_feedforward_layernorm.output", Site(12, "mlp_out")),
        ("model.layers.12.post_mlp_layernorm", Site(12, "mlp_out")),
        ("transformer.h.7", Site(7, "resid_post")),
        ("transformer.h.7.output", Site(7, "resid_post")),
        ("blocks.8.hook_resid_pre", Site(7, "resid_post")),
    ],
)
def test_other_spellings_are_read(text, site):
    assert parse_site(text) == site


@pytest.mark.parametrize(
    "text",
    ["blocks.3.attn.hook_z", "blocks.3.hook_mlp_in", "model.layers.3.mlp", "blocks.-1.hook_resid_post", "25"],
)
def test_other_sites_are_refused(text):
    with pytest.raises(ValueError, match=r"expected a site as blocks\.L\.hook_resid_post"):
        parse_site(text)


def test_the_input_of_the_first_layer_is_refused():
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_pre'?, which is before the first"):
        parse_site("blocks.0.hook_resid_pre")


def gemma2_in_transformer_lens(model: PreTrainedModel) -> "torch.nn.Module":
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

    hf = model.config
    config = HookedTransformerConfig(
        d_model=hf.hidden_size,
        d_head=hf.head_dim,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_key_value_heads,
        d_mlp=hf.intermediate_size,
        n_layers=hf.num_hidden_layers,
        n_ctx=64,
        eps=hf.rms_norm_eps,
        d_vocab=hf.vocab_size,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=hf.head_dim,
        rotary_base=10000,
        use_attn_scale=True,
        attn_scale=hf.query_pre_attn_scalar**0.5,
        window_size=hf.sliding_window,
        use_local_attn=True,
        attn_types=["local", "global"] * 2,
        attn_scores_soft_cap=hf.attn_logit_softcapping,
        output_logits_soft_cap=hf.final_logit_softcapping,
        gated_mlp=True,
        final_rms=True,
        use_normalization_before_and_after=True,
        seed=0,
    )
    hooked = HookedTransformer(config)
    state = {name: weight.detach() for name, weight in convert_gemma_weights(model, config).items()}
    missing, unexpected = hooked.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.rsplit(".")[-1] in ("mask", "IGNORE", "rotary_sin", "rotary_cos") for name in missing), missing
    return hooked


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
def test_gemma2s_sites_are_the_activations_of_transformer_lens():
    model = tiny_gemma2()
    with torch.no_grad():
        captured = capture(model, ALL_SITES)
        ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
        _, cache = gemma2_in_transformer_lens(model).run_with_cache(ids, prepend_bos=False)
    for site in ALL_SITES:
        torch.testing.assert_close(captured[site], cache[site.name], atol=2e-5, rtol=1e-5)


def test_what_a_llama_layer_adds_to_the_residual_stream_last_is_its_mlp_out():
    model = tiny_llama()
    seen: list[Tensor] = []
    layer = model.get_decoder().layers[1]
    handle = layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        captured = capture(model, [Site(1, "resid_post"), Site(1, "mlp_out")])
    handle.remove()
    after_attention = seen[-1]
    torch.testing.assert_close(after_attention + captured[Site(1, "mlp_out")], captured[Site(1, "resid_post")])


def test_the_last_layers_site_is_not_the_normed_hidden_state():
    model = tiny_gemma2()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), capture_sites(model, [Site(3, "resid_post")]) as captured:
        normed = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.model.norm(captured[Site(3, "resid_post")]), normed)
    assert (captured[Site(3, "resid_post")] - normed).abs().max() > 1


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_llama])
def test_activation_checkpointing_changes_neither_values_nor_gradients(make):
    def run(checkpointing: bool) -> tuple[dict[Site, Tensor], dict[str, Tensor]]:
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        captured = capture(model, ALL_SITES)
        sum(activation.square().mean() for activation in captured.values()).backward()
        return captured, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    (plain, plain_grads), (checkpointed, checkpointed_grads) = run(False), run(True)
    for site in ALL_SITES:
        assert torch.equal(plain[site], checkpointed[site])
    assert plain_grads.keys() == checkpointed_grads.keys()
    assert "model.layers.3.mlp.down_proj.weight" in plain_grads
    for name, grad in plain_grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(checkpointed_grads[name], grad)


def test_nothing_stays_on_the_model_even_after_an_error():
    model = tiny_llama()
    with pytest.raises(KeyError), capture_sites(model, ALL_SITES) as captured:
        raise KeyError
    model(input_ids=torch.tensor([[3, 4]]))
    assert not captured
    assert not any(module._forward_hooks for module in model.modules())


def test_sites_that_a_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match="layers are 0 to 3"):
        capture(tiny_llama(), [Site(4, "resid_post")])


def test_a_layer_that_scales_what_its_mlp_puts_out_has_no_mlp_out():
    def granite(**multipliers: float) -> GraniteForCausalLM:
        sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = GraniteConfig(**sizes, num_attention_heads=4, **multipliers)  # type: ignore[arg-type]
        return randomize(GraniteForCausalLM(config), 0, embedding_std=0.5, norm_mean=1.0, final_norm_mean=1.0)

    sites = [Site(1, "mlp_out"), Site(1, "resid_post")]
    assert len(capture(granite(), sites)) == 2
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_mlp_out: expected .* found GraniteDecoderLayer[^\n]* mlp"):
        capture(granite(residual_multiplier=0.22), sites[:1])
    assert capture(granite(residual_multiplier=0.22), sites[1:])
