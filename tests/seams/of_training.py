"""Checks of the options by which `align` and `sft` train: optimiser, schedule, batches, memory, order, length."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fpo.stages import flex
from seams.lab import SMALL, Lab, Run, in_turns, plain_model, tokens, watched_passes
from seams.options import effect
from seams.oracle import Objective, Step, distance, likelihood, losses, train
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import get_scheduler

TRAINING = "align, sft"
LAYERS = 4  # of the world's models

# Of the way that training went; rounding makes up to a tenth of it, and another β₂ of Adam five times as much.
NEAR = 4e-4


def loss_of(lab: Lab, command: str) -> Callable[[Any], Tensor]:
    """The loss of a step of the lab's small run, by plain transformers: DPO, or the likelihood of the answers."""
    if command == "align":
        reference = plain_model(lab.world.gemma)
        return lambda model: losses(Objective("dpo"), model, reference, lab.pairs())["loss"].mean()
    return lambda model: likelihood(model, conversations(lab))


def conversations(
    lab: Lab, rows: Sequence[dict[str, Any]] | None = None, longest: int = 64, render: Callable[[str], str] = in_turns
) -> list[tuple[list[int], int]]:
    """Conversations (default the lab's) tokenised by hand: ids, and where the answer begins."""
    found = []
    for row in lab.rows[:SMALL] if rows is None else rows:
        question, answer = (turn["content"] for turn in row["chosen"])
        prompt = tokens(render(question))
        found.append(((prompt + tokens(f"{answer}<end_of_turn>"))[:longest], len(prompt)))
    return found


def plain(lab: Lab, command: str, steps: int = 1, **settings: Any) -> list[Step]:
    """The steps of the small run by a plain loop."""
    model = plain_model(lab.world.gemma)
    return train(model, loss_of(lab, command), steps, **{"lr": 1e-3, **settings})


def assert_moved(run: Run, gradient: Mapping[str, Tensor], rule: Callable[[Tensor], Tensor]) -> None:
    """The first step moved each weight as a rule says, which falls with the gradient; up to rounding of both."""
    moved, start = run.moved(1), run.weights(0)
    largest = max(float(value.abs().max()) for value in gradient.values())
    for name, slope in gradient.items():
        rounding = 1e-5 * slope.abs() + 2e-6 * largest
        least, most = rule(slope + rounding), rule(slope - rounding)
        allowed = 1e-3 * rule(slope).abs() + 1e-7 * start[name].abs()
        wrong = (moved[name] < least - allowed) | (moved[name] > most + allowed)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} weights moved otherwise"


def adam(rate: float) -> Callable[[Tensor], Tensor]:
    """Its first step."""
    return lambda slope: -rate * slope / (slope.abs() + 1e-8)


# The optimiser's first step, by hand.


@effect(TRAINING, "lr")
def lr(lab: Lab, command: str) -> None:
    """Adam's first step goes by the rate whatever the gradient's size, and weights do not decay."""
    (step,) = plain(lab, command)
    for rate in (1e-3, 1e-4):
        run = lab.run(command, lr=rate)
        assert run.logged("learning_rate") == [rate]
        assert_moved(run, step.gradient, adam(rate))


