"""NaN and infinity stop what computes with them and name pairs, site and step; a cache that holds them is not read."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_rows import forge
from click.testing import Result
from fpo.cache.reader import open_cache
from fpo.cache.schema import CachedPair, SparseFeatures, pair_id
from fpo.stages.model.models import find_model
from fpo.stages.model.tokenizer import load_tokenizer
from fpo.stages.train.align import FPOTrainer
from safetensors.torch import load_file, save_file
from tiny_world import LIMITS, SITES, World, files, fpo, ran, to_arguments, write_rows
from transformers import AutoModelForCausalLM

NAME = r"[0-9a-f]{16}-\d+"
LAYER = "model.layers.1.mlp.up_proj.weight"
HEAD = "model.norm.weight"
EMBEDDINGS = "model.embed_tokens.weight"


def stopped(result: Result, *parts: str) -> str:
    """Checks that numbers that are not finite stopped a command with one line, and returns it."""
    said = [line for line in result.stderr.splitlines() if line.startswith("fpo: ")]
    assert (result.exit_code, len(said)) == (1, 1), result.output
    for part in parts:
        assert re.search(part, said[0]), said[0]
    return said[0]


@pytest.fixture
def for_long(tries) -> Callable[[bool], None]:
    """Leaves a case to the long version."""
    return lambda case: None if tries(0, 1) or not case else pytest.skip("in the long version")


def broken(world: World, folder: Path, change: Callable[[Any], None]) -> Path:
    """The world's model with a change to its weights; head and embeddings are two, so that each can be changed."""
    model = AutoModelForCausalLM.from_pretrained(world.gemma, tie_word_embeddings=False)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    with torch.no_grad():
        change(model)
    shutil.copytree(world.gemma, folder)
    model.save_pretrained(folder)
    return folder


