"""README and docs: commands and Python parse, links resolve, and tables are those that commands wrote."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from fpo.pipeline.cli import app
from fpo.pipeline.config_files import COMMANDS, load_config

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
LABELS_OF_TABLE = {"SFT", "DPO", "TDPO-1", "TDPO-2", "SimPO", "SimPO+KL", "FPO", "FPO α=0"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def lines() -> list[str]:
    """Every command line of a block of commands, its comment cut off and its ellipsis left out."""
    text = "".join(block.replace("\\\n", " ") for page in PAGES for block in blocks(page, "", "sh"))
    return sorted({line.split("  #")[0].replace("…", "").strip() for line in text.splitlines() if line.strip()})


def cells(table: str) -> dict[str, dict[str, str]]:
    """A table of Markdown by row and column; its rows are named by their first cell."""
    header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def tables_with(page: Path, row: str) -> list[str]:
    """The tables of a page of Markdown that have a row of this name."""
    found: list[str] = re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE)
    return [table for table in found if f"\n| {row} |" in table]


@pytest.mark.parametrize("line", [line for line in lines() if re.search(r"\bfpo(\.pipeline\.cli)? [a-z]", line)])
def test_a_command_of_fpo_has_the_options_that_the_pages_give_it(line):
    quoted = re.search(r'--wrap "(.*)"', line)
    words = shlex.split(quoted[1] if quoted else line)
    words = words[next(i for i, word in enumerate(words) if re.search(r"(^|/|\.)(fpo|cli)$", word)) + 1 :]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)  # raises for an unknown option, a missing value or argument


@pytest.mark.parametrize("line", [line for line in lines() if line.startswith("make ")])
def test_a_target_of_make_exists(line):
    name = shlex.split(line)[1]
    assert re.search(rf"^{re.escape(name)}:", (PROJECT / "Makefile").read_text(), re.MULTILINE)


def test_a_script_that_the_pages_name_exists():
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"python -m (benchmarks\.\w+)", text))
    paths = {f"{name.replace('.', '/')}.py" for name in named} | set(re.findall(r"\b[\w./-]+/\w+\.py\b", text))
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (PROJECT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_and_yaml_parse_and_links_resolve(page, tmp_path):
    for block in blocks(page, "python"):
        ast.parse(block)
    for number, block in enumerate(blocks(page, "yaml")):
        (tmp_path / f"{number}.yaml").write_text(block)
        for command in COMMANDS.values():
            load_config(command, str(tmp_path / f"{number}.yaml"), {})
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize(
    ("written", "caption"),
    [
        ("embedded/table.md", "Sampled answers"),
        ("embedded/table.md", "Accuracy, and distance to the reference"),
        ("embedded/table.md", "Cost of training"),
        ("embedded/table.md", "The paper's claims"),
        ("embedded/tuning.md", "The best of 16 trials of each row, validation split"),
        ("smollm2-135m-cpu/table.md", "Methods"),
    ],
)
def test_a_table_of_results_is_the_one_that_the_command_wrote(written, caption):
    text = (PROJECT / "results" / written).read_text()
    found = re.search(rf"\*\*{re.escape(caption)}\*\*\n\n((?:\|.*\n)+)", text)
    assert found is not None and len(found[1].splitlines()) > 5
    assert found[1] in (PROJECT / "docs" / "results.md").read_text()


def test_the_table_of_the_readme_is_a_part_of_those():
    known: dict[str, dict[str, str]] = {}
    for table in tables_with(PROJECT / "results" / "embedded" / "table.md", "SFT"):
        for row, columns in cells(table).items():
            known.setdefault(row, {}).update(columns)
    (short,) = tables_with(PROJECT / "README.md", "SFT")
    found = cells(short)
    assert found.keys() == LABELS_OF_TABLE and all(len(columns) > 4 for columns in found.values())
    for row, columns in found.items():
        assert columns.items() <= known[row].items(), row


def test_the_readme_is_read_in_ten_minutes():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 140


def test_what_a_judge_is_worth_is_what_its_calibration_said():
    found = json.loads((PROJECT / "results" / "judging" / "smollm2-135m.json").read_text())
    (table,) = tables_with(PROJECT / "docs" / "judging.md", "agreement with the known choice")
    shown = cells(table)
    names = {"agreement with the known choice": "agreement"}
    for row, line in shown.items():
        if row == "preference for the answer that comes first":
            assert line["%"] == f"{100 * found['first']:.1f}"
            continue
        rate = found["rates"][names.get(row, row)]
        assert line["%"] == f"{100 * rate['mean']:.1f}"
        assert line["95 % interval"] == f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f}"
    assert len(shown) == len(found["rates"])  # all but the mean preference, and the first answer's share
    assert (found["questions"], found["judged"], found["unparsed"]) == (50, 100, 0)
