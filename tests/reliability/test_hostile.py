"""A stranger's files run no code and write nothing outside their folder: each of these tries to."""

import json
import shutil
from pathlib import Path

import fsspec
import hostile
import pytest
from cache_rows import write_cache
from click.testing import Result
from forged import Files, read_files, sign, sound_files, write_files
from fpo.cache.files import user_folder
from fpo.cache.manifest import MANIFEST_NAME
from fpo.cache.store import Store
from refusals import said
from tiny_world import files, fpo, ran

TRIED = "hostile files that ran nothing and wrote nothing outside"


@pytest.fixture
def marker(tmp_path) -> Path:
    """What would be there if a trap had been sprung; its folder is what links lead to."""
    return tmp_path / "elsewhere" / "marker"


def settled(result: Result, refused: bool, marker: Path) -> str:
    """Checks that a command was refused in one line, or succeeded, and no trap was sprung; returns what it said."""
    lines = said(result)
    assert not marker.exists(), "the trap was sprung"
    if not refused:
        return ran(result).output
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and lines[0].startswith("fpo: "), result.stderr
    return lines[0]


@pytest.mark.parametrize("kind", hostile.MODELS)
def test_a_model_folder_runs_no_code(world, tmp_path, marker, monkeypatch, tally, kind):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asks: {prompt}"))
    marker.parent.mkdir()
    plant, refused = hostile.MODELS[kind]
    model = shutil.copytree(world.gemma, tmp_path / "model")
    plant(model, marker)
    settled(world.precompute(tmp_path / "out", model=model, limit=2), refused, marker)
    settled(world.align(tmp_path / "run", "--allow-different-start", model=model, max_steps=1), refused, marker)
    assert (tmp_path / "out").exists() == (tmp_path / "run").exists() == (not refused)
    tally(TRIED, 2)


@pytest.mark.parametrize("expression", hostile.ESCAPES)
def test_a_chat_template_reaches_nothing(world, tmp_path, marker, tally, expression):
    marker.parent.mkdir()
    model = shutil.copytree(world.gemma, tmp_path / "model")
    hostile.escape(expression)(model, marker)
    result = world.precompute(tmp_path / "out", model=model, limit=2)
    settled(result, result.exit_code == 2, marker)
    for what in (b"subclass", b"0x7", b"__builtins__", b"other"):
        assert what not in b"".join(data for name, data in files(tmp_path / "out").items() if name.endswith("l"))
    tally(TRIED)


@pytest.mark.parametrize("expression", ["'a' * 10 ** 15", "'%1000000000000000d' % 1", "10 ** 10 ** 3 * ['a']"])
def test_a_chat_template_of_more_than_memory_is_refused(world, tmp_path, marker, tally, expression):
    model = shutil.copytree(world.gemma, tmp_path / "model")
    hostile.escape(expression)(model, marker)
    line = settled(world.precompute(tmp_path / "out", model=model, limit=2), True, marker)
    assert "chat template" in line and not (tmp_path / "out").exists()
    tally(TRIED)


@pytest.mark.parametrize("kind", hostile.SAES)
def test_an_sae_folder_runs_no_code(world, tmp_path, marker, tally, kind):
    marker.parent.mkdir()
    sae = shutil.copytree(world.saes[0], tmp_path / "sae")
    hostile.SAES[kind](sae, marker)
    settled(world.precompute(tmp_path / "out", sae=sae), True, marker)
    assert not (tmp_path / "out").exists()
    tally(TRIED)


@pytest.mark.parametrize("kind", hostile.SCOPES)
def test_an_sae_of_gemma_scope_runs_no_code(world, tmp_path, marker, tally, kind):
    marker.parent.mkdir()
    path = tmp_path / "params.npz"
    hostile.SCOPES[kind](path, marker)
    line = settled(world.precompute(tmp_path / "out", sae=f"{path}@blocks.2.hook_resid_post"), True, marker)
    assert "unsafely" not in line and not (tmp_path / "out").exists()
    tally(TRIED)


