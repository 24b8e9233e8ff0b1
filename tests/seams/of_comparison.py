"""Checks of the options of `table` and `tune`, and of what only their profile sets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fpo.stages.judge import rates
from judge_server import completion, serving
from seams.comparison import Comparison, assert_cell, compare, distinct, shown
from seams.lab import Lab
from seams.options import FILE, effect
from tiny_profile import NAMES
from tiny_world import files

BOTH = "table, tune"


def splits(made: Comparison) -> set[str]:
    """Splits of which caches were made."""
    return {step.config.split for step in made.fabricated.steps if step.command == "precompute"}


def measured_on(made: Comparison) -> set[str]:
    """Splits of the caches that policies were measured on."""
    made_of = {step.out: step.config.split for step in made.fabricated.steps if step.command == "precompute"}
    return {made_of[Path(str(one.config.cache))] for one in made.fabricated.evaluated}


def trained_on(made: Comparison) -> set[str]:
    made_of = {step.out: step.config.split for step in made.fabricated.steps if step.command == "precompute"}
    aligned = [step.config for step in made.fabricated.steps if step.command == "align"]
    return {made_of[Path(str(config.cache))] for config in aligned}


@effect(BOTH, "config")
def config(lab: Lab, command: str) -> None:
    """Its settings are those of every step: the model, what a method's section says, the lengths."""
    made = compare(lab, command, lr=3e-4, top_k=7, seed=4)
    assert made.result.exit_code == 0, made.result.output
    aligned = [step.config for step in made.fabricated.steps if step.command == "align"]
    assert {config.model for config in aligned} == {str(lab.world.gemma)}
    rates = {config.lr for config in aligned}
    if command == "table":
        assert rates == {3e-4}
    else:
        assert len(rates) > 8 and all(0.2 * 3e-4 <= rate <= 5 * 3e-4 for rate in rates)
    assert {config.top_k for config in aligned if config.method == "fpo"} == {7}
    measured = {one.config.top_k for one in made.fabricated.evaluated}
    assert measured == ({7} if command == "table" else {50})  # a search measures no features
    assert "--config" in fails(lab, command, "--config", "nowhere")


def fails(lab: Lab, command: str, *flags: object) -> str:
    """The line of a call that is refused; nothing of it was run."""
    made = compare(lab, command, *flags)
    assert (made.result.exit_code, len(made.result.stderr.splitlines())) == (2, 1), made.result.output
    assert not made.fabricated.steps and not made.out.exists()
    return made.result.stderr


@effect(BOTH, "runs", "out")
def places(lab: Lab, command: str) -> None:
    folder = lab.new()
    made = compare(lab, command, "--runs", folder / "there", "--out", folder / "here")
    assert made.result.exit_code == 0, made.result.output
    assert {step.out.parent for step in made.fabricated.steps} == {folder / "there"}
    wanted = {"table": {"table.md", "table.html", "comparison.csv"}, "tune": {"tuning.csv"}}[command]
    assert wanted <= set(files(folder / "here"))
    assert not made.out.exists() and not (made.folder / "runs").exists()


@effect(BOTH, "jobs")
def jobs(lab: Lab, command: str) -> None:
    assert set(compare(lab, command, "--jobs", 5).fabricated.jobs) == {5}
    assert set(compare(lab, command).fabricated.jobs) == {2}  # the profile's


@effect("table", "dry_run")
def dry_run(lab: Lab, command: str) -> None:
    made = compare(lab, command, "--dry-run")
    assert made.result.exit_code == 0 and "to do" in made.result.output
    assert not made.fabricated.steps and not made.out.exists() and not (made.folder / "runs").exists()


@effect("table", "ablations")
def ablations(lab: Lab, command: str) -> None:
    """Other tables, in place of the comparison."""
    made = compare(lab, command, "--ablations")
    assert made.result.exit_code == 0, made.result.output
    assert {"ablations.md", "sites.csv", "alpha.csv", "layers.csv"} <= set(files(made.out))
    assert "table.md" not in files(made.out)
    assert {step.config.method for step in made.fabricated.steps if step.command == "align"} == {"fpo"}
    alphas = {(config.alpha, config.stop_gradient) for config in aligned(made) if config.site == (NAMES[0],)}
    assert alphas >= {(alpha, stop) for alpha in (0.1, 0.5, 1.0, 2.0) for stop in (True, False)} - {(0.5, True)}


