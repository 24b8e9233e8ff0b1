"""Adapters: options of LoRA, adapters evaluated as they are, merged afterwards, and the cards of what was trained."""

import json
import math
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from fpo.cache.reader import open_cache
from fpo.stages.model.adapters import AdapterSource, find_policy
from fpo.stages.train.model_card import model_card
from huggingface_hub import ModelCard
from pairs import calm_gemma2, score_alone
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from tiny_tokenizers import gemma
from tiny_world import SITES, files, fpo, losses, ran, save_model, to_arguments, write_rows
from transformers import AutoTokenizer, Gemma2ForCausalLM

LOG_2 = pytest.approx(math.log(2), rel=1e-6)
SETTINGS = {"lora_r": 4, "lora_alpha": 6, "lora_targets": ("q_proj", "down_proj"), "epochs": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """An adapter in two kinds of modules, of another α than the default."""
    run = tmp_path_factory.mktemp("lora") / "run"
    ran(world.align(run, **SETTINGS))
    return run


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    ran(fpo("merge", run, "--out", out))
    return out


@pytest.fixture
def copied(run, tmp_path) -> Callable[..., Path]:
    """A copy of the adapter with another configuration."""

    def copy(**changes: Any) -> Path:
        shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
        path = tmp_path / "copy" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / "copy"

    return copy


def measured(world: Any, model: Path, out: Path) -> dict[str, Any]:
    """What `fpo evaluate` of held-out pairs says."""
    ran(fpo("evaluate", "--model", model, "--cache", world.eval_cache, "--prompts", 0, "--out", out))
    return json.loads((out / "metrics.json").read_text())


def test_options_of_lora_are_those_of_the_adapter(run, world, tmp_path):
    found = json.loads((run / "adapter_config.json").read_text())
    assert (found["r"], found["lora_alpha"], found["lora_dropout"]) == (4, 6, 0.0)
    assert set(found["target_modules"]) == {"q_proj", "down_proj"}
    names = {name.split(".")[-3] for name in load_file(run / "adapter_model.safetensors")}
    assert names == {"q_proj", "down_proj"}
    assert losses(run)[0] == LOG_2
    ran(world.align(tmp_path / "run", lora_r=3, max_steps=1))
    found = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (found["lora_alpha"], found["lora_dropout"]) == (6, 0.0)
    assert "lm_head" not in found["target_modules"]
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} == set(found["target_modules"])


def test_dropout_acts_in_training_alone(world, run, tmp_path):
    ran(world.align(tmp_path / "run", lora_dropout=0.5, **SETTINGS))
    assert losses(tmp_path / "run")[0] == LOG_2  # a new adapter adds 0
    assert losses(tmp_path / "run")[1:] != losses(run)[1:]
    for out in ("first", "second"):
        measured(world, tmp_path / "run", tmp_path / out)
    tables = [pq.read_table(tmp_path / out / "pairs.parquet") for out in ("first", "second")]
    assert tables[0].equals(tables[1])


def test_a_merged_adapter_is_the_base_model_plus_the_scaled_product(world, run, merged):
    adapter, found = load_file(run / "adapter_model.safetensors"), load_file(merged / "model.safetensors")
    base, changed = load_file(world.gemma / "model.safetensors"), 0
    assert found.keys() == base.keys()
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{stem}.lora_A.weight" in adapter:
            expected = weight + 6 / 4 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            changed += 1
            assert not torch.equal(found[name], weight)
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-6)
    assert changed == 2 * 4
    assert AutoTokenizer.from_pretrained(merged).chat_template == AutoTokenizer.from_pretrained(run).chat_template


def test_merging_afterwards_gives_what_merging_in_the_run_gives(world, merged, tmp_path):
    ran(world.align(tmp_path / "run", "--merge", **SETTINGS))
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert not list(merged.glob("adapter*"))