@pytest.mark.parametrize("kind", hostile.DATA)
def test_a_data_set_runs_no_code(world, tmp_path, marker, tally, kind):
    marker.parent.mkdir()
    plant, refused = hostile.DATA[kind]
    data = tmp_path / "data_set"
    data.mkdir()
    plant(data, marker)
    before = files(data)
    settled(world.precompute(tmp_path / "out", dataset=data), refused, marker)
    assert files(data) == before
    assert files(marker.parent) == {}
    tally(TRIED)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> tuple[Path, Path]:
    """A run of two steps, with a checkpoint of each, and a copy of it."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"max_steps": 2, "save_steps": 1, "lr_scheduler": "constant", "method": "dpo"}
    ran(world.align(folder / "run", **options, warmup_steps=None))
    shutil.copytree(folder / "run", folder / "saved")
    return folder / "run", folder / "saved"


@pytest.mark.parametrize("kind", hostile.RUNS)
def test_a_run_that_is_gone_on_with_runs_no_code(world, run, marker, tally, kind):
    out, saved = run
    shutil.rmtree(out)
    shutil.copytree(saved, out)
    marker.parent.mkdir()
    plant, refused = hostile.RUNS[kind]
    plant(out, marker)
    before = files(marker.parent)
    options = {"max_steps": 3, "save_steps": 1, "lr_scheduler": "constant", "method": "dpo"}
    line = settled(world.align(out, "--resume", **options, warmup_steps=None), refused, marker)
    assert files(marker.parent) == before
    assert "weights_only" not in line
    tally(TRIED)


def test_an_adapter_that_is_gone_on_with_runs_no_code(world, tmp_path, marker, tally):
    marker.parent.mkdir()
    options = {"max_steps": 1, "save_steps": 1, "lr_scheduler": "constant", "method": "dpo", "lora_r": 1}
    ran(world.align(tmp_path / "run", **options, warmup_steps=None))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "adapter_model.safetensors").unlink()
    hostile.pickled("adapter_model.bin")(checkpoint, marker)
    result = world.align(tmp_path / "run", "--resume", **options | {"max_steps": 2}, warmup_steps=None)
    assert "checkpoint-1" in settled(result, True, marker)
    tally(TRIED)


@pytest.mark.parametrize("kind", hostile.CACHES)
def test_a_cache_that_is_written_again_changes_nothing_outside(world, tmp_path, marker, tally, kind):
    cache = shutil.copytree(world.cache, tmp_path / "cache")
    plant, refused = hostile.CACHES[kind]
    plant(cache, marker)
    shard = cache / "data" / "train-00001-of-00004.parquet"
    if not refused and not shard.is_symlink():
        shard.unlink()  # so that there is something to repair
    before = files(marker.parent)
    if (marker.parent / shard.name).exists():
        before[shard.name] = before[shard.name][:-9]
        (marker.parent / shard.name).write_bytes(before[shard.name])
    settled(world.precompute(cache, "--repair"), refused, marker)
    assert files(marker.parent) == before
    if not refused:
        assert fpo("cache", "verify", cache).output == "sound\n"
        assert files(cache)[f"data/{shard.name}"] == (world.cache / "data" / shard.name).read_bytes()
    tally(TRIED)


NAMES = [
    "../x.parquet",
    "data/../../x.parquet",
    "/tmp/x.parquet",
    "data//x.parquet",
    "C:\\x.parquet",
    "data/\0.parquet",
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Files:
    return sound_files(tmp_path_factory.mktemp("sound") / "cache")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", [True, False])
def test_a_manifest_names_nothing_outside_its_folder(sound, tmp_path, marker, tally, name, split):
    forged = dict(sound)
    document = json.loads(forged[MANIFEST_NAME])
    first = document["shards"][0]["name"]
    forged[name] = forged[first]
    document["shards"][0]["name"] = name
    if split:  # a name that follows from another field
        document["meaning"]["split"] = name.removesuffix(".parquet")
    forged[MANIFEST_NAME] = json.dumps(document).encode()
    sign(forged)
    del forged[name]
    write_files(forged, tmp_path / "cache")
    for where in (tmp_path / "cache", into_memory(forged)):
        settled(fpo("cache", "info", where), True, marker)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    tally(TRIED, 2)


def into_memory(stored: Files) -> str:
    """The URL of a store in this process's memory that holds these files."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    for name, data in stored.items():
        store.pipe_file(f"/bucket/cache/{name}", data)
    return "memory://bucket/cache"


@pytest.mark.parametrize("odd", ["data/..", "../outside", "data/x/../../../y", "data/a\nb", "README.md/../../x"])
def test_a_store_s_odd_names_are_not_written(tmp_path, monkeypatch, tally, odd):
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "home"))
    write_cache(tmp_path / "cache")
    url = into_memory(read_files(tmp_path / "cache"))
    sound = Store.sizes
    monkeypatch.setattr(Store, "sizes", lambda self: sound(self) | {odd: 3})
    fsspec.filesystem("memory").store[f"/bucket/cache/{odd}"] = fsspec.implementations.memory.MemoryFile(
        data=b"odd", path=odd
    )
    fpo("cache", "info", url)
    fpo("cache", "verify", url)
    fetched = {name.split("/")[0] for name in files(user_folder())}
    assert fetched <= {"fetched", "decoded", "hashes.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "home"]
    assert not any(data == b"odd" for data in files(tmp_path).values())
    tally(TRIED)
