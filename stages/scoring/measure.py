"""Pairs measured as the cache holds them: stage one's use of the forward pass.

In: a frozen causal LM, pairs and SAEs. Out: each response's log-probability and largest pooled features, on the host.
The host does not wait for the device within a row: a row's results are copied while the next row is computed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ...cache.schema import CachedPair, Pair, ReferenceResponse
from ..model.models import Recipe
from ..model.sae import SiteSAE
from .features import select_largest
from .forward import RowScores, row_layout, score_row
from .packing import PackedRow, named, pack


@torch.no_grad()
def measure_pairs(
    model: nn.Module,
    pairs: Sequence[Pair],
    saes: Sequence[SiteSAE],
    recipe: Recipe,
    *,
    token_budget: int,
    keep_features: int | None,
    on_row: Callable[[PackedRow], None] | None = None,
) -> list[CachedPair]:
    """Measures pairs as the cache holds them.

    Args:
        model: the causal LM.
        pairs: the pairs.
        saes: SAEs of the sites to read.
        recipe: the compute recipe.
        token_budget: tokens of a packed row; 1 gives each pair a row of its own.
        keep_features: how many features a response keeps, None for all that are not 0.
        on_row: called after each row, for progress.

    Returns:
        One row of a cache for each pair, in their order.

    Raises:
        FloatingPointError: naming pairs and sites, if a log-probability or a feature is not finite.
    """
    device = next(model.parameters()).device
    measured: dict[int, CachedPair] = {}

    def take(row: PackedRow, result: "RowResult") -> None:
        responses = result.read(row, saes)
        for number, index in enumerate(row.pairs):
            measured[index] = CachedPair(pairs[index], *responses[2 * number : 2 * number + 2])
        if on_row:
            on_row(row)

    # The next row is launched before a row's results are read, so that the device never waits for the host.
    before: tuple[PackedRow, RowResult] | None = None
    for row in pack(pairs, token_budget, row_layout(model)):
        pinned = row.pin_memory() if device.type == "cuda" else row
        result = RowResult(score_row(model, pinned.to(device), saes, recipe), keep_features)
        if before is not None:
            take(*before)
        before = row, result
    if before is not None:
        take(*before)
    return [measured[index] for index in range(len(pairs))]


class RowResult:
    """A row's responses as the cache stores them, copied to the host while the device goes on."""

    def __init__(self, scores: RowScores, keep_features: int | None) -> None:
        """Starts the copies, from a GPU into pinned memory, without waiting."""
        finite = torch.stack([values.isfinite().all() for values in (scores.logps_R, *scores.pooled)])
        self._logps_R, self._finite = (values.to("cpu", non_blocking=True) for values in (scores.logps_R, finite))
        self._sites = [select_largest(pooled_RM, keep_features).to("cpu") for pooled_RM in scores.pooled]
        self._copied = torch.cuda.Event() if finite.device.type == "cuda" else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(finite.device))

    def read(self, row: PackedRow, saes: Sequence[SiteSAE]) -> list[ReferenceResponse]:
        """One entry a response; waits for the copies, not for later work of the device.

        Raises:
            FloatingPointError: a number is not finite; names the row's pairs and the site.
        """
        if self._copied is not None:
            self._copied.synchronize()
        places = ["log-probabilities", *(f"pooled features at {sae.site.name}" for sae in saes)]
        if wrong := [place for place, whole in zip(places, self._finite.tolist(), strict=True) if not whole]:
            raise FloatingPointError(f"{named(row.names, 'pair')}: not finite: {', '.join(wrong)}")
        by_site = [site.stored(sae.width) for site, sae in zip(self._sites, saes, strict=True)]
        return [
            ReferenceResponse(logp, row.lengths[number], tuple(site[number] for site in by_site))
            for number, logp in enumerate(self._logps_R.tolist())
        ]
