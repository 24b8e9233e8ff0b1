"""Steps as processes: real commands on the tiny world, as few as possible."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fpo.cache.errors import UserError
from fpo.pipeline.commands.jobs import DONE, Step, run_steps, seconds_of
from fpo.pipeline.config import AlignConfig, EvaluateConfig
from tiny_profile import tiny_profile
from tiny_world import files, losses

PATIENCE = 240  # seconds; the machine may be busy


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def training(world: Any, out: Path, **options: Any) -> Step:
    defaults = {"model": str(world.gemma), "cache": world.cache, "method": "dpo", "batch_size": 6, "lr": 1e-3}
    defaults |= {"token_budget": 160, "logging_steps": 1, "warmup_steps": 0}
    return Step("align", f"align {out.name}", AlignConfig(**(defaults | {"max_steps": 1, "out": out} | options)))


def evaluation(world: Any, out: Path, trained: Step) -> Step:
    config = EvaluateConfig(
        model=str(trained.out), cache=world.eval_cache, method="dpo", prompts=0, token_budget=160, out=out
    )
    return Step("evaluate", f"evaluate {trained.label}", config, (trained.out,))


def when(condition: Any, what: str) -> None:
    """Waits for something that other processes do."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.02)


def processes_of(group: int) -> list[psutil.Process]:
    """What runs in a process group; what has ended and waits to be reaped does not."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


@pytest.fixture
def table(world, tmp_path) -> Iterator[subprocess.Popen[bytes]]:
    """`fpo table` in a process group of its own, with its first step under way."""
    path = tiny_profile(world, tmp_path)
    runs, code = tmp_path / "runs", "from fpo.pipeline.cli import main; main()"
    command = [sys.executable, "-c", code, "table", "--config", path, "--runs", runs, "--out", tmp_path / "results"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*map(str, command), "--jobs", "2"], stderr=said, start_new_session=True)
    try:
        when(lambda: list(runs.glob("*.log")) or process.poll() is not None, "the first step")
        assert process.poll() is None, (tmp_path / "said").read_text()
        yield process
    finally:
        for left in processes_of(process.pid):
            left.kill()
        process.wait()


def test_steps_whose_configuration_holds_a_mapping_can_be_told_apart():
    """A schedule's arguments are a mapping, which has no hash."""
    settings = {"num_decay_steps": 8}
    one, other = (
        Step("align", out, AlignConfig(out=Path(out), lr_scheduler="warmup_stable_decay", lr_scheduler_kwargs=settings))
        for out in ("one", "other")
    )
    again = Step("align", "one", one.config.model_copy())
    assert {one: 1, other: 2, again: 3} == {one: 3, other: 2}


@pytest.mark.slow
def test_a_failing_step_is_named_and_the_others_results_stay(world, tmp_path):
    good, bad = training(world, tmp_path / "good"), training(world, tmp_path / "bad", lr=1e30, max_steps=4)
    steps = [good, bad, evaluation(world, tmp_path / "of_bad", bad), evaluation(world, tmp_path / "of_good", good)]
    with pytest.raises(UserError, match=r"\Aalign bad: [^\n]*(not finite|is nan)[^\n]*bad.log\)\Z") as caught:
        run_steps(steps, jobs=2)
    assert str(bad.log) in str(caught.value) and re.search("not finite|is nan", bad.log.read_text())
    assert good.done and not bad.done and not steps[2].log.exists()
    record = json.loads((good.out / DONE).read_text())
    assert (record["command"], record["label"], record["seconds"] > 0) == ("align", "align good", True)
    assert seconds_of(good) == record["seconds"] and not list(good.out.glob("checkpoint-*"))
    assert "metrics.jsonl" in good.log.read_text()

    before, wrote = files(tmp_path / "good"), (good.out / DONE).stat().st_mtime_ns
    run_steps([good, steps[3]], jobs=2)
    assert files(tmp_path / "good") == before and (good.out / DONE).stat().st_mtime_ns == wrote
    assert steps[3].done and "accuracy/raw" in (steps[3].out / "metrics.json").read_text()
    run_steps([], jobs=1)


@pytest.mark.slow
def test_a_killed_step_goes_on_and_ends_as_one_in_one_go(world, tmp_path):
    whole, killed = (
        training(world, tmp_path / name, max_steps=24, save_steps=10, snapshot_steps=10) for name in ("whole", "killed")
    )
    run_steps([whole], jobs=2)

    def kill() -> None:
        when(lambda: list(killed.out.glob("checkpoint-10/trainer_state.json")), "a checkpoint")
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match=r"\Aalign killed: killed by SIGKILL[^\n]*killed.log\)\Z"):
        run_steps([killed], jobs=2)
    killer.join()
    assert not killed.done and list(killed.out.glob("checkpoint-*"))
    run_steps([killed], jobs=2)
    assert killed.done and not list(killed.out.glob("checkpoint-*"))
    assert losses(killed.out) == losses(whole.out)
    weights = [{n: b for n, b in files(step.out).items() if n.endswith(".safetensors")} for step in (whole, killed)]
    assert len(weights[0]) == 1 + 2 and weights[0] == weights[1]


def test_a_step_that_stopped_before_its_first_checkpoint_starts_again(world, tmp_path):
    done, stopped = training(world, tmp_path / "done"), training(world, tmp_path / "stopped")
    stopped.out.mkdir()
    (stopped.out / "leftover").write_text("of a run that was stopped")
    run_steps([done, stopped], jobs=2)
    assert not (stopped.out / "leftover").exists()
    assert (stopped.out / "model.safetensors").read_bytes() == (done.out / "model.safetensors").read_bytes()


def test_ctrl_c_stops_all_and_says_how_to_go_on(table, tmp_path):
    os.killpg(table.pid, signal.SIGINT)
    assert table.wait(PATIENCE) == 130
    said = (tmp_path / "said").read_text()
    assert said.endswith("fpo: stopped; finished steps are kept: run the same command again to go on\n")
    assert "Traceback" not in said
    when(lambda: not processes_of(table.pid), "the children's end")


@pytest.mark.slow
def test_steps_end_with_the_process_that_planned_them(table):
    table.kill()
    table.wait()
    when(lambda: not processes_of(table.pid), "the children's end")
