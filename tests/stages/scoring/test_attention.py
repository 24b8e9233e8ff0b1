"""A row taken apart into causal sequences says the same of what sees what as the one rule behind every mask."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fpo.stages.data.tokenize import Conversation
from fpo.stages.model import attention
from fpo.stages.model.attention import grouped, packed_attention
from fpo.stages.scoring.masks import sequences_of, visible
from fpo.stages.scoring.packing import PADDING, PackedRow, RowLayout, pack, pack_conversations
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples, pair_lists
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward


def positions(sequences: list[list[range]]) -> list[list[int]]:
    return [[position for part in parts for position in part] for parts in sequences]


@st.composite
def rows(draw) -> PackedRow:
    """A row of pairs or of conversations, padded or not."""
    layout, budget = RowLayout(draw(st.sampled_from([1, 16]))), draw(st.integers(1, 160))
    if draw(st.booleans()):
        return draw(st.sampled_from(list(pack(draw(pair_lists()), budget, layout))))
    sizes = draw(st.lists(st.integers(2, 20), min_size=1, max_size=4))
    chats = [Conversation(np.ones(size, np.int32), np.arange(size) > 0) for size in sizes]
    return draw(st.sampled_from(list(pack_conversations(chats, budget, layout))))


@many_examples
@given(row=rows())
def test_what_one_sequence_holds_in_turn_is_what_sees_each_other(row):
    size = row.input_ids_L.numel()
    seen_LL = torch.zeros(size, size, dtype=torch.bool)
    for sequence in positions(sequences_of(row)):
        assert row.position_ids_L[sequence].tolist() == list(range(len(sequence))) or row.pair_L[sequence[0]] == PADDING
        for number, position in enumerate(sequence):
            seen_LL[position, sequence[: number + 1]] = True
    index = torch.arange(size)
    assert torch.equal(seen_LL, visible(row, index[:, None], index[None, :], None))


@many_examples
@given(row=rows(), window=st.none() | st.integers(1, 30), heads=st.sampled_from([(4, 4), (4, 2)]))
@pytest.mark.parametrize("similar", [1, 8, 64])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_every_position_attends_as_under_the_mask(row, window, heads, scaling, similar):
    """With sequences computed one by one, all at once, and in between."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, row.input_ids_L.numel(), 8, generator=generator, dtype=torch.float64)
        for count in (heads[0], heads[1], heads[1])
    )
    module = nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    with mock.patch.object(attention, "SIMILAR", similar):
        sequences = grouped(sequences_of(row))
    options = {"sequences": sequences, "sliding_window": window, "scaling": scaling}
    found, _ = packed_attention(module, query, key, value, None, **options)
    index = torch.arange(row.input_ids_L.numel())
    mask_LL = visible(row, index[:, None], index[None, :], window)
    expected = scaled_dot_product_attention(query, key, value, mask_LL, scale=scaling, enable_gqa=True).transpose(1, 2)
    real = row.pair_L != PADDING
    torch.testing.assert_close(found[:, real], expected[:, real])


@many_examples
@given(row=rows(), window=st.none() | st.integers(1, 30), heads=st.sampled_from([(4, 4), (4, 2)]))
def test_scores_are_soft_capped_as_gemma_2_s_own_attention_caps_them(row, window, heads):
    """Values and gradients, with sequences computed one by one, all at once, and in between."""
    generator = torch.Generator().manual_seed(0)
    size = row.input_ids_L.numel()
    inputs = [3 * torch.randn(1, count, size, 8, generator=generator) for count in (heads[0], heads[1], heads[1])]
    module = nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]  # type: ignore[assignment]
    index = torch.arange(size)
    allowed_LL = visible(row, index[:, None], index[None, :], window)
    mask = torch.zeros(1, 1, size, size).masked_fill(~allowed_LL, torch.finfo(torch.float32).min)
    real = row.pair_L != PADDING

    def gradients(function: Callable[..., Any], *more: Any, **options: Any) -> list[torch.Tensor]:
        leaves = [values.clone().requires_grad_() for values in inputs]
        attended = function(module, *leaves, *more, scaling=0.3, softcap=2.0, **options)[0][:, real]
        return [attended, *torch.autograd.grad(attended.sin().sum(), leaves)]

    expected = gradients(eager_attention_forward, mask)
    for similar in (1, 8, 64):
        with mock.patch.object(attention, "SIMILAR", similar):
            found = gradients(packed_attention, None, sequences=grouped(sequences_of(row)), sliding_window=window)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize("queries", [1, 3, 7])
def test_a_soft_capped_sequence_that_is_not_packed_sees_what_transformers_says(queries, mask):
    """As in generation: one query against its cache, or all."""
    query, key, value = (torch.randn(2, 2, size, 4) for size in (queries, 7, 7))
    module = nn.Module()
    module.num_key_value_groups = 1  # type: ignore[assignment]
    allowed = (torch.arange(7)[None, :] <= torch.arange(7 - queries, 7)[:, None])[None, None].expand(2, 1, -1, -1)
    blocked = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected, _ = eager_attention_forward(module, query, key, value, blocked, scaling=0.5, softcap=2.0)
    given_mask = None if mask == "none" else allowed
    found, _ = packed_attention(module, query, key, value, given_mask, scaling=0.5, softcap=2.0)
    torch.testing.assert_close(found, expected)
