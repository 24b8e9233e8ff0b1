"""Stage two's side of the cache: rows by number, memory-mapped from a file that all processes of a machine share.

In: the folder or URL of a finished cache. Out: a `Cache` to index, or a list of what is damaged.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from .columns import Columns, table_to_batch
from .errors import DamageError, MissingError, UserError
from .files import (
    as_place,
    atomic_file,
    parse_json,
    remove_leftovers,
    sha256_file,
    sha256_text,
    user_folder,
    write_atomically,
)
from .identity import FormatError
from .locks import locked
from .manifest import MANIFEST_NAME, REPAIR, Manifest
from .remote import fetch, load_manifest
from .schema import CachedPair, arrow_schema
from .shard import DAMAGE, check_range, file_fault, read_table, shard_fault
from .store import Store
from .writer import PROVENANCE_NAME


class Cache:
    """A finished cache, decoded and memory-mapped.

    Attributes:
        folder: the cache's folder on this machine.
        manifest: its table of contents.
        sites: names of the sites, in the order of a row's features.
    """

    def __init__(self, folder: Path, manifest: Manifest, sites: Sequence[str], decoded: Path):
        """Maps a file that `_decode` wrote; use `open_cache`."""
        self.folder, self.manifest, self.sites = folder, manifest, tuple(sites)
        self._decoded = decoded
        self._numbers = _site_numbers(manifest, self.sites)
        self._file = pa.ipc.open_file(pa.memory_map(str(decoded)))
        self._starts = [0, *accumulate(shard.rows for shard in manifest.shards)]
        # Made when a shard is first read, as there may be ten thousand shards.
        self._columns: list[Columns | None] = [None] * len(manifest.shards)

    def __reduce__(self) -> tuple[Any, ...]:
        # Each process of a data loader maps the file itself.
        return Cache, (self.folder, self.manifest, self.sites, self._decoded)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> CachedPair:
        """Row i; its arrays are read-only views of the mapped file."""
        row = range(len(self))[i]
        shard = bisect_right(self._starts, row) - 1
        columns = self._columns[shard]
        if columns is None:
            columns = self._columns[shard] = Columns(self._file.get_batch(shard), self._numbers)
        return columns.row(row - self._starts[shard])

    def largest_token(self) -> tuple[str, int]:
        """The largest token id and the `pair_id` that holds it, as (pair_id, token); ("", -1) without pairs."""
        largest = "", -1
        for number in range(self._file.num_record_batches):
            columns = Columns(self._file.get_batch(number), self._numbers)
            for lists in (columns.prompt, columns.chosen, columns.rejected):
                row, token = lists.largest()
                if token > largest[1]:
                    largest = columns.pair_ids[row].as_py(), token
        return largest

    def provenance(self) -> list[dict[str, Any]]:
        """The records of `provenance.jsonl`, oldest first; an empty list if there is no such file.

        Raises:
            UserError: a line is not JSON.
        """
        path = self.folder / PROVENANCE_NAME
        if not path.exists():
            return []
        records = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                records.append(parse_json(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}; remove the line") from error
        return records


def open_cache(place: Path | str, *, sites: Sequence[str] | None = None, trust_hashes: bool = False) -> Cache:
    """Checks a cache, decodes it unless this machine has done so before, and opens it for reading.

    Args:
        place: folder or URL of the cache; a cache in a store is copied to this machine once.
        sites: names of the sites whose features are wanted, in that order; all by default, none if empty.
        trust_hashes: whether to skip the SHA-256 of the decoded copy and of the shards that it was made from.

    Raises:
        MissingError: there is no manifest.
        DamageError: a file of the cache is damaged.
        UserError: the cache has no such site, or the store does not answer.
    """
    folder = fetch(place)
    manifest = Manifest.load(folder)
    names = [site.site for site in manifest.meaning.sites] if sites is None else list(sites)
    numbers = _site_numbers(manifest, names)
    for fault in _folder_faults(folder, manifest, hashes=not trust_hashes):
        if isinstance(as_place(place), Path):
            raise DamageError(f"{folder}: {fault}; download it again, or {REPAIR}")
        raise DamageError(f"{folder}: {fault}; remove this folder, which is a copy of {place}")
    key = sha256_text("\n".join([manifest.sha256, *names]))
    decoded = user_folder() / "decoded" / f"{key}.arrow"
    decoded.parent.mkdir(parents=True, exist_ok=True)
    if not _is_whole(decoded, trust_hashes):
        with locked(decoded.with_suffix(".lock")):
            if not _is_whole(decoded, trust_hashes):  # another process may have just decoded it
                remove_leftovers(decoded.parent)
                _decode(folder, manifest, numbers, decoded)
    return Cache(folder, manifest, names, decoded)


def _site_numbers(manifest: Manifest, names: Sequence[str]) -> list[int]:
    known = [site.site for site in manifest.meaning.sites]
    for name in names:
        if name not in known:
            raise UserError(
                f"site {name}: expected a site of the cache ({', '.join(known) or 'none'}); name one of these"
            )
    if len(set(names)) < len(names):
        raise UserError(f"sites: expected each once, found {', '.join(names)}")
    return [known.index(name) for name in names]


def _is_whole(decoded: Path, trust_hash: bool) -> bool:
    """Whether the decoded file is complete and unchanged; user folders are cleaned and disks fail."""
    try:
        size, sha256 = decoded.with_suffix(".sha256").read_text().split()
        return decoded.stat().st_size == int(size) and (trust_hash or sha256_file(decoded) == sha256)
    except (OSError, ValueError):
        return False


def _decode(folder: Path, manifest: Manifest, sites: Sequence[int], decoded: Path) -> None:
    """Writes tokens and the features of `sites` as Arrow IPC, one record batch per shard.

    A file beside it, written last, holds its size and SHA-256.
    """
    meaning = manifest.meaning
    with atomic_file(decoded) as file:
        with pa.ipc.new_file(file, arrow_schema(meaning.widths, sites)) as writer:
            for record in manifest.shards:
                path = folder / record.name
                # Hashed even if hashes are trusted, because every later run reads the decoded copy.
                if sha256_file(path) != record.sha256:
                    raise DamageError(f"{path}: its SHA-256 is not the manifest's; download it again, or {REPAIR}")
                try:
                    table = read_table(path, meaning, sites)
                    check_range(table, record.report)
                except DAMAGE as error:
                    raise DamageError(f"{path}: {error}; download it again, or {REPAIR}") from error
                writer.write_batch(table_to_batch(table))
        file.flush()
        written = Path(file.name)
        state = f"{written.stat().st_size} {sha256_file(written)}\n"
    write_atomically(decoded.with_suffix(".sha256"), state.encode())


def verify(place: Path | str) -> list[str]:
    """Checks every byte of a cache; returns a line for each damaged file, which begins with its name.

    For a cache in a store it checks the store's files, not this machine's copy of them.

    Raises:
        UserError: the store does not answer, or there is no driver for it.
    """
    place = as_place(place)
    return list(_damages(place) if isinstance(place, Path) else _stored_damages(Store(place)))


def _damages(folder: Path) -> Iterator[str]:
    try:
        manifest = Manifest.load(folder)
    except (OSError, UserError) as error:
        yield f"{MANIFEST_NAME}: {error}"
        return
    yield from _foreign(manifest, _shards_in(folder))
    for record in manifest.shards:
        if fault := shard_fault(folder / record.name, manifest, record):
            yield f"{record.name}: {fault}"


def _stored_damages(store: Store) -> Iterator[str]:
    """As `_damages`; copies one shard at a time to this machine."""
    try:
        manifest = load_manifest(store)
    except (MissingError, DamageError, FormatError) as error:
        yield f"{MANIFEST_NAME}: {error}"
        return
    yield from _foreign(manifest, store.shards())
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "shard.parquet"
        for record in manifest.shards:
            try:
                store.fetch(record.name, path, record)
            except MissingError:
                yield f"{record.name}: missing"
            except DamageError as error:
                yield f"{record.name}: {error}"
            else:
                if fault := shard_fault(path, manifest, record):
                    yield f"{record.name}: {fault}"


def _folder_faults(folder: Path, manifest: Manifest, hashes: bool) -> Iterator[str]:
    yield from _foreign(manifest, _shards_in(folder))
    for record in manifest.shards:
        if fault := file_fault(folder / record.name, manifest, record, hashes):
            yield f"{record.name}: {fault}"


def _shards_in(folder: Path) -> list[str]:
    return sorted(f"data/{path.name}" for path in (folder / "data").glob("*.parquet"))


def _foreign(manifest: Manifest, shards: Sequence[str]) -> Iterator[str]:
    known = {record.name for record in manifest.shards}
    for name in shards:
        if name not in known:
            yield f"{name}: not in the manifest"
