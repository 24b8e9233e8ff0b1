"""What a comparison found, as records and as tables.

In: finished runs (`plan.py`). Out: one flat record a run, means and standard deviations over seeds, and those written
as JSON lines, CSV and Markdown.
"""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.files import write_atomically
from ...stages.train.methods import METHODS
from .jobs import Step
from .plan import Run

Record = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the record.
        title: its header, with the unit.
        scale: what the record's value is multiplied by.
        digits: after the decimal point.
    """

    key: str
    title: str
    scale: float = 1.0
    digits: int = 3


ACCURACY, ENTROPY = Column("accuracy/raw", "accuracy raw, %", 100, 1), Column("diversity/entropy", "H, nats/token")
COLUMNS = (
    ACCURACY,
    Column("accuracy/implicit", "accuracy implicit, %", 100, 1),
    ENTROPY,
    Column("length/finished", "answers that end, %", 100, 0),
    Column("kl/chosen", "KL chosen, nats"),
    Column("kl/rejected", "KL rejected, nats"),
    Column("kl/margin", "KL margin, nats"),
    Column("features/mse_chosen", "feature MSE chosen"),
    Column("features/mse_rejected", "feature MSE rejected"),
    Column("features/mse_margin", "feature MSE margin"),
    Column("train/peak_memory_bytes", "peak memory of tensors, MB", 1e-6, 1),
    Column("train/tokens_per_second", "tokens/s", 1, 0),
    Column("train/seconds", "training, s", 1, 1),
)
COSTS = tuple(column for column in COLUMNS if column.key.startswith("train/"))


def read_record(run: Run, evaluation: Step) -> Record:
    """One run's settings, metrics and cost.

    Returns:
        `row`, `label`, `seed`, `method` and settings; each metric's mean under its name, and `… low`, `… high`;
        `train/…` of the training run. The reference has no training.
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


def training_cost(run: Path) -> Record:
    """Peak memory, tokens per second and time, as the run itself logged them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "train_runtime" in line)
    return {
        "train/steps": last["step"],
        "train/seconds": last["train_runtime"],
        "train/tokens_per_second": last["train_tokens_per_second"],
        "train/peak_memory_bytes": last["train_peak_memory_bytes"],
    }


def by_row(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each row, in the order of their first appearance."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["row"], []).append(record)
    return rows


def mean_and_deviation(records: Sequence[Record], key: str) -> tuple[float, float] | None:
    """Mean and sample standard deviation over seeds (0 for one seed); None where the row does not have it."""
    values = [record[key] for record in records if record.get(key) is not None]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cells(records: Sequence[Record], columns: Sequence[Column]) -> list[list[str]]:
    """The table's body: a label, then `mean ± deviation` a column, or an en dash."""
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


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_records(records: Sequence[Record], columns: Sequence[Column], folder: Path, name: str) -> None:
    """Writes `name.jsonl`, a line a run, and `name.csv`, mean and deviation a row."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(folder / f"{name}.jsonl", lines.encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "label", "seeds", *(f"{c.key} {what}" for c in columns for what in ("mean", "sd"))])
    for row, runs in by_row(records).items():
        values = [mean_and_deviation(runs, column.key) or ("", "") for column in columns]
        writer.writerow([row, runs[0]["label"], len(runs), *(number for pair in values for number in pair)])
    write_atomically(folder / f"{name}.csv", text.getvalue().encode())
