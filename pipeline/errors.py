"""What a user is told of an error or a signal: one line, and an exit code.

In: an exception, and how to go on. Out: exit code 2 for a `UserError` and for a path that the system refuses; 1 for
numbers that are not finite; 130 for a signal. Anything else is a fault of the program, and stays a traceback.
"""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from ..cache.errors import UserError
from ..cache.files import user_folder

FULL = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "no space left in this user's quota"}
REFUSED = {
    errno.EROFS: "its file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


@contextmanager
def user_errors(resume: str = "nothing was written") -> Iterator[None]:
    """Turns what a user can mend into one line and an exit code; with FPO_TRACEBACK set, into a traceback.

    `resume` says what became of the work when it is interrupted.
    """
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    caught = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in caught}
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        # A signal that comes while a module is imported may surface as an ImportError.
        if stopped or isinstance(error, KeyboardInterrupt):
            typer.echo(f"fpo: stopped; {resume}", err=True)
            raise typer.Exit(130) from None
        if os.environ.get("FPO_TRACEBACK") or not is_expected(error):
            raise
        typer.echo(f"fpo: {one_line(error, resume)}", err=True)
        raise typer.Exit(1 if isinstance(error, FloatingPointError) else 2) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_expected(error: BaseException) -> bool:
    """Whether an error is about a user's files, machine or numbers, and not a fault of the program."""
    return isinstance(error, UserError | FloatingPointError) or _is_of_a_path(error)


def one_line(error: Any, go_on: str) -> str:
    """The line; `go_on` says what to do once the cause is removed, where the system raised the error."""
    if _is_of_a_path(error) and error.errno in FULL | REFUSED and error.filename is not None:
        return f"{error.filename}: {_advice(error.errno, Path(str(error.filename)), go_on)}"
    return " ".join(str(error).split())


def _is_of_a_path(error: Any) -> bool:
    """Whether the system refused a path: a full or read-only disk, a folder in place of a file, a name too long."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    return error.filename is not None or error.errno in FULL | REFUSED  # pyarrow has the name in its text alone


def _advice(number: int, path: Path, go_on: str) -> str:
    ours = path.is_relative_to(user_folder())
    if number in FULL:
        if ours:
            return f"{FULL[number]}; free space, or set FPO_HOME to a folder with more, and run the same command again"
        return f"{FULL[number]}; free space; {go_on}"
    place = "set FPO_HOME to a folder that this user may write" if ours else "give a place that this user may use"
    return f"{REFUSED[number]}; {place}, or change that"
