import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fpo.cache.errors import UserError
from fpo.stages.model.sae import Site, capture_sites, check_fits, load_sae, parse_site
from safetensors.torch import load_file, save_file
from tiny import randomize, save_tiny_sae, tiny_gemma2, tiny_llama, tiny_sae
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM, PreTrainedModel

ALL_SITES = [Site(layer, kind) for layer in range(4) for kind in ("resid_post", "mlp_out")]
RESID_2 = Site(2, "resid_post")


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


# Loading


def save_npz(path: Path, folder: Path, **changes: np.ndarray | None) -> str:
    """Writes the SAE of `folder` as a Gemma Scope file; a change of None leaves an array out."""
    arrays = {key: tensor.numpy() for key, tensor in load_file(folder / "sae_weights.safetensors").items()} | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return str(path)


def edit_metadata(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"].update(changes)
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "sae"
    save_tiny_sae(path, 32, 64, 0, "jumprelu", RESID_2)
    return path


def test_an_npz_file_and_a_folder_of_one_sae_encode_and_hash_alike(folder, tmp_path):
    npz = load_sae(save_npz(tmp_path / "params.npz", folder) + "@blocks.2.hook_resid_post")
    saved = load_sae(str(folder))
    x = 2 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    features = saved.sae.encode(x)
    assert 0.05 < (features > 0).float().mean() < 0.5
    assert torch.equal(npz.sae.encode(x), features)
    assert (npz.sha256, npz.site, npz.width) == (saved.sha256, RESID_2, 64)
    assert npz.architecture == saved.architecture == "jumprelu"


def test_jumprelu_computes_what_its_definition_says(folder, tmp_path):
    sae = load_sae(save_npz(tmp_path / "params.npz", folder) + "@model.layers.2").sae
    weights = load_file(folder / "sae_weights.safetensors")
    x = 2 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    hidden = x @ weights["W_enc"] + weights["b_enc"]
    torch.testing.assert_close(sae.encode(x), torch.where(hidden > weights["threshold"], hidden, 0.0))


@pytest.mark.parametrize("key", ["W_enc", "b_enc", "threshold", "W_dec", "b_dec"])
def test_every_weight_enters_the_hash(folder, key):
    before = load_sae(str(folder)).sha256
    weights = load_file(folder / "sae_weights.safetensors")
    weights[key].view(-1)[3] += 1e-3
    save_file(weights, folder / "sae_weights.safetensors")
    assert load_sae(str(folder)).sha256 != before


@pytest.mark.parametrize(("key", "value"), [("apply_b_dec_to_input", True), ("normalize_activations", "layer_norm")])
def test_every_setting_that_changes_the_features_enters_the_hash(folder, key, value):
    before = load_sae(str(folder)).sha256
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {key: value}))
    assert load_sae(str(folder)).sha256 != before


def test_the_place_and_the_metadata_do_not_enter_the_hash(folder):
    before = load_sae(str(folder)).sha256
    edit_metadata(folder, note="anything")
    assert load_sae(str(folder.rename(folder.with_name("elsewhere@home")))).sha256 == before


def test_a_loaded_sae_is_frozen():
    sae = tiny_sae().sae
    assert not sae.training
    assert not any(weight.requires_grad for weight in sae.parameters())


@pytest.mark.parametrize("spelling", ["blocks.7.hook_mlp_out", "model.layers.7.post_feedforward_layernorm.output"])
def test_the_site_comes_from_the_metadata(folder, spelling):
    edit_metadata(folder, hook_name=spelling)
    assert load_sae(str(folder)).site == Site(7, "mlp_out")
    assert load_sae(f"{folder}@blocks.7.hook_mlp_out").site == Site(7, "mlp_out")


def test_a_site_against_the_metadata_is_refused(folder):
    with pytest.raises(ValueError, match=r"was trained on blocks\.2\.hook_resid_post"):
        load_sae(f"{folder}@blocks.3.hook_resid_post")


def test_a_folder_without_a_site_needs_one(tmp_path):
    save_tiny_sae(tmp_path, 32, 64, 0, "standard", None)
    with pytest.raises(ValueError, match="nothing says which site"):
        load_sae(str(tmp_path))
    assert load_sae(f"{tmp_path}@model.layers.2.output").site == RESID_2


