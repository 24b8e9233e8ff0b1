import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from fpo.pipeline.config import AlignConfig, TuneConfig
from fpo.pipeline.config_files import load_config, write_yaml
from fpo.pipeline.report import tune
from fpo.pipeline.report.plan import Plan, make_plan
from fpo.pipeline.report.tune import BETAS, RATES, trials, winners
from fpo.stages.train.methods import METHODS
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples
from tiny_profile import tiny_profile
from tiny_world import fpo, ran


@pytest.fixture
def plan(world, tmp_path) -> Plan:
    path = str(tiny_profile(world, tmp_path))
    return make_plan(path, load_config(TuneConfig, path, {"runs": tmp_path / "runs"}))


def trial(method: str, accuracy: float, lr: float = 1.0, beta: float = 1.0) -> dict[str, Any]:
    return {"method": method, "accuracy/raw": accuracy, "lr": lr, "beta": beta}


def test_every_method_is_searched_as_much_as_any_other(plan):
    grids = {method: trials(plan, method) for method in METHODS}
    assert {len(grid) for grid in grids.values()} == {len(RATES) * len(BETAS)}
    for method, grid in grids.items():
        points = [(run.train.config.lr, run.train.config.beta) for run in grid if run.train]
        assert len(set(points)) == len(points) == len({run.train.out for run in grid if run.train})
        assert {lr for lr, _ in points} == {3e-4, 1e-3, 3e-3, 1e-2}
        own = float(METHODS[method].defaults["beta"])
        assert sorted({beta for _, beta in points}) == pytest.approx([0.3 * own, own, 3 * own])
        assert {(run.method, run.seed, run.train.config.snapshot_steps) for run in grid if run.train} == {
            (method, 0, None)
        }


def test_trials_of_a_method_differ_in_rate_and_beta_alone(plan):
    for method in METHODS:
        configs = [
            run.train.config.model_dump(exclude={"out", "lr", "beta"}) for run in trials(plan, method) if run.train
        ]
        assert all(config == configs[0] for config in configs)


def test_the_best_by_raw_accuracy_wins():
    found = winners([trial("fpo", 0.6, 1), trial("dpo", 0.9, 2), trial("fpo", 0.7, 3), trial("dpo", 0.8, 4)])
    assert {method: record["lr"] for method, record in found.items()} == {"dpo": 2, "fpo": 3}
    assert list(found) == [method for method in METHODS if method in found]


def test_among_equals_the_lower_rate_and_then_the_lower_beta_wins():
    equals = [trial("dpo", 0.7, lr, beta) for lr, beta in ((3, 1), (1, 3), (1, 2), (2, 1))]
    assert winners([*equals, trial("dpo", 0.6, 0.1, 0.1)])["dpo"] == equals[2]


@many_examples
@given(
    st.lists(
        st.builds(
            trial,
            st.sampled_from([*METHODS]),
            st.sampled_from([0.5, 0.6]),
            st.sampled_from([1.0, 2.0]),
            st.sampled_from([1.0, 2.0]),
        )
    ),
    st.randoms(use_true_random=False),
)
def test_winners_do_not_depend_on_the_order_of_trials(records, rng):
    found = winners(records)
    assert set(found) == {record["method"] for record in records}
    for record in records:
        best = found[record["method"]]
        order = [(-one["accuracy/raw"], one["lr"], one["beta"]) for one in (best, record)]
        assert order[0] <= order[1]
    rng.shuffle(records)
    assert winners(records) == found


def test_a_profile_without_a_validation_split_is_refused(world, tmp_path):
    path = tiny_profile(world, tmp_path)
    content = yaml.safe_load(path.read_text())
    del content["tune"]["validation_split"]
    path.write_text(write_yaml(content))
    result = fpo("tune", "--config", path, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "validation_split" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


def test_the_embedded_profile_has_the_winners_of_the_committed_log():
    log = Path(__file__).parents[3] / "results" / "embedded" / "tuning.csv"
    records = [
        {"method": line["method"]} | {key: float(line[key]) for key in tune.COLUMNS[1:]}
        for line in csv.DictReader(log.read_text().splitlines())
    ]
    assert [record["method"] for record in records] == [m for m in METHODS for _ in range(len(RATES) * len(BETAS))]
    for method, best in winners(records).items():
        config = load_config(AlignConfig, "embedded", {"method": method})
        assert (config.lr, config.beta) == (best["lr"], best["beta"]), method


@pytest.mark.slow
def test_the_log_has_every_trial_and_the_terminal_the_winners(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "RATES", (1.0, 3.0))
    monkeypatch.setattr(tune, "BETAS", (1.0,))
    path = tiny_profile(world, tmp_path, max_steps=1)
    out: Path = tmp_path / "out"
    said = ran(fpo("tune", "--config", path, "--runs", tmp_path / "runs", "--out", out)).output
    lines = list(csv.DictReader((out / "tuning.csv").read_text().splitlines()))
    assert [line["method"] for line in lines] == [method for method in METHODS for _ in range(2)]
    assert {line["lr"] for line in lines} == {"0.001", "0.003"}
    caches = [path.name for path in (tmp_path / "runs").glob("precompute-*") if path.is_dir()]
    assert sorted(name.split("-")[1] for name in caches) == ["train_prefs", "validation_prefs"]
    records = [{"method": line["method"]} | {key: float(line[key]) for key in tune.COLUMNS[1:]} for line in lines]
    for method, best in winners(records).items():
        assert f"  {method}: {{lr: {best['lr']:g}, beta: {best['beta']:g}}}" in said
        assert 0 <= best["accuracy/raw"] <= 1 and best["kl/chosen"] >= 0
