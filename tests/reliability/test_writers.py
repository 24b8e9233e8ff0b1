"""Several writers at one folder, and what dead ones left: every shard is written once, and no two specs are mixed."""

import errno
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from disks import Slow, WithoutLocks, refused
from fpo.cache.locks import locked
from fpo.cache.reader import open_cache, verify
from killing import KILLED, Command
from tiny_world import files, metrics

SHARDS = 7
SECONDS = 60  # more than any of these takes, less than for ever


def command_of(world: Any, out: Path, kind: type[Command] = Command, **options: Any) -> Command:
    return kind(world.to_precompute(out, shard_size=2, **options), out)


def cache_of(out: Path) -> dict[str, bytes]:
    """A finished cache's files but those that only its writers need and that say when it was made or where."""
    assert verify(out) == []
    return {
        name: data
        for name, data in files(out).items()
        if not name.startswith(".locks/") and name not in ("provenance.jsonl", "run.yaml")
    }


def ended(process: Any) -> int:
    """The exit code of a process, which does not wait for ever."""
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        pytest.fail("it waits for ever")
    return int(process.exitcode)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> dict[str, bytes]:
    command = command_of(world, tmp_path_factory.mktemp("whole") / "out")
    command.finish()
    return cache_of(command.folder)


def test_writers_of_one_spec_at_once_write_each_shard_once(world, whole, tmp_path, tries, tally):
    for number in range(tries(1, 20)):
        out, writers = tmp_path / f"out-{number}", 3
        commands = [command_of(world, out) for _ in range(writers)]
        processes = [command.start() for command in commands]
        assert [ended(process) for process in processes] == [0] * writers, commands[0].said()
        assert cache_of(out) == whole
        records = open_cache(out).provenance()
        assert sum(record["shards"] for record in records) == SHARDS
        tally("writers at once", writers)


def test_of_two_specs_at_once_one_ends_with_its_cache_and_the_other_is_refused(world, whole, tmp_path, tries, tally):
    command = command_of(world, tmp_path / "other", max_length=40)
    command.finish()
    wholes = [whole, cache_of(command.folder)]
    assert wholes[0] != wholes[1]
    for number in range(tries(1, 40)):
        out = tmp_path / f"out-{number}"
        commands = [command_of(world, out, Slow), command_of(world, out, Slow, max_length=40)]
        for which, command in enumerate(commands):
            command.log = tmp_path / f"log-{number}-{which}"
        processes = [command.start() for command in commands]
        codes = [ended(process) for process in processes]
        assert sorted(codes) == [0, 2], [command.said() for command in commands]
        line = refused(commands[codes.index(2)], 2, "max_length: expected", "choose another folder")
        # Of the other's claim, or, for a writer that comes later, of its first shards.
        claimed, begun = (
            "others are writing it with another spec",
            r"data/train-\d+-of-\d+\.parquet belongs to another cache",
        )
        assert re.match(rf"fpo: {out}: ({claimed}|{begun}) \(", line), line
        assert cache_of(out) == wholes[codes.index(0)]
        tally("writers at once", 2)


def test_a_killed_writer_that_wrote_no_shard_binds_nobody(world, whole, tmp_path, tally):
    command = command_of(world, tmp_path / "out", max_length=40)
    points = command_of(world, tmp_path / "points", max_length=40).points()
    first = next(number for number, point in enumerate(points) if "data/train-" in point)
    assert command.end(point=first) == KILLED
    assert (command.folder / ".locks" / "spec.json").exists()
    command_of(world, command.folder).finish()
    assert cache_of(command.folder) == whole
    tally("what dead writers left")


def test_what_dead_writers_left_is_neither_held_nor_counted(world, whole, tmp_path, tally):
    command = command_of(world, tmp_path / "out")
    for folder in (".locks", "data"):
        (command.folder / folder).mkdir(parents=True)
    for name in ("writers", "spec", "provenance", *(f"{index:05d}" for index in range(SHARDS))):
        # As others write into theirs, who is who: what counts is whether somebody holds it.
        (command.folder / ".locks" / f"{name}.lock").write_text(f"{os.getppid()}\nanother-host\n")
    tail = f"-4242-{'0' * 32}"
    theirs = [command.folder / f"{name}.tmp-another-host{tail}" for name in ("data/train-00000-of-00007.parquet", "x")]
    for path in theirs:
        path.write_bytes(b"half of a sha")
    command.finish()
    left = cache_of(command.folder)
    # Nobody here can know whether their writer lives.
    assert {name: left.pop(name) for name in [str(path.relative_to(command.folder)) for path in theirs]}
    assert left == whole
    tally("what dead writers left", SHARDS + 5)


def test_a_shard_that_a_live_process_holds_is_left_to_it(world, whole, tmp_path):
    command = command_of(world, tmp_path / "out")
    (command.folder / ".locks").mkdir(parents=True)
    with locked(command.folder / ".locks" / "00003.lock") as mine:
        assert mine
        assert ended(command.start()) == 0
        assert "still with other workers" in command.said()
        assert len(list((command.folder / "data").iterdir())) == SHARDS - 1
    command.finish()
    assert cache_of(command.folder) == whole


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_what_to_do(world, tmp_path, number):
    command = command_of(world, tmp_path / "out", WithoutLocks)
    command.number = number
    line = refused(command, ended(command.start()), "expected a file system with locks (flock)", "write to another")
    assert line.startswith(f"fpo: {command.folder}"), line


@pytest.mark.parametrize("resumes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_two_trainings_into_one_folder_one_is_refused_and_the_other_ends_as_alone(
    world, tmp_path, tries, tally, resumes
):
    def to_train(out: Path) -> Command:
        return Command(world.to_align(out, epochs=2, save_steps=2), out, resumes)

    to_train(tmp_path / "alone").finish()
    alone = (tmp_path / "alone" / "model.safetensors").read_bytes()
    for number in range(tries(1, 10)):
        out = tmp_path / f"out-{number}"
        if resumes:
            process = to_train(out).start()
            while not (out / "checkpoint-2" / "trainer_state.json").exists():
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        commands = [to_train(out) for _ in range(2)]
        for which, command in enumerate(commands):
            command.log = tmp_path / f"log-{number}-{which}"
        processes = [command.start() for command in commands]
        codes = [ended(process) for process in processes]
        assert sorted(codes) == [0, 2], [command.said() for command in commands]
        line = refused(commands[codes.index(2)], 2, "--out: ")
        assert "another run is writing into" in line or "expected a new or empty folder" in line, line
        assert (out / "model.safetensors").read_bytes() == alone
        assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3, 4]
        tally("trainings at once", 2)
