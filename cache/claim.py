"""Who writes a cache: any number of workers at once, all of one spec.

In: a cache's folder and a spec. Out: a lock that says that a writer of this spec lives; the spec, whose date those who
came first may have chosen.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .files import canonical_json, decode, parse_json, write_atomically
from .identity import IdentityError, Meaning, Numerics, differences
from .locks import Lock, locked


def claim(
    folder: Path, meaning: Meaning, numerics: Numerics, begun: Callable[[], Meaning] | None = None
) -> tuple[Lock, Meaning]:
    """Joins the writers of a folder, whose spec is what the first of those that live said.

    They share a lock that tells whether one lives, so that a spec which a killed writer left binds nobody.

    Args:
        folder: of the cache.
        meaning: of the cache.
        numerics: of the cache.
        begun: where the day may be another, that of what was begun: the meaning on the day that the folder's files say,
            which is asked for while nobody writes any. Two workers that start about midnight so agree.

    Returns:
        The lock, to be held as long as this writer may write, and the meaning.

    Raises:
        IdentityError: those who live are of another spec.
        OSError: the folder cannot be written, or its file system has no locks.
    """
    spec, alive = folder / ".locks" / "spec.json", Lock(folder / ".locks" / "writers.lock")
    with locked(folder / ".locks" / "spec.lock"):
        if alive.take():
            if begun is not None:
                meaning = begun()
            write_atomically(spec, canonical_json([asdict(meaning), asdict(numerics)]).encode())
        else:
            theirs, by = parse_json(spec.read_bytes())
            others = decode(Meaning, theirs, "meaning")
            if begun is not None:
                meaning = meaning.dated_as([others])
            found = differences(meaning, others)
            if found := found + differences(numerics, decode(Numerics, by, "numerics")):
                raise IdentityError(
                    f"{folder}: others are writing it with another spec ({'; '.join(found)}); take another folder or "
                    "the same spec, or stop them first"
                )
        alive.take(shared=True, wait=True)
    return alive, meaning
