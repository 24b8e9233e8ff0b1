"""Training killed, and told to stop: what is left is never taken for more than it is, and the weights end the same."""

import json
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fpo.stages.model.models import find_model
from killing import KILLED, Command, spread
from tiny_world import files, metrics, rows, to_arguments, write_rows

# What differs between two runs of the same command, or is a mean since the last start.
CLOCK = ("runtime", "per_second", "peak_memory_bytes", "peak_process_bytes", "train_loss")
# Files of a model's folder, where it lies whole.
CONFIG, WEIGHTS = "config.json", "model.safetensors"

PARTS = 2  # of the tries, so that several workers share them


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed.

    Attributes:
        files: what it made, by name, but checkpoints, the record and the log.
        record: `run.yaml`.
        log: `metrics.jsonl` without what a clock says.
        seconds: what it took.
        points: of its writing (`killing.py`).
    """

    files: dict[str, bytes]
    record: dict[str, Any]
    log: list[dict[str, Any]]
    seconds: float
    points: list[str]


def command_of(world: Any, out: Path, **options: Any) -> Command:
    """Six steps of two batches each, evaluated; checkpoints after 2, 4 and 6, snapshots after 2 and 4."""
    settings = {"epochs": 2, "batch_size": 4, "accumulation": 2, "save_steps": 2, "snapshot_steps": 2, "eval_steps": 3}
    return Command(world.to_align(out, **settings, eval_cache=world.eval_cache, **options), out, resumes=True)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    points = command_of(world, folder / "points").points()
    command = command_of(world, folder / "out")
    started = time.monotonic()
    command.finish()
    seconds = time.monotonic() - started
    made = result_of(folder / "out")
    assert {WEIGHTS, CONFIG, "snapshots/step-000002/" + WEIGHTS, "snapshots/step-000004/" + WEIGHTS} <= set(made)
    return Whole(made, record_of(folder / "out"), log_of(folder / "out"), seconds, points)


def result_of(run: Path) -> dict[str, bytes]:
    """What a run made, and what else lies there: everything but checkpoints, the record and the log."""
    return {
        name: data
        for name, data in files(run).items()
        if not name.startswith("checkpoint-") and name not in ("run.yaml", "metrics.jsonl")
    }


def record_of(run: Path) -> dict[str, Any]:
    record = yaml.safe_load((run / "run.yaml").read_text())
    return {key: value for key, value in record.items() if key not in ("resume", "out")}


def log_of(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.endswith(CLOCK)} for line in metrics(run)]


def check_left(run: Path, whole: Whole) -> None:
    """No folder passes for a model's that lacks a file or a byte of it."""
    left = result_of(run)
    for folder in ("", "snapshots/step-000002/", "snapshots/step-000004/"):
        if folder + CONFIG in left:
            mine, theirs = (
                {name: data for name, data in found.items() if str(Path(name).parent) == str(Path(folder))}
                for found in (left, whole.files)
            )
            assert mine == theirs
    if CONFIG not in left and run.exists():
        with pytest.raises((OSError, ValueError)):
            find_model(str(run))


def check_end(run: Path, whole: Whole) -> None:
    """It ended as a run in one go."""
    assert result_of(run) == whole.files
    assert record_of(run) == whole.record
    assert log_of(run) == whole.log
    last = run / "checkpoint-6"
    assert (last / WEIGHTS).read_bytes() == whole.files[WEIGHTS]
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_any_moment_and_again_ends_as_one_in_one_go(world, whole, tmp_path, tries, tally, part):
    rng, kills, runs = random.Random(part), 0, 0
    while kills < tries(1, 8):
        runs += 1
        command = command_of(world, tmp_path / f"out-{runs}")
        for _ in range(rng.randint(1, 3)):
            delay = rng.uniform(0, whole.seconds)
            code = command.signalled(signal.SIGKILL, delay)
            assert code in (0, KILLED), (delay, command.said())
            check_left(command.folder, whole)
            kills += code == KILLED
        command.finish()
        check_end(command.folder, whole)
    tally("kills of stage two", kills)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_inside_a_save_ends_as_one_in_one_go(world, whole, tmp_path, tries, tally, part):
    numbers = range(len(whole.points))[part::PARTS]
    for number in spread(numbers, tries(1, 40)):
        command = command_of(world, tmp_path / f"out-{number}")
        assert command.end(point=number) == KILLED, (whole.points[number], command.said())
        check_left(command.folder, whole)
        command.finish()
        check_end(command.folder, whole)
        tally("kills of stage two")


