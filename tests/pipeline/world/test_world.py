"""The embedded world: its data, its names in configurations, and how it is made."""

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from fpo.cache.files import user_folder
from fpo.pipeline.config import PrecomputeConfig
from fpo.pipeline.config_files import load_config, write_yaml
from fpo.pipeline.world import world as embedded
from fpo.stages.data.chat import ChatFormat
from fpo.stages.data.conversations import load_conversations
from fpo.stages.data.preferences import load_preferences
from fpo.stages.train.methods import METHODS
from solver import asked_and_said, is_right, problem
from tiny_tokenizers import gemma
from tiny_world import files, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The world's own data."""
    folder = tmp_path_factory.mktemp("world") / "data"
    embedded._write_data(folder)
    return folder


def rows_of(data: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]


def problems(data: Path, split: str) -> list[tuple[str, ...]]:
    """What each instruction is about."""
    return [problem(row.get("messages", row.get("chosen"))[0]["content"]) for row in rows_of(data, split)]


def test_the_splits_are_as_large_as_they_are_said_to_be(data):
    counts = {path.stem: len(rows_of(data, path.stem)) for path in data.iterdir()}
    assert counts == embedded.SPLITS | {"train_sft": embedded.CONVERSATIONS}


def test_the_model_is_trained_on_as_many_good_answers_as_bad_ones(data):
    """So it gives either, and a preference has two to choose between."""
    right = [is_right(*asked_and_said(row["messages"])) for row in rows_of(data, "train_sft")]
    assert sum(right) / len(right) == pytest.approx(0.5, abs=0.0125)  # four deviations
    training, saes = embedded.world_steps(Path("world"))
    assert (training.config.split, training.config.model, str(training.out)) == ("train_sft", "world/base", "world/sft")
    assert {step.config.dataset for step in (training, *saes)} == {"world/data"}
    assert {step.config.model for step in saes} == {"world/sft"}
    assert [step.config.site for step in saes] == [(site,) for site in embedded.SITES]
    assert all(training.out in step.needs for step in saes)


@pytest.mark.parametrize("heldout", ["test_prefs", "validation_prefs", "train_prefs"])
def test_a_problem_of_a_preference_split_stands_once_and_in_no_other(data, heldout):
    """Neither an instruction nor, in any order or direction, what it is about."""
    posed = problems(data, heldout)
    assert len(set(posed)) == len(posed)
    for path in data.iterdir():
        if path.stem != heldout:
            assert set(posed).isdisjoint(problems(data, path.stem)), path.stem


def test_neither_length_nor_one_word_tells_the_better_answer(data):
    found = embedded.baselines(data)
    assert found.keys() == {"length", "keyword"}
    for share in found.values():
        assert 0 < share <= 0.55


def test_the_data_are_the_same_wherever_they_are_written(data, tmp_path):
    embedded._write_data(tmp_path / "data")
    assert files(tmp_path / "data") == files(data)


