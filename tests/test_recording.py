"""The numbers of both stages are those of commit 7d18de3.

`recording.json` was made at commit 7d18de3, before the code was moved into wings. It holds, for a tiny Gemma-2 and a
tiny Llama, the bytes and the values of a cache, and three steps of every method trained against it. A refactoring must
not move these numbers: the recording is never to be written anew to make one pass. Only a deliberate change of what is
computed (an objective, a column of the cache) may change it, in a commit that says which numbers moved and why.

Where the libraries and the CPU are those of the recording, everything is compared bit by bit; elsewhere integers are
compared exactly and other numbers to a relative 1e-4. All runs go through the command line, on one thread.

`python tests/test_recording.py --write` wrote the recording.
"""

import hashlib
import json
import os
import platform
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pairs import calm_gemma2, calm_llama
from safetensors.numpy import load_file
from tiny import save_tiny_sae
from tiny_tokenizers import chatml, gemma
from tiny_world import SITES, WORDS, fpo, metrics, ran, save_model, to_arguments, write_rows

RECORDING = Path(__file__).with_name("recording.json")
LIBRARIES = ("torch", "transformers", "accelerate", "sae-lens", "tokenizers", "datasets", "pyarrow", "numpy")
# What is recorded of a step, where it is logged.
STEP = ("loss", "grad_norm", "rewards/margins", "constraint/delta")
TOLERANCE = 1e-4

TRAIN = {"batch_size": 6, "lr": 1e-3, "warmup_steps": 0, "max_steps": 3, "logging_steps": 1, "token_budget": 192}
ONE_SITE = {"site": SITES[0].name, "top_k": 4}
BOTH_SITES = {"site": tuple(site.name for site in SITES), "top_k": 4}
# Architecture -> its model and tokenizer, the architectures of its SAEs at `SITES`, and its runs: method -> options.
WORLDS: dict[str, tuple[Any, Any, tuple[str, str], dict[str, dict[str, Any]]]] = {
    "gemma2": (
        calm_gemma2,
        gemma,
        ("jumprelu", "jumprelu"),
        {"sft": {}, "fpo": ONE_SITE, "dpo": {}, "simpo": {}, "tdpo1": {}, "tdpo2": {}, "simpo-kl": {}},
    ),
    "llama": (
        calm_llama,
        chatml,
        ("jumprelu", "topk"),
        {"sft": {}, "fpo": BOTH_SITES | {"optimizer": "rmsprop"}, "tdpo2": {}},
    ),
}
# What `auto` took when the recording was made.
ATTENTION = {"gemma2": "eager", "llama": "packed"}


@pytest.mark.parametrize("architecture", WORLDS)
def test_numbers_are_those_of_the_recording(architecture, tmp_path, monkeypatch):
    recording = json.loads(RECORDING.read_text())
    # Data sets that are prepared for files of this run's name stay with them.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    found = measured(architecture, tmp_path)
    exactly = environment() == recording["environment"]
    assert not list(differences(recording[architecture], found, exactly))


