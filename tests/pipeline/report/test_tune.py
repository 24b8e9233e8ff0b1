import csv
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from fpo.pipeline.config import AlignConfig
from fpo.pipeline.config_files import load_config, write_yaml
from fpo.pipeline.report import tune
from fpo.pipeline.report.plan import ROWS, Plan, Run, make_plan
from fpo.pipeline.report.style import LABELS
from fpo.pipeline.report.tune import TRIALS, at_the_end, best_within, ranges, searched, trials, winners
from fpo.pipeline.report_config import TableConfig, TuneConfig
from fpo.stages.train.methods import METHODS
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples
from tiny_profile import tiny_profile
from tiny_world import fpo, ran

# How far the search of the tiny profile goes.
FACTORS = {"lr": (0.2, 3.0), "beta": (0.5, 100.0), "alpha": (0.1, 10.0)}
TUNED = [row for row, options in ROWS.items() if options]


@pytest.fixture
def plan(world, tmp_path) -> Plan:
    path = str(tiny_profile(world, tmp_path))
    return make_plan(path, load_config(TuneConfig, path, {"runs": tmp_path / "runs"}))


def trial(row: str, score: float, kl: float = 1.0, lr: float = 1.0, error: float = 0.02) -> dict[str, Any]:
    return {"row": row, "score": score, "kl": kl, "lr": lr, "error": error}


def settings(run: Run) -> dict[str, float]:
    assert run.train is not None
    return {name: getattr(run.train.config, name) for name in searched(run.row)}


def test_every_row_is_searched_as_much_as_any_other(plan):
    for row in TUNED:
        found = trials(plan, row)
        assert len(found) == TRIALS == len({run.train.out for run in found if run.train})
        own = METHODS[found[0].method].defaults | {"lr": plan.config.lr}
        for name in searched(row):
            low, high = FACTORS[name]
            assert ranges(row, plan.config)[name] == pytest.approx((own[name] * low, own[name] * high))
            places = [math.log(settings(run)[name] / own[name] / low) / math.log(high / low) for run in found]
            assert -0.01 <= min(places) < 0.2 and 0.8 < max(places) <= 1.01, (row, name)
            assert len(set(places)) == TRIALS
        assert {(run.method, run.seed, run.train.config.snapshot_steps) for run in found if run.train} == {
            (ROWS[row]["method"], 0, None)
        }


def test_a_search_varies_what_the_method_reads_and_the_row_leaves_open():
    assert {row: searched(row) for row in TUNED} == {
        "dpo": ["lr", "beta"],
        "tdpo1": ["lr", "beta", "alpha"] if "alpha" in METHODS["tdpo1"].defaults else ["lr", "beta"],
        "tdpo2": ["lr", "beta", "alpha"],
        "simpo": ["lr", "beta"],
        "simpo-kl": ["lr", "beta", "alpha"],
        "fpo": ["lr", "beta", "alpha"],
        "fpo-alpha0": ["lr", "beta"],
    }


def test_trials_of_a_row_differ_in_what_is_searched_alone(plan):
    for row in TUNED:
        ignored = {"out", *searched(row)}
        configs = [run.train.config.model_dump(exclude=ignored) for run in trials(plan, row) if run.train]
        assert all(config == configs[0] for config in configs)
    assert {run.train.config.alpha for run in trials(plan, "fpo-alpha0") if run.train} == {0.0}


def test_of_trials_within_an_error_of_the_best_the_nearest_to_the_reference_wins():
    best, near, far = trial("fpo", 0.70, 5.0, 1), trial("fpo", 0.68, 2.0, 2), trial("fpo", 0.679, 1.0, 3)
    assert winners([far, best, near])["fpo"] == near
    assert winners([far, {**best, "error": 0.0}, near])["fpo"] == best | {"error": 0.0}
    assert winners([{**far, "error": 1.0}, best, near])["fpo"] == near  # the best one's error counts


def test_each_row_has_its_own_winner():
    found = winners([trial("fpo", 0.6, lr=1), trial("dpo", 0.9, lr=2), trial("fpo", 0.7, lr=3)])
    assert {row: record["lr"] for row, record in found.items()} == {"dpo": 2, "fpo": 3}


