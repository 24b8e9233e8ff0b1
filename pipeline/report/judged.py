"""The comparison's answers before a judge: each run against the SFT model of its seed.

In: evaluations with samples, an endpoint. Out: figures for the runs' records; the judgments lie beside the runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from ..commands.jobs import Step
from ..report_config import JudgeConfig
from .followed import by_temperature
from .intervals import Interval
from .judge import judge_answers
from .page import PageFigure, short_note
from .plan import Plan, Run
from .records import Record
from .style import save
from .success_figures import over_temperature

# How the names of the two rates of a summary begin.
RATES = ("win rate", "length-controlled")


def judged_records(plan: Plan, evaluations: Mapping[Run, Step]) -> dict[Run, Record]:
    """What the judge says of each trained run's answers against those of the SFT model, at the same seed.

    Raises:
        UserError: from the judge; what it said is kept.
    """
    origin = {run.seed: step for run, step in evaluations.items() if run.train is None}
    return {
        run: judged_record(plan, run, step, origin[run.seed])
        for run, step in evaluations.items()
        if run.train is not None
    }


def judged_record(plan: Plan, run: Run, evaluation: Step, origin: Step) -> Record:
    """Win rates of one evaluation's answers against another's, and the share of replies without a verdict."""
    assert plan.config.runs is not None
    folder = plan.config.runs / f"judge-{evaluation.out.name.removeprefix('evaluate-')}"
    typer.echo(f"judge {evaluation.label.removeprefix('evaluate ')}: ", nl=False)
    summary = judge_answers(
        JudgeConfig(
            benchmark="pairwise",
            answers=evaluation.out,
            against=origin.out,
            endpoint=plan.config.judge_endpoint,
            judge=plan.config.judge,
            mode=plan.config.judge_mode,
            out=folder,
        )
    )
    rate, controlled = (next(r for name, r in summary.rates.items() if name.startswith(start)) for start in RATES)
    return {
        "judge/win_rate": rate.mean,
        "judge/win_rate low": rate.low,
        "judge/win_rate high": rate.high,
        "judge/controlled": controlled.mean,
        "judge/controlled low": controlled.low,
        "judge/controlled high": controlled.high,
        "judge/unparsed": summary.unparsed / summary.judged,
    }


def judged_figure(plan: Plan, runs: Sequence[Run], folder: Path) -> PageFigure:
    """Draws and saves the win rate against the SFT model at the same temperature, by the judge."""
    samples = by_temperature(plan, runs)
    (origin,) = (by for run, by in samples.items() if run.train is None)
    found: dict[str, dict[float, Interval]] = {}
    for run, by in samples.items():
        if run.train is not None:
            records = {at: judged_record(plan, run, step, origin[at]) for at, step in by.items()}
            found[run.row] = {
                at: Interval(record["judge/win_rate"], record["judge/win_rate low"], record["judge/win_rate high"], 1.0)
                for at, record in records.items()
            }
    note = f"{short_note(plan)}; seed {plan.config.seeds[0]} alone; judge: {plan.config.judge}"
    svg = save(over_temperature({}, found, note), folder, "figure-3-right-judge")
    caption = "Figure 3, right, by the judge: win rate against SFT by temperature."
    return PageFigure(caption, svg.read_text(), caption)
