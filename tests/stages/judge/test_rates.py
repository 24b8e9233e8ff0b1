"""Win rates against formulas written out, other ways to the same number, and what they promise."""

import numpy as np
import pytest
from fpo.stages.judge.rates import Battles, arena_rates, fit_logistic, length_controlled, mean_rate, strengths
from hypothesis import given
from hypothesis import strategies as st
from pairs import few_examples
from scipy.optimize import brentq, minimize
from scipy.special import expit


def test_the_raw_rate_is_the_mean_with_its_standard_error():
    found = mean_rate(np.array([1.0, 0.0, 0.5, 1.0]))
    assert (found.mean, found.error) == (
        0.625,
        pytest.approx(np.sqrt(0.6875 / 3 / 4)),
    )  # 0.375², 0.625², 0.125², 0.375²
    assert found.low <= 0.625 <= found.high


@few_examples
@given(share=st.floats(0.2, 0.8), seed=st.integers(0, 9))
def test_the_interval_is_about_two_errors_wide(share, seed):
    found = mean_rate(np.random.default_rng(seed).binomial(1, share, 400).astype(float))
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.error, rel=0.15)


def lengths(seed: int, size: int = 4000) -> np.ndarray:
    return np.random.default_rng(seed).normal(150, 400, size).round()


def test_the_length_controlled_rate_finds_the_quality_behind_the_length():
    """Verdicts drawn from the formula itself, with a judge that likes length."""
    longer = lengths(0)
    chance = expit(0.4 + 1.5 * np.tanh(longer / longer.std(ddof=1)))
    drawn = np.random.default_rng(1).binomial(1, chance).astype(float)
    found = length_controlled(drawn, longer)
    assert abs(found.mean - expit(0.4)) < 3 * found.error < 0.05
    assert drawn.mean() > found.mean + 0.03


def test_a_judge_of_length_alone_is_worth_one_half():
    longer = lengths(2)
    found = length_controlled((longer > 0).astype(float), longer)
    assert (longer > 0).mean() > 0.6 and abs(found.mean - 0.5) < 0.02


def test_difficulties_are_a_column_of_their_own():
    rng = np.random.default_rng(3)
    longer, difficulty = lengths(3), rng.normal(0, 1, 4000)
    chance = expit(-0.3 + 0.5 * np.tanh(longer / longer.std(ddof=1)) + 0.8 * difficulty)
    drawn = rng.binomial(1, chance).astype(float)
    found = length_controlled(drawn, longer, difficulty)
    assert abs(found.mean - expit(-0.3 + 0.8 * difficulty).mean()) < 3 * found.error < 0.06


@pytest.mark.parametrize(
    ("preference", "longer", "rate"),
    [
        ([0.5, 0.5, 0.5], [10, -20, 30], 0.5),
        ([0.25, 0.75, 0.5, 0.9], [7, 7, 7, 7], 0.6),  # no difference in length: the raw rate
        ([0.8], [100], 0.8),
        ([1.0, 1.0, 1.0], [5, -3, 8], 1.0),
        ([0.0, 0.0], [5, -3], 0.0),
    ],
)
def test_ties_equal_lengths_one_question_and_one_side_break_nothing(preference, longer, rate):
    found = length_controlled(np.array(preference), np.array(longer, float))
    assert found.mean == pytest.approx(rate, abs=1e-4) and 0 <= found.low <= found.high <= 1
    assert np.isnan(mean_rate(np.array([0.8])).error)


@few_examples
@given(seed=st.integers(0, 99), count=st.integers(8, 60))
def test_a_fit_has_no_slope_left(seed, count):
    rng = np.random.default_rng(seed)
    features, outcome, weight = rng.normal(size=(count, 2)), rng.uniform(0.05, 0.95, count), rng.uniform(0.5, 3, count)
    found = fit_logistic(features, outcome, weight)
    assert np.abs(features.T @ (weight * (expit(features @ found) - outcome))).max() < 1e-4 * count


# Bradley–Terry.


def battles(seed: int, count: int, models: int = 4) -> Battles:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, models, count)
    second = (first + rng.integers(1, models, count)) % models
    strong = np.array([0.0, 0.7, -0.5, 1.2])[:models]
    outcome = rng.binomial(1, expit(strong[first] - strong[second])).astype(float)
    outcome[rng.random(count) < 0.1] = 0.5
    return Battles(first, second, outcome, rng.choice([1.0, 3.0], count), rng.integers(0, 20, count))


@few_examples
@given(seed=st.integers(0, 99))
def test_strengths_have_the_largest_likelihood(seed):
    made = battles(seed, 300)

    def unlikely(free: np.ndarray) -> float:
        strong = np.concatenate([[0.0], free])
        chance = 1 / (1 + np.exp(strong[made.second_B] - strong[made.first_B]))
        return -np.sum(made.weight_B * (made.outcome_B * np.log(chance) + (1 - made.outcome_B) * np.log(1 - chance)))

    expected = minimize(
        unlikely, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9, "maxiter": 9999}
    )
    assert strengths(made, 4) == pytest.approx([0.0, *expected.x], abs=1e-4)


def test_of_two_models_the_rate_is_the_weighted_share():
    made = Battles(
        np.array([0, 1, 0, 1]),
        np.array([1, 0, 1, 0]),
        np.array([1.0, 0.5, 0.0, 1.0]),
        np.array([3.0, 1, 1, 3]),
        np.arange(4),
    )
    share = (0.5 * 1 + 1 * 1 + 1 * 3) / 8  # of the second model: half a tie, a win of one, a win of three
    root = brentq(lambda s: 8 * expit(s) - 8 * share, -9, 9)
    assert strengths(made, 2) == pytest.approx([0.0, root], abs=1e-5)
    reference, found = arena_rates(made, 2)
    assert reference.mean == reference.low == reference.high == 0.5 and found.mean == pytest.approx(share, abs=1e-6)


def test_intervals_are_those_of_resampled_questions():
    made = battles(5, 400, 2)
    rng, shares = np.random.default_rng(7), []
    for _ in range(2000):
        times = np.bincount(rng.integers(0, 20, 20), minlength=20)[made.question_B] * made.weight_B
        won = np.where(made.first_B == 1, made.outcome_B, 1 - made.outcome_B)
        shares.append((times * won).sum() / times.sum())
    _, found = arena_rates(made, 2)
    assert (found.low, found.high) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.02)
    assert found.error == pytest.approx(np.std(shares), rel=0.15)


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_one_question_or_one_side_breaks_nothing(outcome):
    one = Battles(np.array([1]), np.array([0]), np.array([outcome]), np.array([1.0]), np.array([0]))
    _, found = arena_rates(one, 2)
    assert found.mean == pytest.approx(outcome, abs=1e-6) and found.low == found.high == pytest.approx(found.mean)
