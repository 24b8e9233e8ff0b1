"""`fpo evaluate`: what it writes, that its numbers follow from its files, and what it refuses."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fpo.cache.reader import open_cache
from fpo.pipeline.commands import evaluate as module
from fpo.pipeline.commands.evaluate import run_evaluate
from fpo.pipeline.config import EvaluateConfig
from fpo.pipeline.config_files import load_config
from fpo.stages.model.models import find_model, load_model
from fpo.stages.model.sae import Site
from pairs import calm_gemma2, score_alone
from tiny import save_tiny_sae
from tiny_tokenizers import gemma
from tiny_world import SITES, World, files, ran, save_model, state_of

SAMPLING = {"prompts": 3, "samples": 3, "max_new_tokens": 6, "seed": 1}
ALWAYS = {"accuracy/raw", "accuracy/implicit", "margin/raw", "margin/implicit"}
OF_SAMPLES = {"diversity/entropy", "diversity/repetition", "length/mean", "length/finished"}
OF_KL = {"kl/chosen", "kl/rejected", "kl/margin"}
OF_FEATURES = {"features/mse_chosen", "features/mse_rejected", "features/mse_margin", "features/miss_rate"}
OF_SITES = {f"features/mse {site.name}" for site in SITES}
OF_BOUND = {"bound/violations", "bound/spectral_norm"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """Another model than the world's reference, with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("policy") / "trained", calm_gemma2, gemma(), seed=1)


