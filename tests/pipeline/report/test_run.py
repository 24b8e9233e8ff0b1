"""`fpo table` on the tiny world: one whole run that the tests share, and slow ones that repeat and interrupt it."""

import csv
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from fpo.pipeline.config_files import load_config, write_yaml
from fpo.pipeline.report import run as report
from fpo.pipeline.report.plan import ROWS, Plan, Run, make_plan
from fpo.pipeline.report.records import COLUMNS, TABLES, Curve, Tokens, read_record
from fpo.pipeline.report_config import TableConfig
from fpo.pipeline.world import world as embedded
from matplotlib.image import imread
from tiny_profile import COSTS, NAMES, tiny_profile
from tiny_world import files, fpo, metrics, ran
from transformers import AutoModelForCausalLM

# What only the rule of the embedded world can measure.
JUDGED = {"success/right", "success/win_rate", "success/counterpart", "style/shift"}
FIGURES = ("headline", "figure-2-left", "figure-3", "figure-4-left", "figure-4-right", "kl-against-mse", "token-bound")


@dataclass(frozen=True)
class Made:
    """A profile, its runs and its results."""

    folder: Path
    name: str = "tiny"

    @property
    def profile(self) -> Path:
        return self.folder / f"{self.name}.yaml"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def out(self) -> Path:
        return self.folder / "results" / self.name

    @property
    def arguments(self) -> list[object]:
        return ["table", "--config", self.profile, "--runs", self.runs, "--out", self.out]

    def table(self, *more: str) -> Result:
        return fpo(*self.arguments, *more)

    @property
    def plan(self) -> Plan:
        return make_plan(str(self.profile), load_config(TableConfig, str(self.profile), {"runs": self.runs}))

    def evaluations(self) -> list[tuple[Run, dict[str, float]]]:
        """What each run's evaluation wrote: the mean of each metric."""
        found = []
        for run in self.plan.comparison():
            document = json.loads((self.plan.evaluation(run).out / "metrics.json").read_text())
            found.append((run, {name: value["mean"] for name, value in document["metrics"].items()}))
        return found

    def csv(self, name: str = "comparison") -> dict[str, dict[str, str]]:
        lines = csv.DictReader((self.out / f"{name}.csv").read_text().splitlines())
        return {line["row"]: line for line in lines}

    def steps(self) -> dict[str, int]:
        """When each step was done."""
        return {path.parent.name: path.stat().st_mtime_ns for path in self.runs.glob("*/step.json")}


@pytest.fixture(scope="module")
def made(world, tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("table")
    tiny_profile(world, folder)
    found = Made(folder)
    ran(found.table())
    return found


def test_all_that_is_promised_is_there(made):
    assert set(files(made.out)) == {
        *(f"comparison{end}" for end in (".csv", ".jsonl", "-scores.csv")),
        *(f"table.{end}" for end in ("md", "html")),
        *(f"figures/{name}.{end}" for name in FIGURES for end in ("png", "svg")),
    }


@pytest.mark.parametrize("name", FIGURES)
def test_no_figure_is_blank(made, name):
    pixels = imread(made.out / "figures" / f"{name}.png")[..., :3]
    assert (pixels != pixels[0, 0]).any(axis=-1).mean() > 0.01
    assert (made.out / "figures" / f"{name}.svg").read_text().count("<path") > 10


def test_the_csv_holds_what_the_evaluations_measured(made):
    lines = made.csv()
    assert list(lines) == list(ROWS)
    for run, values in made.evaluations():
        line = lines[run.row]
        assert (line["seeds"], line["label"]) == ("1", run.label)
        for column in COLUMNS:
            if column.key.startswith("train/"):
                continue
            cell = line[f"{column.key} mean"]
            assert (cell == "") == (column.key not in values)
            if cell:
                assert float(cell) == values[column.key] and float(line[f"{column.key} sd"]) == 0


def test_every_run_is_measured_by_every_metric_that_is_defined_for_it(made):
    for row, line in made.csv().items():
        missing = {key.split(" ")[0] for key, value in line.items() if value == ""} - JUDGED
        undefined = {"accuracy/implicit", "margin/implicit", *COSTS} if row == "sft" else set()
        assert missing == undefined


def test_costs_are_those_that_the_runs_logged(made):
    lines = made.csv()
    for run in made.plan.comparison():
        if run.train is None:
            continue
        logged = next(line for line in metrics(run.train.out) if "train_runtime" in line)
        line = lines[run.row]
        assert float(line["train/seconds mean"]) == logged["train_runtime"] > 0
        assert float(line["train/tokens_per_second mean"]) == logged["train_tokens_per_second"] > 0
        assert float(line["train/peak_memory_bytes mean"]) == logged["train_peak_memory_bytes"] > 0


def shown_rows(text: str) -> dict[str, list[str]]:
    """The first tables of the Markdown file or of the page, side by side, by label."""
    if text.startswith("<!"):
        bodies = [re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL) for part in text.split("</table>")]
        tables = [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows] for rows in bodies]
    else:
        parts = [part.strip().splitlines() for part in text.split("**")[2::2]]
        tables = [[line.strip().strip("|").split("|") for line in part if line.startswith("|")] for part in parts]
    found: dict[str, list[str]] = {}
    for table in tables[: len(TABLES)]:
        for label, *cells in table[0 if text.startswith("<!") else 2 :]:
            found.setdefault(label.strip(), []).extend(cell.strip() for cell in cells)
    return found


