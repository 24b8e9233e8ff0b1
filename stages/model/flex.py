"""Attention over packed rows by one compiled kernel, for GPUs.

In: queries, keys and values of a row, and its `RowBlocks`: which ranges of positions each position attends to, and
which blocks of keys each block of queries needs. Out: the attention that `masks.visible` allows, without storing the
scores.

torch compiles `flex_attention` again for every new value of an argument that is not a tensor. So ranges, scale and
soft-cap are tensors and lengths are dynamic; one compilation remains for each combination of gradient, soft-cap and
dtype. Nothing falls back to a kernel that stores all scores.

Registered with transformers under the name `packed_flex`; without `RowBlocks` it is eager attention.

Shapes: B sequences, L positions of a row, N blocks of a row (L = N · BLOCK), H heads, K heads of keys and values, D
size of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ...cache.errors import UserError

FLEX = "packed_flex"

# The compiler; tests choose one that needs no GPU.
BACKEND = "inductor"
# Positions of a block: the size that flex attention's kernels are tuned for.
BLOCK = 128
# A compiler takes a size of 1 for a constant, so that it would compile a row of one block separately.
LEAST_BLOCKS = 2
# Rows are whole blocks, which a compiler does not see in a dynamic length: told so, kernels check no bounds.
OPTIONS: dict[str, Any] = {"IS_DIVISIBLE": True}
# Tiles of the backward for heads of more than 128: on an H200 1.5 times as fast as torch's choice.
LARGE_HEADS = OPTIONS | {
    **{f"bwd_BLOCK_{side}": 32 for side in ("M1", "N1", "M2", "N2")},
    "bwd_num_stages": 2,
    "bwd_num_warps": 4,
}


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """What attends to what in one kind of layer, without an L × L mask. Tensors are int32, made on the CPU.

    Attributes:
        window: tokens that the layer sees, the query's own included; None for all.
        ranges_3L: position q attends to positions `ranges_3L[0, q]` to `ranges_3L[1, q] - 1` of its prompt, and to
            `ranges_3L[2, q]` to q of its own part.
        listed: four pairs of tensors, in the order of `BlockMask`: how many blocks [1, 1, N], and their numbers first
            [1, 1, N, N]. They list, for each block of queries, the blocks of keys that it attends to in part, and those
            in full; for each block of keys, the blocks of queries that attend to it in part, and those in full.
    """

    window: int | None
    ranges_3L: Tensor
    listed: tuple[Tensor, ...]

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "RowBlocks":
        """A copy with `change` applied to every tensor."""
        return RowBlocks(self.window, change(self.ranges_3L), tuple(map(change, self.listed)))


def row_blocks(
    position_ids_L: NDArray[Any], pair_L: NDArray[Any], part_L: NDArray[Any], window: int | None
) -> RowBlocks:
    """The `RowBlocks` of a row by the rule of `masks.visible`, for one kind of layer.

    Args:
        position_ids_L: as in `PackedRow`; L is a multiple of `BLOCK`.
        pair_L: as in `PackedRow`.
        part_L: as in `PackedRow`.
        window: tokens that the layer sees, the query's own included; None for all.
    """
    size = len(position_ids_L)
    assert size % BLOCK == 0, f"expected whole blocks of {BLOCK}, found {size} positions"
    index_L = np.arange(size)
    new_pair_L = np.append(True, pair_L[1:] != pair_L[:-1])
    new_run_L = new_pair_L | np.append(True, part_L[1:] != part_L[:-1])
    pair_start_L = np.maximum.accumulate(np.where(new_pair_L, index_L, 0))
    run_start_L = np.maximum.accumulate(np.where(new_run_L, index_L, 0))
    # A response's first position id is the length of its prompt; a prompt's is 0.
    prompt_stop_L = pair_start_L + position_ids_L[run_start_L]
    prompt_start_L = pair_start_L
    if window is not None:
        prompt_start_L = np.maximum(prompt_start_L, pair_start_L + position_ids_L - window + 1)
        run_start_L = np.maximum(run_start_L, index_L - window + 1)

    partial_NN, full_NN = _blocks_seen(prompt_start_L, prompt_stop_L, run_start_L, index_L)
    listed = (*_listed(partial_NN), *_listed(full_NN), *_listed(partial_NN.T), *_listed(full_NN.T))
    ranges_3L = torch.from_numpy(np.stack([prompt_start_L, prompt_stop_L, run_start_L]).astype(np.int32))
    return RowBlocks(window, ranges_3L, listed)


def _blocks_seen(
    prompt_start_L: NDArray[Any], prompt_stop_L: NDArray[Any], own_start_L: NDArray[Any], index_L: NDArray[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which blocks of keys a block of queries attends to in part, and which in full; bool [N, N] each."""
    # A part that follows its prompt joins it in one range, which may fill a block that neither fills alone.
    joined_L = prompt_stop_L == own_start_L
    starts_2L = np.stack([prompt_start_L, np.where(joined_L, np.minimum(prompt_start_L, own_start_L), own_start_L)])
    stops_2L = np.stack([np.where(joined_L, prompt_start_L, prompt_stop_L), index_L + 1])
    touched = _counted(starts_2L // BLOCK, -(-stops_2L // BLOCK), stops_2L > starts_2L)
    filled = _counted(-(-starts_2L // BLOCK), stops_2L // BLOCK, stops_2L > starts_2L)
    full_NN = filled == BLOCK
    return (touched > 0) & ~full_NN, full_NN


def _counted(first_2L: NDArray[Any], stop_2L: NDArray[Any], valid_2L: NDArray[Any]) -> NDArray[Any]:
    """For each block of queries, how many of its ranges of blocks [first, stop) contain each block; [N, N]."""
    size = first_2L.shape[1] // BLOCK
    row_2L = np.broadcast_to(np.arange(first_2L.shape[1]) // BLOCK * (size + 1), first_2L.shape)
    valid_2L = valid_2L & (stop_2L > first_2L)
    begins, ends = (
        np.bincount((row_2L + bound_2L)[valid_2L], minlength=size * (size + 1)) for bound_2L in (first_2L, stop_2L)
    )
    return np.asarray((begins - ends).reshape(size, size + 1).cumsum(1)[:, :size])


def _listed(blocks_NN: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """How many blocks each row of `blocks_NN` marks, and all block numbers with the marked ones first."""
    order_NN = np.argsort(~blocks_NN, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(blocks_NN.sum(1, dtype=np.int32))[None, None], torch.from_numpy(order_NN)[None, None]


class RowMask(BlockMask):
    """`RowBlocks` as the mask that a transformers model passes on to its layers."""

    def __init__(self, blocks: RowBlocks) -> None:
        size = blocks.ranges_3L.shape[1]
        super().__init__((size, size), *blocks.listed, (BLOCK, BLOCK), noop_mask)  # type: ignore[call-arg,arg-type]
        self.tensors = (blocks.ranges_3L, *blocks.listed)
        for tensor in self.tensors:
            for dimension in range(1 if tensor is blocks.ranges_3L else 2, tensor.ndim):
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _attend(
    query_1HLD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    scale: Tensor | float,
    cap: Tensor | float | None,
    ranges_3L: Tensor,
    *listed: Tensor,
) -> Tensor:
    """Attention, [1, H, L, D]; the last arguments are the tensors of `RowBlocks`."""
    if not torch.compiler.is_compiling():
        raise RuntimeError("attention: expected compiled code, found compilation switched off (torch._dynamo)")

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (key >= ranges_3L[0, query]) & (key < ranges_3L[1, query])
        return in_prompt | ((key >= ranges_3L[2, query]) & (key <= query))

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        scaled = score * scale
        return scaled if cap is None else soft_capped(scaled, cap)

    lengths = query_1HLD.shape[2], key_1KLD.shape[2]
    large = query_1HLD.shape[3] > 128 and query_1HLD.dtype != torch.float32
    mask = BlockMask(lengths, *listed, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)  # type: ignore[misc,arg-type]
    attended: Tensor = flex_attention(  # type: ignore[call-overload]
        query_1HLD,
        key_1KLD,
        value_1KLD,
        score_mod=score_mod,
        block_mask=mask,
        scale=1.0,
        enable_gqa=True,
        kernel_options=LARGE_HEADS if large else OPTIONS,
    )
    return attended


def soft_capped(score: Tensor, cap: Tensor | float) -> Tensor:
    """`cap·tanh(score/cap)`, by a function that GPUs compute faster than tanh."""
    return cap * (2 * torch.sigmoid(2 * score / cap) - 1)


@cache
def _compiled(backend: str) -> Any:
    # fullgraph: torch raises an error instead of running uncompiled code, even at its limit of recompilations.
    return torch.compile(_attend, backend=backend, fullgraph=True)


@cache
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def packed_flex_attention(
    module: nn.Module,
    query_1HLD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, by the interface of transformers.

    Args:
        module: the layer's attention.
        query_1HLD: the row's queries.
        key_1KLD: the row's keys.
        value_1KLD: the row's values.
        attention_mask: a `RowMask`; or an additive mask, for sequences that are not packed.
        scaling: factor of the scores; D^-1/2 by default.
        softcap: soft-capping of the scores, `c·tanh(score/c)`; None for none.
        dropout: must be 0.
        s_aux: attention sinks; must be None.
        position_bias: must be None.
        kwargs: the interface's other arguments, ignored. The layer's window is among them: the mask has it already,
            and reading it would compile the layer once more.

    Returns:
        [1, L, H, D].

    Raises:
        UserError: the layer needs dropout, sinks or biases.
    """
    if dropout or s_aux is not None or position_bias is not None:
        raise UserError(
            f"--attention: {FLEX} computes no dropout, attention sinks or position biases, which this model "
            "has; choose eager"
        )
    scaling = query_1HLD.shape[-1] ** -0.5 if scaling is None else scaling
    device = query_1HLD.device
    # Under autocast, queries and keys are fp32 after the rotary embedding, values bf16; the kernel takes one dtype.
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query_1HLD.dtype
    rows = query_1HLD.to(dtype), key_1KLD.to(dtype), value_1KLD.to(dtype)
    if not isinstance(attention_mask, RowMask):
        return _eager(*rows, attention_mask, scaling, softcap), None
    with torch.autocast(device.type, enabled=False):
        if torch.compiler.is_compiling():  # with the layer that it belongs to
            attended_1HLD = _attend(*rows, scaling, softcap, *attention_mask.tensors)
        else:
            for tensor in rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
            cap = None if softcap is None else _scalar(softcap, device)
            attended_1HLD = _compiled(BACKEND)(*rows, _scalar(scaling, device), cap, *attention_mask.tensors)
    return attended_1HLD.transpose(1, 2).contiguous(), None


def _eager(
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    groups = query_BHLD.shape[1] // key_BKLD.shape[1]
    key_BHLD, value_BHLD = (tensor.repeat_interleave(groups, 1) for tensor in (key_BKLD, value_BKLD))
    scores_BHLL = query_BHLD @ key_BHLD.transpose(2, 3) * scaling
    if softcap is not None:
        scores_BHLL = torch.tanh(scores_BHLL / softcap) * softcap
    if mask is not None:
        scores_BHLL = scores_BHLL + mask
    weights_BHLL = torch.softmax(scores_BHLL, dim=-1, dtype=torch.float32).to(query_BHLD.dtype)
    return (weights_BHLL @ value_BHLD).transpose(1, 2).contiguous()


AttentionInterface.register(FLEX, packed_flex_attention)
AttentionMaskInterface.register(FLEX, eager_mask)
