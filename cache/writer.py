"""Stage one's side of the cache: shards, one at a time, and the manifest last.

In: rows and a report per shard. Out: a folder of Parquet shards, `manifest.json`, `README.md`, `provenance.jsonl`,
`run.yaml`.

Any number of workers may write into one folder, each in its own process:

    for index in my_shards:
        with writer.lock(index) as mine:
            if mine:
                writer.write_shard(*score(writer.shard_range(index)))
    writer.finish()
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .card import data_card
from .checks import check_table
from .claim import claim
from .columns import rows_to_table
from .files import canonical_json, remove_leftovers, sha256_file, write_atomically
from .identity import FormatError, IdentityError, Meaning, Numerics, differences
from .locks import locked
from .manifest import MANIFEST_NAME, REPAIR, Manifest, ShardRecord, ShardReport, shard_name
from .schema import FORMAT_VERSION, CachedPair
from .shard import DAMAGE, LARGEST_SHARD, Footer, check_range, encode_shard, footer_of, read_back, shard_fault

CARD_NAME = "README.md"
OPTIONS_NAME = "run.yaml"
PROVENANCE_NAME = "provenance.jsonl"
# What lies beside the manifest and the shards.
BESIDE = (CARD_NAME, OPTIONS_NAME, PROVENANCE_NAME)


class CacheWriter:
    """A cache that is being written, perhaps by several workers.

    Attributes:
        folder: of the cache.
        meaning: of the cache, with the date that holds.
        numerics: of the cache.
        num_rows: raw rows of the data set, after `limit`.
        num_shards: at least 1, so that a data set without rows has a shard that says so.
        published: the manifest that was found; None if there was none, or a damaged one in a cache to be repaired.
    """

    def __init__(
        self,
        folder: Path,
        meaning: Meaning,
        numerics: Numerics,
        num_rows: int,
        *,
        repair: bool = False,
        keep_date: bool = False,
    ) -> None:
        """Opens `folder`, makes it if need be, and removes what dead writers left half-written.

        Args:
            folder: of the cache.
            meaning: of the cache.
            numerics: of the cache.
            num_rows: raw rows of the data set, after `limit`.
            repair: lets in what `discard_damage` is to find: a damaged manifest, and shards of another spec under names
                that a manifest of this spec vouches for.
            keep_date: whether the date of a cache that was begun holds in place of `meaning`'s.

        Raises:
            FormatError: the folder holds a cache of another version.
            IdentityError: the folder holds a cache of another spec.
            ValueError: the spec cannot be written, the manifest is damaged, the folder holds shards that do not
                belong, or there is nothing to repair.
        """
        if meaning.format_version != FORMAT_VERSION:
            raise ValueError(f"expected format version {FORMAT_VERSION}, found {meaning.format_version}")
        if not 1 <= numerics.shard_size <= LARGEST_SHARD or num_rows < 0:
            raise ValueError(
                f"expected a shard size of 1 to {LARGEST_SHARD} and rows, found {numerics.shard_size} and {num_rows}"
            )
        names = [site.site for site in meaning.sites]
        if len(set(names)) < len(names):
            raise ValueError(f"sites: expected each once, found {', '.join(names)}")
        for name in ("data", ".locks"):
            if (folder / name).is_symlink():  # what is removed and written there would be elsewhere
                raise ValueError(f"{folder / name}: expected a folder, found a link; put a folder in its place")
        self.folder, self.meaning, self.numerics, self.num_rows = folder, meaning, numerics, num_rows
        self.num_shards = max(1, -(-num_rows // numerics.shard_size))
        self._names = [shard_name(meaning.split, i, self.num_shards) for i in range(self.num_shards)]
        self._repair = repair
        self._written: set[int] = set()
        self.published = self._open_manifest(lambda: Manifest.load(folder))
        if keep_date:
            self.meaning = self._begun()
        found = self._check_shards({})
        for name in ("data", ".locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._claim, self.meaning = claim(self.folder, self.meaning, numerics, self._begun if keep_date else None)
        self._check_shards(found)  # by now one of another spec may have written some, and have ended
        for folder in (self.folder, self.folder / "data", self.folder / ".locks"):
            remove_leftovers(folder)

    def _begun(self) -> Meaning:
        """The meaning on the day that the cache was begun, if it was."""
        if self.published is not None:
            return self.meaning.dated_as([self.published.meaning])
        footers = (footer_of(path) for path in sorted((self.folder / "data").glob("*.parquet")) if path.is_file())
        return self.meaning.dated_as(footer.meaning for footer in footers if footer is not None)

    def _check_shards(self, found: Mapping[str, Footer | None]) -> dict[str, Footer | None]:
        """Refuses what does not belong here; returns the footers, of those `found` sound before as they were."""
        shards = {f"data/{path.name}": path for path in sorted((self.folder / "data").glob("*.parquet"))}
        for path in shards.values():
            if not path.is_file():
                raise ValueError(f"{path}: expected a file, found a folder or a link to nothing; move it away")
        footers = {name: found.get(name) or footer_of(path) for name, path in shards.items()}
        self._check_contents(str(self.folder), footers)
        return footers

    def _open_manifest(self, read: Callable[[], Manifest]) -> Manifest | None:
        self._manifest_fault = ""
        try:
            return read()
        except FileNotFoundError:
            self._manifest_fault = "missing"
        except ValueError as error:
            if not self._repair or isinstance(error, FormatError):
                raise
            # The fault without its advice, which is what is being done.
            self._manifest_fault = str(error.__cause__ or error)
        return None

    def _check_contents(self, where: str, footers: Mapping[str, Footer | None]) -> None:
        """Refuses what is of another spec; a damaged shard, whose footer is None, is not done, and is written again."""
        if self.published is not None:
            self._check_identity(where, MANIFEST_NAME, self.published.meaning, self.published.numerics)
            if (found := len(self.published.shards)) != self.num_shards:
                raise ValueError(
                    f"{where}/{MANIFEST_NAME}: expected {self.num_shards} shards, found {found}; move it away"
                )
        if self._repair and not footers and self._manifest_fault == "missing":
            raise ValueError(f"{where}: expected a cache to repair, found none; leave --repair out")
        # Of a shard in a cache without a manifest nobody can tell whether it is the stranger or the options are.
        judged = self._repair and self.published is not None
        for name, footer in footers.items():
            if name not in self._names:
                expected = f"expected one of {self.num_shards} shards, {self._names[0]} …"
                raise ValueError(f"{where}/{name}: {expected}; move it away")
            if footer is not None and not judged:
                self._check_identity(where, name, footer.meaning, footer.numerics)

    def _check_identity(self, where: str, name: str, meaning: Meaning, numerics: Numerics) -> None:
        if found := differences(self.meaning, meaning) + differences(self.numerics, numerics):
            what = "; ".join(found)
            raise IdentityError(
                f"{where}: {name} is of another spec ({what}); take another folder or the same spec, or move the file "
                "away if it is a stranger's"
            )

    def shard_range(self, index: int) -> range:
        """The raw rows of a shard."""
        start = index * self.numerics.shard_size
        return range(start, min(start + self.numerics.shard_size, self.num_rows))

    def shard_path(self, index: int) -> Path:
        """Where a shard lies once it is done."""
        return self.folder / self._names[index]

    def is_done(self, index: int) -> bool:
        """Whether the shard is there and its footer is that of this spec and number."""
        return self._is_shard(index, footer_of(self.shard_path(index)))

    def _is_shard(self, index: int, footer: Footer | None) -> bool:
        if footer is None:
            return False
        raw_rows = self.shard_range(index)
        return (footer.meaning, footer.numerics) == (self.meaning, self.numerics) and (
            footer.report.index,
            footer.report.start,
            footer.report.stop,
        ) == (index, raw_rows.start, raw_rows.stop)

    def missing(self) -> list[int]:
        """The shards that are not done."""
        return [index for index in range(self.num_shards) if not self.is_done(index)]

    @contextmanager
    def lock(self, index: int) -> Iterator[bool]:
        """Holds a shard, without waiting: True if it is this worker's to write, False if it is taken or done."""
        with locked(self.folder / ".locks" / f"{index:05d}.lock", wait=False) as held:
            # Looked at under the lock: another worker may have just finished it.
            yield held and not self.is_done(index)

    def write_shard(self, rows: Sequence[CachedPair], report: ShardReport) -> None:
        """Checks and commits one shard.

        Args:
            rows: the pairs of the shard's raw rows that were not skipped, in their order.
            report: of this shard; every raw row of its range is in `rows` or skipped in it.

        Raises:
            ValueError: a row breaks a rule of `check_table`, or rows and report do not cover the shard's range.
        """
        name, raw_rows = self._names[report.index], self.shard_range(report.index)
        if (report.start, report.stop) != (raw_rows.start, raw_rows.stop):
            raise ValueError(f"{name}: expected the report of raw {raw_rows}, found {range(report.start, report.stop)}")
        table = rows_to_table(rows, self.meaning.widths)
        try:
            check_table(table, self.meaning.widths)
            check_range(table, report)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        data = encode_shard(table, self.meaning, self.numerics, report)
        write_atomically(self.shard_path(report.index), data)
        self._written.add(report.index)

    def finish(self) -> Manifest | None:
        """Reads every shard back, then writes `README.md` and `manifest.json`; again if called again.

        Returns:
            The manifest, or None if shards are missing.

        Raises:
            ValueError: a shard does not read back, or there is no pair in any: there is nothing to train on then.
        """
        if self.missing():
            return None
        manifest = Manifest(self.meaning, self.numerics, tuple(self._record(i) for i in range(self.num_shards)))
        if manifest.num_pairs == 0:
            reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(manifest.skipped.items()))
            raise ValueError(f"data set: expected pairs to score, all {self.num_rows} rows were skipped: {reasons}")
        write_atomically(self.folder / CARD_NAME, data_card(manifest).encode())
        manifest.save(self.folder)
        return manifest

    def _record(self, index: int) -> ShardRecord:
        path = self.shard_path(index)
        try:
            footer = read_back(path)
        except DAMAGE as error:
            raise ValueError(f"{path}: {error}; {REPAIR}") from error
        record = ShardRecord(self._names[index], footer.rows, path.stat().st_size, sha256_file(path), footer.report)
        if index not in self._written and self._vouched(index) not in (None, record):
            raise ValueError(f"{path}: expected the shard that {MANIFEST_NAME} vouches for, found another; {REPAIR}")
        return record

    def _vouched(self, index: int) -> ShardRecord | None:
        """What the manifest that was found says of a shard."""
        return None if self.published is None else self.published.shards[index]

    def discard_damage(self) -> list[str]:
        """Reads every byte of the cache and removes what is damaged, so that it counts as missing.

        A shard is damaged if it is not the one that the manifest vouches for; without a sound manifest, if it does not
        read back as this shard of this spec.

        Returns:
            A line for everything that was damaged or missing, which begins with the file's name.
        """
        damages = {MANIFEST_NAME: self._manifest_fault} if self._manifest_fault else {}
        damages |= {name: fault for index, name in enumerate(self._names) if (fault := self._fault(index))}
        for name in damages:
            self._remove(name)
        return [f"{name}: {fault}" for name, fault in damages.items()]

    def _fault(self, index: int) -> str | None:
        return self._fault_of(index, self.shard_path(index))

    def _fault_of(self, index: int, path: Path) -> str | None:
        """What is wrong with a file that should be a shard."""
        record = self._vouched(index)
        if record is not None:
            assert self.published is not None
            return shard_fault(path, self.published, record)
        try:
            footer = read_back(path)
        except FileNotFoundError:
            return "missing"
        except PermissionError:
            raise
        except DAMAGE as error:
            return str(error)
        return None if self._is_shard(index, footer) else f"it is shard {footer.report.index} under another's name"

    def _remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def write_options(self, text: str) -> None:
        """Writes `run.yaml`, the options that the cache is made with."""
        write_atomically(self.folder / OPTIONS_NAME, text.encode())

    def append_provenance(self, record: dict[str, Any]) -> None:
        """Adds one line to `provenance.jsonl`, whole even when several workers add at once."""
        path = self.folder / PROVENANCE_NAME
        with locked(self.folder / ".locks" / "provenance.lock"):
            lines = path.read_bytes() if path.exists() else b""
            write_atomically(path, lines + (canonical_json(record) + "\n").encode())
