"""The spec of a cache that is being written: its shards, what its folder may already hold, and who else writes there.

In: an identity and a number of raw rows. Out: names and ranges of shards; errors for files of another cache; the
manifest of what was written; the lock that all living writers of a folder share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from .errors import DamageError, UserError
from .files import canonical_json, decode, parse_json, sha256_file, write_atomically
from .identity import IdentityError, Meaning, Numerics, differences
from .locks import Lock, locked
from .manifest import MANIFEST_NAME, REPAIR, Manifest, ShardRecord, shard_name
from .schema import FORMAT_VERSION
from .shard import DAMAGE, LARGEST_SHARD, Footer, read_back, shard_fault


@dataclass(frozen=True)
class Spec:
    """The cache that is to be written.

    Attributes:
        meaning: what its numbers mean.
        numerics: how they are computed.
        num_rows: raw rows of the data set, after `limit`.
    """

    meaning: Meaning
    numerics: Numerics
    num_rows: int

    def __post_init__(self) -> None:
        """Checks that such a cache can be written.

        Raises:
            UserError: the shard size or the number of shards is out of range, a site is named twice, or the split's
                name cannot be part of a file name.
        """
        assert self.meaning.format_version == FORMAT_VERSION and self.num_rows >= 0
        if not 1 <= self.numerics.shard_size <= LARGEST_SHARD:
            raise UserError(f"--shard-size: expected 1 to {LARGEST_SHARD}, found {self.numerics.shard_size}")
        sites = [site.site for site in self.meaning.sites]
        if len(set(sites)) < len(sites):
            raise UserError(f"sites: expected each once, found {', '.join(sites)}")
        _ = self.names  # raises if the split cannot be part of a file name

    @property
    def num_shards(self) -> int:
        """The number of shards, at least 1: an empty data set has one empty shard."""
        return max(1, -(-self.num_rows // self.numerics.shard_size))

    @cached_property
    def names(self) -> list[str]:
        """The path of every shard, relative to the cache's folder."""
        return [shard_name(self.meaning.split, index, self.num_shards) for index in range(self.num_shards)]

    def shard_range(self, index: int) -> range:
        """The raw rows of a shard."""
        start = index * self.numerics.shard_size
        return range(start, min(start + self.numerics.shard_size, self.num_rows))

    def is_shard(self, index: int, footer: Footer | None) -> bool:
        """Whether the footer belongs to this shard of this cache; False for None, a missing or damaged shard."""
        if footer is None or (footer.meaning, footer.numerics) != (self.meaning, self.numerics):
            return False
        rows, report = self.shard_range(index), footer.report
        return (report.index, report.start, report.stop) == (index, rows.start, rows.stop)

    def check_same(self, where: str, name: str, meaning: Meaning, numerics: Numerics) -> None:
        """Checks that the file `name` in the folder or store `where` belongs to this cache.

        Raises:
            IdentityError: it belongs to another; names the fields that differ.
        """
        if found := differences(self.meaning, meaning) + differences(self.numerics, numerics):
            what = "; ".join(found)
            raise IdentityError(
                f"{where}: {name} belongs to another cache ({what}); choose another folder, give the options that made "
                "that cache, or move the file away if it does not belong here"
            )

    def check_contents(
        self, where: str, found: "Found", footers: Mapping[str, Footer | None], *, repair: bool = False
    ) -> None:
        """Checks that a folder or store holds nothing of another cache.

        Args:
            where: the folder or store.
            found: its manifest.
            footers: the footer of each shard by name; None for a damaged one, which will be written again.
            repair: whether the cache is to be repaired.

        Raises:
            IdentityError: a file belongs to another cache.
            UserError: a shard has a name that this cache does not have, or there is nothing to repair.
        """
        if found.manifest is not None:
            self.check_same(where, MANIFEST_NAME, found.manifest.meaning, found.manifest.numerics)
            if (number := len(found.manifest.shards)) != self.num_shards:
                raise UserError(
                    f"{where}/{MANIFEST_NAME}: expected {self.num_shards} shards, found {number}; move it away"
                )
        if repair and not footers and found.fault == "missing":
            raise UserError(f"{where}: expected a cache to repair, found none; leave --repair out")
        # Only a manifest can tell that a shard of another spec is wrong and not the options.
        trusted = repair and found.manifest is not None
        for name, footer in footers.items():
            if name not in self.names:
                expected = f"expected one of {self.num_shards} shards, {self.names[0]} …"
                raise UserError(f"{where}/{name}: {expected}; move it away")
            if footer is not None and not trusted:
                self.check_same(where, name, footer.meaning, footer.numerics)

    def fault_of(self, index: int, path: Path, manifest: Manifest | None) -> str | None:
        """Reads every byte of a file that should be this shard; what is wrong with it, or None.

        Raises:
            PermissionError: the file may not be read, so nobody can tell whether it is damaged.
        """
        if manifest is not None:
            return shard_fault(path, manifest, manifest.shards[index])
        try:
            footer = read_back(path)
        except FileNotFoundError:
            return "missing"
        except PermissionError:
            raise
        except DAMAGE as error:
            return str(error)
        return None if self.is_shard(index, footer) else f"it is shard {footer.report.index} under another name"

    def manifest_of(self, records: Sequence[ShardRecord]) -> Manifest:
        """The manifest of these shards.

        Raises:
            UserError: every raw row was skipped, so there is nothing to train on.
        """
        manifest = Manifest(self.meaning, self.numerics, tuple(records))
        if manifest.num_pairs == 0:
            reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(manifest.skipped.items()))
            raise UserError(f"data set: expected pairs to score, all {self.num_rows} rows were skipped: {reasons}")
        return manifest


