"""`fpo precompute --repair`: what is damaged is computed again, all else stays as it is."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_rows import upload
from fpo.cache.manifest import Manifest, Noise
from fpo.cache.reader import verify
from fpo.cache.shard import encode_shard, read_footer, read_table
from fpo.cache.store import Store
from fpo.cache.writer import CacheWriter
from tiny_world import World, files, ran

MANIFEST = "manifest.json"
NAMES = [f"data/train-{i:05d}-of-00004.parquet" for i in range(4)]


@pytest.fixture
def cache(world, tmp_path) -> Path:
    """A copy of the world's cache, its times kept."""
    return shutil.copytree(world.cache, tmp_path / "cache")


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The numbers of the shards that are computed."""
    indices: list[int] = []
    real = CacheWriter.write_shard
    monkeypatch.setattr(
        CacheWriter, "write_shard", lambda self, rows, report: indices.append(report.index) or real(self, rows, report)
    )
    return indices


def content(folder: Path) -> dict[str, bytes]:
    """What the cache says, without who made it."""
    return {name: data for name, data in files(folder).items() if name.startswith(("data/", MANIFEST, "README"))}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """When each file was written, and which one it is."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def swap(left: Path, right: Path) -> None:
    data = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(data)


def change_noise(path: Path) -> None:
    """Makes it a shard that is sound by itself, of the same rows, with another noise between packings."""
    footer = read_footer(path)
    report = dataclasses.replace(footer.report, noise=Noise(9.0, (9.0, 9.0)))
    path.write_bytes(encode_shard(read_table(path, footer.meaning), footer.meaning, footer.numerics, report))


def both(*changes: Callable[[Path, World], object]) -> Callable[[Path, World], object]:
    return lambda c, w: [change(c, w) for change in changes]


