"""One shard as a Parquet file.

In: a table of rows, the identity of the cache and the shard's report. Out: the file's bytes; or, read from a file, the
same three, or what is wrong with its bytes, its footer or its rows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .checks import check_schema, check_table
from .files import canonical_json, decode, parse_json, sha256_file
from .identity import FormatError, Meaning, Numerics, differences
from .manifest import Manifest, ShardRecord, ShardReport
from .schema import (
    FORMAT_VERSION,
    LEARNT_COLUMNS,
    SIDES,
    TOKEN_COLUMNS,
    arrow_schema,
    feature_column,
    raw_row_of,
)

# What reading a damaged file raises; pyarrow's ArrowInvalid is a ValueError.
DAMAGE = (OSError, ValueError, pa.ArrowException)

# In raw rows; all may be skipped, each with a reason in the footer.
LARGEST_SHARD = 1 << 16

# The bytes that a shard may unpack to, according to its footer: `SMALLEST_LIMIT` or `TIMES_BYTES` times the file's
# size, whichever is more. Real shards unpack to 3 to 8 times their size; a hostile file of a few kB can unpack to
# gigabytes.
SMALLEST_LIMIT = 1 << 28
TIMES_BYTES = 32
# Bytes of a decoded value: the widest number, and the levels that give its place in a list.
VALUE = 8 + 4

# A Parquet file ends with the footer's length (four bytes) and a magic number (four bytes).
TAIL = 8
# pyarrow allocates as many list elements as a footer claims to hold, and two bytes can claim hundreds. Two hundred
# sites need a list of 4,000; a hundred thousand skipped rows need a footer of 3 MB.
LARGEST_FOOTER = 1 << 22
LARGEST_LIST = 1 << 12


@dataclass(frozen=True)
class Footer:
    """What a shard says about itself.

    Attributes:
        meaning: what the numbers of its cache mean.
        numerics: how they were computed.
        report: stage one's report of this shard.
        rows: the number of pairs.
    """

    meaning: Meaning
    numerics: Numerics
    report: ShardReport
    rows: int


def encode_shard(table: pa.Table, meaning: Meaning, numerics: Numerics, report: ShardReport) -> bytes:
    """Encodes rows as one row group; equal input gives equal bytes."""
    encoding = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in (*TOKEN_COLUMNS, *LEARNT_COLUMNS)}
    for column in (feature_column(side, site) for side in SIDES for site in range(len(meaning.sites))):
        encoding[f"{column}.ids.list.element"] = "DELTA_BINARY_PACKED"
        encoding[f"{column}.values.list.element"] = "BYTE_STREAM_SPLIT"
    metadata = {
        "fpo.fingerprint": meaning.fingerprint(),
        "fpo.meaning": canonical_json(dataclasses.asdict(meaning)),
        "fpo.numerics": canonical_json(dataclasses.asdict(numerics)),
        "fpo.shard": canonical_json(dataclasses.asdict(report)),
    }
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding=encoding,
        write_page_checksum=True,
    ) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        writer.add_key_value_metadata(metadata)
    return bytes(sink.getvalue())


@contextmanager
def open_parquet(source: Path | pa.BufferReader) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file whose footer is no larger than a shard's can be, in bytes and in elements that it claims.

    Raises:
        OSError: there is no such file.
        ValueError: it is not Parquet, or its footer is larger.
    """
    with pa.OSFile(str(source)) if isinstance(source, Path) else nullcontext(source) as file:
        size = file.size()
        file.seek(max(0, size - TAIL))
        length = int.from_bytes(file.read(4), "little")
        if LARGEST_FOOTER < length < size:
            raise ValueError(f"expected a footer of at most {LARGEST_FOOTER} bytes, found one of {length}")
        file.seek(0)
        yield pq.ParquetFile(file, page_checksum_verification=True, thrift_container_size_limit=LARGEST_LIST)


def check_size(size: int, metadata: pq.FileMetaData) -> None:
    """Checks, before any page is read, that a shard of `size` bytes unpacks to no more than is allowed.

    Raises:
        ValueError: it unpacks to more, or has a dictionary, with which two bytes can stand for any value.
    """
    limit, total = max(SMALLEST_LIMIT, TIMES_BYTES * size), 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.has_dictionary_page or not 0 <= group.num_rows <= column.num_values:
                raise ValueError(f"{column.path_in_schema}: expected a value a row or more and no dictionary")
            total += column.total_uncompressed_size + column.num_values * VALUE
    if total > limit:
        raise ValueError(f"expected at most {limit} bytes unpacked, found {total} in a file of {size} bytes")


def read_footer(source: Path | pa.BufferReader) -> Footer:
    """Reads a shard's footer alone.

    Raises:
        One of `DAMAGE`: the file is missing, not Parquet, or has a footer that `encode_shard` does not write.
    """
    with open_parquet(source) as file:
        parquet = file.metadata
    metadata = parquet.metadata or {}
    parts: dict[str, Any] = {}
    for key, kind in (("meaning", Meaning), ("numerics", Numerics), ("shard", ShardReport)):
        text = metadata.get(f"fpo.{key}".encode())
        if text is None:
            raise ValueError(f"its footer has no fpo.{key}")
        value = parse_json(text)
        version = value.get("format_version", FORMAT_VERSION) if isinstance(value, dict) else FORMAT_VERSION
        if type(version) is int and version != FORMAT_VERSION:
            raise FormatError(str(source) if isinstance(source, Path) else "shard", version)
        parts[key] = decode(kind, value, f"fpo.{key}")
    if metadata.get(b"fpo.fingerprint") != parts["meaning"].fingerprint().encode():
        raise ValueError("its footer's fpo.fingerprint is not that of its fpo.meaning")
    return Footer(parts["meaning"], parts["numerics"], parts["shard"], parquet.num_rows)


