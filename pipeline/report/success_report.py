"""The part of the comparison that the rule of the embedded world makes possible: win rates and the figures of success.

In: the judged answers of all runs. Out: a table and figures, for the page.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

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


def success_figures(
    plan: Plan, runs: Sequence[Run], records: Sequence[Record], answers: Mapping[Run, Answers], folder: Path
) -> list[PageFigure]:
    """Draws and saves the figures of what the answers are; `records` belong to `runs`, in the same order."""
    note, first = short_note(plan), plan.config.seeds[0]
    note_of_seed = f"{note}; seed {first} alone"
    origin = {run.seed: found for run, found in answers.items() if run.train is None}
    success = {row: mean_of(values) for row, values in by_seed({r: a.success_P for r, a in answers.items()}).items()}
    won = {run: found.wins_P(origin[run.seed]) for run, found in answers.items() if run.train is not None}
    wins = {row: mean_of(values) for row, values in by_seed(won).items()}
    kl = {
        row: [(record["kl/chosen"] + record["kl/rejected"]) / 2 for record in found]
        for row, found in by_row(records).items()
        if row != "sft"
    }
    followed = {run: snapshots(plan, run) for run in first_seed(plan, runs)}
    points = {}
    for run, by_step in followed.items():
        found = [(step, read_answers(made.out), read_record(run, made)) for step, made in sorted(by_step.items())]
        points[run.row] = [
            (step, float(one.right_PA.mean()), (record["kl/chosen"] + record["kl/rejected"]) / 2)
            for step, one, record in found
        ]
    sampled = {
        run.row: {at: read_answers(step.out) for at, step in by.items()}
        for run, by in by_temperature(plan, runs).items()
    }
    warm = {row: {at: mean_of({first: a.success_P}) for at, a in by.items()} for row, by in sampled.items()}
    warm_wins = {
        row: {at: mean_of({first: a.wins_P(sampled["sft"][at])}) for at, a in by.items()}
        for row, by in sampled.items()
        if row != "sft"
    }
    drawn: list[tuple[str, str, Callable[[], Figure]]] = [
        (
            "success",
            "What the methods' sampled answers are, and how far they moved from the reference.",
            lambda: headline(success, wins, Bars(kl, "nats"), note),
        ),
        (
            "success-over-training",
            f"Success over training and against KL, seed {first}.",
            lambda: over_training(points, note_of_seed),
        ),
        (
            "figure-3-right",
            f"Figure 3, right: success and win rate by temperature, seed {first}.",
            lambda: over_temperature(warm, warm_wins, note_of_seed),
        ),
    ]
    return [PageFigure(caption, save(draw(), folder, name).read_text(), caption) for name, caption, draw in drawn]