def evaluate(out: Path, **options: Any) -> dict[str, Any]:
    """Runs the command; returns `metrics.json`, if there is one."""
    given = {name: value for name, value in options.items() if value is not None}
    values = {"out": str(out)} | ({"token_budget": "160"} if options.get("cache") else {})
    for name, value in given.items():  # as the command line gives them
        several = name in ("sae", "site")
        values[name] = list(map(str, value if isinstance(value, tuple) else (value,))) if several else str(value)
    config = load_config(EvaluateConfig, None, values, from_command_line=True)
    config.check_ready()
    run_evaluate(config)
    path = out / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def whole(world, policy, tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    """Everything that can be measured: its folder, its metrics and what was said."""
    out = tmp_path_factory.mktemp("whole") / "deep" / "out"
    options = {"model": policy, "cache": world.eval_cache, "reference": world.gemma, "method": "fpo", "top_k": 8}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = evaluate(out, **options, sae=world.saes, site=tuple(site.name for site in SITES), **SAMPLING)
    return out, found, said.getvalue()


def table(out: Path, name: str) -> dict[str, np.ndarray]:
    return {column: np.array(values) for column, values in pq.read_table(out / name).to_pydict().items()}


def test_the_folder_holds_the_metrics_and_what_they_were_computed_from(world, policy, whole):
    out, found, _ = whole
    assert {path.name for path in out.iterdir()} == {
        *("metrics.json", "pairs.parquet", "run.yaml", "samples.jsonl", "tokens.parquet")
    }
    assert found["metrics"].keys() == ALWAYS | OF_SAMPLES | OF_KL | OF_FEATURES | OF_SITES | OF_BOUND
    manifest = open_cache(world.eval_cache).manifest
    assert (found["pairs"], found["model_sha256"]) == (manifest.num_pairs, find_model(str(policy)).sha256)
    record = yaml.safe_load((out / "run.yaml").read_text())
    assert found["cache_fingerprint"] == record["cache_fingerprint"] == manifest.meaning.fingerprint()
    assert (record["model"], record["samples"]) == (str(policy), 3)


def test_every_mean_follows_from_the_files(whole):
    out, found, _ = whole
    pairs, tokens = table(out, "pairs.parquet"), table(out, "tokens.parquet")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    raw = pairs["chosen_logp"] / pairs["chosen_tokens"] - pairs["rejected_logp"] / pairs["rejected_tokens"]
    gains = [(pairs[f"{s}_logp"] - pairs[f"{s}_ref_logp"]) / pairs[f"{s}_tokens"] for s in ("chosen", "rejected")]
    norm = found["metrics"]["bound/spectral_norm"]["mean"]
    expected = {
        "accuracy/raw": raw > 0,
        "accuracy/implicit": gains[0] > gains[1],
        "margin/raw": raw,
        "margin/implicit": gains[0] - gains[1],
        "diversity/entropy": [-sample["logp"] / sample["tokens"] for sample in samples],
        "diversity/repetition": np.zeros(len(samples)),  # no answer of six tokens says four of them twice here
        "length/mean": [sample["tokens"] for sample in samples],
        "length/finished": [sample["finished"] for sample in samples],
        "features/miss_rate": np.zeros(len(raw)),  # the world's caches keep all features
        "bound/violations": tokens["kl"] > norm**2 / 2 * tokens["feature_sq"],
        "bound/spectral_norm": [norm],
    }
    for column, name in (("kl", "kl/"), ("mse", "features/mse_")):
        for side in ("chosen", "rejected"):
            expected[f"{name}{side}"] = pairs[f"{column}_{side}"]
        expected[f"{name}margin"] = pairs[f"{column}_rejected"] - pairs[f"{column}_chosen"]
    for site in SITES:
        sides = [pairs[f"mse_{side}@{site.name}"] for side in ("chosen", "rejected")]
        expected[f"features/mse {site.name}"] = (sides[0] + sides[1]) / 2
    assert expected.keys() == found["metrics"].keys()
    for name, values in expected.items():
        estimate = found["metrics"][name]
        assert estimate["mean"] == pytest.approx(np.mean(values), rel=1e-6, abs=1e-12), name
        if name != "bound/spectral_norm":
            assert estimate["low"] <= estimate["mean"] <= estimate["high"], name
            assert estimate["n"] == (3 if name in OF_SAMPLES else found["pairs"]), name
    assert len(tokens["kl"]) == pairs["chosen_tokens"].sum() + pairs["rejected_tokens"].sum()


def test_pairs_are_those_of_the_cache_under_policy_and_reference(world, policy, whole):
    pairs = table(whole[0], "pairs.parquet")
    cache = open_cache(world.eval_cache)
    models = [load_model(find_model(str(name)), attention="eager", device="cpu") for name in (policy, world.gemma)]
    assert pairs["pair_id"].tolist() == [cache[number].pair.pair_id for number in range(len(cache))]
    with torch.no_grad():
        for number in range(2):
            own, held = (score_alone(model, cache[number].pair) for model in models)
            for offset, side in enumerate(("chosen", "rejected")):
                ref_logps = held[offset].logps_TV.double()
                kl = (ref_logps.exp() * (ref_logps - own[offset].logps_TV.double())).sum()
                assert pairs[f"kl_{side}"][number] == pytest.approx(float(kl), rel=1e-4)
                logp = own[offset].token_logps_T.double().sum()
                assert pairs[f"{side}_logp"][number] == pytest.approx(float(logp), rel=1e-5)


def test_samples_stand_beside_their_prompts(world, whole):
    lines = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    for first in range(0, 9, 3):
        assert len({line["prompt"] for line in lines[first : first + 3]}) == 1
    for line in lines:
        assert line["prompt"].startswith("<bos><start_of_turn>user")
        assert line["prompt"].endswith("<start_of_turn>model\n")
        assert not any(special in line["sample"] for special in ("<bos>", "<eos>", "_of_turn>"))
        assert line["finished"] or line["tokens"] == SAMPLING["max_new_tokens"]


def test_a_table_says_every_metric_with_its_interval(whole):
    _, found, said = whole
    for name, estimate in found["metrics"].items():
        line = next(line for line in said.splitlines() if name in line)
        assert f"{estimate['mean']:.4g}" in line
        if "low" in estimate:
            assert f"{estimate['low']:.4g} to {estimate['high']:.4g}" in line


def test_the_same_command_gives_the_same_metrics(world, policy, tmp_path):
    options = {"model": policy, "cache": world.eval_cache, **SAMPLING}
    evaluate(tmp_path / "one", **options)
    evaluate(tmp_path / "two", **options)
    for name in ("metrics.json", "samples.jsonl", "pairs.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_method_says_whether_implicit_accuracy_is_per_token(world, policy, tmp_path):
    found = {
        method: evaluate(tmp_path / method, model=policy, cache=world.cache, method=method, prompts=0)["metrics"]
        for method in ("dpo", "fpo")
    }
    pairs = table(tmp_path / "dpo", "pairs.parquet")
    gains = [pairs[f"{side}_logp"] - pairs[f"{side}_ref_logp"] for side in ("chosen", "rejected")]
    by_token = [gain / pairs[f"{side}_tokens"] for gain, side in zip(gains, ("chosen", "rejected"), strict=True)]
    assert found["dpo"]["accuracy/implicit"]["mean"] == np.mean(gains[0] > gains[1])
    assert found["fpo"]["accuracy/implicit"]["mean"] == np.mean(by_token[0] > by_token[1])
    assert found["dpo"].keys() == ALWAYS
    assert {path.name for path in (tmp_path / "dpo").iterdir()} == {"metrics.json", "pairs.parquet", "run.yaml"}


def test_the_reference_itself_has_no_implicit_accuracy_and_no_distance(world, tmp_path):
    options = {"cache": world.eval_cache, "reference": world.gemma, "sae": world.saes[0], "site": SITES[0].name}
    found = evaluate(tmp_path / "out", model=world.gemma, prompts=0, **options)["metrics"]
    assert found.keys() == {"accuracy/raw", "margin/raw"} | OF_KL | OF_FEATURES | OF_BOUND
    assert all(found[name]["mean"] == 0 for name in (*OF_KL, "bound/violations"))
    assert found["features/mse_chosen"]["mean"] < 1e-9


def test_the_bound_is_measured_at_the_deepest_site(world, policy, tmp_path, monkeypatch):
    sites = []
    measure = module.token_bound
    monkeypatch.setattr(module, "token_bound", lambda *args, **kw: sites.append(args[3].site) or measure(*args, **kw))
    monkeypatch.setattr(module, "BOUND_PAIRS", 2)
    options = {"model": policy, "cache": world.eval_cache, "reference": world.gemma, "prompts": 0}
    found = evaluate(tmp_path / "out", sae=world.saes, site=(SITES[0].name, SITES[1].name), **options)
    assert sites == [Site(2, "resid_post")] == [max(SITES)]
    assert found["metrics"]["bound/violations"]["n"] == 2


def test_fewer_prompts_than_asked_for_are_said(world, policy, tmp_path):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = evaluate(tmp_path / "out", model=policy, cache=world.eval_cache, samples=1, max_new_tokens=2)
    count = found["metrics"]["diversity/entropy"]["n"]
    assert f"--prompts: the cache has {count} distinct prompts" in said.getvalue()


# Answers to a benchmark


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.json"
    asked = [{"instruction": f"What is the capital of {name}?", "dataset": "test"} for name in ("France", "Spain")]
    path.write_text(json.dumps(asked))
    return path


def test_without_a_cache_only_the_answers_are_written(policy, tmp_path, questions):
    options = {"outputs": "alpaca-eval", "questions": questions, "max_new_tokens": 5}
    assert evaluate(tmp_path / "out", model=policy, **options) == {}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"answers-alpaca-eval.json", "run.yaml"}
    answers = json.loads((tmp_path / "out" / "answers-alpaca-eval.json").read_text())
    assert [answer["generator"] for answer in answers] == ["trained", "trained"]
    assert [answer["instruction"] for answer in answers] == [
        q["instruction"] for q in json.loads(questions.read_text())
    ]


def test_answers_and_metrics_can_be_had_together(world, policy, tmp_path, questions):
    options = {"outputs": "alpaca-eval", "questions": questions, "max_new_tokens": 5, "prompts": 0}
    found = evaluate(tmp_path / "out", model=policy, cache=world.eval_cache, **options)
    assert found["metrics"].keys() == ALWAYS
    assert (tmp_path / "out" / "answers-alpaca-eval.json").exists()


# Refusals


@pytest.fixture(scope="module")
def bad(world, tmp_path_factory) -> Path:
    """Things that do not fit the world."""
    folder = tmp_path_factory.mktemp("bad")
    save_tiny_sae(folder / "twin", 32, 64, 3, "jumprelu", SITES[0])
    ran(world.precompute(folder / "few", keep_features=8, sae=world.saes[0], dataset=world.heldout, split="test"))
    shutil.copytree(world.eval_cache, folder / "unfinished")
    (folder / "unfinished" / "manifest.json").unlink()
    asked = {"instruction": "What is the capital of France?", "dataset": "test"}
    (folder / "questions.json").write_text(json.dumps([asked]))
    (folder / "greedy.jsonl").write_text(json.dumps({"uid": "1", "prompt": "What is the capital of France?"}))
    return folder


def features(world: World, **changes: Any) -> dict[str, Any]:
    return {"sae": world.saes[0], "site": SITES[0].name, **changes}


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "no model": (lambda w, b: {"model": None}, ["--model", "expected a value"]),
    "missing model": (lambda w, b: {"model": b / "none"}, ["none"]),
    "nothing to do": (lambda w, b: {"cache": None}, ["--cache", "--outputs"]),
    "missing cache": (lambda w, b: {"cache": b / "none"}, ["manifest"]),
    "unfinished cache": (lambda w, b: {"cache": b / "unfinished"}, ["found no manifest.json"]),
    "another tokenizer": (lambda w, b: {"model": w.llama}, ["its tokenizer is not that of", "llama"]),
    "recipe": (lambda w, b: {"dtype": "bf16"}, ["--dtype", "fp32", "bf16"]),
    "another reference": (lambda w, b: {"reference": w.llama}, ["--reference", "llama"]),
    "missing reference": (lambda w, b: {"reference": b / "none"}, ["none"]),
    "no site": (lambda w, b: {"sae": w.saes[0]}, ["--site", SITES[0].name, SITES[1].name]),
    "site that the cache lacks": (lambda w, b: features(w, site="blocks.0.hook_resid_post"), ["blocks.0"]),
    "site without an SAE": (lambda w, b: features(w, sae=w.saes[1]), ["--sae", SITES[0].name]),
    "another SAE": (lambda w, b: features(w, sae=b / "twin"), ["another SAE", "twin"]),
    "top-k": (lambda w, b: features(w, cache=b / "few", top_k=9), ["--top-k", "keeps 8", "found 9"]),
    "context": (lambda w, b: {"prompts": 1, "max_new_tokens": 512}, ["--max-new-tokens", "512 tokens"]),
    "greedy diversity": (lambda w, b: {"temperature": 0, "prompts": 1}, ["--temperature", "--prompts 0"]),
    "negative seed": (lambda w, b: {"seed": -1, "prompts": 1, "max_new_tokens": 4}, ["seed", "-1"]),
    "outputs without questions": (lambda w, b: {"outputs": "mt-bench"}, ["--questions"]),
    "questions without outputs": (lambda w, b: {"questions": b / "questions.json"}, ["--outputs"]),
    "missing questions": (lambda w, b: {"outputs": "mt-bench", "questions": b / "none"}, ["questions", "none"]),
    "other questions": (
        lambda w, b: {"outputs": "mt-bench", "questions": b / "questions.json"},
        ["questions.json", "mt-bench"],
    ),
    # What would be ignored.
    "method of the reference": (lambda w, b: {"model": w.gemma, "method": "dpo"}, ["--method", "not defined"]),
    "site without SAE": (lambda w, b: {"site": SITES[0].name}, ["--site", "without --sae"]),
    "top-k without SAE": (lambda w, b: {"top_k": 8}, ["--top-k", "without --sae"]),
    **{
        f"{name} without sampling": (
            lambda w, b, name=name, value=value: {"prompts": 0, name: value},
            [f"--{name.replace('_', '-')}", "--prompts 0"],
        )
        for name, value in (
            *(("samples", 2), ("max_new_tokens", 9), ("temperature", 0.5), ("top_p", 0.5)),
            *(("generation_batch", 2), ("seed", 1)),
        )
    },
    **{
        f"{name} without a cache": (
            lambda w, b, name=name, value=value: {
                **{"cache": None, "prompts": None},
                **{"outputs": "alpaca-eval", "questions": b / "questions.json", name: value(w)},
            },
            [f"--{name.replace('_', '-')}", "without --cache"],
        )
        for name, value in (
            *(("trust_hashes", lambda w: True), ("method", lambda w: "dpo"), ("reference", lambda w: w.gemma)),
            *(("sae", lambda w: w.saes[0]), ("site", lambda w: SITES[0].name), ("top_k", lambda w: 5)),
            *(("token_budget", lambda w: 64), ("prompts", lambda w: 5), ("samples", lambda w: 5)),
        )
    },
    "nucleus of greedy answers": (
        lambda w, b: {"outputs": "alpaca-eval", "questions": b / "questions.json", "temperature": 0, "top_p": 0.9},
        ["--top-p", "temperature 0"],
    ),
    "seed of a benchmark's greedy answers": (
        lambda w, b: {"outputs": "arena-hard", "questions": b / "greedy.jsonl", "seed": 1},
        ["--seed", "temperature 0"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_evaluate_refuses_in_one_line_before_it_writes(world, bad, policy, tmp_path, case):
    change, parts = REFUSED[case]
    options = {"model": policy, "cache": world.eval_cache, "prompts": 0} | change(world, bad)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        evaluate(tmp_path / "out", **options)
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    assert files(tmp_path) == {}
    assert not (tmp_path / "out").exists()


# Interrupted, and two at once.

STOPS = (
    "write_benchmark_answers",
    "measure_policy",
    "token_bound",
    "sample_answers",
    "_print_metrics",
    "mark_finished",
)


@pytest.mark.parametrize("where", STOPS)
def test_an_interrupted_evaluation_starts_over_by_the_same_command(world, bad, policy, tmp_path, monkeypatch, where):
    options = {"model": policy, "cache": world.eval_cache, "reference": world.gemma, **features(world), **SAMPLING}
    options |= {"outputs": "alpaca-eval", "questions": bad / "questions.json"}
    real = getattr(module, where)

    def stop(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, where, stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path / "out", **options)
    assert (tmp_path / "out" / "metrics.json").exists() == (where in STOPS[-2:])
    (tmp_path / "out" / "note.txt").write_text("mine")
    before = files(tmp_path)
    if where != "mark_finished":
        for changed in ({"seed": 2}, {"model": world.gemma}, {"cache": world.cache}):
            with pytest.raises(
                ValueError, match=r"\A--out: expected the settings of the interrupted[^\n]*was [^\n]*\Z"
            ):
                evaluate(tmp_path / "out", **(options | changed))
            assert files(tmp_path) == before
        evaluate(tmp_path / "out", **options)
    evaluate(tmp_path / "whole", **options)
    found, expected = files(tmp_path / "out"), files(tmp_path / "whole")
    assert found.pop("note.txt") == b"mine"
    records = [yaml.safe_load(record.pop("run.yaml")) | {"out": None} for record in (found, expected)]
    assert records[0] == records[1] and "finished" in records[0]
    for name in expected:  # answers carry the time at which they were written
        assert name in found and (name.startswith("answers") or found[name] == expected[name])
    assert found.keys() == expected.keys()


def test_a_finished_evaluation_is_not_made_again(world, policy, tmp_path):
    options = {"model": policy, "cache": world.eval_cache, "prompts": 0}
    evaluate(tmp_path / "out", **options)
    before = state_of(tmp_path / "out")
    with pytest.raises(ValueError, match=r"\A--out: expected a new or empty folder, found files"):
        evaluate(tmp_path / "out", **options)
    assert state_of(tmp_path / "out") == before


def test_a_second_evaluation_into_the_same_folder_is_refused_while_the_first_runs(world, policy, tmp_path, monkeypatch):
    options = {"model": policy, "cache": world.eval_cache, "prompts": 0}
    real, refused = module._measure_pairs, []

    def measure(*args: Any, **kwargs: Any) -> Any:
        if not refused:
            with pytest.raises(ValueError, match=r"\A--out: another run is writing into [^\n]*\Z") as caught:
                evaluate(tmp_path / "out", **options)
            refused.append(caught)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "_measure_pairs", measure)
    found = evaluate(tmp_path / "out", **options)
    assert refused and found["pairs"] == 7


def test_a_folder_of_another_command_is_left_alone(world, policy, tmp_path):
    ran(world.align(tmp_path / "run", method="dpo", max_steps=1))
    before = state_of(tmp_path / "run")
    with pytest.raises(ValueError, match="--out: expected a new or empty folder, found files"):
        evaluate(tmp_path / "run", model=policy, cache=world.eval_cache, prompts=0)
    assert state_of(tmp_path / "run") == before


def test_a_folder_with_files_and_a_file_are_left_alone(world, policy, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(ValueError, match="--out: expected a new or empty folder"):
            evaluate(out, model=policy, cache=world.eval_cache, prompts=0)
    assert files(tmp_path) == {"note.txt": b"mine"}
