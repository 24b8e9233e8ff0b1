"""What a decoder's attention asks of packed rows, and the masks of its kinds of layers.

In: a decoder's configuration, and a row. Out: how rows must be laid out; a mask for every kind of layer, in the form
that the attention implementation takes.
"""

from typing import Any

import torch

from .attention import PACKED
from .blocks import BLOCK
from .flex import FLEX, RowMask
from .packing import PackedRow, RowLayout, attention_mask


def layout_for(config: Any) -> RowLayout:
    """How rows must be laid out for a decoder of this configuration."""
    if config._attn_implementation != FLEX:
        return RowLayout()
    return RowLayout(BLOCK, tuple(dict.fromkeys(_windows(config).values())))


def masks_for(config: Any, row: PackedRow) -> Any:
    """The masks of a row, as a decoder takes them: by its kinds of layers, or one where it names none."""
    masks = {kind: _mask(row, window, config._attn_implementation) for kind, window in _windows(config).items()}
    return masks.get("", masks)


def _windows(config: Any) -> dict[str, int | None]:
    """What a decoder's layers see, by their kind; a decoder that names no kinds has one, here called ''."""
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    return {kind: window if kind == "sliding_attention" else None for kind in kinds} or {"": window}


def _mask(row: PackedRow, window: int | None, implementation: str) -> Any:
    if implementation == FLEX:
        return RowMask(next(blocks for blocks in row.blocks if blocks.window == window))
    if implementation == PACKED:  # which reads none: a tensor whose shape alone says that it is a mask
        return torch.empty(1, 1, 0, 0, device=row.input_ids_L.device)
    return attention_mask(row, window)
