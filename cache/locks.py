"""Locks between processes, which the system releases when their holder ends, however it ends.

In: a file that exists only to be locked, or a folder. Out: whether the lock was taken; the file of a dead process locks
nothing.
"""

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


class Lock:
    """A lock on a file or folder, held by one process, or shared by several.

    It is released by `close`, when the object is collected, or when the process ends.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path`, and creates it as an empty file if it does not exist.

        Raises:
            UserError: it is a link to a file.
            OSError: it cannot be opened for writing.
        """
        self._path = path
        if path.is_symlink() and not path.is_dir():
            raise UserError(f"{path}: expected a file of its own for a lock, found a link; remove it")
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o666)
        self.close = weakref.finalize(self, os.close, self._file)

    def take(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Takes the lock, exclusively or shared; False if others hold it and `wait` is off.

        Raises:
            UserError: the file system has no such locks.
        """
        try:
            fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            raise UserError(
                f"{self._path}: expected a file system with locks (flock), found {error.strerror}; write to another, "
                "such as a disk of this machine, and copy the finished cache, or mount this one with locks"
            ) from error
        return True


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a file's lock during the block; yields False if another process holds it and `wait` is off.

    Raises:
        UserError, OSError: as `Lock` and `Lock.take`.
    """
    lock = Lock(path)
    try:
        yield lock.take(wait=wait)
    finally:
        lock.close()
