"""Numbers that are not finite: whose they are, and where they arise.

In: what forward passes said about packed rows, or weights. Out: nothing, or a `FloatingPointError` of one line.

In a shared row attention weighs what it must not see with 0, and 0 · NaN is NaN: one pair's NaN is all pairs' NaN. So
those of a row at fault are scored once more, each in a row of its own, before any is named.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...cache.schema import SIDES
from ..model.sae import SiteSAE
from .packing import PackedRow

if TYPE_CHECKING:
    from .forward import RowScores

# So many are named; the others are counted.
NAMED = 3


def all_finite(scores: "RowScores") -> Tensor:
    """Whether all log-probabilities and pooled features of a row are finite, bool [], on their device."""
    return torch.stack([values.isfinite().all() for values in (scores.logps_R, *scores.pooled)]).all()


@torch.no_grad()
def find_faults(
    score: Callable[[PackedRow], "RowScores"], rows: Iterable[PackedRow], saes: Sequence[SiteSAE]
) -> dict[str, str]:
    """What is not finite of which pair.

    Args:
        score: scores a row, with the features of all sites pooled.
        rows: rows of one pair each.
        saes: the SAEs of these sites.

    Returns:
        Of each pair at fault, by its name: its log-probabilities and sites that are not finite.
    """
    found = {}
    for row in sorted(rows, key=lambda row: row.pairs):
        scores = score(row)
        logps = zip(SIDES, scores.logps_R, strict=True)
        what = [f"log-probability of {side} is {float(logp)}" for side, logp in logps if not logp.isfinite()]
        for sae, pooled_RM in zip(saes, scores.pooled, strict=True):
            if bad := int((~pooled_RM.isfinite()).sum()):
                what.append(f"{bad} pooled features at {sae.site.name} are not finite")
        if what:
            found[row.names[0]] = ", ".join(what)
    return found


def not_finite(faults: Mapping[str, str], noun: str = "pair") -> FloatingPointError:
    """The error that names the first of `faults` with what is wrong, some of the others, and how many more there are.

    Args:
        faults: what is not finite, by the name of the pair (or conversation); at least one.
        noun: what is named.
    """
    first, *others = faults
    also = ""
    if others:
        more = len(others) - (NAMED - 1)
        also = f"; also {noun}s {', '.join(others[: NAMED - 1])}{f' and {more} more' if more > 0 else ''}"
    return FloatingPointError(f"{noun} {first}: {faults[first]}{also}")


def check_weights(weights: Mapping[str, Tensor], when: str) -> None:
    """Checks weights that are about to be saved.

    Args:
        weights: by name.
        when: how far training has come, for the message.

    Raises:
        FloatingPointError: one is not finite.
    """
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"{when}: {bad[0]} and {len(bad) - 1} more of {len(weights)} weights are not finite and are not saved; "
            "lower --lr, or raise --warmup-steps, and start again"
        )