def aligned(made: Comparison) -> list:  # type: ignore[type-arg]
    return [step.config for step in made.fabricated.steps if step.command == "align"]


@effect(FILE, "seeds")
def seeds(lab: Lab, command: str) -> None:
    """Every method under every seed; cells are means over them."""
    made = compare(lab, "table", table_section={"seeds": [3, 5, 8]})
    assert made.result.exit_code == 0, made.result.output
    assert {(config.method, config.alpha, config.seed) for config in aligned(made)} == {
        (method, alpha, seed)
        for method, alpha in {(config.method, config.alpha) for config in aligned(made)}
        for seed in (3, 5, 8)
    }
    for line in shown(made):
        values = made.ends(line[""], "accuracy/raw")
        assert len(values) == 3
        assert_cell(line["accuracy raw, %"], values, 100)


@effect(FILE, "heldout_split")
def heldout_split(lab: Lab, command: str) -> None:
    """The comparison is measured on it and trained on the other."""
    for name in ("test_prefs", "validation_prefs"):
        made = compare(lab, "table", table_section={"heldout_split": name})
        assert made.result.exit_code == 0, made.result.output
        assert (measured_on(made), trained_on(made)) == ({name}, {"train_prefs"})


@effect(FILE, "validation_split")
def validation_split(lab: Lab, command: str) -> None:
    """Tuning chooses on it, and never looks at the split that the comparison is measured on."""
    made = compare(lab, "tune")
    assert made.result.exit_code == 0, made.result.output
    assert (measured_on(made), trained_on(made)) == ({"validation_prefs"}, {"train_prefs"})
    assert splits(made) == {"validation_prefs", "train_prefs"}
    # What is logged of a trial is what was measured of it; of near-ties the one of the lowest KL is printed.
    lines = made.csv("tuning.csv")
    trials = [one for one in made.fabricated.evaluated if one.training]
    ends = {_trial(one.training.method, one.training): one.metrics for one in trials}
    assert len(lines) == len(ends) == len(trials) == 7 * 16
    for line in lines:
        key = line["row"], *(float(line[name]) if line[name] else None for name in ("lr", "beta", "alpha"))
        found = ends[key]
        for name in ("accuracy/raw", "accuracy/implicit"):
            assert float(line[name]) == pytest.approx(found[name])
        assert float(line["score"]) == pytest.approx(found["accuracy/raw"])
        assert float(line["kl"]) == pytest.approx((found["kl/chosen"] + found["kl/rejected"]) / 2)
    for row in distinct(line["row"] for line in lines):
        mine = [line for line in lines if line["row"] == row]
        best = max(mine, key=lambda line: float(line["score"]))
        near = [line for line in mine if float(line["score"]) >= float(best["score"]) - float(best["error"])]
        winner = min(near, key=lambda line: float(line["kl"]))
        assert f"  {row}: {{lr: {float(winner['lr']):g}, beta: {float(winner['beta']):g}" in made.result.output


def _trial(method: str, training: Any) -> tuple[Any, ...]:
    """A trial's row and settings."""
    free = method == "fpo" and training.alpha == 0
    return "fpo-alpha0" if free else method, training.lr, training.beta, training.alpha


def by_judge(lab: Lab, *flags: str) -> list[dict[str, Any]]:
    """What a judge was asked for a table that has its columns."""
    even = {"A": float(np.log(0.5)), "B": float(np.log(0.5))}
    with pytest.MonkeyPatch.context() as patch, serving(completion("[[A]]", [even])) as server:
        patch.setattr(rates, "RESAMPLES", 9)  # the intervals are tested in test_rates.py
        named = ("--judge-endpoint", server.url, "--judge", "some-judge")
        made = compare(lab, "table", *named, *flags, table_section={"seeds": [3]})
    assert made.result.exit_code == 0, made.result.output
    assert "win rate against SFT by the judge, %" in shown(made)[0]
    return server.requests


