"""Locks between processes, which the system lets go of when their holder ends, however it ends.

In: a file that exists for its lock alone, or a folder. Out: whether it is held; a file left by a dead process, of this
host or another, holds nothing.
"""

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


class Lock:
    """An open file or folder that can be locked; of two of them at most one is, unless both share it.

    It is let go of by `close`, when nobody has the object any more, or when the process ends.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path`, which is made as an empty file where there is nothing.

        Raises:
            UserError: it is a link to a file, which may be a stranger's.
            OSError: it cannot be opened for writing.
        """
        self._path = path
        if path.is_symlink() and not path.is_dir():
            raise UserError(f"{path}: expected a file of its own for a lock, found a link; remove it")
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o666)
        self.close = weakref.finalize(self, os.close, self._file)

    def take(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Takes the lock, alone or shared; False if others hold it and this one is not to wait.

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
                "as a disk of this machine, and copy what is finished, or mount this one with locks"
            ) from error
        return True


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a file for the block: True, or False where another holds it and it is not waited for.

    Raises:
        OSError: as `Lock`.
    """
    lock = Lock(path)
    try:
        yield lock.take(wait=wait)
    finally:
        lock.close()
