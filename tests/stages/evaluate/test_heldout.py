"""Metrics over pairs: against each response scored alone, against definitions, and what their intervals promise."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fpo.stages.evaluate.heldout import estimate, measure_policy, pair_metrics
from fpo.stages.model.sae import Site
from fpo.stages.scoring.measure import measure_pairs
from hypothesis import given
from hypothesis import strategies as st
from pairs import calm_gemma2, dense_drift, few_examples, many_examples, random_pairs, score_alone
from tiny import tiny_sae

SAES = [tiny_sae(site=Site(2, "resid_post")), tiny_sae(site=Site(3, "mlp_out"), seed=1)]
SITES = [sae.site for sae in SAES]
TOP_K = 8


@pytest.fixture(scope="module")
def measured() -> SimpleNamespace:
    """A policy measured on seven pairs; a list of rows stands for the cache."""
    reference, policy = calm_gemma2(), calm_gemma2(seed=1)
    pairs = random_pairs(5, 7)
    cached = measure_pairs(reference, pairs, SAES, "fp32", token_budget=90, keep_features=None)
    columns = measure_policy(policy, cached, SAES, "fp32", top_k=TOP_K, token_budget=120, reference=reference)
    return SimpleNamespace(reference=reference, policy=policy, pairs=pairs, cached=cached, columns=columns)


def test_every_column_is_what_each_response_says_alone(measured):
    assert measured.columns["pair_id"].tolist() == [pair.pair_id for pair in measured.pairs]
    with torch.no_grad():
        for number, pair in enumerate(measured.pairs):
            both = zip(
                score_alone(measured.policy, pair, SITES), score_alone(measured.reference, pair, SITES), strict=True
            )
            for side, (own, held) in zip(("chosen", "rejected"), both, strict=True):
                ref_logps = held.logps_TV.double()
                expected = {
                    f"{side}_logp": own.token_logps_T.double().sum(),
                    f"{side}_ref_logp": held.token_logps_T.double().sum(),
                    f"{side}_tokens": len(own.targets_T),
                    f"kl_{side}": (ref_logps.exp() * (ref_logps - own.logps_TV.double())).sum(),
                    f"mse_{side}": sum(dense_drift(own.pooled_M(s), held.pooled_M(s), TOP_K) for s in SAES) / 2,
                    f"miss_rate_{side}": 0,
                }
                for s in SAES:
                    expected[f"mse_{side}@{s.site.name}"] = dense_drift(own.pooled_M(s), held.pooled_M(s), TOP_K)
                for name, value in expected.items():
                    assert measured.columns[name][number] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


@few_examples
@given(budget=st.integers(1, 400), at_once=st.integers(1, 9))
def test_how_pairs_are_packed_changes_rounding_alone(measured, budget, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpo.stages.evaluate.heldout.PAIRS_AT_ONCE", at_once)
        seen: list[int] = []
        found = measure_policy(
            measured.policy,
            measured.cached,
            [],
            "fp32",
            top_k=TOP_K,
            token_budget=budget,
            on_pairs=lambda pairs, tokens: seen.append(pairs),
        )
    assert sum(seen) == len(measured.pairs)
    assert found.keys() == {
        "pair_id",
        *(f"{s}_{n}" for s in ("chosen", "rejected") for n in ("logp", "ref_logp", "tokens")),
    }
    for name, values in found.items():
        if name == "pair_id":
            assert values.tolist() == measured.columns[name].tolist()
        else:
            np.testing.assert_allclose(values, measured.columns[name], rtol=1e-5)


def test_features_that_the_cache_cut_off_are_counted(measured):
    few = measure_pairs(measured.reference, measured.pairs, SAES, "fp32", token_budget=90, keep_features=TOP_K)
    found = measure_policy(measured.policy, few, SAES, "fp32", top_k=TOP_K, token_budget=120)
    rate = pair_metrics(found, None)["features/miss_rate"]["mean"]
    assert 0 < rate < 1
    with torch.no_grad():
        expected = []
        for pair, cached in zip(measured.pairs, few, strict=True):
            alone = score_alone(measured.policy, pair, SITES)
            for own, side in zip(alone, (cached.chosen, cached.rejected), strict=True):
                for sae, features in zip(SAES, side.features, strict=True):
                    kept = set(features.ids.tolist())
                    top = {i for i in own.pooled_M(sae).topk(TOP_K).indices.tolist() if own.pooled_M(sae)[i] > 0}
                    expected.append(len(top - kept) / len(top | kept) if features.floor > 0 else 0.0)
    assert rate == pytest.approx(np.mean(expected))


def test_a_reference_is_at_no_distance_from_itself(measured):
    found = measure_policy(
        measured.reference, measured.cached, SAES, "fp32", top_k=TOP_K, token_budget=120, reference=measured.reference
    )
    metrics = pair_metrics(found, per_token=None)
    assert "accuracy/implicit" not in metrics
    for name in ("kl/chosen", "kl/rejected", "kl/margin"):
        assert metrics[name]["mean"] == 0
    for name in ("features/mse_chosen", "features/mse_rejected"):
        assert metrics[name]["mean"] < 1e-10


def test_what_is_not_finite_names_its_row_s_pairs_and_the_columns(measured):
    worst = measured.cached[3]
    broken = list(measured.cached)
    broken[3] = dataclasses.replace(worst, rejected=dataclasses.replace(worst.rejected, logp=float("nan")))
    message = f"pair {worst.pair.pair_id}: not finite: rejected_ref_logp"
    with pytest.raises(FloatingPointError, match=f"^{message}$"):
        measure_policy(measured.policy, broken, [], "fp32", top_k=TOP_K, token_budget=1)
    with pytest.raises(FloatingPointError, match=f"{worst.pair.pair_id}"):
        measure_policy(measured.policy, broken[2:5], [], "fp32", top_k=TOP_K, token_budget=1000)


# Metrics from columns


def columns_of(chosen: list[tuple[float, float, int]], rejected: list[tuple[float, float, int]]) -> dict[str, Any]:
    """From (log-prob, the reference's, tokens) of each pair's sides."""
    found: dict[str, Any] = {}
    for side, rows in (("chosen", chosen), ("rejected", rejected)):
        for name, values in zip(("logp", "ref_logp", "tokens"), zip(*rows, strict=True), strict=True):
            found[f"{side}_{name}"] = np.array(values)
    return found


def test_accuracies_of_hand_made_pairs():
    columns = columns_of(
        [(-2.0, -2.0, 4), (-6.0, -8.0, 2), (-4.0, -6.0, 4), (-9.0, -9.0, 3)],
        [(-1.0, -1.0, 2), (-2.0, -3.0, 1), (-1.0, -2.0, 1), (-9.0, -8.0, 1)],
    )
    # raw, per token: -0.5 = -0.5, -3 < -2, -1 = -1, -3 > -9
    assert pair_metrics(columns, None)["accuracy/raw"]["mean"] == (0.5 + 0 + 0.5 + 1) / 4
    # gains: 0 and 0, 2 and 1, 2 and 1, 0 and -1
    assert pair_metrics(columns, per_token=False)["accuracy/implicit"]["mean"] == (0.5 + 1 + 1 + 1) / 4
    # a token: 0 and 0, 1 and 1, 0.5 and 1, 0 and -1
    assert pair_metrics(columns, per_token=True)["accuracy/implicit"]["mean"] == (0.5 + 0.5 + 0 + 1) / 4


def test_margins_are_rejected_minus_chosen_with_their_sign():
    columns = columns_of([(-1.0, -1.0, 1)] * 2, [(-2.0, -2.0, 1)] * 2)
    columns |= {"kl_chosen": np.array([1.0, 5.0]), "kl_rejected": np.array([2.0, 3.0])}
    columns |= {"mse_chosen": np.array([4.0, 2.0]), "mse_rejected": np.array([1.0, 2.0])}
    columns |= {"miss_rate_chosen": np.array([0.0, 0.5]), "miss_rate_rejected": np.array([0.25, 0.25])}
    metrics = pair_metrics(columns, per_token=True)
    means = {name: found["mean"] for name, found in metrics.items() if not name.startswith("accuracy")}
    assert means == {
        "margin/raw": 1.0,
        "margin/implicit": 0.0,
        "kl/chosen": 3.0,
        "kl/rejected": 2.5,
        "kl/margin": -0.5,
        "features/mse_chosen": 3.0,
        "features/mse_rejected": 1.5,
        "features/mse_margin": -1.5,
        "features/miss_rate": 0.25,
    }


def test_what_was_not_measured_is_absent():
    columns = columns_of([(-1.0, -1.0, 1)] * 2, [(-2.0, -2.0, 1)] * 2)
    assert pair_metrics(columns, None).keys() == {"accuracy/raw", "margin/raw"}
    assert pair_metrics(columns, True).keys() == {
        *("accuracy/raw", "accuracy/implicit"),
        *("margin/raw", "margin/implicit"),
    }


def test_margins_of_log_probs_are_by_hand():
    columns = columns_of([(-2.0, -4.0, 2), (-3.0, -3.0, 1)], [(-6.0, -5.0, 2), (-1.0, -2.0, 1)])
    # a token: -1 and -3, -3 and -1
    assert pair_metrics(columns, None)["margin/raw"]["mean"] == (2.0 - 2.0) / 2
    # gains: 2 and -1, 0 and 1
    assert pair_metrics(columns, per_token=False)["margin/implicit"]["mean"] == (3.0 - 1.0) / 2
    assert pair_metrics(columns, per_token=True)["margin/implicit"]["mean"] == (1.5 - 1.0) / 2


# Intervals


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = estimate(rng.normal(3.0, 2.0, 60))
        covered += found["low"] <= 3.0 <= found["high"]
    assert 0.90 <= covered / 200 <= 0.99  # 95 % with the deviation of 200 draws, and the bootstrap's own shortfall


def test_an_interval_is_the_normal_one_where_the_mean_is_normal():
    values = np.random.default_rng(1).normal(0, 1, 400)
    half = 1.96 * values.std() / 20
    found = estimate(values)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert estimate(values) == found, "the same values have the same interval"


def test_observations_of_one_unit_do_not_narrow_the_interval():
    rng = np.random.default_rng(2)
    units = rng.normal(0, 1, 50)
    alone, repeated = estimate(units), estimate(units * 25, np.full(50, 25))
    assert repeated["mean"] == pytest.approx(alone["mean"])
    assert repeated["n"] == 50
    assert repeated["high"] - repeated["low"] == pytest.approx(alone["high"] - alone["low"])


@many_examples
@given(
    units=st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 9)), min_size=2, max_size=20),
)
def test_an_interval_holds_its_mean_and_stays_among_the_values(units):
    means, counts = np.array(units).T
    found = estimate(means * counts, counts)
    assert found["mean"] == pytest.approx(np.average(means, weights=counts), abs=1e-9)
    assert means.min() - 1e-9 <= found["low"] <= found["mean"] <= found["high"] <= means.max() + 1e-9


def test_one_unit_has_no_interval_and_equal_ones_have_none_to_speak_of():
    assert estimate([2.0]) == {"mean": 2.0, "n": 1}
    assert estimate([1.0] * 5) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 5}
