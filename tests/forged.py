"""Caches that a stranger could forge: changed anywhere, with hashes and totals that agree with the change.

In: the files of a sound cache, and a source of chance. Out: the files of a forged one, on disk if wanted.
"""

import contextlib
import copy
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cache_rows import write_cache
from fpo.cache.files import canonical_json, sha256_text
from fpo.cache.manifest import MANIFEST_NAME
from fpo.cache.schema import SIDES, TOKEN_COLUMNS, pair_id, raw_row_of

# Every file by its name relative to the folder.
Files = dict[str, bytes]

MORE = "data/more.parquet"
ATOMS: list[Any] = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
ATOMS += ["", "0", "a/../b", "\0", "é" * 9, "11" * 32, "train", "fp32", "blocks.0.hook_resid_post"]
ATOMS += [[], {}, [[]], [0, "tie"], {"": None}]


def sound_files(folder: Path) -> Files:
    """The files of a finished cache of three shards."""
    write_cache(folder)
    return read_files(folder)


def read_files(folder: Path) -> Files:
    """The manifest and the shards of a folder."""
    paths = [folder / MANIFEST_NAME, *sorted((folder / "data").glob("*.parquet"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def write_files(files: Files, folder: Path) -> None:
    """Writes them below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def forge(files: Files, rng: random.Random) -> Files:
    """The files with one change; mostly signed again, so that no hash tells of it."""
    forged = dict(files)
    change = rng.choice([_change_manifest, _change_footer, _change_table, _change_table, _change_bytes, _change_files])
    with contextlib.suppress(Exception):  # what was forged before may not bear this change any more
        change(forged, rng)
        if rng.random() < 0.9:
            sign(forged)
    return forged


def sign(files: Files) -> None:
    """Makes the manifest state what the files are."""
    document = json.loads(files[MANIFEST_NAME])
    for record in document["shards"]:
        data = files[record["name"]]
        record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):  # it may be no Parquet any more
            record["rows"] = pq.read_metadata(pa.BufferReader(data)).num_rows
    document.pop("sha256", None)
    document["fingerprint"] = sha256_text(canonical_json(document["meaning"]))
    document["totals"] = _totals(document["shards"])
    files[MANIFEST_NAME] = _pretty(document | {"sha256": sha256_text(canonical_json(document))})


def _totals(shards: list[dict[str, Any]]) -> dict[str, Any]:
    reports = [shard["report"] for shard in shards]
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report["counts"])
    noises = [report["noise"] for report in reports if report["noise"] is not None]
    noise = {
        "logp": max((noise["logp"] for noise in noises), default=0),
        "feature_mse": [max(site) for site in zip(*(noise["feature_mse"] for noise in noises), strict=True)],
    }
    return {
        "pairs": sum(shard["rows"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "skipped": dict(Counter(reason for report in reports for _, reason in report["skipped"])),
        "counts": dict(counts),
        "noise": noise if noises else None,
    }


def _pretty(document: Any) -> bytes:
    return (json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def change_json(document: Any, rng: random.Random) -> None:
    """Changes one value, at any depth."""
    places = list(_places(document))
    holder, key = rng.choice(places)
    how = rng.randrange(5)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, list):
        holder.insert(key, holder[rng.randrange(len(holder))])
    elif how == 2 and isinstance(holder[key], int):
        holder[key] += rng.choice([-1, 1])
    elif how == 3:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    else:
        holder[key] = copy.deepcopy(rng.choice(ATOMS))


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _change_manifest(files: Files, rng: random.Random) -> None:
    document = json.loads(files[MANIFEST_NAME])
    change_json(document, rng)
    files[MANIFEST_NAME] = _pretty(document)


def _shard(files: Files, rng: random.Random) -> str:
    return rng.choice(sorted(name for name in files if name != MANIFEST_NAME))


def _change_footer(files: Files, rng: random.Random) -> None:
    """Changes what a shard says of itself; now and then the manifest says the same."""
    name = _shard(files, rng)
    table = pq.read_table(pa.BufferReader(files[name]))
    metadata = dict(pq.read_metadata(pa.BufferReader(files[name])).metadata)
    key = rng.choice(["meaning", "numerics", "shard", "shard", "fingerprint"])
    if key == "fingerprint":
        metadata[b"fpo.fingerprint"] = str(rng.choice(ATOMS)).encode()
    else:
        part = json.loads(metadata[f"fpo.{key}".encode()])
        change_json(part, rng)
        metadata[f"fpo.{key}".encode()] = json.dumps(part, ensure_ascii=False).encode()
        if key == "meaning":
            metadata[b"fpo.fingerprint"] = sha256_text(canonical_json(part)).encode()
        if rng.random() < 0.7:
            document = json.loads(files[MANIFEST_NAME])
            if key == "shard":
                next(shard for shard in document["shards"] if shard["name"] == name)["report"] = part
            else:
                document[key] = part
            files[MANIFEST_NAME] = _pretty(document)
    files[name] = _parquet(table, metadata)


def _change_table(files: Files, rng: random.Random) -> None:
    """Changes the rows or the columns of a shard."""
    name = _shard(files, rng)
    metadata = dict(pq.read_metadata(pa.BufferReader(files[name])).metadata)
    table = pq.read_table(pa.BufferReader(files[name])).replace_schema_metadata(None)
    files[name] = _parquet(rng.choice(TABLE_CHANGES)(table, rng), metadata)


def _parquet(table: pa.Table, metadata: dict[bytes, bytes]) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", use_dictionary=False, write_page_checksum=True
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({key: value for key, value in metadata.items() if key != b"ARROW:schema"})
    return bytes(sink.getvalue())


def _with_values(table: pa.Table, rng: random.Random) -> pa.Table:
    """One number, list or name of one row is another."""
    rows = table.to_pylist()
    row = rng.choice(rows)
    column = rng.choice(table.column_names)
    value = row[column]
    if isinstance(value, dict):
        part = rng.choice(sorted(value))
        value[part] = _other(value[part], rng)
    else:
        row[column] = _other(value, rng)
        if rng.random() < 0.7:  # the name and the counts of what is there now
            tokens = [row[name] for name in TOKEN_COLUMNS]
            row["pair_id"] = pair_id(*tokens, raw_row_of(row["pair_id"]))
            row |= {f"{side}_num_tokens": len(row[f"{side}_ids"]) for side in SIDES}
            row |= {f"{side}_learnt": [0, len(row[f"{side}_ids"])] for side in SIDES}
    return pa.Table.from_pylist(rows, table.schema)


def _other(value: Any, rng: random.Random) -> Any:
    numbers = [
        0,
        -1,
        1,
        2,
        255,
        65535,
        70_000,
        2**31 - 1,
        -(2**31),
        float("nan"),
        float("inf"),
        -float("inf"),
        -0.0,
        1e-45,
    ]
    if isinstance(value, list) and value and rng.random() < 0.7:
        changed = list(value)
        how = rng.randrange(4)
        if how == 0:
            changed[rng.randrange(len(changed))] = rng.choice(numbers)
        elif how == 1:
            changed.append(rng.choice(changed))
        elif how == 2:
            rng.shuffle(changed)
        else:
            changed.pop()
        return changed
    return rng.choice([[], [0], "", "0" * 16 + "-0", *numbers])


def _with_rows(table: pa.Table, rng: random.Random) -> pa.Table:
    """Rows are left out, doubled or in another order."""
    return table.take([rng.randrange(table.num_rows) for _ in range(rng.randrange(2 * table.num_rows))])


def _with_columns(table: pa.Table, rng: random.Random) -> pa.Table:
    """Columns are left out, doubled, renamed or in another order."""
    columns = rng.choices(range(table.num_columns), k=table.num_columns) if rng.random() < 0.5 else None
    if columns is not None:
        return pa.Table.from_arrays([table.column(i) for i in columns], [table.column_names[i] for i in columns])
    names = list(table.column_names)
    names[rng.randrange(len(names))] = rng.choice([*names, "x", ""])
    return table.rename_columns(names)


def _with_types(table: pa.Table, rng: random.Random) -> pa.Table:
    """One column is of another type, or may be null and is."""
    number = rng.randrange(table.num_columns)
    name, length = table.column_names[number], table.num_rows
    column: Any = rng.choice(
        [
            lambda: pa.nulls(length, table.schema.field(number).type),
            lambda: pa.array(np.arange(length)),
            lambda: pa.array([[1]] * length),
            lambda: pa.array([{"ids": [1], "values": [1.0], "floor": 0.0, "nnz": 1}] * length),
            lambda: pa.array(["a"] * length).dictionary_encode(),
            lambda: pa.array([b"\xff"] * length),
            lambda: table.column(number),
        ]
    )()
    return table.set_column(number, pa.field(name, column.type, nullable=rng.random() < 0.5), column)


TABLE_CHANGES: list[Callable[[pa.Table, random.Random], pa.Table]] = [
    *(_with_values, _with_values, _with_values, _with_rows, _with_columns, _with_types)
]


def _change_bytes(files: Files, rng: random.Random) -> None:
    """Some bytes of any file are others, or its end is gone."""
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(rng.randrange(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    files[name] = bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def _change_files(files: Files, rng: random.Random) -> None:
    """A shard takes another's place, is left out, or is one too many."""
    name, other = _shard(files, rng), _shard(files, rng)
    how = rng.randrange(4)
    if how == 0:
        files[name] = files[other]
    elif how == 1:
        del files[name]
    elif how == 2:
        files[MORE] = files[name]
    else:
        document = json.loads(files[MANIFEST_NAME])
        document["shards"].append(copy.deepcopy(rng.choice(document["shards"])))
        files[MANIFEST_NAME] = _pretty(document)
