"""The answers of the embedded world, held against the solver."""

import random
import re
from collections import Counter
from typing import Any

import pytest
from fpo.pipeline.world.language import FAMILIES, conversation_rows, preference_rows, tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from solver import BETWEEN, KINDS, asked_and_said, body, is_right, problem

seeds = st.integers(0, 2**32)
several = settings(max_examples=10, deadline=None)


def pairs(seed: int, count: int) -> list[dict[str, Any]]:
    return preference_rows(random.Random(seed), count, set())


@several
@given(seed=seeds)
def test_the_chosen_answer_is_right_and_the_rejected_one_wrong(seed):
    rows = pairs(seed, 160)
    for row in rows:
        (asked, chosen), (asked_again, rejected) = asked_and_said(row["chosen"]), asked_and_said(row["rejected"])
        assert asked == asked_again
        assert is_right(asked, chosen), (asked, chosen)
        assert not is_right(asked, rejected), (asked, rejected)
        assert body(chosen) != body(rejected)
    assert set(Counter(row["family"] for row in rows).values()) == {160 // len(FAMILIES)}


@several
@given(seed=seeds)
def test_the_rejected_answer_is_right_for_another_instruction(seed):
    """So that nothing in an answer alone says which it is."""
    swaps = [("upwards", "downwards"), ("smallest", "largest"), ("first", "last"), ("forwards", "backwards")]
    swaps += [(one, other) for names in (BETWEEN, [f"{kind}s" for kind in KINDS]) for one in names for other in names]
    swaps += [(other, one) for one, other in swaps]
    for row in pairs(seed, 80):
        asked, rejected = asked_and_said(row["rejected"])
        others = {re.sub(rf"\b{one}\b", other, asked, count=1) for one, other in swaps} - {asked}
        assert any(is_right(other, rejected) for other in others), (asked, rejected)


@several
@given(seed=seeds)
def test_equal_seeds_give_equal_rows_and_others_do_not(seed):
    assert pairs(seed, 40) == pairs(seed, 40)
    assert pairs(seed, 40) != pairs(seed + 1, 40)
    talks = [conversation_rows(random.Random(seed), 40, set()) for _ in range(2)]
    assert talks[0] == talks[1]


@several
@given(seed=seeds)
def test_a_problem_comes_once_however_it_is_asked_and_none_that_is_taken(seed):
    rng, taken = random.Random(seed), set[str]()
    first, second = preference_rows(rng, 80, taken), preference_rows(rng, 80, taken)
    posed = [problem(row["chosen"][0]["content"]) for row in first + second]
    assert len(set(posed)) == len(posed) == len(taken)
    before = set(taken)
    talks = conversation_rows(rng, 400, taken)
    assert taken == before
    assert set(posed).isdisjoint(problem(row["messages"][0]["content"]) for row in talks)


@several
@given(seed=seeds)
def test_both_answers_of_a_pair_open_and_close_alike(seed):
    for row in pairs(seed, 80):
        chosen, rejected = (asked_and_said(row[side])[1] for side in ("chosen", "rejected"))
        assert chosen.replace(body(chosen), "", 1) == rejected.replace(body(rejected), "", 1)


def test_conversations_have_the_right_answer_as_often_as_the_wrong_one():
    rows = conversation_rows(random.Random(1), 1600, set())
    right = sum(is_right(*asked_and_said(row["messages"])) for row in rows) / len(rows)
    assert abs(right - 0.5) < 0.05  # four standard deviations


def test_a_family_that_has_nothing_new_is_an_error_and_no_endless_search():
    class Everything(set[str]):
        def __contains__(self, problem: object) -> bool:
            return True

    with pytest.raises(RuntimeError, match="no new problem"):
        next(tasks(random.Random(0), Everything(), once=True))
