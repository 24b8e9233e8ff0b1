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
        changed: dict[str, Any] = {name: change(value) for name, value in self.tensors.items()}
        return replace(self, **changed)


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

    partial_NN, full_NN = _blocks_seen(prompt_start_L, prompt_stop_L, run_start_L, index_L)
    listed = [*_listed(partial_NN), *_listed(full_NN), *_listed(partial_NN.T), *_listed(full_NN.T)]
    ranges_3L = torch.from_numpy(np.stack([prompt_start_L, prompt_stop_L, run_start_L]).astype(np.int32))
    return RowBlocks(window, ranges_3L, *listed)


def _blocks_seen(
    prompt_start_L: NDArray[Any], prompt_stop_L: NDArray[Any], own_start_L: NDArray[Any], index_L: NDArray[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which blocks hold something for some query of a block, but not all for all; and which hold all for all."""
    # Where a part follows its prompt, both are one range, which may fill a block that neither does.
    joined_L = prompt_stop_L == own_start_L
    starts_2L = np.stack([prompt_start_L, np.where(joined_L, np.minimum(prompt_start_L, own_start_L), own_start_L)])
    stops_2L = np.stack([np.where(joined_L, prompt_start_L, prompt_stop_L), index_L + 1])
    touched = _counted(starts_2L // BLOCK, -(-stops_2L // BLOCK), stops_2L > starts_2L)
    filled = _counted(-(-starts_2L // BLOCK), stops_2L // BLOCK, stops_2L > starts_2L)
    full_NN = filled == BLOCK
    return (touched > 0) & ~full_NN, full_NN


def _counted(first_2L: NDArray[Any], stop_2L: NDArray[Any], valid_2L: NDArray[Any]) -> NDArray[Any]:
    """For every block of queries, how many of its ranges, from `first` to before `stop`, hold a block; [N, N]."""
    size = first_2L.shape[1] // BLOCK
    row_2L = np.broadcast_to(np.arange(first_2L.shape[1]) // BLOCK * (size + 1), first_2L.shape)
    valid_2L = valid_2L & (stop_2L > first_2L)
    begins, ends = (
        np.bincount((row_2L + bound_2L)[valid_2L], minlength=size * (size + 1)) for bound_2L in (first_2L, stop_2L)
    )
    return np.asarray((begins - ends).reshape(size, size + 1).cumsum(1)[:, :size])


def _listed(blocks_NN: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """How many blocks a row of blocks has, and which, before the others."""
    order_NN = np.argsort(~blocks_NN, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(blocks_NN.sum(1, dtype=np.int32))[None, None], torch.from_numpy(order_NN)[None, None]
