"""Checks of the options that say what is read, how it becomes tokens, and what the cache keeps of it."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from fpo.cache.errors import UserError
from fpo.cache.reader import verify
from fpo.pipeline.commands import precompute
from pairs import score_alone
from seams.lab import (
    SMALL,
    Lab,
    Run,
    bracket_template,
    by_hand,
    in_brackets,
    in_turns,
    lines_of,
    plain_model,
    tokens,
    watched_passes,
)
from seams.of_training import conversations
from seams.options import effect
from seams.oracle import likelihood
from tiny import save_tiny_sae
from tiny_world import SITES, files, write_rows

DATA = "precompute, sft, train-sae"


def assert_read(lab: Lab, command: str, rows: list[dict[str, Any]], *, limits: Any = None, **options: Any) -> Run:
    """The command read these rows (preference pairs, or for sft their better answers), tokenised by hand."""
    render = options.pop("render", in_turns)
    run = lab.run(command, **options)
    pairs = by_hand(rows, render=render, **(limits or {}))
    if command == "precompute":
        found = [[ids.tolist() for ids in parts(row.pair)] for row in run.open()]
        assert found == [[ids.tolist() for ids in parts(pair)] for pair in pairs]
    elif command == "train-sae":
        whole = {(*pair.prompt_ids.tolist(), *side.tolist()) for pair in pairs for side in parts(pair)[1:]}
        assert f"{len(whole)} conversations, {sum(map(len, whole))} tokens" in run.said
    else:
        longest = (limits or {}).get("max_length", 64)
        found = conversations(lab, rows, longest, render)
        learnt, total = sum(len(ids) - first for ids, first in found), sum(len(ids) for ids, _ in found)
        assert f"{len(found)} conversations, {total} tokens, {learnt} of them learnt" in run.said
        with torch.no_grad():
            expected = likelihood(plain_model(lab.world.gemma), found).item()
        assert run.steps[0]["loss"] == pytest.approx(expected, rel=1e-5)
    return run


def parts(pair: Any) -> tuple[Any, Any, Any]:
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def written(lab: Lab, command: str, path: Path, rows: list[dict[str, Any]]) -> Path:
    """A data file of these rows, as the command takes them."""
    return write_rows(path, [{"messages": row["chosen"]} for row in rows] if command == "sft" else rows)


def batch(command: str, number: int) -> dict[str, Any]:
    """For sft: so many conversations are a step."""
    return {"batch_size": number} if command == "sft" else {}


def heldout(lab: Lab) -> list[dict[str, Any]]:
    return lines_of(lab.world.heldout)


@effect(DATA, "dataset")
def dataset(lab: Lab, command: str) -> None:
    rows = heldout(lab)
    path = written(lab, command, lab.new("heldout.jsonl"), rows)
    assert_read(lab, command, rows, dataset=path, limit=None, **batch(command, len(rows)))
    assert "--dataset" in lab.refused(command, dataset=None)


@effect(DATA, "split")
def split(lab: Lab, command: str) -> None:
    """Of a folder the files of the split."""
    folder = lab.new("folder")
    folder.mkdir()
    rows = {"train": lab.rows[:2], "other": heldout(lab)[:3]}
    for name, of_split in rows.items():
        written(lab, command, folder / f"{name}.jsonl", of_split)
    for name, of_split in rows.items():
        options = batch(command, len(of_split))
        assert_read(lab, command, of_split, dataset=folder, split=name, limit=None, **options)
    assert "split" in lab.refused(command, dataset=folder, split="third")


@effect(DATA, "dataset_config")
def dataset_config(lab: Lab, command: str) -> None:
    """It is what the hub is asked for; data on this machine have none."""
    asked: list[tuple[Any, ...]] = []
    rows = heldout(lab)[:4]
    local = written(lab, command, lab.new("hub.jsonl"), rows)
    load = datasets.load_dataset

    def hub(path: str, name: str | None = None, *args: Any, split: str | None = None, **more: Any) -> Any:
        if path != "owner/name":
            return load(path, name, *args, split=split, **more)
        asked.append((name, split))
        return load("json", data_files=[str(local)], split="train")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", hub)
        options = {"dataset": "owner/name", "dataset_config": "second", "split": "third", "limit": None}
        assert_read(lab, command, rows, **options, **batch(command, len(rows)))
    assert set(asked) == {("second", "third")}
    assert "configuration" in lab.refused(command, dataset_config="second")


@effect(DATA, "limit")
def limit(lab: Lab, command: str) -> None:
    """The first so many raw rows, also where some of them are skipped."""
    for number in (2, 5):
        rows = lab.rows[:number]
        path = written(lab, command, lab.new("rows.jsonl"), by_length(lab.rows))
        assert_read(lab, command, by_length(lab.rows)[:number], dataset=path, limit=number, **batch(command, number))
        if command == "precompute":
            assert_read(lab, command, rows, limit=number)


def by_length(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Another order, without the row that sft skips too."""
    return sorted((row for row in rows if row["chosen"][1]["content"].strip()), key=lambda row: len(str(row)))


