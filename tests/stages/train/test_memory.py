"""Peaks of memory against bytes counted by hand."""

from types import SimpleNamespace

import pytest
import torch
from fpo.stages.train.align import FPOTrainer
from fpo.stages.train.config import FPOConfig
from fpo.stages.train.memory import COUNTED_STEPS, PeakMemory, TensorBytes, resident_bytes
from hypothesis import given
from hypothesis import strategies as st
from pairs import few_examples
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

KB = 1024
CPU = torch.device("cpu")


def kilobytes(count: int) -> torch.Tensor:
    return torch.ones(count * KB // 4)


def test_what_is_there_counts_once_whatever_views_there_are():
    kept = kilobytes(64)
    with TensorBytes() as counted:
        start = counted.live
        views = [kept[1:], kept.view(2, -1), kept[::2]]
        assert counted.live == start and len(views) == 3
    del kept, views
    with TensorBytes() as again:
        assert again.live == start - 64 * KB


def test_the_peak_is_the_most_that_was_alive_at_once():
    with TensorBytes() as counted:
        start = counted.live
        one = kilobytes(8)
        two = one + one
        del one
        three = two * 2
        assert (counted.peak - start, counted.live - start) == (16 * KB, 16 * KB)
        del two, three
        assert (counted.peak - start, counted.live - start) == (16 * KB, 0)
        counted.reset()
        four = kilobytes(4)
        assert counted.peak - start == 4 * KB
        del four


@few_examples
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 64)), max_size=20))
def test_any_order_of_making_and_dropping_is_counted(steps):
    held: list[torch.Tensor] = []
    sizes: list[int] = []
    most = 0
    with TensorBytes() as counted:
        start = counted.live
        for make, size in steps:
            if make or not held:
                held.append(kilobytes(size))
                sizes.append(size)
            else:
                held.pop()
                sizes.pop()
            most = max(most, sum(sizes))
            assert counted.live - start == sum(sizes) * KB
        assert counted.peak - start == most * KB
        held.clear()


def test_what_backward_keeps_and_frees_is_counted():
    weight = torch.ones(KB, requires_grad=True)
    with TensorBytes() as counted:
        start = counted.live
        loss = (weight.exp().sin()).sum()
        # exp keeps its result and sin its input, which is the same tensor; the sum is a number of 4 bytes.
        assert counted.live - start == 4 * KB + 4
        loss.backward()
        assert weight.grad is not None
        del loss
        assert counted.live - start == 4 * KB  # the gradient


def step(memory: PeakMemory, kilobytes_made: int) -> None:
    args = SimpleNamespace(device=CPU)
    memory.on_step_begin(args, None, None)
    made = kilobytes(kilobytes_made)
    del made
    memory.on_step_end(args, None, None)


def test_a_training_s_peak_is_that_of_its_first_steps():
    memory = PeakMemory()
    with TensorBytes() as there:
        before = there.live
    for number in range(COUNTED_STEPS):
        step(memory, 100 * (number + 1))
    step(memory, 10_000)  # not counted any more, at no cost
    found = memory.read(CPU)
    assert found["train_peak_memory_bytes"] == before + 100 * COUNTED_STEPS * KB
    assert found["train_peak_process_bytes"] == pytest.approx(resident_bytes(), rel=0.01)
    assert found["train_peak_process_bytes"] > found["train_peak_memory_bytes"]


def test_a_step_that_ends_in_an_error_leaves_nothing_on(world, tmp_path, monkeypatch):
    settings = {"method": "dpo", "max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    trainer = FPOTrainer(world.policy(), FPOConfig(str(tmp_path), **settings), world.open(()), callbacks=[PeakMemory()])
    monkeypatch.setattr(trainer, "row_loss", lambda model, row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not _get_current_dispatch_mode_stack()
