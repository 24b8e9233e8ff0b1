"""How much a Parquet file unpacks to, before any of it is unpacked.

In: the bytes of a shard that may be a stranger's. Out: nothing, or a `ValueError`: a few kB of zstd or of run lengths
hold gigabytes, and whatever a page's header claims is allocated on its word. Pages are as `encode_shard` writes them;
of their encodings only `DELTA_BINARY_PACKED` and the levels of lists can say more than their bytes do.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# What the pages of a shard may unpack to: so much, or so many times its bytes if that is more. Real shards take 3 to 8
# times their bytes.
SMALLEST_LIMIT = 1 << 28
TIMES_BYTES = 32

# A value of the widest number, and the levels that say where in a list it stands.
VALUE = 8 + 4
LARGEST_HEADER = 1 << 16
# At the end of a Parquet file: the footer's length, four bytes, and a magic number.
TAIL = 8
# A footer's lists are allocated on its word, and two of its bytes can stand for hundreds. Two hundred sites make a
# list of 4,000; a hundred thousand skipped rows a footer of 3 MB.
LARGEST_FOOTER = 1 << 22
LARGEST_LIST = 1 << 12
DATA_PAGE = 0
ENCODINGS = {0: "PLAIN", 5: "DELTA_BINARY_PACKED", 9: "BYTE_STREAM_SPLIT"}
DEEPEST = 8

Struct = dict[int, Any]


@contextmanager
def open_parquet(source: Path | pa.BufferReader) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file whose footer is no larger than a shard's can be, in bytes and in what it claims to list.

    Raises:
        OSError: there is no such file.
        ValueError: it is no Parquet, or its footer is larger.
    """
    with pa.OSFile(str(source)) if isinstance(source, Path) else nullcontext(source) as file:
        size = file.size()
        file.seek(max(0, size - TAIL))
        length = int.from_bytes(file.read(4), "little")
        if LARGEST_FOOTER < length < size:
            raise ValueError(f"expected a footer of at most {LARGEST_FOOTER} bytes, found one of {length}")
        file.seek(0)
        yield pq.ParquetFile(file, page_checksum_verification=True, thrift_container_size_limit=LARGEST_LIST)


def check_pages(data: pa.Buffer, metadata: pq.FileMetaData) -> None:
    """Checks that no page is of another kind than a shard's and that all of them unpack to no more than is allowed.

    Args:
        data: the file.
        metadata: of the file.

    Raises:
        ValueError: one is, or they do.
    """
    limit = max(SMALLEST_LIMIT, TIMES_BYTES * data.size)
    total = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            values, size = _column(memoryview(data).cast("B"), column)
            # Rows and values are allocated as the footer counts them.
            if values != column.num_values or not 0 <= group.num_rows <= values:
                raise ValueError(
                    f"{column.path_in_schema}: expected {column.num_values} values of {group.num_rows} rows, found "
                    f"pages of {values}"
                )
            total += size + values * VALUE
            if total > limit:
                raise ValueError(
                    f"expected pages that unpack to at most {limit} bytes, found more than that in a file of "
                    f"{data.size} bytes"
                )


def _column(data: memoryview, column: Any) -> tuple[int, int]:
    """How many values the pages of a column hold, and how many bytes before they are decoded."""
    name, at, size = column.path_in_schema, column.data_page_offset, column.total_compressed_size
    if column.has_dictionary_page or not 0 <= at <= at + size <= len(data):
        raise ValueError(f"{name}: expected data pages inside the file, found a dictionary, or pages outside")
    stop = at + size
    values = unpacked = 0
    while at < stop:
        page, length = read_struct(data[at : min(stop, at + LARGEST_HEADER)])
        header = page.get(5)
        numbers: list[Any] = [page.get(1), page.get(2), page.get(3)]
        numbers += [header.get(1), header.get(2)] if isinstance(header, dict) else [None]
        if any(type(number) is not int for number in numbers):
            raise ValueError(f"{name}: expected the header of a data page, found none")
        kind, plain, packed, count, encoding = numbers
        if kind != DATA_PAGE or encoding not in ENCODINGS:
            expected = ", ".join(ENCODINGS.values())
            raise ValueError(f"{name}: expected data pages in {expected}, found page type {kind}, encoding {encoding}")
        at += length + packed
        if min(plain, packed, count) < 0 or at > stop:
            raise ValueError(f"{name}: expected pages that fill the column, found one of {packed} bytes")
        values, unpacked = values + count, unpacked + plain
    return values, unpacked


@dataclass
class _Cursor:
    """A place in bytes.

    Attributes:
        data: the bytes.
        at: the place.
    """

    data: memoryview
    at: int = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def skip(self, number: int) -> None:
        self.at += number
        if self.at > len(self.data):
            raise IndexError

    def number(self) -> int:
        """A number of at most 64 bits, seven to a byte."""
        value = shift = 0
        while shift < 64:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("expected a number of at most 64 bits")

    def signed(self) -> int:
        value = self.number()
        return (value >> 1) ^ -(value & 1)


def read_struct(data: memoryview) -> tuple[Struct, int]:
    """A struct of Thrift's compact protocol at the start of `data`: its fields by number, and its length.

    A field that stands twice is refused: readers differ in which of the two counts.

    Raises:
        ValueError: there is none.
    """
    cursor = _Cursor(data)
    try:
        return _struct(cursor, 0), cursor.at
    except IndexError as error:
        raise ValueError(f"expected a page header of at most {LARGEST_HEADER} bytes, found no end of it") from error


def _struct(cursor: _Cursor, depth: int) -> Struct:
    fields: Struct = {}
    number = 0
    while byte := cursor.byte():
        number = number + (byte >> 4) if byte >> 4 else cursor.signed()
        if number in fields:
            raise ValueError(f"expected each field of a page header once, found field {number} twice")
        # Of a field, unlike an item, a truth value is its kind.
        fields[number] = None if byte & 0xF in (1, 2) else _value(cursor, byte & 0xF, depth + 1)
    return fields


def _value(cursor: _Cursor, kind: int, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError("expected a page header that is not nested deep")
    if kind in (1, 2, 3):
        return cursor.byte()
    if kind in (4, 5, 6):
        return cursor.signed()
    if kind == 7 or kind == 8:
        cursor.skip(8 if kind == 7 else cursor.number())
        return None
    if kind == 9 or kind == 10:
        head = cursor.byte()
        return [_value(cursor, head & 0xF, depth + 1) for _ in range(cursor.number() if head >> 4 == 15 else head >> 4)]
    if kind == 12:
        return _struct(cursor, depth + 1)
    raise ValueError(f"expected the header of a page, found a field of kind {kind}")