@effect(DATA, "chat_template")
def chat_template(lab: Lab, command: str) -> None:
    text, path = bracket_template(), lab.folder / f"{command}.jinja"
    path.write_text(text)
    run = assert_read(lab, command, lab.rows[:SMALL], chat_template=path, limit=SMALL, render=in_brackets)
    if command == "sft":
        assert (run.folder / "chat_template.jinja").read_text() == text
    if command == "precompute":
        assert run.open().manifest.meaning.chat_template == text


@effect("precompute, train-sae", "drop_ties")
def drop_ties(lab: Lab, command: str) -> None:
    """Row 5 has two equal scores."""
    rows = lab.rows[:8]
    assert_read(lab, command, [row for i, row in enumerate(rows) if i != 5], limit=8, drop_ties=True)
    run = assert_read(lab, command, rows, limit=8, drop_ties=False)
    if command == "precompute":
        assert run.open().manifest.counts["ties"] == 1


@effect(DATA, "max_length")
def max_length(lab: Lab, command: str) -> None:
    for longest in (40, 46):
        limits = {"max_length": longest}
        run = assert_read(lab, command, lab.rows[:SMALL], limit=SMALL, limits=limits, max_length=longest)
        if command == "precompute":
            pairs = [row.pair for row in run.open()]
            assert max(len(p.prompt_ids) + len(s) for p in pairs for s in parts(p)[1:]) == longest
            whole = by_hand(lab.rows[:SMALL], max_length=10_000)
            sides = [len(p.prompt_ids) + len(s) for p in whole for s in parts(p)[1:]]
            assert run.open().manifest.counts["truncated_responses"] == sum(length > longest for length in sides)


@effect("precompute, train-sae", "max_prompt_length")
def max_prompt_length(lab: Lab, command: str) -> None:
    for longest in (12, 20):
        limits = {"max_prompt_length": longest}
        run = assert_read(lab, command, lab.rows[:SMALL], limit=SMALL, limits=limits, max_prompt_length=longest)
        if command == "precompute":
            prompts = [tokens(in_turns(row["chosen"][0]["content"])) for row in lab.rows[:SMALL]]
            cut = sum(len(ids) > longest for ids in prompts)
            assert run.open().manifest.counts["truncated_prompts"] == cut > 0


# What stage one measures and keeps.


def pooled(lab: Lab, model: Path, saes: list[Any]) -> list[tuple[float, list[np.ndarray[Any, Any]]]]:
    """Log-probability and pooled features of each response, by plain transformers and SAELens."""
    reference = plain_model(model)
    found = []
    with torch.no_grad():
        for pair in lab.pairs():
            for side in score_alone(reference, pair, [sae.site for sae in saes]):
                features = [side.pooled_M(sae).numpy() for sae in saes]
                found.append((side.token_logps_T.double().sum().item(), features))
    return found


def assert_measured(lab: Lab, run: Run, model: Path, saes: list[Any], keep: int | None = None) -> None:
    """The cache holds of each response its log-probability and its largest features, and how large the rest is."""
    cache = run.open(*(sae.site.name for sae in saes))
    responses = [side for row in cache for side in (row.chosen, row.rejected)]
    for response, (logp, features) in zip(responses, pooled(lab, model, saes), strict=True):
        assert response.logp == pytest.approx(logp, rel=1e-5)
        for kept, all_M in zip(response.features, features, strict=True):
            ranked = np.argsort(-all_M, kind="stable")[: (all_M > 0).sum()]
            wanted = np.sort(ranked[:keep])
            assert kept.ids.tolist() == wanted.tolist()
            np.testing.assert_allclose(kept.values, all_M[wanted], rtol=1e-4, atol=1e-5)
            left_out = [] if keep is None else all_M[ranked[keep:]]
            assert kept.floor == pytest.approx(max(left_out, default=0.0), rel=1e-4)
            assert kept.nnz == len(ranked)


