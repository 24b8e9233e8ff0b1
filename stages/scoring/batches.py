"""Batches of packed rows, as the Trainer's collators return them.

In: cached pairs, or conversations. Out: packed rows; those of a cache with the reference's log-probs and features.

Shapes: L positions of a row, R responses of a row (two a pair).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.schema import CachedPair
from ..data.tokenize import Conversation
from .features import CachedFeatures
from .packing import PackedRow, pack, pack_conversations


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
