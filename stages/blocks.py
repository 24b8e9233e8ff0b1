"""Which positions of a packed row attend to which, as ranges and as blocks: what compiled attention reads of a row.

In: the runs that a row is made of, as position ids and pair and part of every position. Out: of every position the two
ranges that it attends to, and of every block of positions the blocks that hold something for it. No L × L is made.

Made beside the row, on the CPU, so that it is pinned and moved with it.

Shapes: L positions of a row, N blocks of a row, L = N · BLOCK.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

# Positions of a block: the size that flex attention's kernels are tuned for.
BLOCK = 128
# A compiler takes sizes of 1 for constants, so that a row of one block would be compiled for itself.
LEAST_BLOCKS = 2


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """What attends to what in one kind of layer. Tensors are int32.

    Attributes:
        window: tokens that the layer sees, the query's own included; None for all.
        ranges_3L: position q attends to those from `ranges_3L[0, q]` to before `ranges_3L[1, q]`, which are of its
            prompt, and to those from `ranges_3L[2, q]` to q, which are of its own part.
        kv_num_blocks_11N: of every block of queries, how many blocks it attends to in part.
        kv_indices_11NN: which, first.
        full_kv_num_blocks_11N: how many it attends to wholly.
        full_kv_indices_11NN: which, first.
        q_num_blocks_11N: the same from the side of the keys.
        q_indices_11NN: likewise.
        full_q_num_blocks_11N: likewise.
        full_q_indices_11NN: likewise.
    """

    window: int | None
    ranges_3L: Tensor
    kv_num_blocks_11N: Tensor
    kv_indices_11NN: Tensor
    full_kv_num_blocks_11N: Tensor
    full_kv_indices_11NN: Tensor
    q_num_blocks_11N: Tensor
    q_indices_11NN: Tensor
    full_q_num_blocks_11N: Tensor
    full_q_indices_11NN: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, in their order."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "RowBlocks":
        """The same with every tensor changed."""
        return replace(self, **{name: change(value) for name, value in self.tensors.items()})


def row_blocks(
    position_ids_L: NDArray[Any], pair_L: NDArray[Any], part_L: NDArray[Any], window: int | None
) -> RowBlocks:
    """What attends to what in a row (`packing.visible` is the rule), for one kind of layer.

    Args:
        position_ids_L: of a `PackedRow` whose length is a multiple of `BLOCK`.
        pair_L: likewise.
        part_L: likewise.
        window: tokens that the layer sees, the query's own included; None for all.
    """
    size = len(position_ids_L)
    assert size % BLOCK == 0, f"expected whole blocks of {BLOCK}, found {size} positions"
    index_L = np.arange(size)
    new_pair_L = np.append(True, pair_L[1:] != pair_L[:-1])
    new_run_L = new_pair_L | np.append(True, part_L[1:] != part_L[:-1])
    pair_start_L = np.maximum.accumulate(np.where(new_pair_L, index_L, 0))
    run_start_L = np.maximum.accumulate(np.where(new_run_L, index_L, 0))
    # An answer's first position id is the length of its prompt; a prompt's own is 0.
    prompt_stop_L = pair_start_L + position_ids_L[run_start_L]
    prompt_start_L = pair_start_L
    if window is not None:
        prompt_start_L = np.maximum(prompt_start_L, pair_start_L + position_ids_L - window + 1)
        run_start_L = np.maximum(run_start_L, index_L - window + 1)

    first_N = np.arange(0, size, BLOCK)
    seen_LN = sum(
        np.clip(np.minimum(stop_L[:, None], first_N + BLOCK) - np.maximum(start_L[:, None], first_N), 0, None)
        for start_L, stop_L in ((prompt_start_L, prompt_stop_L), (run_start_L, index_L + 1))
    )
    seen_NBN = np.asarray(seen_LN).reshape(len(first_N), BLOCK, len(first_N))
    full_NN = (seen_NBN == BLOCK).all(1)
    partial_NN = (seen_NBN > 0).any(1) & ~full_NN
    mask = BlockMask.from_kv_blocks(*_listed(partial_NN), *_listed(full_NN), BLOCK_SIZE=BLOCK)
    found = (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
    transposed = [tensor.to(torch.int32) for tensor in found if tensor is not None]
    ranges_3L = torch.from_numpy(np.stack([prompt_start_L, prompt_stop_L, run_start_L]).astype(np.int32))
    return RowBlocks(window, ranges_3L, *_listed(partial_NN), *_listed(full_NN), *transposed)


def _listed(blocks_NN: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """How many blocks a row of blocks has, and which, before the others."""
    order_NN = np.argsort(~blocks_NN, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(blocks_NN.sum(1, dtype=np.int32))[None, None], torch.from_numpy(order_NN)[None, None]
