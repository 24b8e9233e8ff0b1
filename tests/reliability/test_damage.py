"""Damage of a finished cache: found by `verify` and before the first step, or without effect on any number."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cache_rows import MEANING, NUMERICS, SITES, assert_same, random_rows, write_cache
from fpo.cache.columns import rows_to_table
from fpo.cache.manifest import Manifest, ShardRecord
from fpo.cache.reader import open_cache, verify
from fpo.cache.shard import encode_shard, read_footer, shard_fault

TESTS = Path(__file__).parents[1]
ONE_BIT = tuple(1 << bit for bit in range(8))
ALL_BITS = 0xFF
MANIFEST = "manifest.json"
NAMES = [f"data/train-{i:05d}-of-00003.parquet" for i in range(3)]
EXTRA, STRANGER = "data/train-00003-of-00003.parquet", "data/other.parquet"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FPO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def small(tmp_path: Path, home: Path) -> Path:
    """A cache of one small shard."""
    write_cache(tmp_path / "small", 3, meaning=dataclasses.replace(MEANING, sites=SITES[:1]))
    return tmp_path / "small"


def only_shard(folder: Path) -> Path:
    (path,) = (folder / "data").iterdir()
    return path


def flipped(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def assert_refused(folder: Path, names: list[str], part: str = "") -> None:
    """Checks that `verify` names these files alone, and that the cache is not opened."""
    found = verify(folder)
    assert sorted({line.partition(": ")[0] for line in found}) == sorted(names), found
    assert all(part in line for line in found)
    with pytest.raises((ValueError, OSError), match="|".join(names)):
        open_cache(folder)


def test_a_flipped_byte_of_a_shard_is_found_by_its_hash(small, tries, tally):
    path = only_shard(small)
    data, count = path.read_bytes(), 0
    for position in range(0, len(data), tries(61, 1)):
        for mask in (1, ALL_BITS):
            path.write_bytes(flipped(data, position, mask))
            assert_refused(small, [f"data/{path.name}"], "expected SHA-256")
            count += 1
    tally("bytes flipped", count)
    tally("flips found by hash", count)


def test_a_flipped_byte_of_the_manifest_is_found(small, tries, tally):
    path = small / MANIFEST
    data, count = path.read_bytes(), 0
    for position in range(len(data)):
        for mask in (1, ALL_BITS)[: tries(1, 2)]:
            path.write_bytes(flipped(data, position, mask))
            assert_refused(small, [MANIFEST])
            count += 1
    tally("bytes flipped", count)
    tally("flips found by hash", count)


def test_a_flipped_byte_that_a_hash_vouches_for_is_found_or_changes_no_number(small, tries, tally):
    masks = ",".join(map(str, tries((1, ALL_BITS), (*ONE_BIT, ALL_BITS))))
    command = [sys.executable, "-m", "flips", str(small), masks, str(tries(41, 1))]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = process.stdout.splitlines()
    assert process.returncode == 0, (lines[-1:], process.stderr)
    outcomes = Counter(line.split(" ", 2)[2] for line in lines)
    assert set(outcomes) == {"found", "harmless"}, [line for line in lines if not line.endswith(("found", "harmless"))]
    tally("bytes flipped", outcomes.total())
    tally("flips found beneath the hash", outcomes["found"])
    tally("flips beneath the hash that change no number", outcomes["harmless"])


def resigned(manifest: Manifest, index: int, data: bytes) -> tuple[Manifest, ShardRecord]:
    """The manifest as if it had been written over these bytes of a shard."""
    shards = list(manifest.shards)
    sha256 = hashlib.sha256(data).hexdigest()
    shards[index] = dataclasses.replace(shards[index], bytes=len(data), sha256=sha256)
    return dataclasses.replace(manifest, shards=tuple(shards)), shards[index]


def test_a_shard_cut_anywhere_is_found_by_its_size_and_beneath_it(small, tries, tally):
    path, manifest = only_shard(small), Manifest.load(small)
    data, group = path.read_bytes(), pq.read_metadata(path).row_group(0)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    columns = [group.column(i) for i in range(group.num_columns)]
    cuts = [column.data_page_offset + column.total_compressed_size // 2 for column in columns]
    cuts += [0, 1, 4, footer, (footer + len(data)) // 2, len(data) - 8, len(data) - 6, len(data) - 4, len(data) - 1]
    for length in tries(cuts, range(len(data))):
        path.write_bytes(data[:length])
        assert_refused(small, [f"data/{path.name}"], f"expected {len(data)} bytes, found {length}")
        assert shard_fault(path, *resigned(manifest, 0, data[:length]))
        tally("truncations")
    for more in (b"\0", b"PAR1", data):
        path.write_bytes(data + more)
        assert_refused(small, [f"data/{path.name}"], f"expected {len(data)} bytes, found {len(data + more)}")


def of_other_noise(path: Path, rows_of: range) -> bytes:
    """The shard with the same rows, and a report of another noise between two packings."""
    footer = read_footer(path)
    assert footer.report.noise is not None
    report = dataclasses.replace(footer.report, noise=dataclasses.replace(footer.report.noise, logp=99.0))
    return encode_shard(rows_to_table(random_rows(0, rows_of), MEANING.widths), MEANING, NUMERICS, report)


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap(left: Path, right: Path) -> None:
    data = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(data)


# What is done to a cache in `c`, beside `spec`, a cache of another spec, and `data`, one of the same spec over other
# rows; and which files are to be named.
REPLACED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda c: (c / NAMES[1]).unlink(), NAMES[1:2]),
    "empty": (lambda c: (c / NAMES[1]).write_bytes(b""), NAMES[1:2]),
    "a folder": (lambda c: make_folder(c / NAMES[1]), NAMES[1:2]),
    "a link to itself": (lambda c: link(c / NAMES[1], c / NAMES[1]), NAMES[1:2]),
    "a link to nothing": (lambda c: link(c / NAMES[1], c / "nothing"), NAMES[1:2]),
    "of another spec": (lambda c: shutil.copy(c.parent / "spec" / NAMES[1], c / NAMES[1]), NAMES[1:2]),
    "of other data": (lambda c: shutil.copy(c.parent / "data" / NAMES[1], c / NAMES[1]), NAMES[1:2]),
    "of other noise": (lambda c: (c / NAMES[1]).write_bytes(of_other_noise(c / NAMES[1], range(4, 8))), NAMES[1:2]),
    "two swapped": (lambda c: swap(c / NAMES[0], c / NAMES[1]), NAMES[:2]),
    "one twice": (lambda c: shutil.copy(c / NAMES[0], c / NAMES[1]), NAMES[1:2]),
    "one more": (lambda c: shutil.copy(c / NAMES[0], c / EXTRA), [EXTRA]),
    "a stranger": (lambda c: shutil.copy(c.parent / "spec" / NAMES[0], c / STRANGER), [STRANGER]),
    "no shard": (lambda c: shutil.rmtree(c / "data"), NAMES),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), [MANIFEST]),
    "an empty manifest": (lambda c: (c / MANIFEST).write_bytes(b""), [MANIFEST]),
    "a cut manifest": (lambda c: (c / MANIFEST).write_bytes((c / MANIFEST).read_bytes()[:-2]), [MANIFEST]),
    "a folder as manifest": (lambda c: make_folder(c / MANIFEST), [MANIFEST]),
    "the manifest of other data": (lambda c: shutil.copy(c.parent / "data" / MANIFEST, c / MANIFEST), NAMES),
    "the manifest of another spec": (lambda c: shutil.copy(c.parent / "spec" / MANIFEST, c / MANIFEST), NAMES),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_a_file_that_is_not_the_cache_s_is_named(tmp_path, home, tally, kind):
    change, names = REPLACED[kind]
    write_cache(tmp_path / "cache")
    write_cache(tmp_path / "spec", meaning=dataclasses.replace(MEANING, recipe="bf16"))
    write_cache(tmp_path / "data", seed=1)
    open_cache(tmp_path / "cache")  # what was decoded before does not hide it
    change(tmp_path / "cache")
    assert_refused(tmp_path / "cache", names)
    tally("swapped, missing, foreign and extra shards")


@pytest.mark.parametrize("numbers", [(4, 5, 5, 7), (4, 5, 6, 6), (0, 1, 2, 4), (4, 5, 6, 8), (4, 6, 5, 7)])
def test_rows_that_are_not_the_shard_s_are_found_beneath_the_hash(tmp_path, home, tally, numbers):
    manifest = write_cache(tmp_path / "cache")
    path = tmp_path / "cache" / NAMES[1]
    table = rows_to_table(random_rows(0, numbers), MEANING.widths)
    data = encode_shard(table, MEANING, NUMERICS, read_footer(path).report)
    path.write_bytes(data)
    resigned(manifest, 1, data)[0].save(tmp_path / "cache")
    assert_refused(tmp_path / "cache", [NAMES[1]])
    tally("swapped, missing, foreign and extra shards")


def test_a_damaged_decoded_copy_is_decoded_again(small, home, tries, tally):
    expected = list(open_cache(small))
    (decoded,) = (home / "decoded").glob("*.arrow")
    state = decoded.with_suffix(".sha256")
    whole, said = decoded.read_bytes(), state.read_bytes()

    def assert_decoded_again(path: Path, data: bytes | None, trust_hashes: bool = False) -> None:
        path.unlink()  # a new file: an older one may be mapped
        if data is not None:
            path.write_bytes(data)
        for found, row in zip(open_cache(small, trust_hashes=trust_hashes), expected, strict=True):
            assert_same(found, row)
        assert (decoded.read_bytes(), state.read_bytes()) == (whole, said)
        tally("decoded copies damaged")

    for position in range(0, len(whole), tries(211, 5)):
        assert_decoded_again(decoded, flipped(whole, position, 1 << position % 8))
    for length in range(0, len(whole), tries(499, 17)):
        assert_decoded_again(decoded, whole[:length])
        assert_decoded_again(decoded, whole[:length], trust_hashes=True)
    assert_decoded_again(decoded, None)
    for text in (None, b"", b"\xff", b"1 2 3", said[:-9], b"x " + said):
        assert_decoded_again(state, text)


# Through `fpo align`.

DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a page": (lambda c: flip_at(c, 1, 0.2), "00001-of-00004"),
    "a footer": (lambda c: flip_at(c, 2, 0.8), "00002-of-00004"),
    "the last byte": (lambda c: flip_at(c, 3, 1), "00003-of-00004"),
    "a cut shard": (lambda c: shard_of(c, 0).write_bytes(shard_of(c, 0).read_bytes()[:999]), "00000-of-00004"),
    "a missing shard": (lambda c: shard_of(c, 1).unlink(), "00001-of-00004"),
    "swapped shards": (lambda c: swap(shard_of(c, 1), shard_of(c, 2)), "00001-of-00004"),
    "one more": (lambda c: shutil.copy(shard_of(c, 1), c / STRANGER), STRANGER),
    "the manifest": (lambda c: (c / MANIFEST).write_bytes(flipped((c / MANIFEST).read_bytes(), 500, 1)), MANIFEST),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), MANIFEST),
}


def shard_of(folder: Path, index: int) -> Path:
    return sorted((folder / "data").glob("*.parquet"))[index]


def flip_at(folder: Path, index: int, share: float) -> None:
    path = shard_of(folder, index)
    data = path.read_bytes()
    path.write_bytes(flipped(data, int(share * (len(data) - 1)), 1))


@pytest.mark.parametrize("kind", DAMAGED)
def test_align_refuses_a_damaged_cache_before_a_model_is_loaded(world, tmp_path, monkeypatch, tally, kind):
    from fpo.pipeline.commands import align as run_align

    change, name = DAMAGED[kind]
    damaged = shutil.copytree(world.cache, tmp_path / "cache")
    change(damaged)
    monkeypatch.setattr(run_align, "load_model", lambda *_, **__: pytest.fail("loads the policy"))
    for caches in ({"cache": damaged}, {"eval_cache": damaged}):
        result = world.align(tmp_path / "out", **caches)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert result.stderr.startswith("fpo: ") and name in result.stderr, result.stderr
        assert not (tmp_path / "out").exists()
        tally("alignments with a damaged cache refused before the first step")


def test_align_with_a_damaged_decoded_copy_gives_the_losses_of_an_undamaged_one(world, tmp_path, home):
    from tiny_world import losses, ran

    ran(world.align(tmp_path / "before", max_steps=1))
    (decoded,) = (home / "decoded").glob("*.arrow")
    data = decoded.read_bytes()
    position = data.index(open_cache(world.cache)[0].pair.chosen_ids.tobytes())
    decoded.write_bytes(flipped(data, position, 1))
    ran(world.align(tmp_path / "after", max_steps=1))
    assert losses(tmp_path / "after") == losses(tmp_path / "before")
    assert decoded.read_bytes() == data
