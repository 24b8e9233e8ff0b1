import dataclasses
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_rows import MEANING, NUMERICS, write_cache
from fpo.cache.errors import MissingError
from fpo.cache.files import canonical_json
from fpo.cache.manifest import Manifest, Noise, ShardRecord, ShardReport, shard_name


def manifest() -> Manifest:
    reports = [
        ShardReport(0, 0, 4, ((1, "empty"),), {"ties": 2, "tokens": 30}, Noise(0.5, (1e-6, 3e-6))),
        ShardReport(1, 4, 8, (), {"tokens": 12}, None),
        ShardReport(2, 8, 9, ((8, "identical"),), {"ties": 1}, Noise(0.25, (2e-6, 1e-6))),
    ]
    records = (
        ShardRecord(shard_name("train", i, 3), r.stop - r.start - len(r.skipped), 100 + i, f"{i}" * 64, r)
        for i, r in enumerate(reports)
    )
    return Manifest(MEANING, NUMERICS, tuple(records))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a saved manifest and signs it again, as a hostile or a buggy writer would."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    change(document)
    document["sha256"] = hashlib.sha256(canonical_json(document).encode()).hexdigest()
    path.write_text(json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n")


def test_a_saved_manifest_is_the_same_when_loaded_and_saved_again(tmp_path: Path):
    manifest().save(tmp_path)
    first = (tmp_path / "manifest.json").read_bytes()
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest()
    assert loaded.sha256 == manifest().sha256
    loaded.save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == first


def test_totals_are_sums_and_noise_is_the_largest():
    totals = manifest()
    assert (totals.num_pairs, totals.num_bytes) == (7, 303)
    assert totals.skipped == Counter(empty=1, identical=1)
    assert totals.counts == Counter(ties=3, tokens=42)
    assert totals.noise == Noise(0.5, (2e-6, 3e-6))
    assert dataclasses.replace(totals, shards=totals.shards[1:2]).noise is None


def test_rewriting_without_a_change_is_accepted(tmp_path: Path):
    # Else the refusals below would prove nothing.
    manifest().save(tmp_path)
    rewrite(tmp_path, lambda document: None)
    assert Manifest.load(tmp_path) == manifest()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("expected format version 2, found 3; another version", lambda d: d["meaning"].update(format_version=3)),
        ("expected format version 2, found None", lambda d: d.update(meaning=[])),
        (r"manifest\.meaning\.colour: .*, found red", lambda d: d["meaning"].update(colour="red")),
        (r"manifest\.extra: .*, found 1", lambda d: d.update(extra=1)),
        (r"manifest\.numerics\.device: Field required", lambda d: d["numerics"].pop("device")),
        ("max_length: .* valid integer, found 64", lambda d: d["meaning"].update(max_length="64")),
        ("max_length: .* valid integer, found True", lambda d: d["meaning"].update(max_length=True)),
        ("keep_features: .* valid integer, found 8.0", lambda d: d["meaning"].update(keep_features=8.0)),
        (r"skipped\.0\.1: Field required", lambda d: d["shards"][0]["report"].update(skipped=[[1]])),
        ("versions.torch: .* valid string, found 2", lambda d: d["numerics"]["versions"].update(torch=2)),
        ("fingerprint does not follow", lambda d: d["meaning"].update(max_length=65)),
        ("totals does not follow", lambda d: d["totals"].update(pairs=8)),
        ("expected the name 'data/train-00000-of-00003", lambda d: d["shards"][0].update(name="../secret.parquet")),
        ("expected the name", lambda d: d["shards"][1].update(name="/etc/passwd")),
        ("expected the name", lambda d: d["shards"][1].update(name="data/train-1-of-3.parquet")),
        ("expected the name", lambda d: d["shards"][1].update(name=d["shards"][0]["name"])),
        ("do not follow those", lambda d: d["shards"][1]["report"].update(start=5)),
        ("do not add up", lambda d: (d["shards"][1].update(rows=3), d["totals"].update(pairs=6))),
    ],
)
def test_a_signed_but_wrong_manifest_is_refused(
    tmp_path: Path, message: str, change: Callable[[dict[str, Any]], object]
):
    manifest().save(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', "[" * 100_000, "\xff"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        Manifest.load(tmp_path)


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path: Path):
    write_cache(tmp_path)
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    rng = random.Random(0)
    # White space and the exponent's letter change no value, so they are tried too.
    spaces = [i for i, byte in enumerate(data) if byte in b" \n"]
    for position in [*rng.sample(range(len(data)), 150), *rng.sample(spaces, 50)]:
        for byte in {data[position] ^ 1, ord("\t"), data[position] ^ 32} - {data[position]}:
            path.write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
            with pytest.raises(ValueError, match=r"manifest\.json"):
                Manifest.load(tmp_path)


def test_without_a_manifest_the_user_is_told_to_finish(tmp_path: Path):
    with pytest.raises(MissingError, match="finish `fpo precompute`"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("split", ["", "..", "a/b", "train-1", "a b", "é", "train\n"])
def test_a_split_that_could_leave_the_folder_is_refused(split: str):
    with pytest.raises(ValueError, match="split: expected letters"):
        shard_name(split, 0, 1)


def test_more_shards_than_the_name_has_digits_for_are_refused():
    assert shard_name("train", 7, 99_999) == "data/train-00007-of-99999.parquet"
    with pytest.raises(ValueError, match="raise --shard-size"):
        shard_name("train", 0, 100_000)
