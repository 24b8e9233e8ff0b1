from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_rows import MEANING, NUMERICS, WIDTHS, random_rows, with_damaged_pages, write_cache
from fpo.cache import shard
from fpo.cache.columns import rows_to_table
from fpo.cache.manifest import ShardReport
from fpo.cache.shard import DAMAGE, check_range, encode_shard, read_footer, read_table


def encode(rows: int = 6) -> tuple[pa.Table, bytes]:
    table = rows_to_table(random_rows(0, range(rows)), WIDTHS)
    return table, encode_shard(table, MEANING, NUMERICS, ShardReport(0, 0, rows, (), {}, None))


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_a_shard_reads_back_whole_and_by_site(rows: int):
    table, data = encode(rows)
    assert read_table(pa.BufferReader(data), MEANING).equals(table)
    part = read_table(pa.BufferReader(data), MEANING, [1])
    assert part.equals(table.drop_columns(["chosen_features_0", "rejected_features_0"]))
    footer = read_footer(pa.BufferReader(data))
    assert (footer.meaning, footer.numerics, footer.rows) == (MEANING, NUMERICS, rows)


def test_equal_rows_give_equal_bytes_however_they_are_chunked():
    table, data = encode()
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert encode_shard(chunked, MEANING, NUMERICS, ShardReport(0, 0, 6, (), {}, None)) == data


def test_encoding_is_the_documented_one():
    metadata = pq.ParquetFile(pa.BufferReader(encode()[1])).metadata
    assert metadata.num_row_groups == 1
    group = metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    for path, column in columns.items():
        expected = "PLAIN"
        if path.endswith(("ids.list.element", "learnt.list.element")):
            expected = "DELTA_BINARY_PACKED"
        elif path.endswith("values.list.element"):
            expected = "BYTE_STREAM_SPLIT"
        assert (column.compression, set(column.encodings)) == ("ZSTD", {"RLE", expected}), path


def test_a_damaged_page_is_noticed_by_its_checksum():
    _, data = encode()
    for broken in with_damaged_pages(data):
        with pytest.raises(DAMAGE):
            read_table(pa.BufferReader(broken), MEANING)


def test_a_footer_without_identity_is_refused(tmp_path: Path):
    path = tmp_path / "foreign.parquet"
    table, _ = encode()
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"no fpo\.meaning"):
        read_footer(path)


def test_the_shard_is_plain_parquet_for_others(tmp_path: Path):
    write_cache(tmp_path, 10)
    table = pq.read_table(tmp_path / "data", columns=["pair_id", "chosen_features_1"])
    rows = random_rows(0, [row for row in range(10) if row % 10 != 3])
    assert table.column("pair_id").to_pylist() == [row.pair.pair_id for row in rows]
    ids = [entry["ids"] for entry in table.column("chosen_features_1").to_pylist()]
    assert ids == [row.chosen.features[1].ids.tolist() for row in rows]


@pytest.mark.parametrize(
    ("skipped", "message"),
    [((), r"missing or foreign: \[3\]"), ((3, 2), "some appear twice"), ((3, 9), r"missing or foreign: \[9\]")],
)
def test_every_raw_row_is_a_row_or_skipped(skipped: tuple[int, ...], message: str):
    table = rows_to_table(random_rows(0, [0, 1, 2]), WIDTHS)
    check_range(table, ShardReport(0, 0, 4, ((3, "empty"),), {}, None))
    with pytest.raises(ValueError, match=message):
        check_range(table, ShardReport(0, 0, 4, tuple((row, "empty") for row in skipped), {}, None))


def test_a_shard_may_unpack_to_the_limit_and_no_further(monkeypatch):
    table = rows_to_table(random_rows(0, range(50)), WIDTHS)
    data = pa.BufferReader(encode_shard(table, MEANING, NUMERICS, ShardReport(0, 0, 50, (), {}, None)))
    group = pq.read_metadata(data).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    unpacked = sum(column.total_uncompressed_size + 12 * column.num_values for column in columns)
    monkeypatch.setattr(shard, "TIMES_BYTES", 0)
    monkeypatch.setattr(shard, "SMALLEST_LIMIT", unpacked)
    assert read_table(data, MEANING).num_rows == 50
    monkeypatch.setattr(shard, "SMALLEST_LIMIT", unpacked - 1)
    with pytest.raises(ValueError, match=rf"at most {unpacked - 1} bytes unpacked, found {unpacked}"):
        read_table(data, MEANING)
