"""Stage one's side of a cache in an object store: built here, shard by shard, and put there; the manifest last.

In: rows and a report per shard, as for a folder. Out: the same files in the store. What counts is what is there: a run
on any machine goes on from the shards that it finds.
"""

import dataclasses
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from .files import as_place, canonical_json, sha256_text, user_folder
from .identity import Meaning, Numerics
from .manifest import MANIFEST_NAME, Manifest, ShardRecord, ShardReport
from .schema import CachedPair
from .shard import LARGEST_FOOTER, TAIL, Footer, footer_of
from .stores import Store, load_manifest
from .writer import CARD_NAME, OPTIONS_NAME, PROVENANCE_NAME, CacheWriter


def open_writer(
    place: Path | str,
    meaning: Meaning,
    numerics: Numerics,
    num_rows: int,
    *,
    repair: bool = False,
    keep_date: bool = False,
) -> CacheWriter:
    """The writer of a cache in a folder, or at a URL; raises as they do."""
    place = as_place(place)
    if isinstance(place, Path):
        return CacheWriter(place, meaning, numerics, num_rows, repair=repair, keep_date=keep_date)
    return StoreWriter(place, meaning, numerics, num_rows, repair=repair, keep_date=keep_date)


def read_any_footer(place: Path | str) -> Footer:
    """The footer of a shard of a cache that is not finished yet: every shard says what the cache is.

    Raises:
        FileNotFoundError: there is no shard that is sound.
    """
    place = as_place(place)
    if isinstance(place, Path):
        footers = (footer_of(path) for path in sorted((place / "data").glob("*.parquet")))
    else:
        store = Store(place)
        footers = (_stored_footer(store, name) for name in store.shards())
    found = next((footer for footer in footers if footer is not None), None)
    if found is None:
        raise FileNotFoundError(f"{place}: expected a shard, found none; run `fpo precompute`")
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
    except FileNotFoundError:
        return None
    return footer_of(pa.BufferReader(data))


class StoreWriter(CacheWriter):
    """A cache that is being written into a store.

    Workers of one machine share its staging folder; those of several machines should be given different shards, or
    they do the same work twice.
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
            OSError: the store does not answer.
            ValueError: the spec cannot be written, the store holds shards that do not belong, or has no driver; the
                manifest is damaged, or there is nothing to repair.
        """
        self._store = Store(url)
        footers = {name: _stored_footer(self._store, name) for name in self._store.shards()}
        anyday = meaning
        if keep_date:
            meaning = meaning.dated_as(footer.meaning for footer in footers.values() if footer is not None)
            anyday = dataclasses.replace(meaning, date=None)  # workers that start about midnight share the folder
        spec = [self._store.url, anyday.fingerprint(), dataclasses.asdict(numerics), num_rows]
        name = f"{re.sub('[^A-Za-z0-9]+', '-', self._store.url)[:80]}-{sha256_text(canonical_json(spec))[:12]}"
        staging = user_folder() / "staging" / name
        (staging / MANIFEST_NAME).unlink(missing_ok=True)  # a copy: it is the store's that counts
        super().__init__(staging, meaning, numerics, num_rows, keep_date=keep_date)
        self._repair, self._sizes = repair, dict[str, int]()
        self.published = self._open_manifest(lambda: load_manifest(self._store))
        self._check_contents(self._store.url, footers)
        self._stored = {i for i, name in enumerate(self._names) if self._is_shard(i, footers.get(name))}

    def is_done(self, index: int) -> bool:
        """Whether the shard is there, or built here, and its footer is that of this spec and number."""
        if super().is_done(index):
            return True
        if index not in self._stored:
            self._store.refresh()
            if self._is_shard(index, _stored_footer(self._store, self._names[index])):
                self._stored.add(index)
        return index in self._stored

    def write_shard(self, rows: Sequence[CachedPair], report: ShardReport) -> None:
        """Checks a shard, commits it here and uploads it; raises as `CacheWriter.write_shard`, and `OSError`."""
        super().write_shard(rows, report)
        self._store.put(self._names[report.index], self.shard_path(report.index))

    def finish(self) -> Manifest | None:
        """Uploads what is not there yet: shards of a run that was stopped, the files beside them, then the manifest.

        Returns:
            The manifest, or None if shards are missing.

        Raises:
            OSError: the store does not answer.
            ValueError: a shard does not read back, or there is no pair in any.
        """
        self._sizes = self._store.sizes()
        for index, name in enumerate(self._names):
            if super().is_done(index) and self._sizes.get(name) != self.shard_path(index).stat().st_size:
                self._store.put(name, self.shard_path(index))
        manifest = super().finish()
        if manifest is not None and manifest != self.published:
            self._store.put(CARD_NAME, self.folder / CARD_NAME)
            self._store.put(MANIFEST_NAME, self.folder / MANIFEST_NAME)
        return manifest

    def _record(self, index: int) -> ShardRecord:
        name, path = self._names[index], self.shard_path(index)
        vouched = self._vouched(index)
        if vouched is not None and index not in self._written and self._sizes.get(name) == vouched.bytes:
            return vouched  # it is read by those who fetch it, and by `discard_damage`
        if super().is_done(index):
            return super()._record(index)
        self._store.fetch(name, path)
        try:
            return super()._record(index)
        except ValueError as error:
            path.unlink()
            raise ValueError(f"{self._store.address(name)}, copied to {error}") from error

    def _fault(self, index: int) -> str | None:
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "shard.parquet"
            try:
                self._store.fetch(self._names[index], path, self._vouched(index))
            except FileNotFoundError:
                return "missing"
            except ValueError as error:
                return str(error)
            return self._fault_of(index, path)

    def _remove(self, name: str) -> None:
        """Removes a file from the store, and this machine's copy of it, which may be what was uploaded damaged."""
        super()._remove(name)
        self._stored = {index for index in self._stored if self._names[index] != name}
        with suppress(FileNotFoundError):
            self._store.remove(name)

    def write_options(self, text: str) -> None:
        """Writes `run.yaml`, before anything is computed: a store that takes no file is found out here."""
        super().write_options(text)
        self._store.put(OPTIONS_NAME, self.folder / OPTIONS_NAME)

    def append_provenance(self, record: dict[str, Any]) -> None:
        """Adds one line to `provenance.jsonl`, beside those that other machines wrote."""
        super().append_provenance(record)
        theirs = self._store.read_if_there(PROVENANCE_NAME) or b""
        ours = (self.folder / PROVENANCE_NAME).read_bytes()
        # A store cannot append, so that of two machines that end in the same second one line may be lost to the other;
        # whoever writes next puts its own back.
        lines = dict.fromkeys([*theirs.splitlines(keepends=True), *ours.splitlines(keepends=True)])
        self._store.write(PROVENANCE_NAME, b"".join(lines))
