"""The Trainer's collators: batches of cached pairs, or of conversations, to packed rows.

In: cached pairs, or conversations. Out: packed rows, those of cached pairs with the reference's log-probs and features.

Shapes: L positions of a row, R responses of a row (two a pair).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.schema import CachedPair
from ..data.tokenize import Conversation
from .features import CachedFeatures
from .packing import UNPADDED, PackedRow, RowLayout, pack, pack_conversations


@dataclass(frozen=True, eq=False)
class RowBatch:
    """One packed row with what the cache says about its responses.

    Attributes:
        packed: the row.
        cached: the reference's features, one entry a site.
        ref_logps_R: float64, the reference's log-probabilities.
        lengths_R: float64, learnt tokens of each response, as the losses divide by them.
    """

    packed: PackedRow
    cached: tuple[CachedFeatures, ...]
    ref_logps_R: Tensor
    lengths_R: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the row without padding."""
        return self.packed.tokens

    @property
    def names(self) -> tuple[str, ...]:
        """The `pair_id` of each pair."""
        return self.packed.names

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "RowBatch":
        """The batch on `device`; accelerate's loader calls it."""
        cached = tuple(features.to(device) for features in self.cached)
        numbers = (values.to(device, non_blocking=non_blocking) for values in (self.ref_logps_R, self.lengths_R))
        return RowBatch(self.packed.to(device, non_blocking), cached, *numbers)

    def pin_memory(self) -> "RowBatch":
        """The batch in pinned memory, from which a GPU copies while it computes; the Trainer's loader calls it."""
        cached = tuple(features.pin_memory() for features in self.cached)
        return RowBatch(self.packed.pin_memory(), cached, self.ref_logps_R.pin_memory(), self.lengths_R.pin_memory())


@dataclass(frozen=True)
class RowCollator:
    """Packs a batch of cached pairs into rows.

    Attributes:
        token_budget: tokens of a row.
        widths: widths of the SAEs whose features are read; empty where the method reads none.
        layout: what the policy's attention asks of rows.
    """

    token_budget: int
    widths: tuple[int, ...]
    layout: RowLayout = UNPADDED

    def __call__(self, pairs: Sequence[CachedPair]) -> dict[str, list[RowBatch]]:
        """Rows of the batch; together they hold every pair once."""
        rows = []
        for packed in pack([cached.pair for cached in pairs], self.token_budget, self.layout):
            responses = [side for index in packed.pairs for side in (pairs[index].chosen, pairs[index].rejected)]
            cached = tuple(
                CachedFeatures.collate([response.features[site] for response in responses], width)
                for site, width in enumerate(self.widths)
            )
            ref_logps_R = torch.tensor([response.logp for response in responses], dtype=torch.float64)
            lengths_R = torch.tensor(packed.lengths, dtype=torch.float64)
            rows.append(RowBatch(packed, cached, ref_logps_R, lengths_R))
        return {"rows": rows}


@dataclass(frozen=True)
class ConversationCollator:
    """Packs a batch of conversations into rows; its attributes are those of `RowCollator`."""

    token_budget: int
    layout: RowLayout = UNPADDED

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, list[PackedRow]]:
        """Rows of the batch; together they hold every conversation once."""
        return {"rows": list(pack_conversations(conversations, self.token_budget, self.layout))}
