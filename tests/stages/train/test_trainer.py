"""Training on several ranks is training on one: gradients, weights, evaluations and files."""

from typing import Any

import pytest
import torch
from pairs import assert_same_gradients
from ranks import MODELS, ONE_BATCH, SETTINGS, on_ranks, step, steps, whole_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

WRAPPERS = {"DDP": False, "FSDP2": True}


@pytest.fixture(scope="module")
def single(world, tmp_path_factory) -> dict[str, Any]:
    """Gradients and weights after a step of one process, all pairs in one row."""
    return {heads: step(world, tmp_path_factory.mktemp(heads), heads, **ONE_BATCH) for heads in MODELS}


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_take_the_step_of_one(world, single, tmp_path, wrapper):
    ranks = on_ranks(steps, tmp_path, world.folder, tmp_path / "run", fsdp=WRAPPERS[wrapper])
    for rank in ranks:
        assert len(rank) == len(MODELS) * len(SETTINGS)
        for (heads, _), found in rank.items():
            for tensors, expected in zip(found, single[heads], strict=True):
                assert_same_gradients(tensors, expected, 1e-5)


@pytest.mark.parametrize("heads", MODELS)
@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_a_loss_that_is_scaled_wrongly_does_not_pass_for_the_same_step(world, single, tmp_path, heads, scale):
    scaled = step(world, tmp_path, heads, scale, **ONE_BATCH)
    for tensors, expected in zip(scaled, single[heads], strict=True):
        with pytest.raises(AssertionError):
            assert_same_gradients(tensors, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_run_on_two_ranks_logs_evaluates_saves_and_resumes_as_on_one(world, tmp_path, wrapper):
    sizes = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 6}
    expected = whole_run(world.folder, tmp_path / "one", **sizes)
    found, _ = on_ranks(whole_run, tmp_path, world.folder, tmp_path / "two", fsdp=WRAPPERS[wrapper])
    for line, other in zip(expected, found, strict=True):
        for name in line:
            if "loss" in name or ("/" in name and name != "constraint/grad_ratio"):
                assert other[name] == pytest.approx(line[name], rel=1e-3, abs=1e-6), name
    for name in ("run/snapshots/step-000003", "run/checkpoint-4", "run", "again"):
        expected_weights, weights = (
            load_file(tmp_path / which / name / "model.safetensors") for which in ("one", "two")
        )
        assert weights.keys() == expected_weights.keys()
        for weight in expected_weights:
            torch.testing.assert_close(weights[weight], expected_weights[weight], rtol=1e-4, atol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "again")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