def environment() -> dict[str, str]:
    """What decides the last bits of the numbers, and the bytes of a file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    kind = {"machine": platform.machine(), "cpu": cpu, "instructions": torch.backends.cpu.get_cpu_capability()}
    return kind | {name: version(name) for name in LIBRARIES}


def measured(architecture: str, folder: Path) -> dict[str, Any]:
    """Makes the inputs in `folder`, runs both stages on them, and gives what the recording holds."""
    torch.set_num_threads(1)
    make_model, tokenizer, kinds, runs = WORLDS[architecture]
    model = save_model(folder / "model", make_model, tokenizer())
    saes = tuple(folder / f"sae_{number}" for number in range(len(SITES)))
    for number, (path, kind, site) in enumerate(zip(saes, kinds, SITES, strict=True)):
        save_tiny_sae(path, 32, 64, number, kind, site)
    pairs = write_rows(folder / "pairs.jsonl", preference_rows())
    chats = write_rows(folder / "chats.jsonl", [{"messages": row["chosen"]} for row in preference_rows()])
    lengths = {"split": "train", "max_length": 96}
    train = TRAIN | {"attention": ATTENTION[architecture]}

    cache = folder / "cache"
    options = {"model": model, "dataset": pairs, "sae": saes, "out": cache, "max_prompt_length": 32, **lengths}
    options |= {"keep_features": 8, "shard_size": 4, "token_budget": 192, "attention": ATTENTION[architecture]}
    ran(fpo("precompute", *to_arguments(options)))
    steps, trained = {}, {}
    for method, own in runs.items():
        options = {"dataset": chats, **lengths} if method == "sft" else {"cache": cache, "method": method}
        if method == "fpo":
            options["sae"] = saes
        elif method in ("tdpo1", "tdpo2", "simpo-kl"):
            options["reference"] = model
        out = folder / method
        command = "sft" if method == "sft" else "align"
        ran(fpo(command, *to_arguments({"model": model, "out": out, **train, **options, **own})))
        lines = [line for line in metrics(out) if "loss" in line]
        steps[method] = [{name: line[name] for name in STEP if name in line} for line in lines]
        trained[method] = sha256_of_weights(out)
    shards = sorted((cache / "data").iterdir())
    columns = pa.concat_tables([pq.ParquetFile(path).read() for path in shards])
    return {
        # Where these differ, it is the tests' models or data that moved.
        "input hashes": {path.name: sha256_of_weights(path) for path in (model, *saes)}
        | {path.name: sha256(path.read_bytes()) for path in (pairs, chats)},
        "shard hashes": {path.name: sha256(path.read_bytes()) for path in shards},
        "columns": {name: recorded(name, columns[name].to_pylist()) for name in columns.column_names},
        "steps": steps,
        "weight hashes": trained,
    }


def preference_rows() -> list[dict[str, Any]]:
    """14 rows: two are skipped, one is a tie; some are cut, some responses have two answers."""
    rng = random.Random(11)

    def turn(role: str, longest: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices(WORDS.split(), k=rng.randint(1, longest)))}

    made = []
    for number in range(14):
        question = [turn("user", 24 if number % 5 == 4 else 6)]
        sides = [[*question, turn("assistant", 24 if number % 6 == 1 else 10)] for _ in range(2)]
        if number % 4 == 2:
            sides = [[*side, turn("user", 4), turn("assistant", 6)] for side in sides]
        for side, end in zip(sides, (" Yes.", " No."), strict=True):
            side[-1]["content"] += end
        made.append({"chosen": sides[0], "rejected": sides[1], "score_chosen": 8.0, "score_rejected": 5.0})
    made[3]["rejected"] = made[3]["chosen"]
    made[7]["chosen"] = [made[7]["chosen"][0], {"role": "assistant", "content": " "}]
    made[5]["score_rejected"] = made[5]["score_chosen"]
    return made


def recorded(column: str, values: list[Any]) -> Any:
    """A hash of text and token ids, the values of all else."""
    return sha256(json.dumps(values).encode()) if column.endswith("_ids") or column == "pair_id" else values


def sha256_of_weights(folder: Path) -> str:
    """Of the names and bytes of all tensors in a folder's safetensors files."""
    tensors = {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}
    assert tensors, folder
    return sha256(b"".join(name.encode() + array.tobytes() for name, array in sorted(tensors.items())))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differences(expected: Any, found: Any, exactly: bool, where: str = "") -> Iterator[str]:
    """Where the two differ, a line each.

    Without `exactly`, floats have a tolerance, and the hashes of files and weights do not count.
    """
    if where.endswith(" hashes") and not exactly:
        return
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        for key, value in expected.items():
            yield from differences(value, found[key], exactly, f"{where}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, value in enumerate(expected):
            yield from differences(value, found[number], exactly, f"{where}/{number}")
    elif isinstance(expected, float) and isinstance(found, float) and not exactly:
        # Margins and δ are differences of numbers of up to 1, which round as those do.
        if found != pytest.approx(expected, rel=TOLERANCE, abs=1e-5):
            yield f"{where}: expected {expected} to {TOLERANCE:g}, found {found}"
    elif expected != found:
        yield f"{where}: expected {expected}, found {found}"


def write() -> None:
    """Writes the recording; the module's docstring says when that is wrong."""
    content: dict[str, Any] = {"commit": "7d18de3", "environment": environment()}
    for architecture in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {"FPO_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "1"}
            content[architecture] = measured(architecture, Path(folder))
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(content, indent=1))
    RECORDING.write_text(text + "\n")


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "run by pytest; --write writes the recording anew"
    write()