@pytest.mark.parametrize("name", ["table.md", "table.html"])
def test_page_and_markdown_show_the_numbers_of_the_csv(made, name):
    shown = shown_rows((made.out / name).read_text())
    for line in made.csv().values():
        expected = []
        for column in COLUMNS:
            if column.key in JUDGED:
                continue
            mean = line[f"{column.key} mean"]
            expected.append(f"{column.scale * float(mean):z.{column.digits}f}" if mean else "–")
        assert shown[line["label"]] == expected


def test_the_json_lines_have_every_run_with_its_settings(made):
    records = {r["row"]: r for r in map(json.loads, (made.out / "comparison.jsonl").read_text().splitlines())}
    assert list(records) == list(ROWS)
    assert records["fpo-alpha0"]["alpha"] == 0 and records["fpo"]["alpha"] == 0.5
    assert {record["train/steps"] for row, record in records.items() if row != "sft"} == {2}
    assert {record["seed"] for record in records.values()} == {0}


def test_claims_and_facts_stand_below_the_table(made):
    text = (made.out / "table.md").read_text()
    assert "**The paper's claims**" in text and "| cannot tell |" in text  # one seed has no deviation
    for fact in ("- Command: ", "- Hardware: ", "- Versions: Python ", "- Settings: ", "- Time: "):
        assert fact in text
    assert "paper:" not in text  # the paper has no figures of this model


def test_the_time_is_that_of_every_step_once(made):
    steps = [json.loads(path.read_text())["seconds"] for path in made.runs.glob("*/step.json")]
    found = re.search(r"- Time: (\d+) s over (\d+) steps", (made.out / "table.md").read_text())
    assert found is not None
    assert (int(found[1]), int(found[2])) == (round(sum(steps)), len(steps))
    # Two caches, seven trainings; eight ends and the first step of seven are evaluated.
    assert len(steps) == 2 + 7 + 8 + 7


def test_runs_are_as_different_as_their_methods(made):
    ends = {run.row: measured["kl/chosen"] for run, measured in made.evaluations()}
    assert ends.pop("sft") == 0
    assert len(set(ends.values())) == len(ends) and min(ends.values()) > 0


def test_a_second_call_runs_nothing_and_writes_the_same_bytes(made):
    before, done = files(made.out), made.steps()
    started = time.process_time()
    ran(made.table())
    assert made.steps() == done and files(made.out) == before
    assert time.process_time() - started < 30


def test_a_dry_run_writes_nothing_and_prints_every_step(world, tmp_path):
    tiny_profile(world, tmp_path)
    fresh, before = Made(tmp_path), files(tmp_path)
    said = " ".join(ran(fresh.table("--dry-run")).output.split())
    assert files(tmp_path) == before and not fresh.runs.exists() and not fresh.out.exists()
    plan = fresh.plan
    labels = {f"{command} {run.label}" for run in plan.comparison() for command in ("align", "evaluate")}
    for label in labels - {"align SFT"}:
        assert label in said
    assert "precompute train_prefs" in said and "precompute test_prefs" in said
    assert "17 to do, 0 done" in said and "missing" not in said
    of_two_seeds = fresh.table("--dry-run", "--seeds", "3", "--seeds", "4")
    assert f"{17 + 7 + 8} to do, 0 done" in " ".join(ran(of_two_seeds).output.split())
    parameters = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(world.gemma).parameters())
    (line,) = re.findall(r"align DPO \|.*?\| (\d+) MB", said)
    assert int(line) == round(16 * parameters / 1e6)


def test_a_dry_run_tells_what_is_done(made):
    assert "0 to do, 17 done" in ran(made.table("--dry-run")).output


def test_a_dry_run_of_the_embedded_world_plans_it_and_does_not_make_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(embedded, "build", lambda folder: pytest.fail(f"{folder} was made"))
    arguments = [
        "table",
        "--config",
        "embedded",
        "--runs",
        tmp_path / "runs",
        "--out",
        tmp_path / "results",
        "--dry-run",
    ]
    said = " ".join(ran(fpo(*arguments)).output.split())
    assert "the embedded world does not exist yet; the first steps make it, once" in said
    assert "train the model" in said and "train-sae 2 resid_post" in said and "align FPO α=0 ×3" in said
    assert "54 to do, 0 done" in said and "missing" not in said
    assert not [path for path in tmp_path.rglob("*") if "embedded" in path.name or path.name in ("runs", "results")]


