"""A token that the model does not embed is refused by its row, by every command that would feed it to the model."""

from pathlib import Path
from typing import Any

import pytest
from cache_rows import forge
from fpo.cache.schema import CachedPair
from fpo.stages.data.chat import GEMMA_TURNS, ChatFormat
from fpo.stages.data.conversations import load_conversations
from fpo.stages.model.models import find_model
from fpo.stages.model.tokenizer import load_tokenizer
from tiny_world import SITES, World, files, fpo, rows, write_rows
from wrong_starts import named

ODD = "<odd>"


@pytest.fixture(scope="module")
def model(world, tmp_path_factory) -> Path:
    """The world's model with a tokenizer that writes one token more."""
    import shutil

    folder = shutil.copytree(world.gemma, tmp_path_factory.mktemp("odd") / "model")
    tokenizer = load_tokenizer(find_model(str(folder)))
    assert tokenizer.add_tokens([ODD]) == 1
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    made = rows(3, 10)
    made[6]["rejected"][1]["content"] += f" {ODD}"
    return write_rows(tmp_path / "odd.jsonl", made)


def assert_refused(result: Any, *parts: str) -> None:
    said = [line for line in result.stderr.splitlines() if line.startswith("fpo: ")]
    assert (result.exit_code, len(said)) == (2, 1), result.output
    for part in parts:
        assert part in said[0]


def test_stage_one_stops_before_it_runs_the_shard(world, model, data, tmp_path):
    result = world.precompute(tmp_path / "out", model=model, dataset=data)
    assert_refused(result, "row 6", repr(ODD), "a text without this token")
    shards = [name for name in files(tmp_path / "out") if name.startswith("data/")]
    assert shards == ["data/train-00000-of-00003.parquet"]


def test_an_sae_is_not_trained_on_it(world, model, data, tmp_path):
    options = {"model": model, "dataset": data, "out": tmp_path / "sae", "site": SITES[0].name, "width": 64}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert_refused(fpo("train-sae", *arguments, "--split", "train", "--tokens", "2048"), "row 6", repr(ODD))
    assert files(tmp_path / "sae") == {}


def test_fine_tuning_stops_before_its_first_step(model, tmp_path, monkeypatch):
    chats = [{"messages": row["chosen"]} for row in rows(3, 10)]
    chats[4]["messages"] = []
    chats[7]["messages"][1]["content"] += f" {ODD}"
    path = write_rows(tmp_path / "chats.jsonl", chats)
    options = {"model": model, "dataset": path, "out": tmp_path / "out", "split": "train", "max-length": 64}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert_refused(fpo("sft", *arguments, "--device", "cpu"), "row 7", repr(ODD))
    assert files(tmp_path / "out") == {}


def with_unknown(row: CachedPair) -> CachedPair:
    """Token 9,999 in the third raw row's rejected answer."""
    if row.pair.pair_id.rpartition("-")[2] != "2":
        return row
    ids = row.pair.rejected_ids.copy()
    ids[0] = 9_999
    return named(row, rejected_ids=ids)


@pytest.mark.parametrize("command", ["align", "evaluate"])
def test_a_cache_that_holds_it_is_not_read(world: World, tmp_path, command):
    cache = forge(world.cache, tmp_path / "cache", with_unknown)
    if command == "align":
        result = world.align(tmp_path / "out", "--allow-different-start", cache=cache)
    else:
        result = fpo("evaluate", "--model", str(world.gemma), "--cache", str(cache), "--out", str(tmp_path / "out"))
    assert_refused(result, f"cache {cache}, pair ", "-2: expected tokens below", "found 9999")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("seed", range(3))
def test_the_row_of_the_largest_token_is_found(world, tmp_path, seed):
    made = [{"messages": row["chosen"]} for row in rows(seed, 6)]
    made[2]["messages"] = []
    made[1]["messages"] = [*made[1]["messages"], *made[3]["messages"]]
    # By this template each of its two answers is a conversation of its own.
    content = "(message['content'] | trim)"
    template = GEMMA_TURNS.replace(content, f"('' if loop.index0 == 1 and not loop.last else {content})")
    chat = ChatFormat(load_tokenizer(find_model(str(world.gemma))), template)
    found = load_conversations(str(write_rows(tmp_path / "x.jsonl", made)), split="train", chat=chat, max_length=64)
    assert [found[i].raw_row for i in range(len(found))] == [0, 1, 1, 3, 4, 5]
    largest: dict[str, int] = {}
    for one in (found[i] for i in range(len(found))):
        largest[f"row {one.raw_row}"] = max(int(one.ids.max()), largest.get(f"row {one.raw_row}", 0))
    name, token = found.largest_token()
    assert token == largest[name] == max(largest.values())
    cache = world.open()
    tokens = {
        row.pair.pair_id: max(
            int(ids.max()) for ids in (row.pair.prompt_ids, row.pair.chosen_ids, row.pair.rejected_ids)
        )
        for row in (cache[i] for i in range(len(cache)))
    }
    name, token = cache.largest_token()
    assert token == tokens[name] == max(tokens.values())