def test_an_adapter_is_evaluated_as_its_model_with_it(world, run, merged, tmp_path):
    sampling = {"prompts": 2, "samples": 2, "max_new_tokens": 5}
    options = {"cache": world.eval_cache, "reference": world.gemma, "sae": world.saes[0], "site": SITES[0].name}
    for name, model in (("adapter", run), ("merged", merged)):
        ran(fpo("evaluate", *to_arguments(options | sampling | {"model": model, "out": tmp_path / name})))
    found, expected = (pq.read_table(tmp_path / name / "pairs.parquet").to_pydict() for name in ("adapter", "merged"))
    assert found.keys() == expected.keys() and {"kl_chosen", "mse_chosen"} <= found.keys()
    for name in found.keys() - {"pair_id"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    assert (tmp_path / "adapter" / "samples.jsonl").exists()
    cache = open_cache(world.eval_cache, sites=[])
    model = AutoPeftModelForCausalLM.from_pretrained(run).get_base_model()
    model.set_attn_implementation("eager")
    for i, logp in enumerate(found["chosen_logp"]):
        with torch.no_grad():
            chosen, _ = score_alone(model, cache[i].pair, [])
        assert logp == pytest.approx(float(chosen.token_logps_T.double().sum()), abs=1e-4)
    assert max(map(abs, map(float.__sub__, found["chosen_logp"], found["chosen_ref_logp"]))) > 1e-2


def test_an_adapter_s_hash_is_that_of_what_it_computes_and_not_of_where_it_lies(world, run, copied, tmp_path):
    record = measured(world, run, tmp_path / "out")["model_sha256"]
    assert record == find_policy(str(run)).sha256
    shutil.copytree(world.gemma, tmp_path / "base")
    copy = copied(base_model_name_or_path=str(tmp_path / "base"))
    assert find_policy(str(copy)).sha256 == find_policy(str(run), base=str(world.gemma)).sha256 == record
    weights = load_file(copy / "adapter_model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, copy / "adapter_model.safetensors")
    other = find_policy(str(copy))
    assert isinstance(other, AdapterSource) and other.sha256 != record


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 3}, "--lora-alpha: there is no adapter without --lora-r"),
        ({"lora_dropout": 0.1}, "--lora-dropout: there is no adapter without --lora-r"),
        ({"lora_targets": "q_proj"}, "--lora-targets: there is no adapter without --lora-r"),
        ({"merge": True}, "--merge: there is no adapter without --lora-r"),
        ({"lora_r": 2, "lora_targets": ("q_proj", "query")}, "--lora-targets: expected names of modules .* 'query'"),
        ({"lora_r": 2, "lora_targets": "input_layernorm"}, "--lora-targets: PEFT cannot put an adapter there: .*Norm"),
        ({"lora_r": 2, "lora_dropout": 1}, "--lora-dropout: .*less than 1"),
        ({"lora_r": 2, "lora_alpha": 0}, "--lora-alpha: .*greater than 0"),
    ],
)
def test_options_that_cannot_be_are_refused(world, tmp_path, options, message):
    result = world.align(tmp_path / "run", method="dpo", **options)
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("fpo:"))
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


Change = Callable[[Callable[..., Path], Any, Path], dict[str, Any]]
UNUSABLE: dict[str, tuple[Change, str]] = {
    "base is gone": (lambda c, w, t: {"model": c(base_model_name_or_path="/gone/base")}, "/gone/base; or give --base"),
    "no base": (lambda c, w, t: {"model": c(base_model_name_or_path=None)}, "names no base model; give --base"),
    "another base": (
        lambda c, w, t: {"model": c(), "base": save_model(t / "other", calm_gemma2, gemma(), seed=1)},
        "--base: expected the model that the adapter .* was trained on",
    ),
    "another size": (
        lambda c, w, t: {
            "model": without_record(c()),
            "base": save_model(t / "other", calm_gemma2, gemma(), num_hidden_layers=3),
        },
        "PEFT cannot put it into .*other",
    ),
    "weights are missing": (
        lambda c, w, t: {"model": cut(c())},
        "in the file or in the model alone, such as base_model",
    ),
    "another kind": (lambda c, w, t: {"model": c(peft_type="IA3")}, "expected a LoRA adapter, found peft_type 'IA3'"),
    "a pickle": (lambda c, w, t: {"model": pickled(c())}, "expected adapter_model.safetensors"),
    "not finite": (lambda c, w, t: {"model": spoilt(c())}, "expected finite weights"),
    "base of a model": (lambda c, w, t: {"model": w.gemma, "base": w.gemma}, "--base: .* is a model, not an adapter"),
}


def without_record(copy: Path) -> Path:
    (copy / "run.yaml").unlink()
    return copy


