"""Every byte of a shard flipped, with a manifest that vouches for the flipped bytes: what is left beneath the hash.

In: the folder of a cache of one shard, masks, and the step between the bytes that are tried. Out: a line for each flip
on stdout, `POSITION MASK OUTCOME`, where the outcome is `found`, `harmless` (every row and the footer as before), or
what went wrong. In a process of its own, since what reads Parquet is C++: `python -m flips FOLDER MASKS STEP`.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path

from fpo.cache.manifest import Manifest
from fpo.cache.shard import read_footer, read_table, shard_fault


def try_flips(folder: Path, masks: list[int], step: int) -> None:
    manifest = Manifest.load(folder)
    (record,) = manifest.shards
    path = folder / record.name
    data = path.read_bytes()
    footer, table = read_footer(path), read_table(path, manifest.meaning)
    for position in range(0, len(data), step):
        for mask in masks:
            flipped = bytearray(data)
            flipped[position] ^= mask
            path.write_bytes(flipped)
            signed = dataclasses.replace(record, sha256=hashlib.sha256(flipped).hexdigest())
            sys.stdout.write(f"{position} {mask} ")
            sys.stdout.flush()  # the last line names the culprit if the process dies
            try:
                fault = shard_fault(path, dataclasses.replace(manifest, shards=(signed,)), signed)
            except Exception as error:  # noqa: BLE001
                sys.stdout.write(f"raised {type(error).__name__}\n")
                continue
            same = fault is None and read_footer(path) == footer and read_table(path, manifest.meaning).equals(table)
            sys.stdout.write(f"{'found' if fault else 'harmless' if same else 'wrong'}\n")
    path.write_bytes(data)


if __name__ == "__main__":
    try_flips(Path(sys.argv[1]), [int(mask) for mask in sys.argv[2].split(",")], int(sys.argv[3]))
