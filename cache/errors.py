"""Exceptions that stand for a user's mistake, and the conversion of a library's errors into them."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = ("datasets", "transformers")
LONGEST = 600  # characters of a library's message


class UserError(ValueError):
    """An option, file, model, data set or cache is not what it must be.

    Its message is one line: what was expected, what was found, where, and what to do. The command line prints it and
    exits with code 2; any other exception is a fault of the program and gives a traceback.
    """


class MissingError(UserError, FileNotFoundError):
    """A cache, or a file of one, does not exist."""


class DamageError(UserError):
    """A file of a cache has been altered or cut short; `fpo precompute --repair` makes it again."""


class _Held(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a record."""
        self.records.append(record)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Reads a user's file by a library: each refuses in ways of its own, and many log what they then raise.

    Args:
        what: the beginning of the error, which names the file.

    Raises:
        OSError: a disk has no space for what a library keeps; names the folder.
        UserError: whatever else was raised inside, in one line.
    """
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    held = _Held()
    for logger in loggers:
        logger.handlers, logger.propagate = [held], False
    try:
        yield
    except Exception as error:
        held.records.clear()  # the line says it
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and (cause.errno == errno.ENOSPC or "Not enough disk space" in str(cause)):
            from datasets import config

            where = cause.filename or str(config.HF_DATASETS_CACHE)  # the one library that writes as it reads
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where) from error
        # A mistake that the library stumbled over has no sentence: a missing key is the key alone.
        kind = "" if isinstance(cause, ValueError | OSError | RuntimeError) else f"{type(cause).__name__}: "
        raise UserError(f"{what}: {kind}{' '.join(str(cause).split())[:LONGEST]}") from error
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        for record in held.records:
            logging.getLogger(record.name).handle(record)
