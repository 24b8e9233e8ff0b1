"""Small files that unpack to gigabytes are refused, in a fresh process that takes no more memory than is promised."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import bombs
import pytest
from forged import MANIFEST_NAME, Files, sound_files, write_files
from fpo.cache.manifest import LARGEST_TEXT
from fpo.cache.shard import LARGEST_FOOTER, SMALLEST_LIMIT
from fpo.stages.data.row_files import SMALLEST_LIMIT as SMALLEST_ROWS

TRIED = "decompression bombs refused within the bound of memory"
MB = 1 << 20
# Beyond what the program takes for a sound file of the same kind.
REFUSAL = 80 * MB
# What a shard may take that is as large as is allowed, in multiples of it.
READING = 8
# What a packed file of rows may take that unpacks to as much as is allowed, in multiples of that.
ROWS = 8
# A manifest's parts as Python's objects, in multiples of its bytes.
PARSING = 40

# A line for each argument. VmHWM and not getrusage, which begins with what the parent had.
RUN = """
import sys
from pathlib import Path
{imports}
for argument in map(Path, sys.argv[1:]):
    try:
        said = {call} or "refused"
    except ValueError as error:
        said = f"refused: {{error}}"
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024, " ".join(str(said).split()))
"""
OPEN = RUN.format(imports="from fpo.cache.reader import open_cache", call="open_cache(argument)")
VERIFY = RUN.format(imports="from fpo.cache.reader import verify", call="['refused:', *verify(argument)]")
UNPACK = RUN.format(imports="from fpo.stages.model.sae import read_npz", call="len(read_npz(argument))")
READ = RUN.format(
    imports="from fpo.stages.data.preferences import load_preferences",
    call="load_preferences(str(argument), split='train').content_hash",
)


def in_fresh_process(script: str, sound: Path, tried: Sequence[Path], home: Path) -> list[tuple[str, int]]:
    """What was said of each, and the peak of memory by then in bytes beyond that of a sound file."""
    command = [sys.executable, "-c", script, str(sound), *map(str, tried)]
    environment = os.environ | {"FPO_HOME": str(home), "HF_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    usual = int(lines[0][0])
    assert len(lines) == 1 + len(tried) and not lines[0][1].startswith("refused: ")
    return [(said, int(peak) - usual) for peak, said in lines[1:]]


def assert_refused(said: str, more: int, allowed: int, *parts: str) -> None:
    assert "refused:" in said and all(part in said for part in parts), said
    assert more < allowed, f"{more / MB:.0f} MB: {said}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Files:
    return sound_files(tmp_path_factory.mktemp("sound") / "cache")


@pytest.fixture
def usual(sound, tmp_path) -> Path:
    """A sound cache."""
    write_files(sound, tmp_path / "usual")
    return tmp_path / "usual"


def test_a_shard_that_unpacks_to_gigabytes_is_refused_unpacked(sound, usual, tmp_path, tally):
    for kind, make in bombs.SHARDS.items():
        files = bombs.with_bomb(sound, make)
        assert len(files[bombs.NAMES[1]]) < 13 * MB
        write_files(files, tmp_path / kind)
    for script in (OPEN, VERIFY):
        found = in_fresh_process(script, usual, [tmp_path / kind for kind in bombs.SHARDS], tmp_path / "home")
        for said, more in found:
            assert_refused(said, more, REFUSAL, bombs.NAMES[1])
            tally(TRIED)


def test_the_largest_shard_that_is_read_takes_the_memory_that_is_promised(sound, usual, tmp_path, tally):
    """As a bomb just below the limit: read, found to be unsound, at a known price."""
    shards = {
        "does not belong to its token ids": bombs.of_many_tokens(SMALLEST_LIMIT // 17, use_dictionary=False),
        "unreadable": bombs.with_footer(bombs.groups(LARGEST_FOOTER)),
    }
    for fault, make in shards.items():
        write_files(bombs.with_bomb(sound, make), tmp_path / "cache")
        ((said, more),) = in_fresh_process(VERIFY, usual, [tmp_path / "cache"], tmp_path / "home")
        assert_refused(said, more, READING * SMALLEST_LIMIT, bombs.NAMES[1], fault)
        tally(TRIED)


def test_a_manifest_that_is_huge_is_not_read(sound, usual, tmp_path, tally):
    write_files(sound, tmp_path / "cache")
    with (tmp_path / "cache" / MANIFEST_NAME).open("r+b") as file:
        file.truncate(LARGEST_TEXT + 1)
    ((said, more),) = in_fresh_process(OPEN, usual, [tmp_path / "cache"], tmp_path / "home")
    assert_refused(said, more, REFUSAL, f"at most {LARGEST_TEXT} bytes")
    tally(TRIED)


def test_a_manifest_of_many_parts_takes_the_memory_that_is_promised(usual, tmp_path, tries, tally):
    size = 4 * MB
    for part in ["[[]],", '{"a":{}},', "[],", "{},", '"a",', "1e9,"][: tries(2, 6)]:
        text = '{"meaning": {"format_version": 2}, "shards": [' + part * (size // len(part)) + "1]}"
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / MANIFEST_NAME).write_text(text)
        ((said, more),) = in_fresh_process(OPEN, usual, [tmp_path / "cache"], tmp_path / "home")
        assert_refused(said, more, PARSING * size, MANIFEST_NAME)
        tally(TRIED)


def test_an_archive_that_unpacks_to_gigabytes_is_refused_unpacked(tmp_path, tally):
    small = tmp_path / "small.npz"
    small.write_bytes(bombs.npz(zipfile.ZIP_DEFLATED, MB))
    for kind, make in bombs.ARCHIVES.items():
        (tmp_path / f"{kind}.npz").write_bytes(make())
        assert (tmp_path / f"{kind}.npz").stat().st_size < 2 * MB
    paths = [tmp_path / f"{kind}.npz" for kind in bombs.ARCHIVES]
    for path, (said, more) in zip(paths, in_fresh_process(UNPACK, small, paths, tmp_path / "home"), strict=True):
        assert_refused(said, more, REFUSAL, path.name)
        tally(TRIED)


@pytest.fixture
def usual_rows(tmp_path) -> Path:
    """Sound preference data under gzip."""
    path = tmp_path / "usual.jsonl.gz"
    path.write_bytes(bombs.packed_rows(MB))
    return path


def test_packed_rows_that_unpack_to_gigabytes_are_refused_unpacked(usual_rows, tmp_path, tally):
    paths = [tmp_path / name for name in bombs.DATA]
    for path, make in zip(paths, bombs.DATA.values(), strict=True):
        path.write_bytes(make())
        assert path.stat().st_size < 2 * MB
    for path, (said, more) in zip(paths, in_fresh_process(READ, usual_rows, paths, tmp_path / "home"), strict=True):
        assert_refused(said, more, REFUSAL, path.name, "unpack it yourself")
        tally(TRIED)


def test_the_longest_row_that_is_unpacked_takes_the_memory_that_is_promised(usual_rows, tmp_path):
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(bombs.packed_rows(SMALLEST_ROWS))
    ((said, more),) = in_fresh_process(READ, usual_rows, [path], tmp_path / "home")
    assert "refused" not in said and more < ROWS * SMALLEST_ROWS, f"{more / MB:.0f} MB"
