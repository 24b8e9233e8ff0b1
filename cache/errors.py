"""Exceptions that stand for a user's mistake, and for nothing else."""


class UserError(ValueError):
    """An option, file, model, data set or cache is not what it must be.

    Its message is one line: what was expected, what was found, where, and what to do. The command line prints it and
    exits with code 2; any other exception is a fault of the program and gives a traceback.
    """


class MissingError(UserError, FileNotFoundError):
    """A cache, or a file of one, does not exist."""


class DamageError(UserError):
    """A file of a cache has been altered or cut short; `fpo precompute --repair` makes it again."""