# What is done to the cache; which shards are then computed again.
DAMAGES: dict[str, tuple[Callable[[Path, World], object], list[int]]] = {
    "a page": (lambda c, w: flip(c / NAMES[1], 100), [1]),
    "a cut and a missing one": (
        both(lambda c, w: (c / NAMES[3]).unlink(), lambda c, w: (c / NAMES[0]).write_bytes(b"PAR1")),
        [0, 3],
    ),
    "swapped": (lambda c, w: swap(c / NAMES[1], c / NAMES[2]), [1, 2]),
    "of another cache": (lambda c, w: shutil.copy(next((w.eval_cache / "data").iterdir()), c / NAMES[2]), [2]),
    "of another noise": (lambda c, w: change_noise(c / NAMES[0]), [0]),
    "the manifest": (lambda c, w: flip(c / MANIFEST, 300), []),
    "no manifest": (lambda c, w: (c / MANIFEST).unlink(), []),
    "a page and no manifest": (both(lambda c, w: (c / MANIFEST).unlink(), lambda c, w: flip(c / NAMES[3], 100)), [3]),
    "swapped, and the manifest cut": (
        both(lambda c, w: swap(c / NAMES[1], c / NAMES[2]), lambda c, w: (c / MANIFEST).write_bytes(b"{}")),
        [1, 2],
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_exactly_the_damaged_shards_are_computed_again_and_the_bytes_are_those_of_before(world, cache, written, kind):
    change, indices = DAMAGES[kind]
    before = stamps(cache)
    change(cache, world)
    damages = [line.partition(": ")[0] for line in verify(cache)]
    out = ran(world.precompute(cache, "--repair")).stdout
    assert written == indices
    assert content(cache) == content(world.cache)
    assert verify(cache) == []
    after = stamps(cache)
    untouched = [name for i, name in enumerate(NAMES) if i not in indices] + ["run.yaml"]
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}
    for name in [*damages, *(NAMES[index] for index in indices)]:
        assert f"  {name}: " in out
    assert "other bytes" not in out


def test_a_sound_cache_is_left_alone(world, cache, written):
    before = stamps(cache)
    assert f"{cache}: nothing to repair" in ran(world.precompute(cache, "--repair")).stdout
    assert (written, stamps(cache)) == ([], before)


def test_a_repair_that_was_killed_is_finished_by_another(world, cache, monkeypatch):
    for index in (0, 2, 3):
        flip(cache / NAMES[index], 100)
    real, calls = CacheWriter.write_shard, []

    def kill(self: CacheWriter, rows: Any, report: Any) -> None:
        calls.append(report.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, rows, report)

    monkeypatch.setattr(CacheWriter, "write_shard", kill)
    assert world.precompute(cache, "--repair").exit_code == 130
    assert [line.partition(": ")[0] for line in verify(cache)] == [NAMES[2], NAMES[3]]
    ran(world.precompute(cache, "--repair"))
    assert calls == [0, 2, 2, 3]
    assert content(cache) == content(world.cache)


def test_other_bytes_than_the_manifest_vouched_for_are_told(world, cache, monkeypatch):
    from fpo.stages.precompute import shards as precompute

    real = precompute.measure_pairs

    def round_otherwise(*arguments: Any, **options: Any) -> Any:
        rows = real(*arguments, **options)
        return [
            dataclasses.replace(row, chosen=dataclasses.replace(row.chosen, logp=row.chosen.logp - 1e-9))
            for row in rows
        ]

    before = Manifest.load(cache)
    flip(cache / NAMES[1], 100)
    monkeypatch.setattr(precompute, "measure_pairs", round_otherwise)
    out = ran(world.precompute(cache, "--repair")).stdout
    assert f"{NAMES[1]}: computed again, with other bytes" in out
    assert verify(cache) == []
    after = Manifest.load(cache)
    assert [old == new for old, new in zip(before.shards, after.shards, strict=True)] == [True, False, True, True]


def test_only_a_repair_changes_what_a_manifest_vouches_for(world, cache, written):
    change_noise(cache / NAMES[1])
    manifest = (cache / MANIFEST).read_bytes()
    result = world.precompute(cache)
    assert (result.exit_code, NAMES[1] in result.stderr, "--repair" in result.stderr) == (2, True, True), result.stderr
    assert ((cache / MANIFEST).read_bytes(), written) == (manifest, [])


def test_a_cache_in_a_store_is_repaired(world, url, machine, written):
    store = upload(world.cache, url)

    def flip_there(name: str) -> None:
        data = bytearray(store.read(name))
        data[100] ^= 1
        store.write(name, bytes(data))

    flip_there(NAMES[1])
    store.remove(NAMES[3])
    out = ran(world.precompute(url, "--repair")).stdout
    assert (written, f"{url}: damaged or missing files: 2" in out) == ([1, 3], True)
    same = content(world.cache)
    assert {name: store.read(name) for name in same} == same
    assert f"{url}: nothing to repair" in ran(world.precompute(url, "--repair")).stdout
    store.write(MANIFEST, store.read(MANIFEST)[:-1])
    flip_there(NAMES[0])
    machine("second")
    ran(world.precompute(url, "--repair"))
    assert (written, {name: Store(url).read(name) for name in same}) == ([1, 3, 0], same)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


REFUSED: dict[str, tuple[Callable[[Path, World], object], dict[str, Any], list[str]]] = {
    "one more": (lambda c, w: shutil.copy(c / NAMES[0], c / "data/x.parquet"), {}, ["data/x.parquet", "move it away"]),
    "a folder": (lambda c, w: make_folder(c / NAMES[1]), {}, [NAMES[1], "expected a file", "move it away"]),
    "a stranger and no manifest": (
        both(DAMAGES["of another cache"][0], DAMAGES["no manifest"][0]),
        {},
        [NAMES[2], "belongs to another cache", "move"],
    ),
    "the manifest of another cache": (
        lambda c, w: shutil.copy(w.eval_cache / MANIFEST, c / MANIFEST),
        {},
        [MANIFEST, "belongs to another cache", "move"],
    ),
    "other options": (
        lambda c, w: None,
        {"keep_features": 8},
        ["keep_features: expected 8", "the options that made that cache"],
    ),
    "several workers": (lambda c, w: None, {"rank": 0, "world_size": 2}, ["--repair", "found 2 workers"]),
    "Ray": (lambda c, w: None, {"engine": "ray"}, ["--repair", "--engine ray"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_repair_cannot_judge_is_left_as_it_is(world, cache, kind):
    change, options, parts = REFUSED[kind]
    flip(cache / NAMES[3], 100)
    change(cache, world)
    before = stamps(cache)
    result = world.precompute(cache, "--repair", **options)
    lines = [line for line in result.stderr.splitlines() if line.startswith("fpo: ")]
    assert (result.exit_code, len(lines)) == (2, 1), result.stderr
    for part in parts:
        assert part in lines[0]
    assert stamps(cache) == before


def test_without_a_cache_there_is_nothing_to_repair(world, tmp_path):
    result = world.precompute(tmp_path / "out", "--repair")
    assert (result.exit_code, "expected a cache to repair, found none" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()
