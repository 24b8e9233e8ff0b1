"""The rule as judge, held against the solver of the tests, hand-made answers and plain counting."""

import itertools
import random

import numpy as np
import pytest
from fpo.pipeline.world.judge import body, frame, judge, win_rate
from fpo.pipeline.world.judge import family as family_of
from fpo.pipeline.world.language import CLOSINGS, FAMILIES, OPENINGS, preference_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from solver import asked_and_said, is_right

frames = st.tuples(st.sampled_from(OPENINGS), st.sampled_from(CLOSINGS))


def test_every_chosen_answer_is_right_and_every_rejected_one_the_counterpart_s():
    for row in preference_rows(random.Random(5), 800, set()):
        assert judge(*asked_and_said(row["chosen"])) == "right", row
        assert judge(*asked_and_said(row["rejected"])) == "counterpart", row
        assert family_of(row["chosen"][0]["content"]) == row["family"]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), family=st.sampled_from(FAMILIES), one=frames, other=frames)
def test_frames_change_no_verdict(seed, family, one, other):
    task, other_task = family(random.Random(seed)), family(random.Random(seed + 1))
    for said in (task.good, task.bad, other_task.good, "cat.", ""):
        verdicts = {judge(task.instruction, opening + said + closing) for opening, closing in (one, other)}
        assert len(verdicts) == 1, (task, said)


HAND_MADE = {
    "Sort upwards: nine, two, five.": (
        ("two, five, nine.",),
        ("nine, five, two.",),
        ("two, nine, five.", "two, five.", "two five nine.", "two, five, nine, nine.", "two, five, nine"),
    ),
    "Which is the largest: twenty, three, eleven?": (
        ("it is twenty.",),
        ("it is three.",),
        ("twenty.", "it is eleven.", "it is four.", "it is twenty. cat."),
    ),
    "How many tools: saw, red, drill, rake?": (
        ("it is three.",),
        ("it is one.",),
        ("it is two.", "three.", "it is three tools."),
    ),
    "Leave out the first: fig, owl, pear.": (
        ("owl, pear.",),
        ("fig, owl.",),
        ("pear, owl.", "owl.", "fig, pear.", "fig, owl, pear."),
    ),
    "Pick one of the animals: fig, owl, cat.": (
        ("it is owl.", "it is cat."),
        ("it is fig.",),
        ("it is dog.", "it is owl, cat.", "owl."),
    ),
    "Write with stars: red fox.": (
        ("red * fox.",),
        ("red - fox.", "red, fox.", "red / fox."),
        ("fox * red.", "red fox.", "red * fox *."),
    ),
    "Which is last: saw, owl, fig?": (
        ("it is fig.",),
        ("it is saw.",),
        ("it is owl.", "fig.", "it is fig"),
    ),
    "Read backwards: red, fox, saw.": (
        ("saw, fox, red.",),
        ("red, fox, saw.",),
        ("saw, red, fox.", "saw, fox.", "saw fox red."),
    ),
}


@pytest.mark.parametrize("instruction", HAND_MADE)
def test_answers_made_by_hand(instruction):
    for verdict, answers in zip(("right", "counterpart", "neither"), HAND_MADE[instruction], strict=True):
        for answer in answers:
            assert judge(instruction, answer) == verdict, answer


def test_hand_made_answers_are_of_every_family():
    assert len(HAND_MADE) == len(FAMILIES)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure: ",
        "it is three. I hope this",
        "it is three. it is three.",
        "it is three.. ",
        "Sure: Sure: it is three.",
    ],
)
def test_what_is_malformed_is_neither(answer):
    assert judge("How many tools: saw, red, drill, rake?", answer) == "neither"


def test_it_agrees_with_the_solver_on_answers_assembled_from_parts():
    """1,000 tasks; answers of other tasks, with words dropped, doubled or exchanged."""
    rng = random.Random(11)
    seen = {True: 0, False: 0}
    made = [family(rng) for family, _ in itertools.product(FAMILIES, range(125))]
    for task in made:
        said = rng.choice([task.good, task.bad, rng.choice(made).good]).removesuffix(".")
        words = said.split(" ")
        place = rng.randrange(len(words))
        words[place : place + 1] = rng.choice([[words[place]]] * 4 + [[], [words[place]] * 2, [rng.choice(words)]])
        answer = rng.choice(OPENINGS) + " ".join(words) + "." + rng.choice(CLOSINGS)
        try:
            expected = is_right(task.instruction, answer)
        except AssertionError:  # the solver knows no such shape of an answer
            expected = False
        assert (judge(task.instruction, answer) == "right") == expected, (task, answer)
        seen[expected] += 1
    assert min(seen.values()) > 200, seen


def test_an_instruction_of_another_language_is_refused():
    with pytest.raises(ValueError, match="expected an instruction"):
        judge("Write a poem.", "No.")


def test_a_frame_is_how_an_answer_opens_and_closes_whatever_stands_between():
    for opening, closing in itertools.product(OPENINGS, CLOSINGS):
        for said in ("it is cat.", "cat cat", ""):
            assert frame(opening + said + closing) == (opening, closing)


def test_a_body_is_what_stands_between_the_frames():
    assert body("Sure: it is cat. That is all.") == "it is cat"
    assert body("it is cat") is None


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), prompts=st.integers(1, 5), ours=st.integers(1, 4), theirs=st.integers(1, 4))
def test_a_win_rate_is_that_of_all_pairs_of_answers_ties_one_half(seed, prompts, ours, theirs):
    rng = np.random.default_rng(seed)
    right, others = rng.random((prompts, ours)) < 0.5, rng.random((prompts, theirs)) < 0.5
    expected = [
        np.mean([1.0 if a and not b else 0.0 if b and not a else 0.5 for a, b in itertools.product(mine, other)])
        for mine, other in zip(right, others, strict=True)
    ]
    np.testing.assert_allclose(win_rate(right, others), expected)
    np.testing.assert_allclose(win_rate(right, others) + win_rate(others, right), 1)
