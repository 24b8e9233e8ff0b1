"""Stage one's side of the cache: shards, one at a time, and the manifest last.

In: rows and a report per shard. Out: a folder of Parquet shards, `manifest.json`, `README.md`, `provenance.jsonl` and
`run.yaml`.

Any number of processes may write into one folder:

    for index in my_shards:
        with writer.lock(index) as mine:
            if mine:
                writer.write_shard(*score(writer.spec.shard_range(index)))
    writer.finish()
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .card import data_card
from .checks import check_table
from .columns import rows_to_table
from .errors import UserError
from .files import canonical_json, remove_leftovers, write_atomically
from .identity import Meaning, Numerics
from .locks import locked
from .manifest import MANIFEST_NAME, Manifest, ShardReport
from .schema import CachedPair
from .shard import Footer, check_range, encode_shard, footer_of
from .spec import Found, Spec, claim, record_of

CARD_NAME = "README.md"
OPTIONS_NAME = "run.yaml"
PROVENANCE_NAME = "provenance.jsonl"
# The files beside the manifest and the shards.
BESIDE = (CARD_NAME, OPTIONS_NAME, PROVENANCE_NAME)


class CacheWriter:
    """Writes a cache into a folder, perhaps together with other workers.

    Attributes:
        folder: the cache's folder.
        spec: what is written, with the date that holds.
        published: the manifest that the folder held; None if it was missing or damaged.
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
        """Opens `folder`, creates it if need be, and removes the temporary files of dead writers.

        Args:
            folder: the cache's folder.
            meaning: what the numbers mean.
            numerics: how they are computed.
            num_rows: raw rows of the data set, after `limit`.
            repair: accepts what `discard_damage` will remove: a damaged manifest, and shards of another spec under
                names that the manifest lists.
            keep_date: whether the date of a cache that the folder already holds replaces that of `meaning`.

        Raises:
            FormatError: the folder holds a cache of another format version.
            IdentityError: the folder holds a cache of another spec.
            UserError: the spec cannot be written, the manifest is damaged, the folder holds shards that do not belong
                to the cache, or there is nothing to repair.
        """
        for name in ("data", ".locks"):
            if (folder / name).is_symlink():  # files would be removed and written elsewhere
                raise UserError(f"{folder / name}: expected a folder, found a link; put a folder in its place")
        self.folder, self.spec = folder, Spec(meaning, numerics, num_rows)
        self._repair, self._written = repair, set[int]()
        self._found = Found.read(lambda: Manifest.load(folder), repair=repair)
        if keep_date:
            self._redate(self._begun())
        seen = self._check_shards({})
        for name in ("data", ".locks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._claim, meaning = claim(folder, self.spec.meaning, numerics, self._begun if keep_date else None)
        self._redate(meaning)
        self._check_shards(seen)  # a writer of another spec may have come and gone
        for place in (folder, folder / "data", folder / ".locks"):
            remove_leftovers(place)

    @property
    def published(self) -> Manifest | None:
        """The manifest that the folder held."""
        return self._found.manifest

    def _redate(self, meaning: Meaning) -> None:
        self.spec = dataclasses.replace(self.spec, meaning=meaning)

    def _begun(self) -> Meaning:
        """The meaning with the date of the cache that the folder already holds, if any."""
        if self.published is not None:
            return self.spec.meaning.dated_as([self.published.meaning])
        footers = (footer_of(path) for path in sorted((self.folder / "data").glob("*.parquet")) if path.is_file())
        return self.spec.meaning.dated_as(footer.meaning for footer in footers if footer is not None)

    def _check_shards(self, seen: Mapping[str, Footer | None]) -> dict[str, Footer | None]:
        """Checks that the folder holds nothing of another cache; returns all footers, those `seen` before unread."""
        shards = {f"data/{path.name}": path for path in sorted((self.folder / "data").glob("*.parquet"))}
        for path in shards.values():
            if not path.is_file():
                raise UserError(f"{path}: expected a file, found a folder or a broken link; move it away")
        footers = {name: seen.get(name) or footer_of(path) for name, path in shards.items()}
        self.spec.check_contents(str(self.folder), self._found, footers, repair=self._repair)
        return footers

    def shard_path(self, index: int) -> Path:
        """The path of a finished shard."""
        return self.folder / self.spec.names[index]

    def is_done(self, index: int) -> bool:
        """Whether the shard exists and its footer has this spec and number."""
        return self.spec.is_shard(index, footer_of(self.shard_path(index)))

    def missing(self) -> list[int]:
        """The shards that are not done."""
        return [index for index in range(self.spec.num_shards) if not self.is_done(index)]

    @contextmanager
    def lock(self, index: int) -> Iterator[bool]:
        """Claims a shard without waiting; yields False if another worker holds it or it is done."""
        with locked(self.folder / ".locks" / f"{index:05d}.lock", wait=False) as held:
            # Checked under the lock, because another worker may have just finished it.
            yield held and not self.is_done(index)

    def write_shard(self, rows: Sequence[CachedPair], report: ShardReport) -> None:
        """Checks and commits one shard.

        Args:
            rows: the pairs of the shard's raw rows that were not skipped, in order.
            report: of the shard; it lists the raw rows of its range that are not in `rows` as skipped.

        Raises:
            ValueError: a row breaks a rule of `check_table`, or rows and report do not cover the shard's range.
        """
        name, raw_rows = self.spec.names[report.index], self.spec.shard_range(report.index)
        if (report.start, report.stop) != (raw_rows.start, raw_rows.stop):
            raise ValueError(f"{name}: expected the report of raw {raw_rows}, found {range(report.start, report.stop)}")
        table = rows_to_table(rows, self.spec.meaning.widths)
        try:
            check_table(table, self.spec.meaning.widths)
            check_range(table, report)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        data = encode_shard(table, self.spec.meaning, self.spec.numerics, report)
        write_atomically(self.shard_path(report.index), data)
        self._written.add(report.index)

    def wrote(self, index: int) -> bool:
        """Whether this writer wrote the shard."""
        return index in self._written

    def finish(self) -> Manifest | None:
        """Reads every shard back, then writes `README.md` and `manifest.json`; may be called repeatedly.

        Returns:
            The manifest, or None if shards are missing.

        Raises:
            UserError: a shard does not read back, or every raw row was skipped.
        """
        if self.missing():
            return None
        vouched = [None if self.wrote(i) else self._found.vouched(i) for i in range(self.spec.num_shards)]
        records = [record_of(self.folder / name, name, v) for name, v in zip(self.spec.names, vouched, strict=True)]
        manifest = self.spec.manifest_of(records)
        self.publish(manifest)
        return manifest

    def publish(self, manifest: Manifest) -> None:
        """Writes the data card and, last, the manifest."""
        write_atomically(self.folder / CARD_NAME, data_card(manifest).encode())
        manifest.save(self.folder)

    def discard_damage(self) -> list[str]:
        """Reads every byte of the cache and removes damaged files, so that they count as missing.

        A shard is damaged if it differs from the manifest's record; without a sound manifest, if it does not read back
        as this shard of this spec.

        Returns:
            A line for each damaged or missing file, which begins with its name.
        """
        damages = {MANIFEST_NAME: self._found.fault} if self._found.fault else {}
        for index, name in enumerate(self.spec.names):
            if fault := self.spec.fault_of(index, self.shard_path(index), self.published):
                damages[name] = fault
        for name in damages:
            (self.folder / name).unlink(missing_ok=True)
        return [f"{name}: {fault}" for name, fault in damages.items()]

    def write_options(self, text: str) -> None:
        """Writes `run.yaml`, the options of stage one."""
        write_atomically(self.folder / OPTIONS_NAME, text.encode())

    def append_provenance(self, record: dict[str, Any]) -> None:
        """Appends a line to `provenance.jsonl`; several workers may do so at once."""
        path = self.folder / PROVENANCE_NAME
        with locked(self.folder / ".locks" / "provenance.lock"):
            lines = path.read_bytes() if path.exists() else b""
            write_atomically(path, lines + (canonical_json(record) + "\n").encode())
