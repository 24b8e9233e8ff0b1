import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_rows import MEANING, NUMERICS
from fpo.cache.identity import SiteMeaning
from fpo.cache.manifest import Noise, ShardReport
from fpo.cache.reader import Cache, open_cache
from fpo.cache.schema import CachedPair
from fpo.cache.writer import CacheWriter
from fpo.stages.model.sae import Site
from fpo.stages.scoring.features import CachedFeatures, feature_drift, keep_largest, pooled_features
from fpo.stages.scoring.measure import measure_pairs
from fpo.stages.scoring.parity import LOGP_FLOOR, check_packings, check_parity, difference, feature_mse, tolerance
from hypothesis import given
from hypothesis import strategies as st
from pairs import calm_gemma2, few_examples, many_examples, random_pairs
from tiny import tiny_sae

SAES = [tiny_sae(site=Site(2, "resid_post")), tiny_sae(site=Site(1, "mlp_out"), seed=1)]


@few_examples
@given(seed=st.integers(0, 1000), top_k=st.integers(1, 70))
def test_the_feature_mse_of_two_caches_is_the_drift_between_them(seed, top_k):
    sae, generator = SAES[0].sae, torch.Generator().manual_seed(seed)
    first, second = (2 * torch.randn(9, 32, generator=generator) for _ in range(2))
    kept = [keep_largest(pooled_features(sae, acts, [9])[0], None) for acts in (first, second)]
    drift = feature_drift(sae, first, [9], CachedFeatures.collate(kept[1:], 64), top_k).mse_R.item()
    assert feature_mse(*kept, top_k) == pytest.approx(drift, rel=1e-12)
    assert feature_mse(*kept[::-1], top_k) == pytest.approx(drift, rel=1e-12)
    assert feature_mse(kept[0], kept[0], top_k) == 0.0


def test_the_difference_is_the_largest_over_responses_and_sites():
    measured = measure_pairs(calm_gemma2(), random_pairs(2, 3), SAES, "fp32", token_budget=100, keep_features=16)
    assert difference(measured, measured) == Noise(0.0, (0.0, 0.0))
    side = measured[1].rejected
    features = dataclasses.replace(side.features[0], values=side.features[0].values + 0.5)
    moved = dataclasses.replace(side, logp=side.logp - 2.0, features=(features, side.features[1]))
    other = [measured[0], dataclasses.replace(measured[1], rejected=moved), measured[2]]
    assert len(features.ids) > 0
    expected = pytest.approx(0.25 * len(features.ids) / 50, rel=1e-5)
    assert difference(measured, other) == Noise(2.0, (expected, 0.0))


SAMPLE = measure_pairs(calm_gemma2(), random_pairs(3, 4), SAES, "fp32", token_budget=100, keep_features=None)
QUIET = Noise(0.0, (0.0, 0.0))


def other_model() -> Any:
    """`calm_gemma2()` with one norm 1 % larger."""
    model = calm_gemma2()
    model.model.layers[0].post_feedforward_layernorm.weight.data += 0.01
    return model


def make_cache(tmp_path: Path, sites: list[str], noise: Noise = QUIET) -> Cache:
    """A cache of four pairs by `calm_gemma2()`, opened with some of its sites."""
    rows = measure_pairs(calm_gemma2(), random_pairs(2, 4), SAES, "fp32", token_budget=300, keep_features=16)
    meanings = tuple(SiteMeaning(sae.site.name, sae.sha256, sae.width, sae.architecture) for sae in SAES)
    meaning = dataclasses.replace(MEANING, sites=meanings, keep_features=16)
    writer = CacheWriter(tmp_path / "cache", meaning, NUMERICS, len(rows))
    writer.write_shard(rows, ShardReport(0, 0, len(rows), (), {}, noise))
    assert writer.finish() is not None
    return open_cache(tmp_path / "cache", sites=sites)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "home"))


# 8 times the noise is above all floors and below all bounds of these responses.
@pytest.mark.parametrize(
    ("saes", "allowed"), [(SAES[:1], {0.036}), (SAES[1:], {0.0048}), (SAES[::-1], {0.036, 0.0048})]
)
def test_the_reference_passes_with_another_packing_within_the_noise_of_its_sites(tmp_path, saes, allowed):
    cache = make_cache(tmp_path, [sae.site.name for sae in saes], Noise(0.0, (0.0045, 0.0006)))
    found = check_parity(calm_gemma2(), cache, saes, "fp32", pairs=8, token_budget=60)
    assert found["parity/logps"] <= found["parity/logps_allowed"] == LOGP_FLOOR["fp32"]
    assert found["parity/mse"] <= found["parity/mse_allowed"]
    assert any(found["parity/mse_allowed"] == pytest.approx(limit) for limit in allowed)


