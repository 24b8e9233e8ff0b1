import numpy as np
import pytest
import torch
from fpo.stages.model.sae import Site
from fpo.stages.scoring.batches import RowBatch, RowCollator
from fpo.stages.scoring.measure import measure_pairs
from fpo.stages.scoring.packing import RowLayout
from hypothesis import given
from hypothesis import strategies as st
from pairs import calm_gemma2, many_examples, random_pairs
from tiny import tiny_sae
from torch.utils.data._utils.pin_memory import pin_memory

SAES = [tiny_sae(site=Site(2, "resid_post")), tiny_sae(site=Site(1, "mlp_out"), seed=1)]
CACHED = measure_pairs(calm_gemma2(), random_pairs(4, 6), SAES, "fp32", token_budget=200, keep_features=5)
WIDTHS = tuple(sae.width for sae in SAES)


@many_examples
@given(
    chosen=st.lists(st.sampled_from(range(6)), min_size=1, max_size=6),
    budget=st.integers(1, 400),
    pad_to=st.sampled_from([1, 128]),
)
def test_rows_hold_every_pair_of_the_batch_once_with_what_the_cache_says_of_it(chosen, budget, pad_to):
    pairs = [CACHED[i] for i in chosen]
    rows = RowCollator(budget, WIDTHS, RowLayout(pad_to))(pairs)["rows"]
    assert sorted(index for row in rows for index in row.packed.pairs) == list(range(len(pairs)))
    for row in rows:
        responses = [side for index in row.packed.pairs for side in (pairs[index].chosen, pairs[index].rejected)]
        assert row.ref_logps_R.tolist() == [response.logp for response in responses]
        assert row.ref_logps_R.dtype == torch.float64
        assert list(row.packed.lengths) == [response.num_tokens for response in responses]
        ids = [vars(pairs[index].pair)[name] for index in row.packed.pairs for name in ("prompt_ids", "chosen_ids")]
        ids += [pairs[index].pair.rejected_ids for index in row.packed.pairs]
        assert row.tokens == sum(map(len, ids))
        assert row.packed.input_ids_L.numel() % pad_to == 0
        for site, features in enumerate(row.cached):
            for number, response in enumerate(responses):
                dense = np.zeros(WIDTHS[site] + 1, np.float32)
                dense[features.ids_RF[number].numpy()] = features.values_RF[number].numpy()
                expected = np.zeros(WIDTHS[site] + 1, np.float32)
                expected[response.features[site].ids] = response.features[site].values
                np.testing.assert_array_equal(dense, expected)
                assert float(features.floor_R[number]) == response.features[site].floor


def test_a_method_without_features_carries_none():
    rows = RowCollator(200, ())(CACHED)["rows"]
    assert all(row.cached == () for row in rows)


def tensors_of(row: RowBatch) -> list[torch.Tensor]:
    tensors = [row.ref_logps_R, *(value for value in vars(row.packed).values() if isinstance(value, torch.Tensor))]
    return tensors + [tensor for features in row.cached for tensor in vars(features).values()]


def test_a_row_moves_to_a_device_whole():
    row = RowCollator(200, WIDTHS)(CACHED)["rows"][0]
    moved = row.to("meta")
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert (moved.tokens, moved.packed.pairs) == (row.tokens, row.packed.pairs)


def test_the_loader_pins_a_row_whole_where_there_is_a_gpu(monkeypatch):
    """A GPU copies while it computes only from pinned memory; here pinning is a copy that is counted."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    batch = RowCollator(200, WIDTHS)(CACHED)
    found = pin_memory(batch)
    for row, before in zip(found["rows"], batch["rows"], strict=True):
        for tensor, old in zip(tensors_of(row), tensors_of(before), strict=True):
            assert any(tensor is one for one in pinned) and torch.equal(tensor, old)
        assert (row.tokens, row.packed.lengths) == (before.tokens, before.packed.lengths)


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(ValueError, match="--token-budget"):
        RowCollator(budget, WIDTHS)(CACHED)
