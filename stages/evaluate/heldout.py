"""A policy on held-out pairs: accuracy, and sequential KL and feature MSE to the reference (method.md section 6).

In: a policy, a cache of a split that it was not trained on, optionally SAEs and a live reference. Out: columns with one
value for each pair, and their means with confidence intervals.

Shapes: R responses of a packed row (chosen and rejected in turn), N pairs.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ...cache.reader import Cache
from ...cache.schema import SIDES
from ..model.models import Recipe
from ..model.sae import SiteSAE
from ..scoring.batches import RowBatch, RowCollator
from ..scoring.forward import live_reference, row_layout, score_row
from ..scoring.packing import named

# Pairs that are packed together: enough for full rows.
PAIRS_AT_ONCE = 256

CONFIDENCE = 0.95
RESAMPLES = 2000
RESAMPLING_SEED = 0
# Numbers that one batch of resamples draws.
RESAMPLED_ENTRIES = 2**22

Columns = dict[str, NDArray[Any]]


class Estimate(TypedDict, total=False):
    """A mean and its 95 % confidence interval.

    Attributes:
        mean: over all observations.
        low: lower end of the interval; `low` and `high` are absent where there is a single unit.
        high: upper end.
        n: units that were resampled.
    """

    mean: float
    low: float
    high: float
    n: int


def estimate(sums: ArrayLike, counts: ArrayLike | None = None) -> Estimate:
    """A mean with its confidence interval: percentiles over resampled units (`scipy.stats.bootstrap`).

    Units are independent of each other: pairs, or prompts with all answers that were sampled for each.

    Args:
        sums: [n], the sum of each unit's observations.
        counts: [n], how many observations a unit has; one if not given.
    """
    from scipy.stats import bootstrap  # a second to import

    totals = np.asarray(sums, dtype=np.float64)
    sizes = np.ones_like(totals) if counts is None else np.asarray(counts, dtype=np.float64)

    def mean(sums: NDArray[np.float64], counts: NDArray[np.float64], axis: int = -1) -> Any:
        return sums.sum(axis) / counts.sum(axis)

    found: Estimate = {"mean": float(mean(totals, sizes)), "n": len(totals)}
    if len(totals) > 1:
        interval = bootstrap(
            (totals, sizes),
            mean,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            batch=max(1, RESAMPLED_ENTRIES // len(totals)),
            rng=np.random.default_rng(RESAMPLING_SEED),
        ).confidence_interval
        # Where all units are equal, rounding would put the mean outside by its last bit: an error bar below 0.
        found |= {"low": min(found["mean"], float(interval.low)), "high": max(found["mean"], float(interval.high))}
    return found


@torch.no_grad()
def measure_policy(
    policy: nn.Module,
    cache: Cache,
    saes: Sequence[SiteSAE],
    recipe: Recipe,
    *,
    top_k: int,
    token_budget: int,
    reference: nn.Module | None = None,
    on_pairs: Callable[[int, int], None] | None = None,
) -> Columns:
    """Measures a policy on every pair of a cache.

    Args:
        policy: the causal LM.
        cache: opened with the sites of `saes`.
        saes: SAEs of the sites at which the features are compared; none for no comparison.
        recipe: the compute recipe.
        top_k: k of D_F.
        token_budget: tokens of a packed row.
        reference: the cache's reference, for the sequential KL.
        on_pairs: called with (pairs, tokens) after each row, for progress.

    Returns:
        Columns [N] in the cache's order: `pair_id`, and for the chosen side `chosen_logp` and `chosen_ref_logp` (nats,
        summed over tokens; float64) and `chosen_tokens`; with a reference `kl_chosen`, the sequential KL(π_ref ‖ π_θ)
        in nats; with SAEs `mse_chosen`, D_F (mean over sites), and `miss_rate_chosen`, the share of D_F's features that
        the cache had cut off; with several also `mse_chosen@SITE`, D_F of each. The rejected side has the same.

    Raises:
        FloatingPointError: a value is not finite; names the row's pairs and the columns.
    """
    device = next(policy.parameters()).device
    collate = RowCollator(token_budget, tuple(sae.width for sae in saes), row_layout(policy))
    names: list[str] = []
    order: list[int] = []
    parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
    for start in range(0, len(cache), PAIRS_AT_ONCE):
        pairs = [cache[i] for i in range(start, min(start + PAIRS_AT_ONCE, len(cache)))]
        names += [cached.pair.pair_id for cached in pairs]
        for batch in collate(pairs)["rows"]:
            row = batch.to(device)
            order += [start + index for index in row.packed.pairs]
            measured = _measure_row(policy, row, saes, recipe, top_k, reference)
            if bad := [name for name, column in measured.items() if not np.isfinite(column).all()]:
                raise FloatingPointError(f"{named(row.names, 'pair')}: not finite: {', '.join(bad)}")
            for name, column in measured.items():
                parts[name].append(column)
            if on_pairs:
                on_pairs(len(row.packed.pairs), row.tokens)
    columns: Columns = {"pair_id": np.asarray(names)}
    back = np.argsort(order)
    for name, values in parts.items():
        columns[name] = np.concatenate(values)[back]
    return columns


def _measure_row(
    policy: nn.Module,
    row: RowBatch,
    saes: Sequence[SiteSAE],
    recipe: Recipe,
    top_k: int,
    reference: nn.Module | None,
) -> Columns:
    """Columns of the row's pairs."""
    live = None if reference is None else live_reference(reference, row.packed, recipe)
    scores = score_row(policy, row.packed, saes, recipe, cached=row.cached, top_k=top_k, reference=live)
    values: dict[str, Tensor] = {
        "{}_logp": scores.logps_R,
        "{}_ref_logp": row.ref_logps_R,
        "{}_tokens": torch.tensor(row.packed.lengths, dtype=torch.int32),
    }
    if live is not None:
        values["kl_{}"] = scores.kl_R
    if saes:
        values["mse_{}"] = torch.stack([drift.mse_R for drift in scores.drifts]).mean(0)
        if len(saes) > 1:
            for sae, drift in zip(saes, scores.drifts, strict=True):
                values[f"mse_{{}}@{sae.site.name}"] = drift.mse_R
        values["miss_rate_{}"] = torch.stack([drift.miss_rate_R for drift in scores.drifts]).mean(0)
    return {
        name.format(side): values_R[offset::2].cpu().numpy()
        for name, values_R in values.items()
        for offset, side in enumerate(SIDES)
    }


