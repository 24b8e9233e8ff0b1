"""Random rows of a cache, and a small finished cache of them, for tests."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fpo.cache.columns import Columns, rows_to_table, table_to_batch
from fpo.cache.files import sha256_file
from fpo.cache.identity import Meaning, Numerics, SiteMeaning
from fpo.cache.manifest import Manifest, Noise, ShardRecord, ShardReport
from fpo.cache.schema import CachedPair, Pair, ReferenceResponse, SparseFeatures, pair_id
from fpo.cache.shard import encode_shard, read_table
from fpo.cache.store import Store
from fpo.cache.writer import CacheWriter

SITES = (
    SiteMeaning("blocks.1.hook_resid_post", "5a" * 32, 64, "jumprelu"),
    SiteMeaning("blocks.2.hook_mlp_out", "5b" * 32, 70_000, "relu"),
)
WIDTHS = [site.width for site in SITES]
MEANING = Meaning(
    format_version=2,
    model="11" * 32,
    tokenizer="22" * 32,
    chat_template="{{ bos }}«é»",
    date=None,
    sites=SITES,
    recipe="fp32",
    pooling="mean",
    keep_features=8,
    max_length=64,
    max_prompt_length=32,
    truncation="keep_bos_and_prompt_end",
    skip_rules=("empty", "identical"),
    drop_ties=False,
    turns="all",
    dataset="33" * 32,
    split="train",
    limit=None,
    order="raw",
)
NUMERICS = Numerics("sdpa", 256, 4, "cpu", 2, {"torch": "2.9", "pyarrow": "26"})


def random_features(rng: np.random.Generator, width: int, keep: int) -> SparseFeatures:
    nnz = int(rng.integers(0, 2 * keep))
    ids = np.sort(rng.choice(width, size=nnz, replace=False))
    values = (rng.random(nnz) + 0.01).astype(np.float32)
    kept = np.sort(np.argsort(-values, kind="stable")[:keep])
    left_out = np.delete(values, kept)
    floor = float(left_out.max()) if len(left_out) else 0.0
    dtype = np.uint16 if width <= 1 << 16 else np.uint32
    return SparseFeatures(ids[kept].astype(dtype), values[kept], floor, nnz)


def random_row(rng: np.random.Generator, raw_row: int, widths: Sequence[int] = WIDTHS, keep: int = 8) -> CachedPair:
    prompt, chosen, rejected = (rng.integers(0, 1 << 18, rng.integers(1, 12)).astype(np.int32) for _ in range(3))
    learnt = [random_spans(rng, len(ids)) for ids in (chosen, rejected)]
    answers = [
        ReferenceResponse(
            -float(rng.random()),
            int(np.diff(spans.reshape(-1, 2)).sum()),
            tuple(random_features(rng, width, keep) for width in widths),
        )
        for spans in learnt
    ]
    return CachedPair(Pair(pair_id(prompt, chosen, rejected, raw_row), prompt, chosen, rejected, *learnt), *answers)


def random_spans(rng: np.random.Generator, length: int) -> np.ndarray:
    """Which tokens of a response are learnt, mostly all of them."""
    if rng.random() < 0.5:
        return np.asarray([0, length], np.int32)
    learnt = rng.random(length) < 0.5
    learnt[-1] = True
    return np.diff(learnt.astype(np.int8), prepend=0, append=0).nonzero()[0].astype(np.int32)


def random_rows(seed: int, raw_rows: Sequence[int], widths: Sequence[int] = WIDTHS) -> list[CachedPair]:
    """A row depends on the seed and its number alone, so every worker makes the same."""
    return [random_row(np.random.default_rng([seed, raw_row]), raw_row, widths) for raw_row in raw_rows]


def shard(writer: CacheWriter, index: int, seed: int = 0) -> tuple[list[CachedPair], ShardReport]:
    """What stage one would make of a shard; every raw row whose number ends in 3 is skipped."""
    raw_rows = writer.spec.shard_range(index)
    skipped = tuple((row, "empty") for row in raw_rows if row % 10 == 3)
    rows = random_rows(seed, [row for row in raw_rows if row % 10 != 3], writer.spec.meaning.widths)
    noise = Noise(0.25 + index, tuple(1e-6 * (site + 1) for site in range(len(writer.spec.meaning.sites))))
    counts = {"tokens": sum(row.chosen.num_tokens + row.rejected.num_tokens for row in rows), "ties": 1}
    return rows, ShardReport(index, raw_rows.start, raw_rows.stop, skipped, counts, noise)


def write_cache(
    folder: Path, num_rows: int = 10, seed: int = 0, meaning: Meaning = MEANING, numerics: Numerics = NUMERICS
) -> Manifest:
    """Writes a finished cache."""
    writer = CacheWriter(folder, meaning, numerics, num_rows)
    for index in writer.missing():
        writer.write_shard(*shard(writer, index, seed))
    manifest = writer.finish()
    assert manifest is not None
    return manifest


def forge(
    cache: Path, copy: Path, change: Callable[[CachedPair], CachedPair] = lambda row: row, **meaning: Any
) -> Path:
    """A copy of a cache with other rows or another meaning, and every hash made to agree, whatever rule it breaks."""
    manifest = Manifest.load(cache)
    new_meaning = dataclasses.replace(manifest.meaning, **meaning)
    shutil.copytree(cache, copy, ignore=shutil.ignore_patterns("data"))
    (copy / "data").mkdir()
    records = []
    for shard in manifest.shards:
        rows = [change(row) for row in table_to_rows(read_table(cache / shard.name, manifest.meaning))]
        table = rows_to_table(rows, new_meaning.widths)
        path = copy / shard.name
        path.write_bytes(encode_shard(table, new_meaning, manifest.numerics, shard.report))
        records.append(ShardRecord(shard.name, len(rows), path.stat().st_size, sha256_file(path), shard.report))
    Manifest(new_meaning, manifest.numerics, tuple(records)).save(copy)
    return copy


def upload(folder: Path, url: str) -> Store:
    """Puts a folder into a store as it is."""
    store = Store(url)
    for path in folder.rglob("*"):
        if path.is_file() and ".locks" not in path.parts:
            store.put(str(path.relative_to(folder)), path)
    return store


def with_damaged_pages(data: bytes) -> Iterator[bytes]:
    """A shard's bytes with the last bit of one column's values flipped, for each column."""
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        last = column.data_page_offset + column.total_compressed_size - 1
        yield data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :]


def assert_same(found: CachedPair, expected: CachedPair) -> None:
    """Bit for bit and dtype for dtype."""
    assert found.pair.pair_id == expected.pair.pair_id
    for name in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_learnt", "rejected_learnt"):
        assert_same_array(getattr(found.pair, name), getattr(expected.pair, name))
    for side in ("chosen", "rejected"):
        left, right = getattr(found, side), getattr(expected, side)
        assert (left.logp, left.num_tokens, len(left.features)) == (right.logp, right.num_tokens, len(right.features))
        for mine, theirs in zip(left.features, right.features, strict=True):
            assert_same_array(mine.ids, theirs.ids)
            assert_same_array(mine.values, theirs.values)
            assert (mine.floor, mine.nnz) == (theirs.floor, theirs.nnz)


def assert_same_array(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()


def table_to_rows(table: pa.Table) -> list[CachedPair]:
    """The rows of a table that holds every site of `arrow_schema`."""
    sites = range(sum(name.startswith("chosen_features_") for name in table.column_names))
    columns = Columns(table_to_batch(table), sites)
    return [columns.row(i) for i in range(table.num_rows)]
