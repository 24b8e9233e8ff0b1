"""Attention over a packed row, one causal sequence at a time.

In: queries, keys and values of a row, and its sequences (`sequences_of`). Out: the attention that the row's mask would
give. The kernel of scaled-dot-product attention skips the scores above the diagonal if it is told that a sequence is
causal, but not if a mask says so.

Registered with transformers under the name `packed`; without `sequences` it is transformers' `sdpa`.

Shapes: L positions of a row, S of a sequence, H heads, K heads of keys and values, D size of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED = "packed"


def packed_attention(
    module: nn.Module,
    query_1HLD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    attention_mask: Tensor | None,
    *,
    sequences: Sequence[Sequence[range]] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, by the interface of transformers.

    Args:
        module: the layer's attention.
        query_1HLD: the row's queries.
        key_1KLD: the row's keys.
        value_1KLD: the row's values.
        attention_mask: ignored if `sequences` are given.
        sequences: from `sequences_of`; a prompt is computed in both of its sequences and taken from the first.
        sliding_window: tokens that the layer sees, the query's own included; None for all.
        kwargs: the interface's other arguments.

    Returns:
        [1, L, H, D].
    """
    if sequences is None:
        return sdpa_attention_forward(module, query_1HLD, key_1KLD, value_1KLD, attention_mask, **kwargs)
    pieces: dict[range, Tensor] = {}
    for ranges in sequences:
        size = sum(len(positions) for positions in ranges)
        query_1HSD, key_1KSD, value_1KSD = (
            torch.cat([values[:, :, positions.start : positions.stop] for positions in ranges], dim=2)
            for values in (query_1HLD, key_1KLD, value_1KLD)
        )
        mask = None if sliding_window is None or size <= sliding_window else _window(size, sliding_window, query_1HLD)
        attended_1SHD, _ = sdpa_attention_forward(module, query_1HSD, key_1KSD, value_1KSD, mask, **kwargs)
        for positions, piece in zip(ranges, attended_1SHD.split([len(r) for r in ranges], dim=1), strict=True):
            pieces.setdefault(positions, piece)
    return torch.cat([pieces[positions] for positions in sorted(pieces, key=lambda r: r.start)], dim=1), None


def _window(size: int, window: int, like: Tensor) -> Tensor:
    """The mask of a causal sequence with a sliding window, bool [1, 1, S, S]."""
    index = torch.arange(size, device=like.device)
    behind_SS = index[:, None] - index[None, :]
    return ((behind_SS >= 0) & (behind_SS < window))[None, None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
