"""Replies as judges write them, and what they are worth; what holds no verdict is None, never a tie."""

import math

import pytest
from fpo.stages.judge.client import Reply
from fpo.stages.judge.verdicts import preference_by_logprobs, preference_by_text, score_of_ten, verdict_of_five


def reply(*positions: dict[str, float]) -> Reply:
    return Reply("", positions, 0, 0)


@pytest.mark.parametrize(
    ("positions", "preference"),
    [
        ([{"A": math.log(0.6), "B": math.log(0.2), "The": math.log(0.1)}], 0.75),
        ([{" A": math.log(0.3), "A": math.log(0.3), "B": math.log(0.2)}], 0.75),  # one verdict, two tokens
        ([{"A": math.log(0.9), "yes": math.log(0.1)}], 1.0),
        ([{"B": -0.01}], 0.0),
        ([{"Answer": -0.1, "I": -3.0}, {"\n": 0.0}, {"B": math.log(0.5), "A": math.log(0.5)}], 0.5),
        ([{"A": -9999.0, "B": -0.1}], 0.0),
        ([{"I": -0.1, "An": -2.0}], None),
        ([], None),
    ],
)
def test_the_preference_is_the_share_of_a_where_a_verdict_first_appears(positions, preference):
    found = preference_by_logprobs(reply(*positions))
    assert found is None if preference is None else found == pytest.approx(preference)


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        ("A", 1.0),
        (" B\n", 0.0),
        ("**A**", 1.0),
        ("Answer B.", 0.0),
        ("Both are fine, but the first is shorter. [[A]]", 1.0),
        ("[[B]] because", 0.0),
        ("[[A]] or perhaps [[B]]", None),
        ("A: the first one is shorter", 1.0),
        ("B\n\nIt is clear.", 0.0),
        ("A: A\n", 1.0),
        ("A: good. B: bad.", None),
        ("B: A good answer", None),
        ("A good answer is short.", None),  # no verdict, but an article
        ("A is better than B", None),
        ("I cannot judge this.", None),
        ("AB", None),
        ("C", None),
        ("", None),
    ],
)
def test_a_text_is_a_verdict_or_none(text, preference):
    assert preference_by_text(text) == preference


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("… so [[A>>B]]", "A>>B"),
        ("[[ A>B ]]", "A>B"),
        ("It could be [[A=B]], but no: [[B>A]]", "B>A"),
        ("My final verdict is: [[B>>A]].", "B>>A"),
        ("A>B", None),
        ("[[A>>>B]]", None),
        ("[[A]]", None),
        ("", None),
    ],
)
def test_one_of_five_verdicts_or_none(text, verdict):
    assert verdict_of_five(text) == verdict


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[7]]", 7.0),
        ("[[8.5]] out of 10", 8.5),
        ("[[ 10 ]]", 10.0),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[7]", None),
        ("I refuse.", None),
    ],
)
def test_a_score_lies_from_one_to_ten_or_is_none(text, score):
    assert score_of_ten(text) == score
