"""The order of the house: who imports whom, and how large its rooms are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from count_lines import PROJECT, modules

# Each wing imports from those before it; the modules at the top of `pipeline` count as one, but for the command line.
WINGS = (
    "cache",
    "stages/model",
    "stages/data",
    "stages/scoring",
    "stages/precompute",
    "stages/train",
    "stages/evaluate",
    "stages/judge",
    "pipeline",
    "pipeline/commands",
    "pipeline/world",
    "pipeline/report",
    "pipeline/cli.py",
)


def wing_of(path: Path) -> str:
    name = str(path.relative_to(PROJECT))
    return name if name in WINGS else str(Path(name).parent)


def imported(path: Path) -> Iterator[Path]:
    """The modules of the product that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1] / Path(*(node.module or "").split("."))
            names = [base / alias.name for alias in node.names] if base.is_dir() else [base]
            yield from (name.with_suffix(".py") for name in names)


HOUSE = {path: set(imported(path)) for path in modules() if path.name != "__init__.py"}


def test_every_wing_is_in_the_order():
    assert {wing_of(path) for path in HOUSE} == set(WINGS)


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_from_those_before_it_alone(wing):
    allowed = set(WINGS[: WINGS.index(wing) + 1])
    wrong = {
        (str(path.relative_to(PROJECT)), str(other.relative_to(PROJECT)))
        for path, others in HOUSE.items()
        if wing_of(path) == wing
        for other in others
        if wing_of(other) not in allowed
    }
    assert wrong == set()


def test_no_import_runs_in_a_circle():
    left = {path: others & set(HOUSE) for path, others in HOUSE.items()}
    while free := {path for path, others in left.items() if not others & set(left)}:
        left = {path: others for path, others in left.items() if path not in free}
    assert not left, sorted(str(path.relative_to(PROJECT)) for path in left)


def test_what_is_imported_is_defined_there():
    """No name has two homes."""
    wrong = set()
    for path in HOUSE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = (path.parents[node.level - 1] / Path(*(node.module or "").split("."))).with_suffix(".py")
                if module in HOUSE:
                    wrong |= {(module.name, alias.name) for alias in node.names if alias.name not in defined(module)}
    assert wrong == set()


def defined(path: Path) -> set[str]:
    """The names that a module binds itself, at its top."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize("path", HOUSE, ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 360
