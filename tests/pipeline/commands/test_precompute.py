"""Stage one by several processes: they leave the bytes that one leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from fpo.cache.reader import verify
from tiny_world import World, files, ran

SHARDS = 14  # one a raw row


def content(folder: Path) -> dict[str, bytes]:
    """What the cache says, without who made it."""
    return {name: data for name, data in files(folder).items() if name.startswith(("data/", "manifest", "README"))}


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> dict[str, bytes]:
    """The cache as one process leaves it."""
    out = tmp_path_factory.mktemp("alone") / "out"
    ran(world.precompute(out, shard_size=1))
    return content(out)


def start(world: World, out: Path, *launcher: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, *(launcher or ("-m",)), "fpo.pipeline.cli"]
    command += world.to_precompute(out, shard_size=1, **options)
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    """Waits for a process that has to succeed; what it printed."""
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    return out


def wait_for_shards(out: Path, number: int) -> None:
    while len(list(out.glob("data/*.parquet"))) < number:
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_of_torchrun_leave_the_same_bytes_as_one(world, alone, tmp_path, workers):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), "-m")
    finished(start(world, tmp_path, *launcher))
    assert content(tmp_path) == alone


@pytest.mark.slow
def test_tasks_of_a_slurm_array_leave_the_same_bytes_as_one(world, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    tasks = []
    for task in "01":
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        tasks.append(start(world, tmp_path))
    for task in tasks:
        finished(task)
    assert content(tmp_path) == alone


# Ray.


def actors(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that write shards."""
    children = psutil.Process(driver.pid).children(recursive=True)
    return [child for child in children if "ShardActor" in " ".join(child.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_actors_of_ray_leave_the_same_bytes_as_one_process(world, alone, tmp_path, workers):
    assert f"{SHARDS} shards" in finished(start(world, tmp_path, engine="ray", workers=workers))
    assert content(tmp_path) == alone


@pytest.mark.slow
def test_an_actor_killed_in_mid_run_loses_and_repeats_nothing(world, alone, tmp_path):
    driver = start(world, tmp_path, engine="ray", workers=1)
    wait_for_shards(tmp_path, 2)
    (actor,) = actors(driver)
    actor.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob("data/*.parquet"))) < SHARDS
    finished(driver)
    assert content(tmp_path) == alone
    assert verify(tmp_path) == []


@pytest.mark.slow
def test_a_driver_killed_and_started_again_loses_and_repeats_nothing(world, alone, tmp_path):
    driver = start(world, tmp_path, engine="ray", workers=2)
    wait_for_shards(tmp_path, 2)
    driver.kill()
    driver.communicate()
    assert not (tmp_path / "manifest.json").exists()
    finished(start(world, tmp_path, engine="ray", workers=2))
    assert content(tmp_path) == alone


@pytest.mark.slow
def test_a_mistake_that_an_actor_finds_is_one_line(world, tmp_path):
    ran(world.precompute(tmp_path, "--limit", "4", shard_size=1))
    driver = start(world, tmp_path, engine="ray", limit=5)
    _, errors = driver.communicate()
    assert driver.returncode == 2, errors
    lines = [line for line in errors.splitlines() if line.startswith("fpo: ")]
    assert len(lines) == 1
    assert "limit: expected" in lines[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"workers": 2}, "--workers: only --engine ray reads it"),
        ({"engine": "ray", "rank": 0, "world_size": 2}, "--engine: ray starts its workers itself"),
    ],
)
def test_what_an_engine_does_not_read_is_refused(world, tmp_path, options, named):
    result = world.precompute(tmp_path / "out", **options)
    assert (result.exit_code, named in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()