def test_without_saes_log_probs_alone_are_compared(tmp_path):
    found = check_parity(calm_gemma2(), make_cache(tmp_path, []), [], "fp32", pairs=8, token_budget=60)
    assert found.keys() == {"parity/logps", "parity/logps_allowed"}


def test_another_model_is_refused_with_what_differs(tmp_path):
    cache = make_cache(tmp_path, [sae.site.name for sae in SAES])
    with pytest.raises(ValueError, match=r"log-probs by .* nats over 4 pairs, expected at most 0\.001;"):
        check_parity(other_model(), cache, SAES, "fp32", pairs=4, token_budget=300)
    other_sae = dataclasses.replace(SAES[1], sae=tiny_sae(site=SAES[1].site, seed=5).sae)
    with pytest.raises(ValueError, match=r"features at blocks\.1\.hook_mlp_out by .* D_F over 2 pairs"):
        check_parity(calm_gemma2(), cache, [SAES[0], other_sae], "fp32", pairs=2, token_budget=300)


def test_no_noise_that_a_cache_states_lets_another_model_pass(tmp_path):
    cache = make_cache(tmp_path, [sae.site.name for sae in SAES], Noise(50.0, (50.0, 50.0)))
    with pytest.raises(ValueError, match=r"log-probs by .* nats over 4 pairs, expected at most 0\.00\d+;"):
        check_parity(other_model(), cache, SAES, "fp32", pairs=4, token_budget=300)
    other_sae = dataclasses.replace(SAES[1], sae=tiny_sae(site=SAES[1].site, seed=5).sae)
    with pytest.raises(ValueError, match=r"features at blocks\.1\.hook_mlp_out by"):
        check_parity(calm_gemma2(), cache, [SAES[0], other_sae], "fp32", pairs=4, token_budget=300)


noise_values = st.floats(0, 10)


@many_examples
@given(logp=noise_values, mse=st.tuples(noise_values, noise_values), recipe=st.sampled_from(["fp32", "bf16"]))
def test_the_tolerance_is_8_times_the_noise_between_a_flip_in_ten_tokens_and_one_in_each(logp, mse, recipe):
    per_token = {"fp32": 1e-3, "bf16": 0.3}[recipe]
    sides = [side for row in SAMPLE for side in (row.chosen, row.rejected)]
    energies = [
        [np.sort(np.square(side.features[site].values.astype(float)))[::-1][:50].sum() / 50 for side in sides]
        for site in range(2)
    ]
    allowed = tolerance(Noise(logp, mse), recipe, SAMPLE)
    assert len(allowed) == len(sides)
    for number, (limit, side) in enumerate(zip(allowed, sides, strict=True)):
        length = side.num_tokens
        most = max(LOGP_FLOOR[recipe], per_token * length**0.5)
        assert limit.logp == pytest.approx(min(max(8 * logp, LOGP_FLOOR[recipe]), most))
        for site, energy in enumerate(energies):
            mean, own = np.mean(energy), energy[number]
            expected = min(max(8 * mse[site], 0.1 * mean / length), max(own, mean) / length)
            assert limit.feature_mse[site] == pytest.approx(expected)


def moved_by(rows: list[CachedPair], number: int, logp: float = 0.0, value: float = 0.0) -> list[CachedPair]:
    """The rejected response of one pair, measured otherwise."""
    side = rows[number].rejected
    features = dataclasses.replace(side.features[1], values=side.features[1].values + np.float32(value))
    side = dataclasses.replace(side, logp=side.logp + logp, features=(side.features[0], features))
    return [*rows[:number], dataclasses.replace(rows[number], rejected=side), *rows[number + 1 :]]


@pytest.mark.parametrize(("recipe", "little", "much"), [("fp32", 9e-4, 0.01), ("bf16", 0.9, 3.0)])
def test_two_packings_may_differ_by_rounding_alone(recipe, little, much):
    check_packings(SAMPLE, SAMPLE, recipe)
    check_packings(SAMPLE, moved_by(SAMPLE, 2, logp=little), recipe)
    number = max(range(len(SAMPLE)), key=lambda number: len(SAMPLE[number].rejected.features[1].ids))
    one, name = SAMPLE[2].rejected.logp, SAMPLE[2].pair.pair_id
    with pytest.raises(
        ValueError, match=rf"\A[^\n]*{name} rejected: log-probs {one:.6g} and {one + much:.6g} nats[^\n]+\Z"
    ):
        check_packings(SAMPLE, moved_by(SAMPLE, 2, logp=much), recipe)
    with pytest.raises(ValueError, match=rf"{SAMPLE[number].pair.pair_id} rejected: features at site 1 .* D_F"):
        check_packings(SAMPLE, moved_by(SAMPLE, number, value=5.0), recipe)
    with pytest.raises(ValueError, match="nan nats"):
        check_packings(SAMPLE, moved_by(SAMPLE, 2, logp=float("nan")), recipe)
