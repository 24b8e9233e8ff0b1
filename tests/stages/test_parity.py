import dataclasses

import pytest
import torch
from fpo.cache.manifest import Noise
from fpo.stages.features import CachedFeatures, feature_drift, keep_largest, pooled_features
from fpo.stages.parity import FLOOR, NOISE_FACTOR, difference, feature_mse, tolerance
from fpo.stages.scoring import measure_pairs
from fpo.stages.sites import Site
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
    measured = measure_pairs(calm_gemma2(), random_pairs(2, 3), SAES, "fp32", token_budget=100, keep_features=None)
    assert difference(measured, measured) == Noise(0.0, (0.0, 0.0))
    side = measured[1].rejected
    features = dataclasses.replace(side.features[1], values=side.features[1].values + 0.5)
    moved = dataclasses.replace(side, logp=side.logp - 2.0, features=(side.features[0], features))
    other = [measured[0], dataclasses.replace(measured[1], rejected=moved), measured[2]]
    found = difference(measured, other)
    assert found.logp == 2.0
    assert found.feature_mse == (0.0, pytest.approx(0.25 * len(features.ids) / 50, rel=1e-5))


def test_another_packing_is_within_the_tolerance_and_another_model_is_not():
    pairs = random_pairs(2, 4)
    alone, packed = (
        measure_pairs(calm_gemma2(), pairs, SAES, "fp32", token_budget=budget, keep_features=None)
        for budget in (1, 300)
    )
    noise = difference(alone, packed)
    allowed = tolerance(noise, "fp32")
    assert noise.logp <= allowed.logp
    model = calm_gemma2()
    model.model.layers[0].mlp.up_proj.weight.data *= 1.02
    moved = difference(measure_pairs(model, pairs, SAES, "fp32", token_budget=300, keep_features=None), packed)
    assert moved.logp > allowed.logp
    assert all(mse > limit for mse, limit in zip(moved.feature_mse, allowed.feature_mse, strict=True))


noise_values = st.floats(0, 10)


@many_examples
@given(logp=noise_values, mse=st.lists(noise_values, max_size=3), recipe=st.sampled_from(["fp32", "bf16"]))
def test_the_tolerance_is_never_below_the_noise_or_the_floor(logp, mse, recipe):
    allowed, floor = tolerance(Noise(logp, tuple(mse)), recipe), FLOOR[recipe]
    assert allowed.logp == max(NOISE_FACTOR * logp, floor.logp)
    assert allowed.feature_mse == tuple(max(NOISE_FACTOR * value, floor.feature_mse[0]) for value in mse)
