"""Attention over a packed row, one causal sequence at a time.

In: queries, keys and values of a row, and its sequences (`sequences_of`). Out: the attention that the row's mask would
give. The kernel of scaled-dot-product attention skips the scores above the diagonal if it is told that a sequence is
causal, but not if a mask says so. It has no soft-capping either: where a model caps its scores (Gemma-2), sequences of
similar lengths are computed together, padded, by plain products.

Registered with transformers under the name `packed`; without `sequences` it is transformers' `sdpa`, or plain products.

Shapes: L positions of a row, N sequences, S positions of a sequence, H heads, K heads of keys and values, D size of a
head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED = "packed"
# Soft-capped sequences whose lengths are between the same multiples of so many positions are computed together.
SIMILAR = 64


def packed_attention(
    module: nn.Module,
    query_1HLD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    attention_mask: Tensor | None,
    *,
    sequences: Sequence[Sequence[range]] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
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
        softcap: a score s becomes softcap · tanh(s / softcap); None leaves it.
        kwargs: the interface's other arguments.

    Returns:
        [1, L, H, D].
    """
    if softcap is not None:
        scaling = kwargs["scaling"]
        if sequences is None:
            allowed = _allowed(query_1HLD, key_1KLD, attention_mask)
            return _soft_capped(query_1HLD, key_1KLD, value_1KLD, allowed, scaling, softcap), None
        return _padded(query_1HLD, key_1KLD, value_1KLD, sequences, sliding_window, scaling, softcap), None
    if sequences is None:
        return sdpa_attention_forward(module, query_1HLD, key_1KLD, value_1KLD, attention_mask, **kwargs)
    pieces: dict[range, Tensor] = {}
    for ranges in sequences:
        size = sum(len(positions) for positions in ranges)
        query_1HSD, key_1KSD, value_1KSD = (
            torch.cat([values[:, :, positions.start : positions.stop] for positions in ranges], dim=2)
            for values in (query_1HLD, key_1KLD, value_1KLD)
        )
        windowed = sliding_window is not None and size > sliding_window
        mask = _causal(size, sliding_window, query_1HLD.device)[None, None] if windowed else None
        attended_1SHD, _ = sdpa_attention_forward(module, query_1HSD, key_1KSD, value_1KSD, mask, **kwargs)
        for positions, piece in zip(ranges, attended_1SHD.split([len(r) for r in ranges], dim=1), strict=True):
            pieces.setdefault(positions, piece)
    return torch.cat([pieces[positions] for positions in sorted(pieces, key=lambda r: r.start)], dim=1), None


def _causal(size: int, window: int | None, device: torch.device) -> Tensor:
    """The mask of a causal sequence, perhaps with a sliding window, bool [S, S]."""
    index = torch.arange(size, device=device)
    behind_SS = index[:, None] - index[None, :]
    return (behind_SS >= 0) & (behind_SS < (size if window is None else window))


def _padded(
    query_1HLD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    sequences: Sequence[Sequence[range]],
    window: int | None,
    scaling: float,
    softcap: float,
) -> Tensor:
    """Soft-capped attention of a row's sequences, [1, L, H, D]; what is padded lies behind a sequence, unseen by it."""
    groups: dict[int, list[list[int]]] = {}
    for ranges in sequences:
        positions = [position for run in ranges for position in run]
        groups.setdefault(-(-len(positions) // SIMILAR), []).append(positions)
    device, parts, places = query_1HLD.device, [], dict[int, int]()
    start = 0
    for group in groups.values():
        size = max(map(len, group))
        for number, positions in enumerate(group):
            for slot, position in enumerate(positions):
                places.setdefault(position, start + number * size + slot)
        start += len(group) * size
        index = torch.tensor([[*positions, *[0] * (size - len(positions))] for positions in group], device=device)
        query_NHSD, key_NKSD, value_NKSD = (
            values[0].index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)
            for values in (query_1HLD, key_1KLD, value_1KLD)
        )
        allowed_SS = _causal(size, window, device)
        parts.append(_soft_capped(query_NHSD, key_NKSD, value_NKSD, allowed_SS, scaling, softcap).flatten(0, 1))
    where_L = torch.tensor([places[position] for position in range(query_1HLD.shape[2])], device=device)
    return torch.cat(parts).index_select(0, where_L)[None]


def _soft_capped(
    query_NHSD: Tensor, key_NKSD: Tensor, value_NKSD: Tensor, allowed: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Soft-capped attention by plain products, as Gemma-2's eager one; `allowed` is bool. [N, S, H, D]."""
    shared = query_NHSD.shape[1] // key_NKSD.shape[1]
    key_NHSD, value_NHSD = (values.repeat_interleave(shared, dim=1) for values in (key_NKSD, value_NKSD))
    scores_NHSS = torch.tanh(query_NHSD @ key_NHSD.mT * (scaling / softcap)) * softcap
    scores_NHSS = scores_NHSS.masked_fill(~allowed, torch.finfo(scores_NHSS.dtype).min)
    weights_NHSS = scores_NHSS.softmax(-1, dtype=torch.float32).to(query_NHSD.dtype)
    return (weights_NHSS @ value_NHSD).transpose(1, 2)


def _allowed(query_1HLD: Tensor, key_1KLD: Tensor, mask: Tensor | None) -> Tensor:
    """Where a query may look, bool: the mask that sdpa takes, where None is causal. The last query sees all keys."""
    if mask is not None:
        return mask
    queries, keys = query_1HLD.shape[2], key_1KLD.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query_1HLD.device).tril(keys - queries)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
