"""One shard as Parquet bytes.

In: a table of rows, the identity of the cache and the shard's report. Out: bytes, and from a file the same three.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .checks import check_schema, check_table
from .files import canonical_json
from .manifest import FormatError, Meaning, Numerics, ShardReport
from .pages import check_pages, open_parquet
from .records import decode, parse_json
from .schema import (
    FORMAT_VERSION,
    LEARNT_COLUMNS,
    SIDES,
    TOKEN_COLUMNS,
    arrow_schema,
    feature_column,
    raw_row_of,
)

# What pyarrow raises for a file that is no Parquet or is damaged (ArrowInvalid is a ValueError).
DAMAGE = (OSError, ValueError, pa.ArrowException)


# Raw rows, all of which may be skipped for a reason that the footer states.
LARGEST_SHARD = 1 << 16


@dataclass(frozen=True)
class Footer:
    """What a shard says about itself.

    Attributes:
        meaning: of the cache.
        numerics: of the cache.
        report: of this shard.
        rows: pairs in it.
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


def read_footer(source: Path | pa.BufferReader) -> Footer:
    """Reads a shard's footer alone.

    Raises:
        One of `DAMAGE`: the file is missing, no Parquet, or its footer is not one that `encode_shard` writes.
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
    """`read_footer`; None if the file is missing or damaged.

    Raises:
        PermissionError: it may not be read, which says nothing of what is in it.
        FormatError: it is of another version, and so not damaged.
    """
    try:
        return read_footer(source)
    except (PermissionError, FormatError):
        raise
    except DAMAGE:
        return None


def read_table(source: Path | pa.BufferReader, meaning: Meaning, sites: Sequence[int] | None = None) -> pa.Table:
    """Reads and checks a shard's rows.

    Args:
        source: the shard.
        meaning: of the cache.
        sites: the sites whose features are read; all by default.

    Raises:
        One of `DAMAGE`: the file is damaged, or a row breaks a rule of `check_table`.
    """
    table = read_columns(source, meaning, arrow_schema(meaning.widths, sites).names)
    check_table(table, meaning.widths, sites)
    return table


def read_columns(source: Path | pa.BufferReader, meaning: Meaning, names: Sequence[str]) -> pa.Table:
    """Reads some columns of a shard, whose rows are not checked; no page is unpacked before all are looked at.

    Args:
        source: the shard.
        meaning: of the cache.
        names: of the columns.

    Raises:
        One of `DAMAGE`: the file is damaged, has other columns, or unpacks to more than is allowed (`check_pages`).
    """
    data = _bytes_of(source)
    with open_parquet(pa.BufferReader(data)) as file:
        check_schema(file.schema_arrow, meaning.widths)
        check_pages(data, file.metadata)
        return file.read(columns=names).select(names).replace_schema_metadata(None)


def _bytes_of(source: Path | pa.BufferReader) -> pa.Buffer:
    if isinstance(source, Path):
        with pa.memory_map(str(source)) as file:  # of a large shard only the columns that are asked for are read
            return file.read_buffer()
    source.seek(0)
    return source.read_buffer()


def check_range(table: pa.Table, report: ShardReport) -> None:
    """Checks that every raw row of the shard's range is either a row or skipped.

    Raises:
        ValueError: one is neither, both, or of another shard.
    """
    kept = [raw_row_of(name) for name in table.column("pair_id").to_pylist()]
    found = sorted([*kept, *(row for row, _ in report.skipped)])
    rows = range(report.start, report.stop)
    # Without a list of the range, which may be a stranger's and have more numbers than memory holds.
    if len(found) != report.stop - report.start or any(row != raw for row, raw in zip(found, rows, strict=True)):
        known = set(found)
        missing = islice((row for row in rows if row not in known), 5)
        odd = sorted([*missing, *(row for row in known if row not in rows)])
        which = f"missing or foreign: {odd[:5]}" if odd else "some appear twice"
        raise ValueError(
            f"expected every raw row of {report.start} to {report.stop - 1} once, as a row or as skipped; {which}"
        )