@effect("precompute", "model")
def model(lab: Lab, command: str) -> None:
    for path in (lab.world.gemma, lab.other):
        assert_measured(lab, lab.run(command, model=path), path, [lab.world.load_sae(0), lab.world.load_sae(1)])


@effect("precompute", "sae")
def sae(lab: Lab, command: str) -> None:
    from fpo.stages.model.sae import load_sae

    folder = lab.folder / "sae-of-its-own"
    save_tiny_sae(folder, 32, 40, 5, "standard", SITES[1])
    assert_measured(lab, lab.run(command, sae=folder), lab.world.gemma, [load_sae(str(folder))])
    assert "--sae" in lab.refused(command, sae=None)
    assert "--sae" in lab.refused(command, sae=(lab.world.saes[1], folder))


@effect("precompute", "keep_features")
def keep_features(lab: Lab, command: str) -> None:
    saes = [lab.world.load_sae(0), lab.world.load_sae(1)]
    for keep in (1, 5):
        assert_measured(lab, lab.run(command, keep_features=keep), lab.world.gemma, saes, keep)


@effect("precompute, evaluate", "token_budget")
def token_budget(lab: Lab, command: str) -> None:
    """No row is longer, unless one pair alone is; with room for all there is one row."""
    sizes = [sum(map(len, parts(pair))) for pair in lab.pairs()]
    for budget, rows in ((1, sizes), (sum(sizes), [sum(sizes)])):
        with watched_passes() as passes:
            lab.run(command, token_budget=budget)
        for size in set(rows):
            assert passes.scored.count(size) >= rows.count(size)


