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
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

RESID_2 = Site(2, "resid_post")


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
