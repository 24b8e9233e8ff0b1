"""A cache in an object store: a verified copy of it on this machine, and a writer that builds it here and uploads it.

In: the URL of a cache. Out: a folder of this machine to read; or, from rows and reports, the files of a cache, put into
the store shard by shard, the manifest last. What stands in a store may be a stranger's: names are those of a checked
manifest, and no file is fetched before its size is known.
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
        raise MissingError(f"{error}, or finish `fpo precompute`, which writes the manifest last") from error
    return Manifest.parse(data, store.address(MANIFEST_NAME))


def fetch(place: Path | str) -> Path:
    """The folder of a cache, for one in a store a copy in the user's folder, made once for each content.

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
                if not (folder / record.name).exists():  # else it is of a command that was stopped
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
    """The writer of a cache in a folder, or at a URL; raises as they do."""
    place = as_place(place)
    if isinstance(place, Path):
        return CacheWriter(place, meaning, numerics, num_rows, repair=repair, keep_date=keep_date)
    return StoreWriter(place, meaning, numerics, num_rows, repair=repair, keep_date=keep_date)


def read_any_footer(place: Path | str) -> Footer:
    """The footer of a shard of a cache that is not finished yet: every shard says what the cache is.

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
    """The footer of a shard in a store, None if it is missing or damaged, at the cost of its last bytes."""
    try:
        with store.open(name) as file:
            # Read here and not by pyarrow, which could not tell a store that is out of reach from a damaged shard.
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
    """A cache that is being written into a store, by way of a folder of this machine.

    It has the methods of `CacheWriter`. What counts is what is in the store: a run on any machine goes on from the
    shards that it finds there. Workers of one machine share the folder; those of several machines should be given
    different shards, or they do the same work twice.

    Attributes:
        spec: what is written, on the day that holds.
        published: the manifest that was found; None if there was none, or a damaged one in a cache to be repaired.
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
        """Looks at what the store has.

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
        (staging / MANIFEST_NAME).unlink(missing_ok=True)  # a copy: it is the store's that counts
        self._local = CacheWriter(staging, meaning, numerics, num_rows, keep_date=keep_date)
        self._found = Found.read(lambda: load_manifest(self._store), repair=repair)
        self.spec.check_contents(self._store.url, self._found, footers, repair=repair)
        self._stored = {i for i, name in enumerate(self.spec.names) if self.spec.is_shard(i, footers.get(name))}

    @property
    def spec(self) -> Spec:
        """What is written."""
        return self._local.spec

    @property
    def published(self) -> Manifest | None:
        """The manifest that was found."""
        return self._found.manifest

    def is_done(self, index: int) -> bool:
        """Whether the shard is in the store, or built here, and its footer is that of this spec and number."""
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
        """Holds a shard among the workers of this machine, as `CacheWriter.lock`."""
        with self._local.lock(index) as mine:
            yield mine and not self.is_done(index)

    def write_shard(self, rows: Sequence[CachedPair], report: ShardReport) -> None:
        """Checks a shard, commits it here and uploads it; raises as `CacheWriter.write_shard`, and `UserError`."""
        self._local.write_shard(rows, report)
        self._store.put(self.spec.names[report.index], self._local.shard_path(report.index))

    def finish(self) -> Manifest | None:
        """Uploads what is not there yet: shards of a run that was stopped, the data card, then the manifest.

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
            return vouched  # its bytes are read by those who fetch it, and by `discard_damage`
        if self._local.is_done(index):
            return record_of(path, name, vouched)
        self._store.fetch(name, path)
        try:
            return record_of(path, name, vouched)
        except UserError as error:
            path.unlink()
            raise UserError(f"{self._store.address(name)}, copied to {error}") from error

    def discard_damage(self) -> list[str]:
        """As `CacheWriter.discard_damage`, in the store; each shard is copied here to be read."""
        damages = {MANIFEST_NAME: self._found.fault} if self._found.fault else {}
        damages |= {name: fault for index, name in enumerate(self.spec.names) if (fault := self._fault(index))}
        for name in damages:
            (self._local.folder / name).unlink(missing_ok=True)  # it may be what was uploaded damaged
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
        """Writes `run.yaml`, before anything is computed: a store that takes no file is found out here."""
        self._local.write_options(text)
        self._store.put(OPTIONS_NAME, self._local.folder / OPTIONS_NAME)

    def append_provenance(self, record: dict[str, Any]) -> None:
        """Adds one line to `provenance.jsonl`, beside those that other machines wrote."""
        self._local.append_provenance(record)
        theirs = self._store.read_if_there(PROVENANCE_NAME) or b""
        ours = (self._local.folder / PROVENANCE_NAME).read_bytes()
        # A store cannot append: of two machines that end in the same second one line may be lost, until its writer
        # writes again.
        lines = dict.fromkeys([*theirs.splitlines(keepends=True), *ours.splitlines(keepends=True)])
        self._store.write(PROVENANCE_NAME, b"".join(lines))


def _staging(url: str, spec: Spec, keep_date: bool) -> Path:
    """The folder of this machine in which a cache for a store is built: one for each URL and spec."""
    # Workers that start about midnight share the folder.
    meaning = dataclasses.replace(spec.meaning, date=None) if keep_date else spec.meaning
    identity = [url, meaning.fingerprint(), dataclasses.asdict(spec.numerics), spec.num_rows]
    name = f"{re.sub('[^A-Za-z0-9]+', '-', url)[:80]}-{sha256_text(canonical_json(identity))[:12]}"
    return user_folder() / "staging" / name
