"""A disk that is full, a folder that may not be read or written: one line says so, and nothing half-written counts."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disks import FAILS, FULL, Disk, Filling, Plain, refused, small_disk
from fpo.cache.reader import open_cache, verify
from killing import Command, spread
from tiny_world import SITES, files, metrics, rows, to_arguments, write_rows

AGAIN = "run the same command again"
RESUME = "--resume goes on from the last checkpoint"


@dataclass(frozen=True)
class Whole:
    """A run whose disk had room: what it made, by name, and the points of its writing (`killing.py`)."""

    made: dict[str, bytes]
    points: list[str]

    @property
    def fails(self) -> list[int]:
        """The points at which a full disk makes itself felt."""
        return [number for number, point in enumerate(self.points) if point.startswith(FAILS)]


def stage_one(kind: type[Command], world: Any, out: Path) -> Command:
    return kind(world.to_precompute(out, shard_size=2), out)


def stage_two(kind: type[Command], world: Any, out: Path) -> Command:
    """Six steps; checkpoints after 2, 4 and 6, snapshots after 2 and 4."""
    settings = {"epochs": 2, "batch_size": 4, "save_steps": 2, "snapshot_steps": 2}
    return kind(world.to_align(out, **settings), out, resumes=True)


def cache_of(out: Path) -> dict[str, bytes]:
    """A cache's files but those that only its writers need and that say when it was made or where."""
    return {
        name: data
        for name, data in files(out).items()
        if not name.startswith(".locks/") and name not in ("provenance.jsonl", "run.yaml")
    }


def model_of(run: Path) -> dict[str, bytes]:
    """What a run made: everything but checkpoints, the record and the log."""
    return {
        name: data
        for name, data in files(run).items()
        if not name.startswith("checkpoint-") and name not in ("run.yaml", "metrics.jsonl")
    }


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "out"
    points = stage_one(Command, world, out).points()
    return Whole(cache_of(out), points)


@pytest.fixture(scope="module")
def model(world, tmp_path_factory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "out"
    points = stage_two(Command, world, out).points()
    return Whole(model_of(out), points)


def check_cache_left(out: Path, whole: Whole) -> None:
    """Nothing is there that would count for more than it is, nor anything half-written."""
    left = cache_of(out)
    assert left.items() <= whole.made.items()
    for line in files(out).get("provenance.jsonl", b"").splitlines():
        assert json.loads(line)["shards"]
    if "manifest.json" in left:
        assert verify(out) == []
    else:
        with pytest.raises(FileNotFoundError, match="no manifest"):
            open_cache(out)


def test_stage_one_whose_disk_is_full_from_any_write_on_ends_as_one_in_one_go(world, cache, tmp_path, tries, tally):
    for number in spread(cache.fails, tries(4, len(cache.fails))):
        out = tmp_path / f"out-{number}"
        command = stage_one(Filling, world, out)
        line = refused(command, command.end(point=number), FULL, "free space", AGAIN)
        assert line.startswith(f"fpo: {out}"), line
        check_cache_left(out, cache)
        command.finish()
        assert cache_of(out) == cache.made, cache.points[number]
        tally("writes to a full disk")


def test_stage_two_whose_disk_is_full_from_any_write_on_ends_as_one_in_one_go(world, model, tmp_path, tries, tally):
    for number in spread(model.fails, tries(4, len(model.fails))):
        out = tmp_path / f"out-{number}"
        command = stage_two(Filling, world, out)
        line = refused(command, command.end(point=number), FULL, "free space", RESUME)
        assert line.startswith(f"fpo: {out}"), line
        command.finish()
        assert model_of(out) == model.made, model.points[number]
        assert [row["step"] for row in metrics(out)][-2:] == [6, 6]
        tally("writes to a full disk")


def test_stage_one_on_a_small_disk_ends_as_one_in_one_go_once_there_is_room(world, cache, tmp_path, tries, tally):
    with small_disk(tmp_path / "disk") as disk:
        for free in spread(range(0, sum(map(len, cache.made.values())) + 60_000, 1000), tries(3, 60)):
            command = stage_one(Command, world, disk.folder / f"out-{free}")
            fill_and_go_on(disk, command, free, AGAIN, tally)
            assert cache_of(command.folder) == cache.made, free


def test_stage_two_on_a_small_disk_ends_as_one_in_one_go_once_there_is_room(world, model, tmp_path, tries, tally):
    with small_disk(tmp_path / "disk", 64_000_000) as disk:
        most = 3 * sum(map(len, model.made.values()))  # checkpoints hold the optimiser's state
        for free in spread(range(0, most, 1000), tries(5, 60)):
            command = stage_two(Command, world, disk.folder / "out")
            fill_and_go_on(disk, command, free, RESUME, tally)
            assert model_of(command.folder) == model.made, free
            shutil.rmtree(command.folder)


def fill_and_go_on(disk: Disk, command: Command, free: int, go_on: str, tally: Any) -> None:
    """Runs a command on a disk with so little room, then with enough."""
    disk.leave(free)
    if (code := command.end()) != 0:
        line = refused(command, code, FULL, "free space", go_on)
        assert line.startswith(f"fpo: {command.folder}"), line
        tally("full disks")
    disk.empty()
    command.finish()
