"""Training on several ranks is training on one: gradients, weights, evaluations and files."""

from typing import Any

import pytest
from pairs import assert_same_gradients
from ranks import MODELS, ONE_BATCH, SETTINGS, on_ranks, step, steps


@pytest.fixture(scope="module", params=["DDP", "FSDP2"])
def on_two(request, world, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    return on_ranks(steps, folder, world.folder, folder / "run", fsdp=request.param == "FSDP2")


@pytest.mark.parametrize("heads", MODELS)
def test_two_ranks_take_the_step_of_one(world, on_two, tmp_path, heads):
    gradients, weights = step(world, tmp_path, heads, **ONE_BATCH)
    for rank in on_two:
        for name in SETTINGS:
            found_gradients, found_weights = rank[heads, name]
            assert_same_gradients(found_gradients, gradients, 1e-5)
            assert_same_gradients(found_weights, weights, 1e-5)
    with pytest.raises(AssertionError):  # the comparison sees a loss that is scaled wrongly
        assert_same_gradients(step(world, tmp_path, heads, 2.0, **ONE_BATCH)[0], gradients, 1e-5)
