import csv
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fpo.pipeline.commands.jobs import Step
from fpo.pipeline.config_files import COMMANDS
from fpo.pipeline.report.claims import Scores, ablation_claims, comparison_claims
from fpo.pipeline.report.page import markdown
from fpo.pipeline.report.plan import Run
from fpo.pipeline.report.records import (
    ABLATION_COLUMNS,
    COLUMNS,
    TABLES,
    Column,
    cells,
    entropy_of_prompts,
    mean_and_deviation,
    measured,
    mse_by_site,
    read_record,
    read_scores,
    training_cost,
    write_records,
    write_scores,
)
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples

LOG = [
    {"step": 0, "parity/logps": 0.0},
    {"step": 1, "loss": 0.7},
    {
        "step": 2,
        "train_runtime": 12.5,
        "train_tokens_per_second": 340.0,
        "train_peak_memory_bytes": 7_000_000,
        "train_loss": 0.6,
    },
    {"step": 2, "eval_loss": 0.5},
]


def step(command: str, out: Path, **options: Any) -> Step:
    return Step(command, command, COMMANDS[command](out=out, **options))


def evaluated(folder: Path, **metrics: dict[str, float]) -> Step:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"metrics": metrics, "pairs": 7}))
    return step("evaluate", folder)


def trained(folder: Path, **options: Any) -> Step:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    return step("align", folder, **options)


def record(row: str, seed: int, **values: float | None) -> dict[str, Any]:
    return {"row": row, "label": row.upper(), "seed": seed, "method": row, **values}


