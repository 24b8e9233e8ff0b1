import dataclasses
import hashlib
import json
import pickle
import random
from pathlib import Path

import pyarrow as pa
import pytest
from cache_rows import MEANING, NUMERICS, SITES, assert_same, assert_same_array, random_rows, shard, write_cache
from fpo.cache import reader
from fpo.cache.columns import rows_to_table
from fpo.cache.errors import MissingError
from fpo.cache.manifest import Manifest
from fpo.cache.reader import open_cache, verify
from fpo.cache.shard import encode_shard, read_footer
from fpo.cache.writer import CacheWriter
from hypothesis import given, settings
from hypothesis import strategies as st

SECOND = "data/train-00001-of-00003.parquet"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def kept(num_rows: int) -> list[int]:
    return [row for row in range(num_rows) if row % 10 != 3]


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 14), shard_size=st.integers(1, 6), sites=st.integers(0, 2)
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_rows: int, shard_size: int, sites: int
):
    folder = tmp_path_factory.mktemp("cache")
    meaning = dataclasses.replace(MEANING, sites=SITES[:sites])
    manifest = write_cache(folder, num_rows, seed, meaning, dataclasses.replace(NUMERICS, shard_size=shard_size))
    cache = open_cache(folder)
    assert cache.manifest == manifest
    rows = random_rows(seed, kept(num_rows), meaning.widths)
    for found, expected in zip(cache, rows, strict=True):
        assert_same(found, expected)
    assert verify(folder) == []


