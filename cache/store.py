"""Files in an object store, at any URL for which fsspec has a driver: `s3://`, `gs://`, `hf://datasets/…`.

In: a URL. Out: its files by name, to read, fetch, write and remove; errors name the address and say what to do.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from .errors import DamageError, MissingError, UserError
from .files import atomic_file, sha256_file
from .manifest import LARGEST_TEXT, ShardRecord

BLOCK = 1 << 24
MAKE_IT = "make the bucket or the repository first, or correct the address"
EXTRAS = {"s3": "fpo[s3]", "s3a": "fpo[s3]", "gs": "fpo[gcs]", "gcs": "fpo[gcs]"}

_SHARD = re.compile(r"data/[^/]+\.parquet")


class Store:
    """The files below a URL, by their names relative to it.

    Every method raises `MissingError` for a file that is not there and `UserError` when the store does not answer; both
    name the address.

    Attributes:
        url: the address, without a slash at its end.
    """

    def __init__(self, url: str):
        """Finds the driver; sends nothing to the store yet.

        Raises:
            UserError: there is no driver for such a URL, or it is not installed.
        """
        self.url = url if url.endswith("://") else url.rstrip("/")
        protocol = url.partition("://")[0]
        with self._asking():
            try:
                self._files, self._root = fsspec.url_to_fs(self.url)
            except ImportError as error:
                install = f"pip install '{EXTRAS[protocol]}'" if protocol in EXTRAS else "install what it names"
                raise UserError(
                    f"{url}: expected a driver for {protocol}://, found none ({error}); {install}"
                ) from error
            except ValueError as error:
                raise UserError(
                    f"{url}: expected a folder or a URL such as s3://…, gs://… or hf://datasets/…, found: {error}; "
                    "correct it"
                ) from error
        if not self._root.strip("/"):
            raise UserError(f"{url}: expected a bucket or a repository after '://', found nothing; add its name")

    def address(self, name: str = "") -> str:
        """The URL of a file, or of the folder."""
        return f"{self.url}/{name}" if name else self.url

    def refresh(self) -> None:
        """Clears the driver's cached listings, because others write to the store too."""
        self._files.invalidate_cache()

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file in the folder and its direct subfolders, by name."""
        with self._asking():
            self.refresh()
            found = self._files.find(self._root, maxdepth=2, detail=True)
        return {path[len(self._root) :].lstrip("/"): int(info["size"]) for path, info in found.items()}

    def shards(self) -> list[str]:
        """The names of the Parquet files in `data/`."""
        return sorted(name for name in self.sizes() if _SHARD.fullmatch(name))

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Opens a file for reading; its `size` attribute is in bytes."""
        with self._asking(name), self._files.open(f"{self._root}/{name}", "rb") as file:
            yield file

    def read(self, name: str) -> bytes:
        """Reads a whole text file, bypassing cached listings.

        Raises:
            DamageError: it is larger than any text file of a cache.
        """
        self.refresh()
        with self.open(name) as file:
            if file.size > LARGEST_TEXT:
                found = f"expected at most {LARGEST_TEXT} bytes, found {file.size}"
                raise DamageError(f"{self.address(name)}: {found}; look at what was put there")
            return bytes(file.read(file.size))

    def read_if_there(self, name: str) -> bytes | None:
        """As `read`, but None for a file that does not exist."""
        try:
            return self.read(name)
        except MissingError:
            return None

    def fetch(self, name: str, path: Path, expected: ShardRecord | None = None) -> None:
        """Copies a file to `path` atomically.

        Raises:
            DamageError: it is not the expected one; if its size differs, none of it is fetched.
        """
        with self.open(name) as source:
            if expected is not None and source.size != expected.bytes:
                raise DamageError(f"expected {expected.bytes} bytes, found {source.size}")
            with atomic_file(path) as file:
                shutil.copyfileobj(source, file, BLOCK)
                file.flush()
                if expected is not None and (sha256 := sha256_file(Path(file.name))) != expected.sha256:
                    raise DamageError(f"expected SHA-256 {expected.sha256}, found {sha256}")

    def put(self, name: str, path: Path) -> None:
        """Uploads a file."""
        with self._asking(name, MAKE_IT):
            self._files.put_file(str(path), f"{self._root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Writes a file."""
        with self._asking(name, MAKE_IT):
            self._files.pipe_file(f"{self._root}/{name}", data)

    def remove(self, name: str) -> None:
        """Removes a file."""
        with self._asking(name):
            self._files.rm_file(f"{self._root}/{name}")

    @contextmanager
    def _asking(self, name: str = "", advice: str = "correct the address") -> Iterator[None]:
        """Turns a driver's exceptions, whose types differ and which seldom name the address, into `UserError`."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if isinstance(error, FileNotFoundError):
                raise MissingError(f"{self.address(name)}: not found ({said}); {advice}") from error
            raise UserError(
                f"{self.address(name)}: expected the store to answer, found {said}; look at the address, the network "
                "and your credentials, and run the same command again"
            ) from error
