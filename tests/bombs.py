"""Files of a few kB that claim gigabytes or unpack to them.

In: a folder. Out: caches whose second shard is such a file, vouched for by the manifest as a stranger would.
"""

import gzip
import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cache_rows import MEANING, NUMERICS, random_rows
from forged import Files, sign
from fpo.cache.columns import rows_to_table
from fpo.cache.shard import encode_shard, read_footer

NAMES = [f"data/train-0000{index}-of-00003.parquet" for index in range(3)]
HUGE = 2**31 - 1
MANY = 24_000_000  # values: 96 MB of tokens, which `check_size` counts as at least 288


def with_bomb(sound: Files, make: Callable[[bytes], bytes]) -> Files:
    """The files of a cache with a second shard made of the sound one."""
    files = sound | {NAMES[1]: make(sound[NAMES[1]])}
    sign(files)
    return files


def of_many_tokens(values: int, **writing: Any) -> Callable[[bytes], bytes]:
    """A shard whose first prompt is as many times the token 0."""

    def make(shard: bytes) -> bytes:
        report = read_footer(pa.BufferReader(shard)).report
        table = rows_to_table(random_rows(0, range(report.start, report.stop)), MEANING.widths)
        offsets = pa.array([0, *range(values, values + table.num_rows)], pa.int32())
        tokens = pa.array(np.zeros(values + table.num_rows - 1, np.int32))
        column = pa.ListArray.from_arrays(offsets, tokens, type=table.schema.field("prompt_ids").type)
        table = table.set_column(1, table.schema.field(1), column)
        return encode_shard(table, MEANING, NUMERICS, report) if not writing else _written(table, shard, **writing)

    return make


def _written(table: pa.Table, shard: bytes, **writing: Any) -> bytes:
    metadata = pq.read_metadata(pa.BufferReader(shard)).metadata
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", store_schema=False, **writing) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({key: value for key, value in metadata.items() if key.startswith(b"fpo.")})
    return bytes(sink.getvalue())


def with_header(column: int = 1, **claims: int) -> Callable[[bytes], bytes]:
    """A shard in which the first page of a column claims to be other than it is, in as many bytes."""

    def make(shard: bytes) -> bytes:
        at = pq.read_metadata(pa.BufferReader(shard)).row_group(0).column(column).data_page_offset
        page, length = _page_header(shard[at:])
        header = _fields([claims.get("kind", page[0]), claims.get("unpacked", page[1]), page[2]])
        header += bytes([0x2C]) + _fields([claims.get("values", page[4]), *page[5:8]]) + b"\0"  # field 5, a struct
        rest = length - len(header) - 3  # what is left is field 9, bytes that mean nothing
        assert 0 <= rest < 128
        return shard[:at] + header + bytes([0x48, rest]) + bytes(rest + 1) + shard[at + length :]

    return make


def _page_header(data: bytes) -> tuple[list[int], int]:
    """The numbers of a data page's header as pyarrow writes it, and its length.

    They are: kind, bytes unpacked, bytes packed, checksum; in a struct: values, encoding, encodings of two levels.
    """
    numbers, at = [], 0
    for number in range(8):
        at += 1 + (number == 4)  # the byte that says which field follows; one more for the struct
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                break
        numbers.append((value >> 1) ^ -(value & 1))
    return numbers, data.index(b"\x28\xb5\x2f\xfd")  # zstd's magic number: statistics stand before it


def _fields(values: list[int]) -> bytes:
    """Fields of Thrift's compact protocol that follow each other, all of them 32-bit numbers."""
    return b"".join(bytes([0x15]) + _number(2 * value) for value in values)


