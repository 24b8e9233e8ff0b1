"""What attends to what in a packed row: the rule, and its form for each attention implementation.

In: a decoder's configuration and a row. Out: the row's layout, and a mask for each kind of layer. Eager attention takes
an additive mask, `packed_flex` takes blocks, and `packed` the causal sequences of the row.

Shapes: L positions of a row.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..model.attention import PACKED
from ..model.flex import BLOCK, FLEX, RowMask
from .packing import PADDING, PROMPT, PackedRow, RowLayout


def visible(row: PackedRow, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether position `query` may attend to position `key`: the one rule behind every mask.

    The key is in the same pair, not later in the row, and in the prompt or in the query's own response. A sliding
    window counts position ids, so that the rejected response keeps the window that it has as a sequence of its own.
    Padding attends to padding, so that no softmax is over nothing.

    Args:
        row: the packed row.
        query: int64 row positions, any shape.
        key: int64 row positions, broadcast with `query`.
        window: tokens that the layer sees, the query's own included; None for full attention.

    Returns:
        bool, the broadcast shape.
    """
    same_pair = row.pair_L[query] == row.pair_L[key]
    same_part = (row.part_L[key] == PROMPT) | (row.part_L[key] == row.part_L[query])
    allowed = same_pair & same_part & (key <= query)
    if window is not None:
        allowed = allowed & (row.position_ids_L[query] - row.position_ids_L[key] < window)
    return allowed


def attention_mask(row: PackedRow, window: int | None) -> Tensor:
    """The additive mask of eager attention for a window as in `visible`, float32 [1, 1, L, L]."""
    size = row.input_ids_L.numel()
    index = torch.arange(size, device=row.input_ids_L.device)
    allowed_LL = visible(row, index[:, None], index[None, :], window)
    blocked = torch.finfo(torch.float32).min
    return torch.zeros(1, 1, size, size, device=index.device).masked_fill(~allowed_LL, blocked)


def layout_for(config: Any) -> RowLayout:
    """The row layout that the attention implementation of a decoder's configuration needs."""
    if config._attn_implementation != FLEX:
        return RowLayout()
    return RowLayout(BLOCK, tuple(dict.fromkeys(_windows(config).values())))


def masks_for(config: Any, row: PackedRow) -> Any:
    """A row's attention masks as the decoder takes them: by kind of layer, or one alone if no kind is named."""
    masks = {kind: _mask(row, window, config._attn_implementation) for kind, window in _windows(config).items()}
    return masks.get("", masks)


def _windows(config: Any) -> dict[str, int | None]:
    """The sliding window of each kind of layer, None for full attention; the kind is '' if none is named."""
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    return {kind: window if kind == "sliding_attention" else None for kind in kinds} or {"": window}


def _mask(row: PackedRow, window: int | None, implementation: str) -> Any:
    if implementation == FLEX:
        return RowMask(next(blocks for blocks in row.blocks if blocks.window == window))
    if implementation == PACKED:  # reads no mask: an empty tensor of a mask's rank passes transformers' check
        return torch.empty(1, 1, 0, 0, device=row.input_ids_L.device)
    return attention_mask(row, window)


def sequences_of(row: PackedRow) -> list[list[range]]:
    """The causal sequences of a row, each as its ranges of row positions.

    A pair has two, prompt · chosen and prompt · rejected; a conversation is one, and padding, the last, is one.
    """
    changes = (row.pair_L[1:] != row.pair_L[:-1]) | (row.part_L[1:] != row.part_L[:-1])
    starts = [0, *(changes.nonzero().squeeze(1) + 1).tolist(), row.input_ids_L.numel()]
    runs = [range(start, stop) for start, stop in pairwise(starts)]
    pairs, parts = row.pair_L.tolist(), row.part_L.tolist()
    prompts = {pairs[run.start]: run for run in runs if parts[run.start] == PROMPT}
    answers = [run for run in runs if parts[run.start] != PROMPT]
    answered = {pairs[run.start] for run in answers}
    alone = [[run] for pair, run in prompts.items() if pair not in answered or pair == PADDING]
    return [[prompts[pairs[run.start]], run] for run in answers] + alone
