"""Attention over packed rows as the plain causal sequences that they are made of.

In: queries, keys and values of a row `prompt · chosen · rejected · …`, and its sequences. Out: what every position
attends to, as under the masks of `packing.visible`. The kernel of scaled-dot-product attention skips what lies above
the diagonal only where it is told that a sequence is causal, not where a mask says so.

Registered with transformers under the name `packed`; without `sequences` it is its `sdpa`.

Shapes: L positions of a row, S of a sequence, H heads, K heads of keys and values, D size of a head.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .packing import PADDING, PROMPT, PackedRow

PACKED = "packed"


def sequences_of(row: PackedRow) -> list[list[range]]:
    """The causal sequences of a row, each as the ranges of positions that make it, in turn.

    Two a pair: prompt and chosen, prompt and rejected. A conversation, and the padding, is one by itself.
    """
    starts = [0, *_where_it_changes(row), row.input_ids_L.numel()]
    runs = [range(start, stop) for start, stop in pairwise(starts)]
    pairs, parts = row.pair_L.tolist(), row.part_L.tolist()
    prompts = {pairs[run.start]: run for run in runs if parts[run.start] == PROMPT}
    answers = [run for run in runs if parts[run.start] != PROMPT]
    answered = {pairs[run.start] for run in answers}
    alone = [[run] for pair, run in prompts.items() if pair not in answered or pair == PADDING]
    return [[prompts[pairs[run.start]], run] for run in answers] + alone


def _where_it_changes(row: PackedRow) -> list[int]:
    """The positions at which another pair or part begins."""
    same = (row.pair_L[1:] == row.pair_L[:-1]) & (row.part_L[1:] == row.part_L[:-1])
    starts: list[int] = ((~same).nonzero().squeeze(1) + 1).tolist()
    return starts


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
        query_1HLD: of a row.
        key_1KLD: likewise.
        value_1KLD: likewise.
        attention_mask: read only where there are no `sequences`.
        sequences: of the row; what they share is computed again in each, and taken from the first.
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
    """Which of a sequence's positions see which, bool [1, 1, S, S]."""
    index = torch.arange(size, device=like.device)
    behind_SS = index[:, None] - index[None, :]
    return ((behind_SS >= 0) & (behind_SS < window))[None, None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
