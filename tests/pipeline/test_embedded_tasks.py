"""The answers of the embedded world, held against a solver that knows only English and the categories."""

import random
import re
from collections import Counter
from typing import Any

import pytest
from fpo.pipeline.embedded_tasks import FAMILIES, conversation_rows, preference_rows, tasks
from hypothesis import given, settings
from hypothesis import strategies as st

# Written out again, so that a word that strays into another category is found.
KINDS = {
    "animal": {"cat", "dog", "horse", "owl", "fox", "bear", "goat", "duck"},
    "tool": {"hammer", "saw", "drill", "rake", "knife", "brush", "spade", "wrench"},
    "fruit": {"apple", "pear", "plum", "fig", "lemon", "mango", "cherry", "melon"},
    "colour": {"red", "blue", "green", "white", "black", "pink", "brown", "grey"},
}
COUNTING = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
BETWEEN = {"dashes": " - ", "commas": ", ", "slashes": " / ", "stars": " * "}

seeds = st.integers(0, 2**32)
several = settings(max_examples=10, deadline=None)


def bare(instruction: str) -> str:
    """An instruction without its polite opening."""
    return re.sub(r"^(Hello|Please help me|I have a question)\. ", "", instruction)


def body(answer: str) -> str:
    """An answer without how it opens and closes."""
    found = re.fullmatch(r"(?:[A-Z][A-Za-z ]+: )?([^.:?]+)\.(?: [A-Z][A-Za-z ]+[.?])?", answer)
    assert found, answer
    return found[1]


def is_right(instruction: str, answer: str) -> bool:
    """Whether the answer's body is what the instruction asks for."""

    def reads(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, bare(instruction))

    said = body(answer)
    if found := reads(r"Sort these numbers, the (smallest|largest) first: (.+)\."):
        return said.split(", ") == sorted(found[2].split(", "), key=COUNTING.index, reverse=found[1] == "largest")
    if found := reads(r"[A-Z][a-z]+ knows (\w+) and (\w+)\. Which number is (larger|smaller)\?"):
        wanted = (max if found[3] == "larger" else min)(found[1], found[2], key=COUNTING.index)
        return said == f"the number {wanted}"
    if found := reads(r"How many (\w+)s are in this list: (.+)\?"):
        number = sum(word in KINDS[found[1]] for word in found[2].split(", "))
        return said == f"it is {COUNTING[number]}"
    if found := reads(r"Copy this list without the (\w+)s: (.+)\."):
        return said.split(", ") == [word for word in found[2].split(", ") if word not in KINDS[found[1]]]
    if found := reads(r"Name an? (\w+) from this list: (.+)\."):
        return said in {f"one is {word}" for word in found[2].split(", ") if word in KINDS[found[1]]}
    if found := reads(r"[A-Z][a-z]+ has (\w+) \w+ and (finds|loses) (\w+)\. How many are there now\?"):
        had, change = COUNTING.index(found[1]), COUNTING.index(found[3])
        return said == f"it is {COUNTING[had + change if found[2] == 'finds' else had - change]}"
    if found := reads(r"Write these words with (\w+) between them: (.+)\."):
        return said == BETWEEN[found[1]].join(found[2].split())
    if found := reads(r"Which word comes (first|last) in this list: (.+)\?"):
        return said == f"that is {found[2].split(', ')[0 if found[1] == 'first' else -1]}"
    raise AssertionError(f"no instruction of the world: {instruction}")


def asked_and_said(turns: list[dict[str, str]]) -> tuple[str, str]:
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    return turns[0]["content"], turns[1]["content"]


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
    counterparts = {
        "order numbers": [("smallest", "largest")],
        "compare": [("larger", "smaller")],
        "arithmetic": [("finds", "loses")],
        "position": [("first", "last")],
        "format": [(one, other) for one in BETWEEN for other in BETWEEN if one != other],
    }
    kinds = [(one, other) for one in KINDS for other in KINDS if one != other]
    for row in pairs(seed, 80):
        asked, rejected = asked_and_said(row["rejected"])
        swaps = counterparts.get(row["family"], kinds)
        swaps = swaps + [(other, one) for one, other in swaps]
        others = {re.sub(rf"\b{one}(?=s?\b)", other, asked, count=1) for one, other in swaps} - {asked}
        assert any(is_right(other, rejected) for other in others), (asked, rejected)


@several
@given(seed=seeds)
def test_equal_seeds_give_equal_rows_and_others_do_not(seed):
    assert pairs(seed, 40) == pairs(seed, 40)
    assert pairs(seed, 40) != pairs(seed + 1, 40)
    talks = [conversation_rows(random.Random(seed), 40, set(), good=0.5) for _ in range(2)]
    assert talks[0] == talks[1]


@several
@given(seed=seeds)
def test_an_instruction_comes_once_and_none_that_is_taken(seed):
    rng, taken = random.Random(seed), set[str]()
    first, second = preference_rows(rng, 80, taken), preference_rows(rng, 80, taken)
    asked = [bare(row["chosen"][0]["content"]) for row in first + second]
    assert len(set(asked)) == len(asked)
    assert taken == set(asked)
    talks = conversation_rows(rng, 400, taken, good=0.5)
    assert taken == set(asked)
    assert taken.isdisjoint(bare(row["messages"][0]["content"]) for row in talks)


@several
@given(seed=seeds)
def test_both_answers_of_a_pair_open_and_close_alike(seed):
    for row in pairs(seed, 80):
        chosen, rejected = (asked_and_said(row[side])[1] for side in ("chosen", "rejected"))
        assert chosen.replace(body(chosen), "", 1) == rejected.replace(body(rejected), "", 1)


@pytest.mark.parametrize("good", [0.0, 0.25, 1.0])
def test_the_share_of_conversations_with_the_right_answer_is_the_one_asked_for(good):
    rows = conversation_rows(random.Random(1), 1600, set(), good=good)
    right = sum(is_right(*asked_and_said(row["messages"])) for row in rows) / len(rows)
    assert right == good if good in (0, 1) else abs(right - good) < 0.05  # over four standard deviations


def test_a_family_that_has_nothing_new_is_an_error_and_no_endless_search():
    class Everything(set[str]):
        def __contains__(self, instruction: object) -> bool:
            return True

    with pytest.raises(RuntimeError, match="no new instruction"):
        next(tasks(random.Random(0), Everything(), once=True))