def footer_of(source: Path | pa.BufferReader) -> Footer | None:
    """Reads a shard's footer; None if the file is missing or damaged.

    Raises:
        PermissionError: the file may not be read, so nobody can tell whether it is damaged.
        FormatError: it has another format version, which is no damage.
    """
    try:
        return read_footer(source)
    except (PermissionError, FormatError):
        raise
    except DAMAGE:
        return None


def read_table(source: Path | pa.BufferReader, meaning: Meaning, sites: Sequence[int] | None = None) -> pa.Table:
    """Reads and checks a shard's rows, with the features of some sites (indices; all by default).

    Raises:
        One of `DAMAGE`: the file is damaged, or a row breaks a rule of `check_table`.
    """
    table = read_columns(source, meaning, arrow_schema(meaning.widths, sites).names)
    check_table(table, meaning.widths, sites)
    return table


def read_columns(source: Path | pa.BufferReader, meaning: Meaning, names: Sequence[str]) -> pa.Table:
    """Reads the named columns of a shard without checking its rows.

    Raises:
        One of `DAMAGE`: the file is damaged, has other columns, or unpacks to more than is allowed (`check_size`).
    """
    data = _bytes_of(source)
    with open_parquet(pa.BufferReader(data)) as file:
        check_schema(file.schema_arrow, meaning.widths)
        check_size(data.size, file.metadata)
        return file.read(columns=names).select(names).replace_schema_metadata(None)


def _bytes_of(source: Path | pa.BufferReader) -> pa.Buffer:
    if isinstance(source, Path):
        with pa.memory_map(str(source)) as file:  # pyarrow reads only the columns that are asked for
            return file.read_buffer()
    source.seek(0)
    return source.read_buffer()


def check_range(table: pa.Table, report: ShardReport) -> None:
    """Checks that every raw row of the shard's range is either a row or skipped.

    Raises:
        ValueError: a row is neither, is both, or belongs to another shard.
    """
    kept = [raw_row_of(name) for name in table.column("pair_id").to_pylist()]
    found = sorted([*kept, *(row for row, _ in report.skipped)])
    rows = range(report.start, report.stop)
    # The range may be a stranger's and exceed memory as a list.
    if len(found) != report.stop - report.start or any(row != raw for row, raw in zip(found, rows, strict=True)):
        known = set(found)
        missing = islice((row for row in rows if row not in known), 5)
        odd = sorted([*missing, *(row for row in known if row not in rows)])
        which = f"missing or foreign: {odd[:5]}" if odd else "some appear twice"
        raise ValueError(
            f"expected every raw row of {report.start} to {report.stop - 1} once, as a row or as skipped; {which}"
        )


def shard_fault(path: Path, manifest: Manifest, record: ShardRecord) -> str | None:
    """Reads every byte and row of a shard that a manifest lists; what is wrong with it, or None."""
    fault = file_fault(path, manifest, record, hashes=True)
    if fault is None:  # a file with the wrong bytes is not parsed any further
        try:
            check_range(read_table(path, manifest.meaning), record.report)
        except DAMAGE as error:
            fault = str(error)
    return fault


def file_fault(path: Path, manifest: Manifest, record: ShardRecord, hashes: bool) -> str | None:
    """Compares a shard's size, footer and, if `hashes`, SHA-256 with the manifest; what is wrong, or None.

    Raises:
        PermissionError: the file may not be read, so nobody can tell whether it is damaged.
    """
    return next(_file_faults(path, manifest, record, hashes), None)


def _file_faults(path: Path, manifest: Manifest, record: ShardRecord, hashes: bool) -> Iterator[str]:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            yield f"expected {record.bytes} bytes, found {size}"
        if hashes and (sha256 := sha256_file(path)) != record.sha256:
            yield f"expected SHA-256 {record.sha256}, found {sha256}"
        footer = read_footer(path)
    except FileNotFoundError:
        yield "missing"
        return
    except PermissionError:
        raise
    except DAMAGE as error:
        yield f"unreadable ({error})"
        return
    found = differences(manifest.meaning, footer.meaning) + differences(manifest.numerics, footer.numerics)
    if found:
        yield f"of another spec ({'; '.join(found)})"
    if footer.rows != record.rows:
        yield f"expected {record.rows} rows, found {footer.rows}"
    if footer.report != record.report:
        yield "its report is not the one in the manifest"


def read_back(path: Path) -> Footer:
    """Reads a shard that no manifest lists yet and checks it against its own footer.

    Raises:
        One of `DAMAGE`: the file is missing or damaged, or a row breaks a rule.
    """
    footer = read_footer(path)
    check_range(read_table(path, footer.meaning), footer.report)
    return footer
