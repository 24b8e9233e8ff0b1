"""The rule that decides which answers of the embedded world are right (method.md section 8).

In: an instruction and an answer, as text. Out: whether the answer is what the instruction asks for, what its
counterpart asks for, or neither; and from such verdicts the rate at which one model's answers win against another's.

An instruction is read, not looked up, so any instruction of the language can be judged. How an answer opens and closes
does not matter; everything else does.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .language import CLOSINGS, NUMBERS, OPENINGS, POLITE, WORDS

Verdict = Literal["right", "counterpart", "neither"]

# What an instruction asks for, and what its counterparts do: bodies of answers, without frame and full stop.
Bodies = tuple[set[str], set[str]]

WAYS = {"dashes": " - ", "commas": ", ", "slashes": " / ", "stars": " * "}
CATEGORY = {word: name for name, words in WORDS.items() for word in words}
SINGULAR = {name.removesuffix("s"): name for name in WORDS}


def judge(instruction: str, answer: str) -> Verdict:
    """What an answer is to an instruction.

    Args:
        instruction: of the language, with or without its polite opening.
        answer: any text; one that was cut off is neither, since its full stop or the end of its closing is missing.

    Raises:
        ValueError: the language has no such instruction.
    """
    right, counterpart = bodies(instruction)
    said = body(answer)
    return "right" if said in right else "counterpart" if said in counterpart else "neither"


def bodies(instruction: str) -> Bodies:
    """The bodies of the answers that an instruction and its counterparts ask for.

    Raises:
        ValueError: the language has no such instruction.
    """
    asked = _without(instruction, POLITE, str.removeprefix)
    for pattern, solve in RULES.items():
        if found := re.fullmatch(pattern, asked):
            return solve(*found.groups())
    raise ValueError(f"expected an instruction of the embedded world, found {instruction!r}")


def body(answer: str) -> str | None:
    """An answer without its opening, closing and full stop; None if it has no full stop there."""
    opened = _without(answer, OPENINGS, str.removeprefix)
    said = _without(opened, CLOSINGS, str.removesuffix)
    return said.removesuffix(".") if said.endswith(".") else None


def _without(text: str, affixes: Sequence[str], remove: Callable[[str, str], str]) -> str:
    """The text without the longest of the affixes that it has."""
    return min((remove(text, affix) for affix in affixes), key=len)


def _ordered(first: str, listed: str) -> Bodies:
    upwards = sorted(listed.split(", "), key=NUMBERS.index)
    up, down = {", ".join(upwards)}, {", ".join(reversed(upwards))}
    return (up, down) if first == "smallest" else (down, up)


def _compared(one: str, other: str, asked: str) -> Bodies:
    smaller, larger = ({f"the number {number}"} for number in sorted((one, other), key=NUMBERS.index))
    return (larger, smaller) if asked == "larger" else (smaller, larger)


def _counted(category: str, listed: str) -> Bodies:
    kinds = [CATEGORY[word] for word in listed.split(", ")]
    said = {kind: f"it is {NUMBERS[kinds.count(kind) - 1]}" for kind in kinds}
    return {said[category]}, {text for kind, text in said.items() if kind != category}


def _left_out(category: str, listed: str) -> Bodies:
    words = listed.split(", ")
    said = {
        kind: ", ".join(word for word in words if CATEGORY[word] != kind)
        for kind in dict.fromkeys(CATEGORY[word] for word in words)
    }
    return {said[category]}, {text for kind, text in said.items() if kind != category}


def _picked(kind: str, listed: str) -> Bodies:
    words = listed.split(", ")
    right = {f"one is {word}" for word in words if CATEGORY[word] == SINGULAR[kind]}
    return right, {f"one is {word}" for word in words} - right


def _reckoned(had: str, verb: str, change: str) -> Bodies:
    first, second = NUMBERS.index(had), NUMBERS.index(change)
    more, less = {f"it is {NUMBERS[first + second + 1]}"}, {f"it is {NUMBERS[first - second - 1]}"}
    return (more, less) if verb == "finds" else (less, more)


def _written(way: str, listed: str) -> Bodies:
    said = {name: mark.join(listed.split(" ")) for name, mark in WAYS.items()}
    return {said[way]}, {text for name, text in said.items() if name != way}


def _placed(place: str, listed: str) -> Bodies:
    words = listed.split(", ")
    first, last = {f"that is {words[0]}"}, {f"that is {words[-1]}"}
    return (first, last) if place == "first" else (last, first)


RULES: dict[str, Callable[..., Bodies]] = {
    r"Sort these numbers, the (smallest|largest) first: (.+)\.": _ordered,
    r"\w+ knows (\w+) and (\w+)\. Which number is (larger|smaller)\?": _compared,
    r"How many (\w+) are in this list: (.+)\?": _counted,
    r"Copy this list without the (\w+): (.+)\.": _left_out,
    r"Name an? (\w+) from this list: (.+)\.": _picked,
    r"\w+ has (\w+) \w+ and (finds|loses) (\w+)\. How many are there now\?": _reckoned,
    r"Write these words with (\w+) between them: (.+)\.": _written,
    r"Which word comes (first|last) in this list: (.+)\?": _placed,
}


def win_rate(right: NDArray[np.bool_], others_right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How often answers win against another model's on each of the same prompts, every answer against every other.

    An answer wins if it is right and the other is not; a tie counts one half.

    Args:
        right: bool [prompts, answers], whether each answer is right; one that did not end is not.
        others_right: the same of the other model, which may have another number of answers.

    Returns:
        float64 [prompts], between 0 and 1.
    """
    return np.asarray(0.5 + 0.5 * (right.mean(1) - others_right.mean(1)))
