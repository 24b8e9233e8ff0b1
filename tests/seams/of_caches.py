"""Checks of the commands that look into a cache."""

import shutil

from seams.lab import Lab
from seams.options import effect
from tiny_world import fpo


@effect("cache info", "place")
def info(lab: Lab, command: str) -> None:
    """What it says of a cache is in test_cache.py; here, that it is that cache's."""
    for options, said in (({}, "3 in 1 shards of"), ({"limit": 8, "shard_size": 4}, "6 in 2 shards of 4 raw rows")):
        result = fpo("cache", "info", lab.run("precompute", **options).folder)
        assert result.exit_code == 0 and said in result.output
    assert fpo("cache", "info", lab.new()).exit_code == 2


@effect("cache verify", "place")
def verify(lab: Lab, command: str) -> None:
    folder = lab.new()
    shutil.copytree(lab.small_cache, folder)
    assert fpo("cache", "verify", folder).exit_code == 0
    (shard,) = (folder / "data").iterdir()
    data = shard.read_bytes()
    for place in (10, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        result = fpo("cache", "verify", folder)
        assert result.exit_code == 1 and shard.name in result.output
    assert fpo("cache", "verify", lab.small_cache).exit_code == 0
