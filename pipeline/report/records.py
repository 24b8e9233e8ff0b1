"""The results of finished runs: records, means over seeds, curves over training, and the files that hold them.

In: runs of a plan (`plan.py`) and the folders of their steps. Out: one flat record for each run, as JSON lines and CSV;
the cells of a table; curves and arrays for the figures.

Legend: R responses, K ranks, T tokens.
"""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ...cache.files import write_atomically
from ...cache.reader import open_cache
from ...stages.train.methods import METHODS
from ..commands.jobs import Step
from .intervals import BySeed
from .plan import Plan, Run

Record = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: the record's field that it shows.
        title: its header, with the unit.
        scale: the factor from the record's unit to the header's.
        digits: digits after the decimal point.
    """

    key: str
    title: str
    scale: float = 1.0
    digits: int = 3


# The comparison's columns by the table that shows them.
TABLES = {
    "Sampled answers": (
        Column("success/right", "right, %", 100, 1),
        Column("success/win_rate", "win rate against SFT, %", 100, 1),
        Column("success/counterpart", "the counterpart's, %", 100, 1),
        Column("length/finished", "that end, %", 100, 1),
        Column("style/shift", "shift of style"),
        Column("diversity/entropy", "H, nats/token"),
        Column("diversity/repetition", "repeated 4-grams, %", 100, 1),
    ),
    "Accuracy, and distance to the reference": (
        Column("accuracy/raw", "accuracy raw, %", 100, 1),
        Column("accuracy/implicit", "accuracy implicit, %", 100, 1),
        Column("margin/raw", "margin raw, nats/token"),
        Column("margin/implicit", "margin implicit, nats"),
        Column("kl/chosen", "KL chosen, nats"),
        Column("kl/rejected", "KL rejected, nats"),
        Column("kl/margin", "KL margin, nats"),
        Column("features/mse_chosen", "feature MSE chosen"),
        Column("features/mse_rejected", "feature MSE rejected"),
        Column("features/mse_margin", "feature MSE margin"),
    ),
    "Cost of training": (
        Column("train/peak_memory_bytes", "peak memory of tensors, MB", 1e-6, 1),
        Column("train/tokens_per_second", "tokens/s", 1, 0),
        Column("train/seconds", "training, s", 1, 1),
    ),
}
COLUMNS = tuple(column for columns in TABLES.values() for column in columns)
# What a judge adds, where there is one.
JUDGED = (
    Column("judge/win_rate", "win rate against SFT by the judge, %", 100, 1),
    Column("judge/controlled", "the same, length-controlled, %", 100, 1),
    Column("judge/unparsed", "replies without a verdict, %", 100, 1),
)
ABLATION_COLUMNS = (
    *(column for column in COLUMNS[:6] if column.key != "success/counterpart"),
    Column("accuracy/raw", "accuracy raw, %", 100, 1),
    Column("kl/chosen", "KL chosen, nats"),
    Column("kl/rejected", "KL rejected, nats"),
    Column("features/mse_constrained", "feature MSE, constrained sites"),
    Column("features/mse_others", "feature MSE, other sites"),
)


def read_record(run: Run, evaluation: Step) -> Record:
    """One run's settings, metrics and training cost.

    Returns:
        `row`, `label`, `seed`, `method` and settings; each metric's mean under its name, and the ends of its confidence
        interval as `… low` and `… high`; and, except for the reference, `train/…`, the cost of the training.
    """
    record: Record = {"row": run.row, "label": run.label, "seed": run.seed, "method": run.method}
    if run.train is not None:
        settings = ("lr", "beta", "alpha", "gamma", "kl_beta", "stop_gradient")
        config = run.train.config
        record |= METHODS[config.method].defaults
        record |= {name: value for name in settings if (value := getattr(config, name)) is not None}
        record |= training_cost(run.train.out)
    for name, value in json.loads((evaluation.out / "metrics.json").read_text())["metrics"].items():
        record[name] = value["mean"]
        record |= {f"{name} {end}": value[end] for end in ("low", "high") if end in value}
    return record


def mse_by_site(record: Record, constrained: Sequence[str]) -> Record:
    """Feature MSE of an evaluation at several sites: the mean over the constrained ones, and over the others if any."""
    prefix = "features/mse "
    found = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
    sites = {key: value for key, value in found.items() if " " not in key}  # without the ends of their intervals
    parts = {
        "constrained": [value for site, value in sites.items() if site in constrained],
        "others": [value for site, value in sites.items() if site not in constrained],
    }
    return {f"features/mse_{name}": statistics.fmean(values) for name, values in parts.items() if values}


def measured(records: Sequence[Record], columns: Sequence[Column]) -> list[Column]:
    """The columns of which some record has a value."""
    return [column for column in columns if any(record.get(column.key) is not None for record in records)]


def pair_wins(evaluation: Path) -> NDArray[np.float64]:
    """Whether the chosen response has the higher mean token log-probability, ties one half; one a held-out pair."""
    table = pq.read_table(evaluation / "pairs.parquet")
    chosen_N, rejected_N = (
        table[f"{side}_logp"].to_numpy() / table[f"{side}_tokens"].to_numpy() for side in ("chosen", "rejected")
    )
    return np.asarray(np.heaviside(chosen_N - rejected_N, 0.5))


def read_samples(evaluation: Path) -> list[dict[str, Any]]:
    """The sampled answers of an evaluation, a line each; what Unicode calls a line's end may stand inside an answer."""
    with (evaluation / "samples.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def entropy_of_prompts(evaluation: Path) -> NDArray[np.float64]:
    """H of each prompt's sampled answers, nats a token: the mean over answers of -log π_θ(y|x) / |y|."""
    found: dict[str, list[float]] = {}
    for sample in read_samples(evaluation):
        found.setdefault(sample["prompt"], []).append(-sample["logp"] / sample["tokens"])
    return np.array([statistics.fmean(values) for values in found.values()])


def training_cost(run: Path) -> Record:
    """Steps, seconds, tokens per second and peak memory in bytes, from the run's own `metrics.jsonl`."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "train_runtime" in line)
    return {
        "train/steps": last["step"],
        "train/seconds": last["train_runtime"],
        "train/tokens_per_second": last["train_tokens_per_second"],
        "train/peak_memory_bytes": last["train_peak_memory_bytes"],
    }


def by_row(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each row; rows in the order in which they first appear."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["row"], []).append(record)
    return rows


def mean_and_deviation(records: Sequence[Record], key: str) -> tuple[float, float] | None:
    """Mean and sample standard deviation over seeds (0 for one seed); None where no record has the key."""
    values = [record[key] for record in records if record.get(key) is not None]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cells(records: Sequence[Record], columns: Sequence[Column]) -> list[list[str]]:
    """A table's body: for each row its label, then `mean ± deviation` for each column, or an en dash without values."""
    body = []
    for row in by_row(records).values():
        line = [row[0]["label"]]
        for column in columns:
            found = mean_and_deviation(row, column.key)
            if found is None:
                line.append("–")
                continue
            mean, deviation = (f"{column.scale * value:z.{column.digits}f}" for value in found)
            line.append(f"{mean} ± {deviation}" if len(row) > 1 else mean)
        body.append(line)
    return body


def write_records(records: Sequence[Record], columns: Sequence[Column], folder: Path, name: str) -> None:
    """Writes `name.jsonl`, one line for each run, and `name.csv`, one row with mean and deviation of each column."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(folder / f"{name}.jsonl", lines.encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "label", "seeds", *(f"{c.key} {what}" for c in columns for what in ("mean", "sd"))])
    for row, runs in by_row(records).items():
        values = [mean_and_deviation(runs, column.key) or ("", "") for column in columns]
        writer.writerow([row, runs[0]["label"], len(runs), *(number for pair in values for number in pair)])
    write_atomically(folder / f"{name}.csv", text.getvalue().encode())


def write_scores(rows: Mapping[str, BySeed], path: Path) -> None:
    """Writes one line for each row and seed with a number for each prompt, from which all intervals follow."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row, by_seed in rows.items():
        for seed, values_P in by_seed.items():
            writer.writerow([row, seed, *(f"{value:.6g}" for value in values_P)])
    write_atomically(path, text.getvalue().encode())


def read_scores(path: Path) -> dict[str, dict[int, NDArray[np.float64]]]:
    """What `write_scores` wrote."""
    rows: dict[str, dict[int, NDArray[np.float64]]] = {}
    for row, seed, *values in csv.reader(path.read_text().splitlines()):
        rows.setdefault(row, {})[int(seed)] = np.array(values, np.float64)
    return rows


@dataclass(frozen=True)
class Curve:
    """One method's distance to the reference on held-out pairs over training. All lists have the same length.

    Attributes:
        method: the row of the comparison.
        step: optimiser steps, ascending; step 0 is the reference, whose distances are 0.
        chosen: sequential KL on chosen responses, nats per response.
        rejected: sequential KL on rejected responses, nats per response.
        margin: |rejected - chosen|, nats per response.
        mse_chosen: feature MSE D_F on chosen responses, squared activation.
        mse_rejected: feature MSE D_F on rejected responses, squared activation.
    """

    method: str
    step: list[int]
    chosen: list[float]
    rejected: list[float]
    margin: list[float]
    mse_chosen: list[float]
    mse_rejected: list[float]

    @property
    def kl(self) -> dict[int, float]:
        """Mean KL of chosen and rejected responses, by step."""
        return {step: (a + b) / 2 for step, a, b in zip(self.step, self.chosen, self.rejected, strict=True)}

    @property
    def mse(self) -> dict[int, float]:
        """Mean feature MSE of chosen and rejected responses, by step."""
        return {step: (a + b) / 2 for step, a, b in zip(self.step, self.mse_chosen, self.mse_rejected, strict=True)}


def curves_of(snapshots: Mapping[Run, Mapping[int, Step]]) -> list[Curve]:
    """KL and feature MSE over training. `snapshots` holds each run's evaluation steps by optimiser step."""
    curves = []
    for run, evaluations in snapshots.items():
        points = {0: {"kl/chosen": 0.0, "kl/rejected": 0.0, "features/mse_chosen": 0.0, "features/mse_rejected": 0.0}}
        points |= {step: read_record(run, evaluation) for step, evaluation in sorted(evaluations.items())}
        at = {key: [float(point[key]) for point in points.values()] for key in points[0]}
        margin = [abs(a - b) for a, b in zip(at["kl/rejected"], at["kl/chosen"], strict=True)]
        kl = (at["kl/chosen"], at["kl/rejected"], margin)
        curves.append(Curve(run.row, list(points), *kl, at["features/mse_chosen"], at["features/mse_rejected"]))
    return curves


def rank_correlations(curves: Sequence[Curve]) -> dict[int, float]:
    """Spearman's rank correlation of KL and feature MSE across methods, at each step that all curves share.

    Each step is ranked on its own: over time both quantities grow under every method, so pooled steps would correlate
    regardless of the methods. The reference (SFT) has no curve: it would be last in both by construction.

    Returns:
        Correlation by step (scipy.stats.spearmanr; ties take their mean rank). A step at which all methods have equal
        KL or equal MSE, as step 0, has no ranks and no entry.
    """
    from scipy.stats import spearmanr

    found = {}
    for step in sorted(set.intersection(*(set(curve.step) for curve in curves))):
        kl, mse = [curve.kl[step] for curve in curves], [curve.mse[step] for curve in curves]
        if len(set(kl)) > 1 and len(set(mse)) > 1:
            found[step] = float(spearmanr(kl, mse).statistic)
    return found


@dataclass(frozen=True, eq=False)
class Tokens:
    """One method's KL and feature change per token, for Appendix B's bound `KL <= (M²/2) ‖Δc‖²`.

    Attributes:
        method: the row of the comparison.
        kl_T: forward KL to the reference, nats; rounding may leave it slightly below 0.
        feature_sq_T: ‖Δc‖² over all features of the last layer, squared activation.
        spectral_norm: M = ‖W_out^T W_dec^T‖₂, logits per activation.
    """

    method: str
    kl_T: NDArray[np.float64]
    feature_sq_T: NDArray[np.float64]
    spectral_norm: float

    @property
    def bound_T(self) -> NDArray[np.float64]:
        """The bound (M²/2) ‖Δc‖², float64, nats."""
        return 0.5 * self.spectral_norm**2 * np.asarray(self.feature_sq_T, np.float64)

    @property
    def share_violated(self) -> float:
        """Share of tokens whose KL exceeds the bound."""
        return float(np.mean(np.asarray(self.kl_T, np.float64) > self.bound_T))


def bound_tokens(plan: Plan, runs: Sequence[Run], records: Sequence[Record], rows: Sequence[str]) -> list[Tokens]:
    """KL and feature change of held-out tokens after training, for the given rows under the first seed."""
    found = []
    for run, record in zip(runs, records, strict=True):
        if run.row in rows and run.seed == plan.config.seeds[0]:
            table = pq.read_table(plan.evaluation(run).out / "tokens.parquet")
            squares = table["feature_sq"].to_numpy()
            found.append(Tokens(run.row, table["kl"].to_numpy(), squares, record["bound/spectral_norm"]))
    return found


def ranked_activations(plan: Plan) -> NDArray[np.float64]:
    """Pooled activations of held-out responses at the first site, [R, K]: descending in each row, padded with 0."""
    (site, *_) = plan.evaluation(Run("sft", "SFT", plan.config.seeds[0], None)).config.site
    cache = open_cache(plan.heldout_cache.out, sites=[site], trust_hashes=True)
    responses = [side for i in range(len(cache)) for side in (cache[i].chosen, cache[i].rejected)]
    rows = [np.sort(side.features[0].values)[::-1] for side in responses]
    ranked_RK = np.zeros((len(rows), max(len(row) for row in rows)))
    for target, row in zip(ranked_RK, rows, strict=True):
        target[: len(row)] = row
    return ranked_RK
