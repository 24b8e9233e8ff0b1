"""How many sampled answers of the embedded world are right, by its rule, and how often they win (method.md section 6).

In: the samples of evaluations (`samples.jsonl`). Out: for each run the verdict on every answer, and figures for its
record: success, win rate against the reference of the same seed, and how far the style has moved.

Legend: P prompts, A answers a prompt.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..world.judge import family, frame, judge, win_rate
from .records import Record, read_samples

INSTRUCTION = re.compile(r"<user>(.*)<end>", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Answers:
    """The verdicts on a run's sampled answers.

    Attributes:
        prompts: the instructions, in the order of the rows below.
        right_PA: bool, what the instruction asks for.
        counterpart_PA: bool, what its counterpart asks for.
        ended_PA: bool, whether the answer closed before the limit of tokens.
        frames: how many answers that ended open and close in each way.
    """

    prompts: tuple[str, ...]
    right_PA: NDArray[np.bool_]
    counterpart_PA: NDArray[np.bool_]
    ended_PA: NDArray[np.bool_]
    frames: Counter[tuple[str, str]]

    @cached_property
    def success_P(self) -> NDArray[np.float64]:
        """The share of right answers to each prompt."""
        return np.asarray(self.right_PA.mean(1))

    def wins_P(self, other: "Answers") -> NDArray[np.float64]:
        """How often an answer wins against one of `other` to the same prompt, ties one half.

        Raises:
            ValueError: the prompts differ.
        """
        if self.prompts != other.prompts:
            raise ValueError("expected answers to the same prompts, found others")
        return win_rate(self.right_PA, other.right_PA)

    def by_family(self) -> dict[str, tuple[float, float]]:
        """The shares of right answers and of the counterpart's in each family of tasks."""
        names = np.array([family(prompt) for prompt in self.prompts])
        return {
            str(name): (float(self.right_PA[names == name].mean()), float(self.counterpart_PA[names == name].mean()))
            for name in dict.fromkeys(names)
        }

    def style_shift(self, other: "Answers") -> float:
        """How far apart the two distributions of frames are, in total variation: from 0 (the same) to 1 (disjoint)."""
        mine, theirs = ({key: n / of.total() for key, n in of.items()} for of in (self.frames, other.frames))
        # In an order that does not change from process to process, for the sum's last bits.
        return 0.5 * sum(abs(mine.get(key, 0) - theirs.get(key, 0)) for key in sorted(mine.keys() | theirs.keys()))


def read_answers(evaluation: Path) -> Answers:
    """Judges the answers of an evaluation's folder."""
    verdicts: dict[str, list[tuple[bool, bool, bool]]] = {}
    frames: Counter[tuple[str, str]] = Counter()
    for sample in read_samples(evaluation):
        (instruction,) = INSTRUCTION.findall(sample["prompt"])
        verdict = judge(instruction, sample["sample"]) if sample["finished"] else "neither"
        found = (verdict == "right", verdict == "counterpart", sample["finished"])
        verdicts.setdefault(instruction, []).append(found)
        if sample["finished"]:
            frames[frame(sample["sample"])] += 1
    right_PA, counterpart_PA, ended_PA = np.moveaxis(np.array(list(verdicts.values()), np.bool_), 2, 0)
    return Answers(tuple(verdicts), right_PA, counterpart_PA, ended_PA, frames)


def success_record(answers: Answers, reference: Answers) -> Record:
    """Figures for a run's record; `reference` holds the answers of the model that the run started from."""
    return {
        "success/right": float(answers.right_PA.mean()),
        "success/counterpart": float(answers.counterpart_PA.mean()),
        "success/ended": float(answers.ended_PA.mean()),
        "success/win_rate": float(answers.wins_P(reference).mean()),
        "style/shift": answers.style_shift(reference),
    }
