"""The language of the embedded world: instructions in plain English, each with a better and a worse answer.

In: a seed. Out: preference pairs and conversations as message lists. Every instruction has a counterpart (smallest
first or largest first, the first or the last, …), and the worse answer is the one that the counterpart asks for. So
no answer is better by itself: one must read the instruction. How answers open and close varies at random; it is style
and makes no answer better.

A task's problem is what it is about, whichever way it is asked: the words or numbers of its list without their order.
Splits share no problem, so a held-out task has words that never stood together before in a task of its family.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

WORDS = {
    "animals": ("cat", "dog", "horse", "owl", "fox", "bear"),
    "tools": ("hammer", "saw", "drill", "rake", "knife", "brush"),
    "fruits": ("apple", "pear", "plum", "fig", "lemon", "melon"),
    "colours": ("red", "blue", "green", "white", "black", "pink"),
}
ALL_WORDS = tuple(word for words in WORDS.values() for word in words)
NUMBERS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
MARKS = {"dashes": " - ", "commas": ", ", "slashes": " / ", "stars": " * "}
OPENINGS = ("", "", "Sure: ", "Of course: ", "My answer: ", "I would say: ")
CLOSINGS = ("", "", "", " That is all.", " I hope this helps.", " Is there anything else?")


@dataclass(frozen=True)
class Task:
    """An instruction, the answer that it asks for and the one that its counterpart asks for, without their frames.

    Attributes:
        family: the kind of task.
        problem: the family, and its words or numbers in the language's order.
        instruction: what is asked.
        good: the asked answer.
        bad: the counterpart's.
    """

    family: str
    problem: str
    instruction: str
    good: str
    bad: str


def _task(family: str, items: Iterable[str], instruction: str, good: str, bad: str) -> Task:
    problem = " ".join(sorted(items, key=(*NUMBERS, *ALL_WORDS).index))
    return Task(family, f"{family}: {problem}", instruction, good + ".", bad + ".")


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words)


def _numbers(rng: random.Random, least: int, most: int) -> tuple[list[str], list[str]]:
    """Numbers from small to large, and the same shuffled."""
    values = [NUMBERS[i] for i in sorted(rng.sample(range(len(NUMBERS)), rng.randint(least, most)))]
    return values, rng.sample(values, len(values))


def _order(rng: random.Random) -> Task:
    values, shown = _numbers(rng, 2, 3)
    upwards, downwards = _listed(values), _listed(values[::-1])
    way, good, bad = rng.choice([("upwards", upwards, downwards), ("downwards", downwards, upwards)])
    return _task("order", values, f"Sort {way}: {_listed(shown)}.", good, bad)


def _compare(rng: random.Random) -> Task:
    values, shown = _numbers(rng, 2, 3)
    low, high = (f"it is {value}" for value in (values[0], values[-1]))
    asked, good, bad = rng.choice([("smallest", low, high), ("largest", high, low)])
    return _task("compare", values, f"Which is the {asked}: {_listed(shown)}?", good, bad)


def _words(rng: random.Random, least: int, most: int) -> list[str]:
    return rng.sample(ALL_WORDS, rng.randint(least, most))


def _two_categories(rng: random.Random, counts: Sequence[tuple[int, int]]) -> tuple[list[str], str, str]:
    """Shuffled words of two categories, in one of the given numbers; and the two categories."""
    one, other = rng.sample(sorted(WORDS), 2)
    chosen = zip((one, other), rng.choice(counts), strict=True)
    words = [word for name, count in chosen for word in rng.sample(WORDS[name], count)]
    rng.shuffle(words)
    return words, one, other


def _count(rng: random.Random) -> Task:
    words, one, other = _two_categories(rng, [(1, 2), (2, 1), (1, 3), (3, 1)])
    good, bad = (f"it is {NUMBERS[sum(word in WORDS[name] for word in words) - 1]}" for name in (one, other))
    return _task("count", words, f"How many {one}: {_listed(words)}?", good, bad)


def _leave_out(rng: random.Random) -> Task:
    words = _words(rng, 2, 3)
    tail, head = _listed(words[1:]), _listed(words[:-1])
    left, good, bad = rng.choice([("first", tail, head), ("last", head, tail)])
    return _task("leave out", words, f"Leave out the {left}: {_listed(words)}.", good, bad)


def _pick(rng: random.Random) -> Task:
    words, one, other = _two_categories(rng, [(1, 1), (1, 2), (2, 1), (2, 2)])
    good, bad = (f"it is {rng.choice([word for word in words if word in WORDS[name]])}" for name in (one, other))
    return _task("pick", words, f"Pick one of the {one}: {_listed(words)}.", good, bad)


def _format(rng: random.Random) -> Task:
    words = _words(rng, 2, 3)
    asked, other = rng.sample(sorted(MARKS), 2)
    good, bad = (MARKS[marks].join(words) for marks in (asked, other))
    return _task("format", words, f"Write with {asked}: {' '.join(words)}.", good, bad)


def _position(rng: random.Random) -> Task:
    words = _words(rng, 3, 4)
    place, good, bad = rng.choice([("first", words[0], words[-1]), ("last", words[-1], words[0])])
    return _task("position", words, f"Which is {place}: {_listed(words)}?", f"it is {good}", f"it is {bad}")


def _turn_round(rng: random.Random) -> Task:
    words = _words(rng, 2, 3)
    forwards, backwards = _listed(words), _listed(words[::-1])
    way, good, bad = rng.choice([("forwards", forwards, backwards), ("backwards", backwards, forwards)])
    return _task("turn round", words, f"Read {way}: {_listed(words)}.", good, bad)


FAMILIES: tuple[Callable[[random.Random], Task], ...] = (
    *(_order, _compare, _count, _leave_out),
    *(_pick, _format, _position, _turn_round),
)

# What conversations ask: lists are harder to say than words, so they are practised more.
PRACTICE = (*FAMILIES, *(_order,) * 3, _leave_out, *(_turn_round,) * 2)


def tasks(rng: random.Random, taken: set[str], *, once: bool) -> Iterator[Task]:
    """An endless stream of tasks, one of each family in turn.

    Args:
        rng: the source of all choices.
        taken: problems that are not to be yielded.
        once: whether the problem of each yielded task is added to `taken`.

    Raises:
        RuntimeError: a family gave no new problem in a thousand attempts.
    """
    while True:
        for family in FAMILIES if once else PRACTICE:
            task = next((task for task in (family(rng) for _ in range(1000)) if task.problem not in taken), None)
            if task is None:
                raise RuntimeError(f"{family.__name__}: no new problem in a thousand attempts")
            if once:
                taken.add(task.problem)
            yield task


def _frame(rng: random.Random) -> Callable[[str], dict[str, str]]:
    """A function that puts a random opening and closing around an answer."""
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    return lambda body: {"role": "assistant", "content": opening + body + closing}


def preference_rows(rng: random.Random, count: int, taken: set[str]) -> list[dict[str, Any]]:
    """Preference pairs in UltraFeedback's format, with their families.

    Problems are new: none is in `taken`, which gains them. Both answers of a pair have the same frame.
    """
    rows = []
    for task in islice(tasks(rng, taken, once=True), count):
        asked, framed = {"role": "user", "content": task.instruction}, _frame(rng)
        chosen, rejected = ([asked, framed(body)] for body in (task.good, task.bad))
        rows.append({"chosen": chosen, "rejected": rejected, "family": task.family})
    return rows


def conversation_rows(rng: random.Random, count: int, taken: set[str]) -> list[dict[str, Any]]:
    """Conversations in UltraChat's format, with the better or the worse answer, either as likely.

    None has a problem of `taken`, but problems may repeat among them.
    """
    rows = []
    for task in islice(tasks(rng, taken, once=False), count):
        asked = {"role": "user", "content": task.instruction}
        rows.append({"messages": [asked, _frame(rng)(rng.choice((task.good, task.bad)))]})
    return rows
