"""Atomic files, hashes, and strict and canonical JSON.

In: paths, bytes, objects that JSON can express. Out: files that appear whole or not at all, hashes, text.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")

# The pydantic configuration of every dataclass that `decode` reads.
STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

# A folder of this machine, or the URL of a folder in an object store.
Place = Path | str

_TMP_NAME = re.compile(r".+\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}")
# The temporary files that this process is writing.
_open_files: set[Path] = set()


def user_folder() -> Path:
    """The folder for files that can be made again: `$FPO_HOME`, `$XDG_CACHE_HOME/fpo` or `~/.cache/fpo`."""
    if home := os.environ.get("FPO_HOME"):
        return Path(home)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "fpo"
    return Path.home() / ".cache" / "fpo"


def as_place(name: Path | str) -> Place:
    """The path of a local folder (`file://` too); any other URL unchanged."""
    if isinstance(name, str) and "://" in name and not name.startswith("file://"):
        return name
    return Path(str(name).removeprefix("file://"))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(text: str | bytes) -> Any:
    """`json.loads` that refuses NaN and infinity, which JSON does not have.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"expected JSON without deep nesting, found {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"expected a finite number, found {name}")


def decode(kind: type[T], value: Any, where: str) -> T:
    """Builds a dataclass from parsed JSON with pydantic; no field may be missing, unknown or converted.

    Args:
        kind: a dataclass whose `__pydantic_config__`, and that of the dataclasses in it, is `STRICT`.
        value: the parsed JSON.
        where: the name of `value` in errors.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join([where, *map(str, first["loc"])])
        raise ValueError(f"{field}: {first['msg']}, found {str(first['input'])[:80]}") from error


def canonical_json(obj: Any) -> str:
    """The canonical JSON text of `obj`: sorted keys, no spaces, no escapes but those that JSON requires.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


@contextmanager
def naming(path: Path, *others: Path) -> Iterator[None]:
    """Adds `path` to an `OSError` of the block that names no file, as those of writes, or names one of `others`.

    Raises:
        OSError: with the same number and `path` as its file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and str(error.filename) not in map(str, others)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that is synced and renamed to `path` when the block ends without an error.

    Raises:
        OSError: it cannot be written; names `path`, which is left unchanged.
    """
    tmp = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}")
    _open_files.add(tmp)
    try:
        with naming(path, tmp):
            with tmp.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            tmp.replace(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    finally:
        _open_files.discard(tmp)
    # The new name survives a power cut only once the folder itself is on disk.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(folder)
    finally:
        os.close(folder)


def sync_files(folder: Path) -> None:
    """Syncs a folder's files to disk, not those of its subfolders; a later atomic write there syncs their names."""
    for path in folder.iterdir():
        if path.is_file():
            with naming(path), path.open("rb") as file:
                os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` to `path`; even after a crash a reader sees either the old file or the new one."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` for the block; if the process is killed, `remove_leftovers` removes it later."""
    tmp = parent / f"try.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    _open_files.add(tmp)
    try:
        tmp.mkdir()
        yield tmp
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        _open_files.discard(tmp)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders in `folder` that dead processes of this host left."""
    for path in folder.iterdir():
        name = _TMP_NAME.fullmatch(path.name)
        if name and name["host"] == socket.gethostname() and not _is_alive(int(name["pid"]), path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(pid: int, path: Path) -> bool:
    """Whether a living process may be writing `path`."""
    if pid == os.getpid():  # a restarted container has the same host name and often the same pids
        return path in _open_files
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's process
    return True
