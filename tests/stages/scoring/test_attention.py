"""A row taken apart into causal sequences says the same of what sees what as the one rule behind every mask."""

import numpy as np
import pytest
import torch
from fpo.stages.data.tokenize import Conversation
from fpo.stages.model.attention import packed_attention
from fpo.stages.scoring.masks import sequences_of, visible
from fpo.stages.scoring.packing import PADDING, PackedRow, RowLayout, pack, pack_conversations
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples, pair_lists
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


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
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_every_position_attends_as_under_the_mask(row, window, heads, scaling):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, row.input_ids_L.numel(), 8, generator=generator, dtype=torch.float64)
        for count in (heads[0], heads[1], heads[1])
    )
    module = nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    found, _ = packed_attention(
        module, query, key, value, None, sequences=sequences_of(row), sliding_window=window, scaling=scaling
    )
    index = torch.arange(row.input_ids_L.numel())
    mask_LL = visible(row, index[:, None], index[None, :], window)
    expected = scaled_dot_product_attention(query, key, value, mask_LL, scale=scaling, enable_gqa=True).transpose(1, 2)
    real = row.pair_L != PADDING
    torch.testing.assert_close(found[:, real], expected[:, real])
