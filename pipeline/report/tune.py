"""`fpo tune`: a search of learning rate, β and α for every row of the comparison, the same number of trials for each.

In: a profile. Out: in the results folder `tuning.csv`, one line per trial on the validation split, `tuning.md`, the
winners, also at equal KL, and the figure `frontier`; on the terminal the winners as one copies them into the profile.

In the embedded world the score is the share of sampled answers that are right; elsewhere it is raw accuracy. Trials
whose score is within a standard error of the best are near-ties: of these the one nearest to the reference wins.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from ...cache.errors import UserError
from ...cache.files import write_atomically
from ...stages.train.methods import METHODS
from ..commands.jobs import run_steps
from ..report_config import TuneConfig
from ..world.world import provide
from .page import Table, is_toy, note_of, short_note
from .plan import ROWS, Plan, Run, make_plan
from .records import Record, read_record
from .style import LABELS, save
from .success import read_answers, success_record
from .success_figures import frontier

# Trials of a row: points of a Sobol sequence, on a logarithmic scale, over what is searched.
TRIALS = 16
SEARCHED = ("lr", "beta", "alpha")

SUCCESS, ACCURACY = "success/right", "accuracy/raw"
COLUMNS = ("row", *SEARCHED, "score", "error", "kl", SUCCESS, ACCURACY, "accuracy/implicit")


def run_tune(name: str, config: TuneConfig) -> None:
    """`fpo tune`: runs all trials that are not done yet and writes their results.

    Raises:
        UserError: the profile has no validation split, or a step failed.
    """
    stem = Path(name).stem
    if config.validation_split is None:
        raise UserError(f"{name}: expected validation_split, found none; name the split to choose on")
    out = config.out or Path("results") / stem
    config = config.model_copy(update={"runs": config.runs or Path("runs") / stem, "out": out})
    provide(config)
    plan = make_plan(name, config.model_copy(update={"heldout_split": config.validation_split}))
    reference = plan.run("sft", "SFT", plan.config.seeds[0], None)
    runs = [run for row, options in ROWS.items() if options for run in trials(plan, row)]
    options: dict[str, Any] = {"sae": (), "site": (), "top_k": 50} | ({} if is_toy(plan) else {"prompts": 0})
    evaluations = {run: plan.evaluation(run, **options) for run in (reference, *runs)}
    steps = [*plan.base, plan.train_cache, plan.heldout_cache, *(run.train for run in runs if run.train)]
    run_steps([*steps, *evaluations.values()], config.jobs)
    folders = {run: evaluation.out for run, evaluation in evaluations.items()}
    records = [scored(read_record(run, evaluations[run]), folders[run], folders[reference], plan) for run in runs]
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(out / "tuning.csv", text.getvalue().encode())
    best = winners(records)
    score = "right answers" if is_toy(plan) else "raw accuracy"
    save(frontier(records, best, score, short_note(plan)), out / "figures", "frontier")
    table = _winners_table(records, best, score, plan.config)
    write_atomically(out / "tuning.md", f"{note_of(plan)}\n\n{table.markdown}".encode())
    typer.echo(f"{out / 'tuning.csv'}: {len(records)} trials; for the profile:")
    for row, record in best.items():
        found = ", ".join(f"{key}: {record[key]:g}" for key in searched(row))
        typer.echo(f"  {row}: {{{found}}}  # {100 * record['score']:.1f} %, KL {record['kl']:.2f}")


def _winners_table(records: Sequence[Record], best: Mapping[str, Record], score: str, config: TuneConfig) -> Table:
    """The winners, what of them lies at the end of its range, and each row at no more KL than FPO's winner."""
    body = []
    for row, record in best.items():
        values = [f"{record[name]:g}" if name in searched(row) else "–" for name in SEARCHED]
        near = best_within(records, row, best["fpo"]["kl"])
        held = [f"{100 * near['score']:.1f}", f"{near['kl']:.2f}"] if near else ["–", "–"]
        ends = ", ".join(at_the_end(record, config)) or "–"
        body.append([LABELS[row], *values, f"{100 * record['score']:.1f}", f"{record['kl']:.2f}", *held, ends])
    header = [
        "",
        "lr",
        "β",
        "α",
        f"{score}, %",
        "KL, nats",
        f"{score} at no more KL than FPO's winner, %",
        "its KL, nats",
    ]
    return Table(
        f"The best of {TRIALS} trials of each row, validation split", [*header, "at the end of its range"], body
    )


def searched(row: str) -> list[str]:
    """What a row's search varies: α only where the method has one and the row does not fix it."""
    options = ROWS[row] or {}
    return [key for key in SEARCHED if key not in options and key in {"lr", *METHODS[options["method"]].defaults}]


def ranges(row: str, config: TuneConfig) -> dict[str, tuple[float, float]]:
    """The least and the largest value of what a row's search varies."""
    own = METHODS[(ROWS[row] or {})["method"]].defaults | {"lr": config.lr}
    factors = {name: getattr(config, f"{name}_range") for name in searched(row)}
    return {name: (own[name] * low, own[name] * high) for name, (low, high) in factors.items()}


def trials(plan: Plan, row: str) -> list[Run]:
    """One row's runs under the first seed."""
    from scipy.stats.qmc import Sobol

    options, within = ROWS[row] or {}, ranges(row, plan.config)
    points = Sobol(len(within), rng=0).random(TRIALS)
    found = [
        {
            name: float(f"{low * (high / low) ** at:.2g}")
            for (name, (low, high)), at in zip(within.items(), point, strict=True)
        }
        for point in points
    ]
    return [
        plan.run(
            row,
            f"{row} " + " ".join(f"{name} {value:g}" for name, value in trial.items()),
            plan.config.seeds[0],
            {**options, **trial},
        )
        for trial in found
    ]


def scored(record: Record, folder: Path, reference: Path, plan: Plan) -> Record:
    """A trial's record with its `score`, the `error` of that, and its `kl` to the reference, nats a response."""
    record = record | {"kl": (record["kl/chosen"] + record["kl/rejected"]) / 2}
    if not is_toy(plan):
        error = (record[f"{ACCURACY} high"] - record[f"{ACCURACY} low"]) / (2 * 1.96)
        return record | {"score": record[ACCURACY], "error": error}
    answers = read_answers(folder)
    error = float(np.std(answers.success_P, ddof=1) / np.sqrt(len(answers.prompts)))
    record |= success_record(answers, read_answers(reference))
    return record | {"score": record[SUCCESS], "error": error}


def winners(records: Sequence[Record]) -> dict[str, Record]:
    """Each row's trial of lowest KL among those whose score is within a standard error of the row's best."""
    found = {}
    for row in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == row]
        best = max(mine, key=lambda trial: (trial["score"], -trial["kl"], trial["error"]))
        near = [trial for trial in mine if trial["score"] >= best["score"] - best["error"]]
        found[row] = min(near, key=lambda trial: (trial["kl"], -trial["score"], trial["lr"]))
    return found


def at_the_end(record: Record, config: TuneConfig) -> list[str]:
    """What of a trial's settings lies within a twentieth of its range's ends, where a wider search may find better."""
    at = {
        name: math.log(record[name] / low) / math.log(high / low)
        for name, (low, high) in ranges(record["row"], config).items()
    }
    return [name for name, place in at.items() if not 0.05 <= place <= 0.95]


def best_within(records: Sequence[Record], row: str, kl: float) -> Record | None:
    """A row's trial of the highest score among those of at most such a KL; None without one."""
    near = [record for record in records if record["row"] == row and record["kl"] <= kl]
    return max(near, key=lambda record: record["score"], default=None)
