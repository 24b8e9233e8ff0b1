"""Every malformed input that is tried on the command line, and the table of what each is answered with.

In: the tiny world, the files of bad_files.py, the options of bad_options.py. Out: arguments by command, kind and what
is wrong with them. Run as a script it writes `results/reliability/bad_input.md`.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bad_files
import bad_options
from bad_options import Change, Changes
from click.testing import Result
from tiny_world import SITES, World, fpo, make_world, to_arguments

TABLE = Path(__file__).parents[1] / "results" / "reliability" / "bad_input.md"
HEAD = """\
# What malformed inputs are answered with

Each ends with exit code 2, has this one line on standard error, and leaves no file behind. Written by
`python tests/refusals.py`; `tests/reliability/test_bad_input.py` compares it with what the program
says now. `…` stands for the folders of the tests.
"""
PROGRESS = ("it/s]", "examples/s]", "? examples/s]")

# From the world, the bad files and a folder that is not there to arguments of `fpo`.
Case = Callable[[World, Path, Path], list[Any]]


def _sft(world: World, options: dict[str, Any]) -> list[Any]:
    sound = {"model": world.gemma, "dataset": world.data, "max_length": 64, "max_steps": 1, "batch_size": 2}
    return ["sft", *to_arguments(sound | options)]


def _train_sae(world: World, options: dict[str, Any]) -> list[Any]:
    sound = {"model": world.gemma, "dataset": world.data, "site": SITES[0].name, "width": 96, "tokens": 600}
    return ["train-sae", *to_arguments(sound | {"max_length": 64, "max_prompt_length": 32} | options)]


def _evaluate(world: World, options: dict[str, Any]) -> list[Any]:
    sound = {"model": world.gemma, "cache": world.eval_cache, "prompts": 0}
    return ["evaluate", *to_arguments(sound | options)]


COMMANDS: dict[str, Callable[[World, dict[str, Any]], list[Any]]] = {
    "precompute": lambda world, options: world.to_precompute(**options),
    "align": lambda world, options: world.to_align(**options),
    "sft": _sft,
    "train-sae": _train_sae,
    "evaluate": _evaluate,
    "table": lambda world, options: ["table", *to_arguments({"runs": options["out"]} | options)],
    "tune": lambda world, options: ["tune", *to_arguments({"runs": options["out"]} | options)],
}


def _of_files(kind: str, option: str, names: Iterable[str]) -> Changes:
    """The files of one kind, each given for an option."""
    return {name: lambda w, b, path=f"{kind}/{name}": {option: b / path} for name in names}


def _of_scopes() -> Changes:
    return {
        name: lambda w, b, name=name, site=site: {"sae": f"{b}/scopes/{name}.npz{site}"}
        for name, (site, _) in bad_files.SCOPES.items()
    }


def _of_questions() -> Changes:
    def asked(name: str, kind: str) -> Change:
        return lambda w, b: {"cache": None, "prompts": None, "outputs": kind, "questions": b / "questions" / name}

    return {name: asked(name, kind) for name, (kind, _) in bad_files.QUESTIONS.items()}


TABLES: dict[str, tuple[str, Changes]] = {
    "precompute: options": ("precompute", bad_options.PRECOMPUTE),
    "precompute: data sets": ("precompute", _of_files("data", "dataset", bad_files.DATA)),
    "precompute: chat templates": ("precompute", _of_files("templates", "chat_template", bad_files.TEMPLATES)),
    "precompute: models": ("precompute", _of_files("models", "model", bad_files.MODELS)),
    "precompute: SAEs": ("precompute", _of_files("saes", "sae", bad_files.SAES)),
    "precompute: SAEs of Gemma Scope": ("precompute", _of_scopes()),
    "align: options": ("align", bad_options.ALIGN),
    "align: caches": ("align", _of_files("caches", "cache", bad_files.CACHES)),
    "sft: options": ("sft", bad_options.SFT),
    "sft: data sets": ("sft", _of_files("chats", "dataset", bad_files.CHATS)),
    "train-sae: options": ("train-sae", bad_options.TRAIN_SAE),
    "evaluate: options": ("evaluate", bad_options.EVALUATE),
    "evaluate: questions": ("evaluate", _of_questions()),
    "table: options and profiles": ("table", bad_options.TABLE),
    "tune: options and profiles": ("tune", bad_options.TUNE),
}


def _of_command(command: str, change: Change) -> Case:
    return lambda w, b, out: COMMANDS[command](w, {"out": out} | change(w, b))


def _of_path(words: list[str], path: str) -> Case:
    return lambda w, b, out: [*words, b / path]


# By heading and by what is wrong.
CASES: dict[str, dict[str, Case]] = {
    heading: {name: _of_command(command, change) for name, change in changes.items()}
    for heading, (command, changes) in TABLES.items()
} | {
    "config show: configurations": {
        name: _of_path(["config", "show", "--config"], f"configurations/{name}") for name in bad_files.CONFIGURATIONS
    },
    "cache info: caches": {name: _of_path(["cache", "info"], f"caches/{name}") for name in bad_files.CACHES},
    "command line": {name: lambda w, b, out, words=words: words for name, words in bad_options.ARGUMENTS.items()},
}


def said(result: Result) -> list[str]:
    """The lines on standard error, progress bars left out."""
    return [line for line in result.stderr.splitlines() if line.strip() and not line.endswith(PROGRESS)]


def row(name: str, line: str, *folders: Path) -> str:
    """A row of the table; what differs from run to run has one spelling."""
    for folder in sorted(map(str, folders), key=len, reverse=True):
        line = line.replace(folder, "…")
    line = re.sub(r"\b[0-9a-f]{12,64}\b", "(hash)", line)
    line = re.sub(r"\b\d+ bytes", "N bytes", line).replace("|", r"\|")
    line = line.replace(
        "recursion depth exceeded while calling a Python object", "recursion depth exceeded"
    )  # by depth
    return f"| {name} | `` {line} `` |"


def write_table() -> None:
    """Runs every case and writes the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["FPO_HOME"] = f"{scratch}/home"
        world = make_world(folder / "world")
        bad = bad_files.make_bad_files(world, folder / "bad")
        text = HEAD
        for heading, cases in CASES.items():
            text += f"\n## {heading}\n\n| input | message |\n| --- | --- |\n"
            for name, arguments in cases.items():
                lines = said(fpo(*arguments(world, bad, folder / "out")))
                text += row(name, " ".join(lines), world.folder, bad, folder) + "\n"
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(text)


if __name__ == "__main__":
    write_table()
