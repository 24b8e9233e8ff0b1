import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fpo.cache.errors import UserError
from fpo.stages.model.sae import Site, capture_sites, load_sae
from fpo.stages.train.train_sae import SAEQuality, _split, train_sae
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import tiny_gemma2, tiny_llama
from transformers import PreTrainedModel

SITE = Site(2, "resid_post")


def conversations(count: int = 40, seed: int = 0) -> list[np.ndarray]:
    """Sequences over few tokens, so that what follows what can be learned."""
    random = np.random.default_rng(seed)
    return [np.r_[2, random.integers(3, 20, random.integers(20, 60))].astype(np.int32) for _ in range(count)]


def train(out: Path, model: PreTrainedModel | None = None, **changes: object) -> SAEQuality:
    arguments: dict[str, object] = {
        "sequences": conversations(),
        "site": SITE,
        "width": 64,
        "tokens": 3200,
        "out": out,
        "batch_tokens": 64,
        "target_l0": 8.0,
        "lr": 1e-2,
        "model_name": "tiny",
    }
    return train_sae(model or tiny_gemma2(), **(arguments | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SAEQuality]:
    out = tmp_path_factory.mktemp("sae") / "out"
    return out, train(out)


def test_the_sae_explains_held_out_activations_with_few_features(trained):
    _, quality = trained
    assert quality.explained_variance > 0.5
    assert 4 < quality.l0 < 24
    assert quality.dead < 0.5


def test_the_quality_is_that_of_the_saved_sae_on_held_out_text(trained):
    out, quality = trained
    heldout = _split(conversations(), 0.05, 3200, 0)[1]
    x = torch.cat([activations(ids) for ids in heldout])
    features = load_sae(str(out)).sae.encode(x)
    error = x - load_sae(str(out)).sae.decode(features)
    assert quality.tokens == len(x) > 40
    assert quality.l0 == pytest.approx((features > 0).sum(1).float().mean().item(), rel=1e-3)
    assert quality.explained_variance == pytest.approx(
        1 - (error.square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-3
    )
    assert quality.passes == pytest.approx(3200 / (sum(len(ids) - 1 for ids in conversations()) - len(x)))


def activations(ids: np.ndarray) -> torch.Tensor:
    model = tiny_gemma2()
    with torch.no_grad(), capture_sites(model, [SITE]) as captured:
        model(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
    return captured[SITE][0, 1:]


@given(
    lengths=st.lists(st.integers(0, 30), min_size=3, max_size=20), fraction=st.floats(0.01, 0.9), seed=st.integers(0)
)
def test_every_sequence_is_either_trained_on_or_held_out(lengths, fraction, seed):
    sequences = [np.full(length, i, np.int32) for i, length in enumerate(lengths)]
    usable = {i for i, length in enumerate(lengths) if length > 1}
    assume(len(usable) > 1)
    train, heldout = _split(sequences, fraction, 1000, seed)
    assert train
    assert heldout
    assert sorted([int(ids[0]) for ids in train + heldout]) == sorted(usable)


def test_the_folder_is_read_by_saelens_and_says_what_it_is(trained):
    from sae_lens import SAE

    out, _ = trained
    ours, saelens = load_sae(str(out)), SAE.load_from_disk(out)
    x = activations(np.arange(2, 40, dtype=np.int32))
    assert torch.equal(ours.sae.encode(x), saelens.encode(x))
    assert (ours.site, ours.width, ours.architecture) == (SITE, 64, "jumprelu")
    config = json.loads((out / "cfg.json").read_text())
    assert config["apply_b_dec_to_input"] is True
    assert config["normalize_activations"] == "none"
    assert config["metadata"]["model_name"] == "tiny"
    assert config["metadata"]["hook_name"] == SITE.name


def test_a_features_value_is_the_length_of_what_it_adds(trained):
    norms = load_sae(str(trained[0])).sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(64))


def test_the_result_depends_on_the_seed_alone(trained, tmp_path):
    model = tiny_gemma2()
    random_before = torch.get_rng_state()
    assert train(tmp_path / "again", model) == trained[1]
    assert torch.equal(torch.get_rng_state(), random_before)
    torch.rand(7)
    train(tmp_path / "other", seed=1)
    one, again, other = (load_sae(str(out)).sha256 for out in (trained[0], tmp_path / "again", tmp_path / "other"))
    assert one == again != other


def test_the_first_position_is_never_trained_on(trained, tmp_path):
    model = tiny_gemma2()
    # A massive activation at position 0 of the site, which later layers see and the SAE must not.
    model.get_decoder().layers[SITE.layer].register_forward_hook(
        lambda module, args, output: torch.cat([output[:, :1] + 1e4, output[:, 1:]], dim=1)
    )
    assert train(tmp_path / "massive", model) == trained[1]


def test_an_mlp_site_of_another_architecture_is_trained_alike(tmp_path):
    site = Site(1, "mlp_out")
    out = tmp_path / "sae"
    quality = train(out, tiny_llama(), site=site)
    assert quality.explained_variance > 0.5
    assert load_sae(str(out)).site == site


def test_mistakes_are_said(trained, tmp_path):
    with pytest.raises(UserError, match="--out: expected a folder without an SAE"):
        train(trained[0])
    with pytest.raises(ValueError, match="at least one batch of 64 tokens"):
        train(tmp_path, tokens=63)
    with pytest.raises(ValueError, match=r"two or more sequences .* got 1 of 2"):
        train(tmp_path, sequences=[np.array([2, 5, 7], np.int32), np.array([2], np.int32)])
