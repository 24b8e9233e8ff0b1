"""`fpo table` and `fpo tune` over runs whose numbers are made up: what they show can then be told from what it is of.

In: a profile of tiny_profile.py. Out: what the command wrote and said, every run with its numbers, every figure as
matplotlib has it. The steps of a plan are not run: `Fabricated` writes what they would have left.
"""

import csv
import json
import shutil
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from fpo.pipeline.commands.jobs import Step
from fpo.pipeline.config import AlignConfig, EvaluateConfig
from fpo.pipeline.report import run as table
from fpo.pipeline.report import tune
from matplotlib.figure import Figure
from seams.lab import Lab
from tiny_profile import tiny_profile
from tiny_world import World, fpo

# Key of the table -> method, and whether α is 0; the reference is of no method.
ROWS = {
    **{"SFT": (None, False), "DPO": ("dpo", False), "TDPO-1": ("tdpo1", False), "TDPO-2": ("tdpo2", False)},
    **{"SimPO": ("simpo", False), "SimPO+KL": ("simpo-kl", False), "FPO": ("fpo", False), "FPO α=0": ("fpo", True)},
}


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One model that was measured.

    Attributes:
        config: of the evaluation.
        training: of the training; None for the reference.
        step: of the snapshot; None at the end.
        metrics: what was found.
        cost: what training took.
        tokens: KL and squared feature change of each token.
        said: the first answer to each prompt, a digit.
    """

    config: EvaluateConfig
    training: AlignConfig | None
    step: int | None
    metrics: dict[str, float]
    cost: dict[str, float]
    tokens: dict[str, np.ndarray[Any, Any]]
    said: list[int]

    @property
    def seed(self) -> int:
        return self.config.seed if self.training is None else self.training.seed

    @property
    def label(self) -> str:
        """The table's row: by what was trained, not by what anybody calls it."""
        method = None if self.training is None else self.training.method
        key = (method, self.training is not None and self.training.alpha == 0)
        return next(label for label, row in ROWS.items() if row == key)