def test_a_checkpoint_that_was_cut_off_at_its_last_file_is_passed_over_and_named(world, whole, tmp_path, tally):
    command = command_of(world, tmp_path / "out")
    (number,) = (i for i, point in enumerate(whole.points) if point == "half of checkpoint-4/trainer_state.json/")
    assert command.end(point=number) == KILLED, command.said()
    assert (command.folder / "checkpoint-4" / "trainer_state.json").stat().st_size
    command.finish()
    assert f"{command.folder / 'checkpoint-4'}: cut off while it was saved, passed over" in said_on_one_line(command)
    check_end(command.folder, whole)
    tally("kills of stage two")


@pytest.mark.slow
def test_a_process_that_a_scheduler_ends_goes_on(world, whole, tmp_path, tally):
    command = command_of(world, tmp_path / "out")
    process = command.interrupted(signal.SIGTERM, "checkpoint-2/trainer_state.json")
    assert process.returncode == 130, process.stderr
    # What stands after it is the Trainer's bar, as far as it came.
    assert process.stderr.splitlines().count("fpo: stopped; --resume goes on from the last checkpoint") == 1
    assert "Traceback" not in process.stderr
    command.finish()
    check_end(command.folder, whole)
    tally("interrupted runs (SIGTERM, Ctrl-C)")


def test_fine_tuning_killed_at_any_moment_ends_as_in_one_go(world, tmp_path, tries, tally):
    dataset = write_rows(tmp_path / "chat.jsonl", [{"messages": row["chosen"]} for row in rows(4, 14)])
    settings = {"model": world.gemma, "dataset": dataset, "split": "train", "max_length": 64, "batch_size": 4}
    settings |= {"epochs": 2, "save_steps": 2, "logging_steps": 1, "lr": 1e-3, "warmup_steps": 0, "token_budget": 100}

    def command_of(out: Path) -> Command:
        return Command(["sft", *to_arguments(settings | {"out": out})], out, resumes=True)

    whole, started = command_of(tmp_path / "whole"), time.monotonic()
    whole.finish()
    seconds = time.monotonic() - started
    rng, kills, runs = random.Random(0), 0, 0
    while kills < tries(1, 6):
        runs += 1
        command = command_of(tmp_path / f"out-{runs}")
        for _ in range(2):
            kills += command.signalled(signal.SIGKILL, rng.uniform(0, seconds)) == KILLED
        command.finish()
        assert result_of(command.folder) == result_of(whole.folder)
        assert log_of(command.folder) == log_of(whole.folder)
    tally("kills of stage two", kills)


def said_on_one_line(command: Command) -> str:
    """What its processes said, where the console broke no line."""
    return command.said().replace("\n", " ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_told_to_stop_says_how_to_go_on_and_goes_on(world, whole, tmp_path, tries, tally, number):
    rng, stops, runs = random.Random(number), 0, 0
    while stops < tries(1, 6):
        runs += 1
        command = command_of(world, tmp_path / f"out-{runs}")
        code = command.signalled(number, rng.uniform(0, whole.seconds))
        assert code in (0, 130), command.said()
        said = [line for line in command.said().splitlines() if line.startswith("fpo:")]
        if code and said:
            stops += 1
            assert said == ["fpo: stopped; --resume goes on from the last checkpoint"]
            assert "Traceback" not in command.said()
            assert not [name for name in files(command.folder) if ".tmp-" in name]
            check_left(command.folder, whole)
        else:  # it was done, if perhaps not yet gone
            check_end(command.folder, whole)
        command.finish()
        check_end(command.folder, whole)
    tally("interrupted runs (SIGTERM, Ctrl-C)", stops)