def one_weight(name: str, value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_parameter(name).flatten()[5] = value

    return change


def overflow(model: Any) -> None:
    """Two factors that are finite and whose product is not."""
    model.get_parameter("model.layers.2.mlp.down_proj.weight").mul_(1e38)
    model.get_parameter("model.layers.2.mlp.up_proj.weight").mul_(1e38)


WEIGHTS = {
    "NaN in a layer": one_weight(LAYER, math.nan),
    "NaN in the last norm": one_weight(HEAD, math.nan),
    "NaN in the head": one_weight("lm_head.weight", math.nan),
    "overflow": overflow,
}


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_are_not_finite_stop_stage_one(world, tmp_path, tally, for_long, what, recipe):
    for_long(recipe == "bf16" and what != "overflow")
    model = broken(world, tmp_path / "model", WEIGHTS[what])
    result = world.precompute(tmp_path / "out", model=model, dtype=recipe)
    said = stopped(result, rf"fpo: pairs? {NAME}.*: not finite: (log-probabilities|pooled features at blocks)")
    assert (SITES[0].name in said) == (what in ("NaN in a layer", "overflow"))
    assert not list((tmp_path / "out").rglob("*.parquet")) + list((tmp_path / "out").glob("manifest.json"))
    tally("numbers that are not finite, caught")


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.3.self_attn.q_proj.weight", LAYER])
def test_an_infinite_weight_that_soft_capping_would_hide_stops_every_command(
    world, tmp_path, tally, for_long, name, value
):
    for_long((name, value) != ("lm_head.weight", math.inf))
    model = broken(world, tmp_path / "model", one_weight(name, value))
    out = tmp_path / "out"
    for result in (
        world.precompute(out, model=model),
        world.align(out, "--allow-different-start", model=model),
        evaluate(world, out, model),
        sft(world, tmp_path, model=model),
    ):
        stopped(result, rf"fpo: model {model}: expected finite weights, found 1 with infinities, such as {name}")
        tally("numbers that are not finite, caught")
    assert not out.exists()


def pairs_with(world: World, token: int) -> list[str]:
    """Pairs of the world's cache in which something is predicted from this token."""
    cache = open_cache(world.cache, sites=[])
    pairs = [cache[i].pair for i in range(len(cache))]
    reads = [np.concatenate([p.prompt_ids, p.chosen_ids[:-1], p.rejected_ids[:-1]]) for p in pairs]
    return [pair.pair_id for pair, ids in zip(pairs, reads, strict=True) if token in ids]


def rare_token(world: World) -> tuple[int, list[str]]:
    """A token of some pairs, but of fewer than are named one by one, and those pairs."""
    for token in range(100, len(load_tokenizer(find_model(str(world.gemma))))):
        if 2 <= len(pairs_with(world, token)) <= 3:
            return token, pairs_with(world, token)
    raise AssertionError("no token is in two or three pairs")


def no_embedding(token: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_parameter(EMBEDDINGS)[token] = math.nan

    return change


@pytest.mark.parametrize("command", ["precompute", "parity", "training", "evaluate"])
def test_a_pair_with_the_broken_token_is_named(world, tmp_path, monkeypatch, tally, command):
    token, expected = rare_token(world)
    model = broken(world, tmp_path / "model", no_embedding(token))
    if command == "precompute":
        result = world.precompute(tmp_path / "out", model=model, token_budget=1, shard_size=14)
    elif command == "evaluate":
        result = evaluate(world, tmp_path / "out", model, token_budget=1)
    else:
        if command == "training":
            monkeypatch.setattr(FPOTrainer, "_check_parity", lambda trainer: {})
        options = {"model": model, "batch_size": 12, "token_budget": 1}
        result = world.align(tmp_path / "out", "--allow-different-start", **options)
    (named,) = re.findall(NAME, stopped(result, "fpo: step 1, pair" if command == "training" else "pair"))
    assert named in expected
    tally("numbers that are not finite, caught")


def evaluate(world: World, out: Path, model: Path, **options: Any) -> Result:
    defaults = {"model": model, "cache": world.cache, "sae": world.saes, "site": SITES[0].name, "prompts": 0}
    return fpo("evaluate", *to_arguments(defaults | options | {"out": out}))


def test_of_many_pairs_a_few_are_named_and_the_others_counted(world, tmp_path):
    model = broken(world, tmp_path / "model", WEIGHTS["NaN in a layer"])
    result = world.precompute(tmp_path / "out", model=model, token_budget=10_000, shard_size=14)
    assert len(re.findall(NAME, stopped(result, "and 4 more"))) == 8


SAE_WEIGHTS = ("W_enc", "threshold", "b_enc", "b_dec")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", SAE_WEIGHTS)
def test_an_sae_that_is_not_finite_is_refused_by_both_stages(world, tmp_path, tally, for_long, name, value):
    for_long(value == math.inf)
    sae = shutil.copytree(world.saes[0], tmp_path / "sae")
    weights = load_file(sae / "sae_weights.safetensors")
    weights[name].flatten()[3] = value
    save_file(weights, sae / "sae_weights.safetensors")
    for result in (world.precompute(tmp_path / "a", sae=sae), world.align(tmp_path / "b", sae=sae)):
        assert (result.exit_code, f"of {name} are not finite in the SAE" in result.stderr) == (2, True), result.stderr
        tally("numbers that are not finite, caught")
    assert files(tmp_path / "a") == files(tmp_path / "b") == {}


def test_features_that_overflow_are_named_with_their_site(world, tmp_path, tally):
    sae = shutil.copytree(world.saes[1], tmp_path / "sae")
    weights = load_file(sae / "sae_weights.safetensors")
    weights["W_enc"] *= 3e38
    save_file(weights, sae / "sae_weights.safetensors")
    result = world.precompute(tmp_path / "out", sae=(world.saes[0], sae))
    said = stopped(result, rf"pairs? {NAME}.*: not finite: pooled features at {re.escape(SITES[1].name)}")
    assert SITES[0].name not in said
    tally("numbers that are not finite, caught")


# Training.


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_are_not_finite_stop_stage_two_before_its_first_step(world, tmp_path, tally, for_long, what):
    for_long(what != "NaN in the head")
    model = broken(world, tmp_path / "model", WEIGHTS[what])
    result = world.align(tmp_path / "out", "--allow-different-start", model=model)
    stopped(result, rf"before the first step: pairs? {NAME}.*: not finite: ")
    assert files(tmp_path / "out") == {}
    tally("numbers that are not finite, caught")


class Fault:
    """A number of one step that is replaced by another: of a pair's loss, or of the gradient alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, value: float, where: str) -> None:
        self.pairs: list[str] = []
        real = FPOTrainer.row_loss

        def row_loss(trainer: FPOTrainer, model: Any, row: Any) -> torch.Tensor:
            loss = real(trainer, model, row)
            if trainer.state.global_step != step:
                return loss
            self.pairs += row.names
            if where == "loss":
                return loss * value
            weight = next(iter(trainer.policy.parameters()))
            zero = weight.flatten()[0] * 0
            zero.register_hook(lambda grad: grad * value)
            return loss + zero

        monkeypatch.setattr(FPOTrainer, "row_loss", row_loss)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_no_weight_and_names_step_and_pairs(
    world, tmp_path, monkeypatch, tally, for_long, value, where
):
    for_long(value == -math.inf)
    fault = Fault(monkeypatch, 2, value, where)
    run = tmp_path / "out"
    result = world.align(run, epochs=2, save_steps=2, token_budget=1, max_grad_norm=0 if value == math.inf else 1)
    what = "the loss is" if where == "loss" else "the gradient's norm is"
    said = stopped(result, r"fpo: step 3, pair", "lower --lr", what)
    named = re.findall(NAME, said)
    assert named and set(named) <= set(fault.pairs)
    saved = sorted(path.name for path in run.glob("checkpoint-*"))
    assert saved == ["checkpoint-2"] and not (run / "model.safetensors").exists()
    assert all(weight.isfinite().all() for weight in load_file(run / "checkpoint-2" / "model.safetensors").values())
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    tally("numbers that are not finite, caught")


@pytest.mark.parametrize("method", ["dpo", "simpo", "tdpo2", "fpo"])
def test_a_learning_rate_that_is_too_large_stops_the_run_with_nothing_saved(world, tmp_path, tally, method):
    run = tmp_path / "out"
    result = world.align(run, method=method, lr=1e30, epochs=2, save_steps=100)
    stopped(result, r"fpo: step [234], pair", "lower --lr")
    assert not list(run.rglob("*.safetensors"))
    tally("numbers that are not finite, caught")


@pytest.mark.parametrize("when", [{"save_steps": 1}, {"snapshot_steps": 1}, {"max_steps": 1}])
def test_weights_that_are_not_finite_are_never_saved(world, tmp_path, tally, when):
    run = tmp_path / "out"
    stopped(world.align(run, method="dpo", lr=1e300, **when), "fpo: step 1: .* not finite and are not saved")
    assert not list(run.rglob("*.safetensors"))
    tally("numbers that are not finite, caught")


def test_an_evaluation_that_is_not_finite_stops_the_run(world, tmp_path, monkeypatch, tally):
    real = FPOTrainer.row_losses

    def row_losses(trainer: FPOTrainer, model: Any, row: Any, mode: str) -> Any:
        losses = real(trainer, model, row, mode)
        return dataclasses.replace(losses, loss=losses.loss * (math.nan if mode == "eval" else 1))

    monkeypatch.setattr(FPOTrainer, "row_losses", row_losses)
    result = world.align(tmp_path / "out", eval_cache=world.eval_cache, eval_steps=1)
    stopped(result, rf"fpo: evaluation at step 0, pairs? {NAME}.*: the loss is nan")
    tally("numbers that are not finite, caught")


def conversations(world: World, folder: Path) -> Path:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    return write_rows(folder / "chat.jsonl", [{"messages": row["rejected"]} for row in rows])


def sft(world: World, folder: Path, **options: Any) -> Result:
    defaults = {"model": world.gemma, "dataset": conversations(world, folder), "split": "train", "max_length": 64}
    defaults |= {"batch_size": 7, "lr": 1e-3, "warmup_steps": 0, "token_budget": 1, "out": folder / "out"}
    return fpo("sft", *to_arguments(defaults | options))


def test_fine_tuning_names_the_conversations_with_the_broken_token(world, tmp_path, tally):
    token, _ = rare_token(world)
    model = broken(world, tmp_path / "model", no_embedding(token))
    said = stopped(sft(world, tmp_path, model=model), r"fpo: step [12], conversation \d+: the loss is nan")
    tokenizer = load_tokenizer(find_model(str(world.gemma)))
    texts = [json.loads(line)["rejected"] for line in world.data.read_text().splitlines()]
    row = re.search(r"conversation (\d+): the loss is nan", said).group(1)
    assert token in tokenizer(" ".join(turn["content"] for turn in texts[int(row)]))["input_ids"]
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    tally("numbers that are not finite, caught")


@pytest.mark.parametrize("lr", [1e30, 1e300])
def test_fine_tuning_too_fast_stops_with_nothing_saved(world, tmp_path, tally, lr):
    stopped(sft(world, tmp_path, lr=lr, epochs=2, save_steps=1 if lr > 1e38 else 100), r"fpo: step [123][:,] ")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    tally("numbers that are not finite, caught")


# Evaluation, generation, training of SAEs.


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_are_not_finite_stop_an_evaluation(world, tmp_path, tally, for_long, what):
    for_long(what != "overflow")
    model = broken(world, tmp_path / "model", WEIGHTS[what])
    stopped(evaluate(world, tmp_path / "out", model), rf"fpo: pairs? {NAME}.*: not finite: ")
    assert not (tmp_path / "out" / "metrics.json").exists()
    tally("numbers that are not finite, caught")


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_that_logits_do_not_give_are_not_written(world, tmp_path, tally, temperature):
    model = broken(world, tmp_path / "model", WEIGHTS["NaN in the last norm"])
    questions = write_rows(tmp_path / "q.jsonl", [{"instruction": f"Is {n} odd?", "dataset": "x"} for n in range(3)])
    questions = questions.rename(tmp_path / "q.json")
    questions.write_text(json.dumps([json.loads(line) for line in questions.read_text().splitlines()]))
    options = {"model": model, "outputs": "alpaca-eval", "questions": questions, "max_new_tokens": 4}
    result = fpo("evaluate", *to_arguments(options | {"temperature": temperature, "out": tmp_path / "out"}))
    stopped(result, "fpo: prompts 0, 1, 2: not finite: logits of an answer")
    assert set(files(tmp_path / "out")) == {"run.yaml"}  # by which the same command may start over
    tally("numbers that are not finite, caught")


@pytest.mark.parametrize("what", ["NaN in a layer", "overflow"])
def test_no_sae_is_trained_on_activations_that_are_not_finite(world, tmp_path, tally, what):
    model = broken(world, tmp_path / "model", WEIGHTS[what])
    options = {"model": model, "dataset": world.data, "split": "train", "site": SITES[0].name, "width": 96}
    options |= {"tokens": 600, "max_length": LIMITS.max_length, "max_prompt_length": LIMITS.max_prompt_length}
    result = fpo("train-sae", *to_arguments(options | {"out": tmp_path / "out"}))
    stopped(result, rf"activations at {re.escape(SITES[0].name)} are not finite in \d+ of \d+ conversations")
    assert files(tmp_path / "out") == {}
    tally("numbers that are not finite, caught")


# Reading: a cache in which one row breaks a rule, with every hash made to agree.


def last(row: CachedPair, **changes: Any) -> CachedPair:
    """Changes of the rejected side's features at the first site."""
    first, *others = row.rejected.features
    features = (dataclasses.replace(first, **changes), *others)
    return dataclasses.replace(row, rejected=dataclasses.replace(row.rejected, features=features))


def of_rejected(row: CachedPair) -> SparseFeatures:
    return row.rejected.features[0]


def with_value(row: CachedPair, value: float) -> CachedPair:
    values = of_rejected(row).values.copy()
    values[0] = value
    return last(row, values=values)


def with_tokens(row: CachedPair, side: str, ids: list[int]) -> CachedPair:
    pair = dataclasses.replace(row.pair, **{f"{side}_ids": np.array(ids, np.int32)})
    raw_row = int(row.pair.pair_id.rpartition("-")[2])
    name = pair_id(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, raw_row)
    return dataclasses.replace(row, pair=dataclasses.replace(pair, pair_id=name))


def with_answer(row: CachedPair, **changes: Any) -> CachedPair:
    return dataclasses.replace(row, rejected=dataclasses.replace(row.rejected, **changes))


FEATURES = "rejected_features_0"
RULES: dict[str, tuple[Callable[[CachedPair], CachedPair], str]] = {
    "an id at the width": (
        lambda row: last(row, ids=np.r_[of_rejected(row).ids[:-1], 64].astype(np.uint16)),
        f"{FEATURES}: ids reach past the SAE's width of 64",
    ),
    "unsorted ids": (lambda row: last(row, ids=of_rejected(row).ids[::-1].copy()), f"{FEATURES}: ids are not in"),
    "repeated ids": (
        lambda row: last(row, ids=np.r_[of_rejected(row).ids[:1], of_rejected(row).ids[:-1]]),
        f"{FEATURES}: ids are not in ascending order, each once",
    ),
    "a negative activation": (lambda row: with_value(row, -0.5), f"{FEATURES}: values are not finite or not above 0"),
    "an activation of 0": (lambda row: with_value(row, 0.0), f"{FEATURES}: values are not finite or not above 0"),
    "NaN": (lambda row: with_value(row, math.nan), f"{FEATURES}: values are not finite"),
    "infinity": (lambda row: with_value(row, math.inf), f"{FEATURES}: values are not finite"),
    "fewer values than ids": (lambda row: last(row, values=of_rejected(row).values[:-1]), "ids and values differ"),
    "a floor of NaN": (lambda row: last(row, floor=math.nan), f"{FEATURES}: floor is not finite"),
    "a negative floor": (lambda row: last(row, floor=-1.0), f"{FEATURES}: floor is not finite or below 0"),
    "a floor above what was kept": (
        lambda row: last(row, floor=99.0, nnz=of_rejected(row).nnz + 1),
        f"{FEATURES}: floor is above a kept value",
    ),
    "fewer activations than were kept": (lambda row: last(row, nnz=0), f"{FEATURES}: nnz is below"),
    "more activations than features": (lambda row: last(row, nnz=65), f"{FEATURES}: nnz is below .* or above"),
    "something left out without a floor": (
        lambda row: last(row, nnz=of_rejected(row).nnz + 1),
        f"{FEATURES}: floor is 0, so nothing was left out",
    ),
    "a floor with nothing left out": (lambda row: last(row, floor=1e-9), f"{FEATURES}: floor is above 0"),
    "a log-prob of NaN": (lambda row: with_answer(row, logp=math.nan), "rejected_ref_logp: is not finite"),
    "a log-prob of -infinity": (lambda row: with_answer(row, logp=-math.inf), "rejected_ref_logp: is not finite"),
    "a log-prob above 0": (lambda row: with_answer(row, logp=0.1), "rejected_ref_logp: is not finite or above 0"),
    "a length that is not its tokens'": (
        lambda row: with_answer(row, num_tokens=row.rejected.num_tokens + 1),
        "rejected_num_tokens: is not the number of learnt tokens",
    ),
    "no prompt": (lambda row: with_tokens(row, "prompt", []), "prompt_ids: holds no tokens"),
    "a negative token": (lambda row: with_tokens(row, "chosen", [-1]), "chosen_ids: holds a negative token id"),
    "tokens of another pair": (
        lambda row: dataclasses.replace(row, pair=dataclasses.replace(row.pair, prompt_ids=row.pair.chosen_ids)),
        "pair_id: does not belong to its token ids",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_row_that_breaks_a_rule_is_refused_at_reading_with_its_name_and_column(world, tmp_path, tally, rule):
    change, message = RULES[rule]
    cache = open_cache(world.cache)
    # Raw row 6, the second of the second shard's rows of which one is skipped.
    (victim,) = (row for row in (cache[i] for i in range(len(cache))) if row.pair.pair_id.endswith("-6"))
    name = change(victim).pair.pair_id
    forged = forge(
        world.cache, tmp_path / "cache", lambda row: change(row) if row.pair.pair_id == victim.pair.pair_id else row
    )
    expected = rf"row 2 \({name}\), {'' if ':' in message[:40] else '.*'}{message}"
    with pytest.raises(ValueError, match=expected):
        open_cache(forged)
    verified = fpo("cache", "verify", forged)
    assert (verified.exit_code, verified.stdout.count("\n")) == (1, 1)
    assert re.search(rf"data/train-00001-of-00004.parquet: {expected}", verified.stdout)
    result = world.align(tmp_path / "out", cache=forged)
    assert (result.exit_code, bool(re.search(expected, result.stderr))) == (2, True), result.stderr
    assert files(tmp_path / "out") == {}
    tally("numbers that are not finite, caught" if "finite" in message else "rows that break a rule, refused")


def test_a_cache_in_which_nothing_was_broken_is_read_and_trained_on(world, tmp_path):
    forged = forge(world.cache, tmp_path / "cache")
    assert fpo("cache", "verify", forged).exit_code == 0
    ran(world.align(tmp_path / "out", cache=forged, max_steps=1))
