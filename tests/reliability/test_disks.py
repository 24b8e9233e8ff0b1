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
from tiny_world import SITES, World, files, fpo, metrics, rows, to_arguments, write_rows

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
        with pytest.raises(FileNotFoundError, match="manifest, found none"):
            open_cache(out)


def test_stage_one_whose_disk_is_full_from_any_write_on_ends_as_one_in_one_go(world, cache, tmp_path, tries, tally):
    for number in spread(cache.fails, tries(2, len(cache.fails))):
        out = tmp_path / f"out-{number}"
        command = stage_one(Filling, world, out)
        line = refused(command, command.end(point=number), FULL, "free space", AGAIN)
        assert line.startswith(f"fpo: {out}"), line
        check_cache_left(out, cache)
        command.finish()
        assert cache_of(out) == cache.made, cache.points[number]
        tally("writes to a full disk")


def test_stage_two_whose_disk_is_full_from_any_write_on_ends_as_one_in_one_go(world, model, tmp_path, tries, tally):
    for number in spread(model.fails, tries(2, len(model.fails))):
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
        for free in spread(range(0, sum(map(len, cache.made.values())) + 60_000, 1000), tries(2, 60)):
            command = stage_one(Command, world, disk.folder / f"out-{free}")
            fill_and_go_on(disk, command, free, AGAIN, tally)
            assert cache_of(command.folder) == cache.made, free


def test_stage_two_on_a_small_disk_ends_as_one_in_one_go_once_there_is_room(world, model, tmp_path, tries, tally):
    with small_disk(tmp_path / "disk", 64_000_000) as disk:
        most = 3 * sum(map(len, model.made.values()))  # checkpoints hold the optimiser's state
        for free in spread(range(0, most, 1000), tries(2, 60)):
            command = stage_two(Command, world, disk.folder / "out")
            fill_and_go_on(disk, command, free, RESUME, tally)
            assert model_of(command.folder) == model.made, free
            shutil.rmtree(command.folder)


def fill_and_go_on(disk: Disk, command: Command, free: int, go_on: str, tally: Any) -> None:
    """Runs a command on a disk with so little room, then with enough."""
    command.log = disk.folder.with_name("log")
    disk.leave(free)
    if (code := command.end()) != 0:
        line = refused(command, code, FULL, "free space", go_on)
        assert line.startswith(f"fpo: {command.folder}"), line
        tally("full disks")
    disk.empty()
    command.finish()


def test_what_this_machine_remembers_on_a_full_disk_or_one_that_may_not_be_written(world, tmp_path, tally):
    made = model_of(world.folder / "cache")
    for number, (name, says, now) in enumerate(REMEMBERED):
        with small_disk(tmp_path / f"disk-{number}") as disk, pytest.MonkeyPatch.context() as patch:
            patch.setenv("FPO_HOME", str(disk.folder / "home"))
            command = stage_two(Command, world, tmp_path / f"out-{number}")
            now(disk)
            line = refused(command, command.end(), says, "FPO_HOME")
            assert line.startswith(f"fpo: {disk.folder}/home"), line
            assert not command.folder.exists()
            tally(name)
    assert model_of(world.folder / "cache") == made


REMEMBERED = [
    ("full disks", FULL, lambda disk: disk.leave(0)),
    ("full disks", FULL, lambda disk: disk.leave(30_000)),  # for folders and hashes, not for a decoded cache
    ("places that may not be written", "its file system is read-only", lambda disk: disk.read_only()),
]


@pytest.mark.parametrize("stage", [stage_one, stage_two])
def test_a_place_that_may_not_be_written_is_named(world, tmp_path, tally, stage):
    with small_disk(tmp_path / "disk") as disk:
        command = stage(Command, world, disk.folder / "out")
        command.log = tmp_path / "log"
        disk.read_only()
        line = refused(command, command.end(), "its file system is read-only", "give a place")
        assert line.startswith(f"fpo: {command.folder}"), line
        disk.read_only(False)
        assert files(disk.folder) == {}
    command = stage(Plain, world, tmp_path / "closed" / "out")
    command.folder.parent.mkdir(mode=0o555)
    command.log = tmp_path / "log"
    line = refused(command, command.end(), "permission denied", "give a place")
    assert line.startswith(f"fpo: {command.folder}"), line
    assert files(command.folder.parent) == {}
    tally("places that may not be written", 2)


@pytest.mark.slow
def test_a_cache_on_a_disk_that_became_read_only_stays_as_it_was(world, cache, tmp_path, tally):
    with small_disk(tmp_path / "disk") as disk:
        command = stage_one(Command, world, disk.folder / "out")
        command.log = tmp_path / "log"
        command.finish()
        disk.read_only()
        assert verify(command.folder) == []
        line = refused(command, command.end(), "its file system is read-only")
        assert line.startswith(f"fpo: {command.folder}"), line
        stage_two(Command, world, tmp_path / "run").finish()
        assert cache_of(command.folder) == cache.made
    tally("places that may not be written")


