"""Caches of generated pairs, of any size, for `growth.py`.

In: the number of pairs, their tokens and features. Out: a finished cache, which the reader checks like any other; time
and memory to open it and to read batches. All shards hold the same rows under other pair ids: one shard is generated.
"""

import random
import statistics
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from fpo.cache.columns import rows_to_table
from fpo.cache.files import write_atomically
from fpo.cache.identity import Numerics, SiteMeaning
from fpo.cache.manifest import Noise, ShardReport
from fpo.cache.reader import open_cache
from fpo.cache.schema import CachedPair, Pair, ReferenceResponse, SparseFeatures, pair_id
from fpo.cache.shard import encode_shard
from fpo.cache.writer import CacheWriter
from fpo.stages.scoring.batches import RowCollator

from .measuring import Result
from .prepare import meaning_of

WIDTH, SHARD, VOCABULARY = 16_384, 1024, 49_152
BATCH, BATCHES = 32, 50


def write(folder: Path, pairs: int, tokens: int, features: int) -> Result:
    """Writes a finished cache of `pairs` pairs of `tokens` tokens, with `features` features per response."""
    site = SiteMeaning("blocks.24.hook_resid_post", "0" * 64, WIDTH, "jumprelu")
    meaning = meaning_of((site,), "fp32", features, tokens)
    started = time.perf_counter()
    writer = CacheWriter(folder, meaning, Numerics("packed", tokens, SHARD, "cpu", 1, {}), pairs)
    rng = np.random.default_rng(0)
    template = rows_to_table([random_row(rng, tokens, features) for _ in range(min(SHARD, pairs))], [WIDTH])
    hashes = [name.split("-")[0] for name in template.column("pair_id").to_pylist()]
    for index in range(writer.spec.num_shards):
        rows = writer.spec.shard_range(index)
        names = pa.array([f"{name}-{row}" for name, row in zip(hashes, rows, strict=False)], pa.string())
        table = template.slice(0, len(rows)).set_column(0, template.schema.field(0), names)
        report = ShardReport(index, rows.start, rows.stop, (), {}, Noise(0.0, (0.0,)))
        write_atomically(
            writer.shard_path(index), encode_shard(table.combine_chunks(), meaning, writer.spec.numerics, report)
        )
    manifest = writer.finish()
    assert manifest is not None, "all shards are written"
    return {"seconds": time.perf_counter() - started, "bytes": manifest.num_bytes}


def random_row(rng: np.random.Generator, tokens: int, features: int) -> CachedPair:
    """A row of random tokens and features; the prompt is a quarter of the tokens."""
    prompt = tokens // 4
    sizes = (prompt, (tokens - prompt) // 2, (tokens - prompt) // 2)
    prompt_ids, chosen_ids, rejected_ids = (rng.integers(0, VOCABULARY, size).astype(np.int32) for size in sizes)
    responses = []
    for _ in range(2):
        feature_ids = np.sort(rng.choice(WIDTH, features, replace=False)).astype(np.uint16)
        values = (rng.random(features) + 0.01).astype(np.float32)
        kept = SparseFeatures(feature_ids, values, 0.005, features + 1)
        responses.append(ReferenceResponse(-float(sizes[1]), sizes[1], (kept,)))
    pair = Pair(pair_id(prompt_ids, chosen_ids, rejected_ids, 0), prompt_ids, chosen_ids, rejected_ids)
    return CachedPair(pair, *responses)


def open_and_read(folder: Path, trust_hashes: bool) -> Result:
    """Opens a cache and reads random batches of it, collated as in training."""
    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    cache = open_cache(folder, trust_hashes=trust_hashes)
    seconds, opened = time.perf_counter() - started, process.memory_info().rss
    collate = RowCollator(2048, (WIDTH,))
    chooser, times = random.Random(0), []
    for _ in range(BATCHES):
        numbers = [chooser.randrange(len(cache)) for _ in range(BATCH)]
        started = time.perf_counter()
        collate([cache[number] for number in numbers])
        times.append(time.perf_counter() - started)
    return {
        "seconds": seconds,
        "opening_bytes": opened - before,
        "reading_bytes": process.memory_info().rss - opened,
        "batch_seconds": statistics.median(times),
        "slowest_batch_seconds": max(times),
    }
