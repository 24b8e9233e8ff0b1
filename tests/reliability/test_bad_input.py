"""Every mistake of a user's gives one line that names it and what to do, exit code 2, and leaves nothing behind."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from bad_files import make_bad_files
from click.testing import Result
from refusals import CASES, TABLE, row, said
from tiny_world import files, fpo, ran


def refused(result: Result, *parts: str) -> str:
    """Checks the exit code and that one line is the program's, which holds `parts`; returns it."""
    lines = said(result)
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("fpo: ")
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


@pytest.fixture(scope="session")
def bad(world, tmp_path_factory) -> Path:
    return make_bad_files(world, tmp_path_factory.mktemp("bad") / "files")


def everything(world, bad: Path, out: Path) -> dict[str, tuple[float, int]]:
    """Every file that a command could have changed, with its time and size."""
    found = [path for folder in (world.folder, bad, out) for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime, path.stat().st_size) for path in found}


@pytest.mark.parametrize(("heading", "name"), [(heading, name) for heading in CASES for name in CASES[heading]])
def test_a_malformed_input_is_refused_in_one_line_and_leaves_nothing(
    world, bad, tmp_path, monkeypatch, caplog, tally, heading, name
):
    for library in ("datasets", "transformers"):  # what they log stands on standard error too
        monkeypatch.setattr(logging.getLogger(library), "handlers", [caplog.handler])
    before = everything(world, bad, tmp_path)
    line = refused(fpo(*CASES[heading][name](world, bad, tmp_path / "out")))
    assert everything(world, bad, tmp_path) == before
    assert [record.message for record in caplog.records] == []
    assert row(name, line, world.folder, bad, tmp_path) in table_of(heading), "tests/refusals.py writes it anew"
    tally("malformed inputs refused in one line")


def table_of(heading: str) -> list[str]:
    """The rows under a heading of the committed table."""
    section = TABLE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def test_the_table_has_the_cases_that_are_tried_and_no_others():
    headings = [line.removeprefix("## ") for line in TABLE.read_text().splitlines() if line.startswith("## ")]
    assert headings == list(CASES)
    for heading in headings:
        assert [line.split(" | ")[0] for line in table_of(heading)] == [f"| {name}" for name in CASES[heading]]


@pytest.mark.parametrize("command", ["precompute", "align", "train-sae", "sft", "evaluate"])
def test_a_command_without_options_asks_for_one(command):
    refused(fpo(command), "--model", "expected a value")


def test_another_model_of_the_same_tokenizer_is_refused_by_its_weights(world, tmp_path):
    other = shutil.copytree(world.gemma, tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    refused(world.align(tmp_path / "out", model=other), "its reference is not", "--allow-different-start")
    assert not (tmp_path / "out").exists()
    ran(world.align(tmp_path / "out", "--allow-different-start", model=other, max_steps=1))


def test_a_policy_that_fails_parity_leaves_nothing_and_the_folder_can_be_used(world, tmp_path, monkeypatch):
    from fpo.stages.model import models

    monkeypatch.setattr(models.ModelSource, "sha256", "0" * 64)  # as if the hashes were equal
    cache = shutil.copytree(world.cache, tmp_path / "cache")
    other = shutil.copytree(world.gemma, tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    shutil.rmtree(cache)
    ran(world.precompute(cache))
    refused(world.align(tmp_path / "out", model=other, cache=cache), "policy and cache differ")
    assert files(tmp_path / "out") == {}
    ran(world.align(tmp_path / "out", cache=cache, max_steps=1))


def test_a_folder_with_files_is_not_written_over(world, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    refused(world.align(tmp_path), "--out", "--resume")
    assert files(tmp_path) == {"note.txt": b"mine"}


def test_a_file_cannot_be_the_folder_to_write(world, tmp_path):
    (tmp_path / "out").write_text("mine")
    for result in (world.align(tmp_path / "out"), world.precompute(tmp_path / "out")):
        refused(result, str(tmp_path / "out"))
    assert files(tmp_path) == {"out": b"mine"}


def test_info_of_a_folder_without_a_cache_is_refused(tmp_path):
    refused(fpo("cache", "info", tmp_path), "manifest, found none")


def test_the_batch_is_shared_among_the_devices_of_a_launcher(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(world.align(tmp_path / "out"), "--batch-size", "(4)", "found 6")
