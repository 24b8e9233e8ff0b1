"""The language of the embedded world: instructions in plain English, each with a better and a worse answer.

In: a seed. Out: preference pairs and conversations as message lists. Every instruction has a counterpart (smallest
first or largest first, the animals or the tools, …), and the worse answer is the one that the counterpart asks for. So
no answer is better by itself: one must read the instruction. The openings and closings of answers vary at random.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

WORDS = {
    "animals": ("cat", "dog", "horse", "owl", "fox", "bear", "goat", "duck"),
    "tools": ("hammer", "saw", "drill", "rake", "knife", "brush", "spade", "wrench"),
    "fruits": ("apple", "pear", "plum", "fig", "lemon", "mango", "cherry", "melon"),
    "colours": ("red", "blue", "green", "white", "black", "pink", "brown", "grey"),
}
NUMBERS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank")
THINGS = ("apples", "pears", "plums", "figs", "lemons", "melons", "hammers", "brushes")
OPENINGS = ("", "", "Sure: ", "Of course: ", "Here you are: ", "My answer: ", "Let me see: ", "I would say: ")
CLOSINGS = (
    "",
    "",
    "",
    " I hope this helps.",
    " Is there anything else?",
    " That is all.",
    " Tell me if you need more.",
)
POLITE = ("", "", "Please help me. ", "I have a question. ", "Hello. ")


@dataclass(frozen=True)
class Task:
    """An instruction, the answer that it asks for and the one that its counterpart asks for, without their frames."""

    family: str
    instruction: str
    good: str
    bad: str


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words)


def _order_numbers(rng: random.Random) -> Task:
    values = sorted(rng.sample(range(20), rng.randint(3, 4)))
    shown = rng.sample(values, len(values))
    upwards, downwards = (_listed([NUMBERS[i] for i in order]) for order in (values, values[::-1]))
    first, good, bad = rng.choice([("smallest", upwards, downwards), ("largest", downwards, upwards)])
    listed = _listed([NUMBERS[i] for i in shown])
    return Task("order numbers", f"Sort these numbers, the {first} first: {listed}.", good + ".", bad + ".")


def _compare(rng: random.Random) -> Task:
    low, high = sorted(rng.sample(range(20), 2))
    asked, good, bad = rng.choice([("larger", high, low), ("smaller", low, high)])
    one, other = rng.sample([NUMBERS[low], NUMBERS[high]], 2)
    who = rng.choice(NAMES)
    question = f"{who} knows {one} and {other}. Which number is {asked}?"
    return Task("compare", question, f"the number {NUMBERS[good]}.", f"the number {NUMBERS[bad]}.")


def _two_categories(rng: random.Random, least: int, most: int) -> tuple[list[str], str, str]:
    """Shuffled words of two categories, `least` to `most` of each, in different numbers; and the two categories."""
    one, other = rng.sample(sorted(WORDS), 2)
    numbers = rng.sample(range(least, most + 1), 2)
    words = [word for name, count in zip((one, other), numbers, strict=True) for word in rng.sample(WORDS[name], count)]
    rng.shuffle(words)
    return words, one, other


def _count(rng: random.Random) -> Task:
    words, one, other = _two_categories(rng, 1, 3)
    good, bad = (NUMBERS[sum(word in WORDS[name] for word in words) - 1] for name in (one, other))
    return Task("count", f"How many {one} are in this list: {_listed(words)}?", f"it is {good}.", f"it is {bad}.")


def _leave_out(rng: random.Random) -> Task:
    words, one, other = _two_categories(rng, 1, 3)
    good, bad = (_listed([word for word in words if word not in WORDS[name]]) for name in (one, other))
    return Task("leave out", f"Copy this list without the {one}: {_listed(words)}.", good + ".", bad + ".")


def _pick(rng: random.Random) -> Task:
    words, one, other = _two_categories(rng, 1, 3)
    good, bad = (rng.choice([word for word in words if word in WORDS[name]]) for name in (one, other))
    named = {"animals": "an animal", "tools": "a tool", "fruits": "a fruit", "colours": "a colour"}[one]
    return Task("pick", f"Name {named} from this list: {_listed(words)}.", f"one is {good}.", f"one is {bad}.")


def _arithmetic(rng: random.Random) -> Task:
    small, large = sorted(rng.sample(range(1, 11), 2))
    more, less = NUMBERS[large + small - 1], NUMBERS[large - small - 1]
    verb, good, bad = rng.choice([("finds", more, less), ("loses", less, more)])
    story = f"{rng.choice(NAMES)} has {NUMBERS[large - 1]} {rng.choice(THINGS)} and {verb} {NUMBERS[small - 1]}."
    return Task("arithmetic", f"{story} How many are there now?", f"it is {good}.", f"it is {bad}.")


def _format(rng: random.Random) -> Task:
    words = rng.sample([word for group in sorted(WORDS) for word in WORDS[group]], rng.randint(2, 4))
    ways = {"dashes": " - ", "commas": ", ", "slashes": " / ", "stars": " * "}
    asked, other = rng.sample(sorted(ways), 2)
    good, bad = ways[asked].join(words), ways[other].join(words)
    return Task("format", f"Write these words with {asked} between them: {' '.join(words)}.", good + ".", bad + ".")


def _position(rng: random.Random) -> Task:
    words = rng.sample([word for group in sorted(WORDS) for word in WORDS[group]], rng.randint(3, 4))
    place, good, bad = rng.choice([("first", words[0], words[-1]), ("last", words[-1], words[0])])
    question = f"Which word comes {place} in this list: {_listed(words)}?"
    return Task("position", question, f"that is {good}.", f"that is {bad}.")


FAMILIES: tuple[Callable[[random.Random], Task], ...] = (
    *(_order_numbers, _compare, _count, _leave_out),
    *(_pick, _arithmetic, _format, _position),
)


def tasks(rng: random.Random, taken: set[str], *, once: bool) -> Iterator[Task]:
    """An endless stream of tasks, one of each family in turn.

    Args:
        rng: the source of all choices.
        taken: instructions that are not to be yielded.
        once: whether each yielded instruction is added to `taken`.

    Raises:
        RuntimeError: a family gave no new instruction in a thousand attempts.
    """
    while True:
        for family in FAMILIES:
            task = next((task for task in (family(rng) for _ in range(1000)) if task.instruction not in taken), None)
            if task is None:
                raise RuntimeError(f"{family.__name__}: no new instruction in a thousand attempts")
            if once:
                taken.add(task.instruction)
            yield task


def _frame(rng: random.Random) -> Callable[[str], dict[str, str]]:
    """A function that puts a random opening and closing around an answer."""
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    return lambda body: {"role": "assistant", "content": opening + body + closing}


def preference_rows(rng: random.Random, count: int, taken: set[str]) -> list[dict[str, Any]]:
    """Preference pairs in UltraFeedback's format, with their families.

    Instructions are new: none is in `taken`, which gains them. Both answers of a pair have the same frame.
    """
    rows = []
    for task in islice(tasks(rng, taken, once=True), count):
        asked, framed = {"role": "user", "content": rng.choice(POLITE) + task.instruction}, _frame(rng)
        chosen, rejected = ([asked, framed(body)] for body in (task.good, task.bad))
        rows.append({"chosen": chosen, "rejected": rejected, "family": task.family})
    return rows


def conversation_rows(rng: random.Random, count: int, taken: set[str], *, good: float) -> list[dict[str, Any]]:
    """Conversations in UltraChat's format; the share `good` of them has the better answer.

    None has an instruction of `taken`, but instructions may repeat among them.
    """
    rows = []
    for task in islice(tasks(rng, taken, once=False), count):
        asked = {"role": "user", "content": rng.choice(POLITE) + task.instruction}
        rows.append({"messages": [asked, _frame(rng)(task.good if rng.random() < good else task.bad)]})
    return rows
