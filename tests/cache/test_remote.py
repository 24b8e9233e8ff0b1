"""A cache that is built into an S3 server on this machine."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cache_rows import MEANING, NUMERICS, shard, with_damaged_pages, write_cache
from fpo.cache.errors import MissingError, UserError
from fpo.cache.identity import IdentityError
from fpo.cache.manifest import Manifest
from fpo.cache.reader import open_cache, verify
from fpo.cache.remote import StoreWriter, open_writer, read_any_footer
from fpo.cache.store import Store
from fpo.cache.writer import CacheWriter

pytestmark = pytest.mark.usefixtures("machine")

TESTS = Path(__file__).parents[1]
NAMES = [f"data/train-{i:05d}-of-00003.parquet" for i in range(3)]


def writer_of(url: str) -> CacheWriter:
    return open_writer(url, MEANING, NUMERICS, 10)


def finish(url: str) -> tuple[list[int], Manifest]:
    """Writes what is missing; returns which shards that was, and the manifest."""
    writer = writer_of(url)
    missing = writer.missing()
    for index in missing:
        writer.write_shard(*shard(writer, index))
    manifest = writer.finish()
    assert manifest is not None
    return missing, manifest


def contents(url: str) -> dict[str, bytes]:
    store = Store(url)
    return {name: store.read(name) for name in store.sizes()}


def test_a_url_gets_the_files_that_a_folder_gets(url: str, tmp_path: Path):
    missing, manifest = finish(url)
    assert missing == [0, 1, 2]
    assert manifest == write_cache(tmp_path / "local")
    local = {name: (tmp_path / "local" / name).read_bytes() for name in (*NAMES, "README.md", "manifest.json")}
    assert contents(url) == local
    assert verify(url) == []
    assert isinstance(open_writer(tmp_path / "local", MEANING, NUMERICS, 10), CacheWriter)
    assert not isinstance(open_writer(str(tmp_path / "local"), MEANING, NUMERICS, 10), StoreWriter)


def test_a_finished_cache_is_neither_written_nor_downloaded_again(url: str, machine, monkeypatch: pytest.MonkeyPatch):
    _, manifest = finish(url)
    machine("second")
    for name in ("put", "write", "fetch"):
        monkeypatch.setattr(Store, name, lambda *_: pytest.fail("moves a file"))
    assert finish(url) == ([], manifest)


def test_another_machine_goes_on_from_the_shards_in_the_store(url: str, machine, tmp_path: Path):
    writer = writer_of(url)
    writer.write_shard(*shard(writer, 1))
    machine("second")
    assert finish(url)[0] == [0, 2]
    assert contents(url)["manifest.json"] == manifest_bytes(tmp_path)


def manifest_bytes(folder: Path) -> bytes:
    write_cache(folder / "expected")
    return (folder / "expected/manifest.json").read_bytes()


def test_two_machines_share_the_work_and_the_last_writes_the_manifest(url: str, machine, tmp_path: Path):
    first = writer_of(url)
    machine("second")
    second = writer_of(url)
    first.write_shard(*shard(first, 0))
    first.write_shard(*shard(first, 2))
    assert first.finish() is None
    assert second.missing() == [1]
    second.write_shard(*shard(second, 1))
    assert second.finish() is not None
    assert contents(url)["manifest.json"] == manifest_bytes(tmp_path)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_run_killed_at_an_upload_goes_on(url: str, machine, tmp_path: Path, place: str):
    program = f"""
import os, signal
from cache_rows import *
from fpo.cache.remote import open_writer
from fpo.cache.store import Store
real = Store.put
def put(self, name, path):
    if name == {NAMES[1]!r} and {place == "before"}: os.kill(os.getpid(), signal.SIGKILL)
    real(self, name, path)
    if name == {NAMES[1]!r}: os.kill(os.getpid(), signal.SIGKILL)
Store.put = put
writer = open_writer({url!r}, MEANING, NUMERICS, 10)
for index in writer.missing():
    writer.write_shard(*shard(writer, index))
