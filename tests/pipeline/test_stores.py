"""Both stages through the command line with the cache in an object store, an S3 server on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
import yaml
from cache_rows import upload
from fake_hub import serve
from fpo.cache.store import Store
from tiny_world import SITES, files, fpo, losses, ran, to_arguments

pytestmark = pytest.mark.usefixtures("machine")

TESTS = Path(__file__).parents[1]

KILLED = """
import os, signal, sys
from pathlib import Path
from fpo.cache.store import Store
from tiny_world import World
real, folder, url = Store.put, sys.argv[1], sys.argv[2]
def put(self, name, path):
    if "00002-of" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, name, path)
Store.put = put
World(Path(folder)).precompute(url)
"""


@pytest.mark.slow
def test_a_cache_is_computed_into_a_store_killed_and_finished_on_another_machine(world, url, machine, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    program = [sys.executable, "-c", KILLED, str(world.folder), url]
    assert subprocess.run(program, env=environment, check=False, capture_output=True).returncode == -signal.SIGKILL
    result = world.align(tmp_path / "run", cache=url)
    assert (result.exit_code, f"{url}/manifest.json: not found" in result.stderr) == (2, True)
    machine("second")
    assert f"{url}: 12 pairs in 4 shards" in ran(world.precompute(url)).stdout
    store, local = Store(url), files(world.cache)
    (provenance,) = [json.loads(line) for line in store.read("provenance.jsonl").splitlines()]
    assert provenance["shards"] == 2  # the other two were in the store
    assert yaml.safe_load(store.read("run.yaml"))["out"] == url
    same = [name for name in local if name.startswith("data/")] + ["README.md", "manifest.json"]
    assert {name: store.read(name) for name in same} == {name: local[name] for name in same}
    assert set(store.sizes()) == {*same, "provenance.jsonl", "run.yaml"}


def test_training_from_a_store_is_training_from_the_folder(world, url, tmp_path):
    upload(world.cache, f"{url}/train")
    upload(world.eval_cache, f"{url}/test")
    options = {"method": "fpo", "epochs": 2}
    ran(world.align(tmp_path / "local", eval_cache=world.eval_cache, **options))
    ran(world.align(tmp_path / "stored", cache=f"{url}/train", eval_cache=f"{url}/test", **options))
    assert losses(tmp_path / "stored") == losses(tmp_path / "local")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("stored", "local")]
    assert weights[0] == weights[1]
    record = yaml.safe_load((tmp_path / "stored" / "run.yaml").read_text())
    assert (record["cache"], record["eval_cache"]) == (f"{url}/train", f"{url}/test")


def test_a_policy_is_evaluated_on_a_cache_in_a_store(world, url, tmp_path):
    upload(world.eval_cache, url)
    options = {"model": world.gemma, "sae": world.saes, "site": SITES[0].name, "prompts": 0, "token_budget": 160}
    found = []
    for name, cache in (("local", world.eval_cache), ("stored", url)):
        ran(fpo("evaluate", *to_arguments(options), "--cache", cache, "--out", tmp_path / name))
        found.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert found[0] == found[1]


def test_info_and_verify_take_a_url_and_damage_is_told(world, url):
    store = upload(world.cache, url)
    assert fpo("cache", "info", url).stdout == fpo("cache", "info", world.cache).stdout
    assert ran(fpo("cache", "verify", url)).stdout == "sound\n"
    name = sorted(store.shards())[1]
    data = bytearray(store.read(name))
    data[len(data) // 3] ^= 1
    store.write(name, bytes(data))
    result = fpo("cache", "verify", url)
    assert (result.exit_code, result.stdout.split(":")[0]) == (1, name)


def test_a_damaged_object_stops_training_before_anything_is_written(world, url, tmp_path):
    store = upload(world.cache, url)
    name = store.shards()[1]
    store.write(name, bytes(store.sizes()[name]))
    result = world.align(tmp_path / "run", cache=url)
    assert (result.exit_code, f"{url}/{name}: expected SHA-256" in result.stderr) == (2, True), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_store_that_takes_nothing_is_refused_before_anything_is_computed(world, s3, monkeypatch):
    from fpo.stages.precompute import shards as precompute

    monkeypatch.setattr(precompute, "measure_pairs", lambda *_, **__: pytest.fail("computes"))
    result = world.precompute("s3://a-bucket-that-is-not-there/uf")
    assert (result.exit_code, "s3://a-bucket-that-is-not-there/uf/run.yaml: not found" in result.stderr) == (2, True)
    assert sum(line.startswith("fpo: ") for line in result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["align", "sft", "train-sae", "evaluate", "table", "tune"])
def test_only_a_cache_can_be_written_into_a_store(command):
    result = fpo(command, "--config", "embedded", "--out", "s3://bucket/run")
    assert (result.exit_code, "--out: expected a folder; " in result.stderr) == (2, True)
    assert len(result.stderr.splitlines()) == 1
    assert not Path("s3:").exists()


@pytest.fixture
def hub(world, monkeypatch) -> Iterator[str]:
    """The hub, which has the world's cache as a data set; its URL."""
    with serve(world.cache, "owner/uf") as address:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address})
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield "hf://datasets/owner/uf"


def test_training_from_a_data_set_of_the_hub_is_training_from_the_folder(world, hub, tmp_path):
    assert ran(fpo("cache", "verify", hub)).stdout == "sound\n"
    ran(world.align(tmp_path / "local"))
    ran(world.align(tmp_path / "hub", cache=hub))
    assert losses(tmp_path / "hub") == losses(tmp_path / "local")


def test_a_cache_is_computed_into_a_data_set_of_the_hub(world, hub, tmp_path, monkeypatch):
    def upload_file(self: Any, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, **_: Any) -> None:
        assert repo_id == "owner/new"
        (tmp_path / "new" / path_in_repo).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path_or_fileobj, tmp_path / "new" / path_in_repo)

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", upload_file)
    (tmp_path / "new").mkdir()
    with serve(tmp_path / "new", "owner/new") as address:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address})
        url = "hf://datasets/owner/new"
        ran(world.precompute(url))
        ran(world.precompute(url))
        assert ran(fpo("cache", "verify", url)).stdout == "sound\n"
    local = files(world.cache)
    same = [name for name in local if name.startswith("data/")] + ["README.md", "manifest.json"]
    assert {name: files(tmp_path / "new")[name] for name in same} == {name: local[name] for name in same}


def test_a_data_set_that_the_hub_does_not_have_is_named(world, hub, tmp_path):
    result = world.align(tmp_path / "run", cache="hf://datasets/owner/other")
    assert (result.exit_code, "hf://datasets/owner/other/manifest.json: not found" in result.stderr) == (2, True)
    assert "repository not found" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_a_network_the_hub_is_named(world, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    result = world.align(tmp_path / "run", cache=hub)
    assert (result.exit_code, hub in result.stderr) == (2, True), result.stderr
    assert "HF_HUB_OFFLINE" in result.stderr
    assert len(result.stderr.splitlines()) == 1