def gpt2_in_transformer_lens(model: PreTrainedModel, centred: bool) -> "torch.nn.Module":
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    hf = model.config
    config = HookedTransformerConfig(
        d_model=hf.n_embd,
        d_head=hf.n_embd // hf.n_head,
        n_heads=hf.n_head,
        n_layers=hf.n_layer,
        n_ctx=hf.n_positions,
        eps=hf.layer_norm_epsilon,
        d_vocab=hf.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=0,
    )
    hooked = HookedTransformer(config)
    state = {name: weight.detach() for name, weight in convert_gpt2_weights(model, config).items()}
    hooked.load_and_process_state_dict(state, center_writing_weights=centred)
    return hooked


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"])
@torch.no_grad()
def test_an_sae_of_gpt2_encodes_what_it_encoded_in_transformer_lens(tmp_path, hook, architecture, centred):
    from sae_lens import SAE

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=128, n_positions=64)).eval()
    randomize(model, 0, embedding_std=0.5, norm_mean=1.0, final_norm_mean=1.0)
    for name, weight in model.named_parameters():
        weight.data += 0.3 * ("bias" in name or "wpe" in name)  # a mean that is not 0
    save_tiny_sae(tmp_path, 32, 64, 0, architecture, parse_site(hook))
    edit_metadata(tmp_path, hook_name=hook, model_from_pretrained_kwargs={"center_writing_weights": centred})
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        plain = SAE.load_from_disk(tmp_path)
    ids = torch.arange(3, 27)[None]
    _, cache = gpt2_in_transformer_lens(model, centred).run_with_cache(ids, prepend_bos=False)
    site_sae = load_sae(str(tmp_path))
    check_fits(site_sae, model)
    with capture_sites(model, [site_sae.site]) as captured:
        model(input_ids=ids)
    found, expected = site_sae.sae.encode(captured[site_sae.site]), plain.encode(cache[hook])
    assert (expected > 0).any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if centred:
        assert load_sae(str(tmp_path)).sha256 == site_sae.sha256
        edit_metadata(tmp_path, model_from_pretrained_kwargs={})
        assert load_sae(str(tmp_path)).sha256 != site_sae.sha256
        with pytest.raises(ValueError, match="expected a model with LayerNorm"):
            check_fits(site_sae, tiny_llama())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_name": "blocks.2.attn.hook_z"}, "a site that is not supported.*hook_z"),
        ({"hook_head_index": 3}, "one attention head"),
    ],
)
def test_saes_of_other_activations_are_refused(folder, changes, message):
    edit_metadata(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_sae(str(folder))


def test_a_transcoder_is_refused(tmp_path):
    from sae_lens import SAE

    metadata = {"hook_name": RESID_2.name, "hook_name_out": "blocks.2.hook_mlp_out"}
    config = {"architecture": "jumprelu_transcoder", "d_in": 8, "d_out": 8, "d_sae": 16}
    config |= {"apply_b_dec_to_input": False, "metadata": metadata}
    SAE.from_dict(config).save_model(tmp_path)
    with pytest.raises(ValueError, match=r"expected an SAE of architecture.*got 'jumprelu_transcoder'"):
        load_sae(str(tmp_path))


def test_an_sae_whose_scale_is_not_in_its_weights_is_refused(folder):
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "expected_average_only_in"}))
    with pytest.raises(ValueError, match="fold the scale"):
        load_sae(str(folder))


def test_what_is_wrong_with_an_npz_file_is_said(folder, tmp_path):
    path = tmp_path / "params.npz"
    site = "@blocks.2.hook_resid_post"
    with pytest.raises(UserError, match=r"params\.npz"):
        load_sae(f"{path}{site}")
    with pytest.raises(ValueError, match="nothing says which site"):
        load_sae(save_npz(path, folder))
    for changes, message in (
        ({"threshold": None}, r"expected float32 arrays .*, found (?!.*threshold)"),
        ({"b_enc": np.zeros(65, np.float32)}, r"expected float32 arrays .*, found .*'b_enc': 'float32 \[65\]'"),
        ({"W_enc": np.zeros(64, np.float32)}, r"expected float32 arrays .*, found .*'W_enc': 'float32 \[64\]'"),
        ({"b_dec": np.zeros(32)}, r"expected float32 arrays .*, found .*'b_dec': 'float64 \[32\]'"),
        ({"b_dec": np.array([{}] * 32)}, "not one: Object arrays"),
        ({"b_dec": np.full(32, np.nan, np.float32)}, "32 of 32 values of b_dec are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sae(save_npz(path, folder, **changes) + site)
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match="not one"):
        load_sae(f"{path}{site}")


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load_sae(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected cfg.json in .* found \[\]"):
        load_sae(str(tmp_path / "empty"))
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"b_enc": torch.zeros(65)}, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"cannot read the SAE in .*size mismatch for b_enc"):
        load_sae(str(folder))


@pytest.mark.slow  # parses SAELens' list of published SAEs
def test_a_published_sae_is_read_through_saelens(folder, tmp_path, monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders
    from sae_lens.saes import sae as saelens_sae

    npz = save_npz(tmp_path / "params.npz", folder)
    asked: list[tuple[str, str]] = []

    def download(repo_id: str, filename: str, subfolder: str, force_download: bool) -> str:
        asked.append((repo_id, f"{subfolder}/{filename}"))
        return npz

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    # Gemma Scope's configuration is derived from the name; only its size is made tiny.
    monkeypatch.setattr(saelens_sae, "get_config_overrides", lambda release, sae_id: {"d_in": 32, "d_sae": 64})
    site_sae = load_sae("gemma-scope-2b-pt-res-canonical:layer_25/width_16k/canonical")
    assert asked == [("google/gemma-scope-2b-pt-res", "layer_25/width_16k/average_l0_116/params.npz")]
    assert site_sae.site == Site(25, "resid_post")
    assert site_sae.sha256 == load_sae(f"{npz}@blocks.2.hook_resid_post").sha256
    assert load_sae("gemma-scope-2b-pt-mlp-canonical:layer_7/width_16k/canonical").site == Site(7, "mlp_out")
    with pytest.raises(ValueError, match="hook_z"):
        load_sae("gemma-scope-2b-pt-att-canonical:layer_7/width_16k/canonical")


@pytest.mark.slow  # parses SAELens' list of published SAEs
def test_a_hub_out_of_reach_is_said_with_what_to_do(monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders

    def unreachable(**kwargs: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"cannot fetch SAE 'layer_25/.*no route to host; .*give a folder"):
        load_sae("gemma-scope-2b-pt-res-canonical:layer_25/width_16k/canonical")
    with pytest.raises(ValueError, match="Release no-such-release not found"):
        load_sae("no-such-release:layer_25")


def test_an_sae_of_another_model_is_refused():
    model = tiny_gemma2()
    check_fits(tiny_sae(), model)
    with pytest.raises(ValueError, match="size 16, the model has 32"):
        check_fits(tiny_sae(d_in=16), model)
    with pytest.raises(ValueError, match="layers are 0 to 3"):
        check_fits(tiny_sae(site=Site(4, "mlp_out")), model)
