"""The command line and the report of every benchmark.

In: tables, as lists of rows. Out: Markdown on the terminal, and `results/benchmarks/NAME.json`, which adds the command,
the hardware and the versions, so that the measurement can be repeated.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from fpo.pipeline.report import page

from .measuring import Result

PACKAGES = ("torch", "transformers", "trl", "sae-lens", "accelerate", "pyarrow")


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder, which also holds the decoded caches; processes started inside are offline and quiet."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        with mock.patch.dict(os.environ, quiet, FPO_HOME=str(Path(folder) / "home")):
            yield Path(folder)


def parser_of(document: str | None, name: str) -> argparse.ArgumentParser:
    """A command line with the options of every benchmark: the report's path and the device."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(f"results/benchmarks/{name}.json"), help="the report")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    return parser


def report(options: argparse.Namespace, tables: Mapping[str, Sequence[Result]], **about: Any) -> None:
    """Prints tables as Markdown and writes them as JSON.

    Args:
        options: the command line; `json` is the file to write.
        tables: title to rows, which have equal keys; keys that begin with `_` are written but not printed.
        about: further entries of the file.
    """
    for title, rows in tables.items():
        print(f"\n{title}\n\n{markdown(rows)}")
    spec = sys.modules["__main__"].__spec__
    data = str(getattr(options, "dataset", None))
    words = ["PAIRS" if word == data else word for word in sys.argv[1:]]
    content = {
        "command": " ".join(["python", "-m", spec.name if spec else "benchmarks", *words]),
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        **about,
        "tables": tables,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


def markdown(rows: Sequence[Result]) -> str:
    """Rows as a Markdown table, numbers to three significant digits."""
    names = [name for name in rows[0] if not name.startswith("_")]
    return page.markdown(names, [[_text(row.get(name)) for name in names] for row in rows]).rstrip()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def hardware() -> Result:
    """The machine that measured the figures, and its load."""
    found = {
        "machine": platform.machine(),
        "cpu": page.processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found
