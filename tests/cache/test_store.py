import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_rows import assert_same, upload, write_cache
from fpo.cache import store as store_module
from fpo.cache.errors import MissingError, UserError
from fpo.cache.files import as_place, canonical_json
from fpo.cache.manifest import Manifest
from fpo.cache.reader import open_cache, verify
from fpo.cache.remote import fetch
from fpo.cache.store import Store

SECOND = "data/train-00001-of-00003.parquet"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A finished cache in a folder."""
    write_cache(tmp_path / "cache")
    (tmp_path / "cache/provenance.jsonl").write_text('{"host": "a"}\n')
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("caches/uf", Path("caches/uf")),
        ("/caches/uf", Path("/caches/uf")),
        ("file:///caches/uf", Path("/caches/uf")),
        ("s3://bucket/uf", "s3://bucket/uf"),
        ("hf://datasets/owner/name@v1", "hf://datasets/owner/name@v1"),
        (Path("s3:/odd"), Path("s3:/odd")),
    ],
)
def test_a_place_is_a_folder_or_a_url(name: str | Path, place: Path | str):
    assert as_place(name) == place


def test_a_cache_is_read_from_a_store_as_from_its_folder(local: Path, url: str):
    upload(local, url)
    stored, cache = open_cache(f"{url}/"), open_cache(local)
    assert stored.manifest == cache.manifest
    for found, expected in zip(stored, cache, strict=True):
        assert_same(found, expected)
    assert stored.provenance() == [{"host": "a"}]
    assert (fetch(url) / "README.md").read_bytes() == (local / "README.md").read_bytes()
    assert verify(url) == []


def test_a_cache_is_fetched_once_and_again_when_it_is_another(
    local: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    upload(local, url)
    fetched: list[str] = []
    real = Store.fetch
    monkeypatch.setattr(Store, "fetch", lambda self, name, *rest: fetched.append(name) or real(self, name, *rest))
    first = fetch(url)
    assert fetch(url) == first
    assert len(fetched) == 3
    write_cache(tmp_path / "other", seed=1)
    upload(tmp_path / "other", url)
    assert fetch(url) != first
    assert len(fetched) == 6


def test_a_fetch_that_was_stopped_goes_on(local: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    upload(local, url)
    fetched: list[str] = []
    real = Store.fetch

    def stop(self: Store, name: str, *rest: Any) -> None:
        if name == SECOND and SECOND not in fetched:
            fetched.append(name)
            raise KeyboardInterrupt
        fetched.append(name)
        real(self, name, *rest)

    monkeypatch.setattr(Store, "fetch", stop)
    with pytest.raises(KeyboardInterrupt):
        open_cache(url)
    assert len(open_cache(url)) == 9
    assert fetched.count("data/train-00000-of-00003.parquet") == 1


def test_without_a_manifest_the_user_is_told_to_finish(local: Path, url: str):
    (local / "manifest.json").unlink()
    upload(local, url)
    with pytest.raises(MissingError, match=rf"{url}/manifest\.json: not found.*finish `fpo precompute`"):
        open_cache(url)
    (fault,) = verify(url)
    assert fault.startswith("manifest.json: ")


def test_a_damaged_object_is_noticed_before_it_is_read(local: Path, url: str):
    store = upload(local, url)
    data = (local / SECOND).read_bytes()
    for broken, message in (
        (data[:60] + bytes([data[60] ^ 1]) + data[61:], "expected SHA-256"),
        (data[:-20], f"expected {len(data)} bytes, found {len(data) - 20}"),
    ):
        store.write(SECOND, broken)
        with pytest.raises(ValueError, match=rf"{url}/{SECOND}: {message}.*--repair"):
            fetch(url)
        (fault,) = verify(url)
        assert fault.startswith(f"{SECOND}: {message}")
    store.write(SECOND, data)
    assert verify(url) == []
    assert len(open_cache(url)) == 9


def test_verify_looks_at_the_store_and_not_at_the_copy(local: Path, url: str):
    store = upload(local, url)
    open_cache(url)
    store.remove(SECOND)
    store.write("data/train-extra.parquet", b"")
    assert verify(url) == ["data/train-extra.parquet: not in the manifest", f"{SECOND}: missing"]


def test_nothing_of_a_file_is_fetched_that_is_larger_than_it_should_be(
    local: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    store = upload(local, url)
    store.write(SECOND, bytes(1 << 20))
    monkeypatch.setattr(store_module, "atomic_file", lambda _: pytest.fail("fetched"))
    with pytest.raises(ValueError, match="found 1048576"):
        store.fetch(SECOND, local / "copy", Manifest.load(local).shards[1])
    monkeypatch.setattr(store_module, "LARGEST_TEXT", 100)
    with pytest.raises(ValueError, match=r"manifest\.json: expected at most 100 bytes"):
        fetch(url)


def sign(document: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> bytes:
    """A manifest that a hostile writer changed and vouches for."""
    del document["sha256"]
    change(document)
    document["sha256"] = hashlib.sha256(canonical_json(document).encode()).hexdigest()
    return (json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


@pytest.mark.parametrize("name", ["../x", "data/../../x", "/tmp/x", "..", ""])
def test_no_name_of_a_stranger_s_manifest_leaves_the_folder(local: Path, url: str, home: Path, name: str):
    store = upload(local, url)
    hostile = sign(json.loads((local / "manifest.json").read_text()), lambda d: d["shards"][1].update(name=name))
    store.write("manifest.json", hostile)
    with pytest.raises(ValueError, match="shard 1: expected the name"):
        fetch(url)
    assert not home.exists()
    (fault,) = verify(url)
    assert "expected the name" in fault


def test_a_store_that_does_not_answer_is_named(url: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no credentials\nanywhere")

    store = Store(url)
    monkeypatch.setattr(store._files, "find", refuse)
    with pytest.raises(UserError, match=rf"^{url}: expected the store to answer, found RuntimeError: no credentials"):
        store.sizes()


def test_a_missing_bucket_is_named(s3):
    with pytest.raises(MissingError, match="s3://none-of-that-name/uf/x: not found"):
        Store("s3://none-of-that-name/uf").write("x", b"1")


def test_a_driver_that_is_not_installed_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch):
    def missing(url: str) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(store_module.fsspec, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"^gs://bucket/uf: expected a driver for gs://.*pip install 'fpo\[gcs\]'$"):
        Store("gs://bucket/uf")


def test_a_url_without_a_bucket_is_refused(s3):
    with pytest.raises(ValueError, match=r"^s3://: expected a bucket"):
        Store("s3://")


def test_a_cache_may_be_all_that_is_in_a_bucket(local: Path, url: str):
    bucket = url.removesuffix("/caches/uf")
    upload(local, bucket)
    assert verify(bucket) == []
    assert len(open_cache(bucket)) == 9


def test_a_protocol_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match=r"^nowhere://uf: expected a folder or a URL"):
        Store("nowhere://uf")
