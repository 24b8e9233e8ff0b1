"""Every mistake of a user's gives one line that names it and what to do, exit code 2, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from fpo.cache.files import canonical_json, sha256_text
from fpo.stages.sites import Site
from tiny import save_tiny_sae
from tiny_world import SITES, World, files, fpo, ran, rows, to_arguments, write_rows

PROGRESS = ("it/s]", "examples/s]", "? examples/s]")


def refused(result: Result, *parts: str) -> None:
    """Checks the exit code, that one line is the program's, and that it says what it should."""
    said = [line for line in result.stderr.splitlines() if line.strip() and not line.endswith(PROGRESS)]
    assert result.exit_code == 2, result.output
    assert len(said) == 1, result.stderr
    assert said[0].startswith("fpo: ")
    for part in parts:
        assert part in said[0], said[0]


@pytest.fixture(scope="module")
def bad(world, tmp_path_factory) -> Path:
    """SAEs, data sets and caches that do not fit the world."""
    folder = tmp_path_factory.mktemp("bad")
    for name, d_in, width, site in (
        ("narrow", 16, 64, SITES[0]),
        ("deep", 32, 64, Site(9, "resid_post")),
        ("twin", 32, 64, SITES[0]),
        ("unnamed", 32, 64, None),
    ):
        save_tiny_sae(folder / name, d_in, width, 3, "jumprelu", site)
    shutil.copytree(folder / "twin", folder / "foreign")
    cfg = json.loads((folder / "foreign" / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "blocks.1.attn.hook_z"
    (folder / "foreign" / "cfg.json").write_text(json.dumps(cfg))

    write_rows(folder / "columns.jsonl", [{"question": "a", "answer": "b"}])
    write_rows(folder / "types.jsonl", [{"chosen": 1, "rejected": 2}])
    (folder / "text.jsonl").write_text("no json\n")
    (folder / "empty.jsonl").write_text("")
    write_rows(folder / "data.txt", rows(0, 2))
    write_rows(folder / "same.jsonl", [row | {"rejected": row["chosen"]} for row in rows(0, 3)])

    ran(world.precompute(folder / "few", keep_features=8, sae=world.saes[0]))
    ran(world.precompute(folder / "llama", model=world.llama, sae=world.saes[0]))
    shutil.copytree(world.cache, folder / "unfinished")
    (folder / "unfinished" / "manifest.json").unlink()
    shutil.copytree(world.cache, folder / "future")
    alter(folder / "future" / "manifest.json", format_version=99)
    shutil.copytree(world.cache, folder / "damaged")
    shard = sorted((folder / "damaged" / "data").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    shutil.copytree(world.gemma, folder / "gemma_with_another_tokenizer")
    shutil.copy(world.llama / "tokenizer.json", folder / "gemma_with_another_tokenizer")
    return folder


def alter(manifest: Path, **meaning: Any) -> None:
    """Changes fields of a manifest's meaning and signs it again."""
    document = json.loads(manifest.read_text())
    del document["sha256"]
    document["meaning"] |= meaning
    document["sha256"] = sha256_text(canonical_json(document))
    manifest.write_text(json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n")


Change = Callable[[World, Path], dict[str, Any]]

PRECOMPUTE: dict[str, tuple[Change, list[str]]] = {
    "no model": (lambda w, b: {"model": None}, ["--model", "expected a value"]),
    "no data set": (lambda w, b: {"dataset": None}, ["--dataset", "expected a value"]),
    "no SAE": (lambda w, b: {"sae": None}, ["--sae", "expected a value"]),
    "missing model": (lambda w, b: {"model": b / "none"}, ["none", "expected a hub id"]),
    "missing data": (lambda w, b: {"dataset": b / "none.jsonl"}, ["none.jsonl"]),
    "missing SAE": (lambda w, b: {"sae": b / "none"}, ["none"]),
    "missing template": (lambda w, b: {"chat_template": b / "none.jinja"}, ["none.jinja"]),
    "columns": (lambda w, b: {"dataset": b / "columns.jsonl"}, ["'question'", "'answer'", "'chosen'"]),
    "types": (lambda w, b: {"dataset": b / "types.jsonl"}, ["row 0", "int"]),
    "no JSON": (lambda w, b: {"dataset": b / "text.jsonl"}, ["text.jsonl"]),
    "empty file": (lambda w, b: {"dataset": b / "empty.jsonl"}, ["empty"]),
    "kind of file": (lambda w, b: {"dataset": b / "data.txt"}, ["data.txt", ".parquet"]),
    "split's name": (lambda w, b: {"split": "a/b"}, ["split", "a/b"]),
    "SAE's width": (lambda w, b: {"sae": b / "narrow"}, ["size 16", "has 32"]),
    "SAE's layer": (lambda w, b: {"sae": b / "deep"}, ["blocks.9", "0 to 3"]),
    "SAE's hook": (lambda w, b: {"sae": b / "foreign"}, ["blocks.1.attn.hook_z"]),
    "SAE's site": (lambda w, b: {"sae": b / "unnamed"}, ["which site"]),
    "two SAEs a site": (lambda w, b: {"sae": (w.saes[0], b / "twin")}, ["one SAE a site"]),
    "device": (lambda w, b: {"device": "tpu"}, ["--device", "'tpu'"]),
    "device without memory": (lambda w, b: {"device": "meta"}, ["--device", "'meta'"]),
    "absent device": (lambda w, b: {"device": "cuda:99"}, ["--device", "'cuda:99'"]),
    "attention": (lambda w, b: {"attention": "sdpa"}, ["gemma", "eager"]),
    "unknown attention": (lambda w, b: {"attention": "flash"}, ["--attention", "'flash'"]),
    "flex on CPU": (lambda w, b: {"attention": "flex_attention", "device": "cpu"}, ["--attention"]),
    "limits": (lambda w, b: {"max_length": 32}, ["max_prompt_length < max_length", "32 and 32"]),
    "no room for a prompt": (lambda w, b: {"max_prompt_length": 1}, ["max_prompt_length"]),
    "limit": (lambda w, b: {"limit": 0}, ["--limit", "'0'"]),
    "shard size": (lambda w, b: {"shard_size": 0}, ["--shard-size", "'0'"]),
    "token budget": (lambda w, b: {"token_budget": "many"}, ["--token-budget", "'many'"]),
    "kept features": (lambda w, b: {"keep_features": "most"}, ["--keep-features", "'most'"]),
    "recipe": (lambda w, b: {"dtype": "fp16"}, ["--dtype", "'fp16'"]),
    "missing configuration": (lambda w, b: {"config": b / "none.yaml"}, ["--config", "none.yaml", "gemma-2-2b"]),
}

ALIGN: dict[str, tuple[Change, list[str]]] = {
    "no model": (lambda w, b: {"model": None}, ["--model", "expected a value"]),
    "no cache": (lambda w, b: {"cache": None}, ["--cache", "expected a value"]),
    "no site": (lambda w, b: {"site": None}, ["--site", *(site.name for site in SITES), "name those whose features"]),
    "no SAE": (lambda w, b: {"sae": None}, ["--sae", "expected a value"]),
    "missing model": (lambda w, b: {"model": b / "none"}, ["none"]),
    "missing cache": (lambda w, b: {"cache": b / "none"}, ["none", "manifest"]),
    "unfinished cache": (lambda w, b: {"cache": b / "unfinished"}, ["no manifest", "finish `fpo precompute`"]),
    "another format": (lambda w, b: {"cache": b / "future"}, ["format version 1", "99"]),
    "damaged cache": (lambda w, b: {"cache": b / "damaged"}, ["train-00001-of-00004.parquet"]),
    "another tokenizer": (lambda w, b: {"model": w.llama}, ["its tokenizer is not that of", "llama"]),
    "same model, another tokenizer": (lambda w, b: {"model": b / "gemma_with_another_tokenizer"}, ["tokenizer"]),
    "another cache's model": (lambda w, b: {"cache": b / "llama"}, ["tokenizer"]),
    "recipe": (lambda w, b: {"dtype": "bf16"}, ["--dtype", "fp32", "bf16"]),
    "method": (lambda w, b: {"method": "ipo"}, ["--method", "'ipo'"]),
    "no reference": (lambda w, b: {"method": "tdpo2", "reference": None}, ["--reference", "tdpo2"]),
    "another reference": (lambda w, b: {"method": "tdpo1", "reference": w.llama}, ["--reference", "llama"]),
    "missing reference": (lambda w, b: {"method": "tdpo1", "reference": b / "none"}, ["none"]),
    "site's spelling": (lambda w, b: {"site": "layer 2"}, ["'layer 2'"]),
    "site without an SAE": (lambda w, b: {"sae": w.saes[1]}, ["--sae", SITES[0].name, SITES[1].name]),
    "site that the cache lacks": (lambda w, b: {"site": "blocks.0.hook_resid_post"}, ["blocks.0", SITES[0].name]),
    "a site twice": (lambda w, b: {"site": (SITES[0].name, "model.layers.2")}, ["each once"]),
    "two SAEs a site": (lambda w, b: {"sae": (w.saes[0], b / "twin")}, ["one SAE a site"]),
    "another SAE": (lambda w, b: {"sae": b / "twin"}, ["another SAE", "twin"]),
    "top-k": (lambda w, b: {"cache": b / "few", "top_k": 9}, ["--top-k", "keeps 8", "found 9"]),
    "default top-k": (lambda w, b: {"cache": b / "few"}, ["--top-k", "keeps 8", "found 50"]),
    "unlike evaluation cache": (lambda w, b: {"eval_cache": b / "few"}, ["--eval-cache", "keep_features"]),
    "missing evaluation cache": (lambda w, b: {"eval_cache": b / "none"}, ["manifest"]),
    "nothing to resume": (lambda w, b: {"resume": True}, ["--resume", "no run.yaml"]),
    "batch size": (lambda w, b: {"batch_size": 7, "accumulation": 2}, ["--batch-size", "multiple", "found 7"]),
    "learning rate": (lambda w, b: {"lr": "inf"}, ["--lr", "finite"]),
    "schedule": (lambda w, b: {"lr_scheduler": "sometimes"}, ["sometimes"]),
    "tracker": (lambda w, b: {"report_to": "paper"}, ["paper"]),
    "max steps": (lambda w, b: {"max_steps": 0}, ["--max-steps", "'0'"]),
    "device": (lambda w, b: {"device": "gpu"}, ["--device", "'gpu'"]),
    # What would be ignored.
    "alpha with dpo": (lambda w, b: {"method": "dpo", "alpha": 1}, ["--alpha", "dpo ignores it"]),
    "alpha with tdpo1": (lambda w, b: {"method": "tdpo1", "alpha": 1}, ["--alpha", "tdpo1 ignores it"]),
    "gamma with fpo": (lambda w, b: {"gamma": 1}, ["--gamma", "fpo ignores it"]),
    "kl-beta with tdpo2": (lambda w, b: {"method": "tdpo2", "kl_beta": 1}, ["--kl-beta", "tdpo2 ignores it"]),
    "stop-gradient with dpo": (lambda w, b: {"method": "dpo", "stop_gradient": True}, ["stop-gradient", "dpo"]),
    "reference with fpo": (lambda w, b: {"reference": w.gemma}, ["--reference", "fpo ignores it"]),
    "reference with dpo": (lambda w, b: {"method": "dpo", "reference": w.gemma}, ["--reference", "dpo ignores it"]),
    "site with simpo": (lambda w, b: {"method": "simpo", "site": SITES[0].name}, ["--site", "simpo"]),
    "SAE with simpo": (lambda w, b: {"method": "simpo", "sae": w.saes[0]}, ["--sae", "simpo"]),
    "top-k with simpo": (lambda w, b: {"method": "simpo", "top_k": 9}, ["--top-k", "simpo"]),
    "merge without an adapter": (lambda w, b: {"merge": True}, ["--merge", "--lora-r"]),
    "evaluation steps without a cache": (lambda w, b: {"eval_steps": 1}, ["--eval-steps", "--eval-cache"]),
    "epochs beside max steps": (lambda w, b: {"epochs": 2, "max_steps": 1}, ["--epochs", "--max-steps"]),
}

TRAIN_SAE: dict[str, tuple[Change, list[str]]] = {
    "no site": (lambda w, b: {"site": None}, ["--site", "expected a value"]),
    "two sites": (lambda w, b: {"site": tuple(site.name for site in SITES)}, ["--site", "one site", "found 2"]),
    "layer": (lambda w, b: {"site": "blocks.4.hook_resid_post"}, ["blocks.4", "0 to 3"]),
    "hook": (lambda w, b: {"site": "blocks.1.hook_attn_out"}, ["hook_attn_out"]),
    "width": (lambda w, b: {"width": 0}, ["--width", "'0'"]),
    "tokens": (lambda w, b: {"tokens": 10}, ["tokens", "10"]),
    "data": (lambda w, b: {"dataset": b / "same.jsonl"}, ["two or more sequences"]),
}


@pytest.mark.parametrize("case", PRECOMPUTE)
def test_precompute_refuses(world, bad, tmp_path, case):
    change, parts = PRECOMPUTE[case]
    refused(world.precompute(tmp_path / "out", **change(world, bad)), *parts)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("case", ALIGN)
def test_align_refuses(world, bad, tmp_path, case):
    change, parts = ALIGN[case]
    refused(world.align(tmp_path / "out", **change(world, bad)), *parts)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("case", TRAIN_SAE)
def test_train_sae_refuses(world, bad, tmp_path, case):
    change, parts = TRAIN_SAE[case]
    options = {"model": world.gemma, "dataset": world.data, "site": SITES[0].name, "width": 96, "tokens": 600}
    options |= {"max_length": 64, "max_prompt_length": 32, "out": tmp_path / "out"}
    refused(fpo("train-sae", *to_arguments(options | change(world, bad))), *parts)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("command", ["precompute", "align", "train-sae"])
def test_a_command_without_options_asks_for_one(command):
    refused(fpo(command), "--model", "expected a value")


def test_another_model_of_the_same_tokenizer_is_refused_by_its_weights(world, tmp_path):
    other = shutil.copytree(world.gemma, tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    refused(world.align(tmp_path / "out", model=other), "its reference is not", "--allow-different-start")
    assert not (tmp_path / "out").exists()
    ran(world.align(tmp_path / "out", "--allow-different-start", model=other, max_steps=1))


def test_a_policy_that_fails_parity_leaves_nothing_and_the_folder_can_be_used(world, tmp_path, monkeypatch):
    from fpo.stages import models

    monkeypatch.setattr(models.ModelSource, "sha256", "0" * 64)  # as if the hashes were equal
    cache = shutil.copytree(world.cache, tmp_path / "cache")
    other = shutil.copytree(world.gemma, tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    shutil.rmtree(cache)
    ran(world.precompute(cache))
    refused(world.align(tmp_path / "out", model=other, cache=cache), "policy and cache differ")
    assert files(tmp_path / "out") == {}
    ran(world.align(tmp_path / "out", cache=cache, max_steps=1))


def test_a_folder_with_files_is_not_written_over(world, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    refused(world.align(tmp_path), "--out", "--resume")
    assert files(tmp_path) == {"note.txt": b"mine"}


def test_a_file_cannot_be_the_folder_to_write(world, tmp_path):
    (tmp_path / "out").write_text("mine")
    for result in (world.align(tmp_path / "out"), world.precompute(tmp_path / "out")):
        refused(result, str(tmp_path / "out"))
    assert files(tmp_path) == {"out": b"mine"}


def test_info_of_a_folder_without_a_cache_is_refused(tmp_path):
    refused(fpo("cache", "info", tmp_path), "no manifest")


def test_the_batch_is_shared_among_the_devices_of_a_launcher(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(world.align(tmp_path / "out"), "--batch-size", "(4)", "found 6")