@dataclass(frozen=True)
class Found:
    """The manifest that a folder or store held before this writer.

    Attributes:
        manifest: None if it is missing or damaged.
        fault: `missing`, or what is damaged; empty if it is sound.
    """

    manifest: Manifest | None
    fault: str = ""

    @classmethod
    def read(cls, load: Callable[[], Manifest], *, repair: bool) -> "Found":
        """Loads the manifest; raises `DamageError` for a damaged one unless the cache is to be repaired."""
        try:
            return cls(load())
        except FileNotFoundError:
            return cls(None, "missing")
        except DamageError as error:
            if not repair:
                raise
            return cls(None, str(error.__cause__ or error))  # the cause has no advice to repair

    def vouched(self, index: int) -> ShardRecord | None:
        """The manifest's record of a shard, if there is a manifest."""
        return None if self.manifest is None else self.manifest.shards[index]


def record_of(path: Path, name: str, vouched: ShardRecord | None) -> ShardRecord:
    """Reads a shard back and makes its record for the manifest.

    Args:
        path: the file.
        name: its name in the cache.
        vouched: its record in an earlier manifest, if any.

    Raises:
        UserError: it does not read back, or differs from its earlier record.
    """
    try:
        footer = read_back(path)
    except DAMAGE as error:
        raise UserError(f"{path}: {error}; {REPAIR}") from error
    record = ShardRecord(name, footer.rows, path.stat().st_size, sha256_file(path), footer.report)
    if vouched not in (None, record):
        raise UserError(f"{path}: expected the shard that {MANIFEST_NAME} lists, found another; {REPAIR}")
    return record


def claim(
    folder: Path, meaning: Meaning, numerics: Numerics, begun: Callable[[], Meaning] | None = None
) -> tuple[Lock, Meaning]:
    """Joins the writers of a folder; the first one that is alive fixes the spec for the others.

    All writers share a lock, so a spec that a killed writer left behind binds nobody.

    Args:
        folder: the cache's folder.
        meaning: what this writer's numbers mean.
        numerics: how it computes them.
        begun: returns the meaning with the date that the folder's files state; None if the date may not change. It is
            called while nobody writes, so that workers that start around midnight agree on the date.

    Returns:
        The lock, to be held as long as this writer may write, and the meaning with the date that holds.

    Raises:
        IdentityError: a living writer has another spec.
        UserError: the file system has no locks.
        OSError: the folder cannot be written.
    """
    spec, alive = folder / ".locks" / "spec.json", Lock(folder / ".locks" / "writers.lock")
    with locked(folder / ".locks" / "spec.lock"):
        if alive.take():
            if begun is not None:
                meaning = begun()
            write_atomically(spec, canonical_json([asdict(meaning), asdict(numerics)]).encode())
        else:
            theirs, by = parse_json(spec.read_bytes())
            others = decode(Meaning, theirs, "meaning")
            if begun is not None:
                meaning = meaning.dated_as([others])
            found = differences(meaning, others)
            if found := found + differences(numerics, decode(Numerics, by, "numerics")):
                raise IdentityError(
                    f"{folder}: others are writing it with another spec ({'; '.join(found)}); choose another "
                    "folder, give the same options, or stop the others first"
                )
        alive.take(shared=True, wait=True)
    return alive, meaning
