"""Who attends to whom in a packed row: the rule, and what each attention implementation takes of it.

In: a decoder's configuration and a row. Out: how its rows must be laid out, and a mask for each kind of layer: eager
attention takes an additive mask, `packed_flex` blocks, and `packed` the causal sequences that a row is made of.

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

    Same pair, not later in the row, and the key is in the prompt or in the query's own response; a sliding window
    counts position ids, so that the rejected response keeps the window it has as a sequence of its own. Padding sees
    padding, so that no softmax is over nothing.

    Args:
        row: the packed row.
        query: int64 row positions, any shape.
        key: int64 row positions, broadcast with `query`.
        window: tokens a sliding-window layer sees, the query's own included; None for full attention.

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
    """The mask of one kind of layer as eager attention takes it: additive, float32 [1, 1, L, L].

    Args:
        row: the packed row, on the model's device.
        window: as in `visible`.
    """
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
    """A row's attention masks as the decoder takes them: one for each kind of layer, or one alone if it names none."""
    masks = {kind: _mask(row, window, config._attn_implementation) for kind, window in _windows(config).items()}
    return masks.get("", masks)


def _windows(config: Any) -> dict[str, int | None]:
    """The sliding window of each kind of layer, None for full attention; the kind is '' where none is named."""
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
    """The causal sequences of a row, each as the ranges of row positions that it consists of.

    A pair has two, prompt · chosen and prompt · rejected; a conversation is one, and so is the padding.
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