def kept(world: World) -> dict[str, bytes]:
    """What a command that is refused leaves as it was: all but locks."""
    return {name: data for name, data in files(world.folder).items() if "/.locks/" not in name}


SHARD = "data/train-00001-of-00004.parquet"


@pytest.mark.parametrize(
    "name", ["cache/manifest.json", f"cache/{SHARD}", "gemma/model.safetensors", "gemma/config.json"]
)
def test_a_file_that_may_not_be_read_is_named_and_nothing_is_taken_for_damaged(world, tmp_path, tally, name):
    copy = World(shutil.copytree(world.folder, tmp_path / "world"))
    before, path = kept(copy), copy.folder / name
    path.chmod(0)
    commands = [stage_two(Plain, copy, tmp_path / "run")]
    if name.startswith("cache"):
        again = Plain(copy.to_precompute(copy.cache), copy.cache)
        commands += [again, Plain([*again.arguments, "--repair"], copy.cache)]
    for command in commands:
        command.log = tmp_path / "log"
        line = refused(command, command.end(), "ermission denied")
        assert str(path.parent) in line, line
        tally("files that may not be read")
    assert kept(copy) == before


@pytest.mark.parametrize("name", ["data.jsonl", "sae_0/sae_weights.safetensors", "gemma/tokenizer.json"])
def test_an_input_of_stage_one_that_may_not_be_read_is_named(world, tmp_path, tally, name):
    copy = World(shutil.copytree(world.folder, tmp_path / "world"))
    (copy.folder / name).chmod(0)
    command = stage_one(Plain, copy, tmp_path / "out")
    line = refused(command, command.end())
    assert str((copy.folder / name).parent) in line, line
    assert "ermission denied" in line, line
    assert not command.folder.exists()
    tally("files that may not be read")


def others(world: World, folder: Path) -> dict[str, tuple[Command, str]]:
    """The other commands, and what each is told to do."""
    learn = {"model": world.gemma, "dataset": write_rows(folder / "chat.jsonl", chats()), "split": "train"}
    learn |= {"max_length": 64, "batch_size": 4, "epochs": 1, "save_steps": 2, "lr": 1e-3, "token_budget": 100}
    sae = {"model": world.gemma, "dataset": world.data, "site": SITES[0].name, "width": 96, "tokens": 600}
    sae |= {"max_length": 64, "max_prompt_length": 32}
    score = {"model": world.gemma, "cache": world.eval_cache, "prompts": 0, "sae": world.saes[0], "site": SITES[0].name}
    commands = {"sft": (learn, RESUME), "train-sae": (sae, AGAIN), "evaluate": (score, AGAIN)}
    made = {}
    for name, (options, says) in commands.items():
        out = folder / name
        command = Filling([name, *to_arguments(options | {"out": out})], out, resumes=name == "sft")
        made[name] = command, says
    return made


def chats() -> list[dict[str, Any]]:
    return [{"messages": row["chosen"]} for row in rows(4, 14)]


@pytest.mark.parametrize("name", ["sft", "train-sae", "evaluate"])
def test_every_other_command_whose_disk_is_full_goes_on_as_it_says(world, tmp_path, tries, tally, name):
    command, says = others(world, tmp_path)[name]
    whole = command.points()
    made = model_of(command.folder)
    fails = [number for number, point in enumerate(whole) if point.startswith(FAILS)]
    for number in spread(fails, tries(1, len(fails))):
        shutil.rmtree(command.folder, ignore_errors=True)
        line = refused(command, command.end(point=number), FULL, "free space", says)
        assert line.startswith(f"fpo: {command.folder}"), line
        assert not (command.folder / "metrics.json").exists()
        command.finish()
        assert model_of(command.folder) == made, whole[number]
        tally("writes to a full disk")


def test_what_libraries_keep_between_runs_on_a_full_disk(world, tmp_path, tally):
    with small_disk(tmp_path / "disk") as disk, pytest.MonkeyPatch.context() as patch:
        disk.leave(0)
        patch.setenv("TMPDIR", str(disk.folder))
        stage_one(Command, world, tmp_path / "out").finish()  # there is always another such folder
        patch.setattr("datasets.config.HF_DATASETS_CACHE", disk.folder / "datasets")
        options = to_arguments({"split": "train", "max_length": 64})
        result = fpo("sft", "--model", world.gemma, "--dataset", world.data, "--out", tmp_path / "sft", *options)
    assert result.exit_code == 2
    assert f"fpo: {disk.folder}/datasets: {FULL}; free space" in result.stderr
    tally("full disks")


@pytest.mark.slow
def test_what_is_remembered_can_be_read_where_it_may_not_be_written(world, model, tmp_path, tally):
    with small_disk(tmp_path / "disk") as disk, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPO_HOME", str(disk.folder / "home"))
        stage_two(Command, world, tmp_path / "first").finish()
        disk.read_only()
        stage_two(Command, world, tmp_path / "second").finish()
    assert model_of(tmp_path / "second") == model.made
    tally("places that may not be written")