def test_the_commands_readers_open_every_split(data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for split, count in embedded.SPLITS.items():
        preferences = load_preferences(str(data), split=split)
        assert len(preferences) == count
        example, row = preferences.example(count - 1), rows_of(data, split)[-1]
        turns = (example.prompt, example.chosen, example.rejected)
        assert [turn.content for (turn,) in turns] == [
            *(message["content"] for message in row["chosen"]),
            row["rejected"][1]["content"],
        ]
    chat = ChatFormat(gemma())
    found = load_conversations(str(data), split="train_sft", chat=chat, max_length=1000, limit=20)
    assert (len(found), found.skipped, found.truncated) == (20, {}, 0)
    answer = rows_of(data, "train_sft")[0]["messages"][1]["content"]
    assert chat.tokenizer.decode(found[0].ids[found[0].learnt]) == f"{answer}<end_of_turn>"


def answers(folder: Path, split: str, pairs: Sequence[tuple[str, str]]) -> None:
    asked = {"role": "user", "content": "Say."}
    sides = [[[asked, {"role": "assistant", "content": answer}] for answer in pair] for pair in pairs]
    write_rows(folder / f"{split}.jsonl", [{"chosen": chosen, "rejected": rejected} for chosen, rejected in sides])


@pytest.mark.parametrize(
    ("pairs", "length", "keyword"),
    [
        ([("yes it is", "not it is"), ("yes a dog", "not a dog")], 0.5, 1.0),
        ([("I am", "a cat, sorry"), ("it was a dog", "sorry")], 0.5, 1.0),  # a word of the worse answers
        ([("dog dog", "cat"), ("cat cat", "dog")], 1.0, 0.5),
        ([("dog", "cat cat"), ("cat", "dog dog")], 1.0, 0.5),  # always the shorter
        ([("a - b", "a * b")], 0.5, 1.0),  # marks count as words
    ],
)
def test_the_baselines_are_those_of_data_made_by_hand(tmp_path, pairs, length, keyword):
    for split in ("train_prefs", "test_prefs"):
        answers(tmp_path, split, pairs)
    assert embedded.baselines(tmp_path) == {"length": length, "keyword": keyword}


def test_the_word_is_chosen_on_the_training_split_alone(tmp_path):
    answers(tmp_path, "train_prefs", [("yes", "not"), ("yes", "so")])
    answers(tmp_path, "test_prefs", [("not", "yes"), ("yes", "not"), ("yes", "why"), ("so", "not")])
    assert embedded.baselines(tmp_path)["keyword"] == (0 + 1 + 1 + 0.5) / 4


@pytest.fixture
def profile(tmp_path, monkeypatch) -> Any:
    """Changes the profile for one test: fields of its sections, and `None` for those outside of them."""
    text = (importlib.resources.files("fpo.pipeline") / "profiles" / f"{embedded.PROFILE}.yaml").read_text()
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    monkeypatch.setattr(embedded, "PROFILE", str(path))

    def change(section: str | None, **fields: Any) -> None:
        content = yaml.safe_load(text)
        parts = content["methods"] if section in METHODS else content
        part = content if section is None else parts.setdefault(section, {})
        part |= fields
        path.write_text(write_yaml(content))

    return change


def test_the_world_s_folder_is_the_user_s_and_named_by_what_makes_the_world():
    assert embedded.world_folder().parent == user_folder() / embedded.PROFILE
    assert not embedded.world_folder().exists()


def test_other_settings_of_what_makes_the_world_are_another_world(profile):
    before = embedded.world_folder()
    for section, field in (("sft", {"lr": 3e-2}), ("sft", {"seed": 7}), ("train-sae", {"width": 64})):
        profile(section, **field)
        assert embedded.world_folder() != before, field
    profile(None)
    assert embedded.world_folder() == before


@pytest.mark.parametrize(
    ("section", "settings"),
    [("dpo", {"beta": 0.9}), ("align", {"lr": 0.1}), ("evaluate", {"samples": 3}), ("table", {"jobs": 3})],
)
def test_settings_of_what_is_done_in_the_world_are_not(profile, section, settings):
    before = embedded.world_folder()
    profile(section, **settings)
    assert embedded.world_folder() == before


def test_the_world_s_names_become_its_folders_and_it_is_made_once(tmp_path, monkeypatch):
    made: list[Path] = []
    monkeypatch.setattr(embedded, "world_folder", lambda: tmp_path)
    monkeypatch.setattr(embedded, "build", made.append)
    given = {
        "model": "embedded:sft",
        "dataset": "embedded:data",
        "sae": ("embedded:saes/a", "release:b"),
        "out": tmp_path / "out",
    }
    config = load_config(PrecomputeConfig, None, given)
    found = embedded.provide(config)
    assert made == [tmp_path]
    wanted = {"model": str(tmp_path / "sft"), "sae": (str(tmp_path / "saes/a"), "release:b")}
    wanted["dataset"] = str(tmp_path / "data")
    assert found.model_dump() == config.model_dump() | wanted


@pytest.mark.parametrize("name", [None, "gemma-2-2b", "smollm2-135m"])
def test_a_configuration_that_names_nothing_of_the_world_makes_none(monkeypatch, name):
    monkeypatch.setattr(embedded, "build", lambda folder: pytest.fail(f"{folder} was made"))
    config = load_config(PrecomputeConfig, name, {"chat_template": "not-embedded:data"})
    assert embedded.provide(config) == config


def built(folder: Path) -> dict[str, bytes]:
    """What does not tell the time."""
    found = files(folder)
    kept = (
        "data/",
        "base/",
        "sft/model.safetensors",
        "sft/tokenizer",
        "sft/config.json",
    )
    return {
        name: content
        for name, content in found.items()
        if name.startswith(kept) or (name.startswith("saes/") and name.endswith((".safetensors", "quality.json")))
    }


@pytest.mark.slow
def test_a_world_is_made_once_goes_on_after_an_interruption_and_comes_out_the_same(tmp_path, monkeypatch, profile):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))  # the steps' processes read it
    monkeypatch.setattr(embedded, "SPLITS", {"test_prefs": 16, "validation_prefs": 8, "train_prefs": 64})
    monkeypatch.setattr(embedded, "CONVERSATIONS", 48)
    monkeypatch.setattr(embedded, "SITES", (embedded.SITES[0], embedded.SITES[-1]))
    profile("train-sae", width=64, tokens=2000)
    profile("sft", lr_scheduler="constant_with_warmup", lr_scheduler_kwargs=None, warmup_steps=1)
    one, other = tmp_path / "one", tmp_path / "other"
    embedded.build(one)
    facts = json.loads((one / "world.json").read_text())
    assert facts["saes"].keys() == set(embedded.SITES)
    names = {"base", "sft", *(f"saes/{site}" for site in embedded.SITES)}
    assert all(any(path.suffix == ".safetensors" for path in (one / name).iterdir()) for name in names)

    times = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    embedded.build(one)
    assert {path: path.stat().st_mtime_ns for path in one.rglob("*")} == times

    before, (lost, kept) = built(one), embedded.SITES
    (one / "world.json").unlink()
    (one / "saes" / lost / "step.json").unlink()
    done = [one / name / "step.json" for name in ("sft", f"saes/{kept}")]
    embedded.build(one)
    assert {path: path.stat().st_mtime_ns for path in done} == {path: times[path] for path in done}
    assert (one / "saes" / lost / "step.json").exists()
    assert built(one) == before
    again = json.loads((one / "world.json").read_text())
    assert {**again, "seconds": 0} == {**facts, "seconds": 0}

    embedded.build(other)
    assert built(other) == before
