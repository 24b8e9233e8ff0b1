"""What is asked of the first seed's runs alone: evaluations of their snapshots, and samples by temperature.

In: a plan and its runs, trained. Out: the steps that evaluate them.
"""

from collections.abc import Sequence

from ..commands.jobs import Step
from .page import is_toy
from .plan import Plan, Run
from .records import training_cost

# Figure 3, right; the comparison itself samples at the last.
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
# Prompts to which snapshots answer.
FOLLOWED_PROMPTS = 160


def first_seed(plan: Plan, runs: Sequence[Run]) -> list[Run]:
    """The trained runs of the first seed; only these save snapshots."""
    return [run for run in runs if run.train is not None and run.seed == plan.config.seeds[0]]


def snapshots(plan: Plan, run: Run) -> dict[int, Step]:
    """The evaluations of a run's snapshots and of its final model, by optimiser step."""
    assert run.train is not None
    folders = (run.train.out / "snapshots").glob("step-*")
    prompts = FOLLOWED_PROMPTS if is_toy(plan) else 0
    found = {
        int(folder.name.removeprefix("step-")): plan.evaluation(run, folder, prompts=prompts) for folder in folders
    }
    return found | {int(training_cost(run.train.out)["train/steps"]): plan.evaluation(run)}


def by_temperature(plan: Plan, runs: Sequence[Run]) -> dict[Run, dict[float, Step]]:
    """The samples of the first seed's runs by temperature, where a rule or a judge tells who wins."""
    told = is_toy(plan) or plan.config.judge_endpoint is not None
    first = [run for run in runs if told and run.seed == plan.config.seeds[0]]
    return {
        run: {at: plan.evaluation(run) if at == 1 else plan.sampling(run, at) for at in TEMPERATURES} for run in first
    }
