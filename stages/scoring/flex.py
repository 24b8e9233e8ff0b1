"""Attention over packed rows by one compiled kernel, for GPUs.

In: queries, keys and values of a row, and its `RowBlocks`. Out: what every position attends to, as under the masks of
`packing.visible`, without the scores ever being stored.

torch compiles `flex_attention` anew for whatever its arguments hold but tensors. Here they hold nothing else: window,
scale and soft-cap are tensors, and the lengths are unknown to the compiler. What is left is with and without gradient,
with and without soft-cap, and the dtype. There is no falling back to a kernel that stores all scores.

Registered with transformers under the name `packed_flex`; without `RowBlocks` it is eager attention.

Shapes: L positions of a row, N blocks of it, H heads, K heads of keys and values, D size of a head.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from .blocks import BLOCK, RowBlocks

FLEX = "packed_flex"

# Who compiles; tests take one that needs no GPU.
BACKEND = "inductor"


class RowMask(BlockMask):
    """`RowBlocks` in the form in which models hand on a mask."""

    def __init__(self, blocks: RowBlocks) -> None:
        ranges_3L, *listed = blocks.tensors.values()
        size = ranges_3L.shape[1]
        super().__init__((size, size), *listed, BLOCK_SIZE=(BLOCK, BLOCK))  # type: ignore[misc,arg-type]
        self.tensors = (ranges_3L, *listed)
        for tensor in self.tensors:
            for dimension in range(1 if tensor is ranges_3L else 2, tensor.ndim):
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
    """Attention, [1, H, L, D]; `listed` are the tensors of `RowBlocks` after the ranges."""
    if not torch.compiler.is_compiling():
        raise RuntimeError("attention: expected to be compiled, found that compiling is switched off (torch._dynamo)")

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (key >= ranges_3L[0, query]) & (key < ranges_3L[1, query])
        return in_prompt | ((key >= ranges_3L[2, query]) & (key <= query))

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        scaled = score * scale
        return scaled if cap is None else cap * torch.tanh(scaled / cap)

    lengths = query_1HLD.shape[2], key_1KLD.shape[2]
    mask = BlockMask(lengths, *listed, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)  # type: ignore[misc,arg-type]
    attended: Tensor = flex_attention(
        query_1HLD, key_1KLD, value_1KLD, score_mod=score_mod, block_mask=mask, scale=1.0, enable_gqa=True
    )
    return attended


@cache
def _compiled(backend: str) -> Any:
    # A graph that is whole, or an error: also once torch has compiled it as often as it allows.
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
        query_1HLD: of a row.
        key_1KLD: likewise.
        value_1KLD: likewise.
        attention_mask: a `RowMask`; or what eager attention takes, for sequences that are not packed.
        scaling: of the scores; the heads' size to the power of -1/2 by default.
        softcap: of the scores, `c·tanh(score/c)`; None for none.
        dropout: of the weights; 0.
        s_aux: None.
        position_bias: None.
        kwargs: the interface's other arguments. They are not looked at: among them is the layer's window, which the
            mask holds, and for which a layer would be compiled once more.

    Returns:
        [1, L, H, D].

    Raises:
        ValueError: if the layer needs what is not computed here.
    """
    if dropout or s_aux is not None or position_bias is not None:
        raise ValueError(f"--attention: {FLEX} has no dropout, attention sinks or biases of positions; take eager")
    scaling = query_1HLD.shape[-1] ** -0.5 if scaling is None else scaling
    device = query_1HLD.device
    # Rotary positions are fp32 under autocast, the values are not: a kernel takes one dtype.
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