@effect("precompute", "shard_size")
def shard_size(lab: Lab, command: str) -> None:
    """So many raw rows a file, skipped ones among them."""
    for size in (3, 5):
        folder = lab.run(command, shard_size=size, limit=8).folder
        shards = lab.run(command, shard_size=size, limit=8).open().manifest.shards
        assert len(list((folder / "data").iterdir())) == len(shards) == -(-8 // size)
        kept = [sum(row not in (3, 7) for row in range(first, min(first + size, 8))) for first in range(0, 8, size)]
        assert [shard.rows for shard in shards] == kept


@effect("precompute", "rank", "world_size")
def rank(lab: Lab, command: str) -> None:
    """A worker writes its own shards first, then what the others have not begun; both numbers belong together."""
    for number, own in ((0, [0, 2]), (1, [1])):
        folder = lab.new()
        assert lab.call(command, folder, shard_size=1, rank=number, world_size=2).exit_code == 0
        shards = sorted((folder / "data").iterdir())
        order = sorted(range(3), key=lambda i: shards[i].stat().st_mtime_ns)
        assert order[: len(own)] == own
    assert "--world-size" in lab.refused(command, rank=1)
    assert "--rank" in lab.refused(command, world_size=2)


@effect("precompute", "engine", "workers")
def engine(lab: Lab, command: str) -> None:
    """Who hands out the shards; what Ray's actors write is tested, slowly, in test_precompute.py."""
    assert "--workers" in lab.refused(command, workers=2)
    assert "--engine" in lab.refused(command, engine="ray", rank=0, world_size=2)
    with pytest.MonkeyPatch.context() as patch:

        def run_pool(config: Any) -> Any:
            raise UserError(f"a pool of {config.workers} for {config.out}")

        patch.setattr(precompute, "_run_pool", run_pool)
        for number in (2, 3):
            out = lab.new()
            assert f"a pool of {number} for {out}" in lab.call(command, out, engine="ray", workers=number).stderr


@effect("precompute", "repair")
def repair(lab: Lab, command: str) -> None:
    """Damage is found and computed again, to the byte; without the option it is left."""
    folder = lab.new()
    assert lab.call(command, folder, shard_size=1).exit_code == 0
    before = files(folder / "data")
    broken = sorted((folder / "data").iterdir())[1]
    data = broken.read_bytes()
    broken.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    left = lab.call(command, folder, shard_size=1)
    assert left.exit_code == 2 and "--repair" in left.stderr
    assert [line.split(":")[0] for line in verify(folder)] == [f"data/{broken.name}"]
    assert lab.call(command, folder, shard_size=1, repair=True).exit_code == 0
    assert verify(folder) == []
    assert files(folder / "data") == before


# Shapes of rows, and the clock.


@effect(DATA, "map")
def renamed(lab: Lab, command: str) -> None:
    """A column of another name is read as the one that it is said to be."""
    rows = lab.rows[:SMALL]
    if command == "sft":
        made, mapping = [{"talk": row["chosen"]} for row in rows], ("messages=talk",)
    else:
        made = [{"good": row["chosen"], "bad": row["rejected"]} for row in rows]
        mapping = ("chosen=good", "rejected=bad")
    path = write_rows(lab.new("renamed.jsonl"), made)
    assert_read(lab, command, rows, dataset=path, map=mapping, limit=SMALL)
    turned = ("chosen=bad", "rejected=good")
    if command == "precompute":
        sides = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
        assert_read(lab, command, sides, dataset=path, map=turned, limit=SMALL)
    assert lab.refused(command, dataset=path)
    assert "--map" in lab.refused(command, dataset=path, map="chosen=nothing")


@effect("precompute, sft", "date")
def date(lab: Lab, command: str) -> None:
    """The day that a template which asks for it is told."""
    path = lab.folder / f"{command}-clock.jinja"
    path.write_text(bracket_template("{{ strftime_now('%d %b %Y') }}"))
    for day, shown in (("2024-02-29", "29 Feb 2024"), ("2031-12-01", "01 Dec 2031")):

        def render(question: str, shown: str = shown) -> str:
            return in_brackets(question, shown)

        options = {"chat_template": path, "date": day, "limit": SMALL}
        assert_read(lab, command, lab.rows[:SMALL], render=render, **options)
    assert "--date" in lab.refused(command, chat_template=path, date="yesterday")


@effect("precompute", "turns")
def turns(lab: Lab, command: str) -> None:
    """Of a response of two answers both are learnt, or the last: what is summed up and what is pooled over."""
    asked, more = "What is the capital?", "And the other?"
    answers = {"chosen": ("It is Paris.", "It is Lyon, I think."), "rejected": ("Lyon is it.", "Paris.")}
    rows = [{}]
    for side, (first, last) in answers.items():
        said = [("user", asked), ("assistant", first), ("user", more), ("assistant", last)]
        rows[0][side] = [{"role": role, "content": content} for role, content in said]
    path = write_rows(lab.new("turns.jsonl"), rows)
    model, found = plain_model(lab.world.gemma), {}
    for which in ("all", "last"):
        run = lab.run(command, dataset=path, turns=which, limit=None, max_length=200, max_prompt_length=100)
        (row,) = run.open()
        for side, (first, last) in answers.items():
            prompt, opening = tokens(in_turns(asked)), tokens(in_turns(more)[len("<bos>") :])
            texts = [tokens(f"{text}<end_of_turn>") for text in (first, last)]
            between = tokens("\n")
            ids = torch.tensor([*prompt, *texts[0], *between, *opening, *texts[1]])
            with torch.no_grad():
                logps = torch.log_softmax(model(input_ids=ids[None]).logits[0].float(), -1)[:-1]
            each = logps.gather(1, ids[1:, None]).squeeze(1).double()
            parts_of = [each[len(prompt) - 1 :][: len(texts[0])], each[len(each) - len(texts[1]) :]]
            expected = sum(float(part.sum()) for part in (parts_of if which == "all" else parts_of[1:]))
            assert getattr(row.pair, f"{side}_ids").tolist() == ids[len(prompt) :].tolist()
            assert getattr(row, side).logp == pytest.approx(expected, rel=1e-5)
            found[which, side] = expected
    assert found["all", "chosen"] != pytest.approx(found["last", "chosen"], rel=0.01)
