"""Small files that unpack to gigabytes are refused, in a fresh process that takes no more memory than is promised."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import bombs
import pytest
from forged import MANIFEST_NAME, Files, sound_files, write_files
from fpo.cache.manifest import LARGEST_TEXT
from fpo.cache.pages import LARGEST_FOOTER, SMALLEST_LIMIT

MB = 1 << 20
# Beyond what the program takes for a sound file of the same kind.
REFUSAL = 80 * MB
# What a shard may take that is as large as is allowed, in multiples of it.
READING = 8
# The manifest's parts as Python's objects, in multiples of its bytes.
PARSING = 40

# VmHWM and not getrusage, which begins with what the parent had.
RUN = """
import sys
{body}
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) * 1024)
"""
OPEN = """
from fpo.cache.reader import open_cache
try:
    open_cache(sys.argv[1])
    print("opened")
except ValueError as error:
    print("refused:", error)
"""
VERIFY = """
from fpo.cache.reader import verify
print("refused:", *verify(sys.argv[1]))
"""
UNPACK = """
from pathlib import Path
from fpo.stages.npz import read_npz
try:
    read_npz(Path(sys.argv[1]))
    print("opened")
except ValueError as error:
    print("refused:", error)
"""


def in_fresh_process(body: str, argument: Path | str, home: Path) -> tuple[str, int]:
    """What was said, and the peak of memory in bytes."""
    command = [sys.executable, "-c", RUN.format(body=body), str(argument)]
    environment = os.environ | {"FPO_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said, _, peak = done.stdout.rpartition("peak ")
    return said, int(peak)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Files:
    return sound_files(tmp_path_factory.mktemp("sound") / "cache")


@pytest.fixture(scope="module")
def usual(sound, tmp_path_factory) -> int:
    """The memory in which a sound cache is opened."""
    folder = tmp_path_factory.mktemp("usual")
    write_files(sound, folder / "cache")
    said, peak = in_fresh_process(OPEN, folder / "cache", folder / "home")
    assert said == "opened\n"
    return peak


@pytest.mark.parametrize("kind", bombs.SHARDS)
def test_a_shard_that_unpacks_to_gigabytes_is_refused_unpacked(sound, usual, tmp_path, tally, kind):
    files = bombs.with_bomb(sound, bombs.SHARDS[kind])
    assert len(files[bombs.NAMES[1]]) < 13 * MB
    write_files(files, tmp_path / "cache")
    for body in (OPEN, VERIFY):
        said, peak = in_fresh_process(body, tmp_path / "cache", tmp_path / "home")
        assert said.startswith("refused:") and bombs.NAMES[1] in said, said
        assert peak < usual + REFUSAL, f"{(peak - usual) / MB:.0f} MB"
    tally("decompression bombs refused within the bound of memory")


def test_the_largest_shard_that_is_read_takes_the_memory_that_is_promised(sound, usual, tmp_path, tally):
    """As a bomb just below the limit: read, found to be unsound, at a known price."""
    values = SMALLEST_LIMIT // 17
    write_files(bombs.with_bomb(sound, bombs.of_many_tokens(values, use_dictionary=False)), tmp_path / "cache")
    said, peak = in_fresh_process(OPEN, tmp_path / "cache", tmp_path / "home")
    assert "does not belong to its token ids" in said
    assert peak < usual + READING * SMALLEST_LIMIT, f"{(peak - usual) / MB:.0f} MB"
    tally("decompression bombs refused within the bound of memory")


def test_the_largest_footer_that_is_read_takes_the_memory_that_is_promised(sound, usual, tmp_path, tally):
    write_files(bombs.with_bomb(sound, bombs.with_footer(bombs.groups(LARGEST_FOOTER))), tmp_path / "cache")
    said, peak = in_fresh_process(OPEN, tmp_path / "cache", tmp_path / "home")
    assert said.startswith("refused:")
    assert peak < usual + READING * SMALLEST_LIMIT, f"{(peak - usual) / MB:.0f} MB"
    tally("decompression bombs refused within the bound of memory")


def test_a_manifest_that_is_huge_is_not_read(sound, usual, tmp_path, tally):
    write_files(sound, tmp_path / "cache")
    with (tmp_path / "cache" / MANIFEST_NAME).open("r+b") as file:
        file.truncate(LARGEST_TEXT + 1)
    said, peak = in_fresh_process(OPEN, tmp_path / "cache", tmp_path / "home")
    assert f"at most {LARGEST_TEXT} bytes" in said
    assert peak < usual + REFUSAL
    tally("decompression bombs refused within the bound of memory")


@pytest.mark.parametrize("part", ["[],", "{},", '"a",', "[[]],", '{"a":{}},', "1e9,"])
def test_a_manifest_of_many_parts_takes_the_memory_that_is_promised(usual, tmp_path, tally, part):
    size = 8 * MB
    text = '{"meaning": {"format_version": 1}, "shards": [' + part * (size // len(part)) + "1]}"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / MANIFEST_NAME).write_text(text)
    said, peak = in_fresh_process(OPEN, tmp_path / "cache", tmp_path / "home")
    assert said.startswith("refused:")
    assert peak < usual + PARSING * size, f"{(peak - usual) / size:.1f} times its bytes"
    tally("decompression bombs refused within the bound of memory")


@pytest.mark.parametrize("kind", bombs.ARCHIVES)
def test_an_archive_that_unpacks_to_gigabytes_is_refused_unpacked(tmp_path, tally, kind):
    small, bomb = tmp_path / "small.npz", tmp_path / "params.npz"
    small.write_bytes(bombs.npz(zipfile.ZIP_DEFLATED, MB))
    bomb.write_bytes(bombs.ARCHIVES[kind]())
    assert bomb.stat().st_size < 2 * MB
    opened, usual = in_fresh_process(UNPACK, small, tmp_path / "home")
    said, peak = in_fresh_process(UNPACK, bomb, tmp_path / "home")
    assert opened == "opened\n" and said.startswith("refused:") and "params.npz" in said, said
    assert peak < usual + REFUSAL, f"{(peak - usual) / MB:.0f} MB"
    tally("decompression bombs refused within the bound of memory")