def _number(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def with_footer(footer: bytes) -> Callable[[bytes], bytes]:
    return lambda shard: b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _columns(number: int, given: int) -> bytes:
    """A footer whose first row group claims columns, and gives so many, of three bytes each."""
    schema = b"\x19\x1c" + b"\x35\x00\x18\x01a\x00"
    return b"\x15\x02" + schema + b"\x16\x00" + b"\x19\x1c" + _list_of(number) + b"\x26\x00\x00" * given


def groups(footer: int) -> bytes:
    """A footer of as many row groups of 4,000 columns as fill it."""
    group = _list_of(4000) + b"\x26\x00\x00" * 4000 + b"\x16\x00\x16\x00\x00"
    number = footer // len(group)
    schema = b"\x19\x1c" + b"\x35\x00\x18\x01a\x00"
    return b"\x15\x02" + schema + b"\x16\x08" + _list_of(number) + group * number + b"\x00"


def _list_of(number: int) -> bytes:
    """The next field, a list of so many structs."""
    return b"\x19\xfc" + _number(number)


# By what is tried: a shard of a few kB, of a sound one.
SHARDS: dict[str, Callable[[bytes], bytes]] = {
    "zeros under zstd": of_many_tokens(MANY, use_dictionary=False),
    "runs of differences": of_many_tokens(MANY),
    "runs of a dictionary": of_many_tokens(MANY, use_dictionary=True),
    "pages of the second version": of_many_tokens(MANY, use_dictionary=False, data_page_version="2.0"),
    "a page that claims 2 GB": with_header(unpacked=HUGE),
    "a page that claims 2 milliard values": with_header(values=HUGE),
    "a page that claims less than nothing": with_header(unpacked=-1 % 2**32),
    "a page that claims to be a dictionary": with_header(kind=2),
    "a footer that claims a million columns": with_footer(_columns(10**6, 0)),
    "a footer of half a million columns": with_footer(_columns(500_000, 500_000)),
    "a footer of a thousand row groups": with_footer(groups(12_000_000)),
}


def npz(compression: int, size: int, claimed: int | None = None, kind: str = "<f4") -> bytes:
    """An archive of one array of zeros; `claimed` is what its header says that it has."""
    head = io.BytesIO()
    shape = (size // 4 if claimed is None else claimed,)
    np.lib.format.write_array_header_1_0(head, {"descr": kind, "fortran_order": False, "shape": shape})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, archive.open("W_enc.npy", "w") as member:
        member.write(head.getvalue())
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    return file.getvalue()


# By what is tried: an SAE in Gemma Scope's format.
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "zeros under deflate": lambda: npz(zipfile.ZIP_DEFLATED, 1 << 28),
    "zeros under bzip2": lambda: npz(zipfile.ZIP_BZIP2, 1 << 27),
    "zeros under LZMA": lambda: npz(zipfile.ZIP_LZMA, 1 << 27),
    "an array that claims 4 GB": lambda: npz(zipfile.ZIP_STORED, 1 << 20, 1 << 30),
    "an array that claims more than there is": lambda: npz(zipfile.ZIP_STORED, 1 << 20, 1 << 60),
}


def packed_rows(size: int, line: bytes = b"") -> bytes:
    """Rows under gzip that unpack to so many bytes: one whose text is that long, or as many copies of a line."""
    if line:
        return gzip.compress(line * (size // len(line)))
    begins, ends = b'{"prompt": "a", "rejected": "b", "chosen": "', b'"}\n'
    return gzip.compress(begins + b"a" * (size - len(begins) - len(ends)) + ends)


# By what is tried: preference data.
DATA: dict[str, Callable[[], bytes]] = {
    "one long text.jsonl.gz": lambda: packed_rows(1 << 28),
    "many rows.jsonl.gz": lambda: packed_rows(1 << 28, b'{"chosen": "a"}\n'),
    "many rows of an array.json.gz": lambda: packed_rows(1 << 28, b'[{"chosen": "a"},\n'),
    "zeros.csv.gz": lambda: gzip.compress(bytes(1 << 28)),
    "Parquet that is none.parquet.gz": lambda: gzip.compress(bytes(1 << 28)),
}
