"""Stage one killed, and told to stop: what is left is never taken for more than it is, and the cache ends the same."""

import json
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fpo.cache.reader import open_cache, verify
from fpo.cache.store import Store
from killing import KILLED, Command, spread
from tiny_world import files

SHARDS = 7
PARTS = 4  # of the tries, so that several workers share them


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed.

    Attributes:
        cache: every file of its cache by name, but provenance and locks.
        seconds: what it took.
        points: of its writing (`killing.py`).
    """

    cache: dict[str, bytes]
    seconds: float
    points: list[str]


def command_of(world: Any, out: Path, **options: Any) -> Command:
    return Command(world.to_precompute(out, shard_size=2, **options), out)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    points = command_of(world, folder / "points").points()
    command = command_of(world, folder / "out")
    started = time.monotonic()
    command.finish()
    seconds = time.monotonic() - started
    cache = cache_of(folder / "out")
    assert len(cache) == SHARDS + len({"manifest.json", "README.md", "run.yaml"})
    return Whole(cache, seconds, points)


def cache_of(out: Path) -> dict[str, bytes]:
    """A finished cache's files, among which is nothing of a run that was killed."""
    assert verify(out) == []
    assert not [name for name in files(out) if ".tmp-" in name]
    open_cache(out).provenance()
    return own(files(out), out)


def own(found: dict[str, bytes], place: Path | str) -> dict[str, bytes]:
    """A cache's files, those of its writers and the name of its place left out."""
    kept = {name: data for name, data in found.items() if not name.startswith(".locks/") and ".tmp-" not in name}
    kept.pop("provenance.jsonl", None)
    return kept | {name: kept[name].replace(str(place).encode(), b"here") for name in ("run.yaml",) if name in kept}


def check_left(out: Path, whole: Whole) -> None:
    """What was cut off is not under a file's own name, and no cache that is not finished passes for one."""
    for line in files(out).get("provenance.jsonl", b"").splitlines():
        assert json.loads(line)["shards"]
    left = own(files(out), out)
    assert left.items() <= whole.cache.items()
    if "manifest.json" in left:
        assert left == whole.cache and verify(out) == []
    else:
        with pytest.raises(FileNotFoundError, match="manifest, found none"):
            open_cache(out)
        (damage,) = verify(out)
        assert (damage.startswith("manifest.json: ") and "found none" in damage) or "missing" in damage


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_any_moment_and_again_ends_as_one_in_one_go(world, whole, tmp_path, tries, tally, part):
    rng, kills, runs = random.Random(part), 0, 0
    while kills < tries(2, 14):
        runs += 1
        command = command_of(world, tmp_path / f"out-{runs}")
        for _ in range(rng.randint(1, 3)):
            delay = rng.uniform(0, whole.seconds)
            code = command.signalled(signal.SIGKILL, delay)
            assert code in (0, KILLED), (delay, command.said())
            check_left(command.folder, whole)
            kills += code == KILLED
        command.finish()
        assert cache_of(command.folder) == whole.cache
    tally("kills of stage one at random moments", kills)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_inside_a_write_or_a_rename_ends_as_one_in_one_go(world, whole, tmp_path, tries, tally, part):
    numbers = range(len(whole.points))[part::PARTS]
    for number in spread(numbers, tries(2, len(numbers))):
        command = command_of(world, tmp_path / f"out-{number}")
        assert command.end(point=number) == KILLED, (whole.points[number], command.said())
        check_left(command.folder, whole)
        command.finish()
        assert cache_of(command.folder) == whole.cache, whole.points[number]
        tally("kills of stage one inside a write, fsync or rename")


def test_every_kind_of_file_is_written_in_points(whole):
    assert {point.split()[0] for point in whole.points} == {"before", "after", "half"}
    names = {Path(point.split()[-1]).name for point in whole.points}
    assert names >= {Path(name).name for name in whole.cache} | {"provenance.jsonl"}
    for what in ("half of", "before fsync", "after fsync", "before replace", "after replace"):
        assert sum(point.startswith(what) for point in whole.points) >= SHARDS + 4


