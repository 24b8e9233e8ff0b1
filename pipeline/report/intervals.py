"""Means and differences over seeds and prompts, with intervals: what a comparison can tell and what it cannot.

In: a number for each seed and prompt, such as the share of right answers. Out: means with 95 % intervals and p-values.

Seeds and prompts are crossed: every seed answers the same prompts. So a resample draws seeds and prompts independently
(Owen, *The pigeonhole bootstrap*, 2007; its intervals are slightly too wide rather than too narrow). With one seed only
prompts are drawn, and the interval says nothing of other seeds.

Legend: S seeds, P prompts, B resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
LEVEL = 0.95

# A method's numbers: for each seed one a prompt, [P].
BySeed = Mapping[int, NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A mean with its interval.

    Attributes:
        mean: over all seeds and prompts.
        low: lower end of the 95 % interval.
        high: its upper end.
        p: two-sided p-value of the mean being 0.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def tells(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.low <= 0 <= self.high

    def text(self, scale: float, digits: int) -> str:
        """The mean and its interval with their signs, all times `scale`: what one reads of a difference."""
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})"


def interval(values_SP: NDArray[np.float64], seed: int = 0) -> Interval:
    """The mean over seeds and prompts; for a difference, give the differences, so that they are paired.

    Args:
        values_SP: one number for each seed and prompt.
        seed: of the resamples.
    """
    values_SP = np.asarray(values_SP, np.float64)
    rng = np.random.default_rng(seed)
    seeds, prompts = values_SP.shape
    drawn_BS, drawn_BP = (
        rng.multinomial(size, np.full(size, 1 / size), RESAMPLES) / size if size > 1 else np.ones((RESAMPLES, 1))
        for size in (seeds, prompts)
    )
    means_B = ((drawn_BS @ values_SP) * drawn_BP).sum(1)
    mean = float(values_SP.mean())
    low, high = np.quantile(means_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    farther = int((np.abs(means_B - mean) >= abs(mean)).sum())
    return Interval(mean, float(low), float(high), (1 + farther) / (1 + RESAMPLES))


def mean_of(values: BySeed) -> Interval:
    """A method's mean over its seeds and prompts."""
    return interval(np.stack([values[seed] for seed in sorted(values)]))


def gain(values: BySeed, others: BySeed) -> Interval:
    """By how much one method exceeds another, paired by seed and prompt.

    Raises:
        ValueError: the two have no seed in common.
    """
    if not (seeds := sorted(values.keys() & others.keys())):
        raise ValueError("expected seeds that both methods have, found none")
    return interval(np.stack([values[seed] - others[seed] for seed in seeds]))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many comparisons there are, by Holm's method; in the order given."""
    found = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = largest
    return found
