"""Intervals, held against scipy, hand-made resamples and how often they cover the truth."""

import numpy as np
import pytest
from fpo.pipeline.report.intervals import gain, holm, interval, mean_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap


def test_with_one_seed_it_is_scipy_s_bootstrap_over_prompts():
    values = np.random.default_rng(3).random((1, 200))
    expected = bootstrap((values[0],), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    found = interval(values)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.003)


@pytest.mark.parametrize(("between_seeds", "between_prompts"), [(0.5, 0.0), (0.0, 0.5), (0.3, 0.3)])
def test_it_covers_the_true_mean_as_often_as_it_says(between_seeds, between_prompts):
    """At least 95 % of 300 worlds; few seeds draw a little too seldom, prompts of their own a little too wide."""
    rng, covered = np.random.default_rng(7), 0
    for number in range(300):
        seeds, prompts = rng.normal(0, between_seeds, (20, 1)), rng.normal(0, between_prompts, (1, 60))
        found = interval(0.2 + seeds + prompts + rng.normal(0, 0.5, (20, 60)), seed=number)
        covered += found.low <= 0.2 <= found.high
    assert covered / 300 > 0.9


def test_a_difference_that_is_paired_is_told_where_the_means_alone_could_not():
    rng = np.random.default_rng(0)
    difficulty = rng.random((1, 200))
    better, worse = difficulty + 0.03 + rng.normal(0, 0.02, (5, 200)), difficulty + rng.normal(0, 0.02, (5, 200))
    assert interval(better).low < interval(worse).high
    found = interval(better - worse)
    assert found.tells and found.low > 0 and found.p < 0.01
    nothing = interval(worse - worse[::-1])
    assert not nothing.tells and nothing.p > 0.5


def test_methods_are_compared_on_the_seeds_that_both_have():
    rng = np.random.default_rng(0)
    one, other = ({seed: rng.random(30) for seed in seeds} for seeds in ((0, 1, 2), (2, 1, 5)))
    assert gain(one, other) == interval(np.stack([one[1] - other[1], one[2] - other[2]]))
    assert gain(one, one).mean == 0 and not gain(one, one).tells
    assert mean_of(one) == interval(np.stack([one[0], one[1], one[2]]))
    with pytest.raises(ValueError, match="seeds that both"):
        gain({0: one[0]}, {1: one[1]})


@settings(max_examples=50, deadline=None)
@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_s_correction_is_that_of_its_definition(p_values):
    """A hypothesis is rejected at a level iff all smaller p-values are at most level / (number left)."""
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.2, 0.5):
        ordered, rejected = sorted(range(len(p_values)), key=p_values.__getitem__), set()
        for rank, place in enumerate(ordered):
            if p_values[place] * (len(p_values) - rank) > level:
                break
            rejected.add(place)
        assert {place for place, p in enumerate(corrected) if p <= level} == rejected