def test_of_two_workers_one_is_killed_and_the_other_finishes_its_shards(world, whole, tmp_path, tries, tally):
    rng, kills, runs = random.Random(0), 0, 0
    while kills < tries(1, 8):
        runs += 1
        out = tmp_path / f"out-{runs}"
        killed, other = (command_of(world, out, rank=rank, world_size=2) for rank in (0, 1))
        other.log = out.with_name("other.log")
        process = other.start()
        kills += killed.signalled(signal.SIGKILL, rng.uniform(0, whole.seconds)) == KILLED
        process.join()
        assert process.exitcode == 0, other.said()
        check_left(out, whole)
        if not (out / "manifest.json").exists():  # the one that was killed held a shard while the other went by
            assert "shards of this cache are still with other workers" in other.said()
        killed.finish()  # or removes what it had half-written when the other was through
        assert cache_of(out) == whole.cache
    tally("kills of stage one at random moments", kills)


def test_a_run_killed_while_it_uploads_ends_as_one_in_one_go(world, whole, tmp_path, url, machine, tries, tally):
    machine("uploading")
    rng, kills, store = random.Random(0), 0, Store(url)
    command = Command(world.to_precompute(Path("out"), shard_size=2), tmp_path / "out")
    command.arguments[command.arguments.index("out")] = url
    while kills < tries(1, 10):
        code = command.signalled(signal.SIGKILL, rng.uniform(0, 2 * whole.seconds))
        assert code in (0, KILLED), command.said()
        kills += code == KILLED
        left = own({name: store.read(name) for name in store.sizes()}, url)
        assert left.items() <= whole.cache.items()
        if "manifest.json" in left:
            assert verify(url) == []
        else:
            (damage,) = verify(url)
            assert damage.startswith("manifest.json: ") and "finish `fpo precompute`" in damage
        if code == 0:
            for name in store.sizes():
                store.remove(name)
            machine(f"uploading-{kills}")
    command.finish()
    assert own({name: store.read(name) for name in store.sizes()}, url) == whole.cache
    tally("kills of stage one at random moments", kills)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_told_to_stop_says_how_to_go_on_and_leaves_nothing_half_done(
    world, whole, tmp_path, tries, tally, number
):
    rng, stops, runs = random.Random(number), 0, 0
    while stops < tries(2, 10):
        runs += 1
        command = command_of(world, tmp_path / f"out-{runs}")
        code = command.signalled(number, rng.uniform(0, whole.seconds))
        assert code in (0, 130), command.said()
        said = [line for line in command.said().splitlines() if line.startswith("fpo:")]
        if code and said:
            stops += 1
            assert said == ["fpo: stopped; finished shards are kept: run the same command again to go on"]
            assert "Traceback" not in command.said()
            assert not [name for name in files(command.folder) if ".tmp-" in name]
            check_left(command.folder, whole)
        else:  # it was done, if perhaps not yet gone
            assert cache_of(command.folder) == whole.cache
        command.finish()
        assert cache_of(command.folder) == whole.cache
    tally("interrupted runs (SIGTERM, Ctrl-C)", stops)


@pytest.mark.slow
def test_ctrl_c_in_a_shell_stops_a_run_that_goes_on(world, whole, tmp_path, tally):
    command = command_of(world, tmp_path / "out")
    process = command.interrupted(signal.SIGINT, "data/*.parquet")
    assert process.returncode == 130, process.stderr
    assert process.stderr.endswith("fpo: stopped; finished shards are kept: run the same command again to go on\n")
    check_left(command.folder, whole)
    command.finish()
    assert cache_of(command.folder) == whole.cache
    tally("interrupted runs (SIGTERM, Ctrl-C)")
