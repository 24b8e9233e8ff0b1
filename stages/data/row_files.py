"""Reads files of rows, one row at a time: Parquet, JSON, JSON lines, CSV and TSV, each also compressed by gzip.

In: a file. Out: its rows as dicts, and the names of its columns. A line or value that is not a row is refused with its
number; the unpacked size of a compressed file is bounded before it is read.
"""

import codecs
import csv
import functools
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...cache.errors import UserError

Row = dict[str, Any]

GZIP = ".gz"
# A compressed file may unpack to this many bytes, or to this many times its own size if that is more. Text is 3 to 20
# times as large as its compressed form.
SMALLEST_LIMIT = 1 << 26
TIMES_BYTES = 32
# The first bytes of compressed files, whose names may not tell.
PACKINGS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
CHUNK = 1 << 16


def kind_of(path: Path) -> str | None:
    """The ending of a file's name that says how to read it, `.gz` aside; None for files that hold no rows."""
    ending = _unpacked_name(path).suffix.lower()
    return ending if ending in READERS and path.name not in NO_ROWS else None


def stem_of(path: Path) -> str:
    """A file's name without `.gz` and the ending that `kind_of` returns."""
    return _unpacked_name(path).stem


def _unpacked_name(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() == GZIP else path


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order; from Parquet, only columns of text, numbers, booleans, lists and structs.

    Raises:
        UserError: the file's format is not the one that its name says, or a line or value is not a row.
        pa.ArrowException: a Parquet file is damaged; `zlib.error`, `EOFError`: a compressed one is.
        OSError: the file cannot be opened.
    """
    kind = kind_of(path)
    assert kind is not None
    return READERS[kind](path)


def columns_of(path: Path) -> dict[str, str | None]:
    """The names of a file's columns in their order of appearance; each with None, or its type if it cannot be read.

    JSON and CSV are read to their end.

    Raises:
        UserError: as `read_rows`; or the file has no row.
    """
    check_packing(path)
    columns: dict[str, str | None] = {}
    if kind_of(path) == ".parquet":
        with _parquet(path) as file:
            columns = table_columns(file.schema_arrow)
            count = file.metadata.num_rows
    else:
        count = 0
        for row in read_rows(path):
            columns |= dict.fromkeys(row)
            count += 1
    if not count:
        raise UserError("expected rows in every file, found none")
    return columns


def table_columns(schema: pa.Schema) -> dict[str, str | None]:
    """The names of an Arrow table's columns; each with None, or its type if it cannot be read.

    Raises:
        UserError: two columns have one name.
    """
    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"expected every column once, found {', '.join(map(repr, schema.names))}")
    return {field.name: None if _is_plain(field.type) else str(field.type) for field in schema}


def check_packing(path: Path) -> None:
    """Refuses a file whose name does not tell its compression, or which unpacks to more than the limit.

    Raises:
        UserError: it is such a file; the message says what to do.
    """
    with path.open("rb") as file:
        begins = file.read(8)
    packed = next((name for magic, name in PACKINGS.items() if begins.startswith(magic)), None)
    if packed != ("gzip" if path.suffix.lower() == GZIP else None):
        expected = f"a file packed by gzip, as its name ends in {GZIP}" if path.suffix.lower() == GZIP else "plain rows"
        advice = f"name it {path.name}{GZIP}" if packed == "gzip" else "unpack it" if packed else "rename it"
        raise UserError(f"expected {expected}, found {packed or 'another format'}; {advice}")
    if packed is None:
        return
    size = path.stat().st_size
    limit = max(SMALLEST_LIMIT, TIMES_BYTES * size)
    unpacked = 0
    with gzip.open(path) as stream:
        while chunk := stream.read(CHUNK):
            unpacked += len(chunk)
            if unpacked > limit:
                raise UserError(f"expected at most {limit} bytes once it is unpacked, found more; unpack it yourself")


def _opened(path: Path) -> "io.BufferedReader[Any]":
    return io.BufferedReader(gzip.GzipFile(path)) if path.suffix.lower() == GZIP else path.open("rb")


# JSON.


def _json_rows(path: Path) -> Iterator[Row]:
    """The objects of a file: one a line, or an array of them."""
    with _opened(path) as file:
        begins = file.read(len(codecs.BOM_UTF8))
        if begins != codecs.BOM_UTF8:
            file.seek(0)
        start = file.tell()
        first = b""
        for line in file:
            if first := line.strip()[:1]:
                break
        file.seek(start)
        if first == b"[":
            yield from _json_array(file.read())
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(_parsed(line.rstrip(b"\r\n"), number), f"line {number}")


def _json_array(content: bytes) -> Iterator[Row]:
    rows = _parsed(content, 1)
    if not isinstance(rows, list):
        raise UserError(f"expected an array of objects, found {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield _object(row, f"row {number}")


def _parsed(content: bytes, line: int) -> Any:
    try:
        text = content.decode()
        found = json.loads(text, object_pairs_hook=_without_repeats)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(found, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except RecursionError:
        raise UserError(f"line {line}: expected JSON, found it nested too deep") from None
    except UnicodeDecodeError as error:
        raise UserError(f"line {line}: expected UTF-8, found {error}") from None
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{where}: expected JSON, found none ({error.msg})") from None
    except ValueError as error:
        raise UserError(f"line {line}: expected JSON, found {error}") from None
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return made


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        found = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: expected a JSON object, found {found} in its place")
    return value


# CSV and TSV.


def _table_rows(delimiter: str, path: Path) -> Iterator[Row]:
    """The rows of a table with a header; every value is text, perhaps empty."""
    csv.field_size_limit(1 << 30)
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise UserError(f"expected every column once, found {', '.join(map(repr, header))}")
            for number, values in enumerate(reader):
                if not values:  # a blank line
                    continue
                if len(values) != len(header):
                    raise UserError(
                        f"row {number}: expected {len(header)} values, as in the header, found {len(values)}"
                    )
                yield dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise UserError(f"line {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"line {reader.line_num + 1}: expected UTF-8, found {error}") from None


# Parquet.


def _parquet(path: Path) -> pq.ParquetFile:
    if path.suffix.lower() != GZIP:
        return pq.ParquetFile(path)
    with gzip.open(path) as stream:
        return pq.ParquetFile(pa.BufferReader(stream.read()))


def _parquet_rows(path: Path) -> Iterator[Row]:
    with _parquet(path) as file:
        names = [name for name, unread in table_columns(file.schema_arrow).items() if unread is None]
        for batch in file.iter_batches(batch_size=256, columns=names):
            yield from batch.to_pylist()


def _is_plain(kind: pa.DataType) -> bool:
    """Whether JSON can hold every value of a type."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _is_plain(kind.storage_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    text = (types.is_string, types.is_large_string, types.is_string_view)
    return any(of(kind) for of in (*text, types.is_integer, types.is_floating, types.is_boolean, types.is_null))


# Files that `datasets` leaves beside its data.
NO_ROWS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _parquet_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": functools.partial(_table_rows, ","),
    ".tsv": functools.partial(_table_rows, "\t"),
}
