"""What stage one says of an SAE before it starts, against a computation by hand, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fpo.cache.reader import open_cache
from fpo.stages.data.tokenize import tokenize_pair
from fpo.stages.model.sae import load_sae
from fpo.stages.scoring.sae_quality import FitSums, SAEFit, check_fit, first_pairs, fit_on_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import score_alone
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from tiny import tiny_sae
from tiny_world import LIMITS, SITES, files, fpo, ran


def pairs_of(world: Any) -> list[Any]:
    preferences, chat = world.preferences(), world.reference().chat
    found = [tokenize_pair(preferences.example(row), row, chat, LIMITS).pair for row in range(len(preferences))]
    return [pair for pair in found if pair is not None]


@pytest.mark.parametrize("budget", [1, 160, 10_000])
def test_the_fit_is_that_of_plain_transformers_at_the_positions_that_predict_the_responses(world, budget):
    reference, pairs = world.reference(), pairs_of(world)
    found = fit_on_pairs(reference.model, pairs, reference.saes, "fp32", token_budget=budget)
    for site_sae, fit in zip(reference.saes, found, strict=True):
        sides = [side for pair in pairs for side in score_alone(reference.model, pair, [site_sae.site])]
        x_ND = torch.cat([side.acts[site_sae.site] for side in sides]).detach()
        features_NM = site_sae.sae.encode(x_ND)
        error_ND = x_ND - site_sae.sae.decode(features_NM)
        assert fit.tokens == len(x_ND) == sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
        assert fit.l0 == pytest.approx(float((features_NM > 0).sum(1).double().mean()), rel=1e-3)
        variance = float(x_ND.double().var(0, correction=0).sum())
        explained = 1 - float(error_ND.double().square().sum(1).mean()) / variance
        assert fit.explained_variance == pytest.approx(explained, abs=1e-4)
        assert fit.dead == pytest.approx(float((features_NM == 0).all(0).double().mean()), abs=0.02)


@pytest.mark.parametrize("normalisation", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_activations_that_the_sae_rescales_are_scaled_back(architecture, normalisation):
    sae = tiny_sae(architecture=architecture).sae
    cfg = sae.cfg.to_dict() | {"normalize_activations": normalisation}
    other = SAE.from_dict(cfg)
    other.load_state_dict(sae.state_dict())
    x_ND = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1
    sums = FitSums(other)
    for part in x_ND.split(70):
        sums.add(part)
    with torch.no_grad():
        error = float((x_ND - other(x_ND)).double().square().sum())
    expected = 1 - error / float((x_ND - x_ND.mean(0)).double().square().sum())
    assert sums.fit().explained_variance == pytest.approx(expected, abs=1e-5)


@given(st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=20)
def test_the_fit_does_not_depend_on_how_the_activations_come(parts, seed):
    sae = tiny_sae().sae
    x_ND = torch.randn(60, 32, generator=torch.Generator().manual_seed(seed))
    whole, apart = FitSums(sae), FitSums(sae)
    whole.add(x_ND)
    for part in x_ND.tensor_split(parts):
        apart.add(part)
    expected, found = whole.fit(), apart.fit()
    assert (found.l0, found.dead, found.tokens) == (expected.l0, expected.dead, expected.tokens)
    assert found.explained_variance == pytest.approx(expected.explained_variance, abs=1e-6)


def test_the_first_pairs_are_enough_and_no_more(world):
    reference, preferences = world.reference(), world.preferences()
    assert len(first_pairs(reference.model, preferences, reference.chat, LIMITS)) == len(pairs_of(world))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpo.stages.scoring.sae_quality.POSITIONS", 30)
        found = first_pairs(reference.model, preferences, reference.chat, LIMITS)
    counts = np.cumsum([len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs_of(world)])
    assert [pair.pair_id for pair in found] == [pair.pair_id for pair in pairs_of(world)][
        : int((counts < 30).sum()) + 1
    ]


# On the command line.


def changed(world: Any, folder: Path, **factors: float) -> Path:
    """The world's first SAE with some of its weights scaled."""
    folder.mkdir()
    (folder / "cfg.json").write_bytes((world.saes[0] / "cfg.json").read_bytes())
    weights = load_file(world.saes[0] / "sae_weights.safetensors")
    save_file(
        {name: weight * factors.get(name, 1.0) for name, weight in weights.items()}, folder / "sae_weights.safetensors"
    )
    load_sae(str(folder))
    return folder


def test_stage_one_says_how_good_its_saes_are_and_keeps_it_outside_the_identity(world, tmp_path):
    said = ran(world.precompute(tmp_path / "cache")).stdout
    reference = world.reference()
    fits = fit_on_pairs(reference.model, pairs_of(world), reference.saes, "fp32", token_budget=160)
    (record,) = open_cache(tmp_path / "cache").provenance()
    for site, fit, kept in zip(SITES, fits, record["sae_fits"], strict=True):
        assert f"{site.name}: {fit}" in said.replace("\n", " ")
        assert SAEFit(**kept) == fit
        assert f"L0 {fit.l0:.1f}, explained variance {fit.explained_variance:.3f}" in ran(
            fpo("cache", "info", tmp_path / "cache")
        ).stdout.replace("\n", " ")
    meaning = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert "l0" not in str(meaning) and "sae_fits" not in str(meaning)


POOR = {
    "dead": ({"threshold": 1e4}, r"--sae: .* 0 features fire at a position, over 458 positions"),
    "nearly dead": ({"threshold": 4}, r"--sae: .* 0\.\d+ features fire at a position"),
    "of no use": ({"W_dec": -1.0}, r"--sae: .* explains none of the variance \(-\d"),
    "of another scale": ({"W_dec": 9.0}, r"--sae: .* explains none of the variance \(-\d"),
}


@pytest.mark.parametrize("case", POOR)
def test_an_sae_that_is_of_no_use_is_refused_unless_that_is_allowed(world, tmp_path, case):
    factors, message = POOR[case]
    sae, out = changed(world, tmp_path / "sae", **factors), tmp_path / "out"
    before = files(tmp_path)
    result = world.precompute(out, sae=(sae, world.saes[1]))
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("fpo:"))
    assert re.search(message, line) and "--allow-poor-sae" in line and str(sae) in line, line
    assert files(tmp_path) == before
    ran(world.precompute(out, "--allow-poor-sae", sae=(sae, world.saes[1])))
    assert open_cache(out).manifest.num_pairs == 12


def test_too_few_positions_say_nothing_against_an_sae_but_that_it_is_dead():
    sae = tiny_sae()
    check_fit(sae, SAEFit(l0=5.0, explained_variance=-2.0, dead=0.5, tokens=127))
    check_fit(sae, SAEFit(l0=5.0, explained_variance=float("nan"), dead=0.5, tokens=1))
    check_fit(sae, SAEFit(l0=float("nan"), explained_variance=float("nan"), dead=0.5, tokens=90))
    for fit in (SAEFit(5.0, -2.0, 0.5, 128), SAEFit(0.5, 0.9, 0.5, 127), SAEFit(0.0, 0.0, 1.0, 1)):
        with pytest.raises(ValueError, match=r"\A--sae: [^\n]*--allow-poor-sae\Z"):
            check_fit(sae, fit)
