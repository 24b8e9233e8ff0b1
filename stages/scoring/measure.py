"""Pairs measured as the cache holds them: stage one's use of the forward pass.

In: a frozen causal LM, pairs and SAEs. Out: each response's log-probability and largest pooled features, on the host.
The host does not wait for the device within a row: a row's results are copied while the next row is computed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...cache.schema import CachedPair, Pair, ReferenceResponse
from ..model.models import Recipe
from ..model.sae import SiteSAE
from .features import LargestFeatures, select_largest
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

    def take(row: PackedRow, result: "_RowResult") -> None:
        responses = result.read(row, saes)
        for number, index in enumerate(row.pairs):
            measured[index] = CachedPair(pairs[index], *responses[2 * number : 2 * number + 2])
        if on_row:
            on_row(row)

    # The next row is launched before a row's results are read, so that the device never waits for the host.
    before: tuple[PackedRow, _RowResult] | None = None
    for row in pack(pairs, token_budget, row_layout(model)):
        pinned = row.pin_memory() if device.type == "cuda" else row
        result = _RowResult(score_row(model, pinned.to(device), saes, recipe), keep_features)
        if before is not None:
            take(*before)
        before = row, result
    if before is not None:
        take(*before)
    return [measured[index] for index in range(len(pairs))]


class _RowResult:
    """What the cache stores of a row's responses, while it is copied to the host."""

    def __init__(self, scores: RowScores, keep_features: int | None) -> None:
        self._sites = [select_largest(pooled_RM, keep_features) for pooled_RM in scores.pooled]
        finite = [values.isfinite().all() for values in (scores.logps_R, *scores.pooled)]
        head = [scores.logps_R, torch.stack(finite).to(torch.int32)]
        self._copy = HostCopy([*head, *(tensor for site in self._sites for tensor in site.tensors)])

    def read(self, row: PackedRow, saes: Sequence[SiteSAE]) -> list[ReferenceResponse]:
        """One entry a response.

        Raises:
            FloatingPointError: a number is not finite; names the row's pairs and the site.
        """
        logps_R, finite, *rest = self._copy.read()
        places = ["log-probabilities", *(f"pooled features at {sae.site.name}" for sae in saes)]
        if wrong := [place for place, whole in zip(places, finite.tolist(), strict=True) if not whole]:
            raise FloatingPointError(f"{named(row.names, 'pair')}: not finite: {', '.join(wrong)}")
        by_site = []
        for site, sae in zip(self._sites, saes, strict=True):
            own, rest = rest[: len(site.tensors)], rest[len(site.tensors) :]
            ids_RK = None if site.ids_RK is None else own.pop(0)
            by_site.append(LargestFeatures(ids_RK, *own).stored(sae.width))
        return [
            ReferenceResponse(logp, row.lengths[number], tuple(site[number] for site in by_site))
            for number, logp in enumerate(logps_R.tolist())
        ]


class HostCopy:
    """Tensors of 4 or 8 bytes an entry, copied to the host while the device goes on."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Starts one copy of all tensors, into pinned memory, without waiting."""
        # 8-byte dtypes first, so that every tensor is aligned.
        self._order = sorted(range(len(tensors)), key=lambda number: -tensors[number].element_size())
        self._kinds = [(tensors[number].dtype, tensors[number].shape) for number in self._order]
        flat = torch.cat([tensors[number].contiguous().flatten().view(torch.int32) for number in self._order])
        self._done: torch.cuda.Event | None = None
        self._buffer = flat
        if flat.device.type == "cuda":
            self._buffer = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._buffer.copy_(flat, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(flat.device))

    def read(self) -> list[Tensor]:
        """The tensors, on the host; waits for the copy, not for later work of the device."""
        if self._done is not None:
            self._done.synchronize()
        found: dict[int, Tensor] = {}
        start = 0
        for number, (dtype, shape) in zip(self._order, self._kinds, strict=True):
            stop = start + shape.numel() * dtype.itemsize // 4
            found[number] = self._buffer[start:stop].view(dtype).view(shape)
            start = stop
        return [found[number] for number in range(len(found))]
