import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cache_rows import (
    MEANING,
    NUMERICS,
    SITES,
    assert_same,
    forge,
    random_rows,
    shard,
    table_to_rows,
    with_damaged_pages,
    write_cache,
)
from fpo.cache.identity import FormatError, IdentityError, Meaning
from fpo.cache.locks import Lock
from fpo.cache.manifest import Manifest
from fpo.cache.reader import open_cache
from fpo.cache.shard import read_table
from fpo.cache.spec import claim
from fpo.cache.writer import CacheWriter

TESTS = Path(__file__).parents[1]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def start_worker(code: str, folder: Path) -> "subprocess.Popen[str]":
    program = f"import os\nfrom pathlib import Path\nfrom cache_rows import *\nfolder = Path({str(folder)!r})\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)


def test_shards_are_ranges_of_raw_rows_that_cover_all(tmp_path: Path):
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 10)
    spec = writer.spec
    assert [list(spec.shard_range(i)) for i in range(spec.num_shards)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert writer.shard_path(2) == tmp_path / "data/train-00002-of-00003.parquet"
    assert writer.missing() == [0, 1, 2]


def test_the_same_spec_gives_the_same_bytes_in_any_order_of_work(tmp_path: Path):
    write_cache(tmp_path / "a", 10)
    for index in (2, 0, 1):
        # Each shard from a worker of its own, which opens the folder anew.
        writer = CacheWriter(tmp_path / "b", MEANING, NUMERICS, 10)
        assert writer.finish() is None
        writer.write_shard(*shard(writer, index))
    assert not (tmp_path / "b/manifest.json").exists()
    assert writer.finish() == writer.finish() == Manifest.load(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) >= {"manifest.json", "README.md"}


def test_a_data_set_without_rows_is_one_empty_shard(tmp_path: Path):
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 0)
    assert writer.missing() == [0]
    writer.write_shard(*shard(writer, 0))
    assert writer.missing() == []
    with pytest.raises(ValueError, match=r"\Adata set: expected pairs to score"):
        writer.finish()
    assert not (tmp_path / "manifest.json").exists()


def test_another_spec_is_refused_and_its_fields_listed(tmp_path: Path):
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 10)
    writer.write_shard(*shard(writer, 1))
    other_meaning = dataclasses.replace(MEANING, max_length=256, recipe="bf16")
    other_numerics = dataclasses.replace(NUMERICS, threads=8)
    with pytest.raises(
        IdentityError, match=r"recipe: expected 'bf16', found 'fp32'; max_length: expected 256, found 64"
    ):
        CacheWriter(tmp_path, other_meaning, NUMERICS, 10)
    with pytest.raises(IdentityError, match="threads: expected 8, found 2"):
        CacheWriter(tmp_path, MEANING, other_numerics, 10)
    with pytest.raises(ValueError, match="expected one of 2 shards"):
        CacheWriter(tmp_path, MEANING, NUMERICS, 8)
    assert CacheWriter(tmp_path, MEANING, NUMERICS, 10).missing() == [0, 2]


def test_another_spec_is_refused_also_where_only_the_manifest_is_left(tmp_path: Path):
    write_cache(tmp_path, 3)
    (tmp_path / "data/train-00000-of-00001.parquet").unlink()
    with pytest.raises(IdentityError, match="limit: expected 3, found None"):
        CacheWriter(tmp_path, dataclasses.replace(MEANING, limit=3), NUMERICS, 3)


def test_a_shard_under_another_number_is_not_done(tmp_path: Path):
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 10)
    writer.write_shard(*shard(writer, 0))
    writer.shard_path(0).rename(writer.shard_path(1))
    assert writer.missing() == [0, 1, 2]


def test_a_cut_shard_is_not_done_and_is_written_again(tmp_path: Path):
    write_cache(tmp_path / "a")
    write_cache(tmp_path / "b")
    path = tmp_path / "b/data/train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert CacheWriter(tmp_path / "b", MEANING, NUMERICS, 10).missing() == [1]
    write_cache(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_finish_does_not_vouch_for_a_damaged_page(tmp_path: Path):
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 4)
    writer.write_shard(*shard(writer, 0))
    path = writer.shard_path(0)
    path.write_bytes(next(with_damaged_pages(path.read_bytes())))
    assert writer.missing() == []
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet: .*--repair"):
        writer.finish()
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("raw_rows", [[0, 1], [0, 2, 1], [0, 1, 2, 4], [0, 1, 2, 3]])
def test_rows_that_do_not_cover_the_range_are_refused(tmp_path: Path, raw_rows: list[int]):
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 10)
    rows, report = shard(writer, 0)  # row 3 is skipped in the report
    assert [row.pair.pair_id.split("-")[1] for row in rows] == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"^data/train-00000-of-00003\.parquet: "):
        writer.write_shard(random_rows(0, raw_rows), report)
    with pytest.raises(ValueError, match="expected the report of raw range"):
        writer.write_shard(rows, dataclasses.replace(report, stop=3))
    assert contents(tmp_path) == {}


