"""Memory of both stages does not grow with the pairs that went through; files, processes and maps are closed.

Runs in a process of its own, `python test_long_runs.py WHAT FOLDER PAIRS LEAK`, which prints what it measured as JSON.

What is measured is anonymous memory: resident, less what the kernel shares (pages of the mapped cache come in as they
are read and go when memory is short). The C allocator is told to give back what is free before every sample, and the
kernel to give no huge pages, which come 2 MB at a time, so that what remains is what something holds on to. Growth is
the slope of a line through the samples of the second half, after what is allocated once. It is allowed 1 kB a pair: a
leak of anything that a pair has (its tokens, its features, a row of activations) is above that on the models used here,
and a leak of 10 kB a pair is seen.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

HERE = Path(__file__).resolve().parent
KB = 1024
SAMPLES = 40
LEAK = 10 * KB
PR_SET_THP_DISABLE = 41  # linux/prctl.h


class Growth:
    """Samples of this process's memory as pairs go by.

    Attributes:
        samples: (pairs, anonymous bytes, bytes of live tensors).
    """

    def __init__(self, pairs: int, leak: int) -> None:
        self.samples: list[tuple[int, int, int]] = []
        self._every, self._leak, self._seen = max(1, pairs // SAMPLES), leak, 0
        self._held: list[bytearray] = []

    def add(self, pairs: int) -> None:
        """Notes that pairs went through; keeps `leak` bytes for each."""
        before, self._seen = self._seen, self._seen + pairs
        if self._leak:
            self._held.append(bytearray(os.urandom(self._leak * pairs)))
        if before // self._every == self._seen // self._every:
            return
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        memory = psutil.Process().memory_info()
        self.samples.append((self._seen, memory.rss - memory.shared, live_tensor_bytes()))


def live_tensor_bytes() -> int:
    import torch

    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            storages[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def slope(samples: list[list[int]], column: int) -> float:
    """Bytes a pair, over the second half."""
    half = np.array(samples[len(samples) // 2 :], dtype=float)
    return float(np.polyfit(half[:, 0], half[:, column], 1)[0])


# In the child.


def stage_one(folder: Path, pairs: int, leak: int) -> dict[str, Any]:
    """Measures `pairs` pairs into a cache."""
    from fpo.stages.precompute.shards import ShardWorker
    from tiny_world import ran

    world, growth, real = make(folder, pairs), Growth(pairs, leak), ShardWorker._write_shard

    def write_shard(worker: ShardWorker, index: int, following: int | None) -> Any:
        report = real(worker, index, following)
        growth.add(len(worker.writer.spec.shard_range(index)))
        return report

    ShardWorker._write_shard = write_shard  # type: ignore[method-assign]
    ran(world.precompute(folder / "cache", **LONG))
    return {"samples": growth.samples}


def stage_two(folder: Path, pairs: int, leak: int) -> dict[str, Any]:
    """Trains on `pairs` pairs of a cache, once each, and evaluates on them every so often."""
    from fpo.stages.train.align import FPOTrainer
    from tiny_world import ran

    world = make(folder, pairs)
    ran(world.precompute(folder / "cache", **LONG))
    growth, real = Growth(pairs, leak), FPOTrainer.training_step

    def training_step(trainer: FPOTrainer, model: Any, inputs: Any, items: Any = None) -> Any:
        loss = real(trainer, model, inputs, items)
        growth.add(sum(len(row.names) for row in inputs["rows"]))
        return loss

    FPOTrainer.training_step = training_step  # type: ignore[method-assign]
    options = {"cache": folder / "cache", "batch_size": 8, "logging_steps": 10, "token_budget": 512, "lr": 1e-5}
    ran(world.align(folder / "run", save_steps=pairs // 40, **options))
    return {"samples": growth.samples}


def everything(folder: Path, pairs: int, leak: int) -> dict[str, Any]:
    """All commands three times over; what is open after the first and after the last."""
    import tempfile

    from tiny_world import fpo, ran, to_arguments

    world, found = make(folder, pairs), []
    temporary = folder / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), str(temporary)
    chat = folder / "chat.jsonl"
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    chat.write_text("".join(json.dumps({"messages": row["chosen"]}) + "\n" for row in rows))
    for number in range(3):
        out = folder / str(number)
        ran(world.precompute(out / "cache", **(LONG | {"shard_size": 8})))
        cache = {"cache": out / "cache", "eval_cache": out / "cache"}
        ran(world.align(out / "run", batch_size=8, max_steps=2, save_steps=1, snapshot_steps=1, **cache))
        options = {"model": out / "run", "cache": out / "cache", "sae": world.saes, "site": "blocks.2.hook_resid_post"}
        options |= {"prompts": 2, "samples": 2, "max_new_tokens": 3, "reference": world.gemma}
        ran(fpo("evaluate", *to_arguments(options | {"out": out / "evaluation"})))
        options = {"model": world.gemma, "dataset": chat, "split": "train", "max_length": 64, "batch_size": 8}
        ran(fpo("sft", *to_arguments(options | {"max_steps": 2, "out": out / "sft"})))
        ran(fpo("cache", "verify", out / "cache"))
        gc.collect()
        found.append(open_things(temporary, folder))
        if leak:
            KEPT.append((out / "cache" / "manifest.json").open())
    return {"open": [found[0], found[-1]]}


KEPT: list[Any] = []


def open_things(temporary: Path, folder: Path) -> dict[str, Any]:
    """What a process could forget to close or to remove."""
    me = psutil.Process()
    mapped = Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else []
    return {
        "descriptors": me.num_fds(),
        "processes": len(me.children(recursive=True)),
        "decoded caches mapped": len([line for line in mapped if "/decoded/" in line]),
        "temporary files": len(list(temporary.rglob("*"))),
        "half-written files": len(list(folder.rglob("*.tmp-*"))),
    }


LONG = {"shard_size": 64, "token_budget": 512, "keep_features": "all"}


def make(folder: Path, pairs: int) -> Any:
    import torch
    from tiny_world import make_world, rows, write_rows

    torch.set_num_threads(1)
    world = make_world(folder / "world")
    write_rows(world.data, rows(3, pairs))
    return world


def child(what: str, folder: Path, pairs: int, leak: int = 0) -> dict[str, Any]:
    """Runs one of the three in a process of its own."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
    result = subprocess.run(
        [sys.executable, __file__, what, str(folder), str(pairs), str(leak)],
        env=os.environ | {"PYTHONPATH": paths, "FPO_HOME": str(folder / "home"), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# The tests.

STAGES = {"stage_one": "one", "stage_two": "two"}


@pytest.mark.parametrize("stage", STAGES)
def test_memory_does_not_grow_with_the_pairs_that_went_through(tmp_path, tries, tally, stage):
    pairs = tries(480, 4000)
    samples = child(stage, tmp_path, pairs)["samples"]
    assert samples[-1][0] >= 0.9 * pairs
    few = 6 * KB if pairs < 1000 else 0  # what is allocated once weighs more on fewer pairs
    assert slope(samples, 1) < KB + few, samples
    assert slope(samples, 2) < 64, samples
    tally(f"pairs through stage {STAGES[stage]} at flat memory", samples[-1][0])


@pytest.mark.parametrize("stage", STAGES)
def test_a_leak_of_ten_kilobytes_a_pair_would_be_seen(tmp_path, tries, stage):
    if not tries(0, 1):
        pytest.skip("in the long version")
    samples = child(stage, tmp_path, 1000, LEAK)["samples"]
    assert slope(samples, 1) > 0.8 * LEAK, samples


def test_files_processes_and_maps_are_closed_when_a_command_ends(tmp_path):
    first, last = child("everything", tmp_path, 24)["open"]
    assert last == first
    closed = ("processes", "decoded caches mapped", "temporary files", "half-written files")
    assert {name: last[name] for name in closed} == dict.fromkeys(closed, 0)


@pytest.mark.parametrize("leak", [1])
def test_a_file_left_open_would_be_seen(tmp_path, tries, leak):
    if not tries(0, 1):
        pytest.skip("in the long version")
    first, last = child("everything", tmp_path, 24, leak)["open"]
    assert last["descriptors"] == first["descriptors"] + 2


if __name__ == "__main__":
    started = time.monotonic()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    what, folder, pairs, leak = sys.argv[1:]
    found = globals()[what](Path(folder), int(pairs), int(leak))
    print(json.dumps({**found, "seconds": time.monotonic() - started}))  # noqa: T201