@effect("table", "judge_endpoint", "judge")
def judge(lab: Lab, command: str) -> None:
    """Columns of win rates by that judge at that address."""
    assert {request["model"] for request in by_judge(lab)} == {"some-judge"}
    assert "win rate against SFT by the judge, %" not in shown(compare(lab, command))[0]
    assert "--judge" in fails(lab, command, "--judge", "some-judge")


@effect("table", "judge_mode")
def judge_mode(lab: Lab, command: str) -> None:
    """`verdict` reads text, and asks for no log-probabilities; the default asks for them."""
    assert not any("logprobs" in request for request in by_judge(lab, "--judge-mode", "verdict"))
    assert all(request["logprobs"] for request in by_judge(lab, "--judge-mode", "logprob"))


@effect("table", "seeds")
def seeds_of_a_call(lab: Lab, command: str) -> None:
    """Those of the call win over the profile's."""
    made = compare(lab, command, "--seeds", 4, "--seeds", 6, table_section={"seeds": [3]})
    assert made.result.exit_code == 0, made.result.output
    assert {config.seed for config in aligned(made)} == {4, 6}


@effect(FILE, "rows")
def rows(lab: Lab, command: str) -> None:
    """Settings of a row that shares its method with another one reach that row alone."""
    made = compare(lab, "table", table_section={"rows": {"fpo-alpha0": {"lr": 7e-4, "beta": 0.3}}, "seeds": [3]})
    assert made.result.exit_code == 0, made.result.output
    of_fpo = {config.alpha: (config.lr, config.beta) for config in aligned(made) if config.method == "fpo"}
    assert of_fpo[0.0] == (7e-4, 0.3) and all(found != (7e-4, 0.3) for alpha, found in of_fpo.items() if alpha != 0)


@effect(FILE, "lr_range", "beta_range", "alpha_range")
def trial_ranges(lab: Lab, command: str) -> None:
    """Trials lie in them, as factors of the profile's learning rate and the method's own β and α."""
    wide = {"lr_range": [0.5, 2.0], "beta_range": [3.0, 4.0], "alpha_range": [5.0, 6.0]}
    made = compare(lab, "tune", lr=1e-3, tune=wide)
    assert made.result.exit_code == 0, made.result.output
    slack = 1.05  # settings are rounded to two digits
    for config in aligned(made):
        own = {"dpo": 0.1, "tdpo1": 0.1, "tdpo2": 0.1, "fpo": 0.1, "simpo": 2.0, "simpo-kl": 2.0}[config.method]
        assert 0.5e-3 / slack <= config.lr <= 2e-3 * slack and 3 / slack <= config.beta / own <= 4 * slack
        if config.alpha:
            assert 5 / slack <= config.alpha / 0.5 <= 6 * slack


@effect(FILE, "ablation_sites", "ablation_sums")
def ablation_sites(lab: Lab, command: str) -> None:
    """A row a site, of runs that are constrained there alone, and a row a sum, of runs that are constrained there."""
    rows = {"ablation_sites": NAMES, "ablation_sums": ["+".join(NAMES), NAMES[1]]}
    made = compare(lab, "table", "--ablations", table_section={**rows, "seeds": [1, 2]})
    assert made.result.exit_code == 0, made.result.output
    for table, wanted in zip(("sites.csv", "layers.csv"), rows.values(), strict=True):
        lines = made.csv(table)
        assert [line["row"] for line in lines] == wanted
        for line in lines:
            values = {
                one.seed: one.metrics["accuracy/raw"]
                for one in made.fabricated.evaluated
                if one.training
                and one.training.site == tuple(line["row"].split("+"))
                and one.training.alpha in (None, 0.5)
                and one.training.stop_gradient is not False
            }
            assert set(values) == {1, 2}
            assert float(line["accuracy/raw mean"]) == pytest.approx(np.mean(list(values.values())))