def test_a_row_that_breaks_a_rule_leaves_no_file(tmp_path: Path):
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 10)
    rows, report = shard(writer, 0)
    bad = dataclasses.replace(rows[1], chosen=dataclasses.replace(rows[1].chosen, logp=float("nan")))
    with pytest.raises(ValueError, match=rf"row 1 \({bad.pair.pair_id}\), chosen_ref_logp: "):
        writer.write_shard([rows[0], bad, *rows[2:]], report)
    assert contents(tmp_path) == {}


def test_a_worker_killed_while_writing_leaves_nothing_that_counts(tmp_path: Path):
    die = """
writer = CacheWriter(folder, MEANING, NUMERICS, 10)
os.fsync = lambda _: os._exit(9)
writer.write_shard(*shard(writer, 0))
"""
    worker = start_worker(die, tmp_path / "killed")
    assert worker.wait() == 9
    worker.communicate()
    (leftover,) = (tmp_path / "killed/data").iterdir()
    assert ".parquet.tmp-" in leftover.name
    assert CacheWriter(tmp_path / "killed", MEANING, NUMERICS, 10).missing() == [0, 1, 2]
    assert not leftover.exists()
    write_cache(tmp_path / "killed")
    write_cache(tmp_path / "unharmed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "unharmed")


def test_two_workers_write_each_shard_once(tmp_path: Path):
    code = """
import time
writer = CacheWriter(folder, MEANING, NUMERICS, 40)
for index in range(writer.spec.num_shards):
    with writer.lock(index) as mine:
        if mine:
            time.sleep(0.02)
            writer.write_shard(*shard(writer, index))
            print(index)
writer.finish()
"""
    workers = [start_worker(code, tmp_path / "shared") for _ in range(2)]
    written = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sorted(int(index) for indices in written for index in indices) == list(range(10))
    write_cache(tmp_path / "alone", 40)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_a_lock_is_held_by_one_and_a_done_shard_by_none(tmp_path: Path):
    first, second = (CacheWriter(tmp_path, MEANING, NUMERICS, 10) for _ in range(2))
    with first.lock(0) as mine, second.lock(0) as theirs, second.lock(1) as other:
        assert (mine, theirs, other) == (True, False, True)
        first.write_shard(*shard(first, 0))
    with second.lock(0) as theirs:
        assert theirs is False
    with pytest.raises(RuntimeError), first.lock(1):
        raise RuntimeError
    with second.lock(1) as free_again:
        assert free_again


def test_the_rows_of_a_shard_are_those_that_were_given(tmp_path: Path):
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 4)
    rows, report = shard(writer, 0)
    writer.write_shard(rows, report)
    for found, expected in zip(table_to_rows(read_table(writer.shard_path(0), MEANING)), rows, strict=True):
        assert_same(found, expected)