@effect(TRAINING, "optimizer")
def optimizer(lab: Lab, command: str) -> None:
    """RMSprop's first running square is a hundredth of the square: ten times the rate."""
    (step,) = plain(lab, command)
    found = lab.run(command, optimizer="rmsprop", lr=1e-4, max_grad_norm=0)
    assert_moved(found, step.gradient, lambda slope: -1e-4 * slope / (0.1 * slope.abs() + 1e-8))
    for name, plainly in (("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)):
        run = lab.run(command, optimizer=name, lr=1e-4, max_steps=3, max_grad_norm=0)
        expected = plain(lab, command, 3, lr=1e-4, clip=0.0, optimiser=plainly)
        assert distance(run.weights(3), expected[-1].weights, run.weights(0)) < NEAR


@effect(TRAINING, "max_grad_norm")
def max_grad_norm(lab: Lab, command: str) -> None:
    """Far below Adam's ε a step is in proportion to the clipped gradient; the norm that is logged is that before."""
    (step,) = plain(lab, command)
    for norm in (1e-7, 3e-8):
        run = lab.run(command, max_grad_norm=norm)
        clipped = {name: g * norm / step.norm for name, g in step.gradient.items()}
        assert_moved(run, clipped, adam(1e-3))
        assert run.logged("grad_norm")[0] == pytest.approx(step.norm, rel=1e-4)
    off = lab.run(command, max_grad_norm=0)
    assert_moved(off, step.gradient, adam(1e-3))
    # At the default of 1 a gradient that is longer is clipped, and a shorter one is left.
    run = lab.run(command, max_steps=3)
    expected = plain(lab, command, 3)
    assert run.logged("grad_norm") == pytest.approx([step.norm for step in expected], rel=1e-3)
    assert distance(run.weights(3), expected[-1].weights, run.weights(0)) < NEAR


# Schedules.


def assert_schedule(
    lab: Lab, command: str, steps: int, warmup: int, schedule: str, settings: Any = None, **options: Any
) -> None:
    """Rates as transformers makes them, in the log and in the weights."""
    run = lab.run(command, max_steps=steps, lr_scheduler=schedule, **options)
    (weight,) = torch.nn.Linear(1, 1, bias=False).parameters()
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    scheduler, rates = get_scheduler(schedule, optimizer, warmup, steps, settings), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert run.logged("learning_rate") == pytest.approx(rates, rel=1e-6)
    for number, rate in enumerate(rates, start=1):
        # Adam's steps are about as long as its rate.
        median = float(torch.cat([value.flatten() for value in run.moved(number).values()]).abs().median())
        assert 0.2 * rate <= median <= 1.5 * rate, (number, rate, median)
    expected = plain(lab, command, steps, schedule=schedule, warmup=warmup, settings=settings)
    assert distance(run.weights(steps), expected[-1].weights, run.weights(0)) < NEAR


@effect(TRAINING, "lr_scheduler")
def lr_scheduler(lab: Lab, command: str) -> None:
    for schedule in ("cosine", "linear"):
        assert_schedule(lab, command, 4, 1, schedule, warmup_steps=1)
    constant = lab.run(command, max_steps=2, lr_scheduler="constant", warmup_steps=None)
    assert constant.logged("learning_rate") == [1e-3, 1e-3]


@effect(TRAINING, "lr_scheduler_kwargs")
def lr_scheduler_kwargs(lab: Lab, command: str) -> None:
    """The schedule's own settings, as transformers takes them; others are refused."""
    for name, settings in (("cosine_with_min_lr", {"min_lr": 6e-4}), ("polynomial", {"power": 3.0, "lr_end": 1e-4})):
        options = {"lr_scheduler_kwargs": json.dumps(settings), "warmup_steps": 1}
        assert_schedule(lab, command, 4, 1, name, settings, **options)
    assert "--lr-scheduler-kwargs" in lab.refused(command, lr_scheduler_kwargs='{"min_lr": 1e-4}')


@effect(TRAINING, "warmup_steps")
def warmup_steps(lab: Lab, command: str) -> None:
    """So many steps, or below 1 that share of all."""
    assert_schedule(lab, command, 4, 3, "constant_with_warmup", warmup_steps=3)
    assert_schedule(lab, command, 4, 2, "constant_with_warmup", warmup_steps=0.5)


# How long, and in which batches.


@effect(TRAINING, "epochs")
def epochs(lab: Lab, command: str) -> None:
    for passes, size, steps in ((2, SMALL, 2), (2, 1, 2 * SMALL), (1, 2, 2), (0.5, 1, 2)):
        run = lab.run(command, epochs=passes, batch_size=size)
        assert [line["step"] for line in run.steps] == list(range(1, steps + 1))
        assert run.steps[-1]["epoch"] == pytest.approx(steps / np.ceil(SMALL / size))


@effect(TRAINING, "max_steps")
def max_steps(lab: Lab, command: str) -> None:
    assert len(lab.run(command, max_steps=4, batch_size=1).steps) == 4
    said = lab.refused(command, max_steps=4, epochs=2)
    assert "--epochs" in said and "--max-steps" in said


def of_each_item(lab: Lab, command: str) -> list[float]:
    """The loss of each pair or conversation alone, before training."""
    model = plain_model(lab.world.gemma)
    with torch.no_grad():
        if command == "sft":
            return [likelihood(model, [each]).item() for each in conversations(lab)]
        moved = plain_model(lab.other)
        return losses(Objective("dpo"), moved, model, lab.pairs())["loss"].tolist()


def first_losses(lab: Lab, command: str, **options: Any) -> list[float]:
    """Losses of steps that change nothing, from a start at which those of the pairs differ."""
    start = {"model": lab.other, "allow_different_start": True} if command == "align" else {}
    run = lab.run(command, lr=1e-30, **start, **options)
    return run.logged("loss")


@effect(TRAINING, "batch_size")
def batch_size(lab: Lab, command: str) -> None:
    """So many items are a step, each once an epoch; over the accumulated batches together."""
    each = of_each_item(lab, command)
    alone = first_losses(lab, command, batch_size=1, epochs=1)
    assert sorted(alone) == pytest.approx(sorted(each), rel=1e-5)
    (together,) = first_losses(lab, command, batch_size=SMALL, epochs=1)
    sizes = [1] * SMALL if command == "align" else [len(ids) - first for ids, first in conversations(lab)]
    assert together == pytest.approx(np.average(each, weights=sizes), rel=1e-5)


@effect(TRAINING, "accumulation")
def accumulation(lab: Lab, command: str) -> None:
    """A step of so many batches, each with rows of its own, is the step of one batch."""
    with watched_passes() as passes:
        run = lab.run(command, accumulation=SMALL, token_budget=10_000)
    assert len(passes.rows) == SMALL
    (step,) = plain(lab, command)
    assert_moved(run, step.gradient, adam(1e-3))
    assert run.logged("grad_norm")[0] == pytest.approx(step.norm, rel=1e-4)
    assert "--batch-size" in lab.refused(command, accumulation=2)


@effect(TRAINING, "seed")
def seed(lab: Lab, command: str) -> None:
    """The order of the data: every item once an epoch, each epoch and each seed in an order of its own."""
    each = of_each_item(lab, command)
    orders = {}
    for number in range(4):
        found = first_losses(lab, command, batch_size=1, epochs=4, seed=number)
        places = [min(range(SMALL), key=lambda i, loss=loss: abs(each[i] - loss)) for loss in found]
        epochs = [tuple(places[first : first + SMALL]) for first in range(0, 4 * SMALL, SMALL)]
        assert all(sorted(epoch) == list(range(SMALL)) for epoch in epochs)
        assert len(set(epochs)) > 1
        orders[number] = epochs
    assert len({str(order) for order in orders.values()}) > 1


# Memory.


@effect(TRAINING, "token_budget")
def token_budget(lab: Lab, command: str) -> None:
    """No row is longer, unless one item alone is; with room for all there is one row."""
    if command == "align":
        sizes = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in lab.pairs()]
    else:
        sizes = [len(ids) for ids, _ in conversations(lab)]
    for budget, rows in ((1, sorted(sizes)), (sum(sizes), [sum(sizes)])):
        with watched_passes() as passes:
            lab.run(command, token_budget=budget)
        assert sorted(passes.rows) == rows
    two = sorted(sizes)[:2]
    with watched_passes() as passes:
        lab.run(command, token_budget=sum(two), seed=3)
    assert len(passes.rows) == 2 or max(passes.rows) > sum(two)
    assert sum(passes.rows) == sum(sizes)


@effect(TRAINING, "activation_checkpointing")
def activation_checkpointing(lab: Lab, command: str) -> None:
    """Every layer runs twice, forward and again in backward, and the step is the same."""
    with watched_passes() as kept:
        without = lab.run(command, seed=11)
    with watched_passes() as again:
        run = lab.run(command, seed=11, activation_checkpointing=True)
    assert kept.layers == LAYERS * len(kept.rows)
    assert again.layers == 2 * LAYERS * len(again.rows)
    assert distance(run.weights(1), without.weights(1), run.weights(0)) < 1e-3


@effect(TRAINING, "checkpoint_every")
def checkpoint_every(lab: Lab, command: str) -> None:
    """Every third layer runs twice, and the step is the same."""
    without = lab.run(command, seed=11)
    with watched_passes() as again:
        run = lab.run(command, seed=11, activation_checkpointing=True, checkpoint_every=3)
    twice = len(range(0, LAYERS, 3))
    assert again.layers == (LAYERS + twice) * len(again.rows)
    assert distance(run.weights(1), without.weights(1), run.weights(0)) < 1e-3


@effect(f"precompute, {TRAINING}", "compile")
def compiled_layers(lab: Lab, command: str) -> None:
    """Layers run as compiled code, which is the compiler's only work, and as they are without the option."""
    torch._dynamo.reset()  # what another check had compiled would serve here
    counters.clear()
    lab.run(command)
    assert not counters["stats"]["unique_graphs"]
    with patch.object(flex, "BACKEND", "aot_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own look at what it compiles
        lab.run(command, compile=True)
    assert counters["stats"]["unique_graphs"] > 0
