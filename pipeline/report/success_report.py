"""The part of the comparison that the rule of the embedded world makes possible: win rates and the figures of success.

In: the judged answers of all runs. Out: a table and figures, for the page.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .claims import Scores
from .figures import Bars
from .followed import by_temperature, first_seed, snapshots
from .intervals import mean_of
from .page import PageFigure, Table, short_note
from .plan import Plan, Run
from .records import Record, by_row, read_record
from .style import LABELS, save
from .success import Answers, read_answers
from .success_figures import headline, over_temperature, over_training


def by_seed(values: Mapping[Run, NDArray[np.float64]]) -> dict[str, dict[int, NDArray[np.float64]]]:
    """Values of runs by row and seed."""
    found: dict[str, dict[int, NDArray[np.float64]]] = {}
    for run, value in values.items():
        found.setdefault(run.row, {})[run.seed] = value
    return found


def wins_table(answers: Mapping[Run, Answers]) -> Table:
    """The win rate of every row against every other, in per cent with its interval."""
    rows: dict[str, dict[int, Answers]] = {}
    for run, found in answers.items():
        rows.setdefault(run.row, {})[run.seed] = found

    def cell(row: str, other: str) -> str:
        if row == other:
            return "–"
        found = mean_of({seed: one.wins_P(rows[other][seed]) for seed, one in rows[row].items()})
        return f"{100 * found.mean:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"

    body = [[LABELS[row], *(cell(row, other) for other in rows)] for row in rows]
    return Table(
        "Win rate of the row against the column, % (95 % interval)", ["", *(LABELS[row] for row in rows)], body
    )


def leading_figure(
    plan: Plan, records: Sequence[Record], scores: Scores, answers: Mapping[Run, Answers], folder: Path
) -> PageFigure:
    """Draws and saves the picture that the page begins with; `answers` are empty where no rule tells who wins."""
    origin = {run.seed: found for run, found in answers.items() if run.train is None}
    won = {run: found.wins_P(origin[run.seed]) for run, found in answers.items() if run.train is not None}
    figure = headline(
        scores.name,
        {row: mean_of(values) for row, values in scores.rows.items()},
        {row: mean_of(values) for row, values in by_seed(won).items()},
        Bars({row: list(map(_kl, found)) for row, found in by_row(records).items() if row != "sft"}, "nats"),
        short_note(plan),
    )
    caption = f"{scores.name.capitalize()} of each method, and how far it moved from the reference."
    return PageFigure(caption, save(figure, folder, "headline").read_text(), caption)


def _kl(record: Record) -> float:
    """Mean over chosen and rejected responses, nats a response."""
    return float(record["kl/chosen"] + record["kl/rejected"]) / 2


def success_figures(plan: Plan, runs: Sequence[Run], folder: Path) -> list[PageFigure]:
    """Draws and saves success over training and by temperature, both of the first seed of `runs`."""
    note, first = short_note(plan), plan.config.seeds[0]
    note_of_seed = f"{note}; seed {first} alone"
    points = {}
    for run in first_seed(plan, runs):
        evaluations = sorted(snapshots(plan, run).items())
        points[run.row] = [
            (step, float(read_answers(made.out).right_PA.mean()), _kl(read_record(run, made)))
            for step, made in evaluations
        ]
    sampled = {
        run.row: {at: read_answers(step.out) for at, step in by.items()}
        for run, by in by_temperature(plan, runs).items()
    }
    success = {row: {at: mean_of({first: a.success_P}) for at, a in by.items()} for row, by in sampled.items()}
    wins = {
        row: {at: mean_of({first: a.wins_P(sampled["sft"][at])}) for at, a in by.items()}
        for row, by in sampled.items()
        if row != "sft"
    }
    drawn: list[tuple[str, str, Callable[[], Figure]]] = [
        (
            "success-over-training",
            f"Right answers over training and against KL, seed {first}.",
            lambda: over_training(points, note_of_seed),
        ),
        (
            "figure-3-right",
            f"Figure 3, right: right answers and win rate by temperature, seed {first}.",
            lambda: over_temperature(success, wins, note_of_seed),
        ),
    ]
    return [PageFigure(caption, save(draw(), folder, name).read_text(), caption) for name, caption, draw in drawn]