def cut(copy: Path) -> Path:
    weights = load_file(copy / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, copy / "adapter_model.safetensors")
    return copy


def spoilt(copy: Path) -> Path:
    weights = load_file(copy / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, copy / "adapter_model.safetensors")
    return copy


def pickled(copy: Path) -> Path:
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    return copy


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_adapter_that_cannot_be_used_is_one_line(world, copied, tmp_path, case):
    change, message = UNUSABLE[case]
    options = change(copied, world, tmp_path)
    before = files(tmp_path)
    base = ["--base", options["base"]] if "base" in options else []
    evaluate = ["evaluate", "--model", options["model"], "--cache", world.eval_cache, "--prompts", 0]
    for command in (evaluate, ["merge", options["model"]]):
        result = fpo(*command, *base, "--out", tmp_path / "out")
        assert result.exit_code in (1, 2)
        (line,) = (line for line in result.stderr.splitlines() if line.startswith("fpo:"))
        assert re.search(message, line), line
        assert files(tmp_path) == before


def test_what_needs_a_model_says_how_to_merge_an_adapter(world, run, tmp_path):
    for result in (
        world.precompute(tmp_path / "out", model=run),
        world.align(tmp_path / "out", method="dpo", model=run),
        fpo("sft", "--model", run, "--dataset", world.data, "--out", tmp_path / "out"),
    ):
        assert result.exit_code == 2
        assert f"merge it into its model with `fpo merge {run} --out MODEL`" in result.stderr
    result = fpo("merge", world.gemma, "--out", tmp_path / "out")
    assert (result.exit_code, "found a model; it can be used as it is" in result.stderr) == (2, True)
    result = fpo("merge", run, "--out", run)
    assert (result.exit_code, "--out: expected a new or empty folder" in result.stderr) == (2, True)


# Cards.


@pytest.fixture(scope="module")
def cards(world, run, merged, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cards")
    ran(world.align(folder / "whole", method="dpo", max_steps=1))
    pairs = [json.loads(line) for line in world.heldout.read_text().splitlines()]
    chats = write_rows(folder / "chat.jsonl", [{"messages": pair["chosen"]} for pair in pairs])
    options = {"model": world.gemma, "dataset": chats, "split": "train", "max_steps": 1, "out": folder / "sft"}
    ran(fpo("sft", *to_arguments(options | {"max_length": 64, "warmup_steps": 0})))
    return {"adapter": run, "merged": merged, "model": folder / "whole", "sft": folder / "sft"}


@pytest.mark.parametrize("name", ["adapter", "merged", "model", "sft"])
def test_the_card_says_what_was_trained_and_leaves_no_blank(world, cards, name):
    text = (cards[name] / "README.md").read_text()
    assert "More Information Needed" not in text
    data = ModelCard(text).data
    assert data.library_name == ("peft" if name == "adapter" else "transformers")
    assert data.pipeline_tag == "text-generation"
    assert {"fpo", "sft" if name == "sft" else "preference-optimization"} <= set(data.tags)
    assert data.license is None and data.base_model is None  # a path is none that a hub knows
    assert str(world.gemma) in text and "adamw_torch_fused" in text
    if name != "sft":
        assert open_cache(world.cache, sites=[]).manifest.meaning.fingerprint() in text
    if name in ("adapter", "merged"):
        assert "fpo, beta = 0.1, alpha = 0.5" in text and "r = 4, α = 6" in text and "down_proj, q_proj" in text
    for checkpoint in cards[name].glob("checkpoint-*"):
        assert (checkpoint / "README.md").read_text() == text


def test_a_card_names_a_base_model_of_the_hub_in_its_header():
    data = ModelCard(model_card("google/gemma-2-2b", {"method": "fpo"}, adapter=True)).data
    assert (data.base_model, data.library_name) == ("google/gemma-2-2b", "peft")


def test_the_code_on_a_card_loads_what_it_lies_beside(cards, tmp_path):
    for name, folder in cards.items():
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        (tmp_path / "use.py").write_text(code.replace("FOLDER", str(folder)))
        found = runpy.run_path(str(tmp_path / "use.py"))
        ids = found["tokenizer"]("What is the capital?", return_tensors="pt").input_ids
        model = found["model"]
        assert type(model.get_base_model() if name == "adapter" else model) is Gemma2ForCausalLM
        assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
