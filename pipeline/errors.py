"""What a user is told of an error: one line.

In: an exception, and how to go on. Out: what was expected, found, where, and what to do.
"""

import errno
from pathlib import Path

from ..cache.files import user_folder

# What happens to a user's files, machine and numbers; anything else is a mistake of the program's.
USER_ERRORS = (ValueError, OSError, FloatingPointError)

FULL = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "no space left in this user's quota"}
REFUSED = {
    errno.EROFS: "its file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


def one_line(error: BaseException, go_on: str) -> str:
    """The line; `go_on` says what to do once the cause is removed, if that is for the system to say."""
    if isinstance(error, OSError) and error.errno in FULL | REFUSED and error.filename is not None:
        return f"{error.filename}: {_told(error.errno, Path(str(error.filename)), go_on)}"
    return " ".join(str(error).split())


def _told(number: int, path: Path, go_on: str) -> str:
    ours = path.is_relative_to(user_folder())
    if number in FULL:
        if ours:
            return f"{FULL[number]}; free space, or set FPO_HOME to a folder with more, and run the same command again"
        return f"{FULL[number]}; free space; {go_on}"
    place = "set FPO_HOME to a folder that this user may write" if ours else "give a place that this user may use"
    return f"{REFUSED[number]}; {place}, or change that"
