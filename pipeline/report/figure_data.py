"""What the figures of the reproduction table are drawn from, checked, and the rank correlation that one of them shows.

In: what the runs measured, as plain numbers. Out: frozen data for figures.py.

Methods go by their keys in `LABELS`. Legend: T tokens.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

Numbers = NDArray[np.float64]

LABELS = {
    "sft": "SFT",
    "dpo": "DPO",
    "tdpo1": "TDPO-1",
    "tdpo2": "TDPO-2",
    "simpo": "SimPO",
    "simpo-kl": "SimPO+KL",
    "fpo": "FPO",
    "fpo-alpha0": "FPO α=0",
}


@dataclass(frozen=True)
class Curve:
    """One method's distance to the reference on held-out pairs over training; all lists are equally long.

    Attributes:
        method: key of `LABELS`.
        step: optimiser steps, ascending; step 0 is the reference, where all else is 0.
        chosen: sequential KL on chosen responses, nats a response.
        rejected: likewise on rejected ones.
        margin: |rejected - chosen|, nats.
        mse_chosen: feature MSE D_F on chosen responses, squared activation.
        mse_rejected: likewise on rejected ones.

    Raises:
        ValueError: if a list is empty or not finite, or lengths differ, or steps do not ascend.
    """

    method: str
    step: list[int]
    chosen: list[float]
    rejected: list[float]
    margin: list[float]
    mse_chosen: list[float]
    mse_rejected: list[float]

    def __post_init__(self) -> None:
        where = f"curve of {method_label(self.method)}"
        for values in (self.chosen, self.rejected, self.margin, self.mse_chosen, self.mse_rejected):
            if len(finite(where, values)) != len(self.step):
                raise ValueError(f"{where}: expected {len(self.step)} values, found {len(values)}; give one a step")
        if any(later <= earlier for earlier, later in itertools.pairwise(self.step)):
            raise ValueError(f"{where}: expected ascending steps, found {self.step}; sort them, each once")

    @property
    def kl(self) -> dict[int, float]:
        """Step to the mean KL of chosen and rejected."""
        return {step: (a + b) / 2 for step, a, b in zip(self.step, self.chosen, self.rejected, strict=True)}

    @property
    def mse(self) -> dict[int, float]:
        """Step to the mean feature MSE of chosen and rejected."""
        return {step: (a + b) / 2 for step, a, b in zip(self.step, self.mse_chosen, self.mse_rejected, strict=True)}


@dataclass(frozen=True)
class Bars:
    """One quantity that is not negative, per method and seed.

    Attributes:
        values: key of `LABELS` to one value a seed; drawn in this order.
        unit: unit of the values.

    Raises:
        ValueError: if there is no method, or one has no value, or one that is negative or not finite.
    """

    values: Mapping[str, Sequence[float]]
    unit: str

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("bars: expected one method or more, found none; give values")
        for method, values in self.values.items():
            where = f"bars of {method_label(method)}"
            if (least := finite(where, values).min()) < 0:
                raise ValueError(f"{where}: expected values from 0, found {least}; check what was measured")

    @property
    def axis_label(self) -> str:
        """The unit, and what bars and whiskers are."""
        counts = {len(values) for values in self.values.values()}
        if counts == {1}:
            return f"{self.unit}, one seed"
        seeds = " to ".join(f"{count}" for count in sorted({min(counts), max(counts)}))
        return f"{self.unit}, mean ± sd over {seeds} seeds"

    @property
    def means(self) -> list[float]:
        """Mean over seeds, per method."""
        return [float(np.mean(values)) for values in self.values.values()]

    @property
    def deviations(self) -> list[float]:
        """Standard deviation over seeds (n - 1), per method; 0 for one seed, which has none to draw."""
        return [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in self.values.values()]


@dataclass(frozen=True, eq=False)
class Tokens:
    """One method's KL and feature change per token, for Appendix B's bound `KL <= (M²/2) ‖Δc‖²`.

    Attributes:
        method: key of `LABELS`.
        kl_T: float, forward KL to the reference, nats; rounding may leave it a little below 0.
        feature_sq_T: float, ‖Δc‖² over all features of the last layer, squared activation.
        spectral_norm: M = ‖W_out^T W_dec^T‖₂, logits per activation.

    Raises:
        ValueError: if the arrays are empty, not finite or of different shapes, or a square or M is negative.
    """

    method: str
    kl_T: Numbers
    feature_sq_T: Numbers
    spectral_norm: float

    def __post_init__(self) -> None:
        where = f"tokens of {method_label(self.method)}"
        kl, squares = finite(where, self.kl_T), finite(where, self.feature_sq_T)
        finite(where, [self.spectral_norm])
        if kl.shape != squares.shape or kl.ndim != 1:
            raise ValueError(f"{where}: expected two equal lengths, found {kl.shape} and {squares.shape}; align them")
        if squares.min() < 0 or self.spectral_norm < 0:
            found = f"{squares.min()} and {self.spectral_norm}"
            raise ValueError(f"{where}: expected ‖Δc‖² and M from 0, found {found}; check what was measured")

    @property
    def bound_T(self) -> Numbers:
        """(M²/2) ‖Δc‖², float64, nats."""
        return 0.5 * self.spectral_norm**2 * np.asarray(self.feature_sq_T, np.float64)

    @property
    def share_violated(self) -> float:
        """Share of tokens whose KL is above the bound."""
        return float(np.mean(np.asarray(self.kl_T, np.float64) > self.bound_T))


def method_label(method: str) -> str:
    """The method's name in figures and tables.

    Raises:
        ValueError: if the key is none of `LABELS`.
    """
    if method not in LABELS:
        raise ValueError(f"figures: expected a method of {', '.join(LABELS)}, found {method}; name it by its key")
    return LABELS[method]


def finite(where: str, values: ArrayLike) -> Numbers:
    """The values as float64.

    Raises:
        ValueError: if there is none, or one is not finite.
    """
    array = np.asarray(values, np.float64)
    if not array.size:
        raise ValueError(f"{where}: expected values, found none; measure before drawing")
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: expected finite values, found {array[~np.isfinite(array)][0]}; check the run")
    return array


def require_distinct(methods: Sequence[str]) -> None:
    """Refuses an empty list, and a method that comes twice: its points could not be told apart.

    Raises:
        ValueError: in these cases.
    """
    if not methods or len(set(methods)) < len(methods):
        found = ", ".join(methods) or "none"
        raise ValueError(f"figures: expected one entry a method, found {found}; average over seeds first")


def rank_correlations(curves: Sequence[Curve]) -> dict[int, float]:
    """Spearman's rank correlation of KL and feature MSE across methods, at each step that all of them share.

    Across methods at equal step: pooled over time both grow, and correlate whatever the method. Leave SFT out too: as
    the reference it is last in both, which is agreement by construction.

    Args:
        curves: one a method. KL and MSE are the means of chosen and rejected.

    Returns:
        Step to correlation (scipy.stats.spearmanr; ties take their mean rank). A step where all methods have the same
        KL or the same MSE has no ranks, so no entry: step 0 always.

    Raises:
        ValueError: if there are fewer than three methods, one comes twice, or they share no step.
    """
    require_distinct([curve.method for curve in curves])
    if len(curves) < 3:
        raise ValueError(f"rank correlation: expected three methods or more, found {len(curves)}; leave it out")
    shared = sorted(set.intersection(*(set(curve.step) for curve in curves)))
    if not shared:
        raise ValueError(
            "rank correlation: expected a step that all methods share, found none; evaluate at equal steps"
        )
    pairs = {step: [(curve.kl[step], curve.mse[step]) for curve in curves] for step in shared}
    return {
        step: float(spearmanr(*columns).statistic)
        for step, columns in ((step, tuple(zip(*rows, strict=True))) for step, rows in pairs.items())
        if all(len(set(column)) > 1 for column in columns)
    }
