import numpy as np
import pytest
import torch
from fpo.cache.schema import Pair
from fpo.stages.scoring.masks import attention_mask, visible
from fpo.stages.scoring.packing import PADDING, PackedRow, RowLayout, pack, plan_rows
from hypothesis import given
from hypothesis import strategies as st
from pairs import (
    few_examples,
    learnt_tokens,
    many_examples,
    pair_lists,
    random_pair,
    random_pairs,
    with_context,
)

budgets = st.integers(1, 160)
windows = st.one_of(st.none(), st.integers(1, 30))


@many_examples
@given(lengths=st.lists(st.integers(1, 50), max_size=20), budget=st.integers(1, 80))
def test_rows_hold_every_sequence_once_within_the_budget(lengths, budget):
    rows = plan_rows(lengths, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert row == sorted(row)
        assert len(row) == 1 or sum(lengths[i] for i in row) <= budget


@many_examples
@given(lengths=st.lists(st.integers(1, 50), max_size=20), budget=st.integers(1, 80))
def test_no_two_rows_would_fit_in_one(lengths, budget):
    totals = sorted(sum(lengths[i] for i in row) for row in plan_rows(lengths, budget))
    assert len(totals) < 2 or totals[0] + totals[1] > budget


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"expected at least 1, found 0; see --token-budget"):
        plan_rows([3], 0)
    assert list(pack([], 10)) == []


def sequences(row: PackedRow, pairs: list[Pair]) -> list[tuple[int, np.ndarray]]:
    """Length of the prompt, and prompt and response, of each response of a row in order."""
    return [
        (pairs[index].prompt_ids.size, np.concatenate([pairs[index].prompt_ids, response]))
        for index in row.pairs
        for response in (pairs[index].chosen_ids, pairs[index].rejected_ids)
    ]


@few_examples
@given(pairs=pair_lists(), budget=budgets, pad_to=st.integers(1, 32))
def test_every_response_token_is_predicted_from_the_token_before_it(pairs, budget, pad_to):
    rows = list(pack(pairs, budget, RowLayout(pad_to)))
    assert sorted(index for row in rows for index in row.pairs) == list(range(len(pairs)))
    for row in rows:
        parts = zip(row.sources_T.split(list(row.lengths)), row.targets_T.split(list(row.lengths)), strict=True)
        for (prompt, sequence), (sources, targets) in zip(sequences(row, pairs), parts, strict=True):
            assert targets.tolist() == sequence[prompt:].tolist()
            assert row.input_ids_L[sources].tolist() == sequence[prompt - 1 : -1].tolist()
            assert row.position_ids_L[sources].tolist() == list(range(prompt - 1, len(sequence) - 1))


@few_examples
@given(pairs=pair_lists(), budget=budgets, seed=st.integers(0, 99))
def test_of_a_response_of_several_turns_learnt_tokens_alone_are_predicted(pairs, budget, seed):
    several = [with_context(pair, seed) for pair in pairs]
    for row, whole in zip(pack(several, budget), pack(pairs, budget), strict=True):
        kept = [learnt for index in row.pairs for learnt in learnt_tokens(several[index])]
        assert list(row.lengths) == [len(learnt) for learnt in kept]
        for name in ("sources_T", "targets_T"):
            parts = getattr(whole, name).split(list(whole.lengths))
            expected = [part[learnt] for part, learnt in zip(parts, kept, strict=True)]
            assert torch.equal(getattr(row, name), torch.cat(expected))
        for name in ("input_ids_L", "position_ids_L", "pair_L", "part_L"):
            assert torch.equal(getattr(row, name), getattr(whole, name))


@few_examples
@given(pairs=pair_lists(), budget=budgets, pad_to=st.integers(1, 32), window=windows)
def test_a_position_sees_its_own_sequence_and_nothing_else(pairs, budget, pad_to, window):
    for row in pack(pairs, budget, RowLayout(pad_to)):
        index = torch.arange(row.input_ids_L.numel())
        visible_LL = visible(row, index[:, None], index[None, :], window)
        sources = iter(row.sources_T.split(list(row.lengths)))
        for prompt, sequence in sequences(row, pairs):
            for position, source in enumerate(next(sources).tolist(), start=prompt - 1):
                seen = visible_LL[source].nonzero().squeeze(1)
                first = 0 if window is None else max(0, position - window + 1)
                assert row.position_ids_L[seen].tolist() == list(range(first, position + 1))
                assert row.input_ids_L[seen].tolist() == sequence[first : position + 1].tolist()


@few_examples
@given(pairs=pair_lists(), budget=budgets, pad_to=st.integers(1, 32))
def test_padding_fills_the_row_to_a_multiple_and_is_seen_by_no_token(pairs, budget, pad_to):
    for row in pack(pairs, budget, RowLayout(pad_to)):
        size = row.input_ids_L.numel()
        tokens = sum(
            pair.prompt_ids.size + pair.chosen_ids.size + pair.rejected_ids.size
            for pair in (pairs[index] for index in row.pairs)
        )
        padding_L = row.pair_L == PADDING
        assert size % pad_to == 0
        assert int(padding_L.sum()) == size - tokens < pad_to
        index = torch.arange(size)
        visible_LL = visible(row, index[:, None], index[None, :], None)
        assert not visible_LL[~padding_L][:, padding_L].any()
        assert visible_LL.any(1).all(), "a softmax over nothing is not a number"


@pytest.mark.parametrize("window", [None, 8])
def test_the_mask_of_eager_attention_lets_through_what_is_visible(window):
    row = next(pack(random_pairs(0, 4), 300, RowLayout(128)))
    index = torch.arange(row.input_ids_L.numel())
    visible_LL = visible(row, index[:, None], index[None, :], window)
    eager_LL = attention_mask(row, window)[0, 0]
    assert eager_LL.dtype == torch.float32
    assert torch.equal(torch.softmax(eager_LL, -1) > 0, visible_LL)


def test_packing_is_a_function_of_the_pairs_alone():
    rows = [pack(random_pairs(3, 12), 100, RowLayout(16)) for _ in range(2)]
    for first, second in zip(*rows, strict=True):
        assert first.pairs == second.pairs
        assert first.lengths == second.lengths
        for name, value in vars(first.to("cpu")).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(second, name))


def test_responses_of_one_token_are_predicted_from_the_prompt():
    (row,) = pack([random_pair(1, 1, 1)], 3)
    assert row.sources_T.tolist() == [0, 0]
