"""The ranges and blocks of a row say the same as the one rule behind every mask, `visible`."""

import numpy as np
import pytest
import torch
from fpo.stages.data.tokenize import Conversation
from fpo.stages.model.flex import BLOCK
from fpo.stages.scoring.masks import visible
from fpo.stages.scoring.packing import PADDING, PackedRow, RowLayout, pack, pack_conversations
from hypothesis import given
from hypothesis import strategies as st
from pairs import few_examples, random_pair
from torch import Tensor

WINDOWS = (None, 1, 8, 300)
LAYOUT = RowLayout(BLOCK, WINDOWS)


@st.composite
def rows(draw) -> PackedRow:
    """A row of pairs or of conversations, some longer than a block."""
    sizes = st.integers(1, 200)
    count = draw(st.integers(1, 4))
    if draw(st.booleans()):
        pairs = [random_pair(draw(sizes), draw(sizes), draw(sizes)) for _ in range(count)]
        return draw(st.sampled_from(list(pack(pairs, draw(st.integers(1, 1000)), LAYOUT))))
    chats = [
        Conversation(np.ones(size + 1, np.int32), np.arange(size + 1) > 0)
        for size in draw(st.lists(sizes, min_size=1, max_size=4))
    ]
    return draw(st.sampled_from(list(pack_conversations(chats, 1000, LAYOUT))))


def listed(counts_11N: Tensor, indices_11NN: Tensor) -> Tensor:
    """Which blocks are named, bool [N, N]."""
    blocks = torch.zeros(indices_11NN.shape[2:], dtype=torch.bool)
    for number, (count, indices) in enumerate(zip(counts_11N[0, 0].tolist(), indices_11NN[0, 0].tolist(), strict=True)):
        blocks[number, indices[:count]] = True
    return blocks


@few_examples
@given(row=rows())
@pytest.mark.parametrize("number", range(len(WINDOWS)))
def test_ranges_and_blocks_are_those_of_the_rule(row, number):
    blocks = row.blocks[number]
    assert blocks.window == WINDOWS[number]
    index = torch.arange(row.input_ids_L.numel())
    assert index.numel() % BLOCK == 0 and index.numel() >= 2 * BLOCK
    start, stop, own = (part[:, None] for part in blocks.ranges_3L)
    found_LL = ((index >= start) & (index < stop)) | ((index >= own) & (index <= index[:, None]))
    expected_LL = visible(row, index[:, None], index[None, :], blocks.window)
    real = row.pair_L != PADDING
    assert torch.equal(found_LL[real], expected_LL[real])
    assert found_LL.diagonal().all() and not found_LL[real][:, ~real].any() and not found_LL[~real][:, real].any()

    by_block = found_LL.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    some, full = by_block.any(3).any(1), by_block.all(3).all(1)
    expected = (some & ~full, full, (some & ~full).T, full.T)
    for blocks_NN, counts_11N, indices_11NN in zip(expected, blocks.listed[::2], blocks.listed[1::2], strict=True):
        assert torch.equal(listed(counts_11N, indices_11NN), blocks_NN)
    assert {tensor.dtype for tensor in (blocks.ranges_3L, *blocks.listed)} == {torch.int32}


def test_a_row_moves_with_its_blocks():
    (row,) = pack([random_pair(3, 4, 5)], 100, RowLayout(BLOCK, (None, 8)))
    moved = row.to("meta")
    assert {tensor.device.type for blocks in moved.blocks for tensor in (blocks.ranges_3L, *blocks.listed)} == {"meta"}
    assert [blocks.window for blocks in moved.blocks] == [None, 8]