@many_examples
@given(
    st.lists(
        st.builds(
            trial,
            st.sampled_from(TUNED),
            st.sampled_from([0.5, 0.51, 0.6]),
            st.sampled_from([1.0, 2.0]),
            st.sampled_from([1.0, 2.0]),
            st.sampled_from([0.0, 0.02]),
        )
    ),
    st.randoms(use_true_random=False),
)
def test_winners_are_near_the_best_and_none_as_near_has_a_lower_kl(records, rng):
    found = winners(records)
    assert set(found) == {record["row"] for record in records}
    for row, won in found.items():
        mine = [record for record in records if record["row"] == row]
        top = max(record["score"] for record in mine)
        assert won["score"] >= top - 0.02
        assert all(record["score"] < won["score"] for record in mine if record["kl"] < won["kl"])
    rng.shuffle(records)
    assert {row: (won["score"], won["kl"]) for row, won in winners(records).items()} == {
        row: (won["score"], won["kl"]) for row, won in found.items()
    }


def test_a_winner_at_the_end_of_its_range_is_told(plan):
    record = {"row": "dpo", "lr": plan.config.lr, "beta": METHODS["dpo"].defaults["beta"] * FACTORS["beta"][1]}
    assert at_the_end(record, plan.config) == ["beta"]
    assert at_the_end({**record, "beta": 0.1, "lr": plan.config.lr * FACTORS["lr"][0] * 1.02}, plan.config) == ["lr"]
    assert at_the_end({**record, "beta": 0.1}, plan.config) == []


def test_the_best_at_equal_kl_is_the_best_of_those_as_near():
    records = [trial("dpo", 0.6, 1.0), trial("dpo", 0.8, 3.0), trial("dpo", 0.5, 0.5)]
    assert best_within(records, "dpo", 2.0) == records[0]
    assert best_within(records, "dpo", 3.0) == records[1]
    assert best_within(records, "dpo", 0.1) is None


def test_a_profile_without_a_validation_split_is_refused(world, tmp_path):
    path = tiny_profile(world, tmp_path)
    content = yaml.safe_load(path.read_text())
    del content["tune"]["validation_split"]
    path.write_text(write_yaml(content))
    result = fpo("tune", "--config", path, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "validation_split" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = csv.DictReader((folder / "tuning.csv").read_text().splitlines())
    return [{"row": line.pop("row")} | {key: float(value) for key, value in line.items() if value} for line in lines]


def test_the_embedded_profile_has_the_winners_of_the_committed_log():
    records = log_of(Path(__file__).parents[3] / "results" / "embedded")
    assert [record["row"] for record in records] == [row for row in TUNED for _ in range(TRIALS)]
    rows = load_config(TableConfig, "embedded", {}).rows
    for row, best in winners(records).items():
        config = load_config(AlignConfig, "embedded", {"method": ROWS[row]["method"], **rows.get(row, {})})
        assert {name: getattr(config, name) for name in searched(row)} == {name: best[name] for name in searched(row)}


@pytest.mark.slow
def test_the_log_has_every_trial_and_the_terminal_the_winners(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "TRIALS", 2)
    path = tiny_profile(world, tmp_path, max_steps=1)
    out: Path = tmp_path / "out"
    said = ran(fpo("tune", "--config", path, "--runs", tmp_path / "runs", "--out", out)).output
    records = log_of(out)
    assert [record["row"] for record in records] == [row for row in TUNED for _ in range(2)]
    caches = [path.name for path in (tmp_path / "runs").glob("precompute-*") if path.is_dir()]
    assert sorted(name.split("-")[1] for name in caches) == ["train_prefs", "validation_prefs"]
    assert (out / "figures" / "frontier.svg").read_text().count("<path") > 10
    shown = (out / "tuning.md").read_text()
    for row, best in winners(records).items():
        assert f"  {row}: {{lr: {best['lr']:g}, beta: {best['beta']:g}" in said
        assert 0 <= best["score"] == best["accuracy/raw"] <= 1 and best["kl"] >= 0
        assert f"| {LABELS[row]} | {best['lr']:g} | {best['beta']:g} |" in shown
