"""Disks that take no more, folders that may not be read or written, file systems without locks.

In: commands of killing.py. Out: the same, run where that is so. A full disk is had twice: a real one, a small tmpfs,
where this machine lets us mount it, and one that is full from a given write on, which any machine can do.
"""

import ctypes
import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from killing import Command, Points

# What fails on a full disk: a piece that is written, a file whose pieces were only promised room, a folder.
FAILS = ("half of", "before fsync", "before mkdir")
FULL = "no space left on device"


class Filling(Command):
    """A command whose disk is full from a point of its writing on."""

    def prepare(self, point: int | None) -> None:
        if point is not None:
            FullFrom(self, point).install()


class FullFrom(Points):
    """Fails at a point, and at all after it, as a full disk does; libraries in other languages say it their own way."""

    full = False

    def _here(self, what: str, path: Any) -> bool:
        """Comes by a point; whether it fails there."""
        self.full = super()._here(what, path) or self.full
        return self.full and f"{path}/".startswith(self._folder) and what.startswith(FAILS)

    def end_here(self, path: Any) -> None:
        if str(path).endswith((".pt", ".pth")):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        if str(path).endswith(".safetensors"):
            from safetensors import SafetensorError

            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        # The kernel names what cannot be made, and not what cannot be written.
        named = () if Path(path).exists() or ".tmp-" in str(path) else (str(path),)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)


class Plain(Command):
    """A command of a user whom permissions hold back, as they do not hold back root."""

    def prepare(self, point: int | None) -> None:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, nothing) == 0


class WithoutLocks(Command):
    """A command on a file system that has no `flock`."""

    number = errno.ENOLCK

    def prepare(self, point: int | None) -> None:
        real = fcntl.flock

        def flock(file: int, how: int) -> None:
            if str(Path(f"/proc/self/fd/{file}").readlink()).startswith(str(self.folder)):
                raise OSError(self.number, os.strerror(self.number))
            real(file, how)

        fcntl.flock = flock


class Slow(Command):
    """A command of stage one that takes its time before each shard, so that others are there before it writes any."""

    def prepare(self, point: int | None) -> None:
        from fpo.cache.writer import CacheWriter

        real = CacheWriter.write_shard

        def write_shard(*arguments: Any) -> None:
            time.sleep(0.2)
            real(*arguments)

        CacheWriter.write_shard = write_shard  # type: ignore[method-assign]


class Disk:
    """A small disk.

    Attributes:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def leave(self, free: int) -> None:
        """Fills it but for so many bytes, rounded down to pages."""
        self._ballast.unlink(missing_ok=True)
        there = os.statvfs(self.folder)
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, there.f_bavail * there.f_frsize - free))

    def empty(self) -> None:
        """Frees it again."""
        self._ballast.unlink(missing_ok=True)

    def read_only(self, so: bool = True) -> None:
        """Makes it read-only, or not any more."""
        mount("-o", f"remount,{'ro' if so else 'rw'}", self.folder)


@contextmanager
def small_disk(folder: Path, size: int = 16_000_000) -> Iterator[Disk]:
    """A disk of its own at a folder; skips the test where none can be mounted."""
    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def mount(*arguments: Any) -> None:
    """Calls `mount`."""
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")


def refused(command: Command, code: int, *parts: str) -> str:
    """Checks that a command ended with exit code 2 and one line that holds `parts`; returns it."""
    said = command.said()
    assert code == 2, said
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("fpo:"))
    for part in parts:
        assert part in line, line
    command.log.unlink()
    return line
