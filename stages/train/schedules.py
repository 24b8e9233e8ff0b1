"""Learning-rate schedules: transformers' own, with a name and settings that are checked before the first step.

In: a schedule's name, its settings and, once it is known, the number of steps. Out: nothing, or one line that says what
is wrong.
"""

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from ...cache.errors import UserError

# These follow a metric from evaluation to evaluation; the others are functions of the step.
FOLLOW_A_METRIC = ("greedy", "reduce_lr_on_plateau")
SCHEDULES = tuple(kind.value for kind in SchedulerType if kind.value not in FOLLOW_A_METRIC)

# Arguments of transformers' functions that the Trainer gives.
_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
# Of these settings exactly one is needed, which the signature does not say.
_ONE_OF = dict.fromkeys(("cosine_with_min_lr", "cosine_warmup_with_min_lr"), ("min_lr", "min_lr_rate"))
# Schedules whose rate at a step does not depend on how many steps there are.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")

# A schedule is tried at no more steps than this, evenly spaced.
_TRIED_STEPS = 10_000


def check_name(name: str) -> None:
    """Checks the name of a schedule.

    Raises:
        UserError: there is no such schedule, or it follows a metric.
    """
    if name in FOLLOW_A_METRIC:
        raise UserError(
            f"--lr-scheduler: expected a schedule over steps, found {name}, which follows a metric between "
            f"evaluations; take one of {', '.join(SCHEDULES)}"
        )
    if name not in SCHEDULES:
        raise UserError(f"--lr-scheduler: expected one of {', '.join(SCHEDULES)}, found '{name}'")


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Checks the names of a schedule's settings.

    Raises:
        UserError: the schedule does not take one of them, or lacks one.
    """
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    known = inspect.signature(function).parameters
    taken = {key: parameter for key, parameter in known.items() if key not in _GIVEN}
    if unknown := sorted(settings.keys() - taken):
        raise UserError(
            f"--lr-scheduler-kwargs: {name} takes {', '.join(taken) or 'no settings'}, found {', '.join(unknown)}"
        )
    missing = [key for key, parameter in taken.items() if parameter.default is parameter.empty and key not in settings]
    if missing:
        raise UserError(f"--lr-scheduler-kwargs: {name} needs {', '.join(missing)}; add them")
    if (one_of := _ONE_OF.get(name)) and sum(settings.get(key) is not None for key in one_of) != 1:
        raise UserError(f"--lr-scheduler-kwargs: {name} needs {' or '.join(one_of)}, and not both")


def check_rates(name: str, settings: Mapping[str, Any], *, lr: float, warmup_steps: int, steps: int) -> None:
    """Checks the rates of a whole run.

    Args:
        name: the schedule.
        settings: its own.
        lr: the peak rate.
        warmup_steps: steps of warm-up.
        steps: steps of the run.

    Raises:
        UserError: a setting cannot be used, or a rate is negative, not finite, or 0 from some step on.
    """
    if name == "warmup_stable_decay":
        parts = {"warm-up": warmup_steps, **{part: settings.get(f"num_{part}_steps") for part in ("stable", "decay")}}
        known = {part: count for part, count in parts.items() if isinstance(count, int)}
        if "stable" not in known and sum(known.values()) > steps:
            found = " and ".join(f"{part} of {count}" for part, count in known.items())
            raise UserError(
                f"--lr-scheduler-kwargs: expected {name} to fit the run's {steps} steps, found {found}; lower them"
            )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    try:
        with own_length(settings):
            schedule: Any = get_scheduler(
                name, optimizer, warmup_steps, steps, scheduler_specific_kwargs=dict(settings)
            )
        # The schedule takes a last step after the optimiser's.
        tried = [*range(0, steps, max(1, steps // _TRIED_STEPS)), steps]
        rates = [lr * schedule.lr_lambdas[0](step) for step in tried]
    except (TypeError, ValueError, ArithmeticError, UnboundLocalError) as error:
        raise UserError(f"--lr-scheduler-kwargs: {name} cannot use {dict(settings)}: {error}") from error
    for step, rate in zip(tried, rates, strict=True):
        if not math.isfinite(rate) or rate < 0:
            raise UserError(
                f"--lr-scheduler-kwargs: expected rates from 0, found {rate:.3g} at step {step} of {name} with "
                f"{dict(settings)}"
            )
    learning = [step for step, rate in zip(tried[:-1], rates[:-1], strict=True) if rate > 0]
    if learning and len(tried) > 2 and learning[-1] < tried[-3]:  # in the last step some are at 0
        raise UserError(
            f"--lr-scheduler-kwargs: {name} with {dict(settings)} has a rate of 0 from step {learning[-1] + 1} of "
            f"{steps} on, where nothing more would be learnt; change them, or the length of the run"
        )


@contextmanager
def own_length(settings: Mapping[str, Any]) -> Iterator[None]:
    """Silences transformers' warning that a stable phase of its own takes precedence over the run's length."""
    with warnings.catch_warnings():
        if "num_stable_steps" in settings:
            warnings.filterwarnings("ignore", "Both num_training_steps and num_stable_steps")
        yield


def is_endless(name: str, warmup_steps: float) -> bool:
    """Whether a run can be made longer without another rate at the steps before: a share of warm-up would move."""
    return name in _ENDLESS and not 0 < warmup_steps < 1
