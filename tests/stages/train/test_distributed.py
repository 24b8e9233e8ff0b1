import pytest
from fpo.stages.train.distributed import ShareOfBatches
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples
from torch.utils.data import SequentialSampler


def shares(items: int, batch: int, ranks: int) -> list[list[list[int]]]:
    return [list(ShareOfBatches(SequentialSampler(range(items)), batch, False, rank, ranks)) for rank in range(ranks)]


@many_examples
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 5))
def test_every_item_is_one_rank_s_and_the_batches_are_those_of_one_process(items, batch, ranks):
    (whole,) = shares(items, batch * ranks, 1)
    found = shares(items, batch, ranks)
    assert {len(share) for share in found} == {len(whole)}
    for number, expected in enumerate(whole):
        parts = [share[number] for share in found]
        assert sorted(item for part in parts for item in part) == expected
        assert max(map(len, parts)) <= batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_share_knows_its_number_of_batches(ranks):
    share = ShareOfBatches(SequentialSampler(range(20)), 2, False, 0, ranks)
    assert len(share) == len(list(share))