def pair_metrics(columns: Mapping[str, NDArray[Any]], per_token: bool | None) -> dict[str, Estimate]:
    """Means over pairs; metrics whose columns were not measured are absent.

    Margins of log-probabilities are chosen minus rejected: the raw one in nats a token; the implicit one, the gain over
    the reference, in nats, or nats a token where the method divides. `kl/margin` and `features/mse_margin` are rejected
    minus chosen, with their sign and without β; the paper's Figure 3 plots β times the absolute value.

    Args:
        columns: from `measure_policy`.
        per_token: whether the method divides log-probabilities by the number of tokens; None if the policy is the
            reference, whose implicit accuracy is not defined.
    """
    means = [columns[f"{side}_logp"] / columns[f"{side}_tokens"] for side in SIDES]
    metrics = {"accuracy/raw": estimate(_wins(means[0] - means[1])), "margin/raw": estimate(means[0] - means[1])}
    if per_token is not None:
        # The sign of LPD minus the reference's margin does not depend on β > 0.
        gains = [columns[f"{side}_logp"] - columns[f"{side}_ref_logp"] for side in SIDES]
        if per_token:
            gains = [gain / columns[f"{side}_tokens"] for gain, side in zip(gains, SIDES, strict=True)]
        metrics["accuracy/implicit"] = estimate(_wins(gains[0] - gains[1]))
        metrics["margin/implicit"] = estimate(gains[0] - gains[1])
    for column, name in (("kl", "kl/"), ("mse", "features/mse_")):
        if f"{column}_chosen" in columns:
            chosen, rejected = (columns[f"{column}_{side}"] for side in SIDES)
            metrics[f"{name}chosen"] = estimate(chosen)
            metrics[f"{name}rejected"] = estimate(rejected)
            metrics[f"{name}margin"] = estimate(rejected - chosen)
    for column in columns:
        if column.startswith("mse_chosen@"):
            site = column.removeprefix("mse_chosen@")
            metrics[f"features/mse {site}"] = estimate((columns[column] + columns[f"mse_rejected@{site}"]) / 2)
    if "miss_rate_chosen" in columns:
        metrics["features/miss_rate"] = estimate((columns["miss_rate_chosen"] + columns["miss_rate_rejected"]) / 2)
    return metrics


def _wins(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where the chosen response is ahead, one half at a tie."""
    return np.heaviside(margins, 0.5)
