"""Preferences and length control against the package `alpaca-eval` itself, on synthetic judgments."""

import sys
import types
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fpo.stages.judge import rates
from fpo.stages.judge.client import Reply
from fpo.stages.judge.rates import length_controlled, mean_rate
from fpo.stages.judge.verdicts import preference_by_logprobs
from hypothesis import given
from hypothesis import strategies as st
from pairs import few_examples
from scipy.special import expit

# Its last release wants `pkg_resources`, which setuptools no longer has, for versions that nothing here asks for.
with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
    warnings.simplefilter("ignore")  # of its dependencies, on import
    patch.setitem(sys.modules, "pkg_resources", types.ModuleType("pkg_resources"))
    from alpaca_eval.completion_parsers import logprob_parser
    from alpaca_eval.metrics import glm_winrate

QUESTIONS = 805


@few_examples
@given(logps=st.dictionaries(st.sampled_from(["A", "B", "The", "\n"]), st.floats(-20, 0), min_size=1))
def test_the_preference_is_the_weighted_one_of_its_parser(logps):
    top = [{"token": token, "logprob": logp} for token, logp in logps.items()]
    completion = {"logprobs": {"content": [{"top_logprobs": top}]}}
    (theirs,) = logprob_parser(completion, "A", ["A", "B"], is_binarize=False)
    ours = preference_by_logprobs(Reply("", (logps,), 0, 0))
    assert np.isnan(theirs) if ours is None else 2 - theirs == pytest.approx(ours)


def judgments(seed: int) -> tuple[np.ndarray, list[str], list[str]]:
    """A judge's preferences with some liking of length, and the two models' answers."""
    rng = np.random.default_rng(seed)
    lengths_2Q = rng.integers(50, 2000, (2, QUESTIONS))
    longer = (lengths_2Q[0] - lengths_2Q[1]).astype(float)
    noise = rng.normal(0, 1.5, QUESTIONS)
    chance = expit(rng.normal(0, 0.7) + rng.normal(0.8, 0.3) * np.tanh(longer / longer.std(ddof=1)) + noise)
    ours, theirs = ([int(length) * "x" for length in row] for row in lengths_2Q)
    return chance, ours, theirs


def its_rates(
    preference: np.ndarray, ours: list[str], theirs: list[str], monkeypatch, tmp_path, penalty: bool
) -> dict[str, Any]:
    """Its `length_controlled_minimal`, with the penalty on the coefficients that it searches for, or with next to none.

    The file that it downloads plays no part in that form; a made one stands in.
    """
    file = tmp_path / "df_gamed.csv"
    gamed = {"index": range(QUESTIONS), "instruction_difficulty": 0.0, "model": "none"}
    pd.DataFrame(gamed).to_csv(file, index=False)
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: file)
    # It reads output_2 as the evaluated model's answer, and 2 as its win.
    annotations = pd.DataFrame({"preference": 1 + preference, "output_1": theirs, "output_2": ours})
    annotations = annotations.assign(generator_1="theirs", generator_2="ours", annotator="judge", instruction="x")
    annotations["index"] = range(QUESTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its scikit-learn arguments are on their way out
        form = glm_winrate.GLM_INFO["length_controlled_minimal"]
        form = form if penalty else {**form, "kwargs": {"n_splits": 0, "C": 1e4}}
        found = glm_winrate.get_length_controlled_winrate(annotations, save_weights_dir=None, glm_info=form)
    return dict(found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("penalty", [False, True])
def test_the_rates_are_its_own_to_a_tenth_of_a_point(seed, penalty, monkeypatch, tmp_path):
    monkeypatch.setattr(rates, "RESAMPLES", 10)  # the interval is not compared
    preference, ours, theirs = judgments(seed)
    found = its_rates(preference, ours, theirs, monkeypatch, tmp_path, penalty)
    raw = mean_rate(preference)
    assert 100 * raw.mean == pytest.approx(found["win_rate"], abs=1e-6)
    assert 100 * raw.error == pytest.approx(found["standard_error"], abs=1e-6)
    longer = np.array([len(a) - len(b) for a, b in zip(ours, theirs, strict=True)], dtype=np.float64)
    controlled = 100 * length_controlled(preference, longer).mean
    # A penalty draws a rate near one half closer to it: at seed 1, 49.4 % becomes 49.7 %.
    near = 0.4 if penalty and seed == 1 else 0.1
    assert controlled == pytest.approx(found["length_controlled_winrate"], abs=near)
    assert abs(controlled - found["win_rate"]) > near or seed != 0  # length does matter