@dataclass
class Fabricated:
    """Stands in for `run_steps`: every step leaves what it would have left, with numbers of its own."""

    world: World
    steps: list[Step] = field(default_factory=list)
    jobs: list[int] = field(default_factory=list)
    evaluated: list[Evaluated] = field(default_factory=list)
    costs: dict[Path, dict[str, float]] = field(default_factory=dict)

    def run_steps(self, steps: Sequence[Step], jobs: int) -> None:
        self.jobs.append(jobs)
        for step in steps:
            if step.done:
                continue
            assert all((need / "step.json").exists() for need in step.needs)
            {"precompute": self.precompute, "align": self.align, "evaluate": self.evaluate}[step.command](step)
            self.steps.append(step)
            (step.out / "step.json").write_text(json.dumps({"command": step.command, "seconds": 1.0}))

    def precompute(self, step: Step) -> None:
        training = step.config.split.startswith("train")
        shutil.copytree(self.world.cache if training else self.world.eval_cache, step.out)

    def align(self, step: Step) -> None:
        steps = step.config.max_steps or 0
        for number in range(1, steps) if step.config.snapshot_steps else ():
            (step.out / "snapshots" / f"step-{number:06d}").mkdir(parents=True)
        step.out.mkdir(parents=True, exist_ok=True)
        rng = generator(step.out.name)
        cost = {
            "train_runtime": round(rng.uniform(2, 9), 2),
            "train_tokens_per_second": round(rng.uniform(100, 900), 1),
            "train_peak_memory_bytes": int(rng.integers(10**7, 10**8)),
            "train_peak_process_bytes": int(rng.integers(10**9, 10**10)),
        }
        self.costs[step.out] = cost
        lines = [{"step": 1, "loss": 0.7}, {"step": steps, **cost, "train_loss": 0.5}]
        (step.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def evaluate(self, step: Step) -> None:
        config, model = step.config, Path(str(step.config.model))
        snapshot = int(model.name.removeprefix("step-")) if model.parent.name == "snapshots" else None
        trained = model.parent.parent if snapshot else model
        training = next((done.config for done in self.steps if done.command == "align" and done.out == trained), None)
        rng = generator(step.out.name)
        metrics = {"accuracy/raw": rng.uniform(0.2, 0.9), "margin/raw": rng.uniform(0.2, 0.9)}
        if training is not None:
            metrics |= {"accuracy/implicit": rng.uniform(0.2, 0.9), "margin/implicit": rng.uniform(1, 9)}
        if config.prompts:
            metrics |= {"diversity/entropy": rng.uniform(1, 3), "diversity/repetition": rng.uniform(0.1, 0.9)}
            metrics |= {"length/mean": rng.uniform(5, 30), "length/finished": rng.uniform(0.1, 0.9)}
        if len(config.site) > 1:
            metrics |= {f"features/mse {site}": rng.uniform(1, 9) for site in config.site}
        for name in ("kl/", "features/mse_"):
            metrics |= {f"{name}{side}": rng.uniform(1, 9) for side in ("chosen", "rejected", "margin")}
        metrics |= {"features/miss_rate": rng.uniform(0, 1)}
        metrics |= {"bound/violations": rng.uniform(0, 1), "bound/spectral_norm": rng.uniform(1, 2)}
        tokens = {name: rng.lognormal(0, 2, 400).astype(np.float32) for name in ("kl", "feature_sq")}
        step.out.mkdir(parents=True)
        document = {name: {"mean": value, "low": value - 0.1, "high": value + 0.1} for name, value in metrics.items()}
        (step.out / "metrics.json").write_text(json.dumps({"metrics": document, "pairs": 7}))
        pq.write_table(pa.table(tokens), step.out / "tokens.parquet")
        pairs = {f"{side}_logp": rng.uniform(-9, -1, 7) for side in ("chosen", "rejected")}
        pairs |= {f"{side}_tokens": rng.integers(1, 9, 7) for side in ("chosen", "rejected")}
        pq.write_table(pa.table(pairs), step.out / "pairs.parquet")
        samples = [
            {"prompt": f"{n % 3}", "sample": f"{rng.integers(0, 9)}", "logp": rng.uniform(-9, -1), "tokens": 4}
            for n in range(6)
        ]
        (step.out / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        cost = self.costs.get(trained, {})
        said = [int(sample["sample"]) for sample in samples[:3]]
        self.evaluated.append(Evaluated(config, training, snapshot, metrics, cost, tokens, said))


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a command made of made-up runs."""

    folder: Path
    result: Result
    fabricated: Fabricated
    figures: list[Figure]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def ends(self, label: str, name: str) -> list[float]:
        """A number of every seed's run at its end: a metric, or a cost by its name in the log."""
        runs = [one for one in self.fabricated.evaluated if one.step is None and one.label == label]
        return [(one.metrics | one.cost)[name] for one in runs if name in one.metrics | one.cost]

    def csv(self, name: str) -> list[dict[str, str]]:
        return list(csv.DictReader((self.out / name).read_text().splitlines()))

    def figure(self, title: str) -> Figure:
        """The figure one of whose panels has this title."""
        found = [figure for figure in self.figures if any(title in axes.get_title(loc="left") for axes in figure.axes)]
        return found[0]


def compare(
    lab: Lab, command: str, *flags: object, table_section: dict[str, Any] | None = None, **profile: Any
) -> Comparison:
    """`fpo table` or `fpo tune` with changes of the profile, in a folder of its own; a call is made once."""
    key = repr((command, flags, table_section, sorted(profile.items())))
    if key not in lab.compared:
        lab.compared[key] = _compare(lab, command, *flags, table_section=table_section, **profile)
    found: Comparison = lab.compared[key]
    return found


def _compare(
    lab: Lab, command: str, *flags: object, table_section: dict[str, Any] | None = None, **profile: Any
) -> Comparison:
    folder = lab.new(command)
    path = tiny_profile(lab.world, folder, table=table_section, **profile)
    fabricated, figures = Fabricated(lab.world), list[Figure]()

    def savefig(self: Figure, file: Any, **kwargs: Any) -> None:
        """Keeps the figure; drawing it takes seconds, and is tested in test_figures.py."""
        if not any(self is known for known in figures):
            figures.append(self)
        file.write(b'<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt" viewBox="0 0 9 9"></svg>')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        for module in (table, tune):
            patch.setattr(module, "run_steps", fabricated.run_steps)
        places = ["--runs", folder / "runs", "--out", folder / "out"]
        places = [part for part in places if not {"--runs", "--out"} & set(flags)]
        result = fpo(command, "--config", path, *places, *flags)
    return Comparison(folder, result, fabricated, figures)


def shown(comparison: Comparison, name: str = "table.md", number: int = 0) -> list[dict[str, str]]:
    """The rows of a Markdown file's table, by column title."""
    tables: list[list[str]] = [[]]
    for line in (comparison.out / name).read_text().splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in tables[number])
    return [dict(zip(header, cells, strict=True)) for cells in body]


def assert_cell(cell: str, values: Sequence[float], scale: float) -> None:
    """`mean ± deviation` over seeds, or the one value, in the column's unit; a dash where there is none."""
    if not values:
        assert cell == "–"
        return
    wanted = [float(np.mean(values)) * scale]
    if len(values) > 1:
        wanted.append(float(np.std(values, ddof=1)) * scale)
    parts = cell.split(" ± ")
    assert len(parts) == len(wanted), cell
    for part, value in zip(parts, wanted, strict=True):
        digits = len(part.partition(".")[2])
        assert abs(float(part) - value) <= 0.5000001 * 10**-digits, (cell, value)
    # Of the mean something has to show; a deviation may be less than the last digit, where two seeds agree by chance.
    digits = len(parts[0].partition(".")[2])
    assert abs(float(parts[0])) >= 10**-digits, f"{cell} shows nothing of {wanted[0]}"


def distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
