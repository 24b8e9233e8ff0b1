"""Runs the steps of a plan, several at a time, each in its own process.

In: steps, each one `fpo` command with its configuration. Out: their folders, with a `step.json` in each finished one.
Finished steps are skipped. An interrupted step resumes if its command can, else it starts again. Each step has a fresh
process, so that its peak memory is its own; a fork server does the slow imports once for all of them.
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

from ...cache.errors import UserError
from ...cache.files import write_atomically
from ..config import AlignConfig
from ..errors import is_expected, one_line
from . import run_command

DONE = "step.json"

# What the fork server imports once.
MODULES = ("precompute", "sft", "train_sae", "align", "evaluate")
SLOW_IMPORTS = ["sae_lens", "scipy.stats", "transformers.models.gemma3.modeling_gemma3"]


@dataclass(frozen=True)
class Step:
    """One command with its configuration.

    Attributes:
        command: its name: precompute, align, sft, train-sae or evaluate.
        label: its name for people.
        config: the configuration of that command, `out` included.
        needs: output folders of the steps that must finish first.
    """

    command: str
    label: str
    config: Any
    needs: tuple[Path, ...] = ()

    def __hash__(self) -> int:
        # A configuration with a mapping, such as a schedule's arguments, has no hash of its own.
        return hash((self.command, self.out))

    @property
    def out(self) -> Path:
        """The folder that it writes."""
        assert isinstance(self.config.out, Path)
        return self.config.out

    @property
    def log(self) -> Path:
        """Everything that it prints, in a file beside its folder."""
        return self.out.with_name(f"{self.out.name}.log")

    @property
    def done(self) -> bool:
        """Whether it has finished."""
        return (self.out / DONE).is_file()


def run_steps(steps: Sequence[Step], jobs: int) -> None:
    """Runs the unfinished steps, each as soon as the steps that it needs are done.

    Args:
        steps: the steps; each comes after those that it needs.
        jobs: how many run at a time; they share the cores equally.

    Raises:
        UserError: a step failed; the steps that were running beside it have finished.
        KeyboardInterrupt: stopped by a signal; the running steps were stopped too.
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
                    child.start()  # interrupted here, there is no child to terminate
                    running[step] = child
                assert running, "a step comes before one that it needs"
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
        raise UserError(_failure(*failed[0]))


def seconds_of(step: Step) -> float:
    """How long a finished step took, seconds."""
    return float(json.loads((step.out / DONE).read_text())["seconds"])


def _failure(step: Step, exitcode: int) -> str:
    """Why a step failed: the signal that killed it, or the last line of its log."""
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        reason = f"killed by {name}, probably because memory ran out; run the same command again to resume"
    else:
        lines = step.log.read_text(errors="replace").strip().splitlines() if step.log.exists() else []
        reason = lines[-1] if lines else f"it ended with exit code {exitcode} and printed nothing"
    return f"{step.label}: {reason} (full log: {step.log})"


def _next(waiting: Sequence[Step], finished: set[Path]) -> Step | None:
    """The first step that needs no unfinished one; None if all must wait."""
    return next((step for step in waiting if finished.issuperset(step.needs)), None)


def _work(step: Step, threads: int, parent: int) -> None:
    """Runs a step in its process, with standard output and standard error in its log.

    Ctrl-C reaches every process of the terminal: the step ignores it and waits for the parent's SIGTERM. It exits
    through SystemExit, so that it releases its semaphores; Python warns of those that a killed process leaves.
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
        print(one_line(error, "run the same command again to resume"), file=sys.stderr)  # noqa: T201 (this is the log)
        sys.exit(2)
    for checkpoint in step.out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # needed only to resume; with the optimiser's state, three times the model's size
    record = {"command": step.command, "label": step.label, "seconds": round(time.monotonic() - started, 2)}
    write_atomically(step.out / DONE, json.dumps(record).encode())


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit("stopped; run the same command again to resume")


def _leave_with(parent: int) -> None:
    """Ends this process when its parent is gone, even if that was killed; checks once a second."""
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
