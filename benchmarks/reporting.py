"""What every benchmark says: tables on the terminal, and the same as JSON with what is needed to measure them again.

In: tables, as lists of rows. Out: Markdown, and `results/benchmarks/NAME.json` with the command, hardware and versions.
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

import psutil
import torch
from fpo.pipeline.report import page

from .measuring import Result

PACKAGES = ("torch", "transformers", "trl", "sae-lens", "accelerate", "pyarrow")


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is removed at the end, in which also the caches are decoded."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("FPO_HOME")
        os.environ["FPO_HOME"] = str(Path(folder) / "home")
        try:
            yield Path(folder)
        finally:
            os.environ.pop("FPO_HOME")
            if before is not None:
                os.environ["FPO_HOME"] = before


def parser_of(document: str | None, name: str) -> argparse.ArgumentParser:
    """A command line with what every benchmark has: where the report goes and the device."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(f"results/benchmarks/{name}.json"), help="the report")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    return parser


def report(options: argparse.Namespace, tables: Mapping[str, Sequence[Result]], **about: Any) -> None:
    """Prints tables as Markdown and writes them as JSON, with what is needed to run them again.

    Args:
        options: the command line, with `json`.
        tables: by title, rows of equal keys; keys that begin with `_` are written and not printed.
        about: what else belongs into the file.
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
    """Rows as a Markdown table: numbers with three significant digits."""
    names = [name for name in rows[0] if not name.startswith("_")]
    return page.markdown(names, [[_text(row.get(name)) for name in names] for row in rows]).rstrip()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def hardware() -> Result:
    """What the figures were measured on."""
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