def table(text: str) -> list[list[str]]:
    """The cells of a Markdown table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_cost_of_a_training_is_what_it_logged_last(tmp_path):
    assert training_cost(trained(tmp_path / "run").out) == {
        "train/steps": 2,
        "train/seconds": 12.5,
        "train/tokens_per_second": 340.0,
        "train/peak_memory_bytes": 7_000_000,
    }


def test_of_a_run_that_went_on_the_end_counts(tmp_path):
    run = trained(tmp_path / "run")
    later = {"step": 4, "train_runtime": 3.0, "train_tokens_per_second": 1.0, "train_peak_memory_bytes": 9}
    with (run.out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    assert training_cost(run.out)["train/steps"] == 4
    assert training_cost(run.out)["train/peak_memory_bytes"] == 9


def test_a_record_holds_settings_metrics_intervals_and_cost(tmp_path):
    run = trained(tmp_path / "run", method="fpo", alpha=2.0, stop_gradient=False, lr=1e-3, seed=4)
    metrics = {
        "accuracy/raw": {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 7},
        "bound/share_violated": {"mean": 0.25},
    }
    found = read_record(Run("fpo", "FPO", 4, run, "fpo"), evaluated(tmp_path / "evaluation", **metrics))
    assert found["accuracy/raw"] == 0.6
    assert (found["accuracy/raw low"], found["accuracy/raw high"]) == (0.5, 0.7)
    assert found["bound/share_violated"] == 0.25 and "bound/share_violated low" not in found
    assert (found["row"], found["label"], found["seed"], found["method"]) == ("fpo", "FPO", 4, "fpo")
    assert (found["lr"], found["alpha"], found["stop_gradient"]) == (1e-3, 2.0, False)
    assert found["train/seconds"] == 12.5


def test_settings_that_were_left_out_are_the_method_s_own(tmp_path):
    evaluation = evaluated(tmp_path / "evaluation")
    fpo = read_record(Run("fpo", "FPO", 0, trained(tmp_path / "fpo", method="fpo"), "fpo"), evaluation)
    assert (fpo["beta"], fpo["alpha"], fpo["stop_gradient"]) == (0.1, 0.5, True)
    simpo = read_record(Run("simpo", "SimPO", 0, trained(tmp_path / "simpo", method="simpo"), "simpo"), evaluation)
    assert (simpo["beta"], simpo["gamma"]) == (2.0, 0.5) and "alpha" not in simpo


def test_the_reference_has_no_training(tmp_path):
    found = read_record(Run("sft", "SFT", 0, None), evaluated(tmp_path / "e", **{"accuracy/raw": {"mean": 0.5}}))
    assert found["method"] is None and not [key for key in found if key.startswith("train/")]


def test_means_and_sample_deviations_by_hand():
    rows = [record("dpo", seed, a=value) for seed, value in enumerate([1.0, 2.0, 6.0])]
    mean, deviation = mean_and_deviation(rows, "a") or (0, 0)
    assert (mean, deviation) == (3.0, pytest.approx(7**0.5))  # ((-2)² + (-1)² + 3²) / 2
    assert mean_and_deviation(rows[:1], "a") == (1.0, 0.0)
    assert mean_and_deviation(rows, "b") is None
    assert mean_and_deviation([record("dpo", 0, a=None)], "a") is None


@pytest.mark.parametrize(
    ("values", "cell"),
    [
        ((0.5,), "50.0"),
        ((0.5, 0.6), "55.0 ± 7.1"),
        ((0.0, 0.0), "0.0 ± 0.0"),
        ((-1e-9,), "0.0"),
        ((), "–"),
    ],
)
def test_a_cell_is_mean_and_deviation_or_an_en_dash(values, cell):
    rows = [record("dpo", seed, a=value) for seed, value in enumerate(values)] or [record("dpo", 0)]
    assert cells(rows, [Column("a", "A, %", 100, 1)]) == [["DPO", cell]]


numbers = st.none() | st.floats(-1e6, 1e6)


@many_examples
@given(st.lists(st.tuples(st.sampled_from(["dpo", "fpo", "simpo"]), numbers, numbers), min_size=1, max_size=12))
def test_cells_markdown_csv_and_json_lines_agree(tmp_path_factory, values):
    records = [record(row, seed, a=a, b=b) for seed, (row, a, b) in enumerate(values)]
    columns = [Column("a", "A"), Column("b", "B, %", 100, 1)]
    folder = tmp_path_factory.mktemp("records")
    write_records(records, columns, folder, "made")
    assert [json.loads(line) for line in (folder / "made.jsonl").read_text().splitlines()] == records
    body = cells(records, columns)
    header, _, *shown = table(markdown(["", "A", "B, %"], body))
    assert (header, shown) == (["", "A", "B, %"], body)
    lines = list(csv.DictReader((folder / "made.csv").read_text().splitlines()))
    assert [line["label"] for line in lines] == [row[0] for row in body]
    for line, row in zip(lines, body, strict=True):
        mine = [r for r in records if r["row"] == line["row"]]
        assert int(line["seeds"]) == len(mine)
        for cell, column in zip(row[1:], columns, strict=True):
            there = [r[column.key] for r in mine if r[column.key] is not None]
            if not there:
                assert cell == "–" and line[f"{column.key} mean"] == line[f"{column.key} sd"] == ""
                continue
            mean, deviation = float(line[f"{column.key} mean"]), float(line[f"{column.key} sd"])
            assert mean == pytest.approx(sum(there) / len(there), abs=1e-9)
            assert deviation == pytest.approx(statistics.stdev(there) if len(there) > 1 else 0, abs=1e-9)
            parts = [float(part) for part in cell.split(" ± ")]
            half = 0.5000001 * 10**-column.digits
            expected = [mean, deviation] if len(mine) > 1 else [mean]
            assert parts == pytest.approx([column.scale * value for value in expected], abs=half)


def test_every_column_names_its_unit_and_stands_once():
    for columns in (COLUMNS, ABLATION_COLUMNS):
        assert len({column.key for column in columns}) == len({column.title for column in columns}) == len(columns)
    titles = {column.key: column.title for column in COLUMNS}
    for key, unit in {"accuracy/raw": "%", "kl/chosen": "nats", "train/peak_memory_bytes": "MB"}.items():
        assert titles[key].endswith(unit)


def test_columns_that_no_record_has_are_not_shown():
    columns = [Column("a", "A"), Column("b", "B"), Column("c", "C")]
    found = measured([record("dpo", 0, a=None, b=1.0), record("fpo", 0, b=None, c=0.0)], columns)
    assert [column.key for column in found] == ["b", "c"]


def test_feature_mse_of_several_sites_is_split_by_what_was_constrained():
    found = {"features/mse one": 1.0, "features/mse two": 3.0, "features/mse three": 8.0}
    measured_with_ends = found | {"features/mse one low": 100.0, "features/mse one high": 200.0}
    assert mse_by_site(measured_with_ends, ("one", "two")) == {
        "features/mse_constrained": 2.0,
        "features/mse_others": 8.0,
    }
    assert mse_by_site(found, tuple(key.split()[1] for key in found)) == {"features/mse_constrained": 4.0}


def test_scores_are_read_back_as_they_were(tmp_path):
    rows = {row: {seed: np.random.default_rng(seed).integers(0, 5, 7) / 4 for seed in (3, 1)} for row in ("a", "α = 0")}
    write_scores(rows, tmp_path / "scores.csv")
    found = read_scores(tmp_path / "scores.csv")
    assert list(found) == list(rows)
    for row, by_seed in rows.items():
        assert list(found[row]) == [3, 1]
        assert all(np.array_equal(found[row][seed], values) for seed, values in by_seed.items())


def test_the_entropy_of_a_prompt_is_the_mean_over_its_answers(tmp_path):
    samples = [("a", -6.0, 3), ("a", -1.0, 1), ("b", -0.5, 2)]
    lines = [json.dumps({"prompt": prompt, "logp": logp, "tokens": n}) for prompt, logp, n in samples]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    assert entropy_of_prompts(tmp_path).tolist() == [1.5, 0.25]


# What is committed.

RESULTS = Path(__file__).parents[3] / "results" / "embedded"
COMMITTED = {"comparison": COLUMNS, "sites": ABLATION_COLUMNS, "alpha": ABLATION_COLUMNS, "layers": ABLATION_COLUMNS}


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_tables_follow_from_the_committed_records(name, tmp_path):
    records = committed(name)
    write_records(records, COMMITTED[name], tmp_path, name)
    for suffix in ("csv", "jsonl"):
        assert (tmp_path / f"{name}.{suffix}").read_bytes() == (RESULTS / f"{name}.{suffix}").read_bytes()
    page = RESULTS / ("table.md" if name == "comparison" else "ablations.md")
    for columns in TABLES.values() if name == "comparison" else [COMMITTED[name]]:
        shown = measured(records, columns)
        assert markdown(["", *(column.title for column in shown)], cells(records, shown)) in page.read_text()


def test_the_committed_claims_follow_from_the_committed_records():
    of_curves = "rank the methods alike"  # needs the evaluations of snapshots, which are not committed
    scores = {name: Scores("right answers", read_scores(RESULTS / f"{name}-scores.csv")) for name in COMMITTED}
    compared = comparison_claims(committed("comparison"), {}, scores["comparison"])
    entropies = read_scores(RESULTS / "alpha-entropies.csv")
    claims = {
        "table.md": [claim for claim in compared if of_curves not in claim.text],
        "ablations.md": ablation_claims(committed("alpha"), scores["sites"], scores["alpha"], entropies),
    }
    for name, found in claims.items():
        page = (RESULTS / name).read_text()
        for claim in found:
            assert f"| {claim.text} | {claim.answer} | {claim.figures} |" in page


def test_the_committed_records_have_the_means_of_the_committed_scores():
    for name in COMMITTED:
        scores = read_scores(RESULTS / f"{name}-scores.csv")
        for line in committed(name):
            assert line["success/right"] == pytest.approx(scores[line["row"]][line["seed"]].mean(), abs=1e-9)


def test_the_committed_reference_gives_either_answer_in_every_family():
    """Four of five answers are the asked or the counterpart's, about as many of either."""
    (shares,) = re.findall(r"- SFT's answers.*?: (.*)", (RESULTS / "table.md").read_text())
    found = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) / (\d+)", shares)]
    assert len(found) == 8
    for right, other in found:
        assert right + other >= 80 and abs(right - other) <= 20


def committed(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
