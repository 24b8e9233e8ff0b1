"""`run.yaml`, the record of a run in its folder: who may write there, whether the settings are the same, and the end.

In: a run's folder and a `RunConfig`. Out: what the record says, one line that says what is in the way, and a mark that
only a run which came to its end has.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...cache.errors import UserError
from ...cache.files import sync_files, write_atomically
from ...cache.locks import Lock
from ..config import RunConfig, to_yaml
from ..plain_yaml import read_yaml, write_yaml

RECORD = "run.yaml"
# Keys of the record.
FINISHED = "finished"
START_SHA256 = "start_sha256"  # of the model that the policy was before its first step


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Around all that a command writes into its folder, which is made: two that saw it empty are one too many.

    Raises:
        ValueError: another process writes there.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out)
    try:
        try:
            alone = lock.take()
        except UserError:  # a file system such as NFS may not lock folders, so nobody can tell
            alone = True
        if not alone:
            raise ValueError(f"--out: another run is writing into {out}; wait for it, or give another folder")
        yield
    finally:
        lock.close()


def read_record(out: Path, option: str) -> dict[str, Any]:
    """The record in a folder; `option` begins what is said if it cannot be read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no record.
    """
    record = out / RECORD
    try:
        found = read_yaml(record.read_bytes())
    except ValueError as error:
        raise ValueError(f"{option}: {record}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{option}: expected the settings of a run in {record}, found {type(found).__name__}")
    return found


def differing(before: Mapping[str, Any], config: RunConfig, identity: Mapping[str, str], free: Sequence[str]) -> str:
    """The settings and inputs in which a run differs from its record, those of `free` aside; empty if in none.

    An option that came after the record had its default.
    """
    before = {**read_yaml(to_yaml(RunConfig.model_validate({})).encode()), **before}
    now = {**read_yaml(to_yaml(config).encode()), **identity}
    return "; ".join(
        f"{key}: was {before.get(key)!r}, is {value!r}"
        for key, value in now.items()
        if key not in free and before.get(key) != value
    )


def mark_finished(out: Path, **end: Any) -> None:
    """Adds to the record that the run is finished, and how, once all its files are on disk."""
    sync_files(out)
    record = out / RECORD
    write_atomically(record, record.read_bytes() + write_yaml({FINISHED: end}).encode())