"""
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(TESTS)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(MissingError, match="finish `fpo precompute`"):
        open_cache(url)
    machine("second")
    assert writer_of(url).missing() == ([1, 2] if place == "before" else [2])
    machine("first")
    assert finish(url)[0] == [2]  # the second shard was built, and is uploaded if it has to be
    assert contents(url)["manifest.json"] == manifest_bytes(tmp_path)
    assert verify(url) == []


def test_a_store_keeps_the_date_of_what_was_begun(url: str, machine):
    monday, tuesday = (dataclasses.replace(MEANING, date=f"2026-11-{day}") for day in (23, 24))
    first = open_writer(url, monday, NUMERICS, 10, keep_date=True)
    # Another worker of this machine, before anything is in the store.
    assert open_writer(url, tuesday, NUMERICS, 10, keep_date=True).spec.meaning == monday
    first.write_shard(*shard(first, 0))
    machine("second")
    second = open_writer(url, tuesday, NUMERICS, 10, keep_date=True)
    assert second.spec.meaning == monday
    for index in second.missing():
        second.write_shard(*shard(second, index))
    assert second.finish().meaning == monday
    machine("third")
    assert open_writer(url, tuesday, NUMERICS, 10, keep_date=True).spec.meaning == monday
    with pytest.raises(IdentityError, match="date: expected '2026-11-24', found '2026-11-23'"):
        open_writer(url, tuesday, NUMERICS, 10)


def test_half_a_shard_is_not_done(url: str, machine):
    writer = writer_of(url)
    writer.write_shard(*shard(writer, 0))
    data = contents(url)[NAMES[0]]
    for half in (b"", data[:4], data[: len(data) // 2], data[:-1]):
        Store(url).write(NAMES[0], half)
        machine(f"machine {len(half)}")
        assert writer_of(url).missing() == [0, 1, 2]
    assert finish(url)[0] == [0, 1, 2]
    assert verify(url) == []


def test_the_manifest_comes_after_all_else(url: str, monkeypatch: pytest.MonkeyPatch):
    put: list[str] = []
    real = Store.put
    monkeypatch.setattr(Store, "put", lambda self, name, path: put.append(name) or real(self, name, path))
    finish(url)
    assert put == [*NAMES, "README.md", "manifest.json"]


def test_a_shard_that_the_store_lost_is_put_back(url: str):
    finish(url)
    Store(url).remove(NAMES[1])
    assert finish(url)[0] == []
    assert verify(url) == []


def test_another_spec_is_refused_on_every_machine_and_leaves_the_store_as_it_was(url: str, machine):
    writer = writer_of(url)
    writer.write_shard(*shard(writer, 0))
    before = contents(url)
    for name in ("first", "second"):
        machine(name)
        with pytest.raises(IdentityError, match=rf"^{url}: .*recipe: expected 'bf16', found 'fp32'.*another folder"):
            open_writer(url, dataclasses.replace(MEANING, recipe="bf16"), NUMERICS, 10)
        with pytest.raises(IdentityError, match="threads: expected 8, found 2"):
            open_writer(url, MEANING, dataclasses.replace(NUMERICS, threads=8), 10)
        with pytest.raises(ValueError, match=rf"^{url}/{NAMES[0]}: expected one of 2 shards"):
            open_writer(url, MEANING, NUMERICS, 8)
    assert contents(url) == before


def test_a_damaged_shard_of_another_machine_is_named_and_not_vouched_for(url: str, machine):
    writer = writer_of(url)
    writer.write_shard(*shard(writer, 0))
    Store(url).write(NAMES[0], next(with_damaged_pages(contents(url)[NAMES[0]])))
    machine("second")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{url}/{NAMES[0]}, .*--repair"):
            finish(url)
    assert "manifest.json" not in contents(url)
    Store(url).remove(NAMES[0])
    assert finish(url)[0] == [0]


def test_provenance_of_all_machines_is_kept(url: str, machine):
    records = [{"host": "é", "seconds": 1.5}, {"host": "b"}, {"host": "c"}]
    for name, record in zip(("first", "second", "first"), records, strict=True):
        machine(name)
        writer_of(url).append_provenance(record)
    assert [json.loads(line) for line in contents(url)["provenance.jsonl"].splitlines()] == records


def test_options_are_written_first(url: str):
    writer = writer_of(url)
    writer.write_options("dtype: fp32\n")
    assert contents(url) == {"run.yaml": b"dtype: fp32\n"}


def test_a_store_out_of_reach_is_not_taken_for_an_empty_one(url: str, monkeypatch: pytest.MonkeyPatch):
    finish(url)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("down")

    monkeypatch.setattr(type(writer_of(url)._store._files), "open", refuse)
    with pytest.raises(UserError, match=r"data/train-00000.*found RuntimeError: down"):
        read_any_footer(url)


def test_any_shard_says_what_an_unfinished_cache_is(url: str):
    with pytest.raises(MissingError, match="expected a shard, found none"):
        read_any_footer(url)
    writer = writer_of(url)
    finish(url)
    assert (read_any_footer(url).meaning, read_any_footer(url).numerics) == (writer.spec.meaning, writer.spec.numerics)