def test_figures_of_one_seed_say_which(made, tmp_path):
    plan = made.plan
    three = replace(plan, config=plan.config.model_copy(update={"seeds": (4, 5, 6)}))
    runs = plan.comparison()
    records = [read_record(run, plan.evaluation(run)) for run in runs]
    curves = [
        Curve(run.row, [0, 1], [0.0, 1.0 + n], [0.0, 2.0], [0.0, abs(1.0 - n)], [0.0, 1.0 + n], [0.0, 1.0])
        for n, run in enumerate(runs)
        if run.train
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "ranked_activations", lambda plan: np.ones((2, 60)))
        patch.setattr(report, "bound_tokens", lambda *_: [Tokens("fpo", np.ones(3), np.ones(3), 1.0)])
        drawn = report.comparison_figures(three, [replace(run, seed=4) for run in runs], records, curves, tmp_path)
    of_one = [figure for figure in drawn if "seed 4" in figure.caption]
    assert {figure.caption.split(":")[0] for figure in of_one} == {"Figure 3", "Not in the paper"} and len(of_one) == 3
    for figure in of_one:
        assert "seed 4 alone" in figure.svg
    assert not any("seed 4" in figure.svg for figure in drawn if figure not in of_one)


def test_what_is_missing_is_told_before_anything_is_written(world, tmp_path):
    tiny_profile(world, tmp_path, dataset=str(tmp_path / "nowhere.jsonl"))
    before = files(tmp_path)
    result = Made(tmp_path).table()
    assert result.exit_code == 2 and "nowhere.jsonl" in result.stderr and "nothing was started" in result.stderr
    assert files(tmp_path) == before and not Made(tmp_path).out.exists()
    assert f"missing: dataset: expected a file or folder at {tmp_path}/nowhere.jsonl" in fpo(
        *Made(tmp_path).arguments, "--dry-run"
    ).output.replace("\n", "")


# What takes longer.


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory) -> tuple[Made, dict[str, int]]:
    """A table whose process was killed by SIGKILL and that another finished, with the steps that the first had done."""
    table = Made(tmp_path_factory.mktemp("killed"))
    tiny_profile(world, table.folder)
    code = "from fpo.pipeline.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, table.arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(table.steps()) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(3)  # what it had running looks for it every second
    done = table.steps()
    assert not table.out.exists()
    ran(table.table())
    return table, done


@pytest.mark.slow
def test_a_killed_table_goes_on_and_ends_as_one_in_one_go(made, killed):
    table, done = killed
    assert 6 <= len(done) < len(made.steps()) and done.items() <= table.steps().items()
    one, other = (
        {
            row: {key: value for key, value in line.items() if key.split(" ")[0] not in COSTS}
            for row, line in csv.items()
        }
        for csv in (made.csv(), table.csv())
    )
    assert one == other and len(one) == len(ROWS)


@pytest.mark.slow
def test_more_seeds_have_a_spread_and_ablations_use_what_is_there(killed):
    first, _ = killed
    content = yaml.safe_load(first.profile.read_text())
    content["table"]["seeds"] = [0, 1]
    both = Made(first.folder, "both")
    both.profile.write_text(write_yaml(content))
    done = both.steps()
    ran(both.table())
    assert done.items() <= both.steps().items() and len(both.steps()) == len(done) + 7 + 8
    values: dict[str, list[float]] = {}
    for run, found in both.evaluations():
        values.setdefault(run.row, []).append(found["kl/chosen"])
    for row, line in both.csv().items():
        one, other = values[row]
        assert float(line["kl/chosen mean"]) == pytest.approx((one + other) / 2)
        assert float(line["kl/chosen sd"]) == pytest.approx(abs(one - other) / 2**0.5)
        assert (line["kl/chosen sd"] == "0.0") == (row == "sft")

    compared = both.steps()
    ran(both.table("--ablations"))
    assert compared.items() <= both.steps().items()
    # Of twelve rows two are the same run, and two are runs of the comparison. All are evaluated at all sites.
    assert len(both.steps()) == len(compared) + 2 * ((11 - 2) + 11)
    sites, alphas, sums = (both.csv(name) for name in ("sites", "alpha", "layers"))
    assert list(sites) == NAMES and len(alphas) == 9 and list(sums) == ["+".join(NAMES)]
    for line in (sites[NAMES[0]], alphas["α = 0.5, with sg"]):
        compared_line = both.csv()["fpo"]
        common = (line.keys() & compared_line.keys()) - {"row", "label"}
        assert len(common) > 10 and all(line[key] == compared_line[key] for key in common)
    text = (both.out / "ablations.md").read_text()
    for part in ("Table 3, left", "Table 3, right", "Table 7", "The stop-gradient gives", "Later sites give"):
        assert part in text
    assert {"ablations.html", "table.html"} <= set(files(both.out))
