"""Batches of packed rows on their way to a device, and results on their way back.

In: cached pairs or conversations. Out: packed rows, as the Trainer's collator returns them, with the reference's cached
scores. `HostCopy` brings what was computed of a row to the host.

Shapes: L positions of a row, R responses of a row (two a pair).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.schema import CachedPair
from .features import CachedFeatures
from .packing import Conversation, PackedRow, pack, pack_conversations


@dataclass(frozen=True, eq=False)
class RowBatch:
    """One packed row with what the cache says about its responses.

    Attributes:
        packed: the row.
        cached: the reference's features, one entry a site.
        ref_logps_R: float64, the reference's log-probabilities.
    """

    packed: PackedRow
    cached: tuple[CachedFeatures, ...]
    ref_logps_R: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the row without padding."""
        return self.packed.tokens

    @property
    def names(self) -> tuple[str, ...]:
        """The `pair_id` of each pair."""
        return self.packed.names

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "RowBatch":
        """The same on `device`; accelerate's loader calls it."""
        cached = tuple(features.to(device) for features in self.cached)
        ref_logps_R = self.ref_logps_R.to(device, non_blocking=non_blocking)
        return RowBatch(self.packed.to(device, non_blocking), cached, ref_logps_R)

    def pin_memory(self) -> "RowBatch":
        """The same in memory that a GPU copies from while it computes; the loader calls it where there is one."""
        cached = tuple(features.pin_memory() for features in self.cached)
        return RowBatch(self.packed.pin_memory(), cached, self.ref_logps_R.pin_memory())


@dataclass(frozen=True)
class RowCollator:
    """Packs a batch of cached pairs into rows.

    Attributes:
        token_budget: tokens of a row.
        pad_to: row lengths are padded to a multiple of this.
        widths: widths of the SAEs whose features are read; empty where the method reads none.
        windows: as in `RowLayout`.
    """

    token_budget: int
    pad_to: int
    widths: tuple[int, ...]
    windows: tuple[int | None, ...] = ()

    def __call__(self, pairs: Sequence[CachedPair]) -> dict[str, list[RowBatch]]:
        """Rows of the batch; together they hold every pair once."""
        rows = []
        for packed in pack([cached.pair for cached in pairs], self.token_budget, self.pad_to, self.windows):
            responses = [side for index in packed.pairs for side in (pairs[index].chosen, pairs[index].rejected)]
            cached = tuple(
                CachedFeatures.collate([response.features[site] for response in responses], width)
                for site, width in enumerate(self.widths)
            )
            ref_logps_R = torch.tensor([response.logp for response in responses], dtype=torch.float64)
            rows.append(RowBatch(packed, cached, ref_logps_R))
        return {"rows": rows}


@dataclass(frozen=True)
class ConversationCollator:
    """Packs a batch of conversations into rows.

    Attributes:
        token_budget: tokens of a row.
        pad_to: row lengths are padded to a multiple of this.
        windows: as in `RowLayout`.
    """

    token_budget: int
    pad_to: int
    windows: tuple[int | None, ...] = ()

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, list[PackedRow]]:
        """Rows of the batch; together they hold every conversation once."""
        return {"rows": pack_conversations(conversations, self.token_budget, self.pad_to, self.windows)}


class HostCopy:
    """Tensors of 4 or 8 bytes an entry, copied to the host while the device goes on."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Starts the copy: one for all tensors, into pinned memory, without waiting."""
        # Those of 8 bytes an entry first, so that each begins where its dtype may.
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