def test_rows_are_found_from_both_ends_and_not_beyond(tmp_path: Path):
    write_cache(tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert len(cache) == 9
    assert cache[-1].pair.pair_id == cache[8].pair.pair_id != cache[0].pair.pair_id
    for outside in (9, -10):
        with pytest.raises(IndexError):
            cache[outside]


def test_chosen_sites_come_in_the_order_asked_for(tmp_path: Path, home: Path):
    write_cache(tmp_path / "cache")
    whole = open_cache(tmp_path / "cache")
    names = [site.site for site in SITES]
    assert whole.sites == tuple(names)
    swapped, second = (open_cache(tmp_path / "cache", sites=sites) for sites in (names[::-1], names[1:]))
    bare = open_cache(tmp_path / "cache", sites=[])
    for i, row in enumerate(whole):
        first, last = row.rejected.features
        assert_same_array(swapped[i].rejected.features[0].ids, last.ids)
        assert_same_array(swapped[i].rejected.features[1].values, first.values)
        assert [entry.nnz for entry in second[i].rejected.features] == [last.nnz]
        assert bare[i].rejected.features == ()
        assert bare[i].rejected.logp == row.rejected.logp
    sizes = sorted(path.stat().st_size for path in (home / "decoded").glob("*.arrow"))
    assert len(sizes) == 4 and sizes[0] < sizes[1] < sizes[2]


def test_a_site_that_the_cache_lacks_is_told_with_those_it_has(tmp_path: Path):
    write_cache(tmp_path / "cache")
    with pytest.raises(
        ValueError,
        match=r"blocks\.9: expected a site of the cache \(blocks\.1\.hook_resid_post, blocks\.2\.hook_mlp_out",
    ):
        open_cache(tmp_path / "cache", sites=["blocks.9"])
    with pytest.raises(ValueError, match="expected each once"):
        open_cache(tmp_path / "cache", sites=[SITES[0].site] * 2)


def test_decoding_happens_once_for_all_processes(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    write_cache(tmp_path / "cache")
    open_cache(tmp_path / "cache")
    monkeypatch.setattr(reader, "_decode", lambda *_: pytest.fail("decoded again"))
    cache = open_cache(tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert_same(open_cache(tmp_path / "moved")[0], cache[0])
    assert [path.suffix for path in sorted((home / "decoded").iterdir())].count(".arrow") == 1


def test_rows_are_read_only_views_of_the_mapped_file(tmp_path: Path):
    write_cache(tmp_path / "cache")
    before = pa.total_allocated_bytes()
    rows = list(open_cache(tmp_path / "cache"))
    assert pa.total_allocated_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        rows[0].pair.prompt_ids[0] = 1


def test_a_cache_can_be_sent_to_another_process(tmp_path: Path):
    write_cache(tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", sites=[SITES[1].site])
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301
    for found, expected in zip(copy, cache, strict=True):
        assert_same(found, expected)


def test_an_unfinished_cache_is_refused(tmp_path: Path):
    writer = CacheWriter(tmp_path / "cache", MEANING, NUMERICS, 10)
    writer.write_shard(*shard(writer, 0))
    assert writer.finish() is None
    with pytest.raises(MissingError, match="finish `fpo precompute`"):
        open_cache(tmp_path / "cache")
    assert len(verify(tmp_path / "cache")) == 1


def test_a_changed_byte_of_a_shard_is_noticed_wherever_it_is(tmp_path: Path):
    folder = tmp_path / "cache"
    write_cache(folder)
    open_cache(folder)  # so that what follows is not noticed by decoding
    path = folder / SECOND
    data = path.read_bytes()
    for position in random.Random(0).sample(range(len(data)), 25):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        (fault,) = verify(folder)
        assert fault.startswith(f"{SECOND}: expected SHA-256")
        with pytest.raises(ValueError, match=SECOND):
            open_cache(folder)
    path.write_bytes(data)
    assert verify(folder) == []


def test_trusted_hashes_are_still_checked_before_decoding(tmp_path: Path):
    folder = tmp_path / "cache"
    write_cache(folder)
    data = (folder / SECOND).read_bytes()
    broken = data[:60] + bytes([data[60] ^ 1]) + data[61:]
    (folder / SECOND).write_bytes(broken)
    with pytest.raises(ValueError, match="SHA-256"):
        open_cache(folder, trust_hashes=True)
    (folder / SECOND).write_bytes(data)
    open_cache(folder)
    (folder / SECOND).write_bytes(broken)
    assert len(open_cache(folder, trust_hashes=True)) == 9
    with pytest.raises(ValueError, match="SHA-256"):
        open_cache(folder)


def test_every_damaged_file_has_its_line(tmp_path: Path):
    write_cache(tmp_path, 40)
    shards = sorted((tmp_path / "data").iterdir())
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    shards[4].write_bytes(b"PAR1" + bytes(shards[4].stat().st_size - 8) + b"PAR1")
    (tmp_path / "data/train-extra.parquet").write_bytes(b"")
    shards[6].with_name(f"{shards[6].name}.tmp-host-1-{'0' * 32}").write_bytes(b"half")  # no damage
    found = [fault.split(": ", 1) for fault in verify(tmp_path)]
    assert [name for name, _ in found] == ["data/train-extra.parquet", *(f"data/{shards[i].name}" for i in (0, 2, 4))]
    assert [text.split()[0] for _, text in found] == ["not", "missing", "expected", "expected"]
    with pytest.raises(ValueError, match="train-extra"):
        open_cache(tmp_path)


def resign(folder: Path, data: bytes) -> None:
    """Puts `data` in the second shard's place and vouches for it in the manifest."""
    (folder / SECOND).write_bytes(data)
    manifest = Manifest.load(folder)
    first, second, *rest = manifest.shards
    second = dataclasses.replace(second, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    dataclasses.replace(manifest, shards=(first, second, *rest)).save(folder)


def test_a_vouched_shard_with_the_wrong_content_is_noticed(tmp_path: Path):
    write_cache(tmp_path)
    report = read_footer(tmp_path / SECOND).report
    rows = random_rows(0, range(4, 8))
    bad = dataclasses.replace(rows[1], chosen=dataclasses.replace(rows[1].chosen, num_tokens=99))
    wrong = {
        "chosen_num_tokens": encode_shard(
            rows_to_table([rows[0], bad, *rows[2:]], MEANING.widths), MEANING, NUMERICS, report
        ),
        "expected every raw row": encode_shard(
            rows_to_table(random_rows(0, range(5, 9)), MEANING.widths), MEANING, NUMERICS, report
        ),
        "expected 4 rows, found 3": encode_shard(rows_to_table(rows[:3], MEANING.widths), MEANING, NUMERICS, report),
        "threads": encode_shard(
            rows_to_table(rows, MEANING.widths), MEANING, dataclasses.replace(NUMERICS, threads=9), report
        ),
        "report": encode_shard(
            rows_to_table(rows, MEANING.widths), MEANING, NUMERICS, dataclasses.replace(report, counts={})
        ),
        "unreadable": b"no Parquet",
    }
    for message, data in wrong.items():
        resign(tmp_path, data)
        (fault,) = verify(tmp_path)
        assert fault.startswith(f"{SECOND}: ") and message in fault
        with pytest.raises(ValueError, match=message):
            open_cache(tmp_path)


def test_provenance_is_read_back_and_a_bad_line_is_named(tmp_path: Path):
    write_cache(tmp_path)
    cache = open_cache(tmp_path)
    assert cache.provenance() == []
    records = [{"host": "a\u2028b", "seconds": 1.0}, {"host": "b"}]
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 10)
    for record in records:
        writer.append_provenance(record)
    assert cache.provenance() == records
    with (tmp_path / "provenance.jsonl").open("a") as file:
        file.write(json.dumps({"host": "c"})[:5])
    with pytest.raises(ValueError, match="line 3"):
        cache.provenance()
