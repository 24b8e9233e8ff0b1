"""Attention over a packed row, one causal sequence at a time.

In: queries, keys and values of a row, and its sequences (`grouped`). Out: the attention that the row's mask would give.
The kernel of scaled-dot-product attention skips the scores above the diagonal if it is told that a sequence is causal,
but not if a mask says so. It has no soft-capping either: where a model caps its scores (Gemma-2), they are plain
products. Sequences of similar lengths are computed together: short ones would cost more calls than arithmetic.

Registered with transformers under the name `packed`; without `sequences` it is transformers' `sdpa`, or plain products.

Shapes: L positions of a row, N sequences of a group, S positions of its longest, H heads, K heads of keys and values, D
size of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED = "packed"
# Sequences whose lengths are between the same multiples of so many positions are computed together.
SIMILAR = 64


class Grouped(NamedTuple):
    """A row's causal sequences, those of similar lengths together.

    Attributes:
        groups_NS: for each group the row positions of its sequences, int64. What fills up a sequence stands behind it,
            unseen by it.
        where_L: int64, where each position of the row is among those of the groups, end to end. A prompt is in two
            sequences and taken from the first.
    """

    groups_NS: tuple[Tensor, ...]
    where_L: Tensor


def grouped(sequences: Sequence[Sequence[range]], device: torch.device | str = "cpu") -> Grouped:
    """Groups the sequences of a row (`sequences_of`), which hold each of its positions at least once."""
    by_length: dict[int, list[np.ndarray]] = {}
    for ranges in sequences:
        positions_S = np.concatenate([np.arange(run.start, run.stop) for run in ranges])
        by_length.setdefault(-(-positions_S.size // SIMILAR), []).append(positions_S)
    groups, slots, start = [], [], 0
    for group in by_length.values():
        group_NS = np.zeros((len(group), max(positions_S.size for positions_S in group)), np.int64)
        for number, positions_S in enumerate(group):
            group_NS[number, : positions_S.size] = positions_S
            slots.append(np.arange(positions_S.size) + start + number * group_NS.shape[1])
        start += group_NS.size
        groups.append(torch.from_numpy(group_NS).to(device))
    # The first of a position's slots.
    _, first_L = np.unique(np.concatenate([part for group in by_length.values() for part in group]), return_index=True)
    return Grouped(tuple(groups), torch.from_numpy(np.concatenate(slots)[first_L]).to(device))


def packed_attention(
    module: nn.Module,
    query_1HLD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    attention_mask: Tensor | None,
    *,
    sequences: Grouped | None = None,
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
        sequences: the row's, from `grouped`.
        sliding_window: tokens that the layer sees, the query's own included; None for all.
        softcap: a score s becomes softcap · tanh(s / softcap); None leaves it.
        kwargs: the interface's other arguments.

    Returns:
        [1, L, H, D].
    """
    if sequences is None:
        if softcap is None:
            return sdpa_attention_forward(module, query_1HLD, key_1KLD, value_1KLD, attention_mask, **kwargs)
        allowed = _allowed(query_1HLD, key_1KLD, attention_mask)
        return _soft_capped(query_1HLD, key_1KLD, value_1KLD, allowed, kwargs["scaling"], softcap), None
    parts = []
    for group_NS in sequences.groups_NS:
        size = group_NS.shape[1]
        query_NHSD, key_NKSD, value_NKSD = (
            values[0].index_select(1, group_NS.flatten()).unflatten(1, group_NS.shape).transpose(0, 1)
            for values in (query_1HLD, key_1KLD, value_1KLD)
        )
        windowed = sliding_window is not None and size > sliding_window
        if softcap is None:
            mask = _causal(size, sliding_window, query_NHSD.device)[None, None] if windowed else None
            attended_NSHD, _ = sdpa_attention_forward(module, query_NHSD, key_NKSD, value_NKSD, mask, **kwargs)
        else:
            allowed = _causal(size, sliding_window, query_NHSD.device)
            attended_NSHD = _soft_capped(query_NHSD, key_NKSD, value_NKSD, allowed, kwargs["scaling"], softcap)
        parts.append(attended_NSHD.flatten(0, 1))
    return torch.cat(parts).index_select(0, sequences.where_L)[None], None


def _causal(size: int, window: int | None, device: torch.device) -> Tensor:
    """The mask of a causal sequence, perhaps with a sliding window, bool [S, S]."""
    index = torch.arange(size, device=device)
    behind_SS = index[:, None] - index[None, :]
    return (behind_SS >= 0) & (behind_SS < (size if window is None else window))


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