def test_provenance_lines_of_many_writers_stay_whole(tmp_path: Path):
    writer = CacheWriter(tmp_path, MEANING, NUMERICS, 4)
    record = {"host": "é" * 3000, "seconds": 1.5}
    threads = [threading.Thread(target=writer.append_provenance, args=(record,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "provenance.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record] * 20


def test_a_spec_that_cannot_be_written_is_refused(tmp_path: Path):
    for meaning, numerics, num_rows in [
        (dataclasses.replace(MEANING, split="../up"), NUMERICS, 1),
        (dataclasses.replace(MEANING, sites=(SITES[0], SITES[0])), NUMERICS, 1),
        (MEANING, dataclasses.replace(NUMERICS, shard_size=0), 1),
    ]:
        with pytest.raises(ValueError, match="expected"):
            CacheWriter(tmp_path / "never", meaning, numerics, num_rows)
    assert not (tmp_path / "never").exists()


OTHER = dataclasses.replace(MEANING, max_length=256)


def test_writers_that_live_are_of_one_spec_and_those_that_ended_bind_nobody(tmp_path: Path):
    living = [CacheWriter(tmp_path, MEANING, NUMERICS, 10) for _ in range(2)]
    while living:
        with pytest.raises(IdentityError, match=r"others are writing it with another spec \(max_length: expected 256,"):
            CacheWriter(tmp_path, OTHER, NUMERICS, 10)
        living.pop()
    assert CacheWriter(tmp_path, OTHER, NUMERICS, 10).missing() == [0, 1, 2]


def test_a_writer_that_ended_while_another_spec_looked_at_the_folder_is_seen(tmp_path: Path, monkeypatch):
    def claim_late(*spec: object) -> Lock:
        monkeypatch.undo()
        writer = CacheWriter(tmp_path, MEANING, NUMERICS, 10)
        writer.write_shard(*shard(writer, 0))
        del writer
        return claim(*spec)

    monkeypatch.setattr("fpo.cache.writer.claim", claim_late)
    with pytest.raises(IdentityError, match=r"train-00000-of-00003\.parquet belongs to another cache"):
        CacheWriter(tmp_path, OTHER, NUMERICS, 10)
    assert CacheWriter(tmp_path, MEANING, NUMERICS, 10).missing() == [1, 2]


# The day on which a cache was begun.

MONDAY, TUESDAY = (dataclasses.replace(MEANING, date=f"2026-11-{day}") for day in (23, 24))


def writer_on(folder: Path, meaning: Meaning, **options: bool) -> CacheWriter:
    return CacheWriter(folder, meaning, NUMERICS, 10, keep_date=True, **options)


def test_a_cache_that_was_begun_keeps_its_date(tmp_path: Path):
    writer = writer_on(tmp_path, MONDAY)
    assert writer.spec.meaning == MONDAY
    writer.write_shard(*shard(writer, 1))
    del writer
    for options in ({}, {"repair": True}):
        assert writer_on(tmp_path, TUESDAY, **options).spec.meaning == MONDAY
    writer = writer_on(tmp_path, TUESDAY)
    assert writer.missing() == [0, 2]
    for index in writer.missing():
        writer.write_shard(*shard(writer, index))
    assert writer.finish().meaning == MONDAY
    del writer
    assert writer_on(tmp_path, TUESDAY).spec.meaning == MONDAY  # finished, by its manifest
    with pytest.raises(IdentityError, match="date: expected '2026-11-24', found '2026-11-23'"):
        CacheWriter(tmp_path, TUESDAY, NUMERICS, 10)


def test_of_two_workers_about_midnight_the_first_says_what_day_it_is(tmp_path: Path):
    first = writer_on(tmp_path, MONDAY)
    second = writer_on(tmp_path, TUESDAY)
    assert second.spec.meaning == first.spec.meaning == MONDAY
    with pytest.raises(IdentityError, match=r"others are writing it .*date: expected '2026-11-24'"):
        CacheWriter(tmp_path, TUESDAY, NUMERICS, 10)
    # Nobody lives who said so, and nothing was written: it is another day.
    del first, second
    assert writer_on(tmp_path, TUESDAY).spec.meaning == TUESDAY


def test_what_a_worker_wrote_between_a_look_and_the_claim_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def claim_late(*args):
        monkeypatch.undo()
        other = writer_on(tmp_path, MONDAY)
        other.write_shard(*shard(other, 0))
        del other
        return claim(*args)

    monkeypatch.setattr("fpo.cache.writer.claim", claim_late)
    assert writer_on(tmp_path, TUESDAY).spec.meaning == MONDAY


def test_a_template_without_a_clock_has_no_date(tmp_path: Path):
    writer = writer_on(tmp_path, MEANING)
    assert writer.spec.meaning.date is None
    with pytest.raises(IdentityError, match="date: expected '2026-11-23', found None"):
        writer_on(tmp_path, MONDAY)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("repair", [False, True])
def test_a_cache_of_another_version_is_refused_and_left_alone(tmp_path: Path, finished: bool, repair: bool):
    write_cache(tmp_path / "new")
    old = forge(tmp_path / "new", tmp_path / "old", format_version=1)
    if not finished:
        (old / "manifest.json").unlink()
    before = contents(old)
    message = r"\A[^\n]*expected format version 2, found 1; [^\n]*make it again in a new folder[^\n]*\Z"
    with pytest.raises(FormatError, match=message):
        CacheWriter(old, MEANING, NUMERICS, 10, repair=repair)
    assert contents(old) == before
    if finished:
        with pytest.raises(FormatError, match=message):
            open_cache(old)
