"""`manifest.json`, the table of contents of a finished cache.

In: the identity of a cache and the report of each shard. Out: the file, written; or its content, read and checked.
"""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import DamageError, MissingError, UserError
from .files import STRICT, canonical_json, decode, parse_json, sha256_text, write_atomically
from .identity import FormatError, Meaning, Numerics
from .schema import FORMAT_VERSION

MANIFEST_NAME = "manifest.json"
# What to do about a damaged cache.
REPAIR = "run `fpo precompute --repair` with the options that it was made with"
MAX_SHARDS = 99_999
# In bytes; a manifest of `MAX_SHARDS` shards is smaller.
LARGEST_TEXT = 1 << 27

_SPLIT = re.compile(r"\w+(\.\w+)*", re.ASCII)


@dataclass(frozen=True)
class Noise:
    """The largest difference between two packings of the same pairs.

    Attributes:
        logp: difference of a response's log-probability, nats.
        feature_mse: `D_F` between the two packings at each site.
    """

    __pydantic_config__ = STRICT

    logp: float
    feature_mse: tuple[float, ...]


@dataclass(frozen=True)
class ShardReport:
    """What stage one reports about one shard.

    Attributes:
        index: the shard's number, from 0.
        start: its first raw row.
        stop: one past its last raw row.
        skipped: the raw rows that were skipped, ascending, each with the reason.
        counts: further counts: `ties`, `truncated_prompts`, `truncated_responses`, `scored_tokens`.
        noise: between two packings; None if no pair of this shard was packed twice.
    """

    __pydantic_config__ = STRICT

    index: int
    start: int
    stop: int
    skipped: tuple[tuple[int, str], ...]
    counts: dict[str, int]
    noise: Noise | None


@dataclass(frozen=True)
class ShardRecord:
    """One shard in the manifest.

    Attributes:
        name: path relative to the cache's folder, `data/train-00007-of-00060.parquet`.
        rows: the number of pairs.
        bytes: size of the file.
        sha256: SHA-256 of the file.
        report: the same as in the shard's footer.
    """

    __pydantic_config__ = STRICT

    name: str
    rows: int
    bytes: int
    sha256: str
    report: ShardReport


def shard_name(split: str, index: int, num_shards: int) -> str:
    """The path of a shard relative to the cache's folder.

    Raises:
        UserError: the split's name cannot be part of a file name, or there are too many shards.
    """
    if _SPLIT.fullmatch(split) is None:
        raise UserError(f"split: expected letters, digits, '_' and inner '.', found {split!r}; rename it")
    if num_shards > MAX_SHARDS:
        raise UserError(f"expected at most {MAX_SHARDS} shards, found {num_shards}; raise --shard-size")
    return f"data/{split}-{index:05d}-of-{num_shards:05d}.parquet"


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a finished cache."""

    __pydantic_config__ = STRICT

    meaning: Meaning
    numerics: Numerics
    shards: tuple[ShardRecord, ...]

    @property
    def num_pairs(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def skipped(self) -> Counter[str]:
        """How many raw rows were skipped for each reason."""
        return Counter(reason for shard in self.shards for _, reason in shard.report.skipped)

    @property
    def counts(self) -> Counter[str]:
        """The sums of the shards' counts."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.report.counts)
        return total

    @property
    def noise(self) -> Noise | None:
        """The largest noise of any shard; None if no shard measured it."""
        noises = [shard.report.noise for shard in self.shards if shard.report.noise is not None]
        if not noises:
            return None
        by_site = zip(*(noise.feature_mse for noise in noises), strict=True)
        return Noise(max(noise.logp for noise in noises), tuple(max(site) for site in by_site))

    @cached_property
    def sha256(self) -> str:
        """SHA-256, in hexadecimal, of the canonical JSON of the manifest without this field."""
        return sha256_text(canonical_json(self._document()))

    def _document(self) -> dict[str, Any]:
        totals = {
            "pairs": self.num_pairs,
            "bytes": self.num_bytes,
            "skipped": dict(self.skipped),
            "counts": dict(self.counts),
            "noise": None if self.noise is None else dataclasses.asdict(self.noise),
        }
        # JSON turns tuples into lists, as in a manifest that was read.
        fields = {"fingerprint": self.meaning.fingerprint(), "totals": totals, **dataclasses.asdict(self)}
        return dict(json.loads(canonical_json(fields)))

    def save(self, folder: Path) -> None:
        """Writes `manifest.json`; equal content gives equal bytes."""
        write_atomically(folder / MANIFEST_NAME, _pretty({**self._document(), "sha256": self.sha256}))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads and checks `manifest.json`.

        Raises:
            MissingError: there is none, so stage one has not finished.
            FormatError: it has another format version.
            DamageError: it was altered or contradicts itself.
        """
        path = folder / MANIFEST_NAME
        try:
            size = path.stat().st_size
            data = path.read_bytes() if size <= LARGEST_TEXT else b""
        except (FileNotFoundError, NotADirectoryError):
            raise MissingError(
                f"{path}: expected a finished cache's manifest, found none; finish `fpo precompute`"
            ) from None
        if size > LARGEST_TEXT:
            raise DamageError(
                f"{path}: expected at most {LARGEST_TEXT} bytes, found {size}; download it again, or {REPAIR}"
            )
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> "Manifest":
        """Checks the bytes of a `manifest.json`.

        Args:
            data: the file.
            where: its path or address, for errors.

        Raises:
            FormatError: it has another format version.
            DamageError: it was altered or contradicts itself.
        """
        try:
            return cls._parse(data, where)
        except FormatError:
            raise
        except (ValueError, RecursionError) as error:
            raise DamageError(f"{where}: {error}; download it again, or {REPAIR}") from error

    @classmethod
    def _parse(cls, data: bytes, where: str) -> "Manifest":
        document = parse_json(data)
        if not isinstance(document, dict):
            raise ValueError(f"expected a JSON object, found {type(document).__name__}")
        meaning = document.get("meaning")
        version = meaning.get("format_version") if isinstance(meaning, dict) else None
        if version != FORMAT_VERSION:
            if type(version) is int:
                raise FormatError(where, version)
            raise ValueError(f"expected format version {FORMAT_VERSION}, found {version}")
        stated = document.pop("sha256", None)
        if stated != sha256_text(canonical_json(document)) or _pretty({**document, "sha256": stated}) != data:
            raise ValueError("its SHA-256 is not the one that it states: it was altered")
        derived = {name: document.pop(name, None) for name in ("fingerprint", "totals")}
        manifest = decode(cls, document, "manifest")
        for name, value in derived.items():
            if value != manifest._document()[name]:
                raise ValueError(f"{name} does not follow from its other fields")
        manifest._check_shards()
        return manifest

    def _check_shards(self) -> None:
        start = 0
        for index, shard in enumerate(self.shards):
            name, report = shard_name(self.meaning.split, index, len(self.shards)), shard.report
            if shard.name != name:
                raise ValueError(f"shard {index}: expected the name {name!r}, found {shard.name!r}")
            if (report.index, report.start) != (index, start) or report.stop < start:
                raise ValueError(f"{name}: its raw rows do not follow those of the shard before")
            if shard.rows + len(report.skipped) != report.stop - report.start:
                raise ValueError(f"{name}: rows and skipped rows do not add up to its range of raw rows")
            start = report.stop


def _pretty(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
