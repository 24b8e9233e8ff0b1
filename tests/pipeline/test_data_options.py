"""Preference data and conversations under other names and in other shapes, through the commands."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fpo.cache.reader import open_cache
from tiny_world import SITES, World, files, fpo, ran, rows, to_arguments, write_rows


def shards(out: Path) -> dict[str, bytes]:
    """The rows of a cache, and its manifest."""
    return {name: data for name, data in files(out).items() if name.startswith(("data/", "manifest"))}


def test_renamed_columns_give_the_same_cache(world: World, tmp_path: Path) -> None:
    made = [json.loads(line) for line in world.data.read_text().splitlines()]
    names = {"chosen": "preferred", "rejected": "The other one", "score_chosen": "score"}
    other = write_rows(
        tmp_path / "other.jsonl", [{names.get(name, name): value for name, value in row.items()} for row in made]
    )
    ran(world.precompute(tmp_path / "one"))
    renames = tuple(f"{new}={old}" for new, old in names.items())
    ran(world.precompute(tmp_path / "two", dataset=other, map=renames))
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    record = yaml.safe_load((tmp_path / "two" / "run.yaml").read_text())
    assert record["map"] == list(renames)
    refused = world.precompute(tmp_path / "three", dataset=other)
    assert refused.exit_code == 2 and "--map chosen=preferred" in refused.stderr
    assert not (tmp_path / "three").exists()


def test_a_table_of_text_gives_the_cache_that_json_gives(world: World, tmp_path: Path) -> None:
    made = [
        {"question": row["chosen"][0]["content"], "chosen": row["chosen"][1]["content"], "rejected": "No.\nNo."}
        for row in rows(3, 5)
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(made[0]))
        writer.writeheader()
        writer.writerows(made)
    ran(world.precompute(tmp_path / "one", dataset=tmp_path / "a.csv"))
    ran(world.precompute(tmp_path / "two", dataset=write_rows(tmp_path / "a.jsonl", made)))
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_the_closing_lines_say_how_many_prompts_were_guessed(world: World, tmp_path: Path) -> None:
    made: list[dict[str, Any]] = [
        {"chosen": "What is it? Paris.", "rejected": "What is it? Lyon."},
        {"chosen": "Is it? Yes, it is.", "rejected": "Is it? No."},
        {"chosen": "Paris.", "rejected": "Lyon."},
    ]
    result = ran(world.precompute(tmp_path / "out", dataset=write_rows(tmp_path / "a.jsonl", made)))
    assert "guessed prompts 2" in result.output and "skipped 1: empty prompt" in result.output
    result = ran(world.precompute(tmp_path / "again", limit=2))
    assert "guessed" not in result.output


def test_a_row_whose_content_is_null_is_skipped_with_its_reason(world: World, tmp_path: Path) -> None:
    made = rows(4, 3)
    made[1]["chosen"][1]["content"] = None
    result = ran(world.precompute(tmp_path / "out", dataset=write_rows(tmp_path / "a.jsonl", made)))
    assert "skipped 1: empty response" in result.output
    cache = open_cache(tmp_path / "out", sites=[SITES[0].name])
    assert len(cache) == 2


def test_conversations_in_another_shape_are_the_same_training_data(world: World, tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    made = [row["chosen"] for row in rows(5, 4)]
    write_rows(tmp_path / "one.jsonl", [{"messages": turns} for turns in made])
    shared = [[{"from": names[turn["role"]], "value": turn["content"]} for turn in turns] for turns in made]
    write_rows(tmp_path / "two.jsonl", [{"conversations": turns} for turns in shared])
    write_rows(tmp_path / "three.jsonl", [{"talk": json.dumps(turns)} for turns in shared])
    found = []
    for name, renames in (("one", None), ("two", None), ("three", "messages=talk")):
        options = {"model": world.gemma, "dataset": tmp_path / f"{name}.jsonl", "out": tmp_path / name, "map": renames}
        small = {"max_length": 64, "max_steps": 1, "batch_size": 2, "warmup_steps": 0}
        ran(fpo("sft", *to_arguments(options | small)))
        found.append(yaml.safe_load((tmp_path / name / "run.yaml").read_text())["data_sha256"])
    assert len(set(found)) == 1


@pytest.mark.parametrize("command", ["precompute", "sft", "train-sae"])
def test_every_command_that_reads_data_renames_its_columns(command: str) -> None:
    assert "--map" in fpo(command, "--help").output
