"""A cache in an object store: a verified local copy of it, and a writer that builds it locally and uploads it.

In: the URL of a cache, or rows and reports. Out: a local folder to read, or the files of a cache in the store, uploaded
shard by shard, the manifest last. A store may hold a stranger's files: only names of a checked manifest are fetched,
and no file before its size is known.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from .errors import DamageError, MissingError, UserError
from .files import as_place, canonical_json, remove_leftovers, sha256_text, user_folder, write_atomically
from .identity import Meaning, Numerics
from .locks import locked
from .manifest import MANIFEST_NAME, REPAIR, Manifest, ShardRecord, ShardReport
from .schema import CachedPair
from .shard import LARGEST_FOOTER, TAIL, Footer, footer_of
from .spec import Found, Spec, record_of
from .store import Store
from .writer import BESIDE, CARD_NAME, OPTIONS_NAME, PROVENANCE_NAME, CacheWriter


def load_manifest(store: Store) -> Manifest:
    """The manifest of a cache in a store; raises as `Manifest.load`."""
    try:
        data = store.read(MANIFEST_NAME)
    except MissingError as error:
        raise MissingError(f"{error}, or finish `fpo precompute`, which uploads the manifest last") from error
    return Manifest.parse(data, store.address(MANIFEST_NAME))


def fetch(place: Path | str) -> Path:
    """The local folder of a cache; a cache in a store is copied into the user's folder, once for each manifest.

    Raises:
        MissingError: the store has no manifest, or lacks a shard.
        DamageError: a file in the store is damaged.
        UserError: the store does not answer, or there is no driver for it.
    """
    place = as_place(place)
    if isinstance(place, Path):
        return place
    store = Store(place)
    manifest = load_manifest(store)
    folder = user_folder() / "fetched" / manifest.sha256
    (folder / "data").mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not (folder / MANIFEST_NAME).exists():
            remove_leftovers(folder / "data")
            for record in manifest.shards:
                if not (folder / record.name).exists():  # an interrupted command may have fetched it
                    _fetch_shard(store, record, folder / record.name)
            for name in BESIDE:
                if (data := store.read_if_there(name)) is not None:
                    write_atomically(folder / name, data)
            manifest.save(folder)
    return folder


def _fetch_shard(store: Store, record: ShardRecord, path: Path) -> None:
    try:
        store.fetch(record.name, path, record)
    except DamageError as error:
        raise DamageError(f"{store.address(record.name)}: {error}; {REPAIR}") from error


def open_writer(
    place: Path | str,
    meaning: Meaning,
    numerics: Numerics,
    num_rows: int,
    *,
    repair: bool = False,
    keep_date: bool = False,
) -> "CacheWriter | StoreWriter":
    """Opens the writer of a cache in a folder or at a URL; arguments and errors are those of the writers."""
    place = as_place(place)
    if isinstance(place, Path):
        return CacheWriter(place, meaning, numerics, num_rows, repair=repair, keep_date=keep_date)
    return StoreWriter(place, meaning, numerics, num_rows, repair=repair, keep_date=keep_date)


def read_any_footer(place: Path | str) -> Footer:
    """The footer of any sound shard, which identifies a cache that is not finished yet.

    Raises:
        MissingError: there is no sound shard.
    """
    place = as_place(place)
    if isinstance(place, Path):
        footers = (footer_of(path) for path in sorted((place / "data").glob("*.parquet")))
    else:
        store = Store(place)
        footers = (_stored_footer(store, name) for name in store.shards())
    found = next((footer for footer in footers if footer is not None), None)
    if found is None:
        raise MissingError(f"{place}: expected a shard, found none; run `fpo precompute`")
    return found


def _stored_footer(store: Store, name: str) -> Footer | None:
    """Reads the last bytes of a shard from a store; its footer, or None if it is missing or damaged."""
    try:
        with store.open(name) as file:
            # pyarrow could not tell an unreachable store from a damaged shard.
            if file.size < TAIL:
                return None
            file.seek(-TAIL, 2)
            length = min(file.size, TAIL + LARGEST_FOOTER, TAIL + int.from_bytes(file.read(4), "little"))
            file.seek(-length, 2)
            data = file.read(length)
    except MissingError:
        return None
    return footer_of(pa.BufferReader(data))


class StoreWriter:
    """Writes a cache into a store, with the methods of `CacheWriter`, which it builds the files with locally.

    The store's content decides what is done, so a run on any machine continues from the shards that the store holds.
    Workers of one machine share a local folder; give workers of several machines different shards, or they do the same
    work twice.

    Attributes:
        spec: what is written, with the date that holds.
        published: the manifest that the store held; None if it was missing or damaged.
    """

    def __init__(
        self,
        url: str,
        meaning: Meaning,
        numerics: Numerics,
        num_rows: int,
        *,
        repair: bool = False,
        keep_date: bool = False,
    ) -> None:
        """Reads the footers of the shards that the store holds; arguments as `CacheWriter`.

        Raises:
            IdentityError: the store holds a cache of another spec.
            UserError: the store does not answer, has no driver or holds shards that do not belong; the spec cannot be
                written; the manifest is damaged, or there is nothing to repair.
        """
        self._store = Store(url)
        footers = {name: _stored_footer(self._store, name) for name in self._store.shards()}
        if keep_date:
            meaning = meaning.dated_as(footer.meaning for footer in footers.values() if footer is not None)
        staging = _staging(self._store.url, Spec(meaning, numerics, num_rows), keep_date)
        (staging / MANIFEST_NAME).unlink(missing_ok=True)  # a copy; the store's manifest counts
        self._local = CacheWriter(staging, meaning, numerics, num_rows, keep_date=keep_date)
        self._found = Found.read(lambda: load_manifest(self._store), repair=repair)
        self.spec.check_contents(self._store.url, self._found, footers, repair=repair)
        self._stored = {i for i, name in enumerate(self.spec.names) if self.spec.is_shard(i, footers.get(name))}

    @property
    def spec(self) -> Spec:
        """What is written, with the date that holds."""
        return self._local.spec

    @property
    def published(self) -> Manifest | None:
        """The manifest that the store held."""
        return self._found.manifest

    def is_done(self, index: int) -> bool:
        """Whether the shard is in the store or built locally, and its footer has this spec and number."""
        if self._local.is_done(index):
            return True
        if index not in self._stored:
            self._store.refresh()
            if self.spec.is_shard(index, _stored_footer(self._store, self.spec.names[index])):
                self._stored.add(index)
        return index in self._stored

    def missing(self) -> list[int]:
        """The shards that are not done."""
        return [index for index in range(self.spec.num_shards) if not self.is_done(index)]

    @contextmanager
    def lock(self, index: int) -> Iterator[bool]:
        """Claims a shard among the workers of this machine, as `CacheWriter.lock`."""
        with self._local.lock(index) as mine:
            yield mine and not self.is_done(index)

    def write_shard(self, rows: Sequence[CachedPair], report: ShardReport) -> None:
        """Checks a shard, commits it locally and uploads it; raises as `CacheWriter.write_shard`, and `UserError`."""
        self._local.write_shard(rows, report)
        self._store.put(self.spec.names[report.index], self._local.shard_path(report.index))

    def finish(self) -> Manifest | None:
        """Uploads what the store lacks: shards of an interrupted run, the data card, then the manifest.

        Returns:
            The manifest, or None if shards are missing.

        Raises:
            UserError: the store does not answer, a shard does not read back, or no shard has a pair.
        """
        sizes = self._store.sizes()
        for index, name in enumerate(self.spec.names):
            path = self._local.shard_path(index)
            if self._local.is_done(index) and sizes.get(name) != path.stat().st_size:
                self._store.put(name, path)
        if self.missing():
            return None
        manifest = self.spec.manifest_of([self._record(index, sizes) for index in range(self.spec.num_shards)])
        self._local.publish(manifest)
        if manifest != self.published:
            self._store.put(CARD_NAME, self._local.folder / CARD_NAME)
            self._store.put(MANIFEST_NAME, self._local.folder / MANIFEST_NAME)
        return manifest

    def _record(self, index: int, sizes: dict[str, int]) -> ShardRecord:
        name, path = self.spec.names[index], self._local.shard_path(index)
        vouched = None if self._local.wrote(index) else self._found.vouched(index)
        if vouched is not None and sizes.get(name) == vouched.bytes:
            return vouched  # `fetch` and `discard_damage` read its bytes
        if self._local.is_done(index):
            return record_of(path, name, vouched)
        self._store.fetch(name, path)
        try:
            return record_of(path, name, vouched)
        except UserError as error:
            path.unlink()
            raise UserError(f"{self._store.address(name)}, copied to {error}") from error

    def discard_damage(self) -> list[str]:
        """Removes damaged files from the store, as `CacheWriter.discard_damage`; reads a local copy of each shard."""
        damages = {MANIFEST_NAME: self._found.fault} if self._found.fault else {}
        damages |= {name: fault for index, name in enumerate(self.spec.names) if (fault := self._fault(index))}
        for name in damages:
            (self._local.folder / name).unlink(missing_ok=True)  # the damage may have been uploaded from here
            with suppress(MissingError):
                self._store.remove(name)
        self._stored = {index for index in self._stored if self.spec.names[index] not in damages}
        return [f"{name}: {fault}" for name, fault in damages.items()]

    def _fault(self, index: int) -> str | None:
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "shard.parquet"
            try:
                self._store.fetch(self.spec.names[index], path, self._found.vouched(index))
            except MissingError:
                return "missing"
            except DamageError as error:
                return str(error)
            return self.spec.fault_of(index, path, self.published)

    def write_options(self, text: str) -> None:
        """Writes `run.yaml` before anything is computed, which shows whether the store can be written."""
        self._local.write_options(text)
        self._store.put(OPTIONS_NAME, self._local.folder / OPTIONS_NAME)

    def append_provenance(self, record: dict[str, Any]) -> None:
        """Appends a line to `provenance.jsonl` and keeps the lines of other machines."""
        self._local.append_provenance(record)
        theirs = self._store.read_if_there(PROVENANCE_NAME) or b""
        ours = (self._local.folder / PROVENANCE_NAME).read_bytes()
        # A store cannot append: when two machines write in the same second, one line may be lost until its machine
        # writes again.
        lines = dict.fromkeys([*theirs.splitlines(keepends=True), *ours.splitlines(keepends=True)])
        self._store.write(PROVENANCE_NAME, b"".join(lines))


def _staging(url: str, spec: Spec, keep_date: bool) -> Path:
    """The local folder in which the cache for a URL is built, one for each URL and spec."""
    # Without the date, so that workers that start around midnight share the folder.
    meaning = dataclasses.replace(spec.meaning, date=None) if keep_date else spec.meaning
    identity = [url, meaning.fingerprint(), dataclasses.asdict(spec.numerics), spec.num_rows]
    name = f"{re.sub('[^A-Za-z0-9]+', '-', url)[:80]}-{sha256_text(canonical_json(identity))[:12]}"
    return user_folder() / "staging" / name
