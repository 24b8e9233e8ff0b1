"""Coverage-guided fuzzing of the cache reader by atheris: `python tests/reliability/fuzz_cache.py -max_total_time=60`.

In: options of libFuzzer; the seeds are a sound cache and forgeries of it, made at the start. Out: exit code 0 if
nothing but what the reader's docstrings name was raised and nothing unsound was accepted; else the traceback, and
among temporary files one that repeats it when it is given as an argument.
"""

import os
import random
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["fpo.cache"]):
    import fpo.cache.reader  # noqa: F401
from forged import MORE, Files, forge, sound_files, write_files
from judge import judge

scratch = Path(tempfile.mkdtemp(prefix="fuzz-cache-"))
os.environ["FPO_HOME"] = str(scratch / "home")
SOUND = sound_files(scratch / "sound")
NAMES = [*SOUND, MORE]


def pack(files: Files) -> bytes:
    """One input: every file's number among `NAMES`, length and content."""
    return b"".join(struct.pack("<BI", NAMES.index(name), len(data)) + data for name, data in files.items())


def unpack(data: bytes) -> Files:
    """The files in an input, whatever it is."""
    files, at = {}, 0
    while at + 5 <= len(data):
        number, length = struct.unpack_from("<BI", data, at)
        files[NAMES[number % len(NAMES)]] = data[at + 5 : at + 5 + length]
        at += 5 + length
    return files


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's mutator: one more forgery; now and then from the beginning, or bytes that mean nothing."""
    rng = random.Random(seed)
    if rng.random() < 0.05:
        return bytes(atheris.Mutate(data, max_size))
    return pack(forge(unpack(data) if rng.random() < 0.8 else SOUND, rng))[:max_size]


def test_one_input(data: bytes) -> None:
    folder = scratch / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_files(unpack(data), folder)
    judge(folder)
    shutil.rmtree(scratch / "home", ignore_errors=True)


def main() -> None:
    seeds = scratch / "seeds"
    seeds.mkdir()
    rng = random.Random(0)
    for number in range(50):
        (seeds / str(number)).write_bytes(pack(forge(SOUND, rng) if number else SOUND))
    options = [f"-max_len={4 * len(pack(SOUND))}", "-timeout=30", "-rss_limit_mb=4096", "-print_final_stats=1"]
    options += [f"-artifact_prefix={tempfile.gettempdir()}/fuzz-cache-"]
    atheris.Setup([*sys.argv, *options, str(seeds)], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
