"""`fpo tune`: a grid search of learning rate and β for every method, the same number of trials for each.

In: a profile. Out: `tuning.csv` in the results folder, one line per trial on the validation split, and each method's
best trial on the terminal, in the form in which one copies it into the profile.
"""

import csv
import io
from pathlib import Path

import typer

from ...cache.errors import UserError
from ...cache.files import write_atomically
from ...stages.train.methods import METHODS
from ..commands.jobs import run_steps
from ..config import TuneConfig
from ..world.world import provide
from .plan import Plan, Run, make_plan
from .records import Record, read_record

# Factors of the profile's learning rate and of the method's default β (docs/method.md, section 4).
RATES = (0.3, 1.0, 3.0, 10.0)
BETAS = (0.3, 1.0, 3.0)

SCORE = "accuracy/raw"
COLUMNS = ("method", "lr", "beta", SCORE, "accuracy/implicit", "kl/chosen", "kl/rejected")


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
    runs = [run for method in METHODS for run in trials(plan, method)]
    steps = [*plan.base, plan.train_cache, plan.heldout_cache, *(run.train for run in runs if run.train)]
    run_steps([*steps, *(plan.evaluation(run, prompts=0) for run in runs)], config.jobs)
    records = [read_record(run, plan.evaluation(run, prompts=0)) for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tuning.csv", text.getvalue().encode())
    typer.echo(f"{out / 'tuning.csv'}: {len(records)} trials; for the profile:")
    for method, record in winners(records).items():
        typer.echo(f"  {method}: {{lr: {record['lr']:g}, beta: {record['beta']:g}}}  # {100 * record[SCORE]:.1f} %")


def trials(plan: Plan, method: str) -> list[Run]:
    """One method's grid of runs, under the first seed."""
    base = plan.config.lr
    own = float(METHODS[method].defaults["beta"])
    points = [(float(f"{base * rate:.3g}"), float(f"{own * beta:.3g}")) for rate in RATES for beta in BETAS]
    return [
        plan.run(
            method,
            f"{method} lr {lr:g} beta {beta:g}",
            plan.config.seeds[0],
            {"method": method, "lr": lr, "beta": beta},
        )
        for lr, beta in points
    ]


def winners(records: list[Record]) -> dict[str, Record]:
    """Each method's trial of highest raw accuracy; of equal ones that with the lower rate, then the lower β."""
    best: dict[str, Record] = {}
    for record in sorted(records, key=lambda trial: (-trial[SCORE], trial["lr"], trial["beta"])):
        best.setdefault(record["method"], record)
    return {method: best[method] for method in METHODS if method in best}
