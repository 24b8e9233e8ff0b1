"""Runs the steps of a plan, several at a time, each in a process of its own.

In: steps, each one command of `fpo` with its configuration. Out: their folders, each with `step.json` once it is done.
What is done is not run again; what was stopped goes on where its command can, and starts again where it cannot. A fresh
process a step keeps its peak memory its own; it is forked from a server that has the heavy imports behind it.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from tqdm import tqdm

from ...cache.files import write_atomically
from ..config import AlignConfig
from ..errors import is_expected, one_line
from . import run_command

DONE = "step.json"

# What the server that steps are forked from imports once.
MODULES = ("precompute", "sft", "train_sae", "align", "evaluate")
SLOW_IMPORTS = ["sae_lens", "scipy.stats", "transformers.models.gemma2.modeling_gemma2"]


@dataclass(frozen=True)
class Step:
    """One command with its configuration.

    Attributes:
        command: its name: precompute, align, sft, train-sae or evaluate.
        label: what a person reads.
        config: its configuration, `out` included.
        needs: folders of the steps that it stands on.
    """

    command: str
    label: str
    config: Any
    needs: tuple[Path, ...] = ()

    @property
    def out(self) -> Path:
        """The folder that it writes."""
        assert isinstance(self.config.out, Path)
        return self.config.out

    @property
    def log(self) -> Path:
        """What it said, beside its folder."""
        return self.out.with_name(f"{self.out.name}.log")

    @property
    def done(self) -> bool:
        """Whether it ran to its end."""
        return (self.out / DONE).is_file()


def run_steps(steps: Sequence[Step], jobs: int) -> None:
    """Runs every step that is not done, in their order as far as what they need allows.

    Args:
        steps: the steps; what a step needs stands before it.
        jobs: how many run at a time; each has its share of the cores.

    Raises:
        ValueError: if a step failed; the others that were running have been waited for.
        KeyboardInterrupt: if stopped; running steps were told to stop.
    """
    waiting = [step for step in steps if not step.done]
    finished = {step.out for step in steps} - {step.out for step in waiting}
    running: dict[Step, BaseProcess] = {}
    failed: list[tuple[Step, int]] = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"fpo.pipeline.commands.{name}" for name in MODULES] + SLOW_IMPORTS)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with tqdm(total=len(steps), initial=len(finished), unit=" steps", disable=None) as bar:
        try:
            while running or (waiting and not failed):
                while not failed and len(running) < jobs and (step := _next(waiting, finished)) is not None:
                    waiting.remove(step)
                    child = context.Process(target=_work, args=(step, threads, os.getpid()))
                    child.start()  # where this is stopped there is nothing to terminate yet
                    running[step] = child
                assert running, "a step stands before what it needs"
                bar.set_postfix_str(", ".join(step.label for step in running))
                wait([process.sentinel for process in running.values()])
                for step, process in list(running.items()):
                    if process.exitcode is None:
                        continue
                    del running[step]
                    if process.exitcode or not step.done:
                        failed.append((step, process.exitcode))
                        continue
                    finished.add(step.out)
                    bar.update()
                    if bar.disable:  # there is no terminal
                        typer.echo(f"{len(finished)}/{len(steps)} {step.label}: {seconds_of(step):.0f} s")
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.join()
    if failed:
        raise ValueError(_failure(*failed[0]))


def seconds_of(step: Step) -> float:
    """How long a finished step took, seconds."""
    return float(json.loads((step.out / DONE).read_text())["seconds"])


def _failure(step: Step, exitcode: int) -> str:
    """Why a step failed: the last line that it said, unless it was killed."""
    if exitcode < 0:
        reason = f"killed by {signal.Signals(-exitcode).name}, for want of memory if by nobody; run it again to go on"
    else:
        said = step.log.read_text(errors="replace").strip().splitlines() if step.log.exists() else []
        reason = said[-1] if said else "it died"
    return f"{step.label}: {reason} (all it said: {step.log})"


def _next(waiting: Sequence[Step], finished: set[Path]) -> Step | None:
    """The first step all of whose needs are there."""
    return next((step for step in waiting if finished.issuperset(step.needs)), None)


def _work(step: Step, threads: int, parent: int) -> None:
    """What the process of a step does: its command, with everything it says in its log.

    Ctrl-C reaches every process of the terminal; the one that plans then stops the others. A process that is stopped
    cleans up behind itself, where one that is killed would leave semaphores, of which Python warns.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    step.log.parent.mkdir(parents=True, exist_ok=True)
    with step.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    started = time.monotonic()
    try:
        _run(step, threads)
    except Exception as error:
        if not is_expected(error):
            raise
        print(one_line(error, "run it again to go on"), file=sys.stderr)  # noqa: T201 (this is the log)
        sys.exit(2)
    for checkpoint in step.out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # for going on; with the optimiser's state they are thrice the model
    record = {"command": step.command, "label": step.label, "seconds": round(time.monotonic() - started, 2)}
    write_atomically(step.out / DONE, json.dumps(record).encode())


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit("stopped; run it again to go on")


def _leave_with(parent: int) -> None:
    """Ends this process when the one that plans is gone, however it went: nobody would take its result."""
    while True:
        time.sleep(1)
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)


def _run(step: Step, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    config = step.config
    if step.command in ("align", "sft"):
        if (step.out / "run.yaml").exists():
            config = config.model_copy(update={"resume": True})
        elif step.out.exists():
            shutil.rmtree(step.out)  # stopped before its first step
    elif step.command != "precompute" and step.out.exists():
        shutil.rmtree(step.out)
    if isinstance(config, AlignConfig):
        from ...stages.train.memory import PeakMemory
        from .align import run_align

        run_align(config, [PeakMemory()])
    else:
        run_command(config)
