"""The rule that decides which answers of the embedded world are right (method.md section 6).

In: an instruction and an answer, as text. Out: whether the answer is what the instruction asks for, what its
counterpart asks for, or neither; and from such verdicts the rate at which one model's answers win against another's.

An instruction is read, not looked up, so any instruction of the language can be judged. How an answer opens and closes
does not matter; everything else does.
"""

import re
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .language import CLOSINGS, MARKS, NUMBERS, OPENINGS, WORDS

Verdict = Literal["right", "counterpart", "neither"]

# What an instruction asks for, and what its counterparts do: bodies of answers, without frame and full stop.
Bodies = tuple[set[str], set[str]]

CATEGORY = {word: name for name, words in WORDS.items() for word in words}


def judge(instruction: str, answer: str) -> Verdict:
    """What an answer is to an instruction.

    Args:
        instruction: of the language.
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
    _, solve, parts = _read_instruction(instruction)
    return solve(*parts)


def family(instruction: str) -> str:
    """The family of an instruction's task.

    Raises:
        ValueError: the language has no such instruction.
    """
    return _read_instruction(instruction)[0]


def _read_instruction(instruction: str) -> tuple[str, Callable[..., Bodies], tuple[str, ...]]:
    """An instruction's family, the rule for it, and what the rule takes."""
    for name, (pattern, solve) in RULES.items():
        if found := re.fullmatch(pattern, instruction):
            return name, solve, found.groups()
    raise ValueError(f"expected an instruction of the embedded world, found {instruction!r}")


def body(answer: str) -> str | None:
    """An answer without its opening, closing and full stop; None if it has no full stop there."""
    opening, closing = frame(answer)
    said = answer[len(opening) : len(answer) - len(closing)]
    return said.removesuffix(".") if said.endswith(".") else None


def frame(answer: str) -> tuple[str, str]:
    """How an answer opens and closes: the longest opening and closing of the language that it has, '' for none."""
    opening = max((text for text in OPENINGS if answer.startswith(text)), key=len)
    rest = answer[len(opening) :]
    return opening, max((text for text in CLOSINGS if rest.endswith(text)), key=len)


def _ordered(way: str, listed: str) -> Bodies:
    upwards = sorted(listed.split(", "), key=NUMBERS.index)
    up, down = {", ".join(upwards)}, {", ".join(reversed(upwards))}
    return (up, down) if way == "upwards" else (down, up)


def _compared(asked: str, listed: str) -> Bodies:
    numbers = sorted(listed.split(", "), key=NUMBERS.index)
    smallest, largest = {f"it is {numbers[0]}"}, {f"it is {numbers[-1]}"}
    return (smallest, largest) if asked == "smallest" else (largest, smallest)


def _counted(category: str, listed: str) -> Bodies:
    kinds = [CATEGORY[word] for word in listed.split(", ")]
    said = {kind: f"it is {NUMBERS[kinds.count(kind) - 1]}" for kind in kinds}
    return {said[category]}, {text for kind, text in said.items() if kind != category}


def _left(left_out: str, listed: str) -> Bodies:
    words = listed.split(", ")
    tail, head = {", ".join(words[1:])}, {", ".join(words[:-1])}
    return (tail, head) if left_out == "first" else (head, tail)


def _picked(category: str, listed: str) -> Bodies:
    words = listed.split(", ")
    right = {f"it is {word}" for word in words if CATEGORY[word] == category}
    return right, {f"it is {word}" for word in words} - right


def _written(way: str, listed: str) -> Bodies:
    said = {name: mark.join(listed.split(" ")) for name, mark in MARKS.items()}
    return {said[way]}, {text for name, text in said.items() if name != way}


def _placed(place: str, listed: str) -> Bodies:
    words = listed.split(", ")
    first, last = {f"it is {words[0]}"}, {f"it is {words[-1]}"}
    return (first, last) if place == "first" else (last, first)


def _turned(way: str, listed: str) -> Bodies:
    forwards, backwards = {listed}, {", ".join(reversed(listed.split(", ")))}
    return (forwards, backwards) if way == "forwards" else (backwards, forwards)


# By family: what an instruction looks like, and what it asks for.
RULES: dict[str, tuple[str, Callable[..., Bodies]]] = {
    "order": (r"Sort (upwards|downwards): (.+)\.", _ordered),
    "compare": (r"Which is the (smallest|largest): (.+)\?", _compared),
    "count": (r"How many (\w+): (.+)\?", _counted),
    "leave out": (r"Leave out the (first|last): (.+)\.", _left),
    "pick": (r"Pick one of the (\w+): (.+)\.", _picked),
    "format": (r"Write with (\w+): (.+)\.", _written),
    "position": (r"Which is (first|last): (.+)\?", _placed),
    "turn round": (r"Read (forwards|backwards): (.+)\.", _turned),
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
