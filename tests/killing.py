"""Commands of `fpo` in processes of their own, killed at any moment or at an exact point of what they write.

In: arguments of the command line. Out: how the process ended; what it left is the caller's to judge. The processes are
forked from a server that has made the slow imports, as the steps of `pipeline/commands/jobs.py` are, and compute on one
thread.
"""

import builtins
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fpo.pipeline.cli import app
from fpo.pipeline.commands.jobs import MODULES, SLOW_IMPORTS

PRELOAD = [f"fpo.pipeline.commands.{name}" for name in MODULES] + SLOW_IMPORTS
KILLED = -signal.SIGKILL


class Command:
    """A command that is run again and again on one folder, as a user would whose runs are killed.

    Attributes:
        arguments: of the command line.
        folder: what it writes into.
        resumes: whether it goes on by `--resume` once there is a `run.yaml`, as stage two does.
        log: where its processes say what they say.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, resumes: bool = False) -> None:
        self.arguments, self.folder, self.resumes = list(arguments), folder, resumes
        self.log, self.trace = (folder.with_name(f"{folder.name}.{what}") for what in ("log", "points"))

    def start(self, point: int | None = None) -> Any:
        """Starts a process, which kills itself at a point if one is given; it has `pid`, `kill`, `join`, `exitcode`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(target=_run, args=(self, dict(os.environ), point))
        process.start()
        return process

    def prepare(self, point: int | None) -> None:
        """Makes a process that has just been started what it is to be; runs inside it."""
        if point is not None:
            Points(self, point).install()

    def end(self, point: int | None = None) -> int:
        """Runs it to its end, or to a point; returns the exit code, negative for a signal."""
        process = self.start(point)
        process.join()
        return int(process.exitcode)

    def finish(self) -> None:
        """Runs it to its end, which is to be a good one."""
        assert self.end() == 0, self.said()

    def signalled(self, number: signal.Signals, delay: float) -> int:
        """Starts it, sends it a signal after `delay` seconds if it still runs; returns the exit code, as `end`.

        A signal that can be caught is sent while the command catches it, neither as it starts up nor as it leaves.
        """
        process = self.start()
        catchable = number != signal.SIGKILL
        while catchable and not _catches_signals(process.pid) and process.exitcode is None:
            time.sleep(0.001)
        process.join(delay)
        if process.exitcode is None and (not catchable or _catches_signals(process.pid)):
            os.kill(process.pid, number)
        process.join()
        return int(process.exitcode)

    def interrupted(self, number: signal.Signals, file: str) -> subprocess.CompletedProcess[str]:
        """Runs it as a shell would, and sends a signal once there is a file of that pattern."""
        program = [sys.executable, "-m", "fpo.pipeline.cli", *self.arguments]
        environment, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
        process = subprocess.Popen(program, env=environment, stdout=pipe, stderr=pipe, text=True)
        while process.poll() is None and not list(self.folder.glob(file)):
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate()
        return subprocess.CompletedProcess(program, process.returncode, *said)

    def points(self) -> list[str]:
        """Runs it to its end and returns the points that it came by, in their order."""
        assert self.end(point=sys.maxsize) == 0, self.said()
        return self.trace.read_text().splitlines()

    def said(self) -> str:
        """All that its processes said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _run(command: Command, environment: dict[str, str], point: int | None) -> None:
    import torch
    from tqdm import tqdm

    os.environ.update(environment)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is killed leaves behind
    with command.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    command.prepare(point)
    resume = ["--resume"] if command.resumes and (command.folder / "run.yaml").exists() else []
    app(command.arguments + resume)


class Points:
    """Notes the points of a process's writing, and kills it at one of them.

    A point is before and after a file or folder of the command's is synchronised, renamed, removed or made, and halfway
    through a piece that is written to one.
    """

    def __init__(self, command: Command, last: int) -> None:
        self._folder, self._last, self._count = f"{command.folder}/", last, itertools.count()
        self._trace = command.trace.open("w")

    def install(self) -> None:
        """Wraps what this process writes with."""
        import safetensors.torch
        import torch

        os.mkdir = self._around(os.mkdir, "mkdir", _to_be_made)
        for name in ("unlink", "remove", "rmdir"):
            setattr(os, name, self._around(getattr(os, name), name, _to_be_removed))
        for name in ("replace", "rename"):
            setattr(os, name, self._around(getattr(os, name), name, lambda source, target: target))
        os.fsync = self._around(os.fsync, "fsync", _path_of)
        builtins.open = io.open = self._opening(io.open)  # type: ignore[assignment]
        # What is written in other languages is cut when it is there.
        torch.save = self._cutting(torch.save)
        safetensors.torch.serialize_file = self._cutting(safetensors.torch.serialize_file)

    def _here(self, what: str, path: Any) -> bool:
        """Comes by a point; whether it is the last."""
        path = f"{path}/"
        if not path.startswith(self._folder):
            return False
        print(what, path.removeprefix(self._folder).partition(".tmp-")[0], file=self._trace, flush=True)
        return next(self._count) == self._last

    def end_here(self, path: Any) -> None:
        """What becomes of the process at its last point, which has to do with `path`."""
        os.kill(os.getpid(), signal.SIGKILL)

    def _around(self, real: Callable[..., Any], name: str, path_of: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = path_of(*args, **kwargs)
            for when in ("before", "after"):
                if when == "after":
                    result = real(*args, **kwargs)
                if path is not None and self._here(f"{when} {name}", path):
                    self.end_here(path)
            return result

        return wrapped

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = real(path, mode, *args, **kwargs)
            if not set(mode).isdisjoint("wxa"):
                file.write = self._halving(file, path)
            return file

        return opened

    def _halving(self, file: Any, path: Any) -> Callable[..., Any]:
        real = file.write

        def write(data: Any) -> Any:
            if self._here("half of", path):
                real(data[: len(data) // 2])
                file.flush()
                self.end_here(path)
            return real(data)

        return write

    def _cutting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def save(what: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            real(what, path, *args, **kwargs)
            if self._here("half of", path):
                os.truncate(path, Path(path).stat().st_size // 2)
                self.end_here(path)

        return save


def _path_of(file: int) -> Path:
    return Path(f"/proc/self/fd/{file}").readlink()


def _to_be_made(path: Any, *mode: Any) -> Any:
    return None if Path(path).exists() else path


def _to_be_removed(path: Any, *, dir_fd: int | None = None) -> Any:
    where = Path(path) if dir_fd is None else _path_of(dir_fd) / path
    return where if where.exists() else None


def _catches_signals(pid: int) -> bool:
    """Whether a process catches SIGTERM, as a command does from its first line to its last."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], base=16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """So many of them, at equal distances."""
    return [numbers[i * len(numbers) // count] for i in range(count)]
