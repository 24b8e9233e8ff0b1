import random
from collections.abc import Callable
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_rows import MEANING, NUMERICS, WIDTHS, random_rows
from fpo.cache import pages
from fpo.cache.columns import rows_to_table
from fpo.cache.manifest import ShardReport
from fpo.cache.pages import check_pages, open_parquet, read_struct
from fpo.cache.shard import encode_shard


@pytest.fixture(scope="module")
def shard() -> bytes:
    return encode_shard(
        rows_to_table(random_rows(0, range(50)), WIDTHS), MEANING, NUMERICS, ShardReport(0, 0, 50, (), {}, None)
    )


def check(data: bytes) -> None:
    with open_parquet(pa.BufferReader(data)) as file:
        check_pages(pa.py_buffer(data), file.metadata)


@pytest.fixture
def limit(shard, monkeypatch) -> int:
    """As much as the shard unpacks to, from now on the limit."""
    group = pq.read_metadata(pa.BufferReader(shard)).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    headers = [read_struct(memoryview(shard)[column.data_page_offset :]) for column in columns]
    # A page a column: what Parquet says of the whole less the header itself, and 12 bytes a value.
    total = sum(
        column.total_uncompressed_size - length + 12 * column.num_values
        for column, (_, length) in zip(columns, headers, strict=True)
    )
    monkeypatch.setattr(pages, "TIMES_BYTES", 0)
    monkeypatch.setattr(pages, "SMALLEST_LIMIT", total)
    return total


def test_a_shard_may_unpack_to_the_limit_and_no_further(shard, limit, monkeypatch):
    check(shard)
    monkeypatch.setattr(pages, "SMALLEST_LIMIT", limit - 1)
    with pytest.raises(ValueError, match=rf"at most {limit - 1} bytes"):
        check(shard)


@pytest.mark.parametrize(
    "change",
    [
        lambda number: b"\x15" + number(0) + b"\x05" + b"\x04" + number(0),  # the second field twice
        lambda number: b"\x1b\x01",  # a map
        lambda number: b"\x19\xf8" + b"\xff" * 9 + b"\x01",  # a list of more bytes than there are
        lambda number: b"\x19\xf7" + b"\xff" * 9 + b"\x01",  # a list of more numbers than there are
        lambda number: b"\x18" + b"\xff" * 9 + b"\x01",  # bytes without end
        lambda number: b"\x16" + b"\xff" * 20,  # a number without end
        lambda number: b"\x1c" * 1000,  # structs in structs
        lambda number: b"\x19" + b"\x19" * 1000,  # lists in lists
    ],
)
def test_a_header_that_is_none_is_refused_at_once(change: Callable[[Callable[[int], bytes]], bytes]):
    with pytest.raises(ValueError, match=r"expected"):
        read_struct(memoryview(change(lambda value: bytes([2 * value]))))


def test_changed_headers_are_refused_or_unpack_to_no_more_than_the_limit(shard, limit, tries, tally):
    chance = random.Random(0)
    group = pq.read_metadata(pa.BufferReader(shard)).row_group(0)
    for number in range(tries(1_000, 100_000)):
        at = group.column(number % group.num_columns).data_page_offset
        data = bytearray(shard)
        for _ in range(chance.randrange(1, 4)):
            data[at + chance.randrange(24)] = chance.randrange(256)
        tally("page headers changed")
        with suppress(ValueError, OSError, pa.ArrowException):
            check(bytes(data))
            assert pq.read_table(pa.BufferReader(bytes(data))).nbytes <= limit
