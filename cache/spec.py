"""The cache that is to be written: its shards, what may already lie in its place, and who else writes it.

In: an identity and a number of raw rows. Out: names and ranges of shards; refusals of files of another cache; the
manifest of what was written; a lock that says that a writer of this spec lives.
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
        meaning: its identity.
        numerics: how it is computed.
        num_rows: raw rows of the data set, after `limit`.
    """

    meaning: Meaning
    numerics: Numerics
    num_rows: int

    def __post_init__(self) -> None:
        """Refuses what cannot be written.

        Raises:
            UserError: the shard size or the number of shards is out of range, a site stands twice, or the split's name
                cannot be part of a file name.
        """
        assert self.meaning.format_version == FORMAT_VERSION and self.num_rows >= 0
        if not 1 <= self.numerics.shard_size <= LARGEST_SHARD:
            raise UserError(f"--shard-size: expected 1 to {LARGEST_SHARD}, found {self.numerics.shard_size}")
        sites = [site.site for site in self.meaning.sites]
        if len(set(sites)) < len(sites):
            raise UserError(f"sites: expected each once, found {', '.join(sites)}")
        assert self.names  # refuses a split whose name cannot be part of a file's

    @property
    def num_shards(self) -> int:
        """At least 1, so that a data set without rows has a shard that says so."""
        return max(1, -(-self.num_rows // self.numerics.shard_size))

    @cached_property
    def names(self) -> list[str]:
        """Path of every shard, relative to the cache's folder."""
        return [shard_name(self.meaning.split, index, self.num_shards) for index in range(self.num_shards)]

    def shard_range(self, index: int) -> range:
        """The raw rows of a shard."""
        start = index * self.numerics.shard_size
        return range(start, min(start + self.numerics.shard_size, self.num_rows))

    def is_shard(self, index: int, footer: Footer | None) -> bool:
        """Whether a footer is that of this shard of this cache; None is the footer of a missing or damaged one."""
        if footer is None or (footer.meaning, footer.numerics) != (self.meaning, self.numerics):
            return False
        rows, report = self.shard_range(index), footer.report
        return (report.index, report.start, report.stop) == (index, rows.start, rows.stop)

    def check_same(self, where: str, name: str, meaning: Meaning, numerics: Numerics) -> None:
        """Refuses a file of another cache.

        Raises:
            IdentityError: it is of another spec; names the fields that differ.
        """
        if found := differences(self.meaning, meaning) + differences(self.numerics, numerics):
            what = "; ".join(found)
            raise IdentityError(
                f"{where}: {name} belongs to another cache ({what}); choose another folder, give the options that this "
                "one was made with, or move the file away if it does not belong here"
            )

    def check_contents(
        self, where: str, found: "Found", footers: Mapping[str, Footer | None], *, repair: bool = False
    ) -> None:
        """Refuses a place that holds another cache; a damaged shard, whose footer is None, will be written again.

        Raises:
            IdentityError: a file is of another spec.
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
        # Without a manifest nobody can tell whether a shard of another spec or the options are at fault.
        trusted = repair and found.manifest is not None
        for name, footer in footers.items():
            if name not in self.names:
                expected = f"expected one of {self.num_shards} shards, {self.names[0]} …"
                raise UserError(f"{where}/{name}: {expected}; move it away")
            if footer is not None and not trusted:
                self.check_same(where, name, footer.meaning, footer.numerics)

    def fault_of(self, index: int, path: Path, manifest: Manifest | None) -> str | None:
        """What is wrong with a file that should be this shard, every byte of it read; None if nothing is.

        Raises:
            PermissionError: it may not be read, which says nothing of what is in it.
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
        return None if self.is_shard(index, footer) else f"it is shard {footer.report.index} under another's name"

    def manifest_of(self, records: Sequence[ShardRecord]) -> Manifest:
        """The manifest of these shards.

        Raises:
            UserError: there is no pair in any of them, so nothing to train on.
        """
        manifest = Manifest(self.meaning, self.numerics, tuple(records))
        if manifest.num_pairs == 0:
            reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(manifest.skipped.items()))
            raise UserError(f"data set: expected pairs to score, all {self.num_rows} rows were skipped: {reasons}")
        return manifest


@dataclass(frozen=True)
class Found:
    """The manifest that a place held.

    Attributes:
        manifest: None if there is none, or a damaged one in a cache that is to be repaired.
        fault: what is wrong with it; empty if it is sound.
    """

    manifest: Manifest | None
    fault: str = ""

    @classmethod
    def read(cls, load: Callable[[], Manifest], *, repair: bool) -> "Found":
        """Loads the manifest; a damaged one is an error unless it is to be repaired."""
        try:
            return cls(load())
        except FileNotFoundError:
            return cls(None, "missing")
        except DamageError as error:
            if not repair:
                raise
            return cls(None, str(error.__cause__ or error))  # without its advice, which is being followed

    def vouched(self, index: int) -> ShardRecord | None:
        """What the manifest says of a shard."""
        return None if self.manifest is None else self.manifest.shards[index]


def record_of(path: Path, name: str, vouched: ShardRecord | None) -> ShardRecord:
    """Reads a shard back and describes it for the manifest.

    Args:
        path: the shard.
        name: its name in the cache.
        vouched: what an earlier manifest says of it.

    Raises:
        UserError: it does not read back, or is not the one that was vouched for.
    """
    try:
        footer = read_back(path)
    except DAMAGE as error:
        raise UserError(f"{path}: {error}; {REPAIR}") from error
    record = ShardRecord(name, footer.rows, path.stat().st_size, sha256_file(path), footer.report)
    if vouched not in (None, record):
        raise UserError(f"{path}: expected the shard that {MANIFEST_NAME} vouches for, found another; {REPAIR}")
    return record


def claim(
    folder: Path, meaning: Meaning, numerics: Numerics, begun: Callable[[], Meaning] | None = None
) -> tuple[Lock, Meaning]:
    """Joins the writers of a folder, whose spec is what the first of those that live said.

    They share a lock that tells whether one lives, so that a spec which a killed writer left binds nobody.

    Args:
        folder: of the cache.
        meaning: of the cache.
        numerics: of the cache.
        begun: where the day may be another, that of what was begun: the meaning on the day that the folder's files say,
            which is asked for while nobody writes any. Two workers that start about midnight so agree.

    Returns:
        The lock, to be held as long as this writer may write, and the meaning.

    Raises:
        IdentityError: those who live are of another spec.
        OSError: the folder cannot be written, or its file system has no locks.
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
                    f"{folder}: others are writing it with another spec ({'; '.join(found)}); take another folder or "
                    "the same spec, or stop them first"
                )
        alive.take(shared=True, wait=True)
    return alive, meaning
