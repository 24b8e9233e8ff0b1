"""Files that appear whole or not at all, and text that is the same for the same content.

In: paths, bytes, JSON-able objects. Out: files on disk, hashes, canonical text.
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

# How pydantic is to read a dataclass (`decode`).
STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

# A folder of this machine, or the URL of one in an object store.
Place = Path | str

_TMP_NAME = re.compile(r".+\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}")
# Temporary files of this process that are being written.
_open_files: set[Path] = set()


def user_folder() -> Path:
    """The folder for what can be made again: `$FPO_HOME`, else `$XDG_CACHE_HOME/fpo`, else `~/.cache/fpo`."""
    if home := os.environ.get("FPO_HOME"):
        return Path(home)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "fpo"
    return Path.home() / ".cache" / "fpo"


def as_place(name: Path | str) -> Place:
    """The folder that a name means, or the name itself where it is a URL of another machine."""
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
        ValueError: the text is not JSON, or is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"expected JSON that is not nested deep, found {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"expected a finite number, found {name}")


def decode(kind: type[T], value: Any, where: str) -> T:
    """Builds a dataclass from parsed JSON, strictly: no field is missing, unknown or converted (pydantic).

    Args:
        kind: a dataclass that has `STRICT` for its `__pydantic_config__`, as have the dataclasses in it.
        value: the parsed JSON.
        where: what `value` is called in errors.

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
    """The one JSON text of `obj`: sorted keys, no spaces, no escapes beyond JSON's own.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


@contextmanager
def naming(path: Path, *others: Path) -> Iterator[None]:
    """Names `path` in what the system refuses inside: a write that fails does not say of which file, or of `others`.

    Raises:
        OSError: what was raised, of that path.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and str(error.filename) not in map(str, others)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` that takes its name, durably, when the block ends without an error.

    Raises:
        OSError: it cannot be written; names `path`, which is as it was.
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
    """Puts the files of a folder, not those below it, on disk; their names are there once one is written atomically."""
    for path in folder.iterdir():
        if path.is_file():
            with naming(path), path.open("rb") as file:
                os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` to `path` such that a reader sees the old file or the new one, also after a crash."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` for the block, which `remove_leftovers` knows should the process be killed."""
    tmp = parent / f"try.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    _open_files.add(tmp)
    try:
        tmp.mkdir()
        yield tmp
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        _open_files.discard(tmp)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files and folders in `folder` whose writer ran on this host and is dead."""
    for path in folder.iterdir():
        name = _TMP_NAME.fullmatch(path.name)
        if name and name["host"] == socket.gethostname() and not _is_alive(int(name["pid"]), path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(pid: int, path: Path) -> bool:
    """Whether a process is there that may be writing `path`."""
    if pid == os.getpid():  # a container that is started again has the same host and often the same numbers
        return path in _open_files
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # it is another user's
    return True
