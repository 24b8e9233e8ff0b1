"""Chat templates that read the clock: of one cache, one run, and of what belongs together, it is one day."""

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml
from fpo.cache.manifest import Manifest
from fpo.cache.reader import open_cache
from fpo.pipeline.commands.evaluate import _prepare
from fpo.pipeline.config import EvaluateConfig, SFTConfig
from fpo.pipeline.config_files import load_config
from fpo.stages.data import rendering
from fpo.stages.data.chat import GEMMA_TURNS
from ranks import fine_tune_about_midnight, on_ranks
from tiny_tokenizers import gemma
from tiny_world import World, files, fpo, ran, to_arguments, write_rows

MONDAY, TUESDAY = datetime.date(2026, 11, 23), datetime.date(2026, 11, 24)
DATED = "{{ strftime_now('%d %b %Y') + '\n' }}" + GEMMA_TURNS


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.startswith(("data/", "manifest", "README"))}


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime.date], None]:
    """Makes it another day."""

    def set_day(day: datetime.date) -> None:
        date = type("Date", (datetime.date,), {"today": classmethod(lambda cls: day)})
        monkeypatch.setattr(rendering, "datetime", SimpleNamespace(date=date))

    return set_day


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "dated.jinja"
    path.write_text(DATED)
    return path


def days_of(cache: Path) -> set[str]:
    """The days that its prompts show, those of which nothing is cut."""
    rows = open_cache(cache, sites=[])
    texts = (gemma().decode(rows[i].pair.prompt_ids) for i in range(len(rows)))
    return {day for text in texts for day in re.findall(r"\d\d Nov 2026", text)}


@pytest.mark.parametrize("repair", [False, True])
def test_a_cache_that_is_resumed_or_repaired_keeps_the_day_on_which_it_was_begun(
    world: World, tmp_path: Path, template: Path, today, repair: bool
) -> None:
    today(MONDAY)
    out = tmp_path / "out"
    ran(world.precompute(out, chat_template=template))
    whole = content(out)
    assert days_of(out) == {"23 Nov 2026"}
    assert Manifest.load(out).meaning.date == "2026-11-23"
    (out / "data/train-00001-of-00004.parquet").unlink()
    if not repair:
        (out / "manifest.json").unlink()
    today(TUESDAY)
    ran(world.precompute(out, chat_template=template, repair=True if repair else None))
    assert content(out) == whole
    refused = world.precompute(out, chat_template=template, date="2026-11-24")
    assert refused.exit_code == 2
    assert "date: expected '2026-11-24', found '2026-11-23'" in refused.stderr
    ran(world.precompute(out, chat_template=template, date="2026-11-23"))
    assert content(out) == whole


def test_workers_on_both_sides_of_midnight_write_one_cache(world: World, tmp_path: Path, template: Path, today) -> None:
    today(MONDAY)
    ran(world.precompute(tmp_path / "one", chat_template=template))
    out = tmp_path / "two"
    ran(world.precompute(out, chat_template=template))
    (out / "manifest.json").unlink()
    for shard in (1, 3):
        (out / f"data/train-0000{shard}-of-00004.parquet").unlink()
    today(TUESDAY)
    ran(world.precompute(out, chat_template=template, rank=1, world_size=2))
    assert content(out) == content(tmp_path / "one")


def test_an_evaluation_cache_of_another_day_is_refused_and_one_of_the_same_can_be_made(
    world: World, tmp_path: Path, template: Path, today
) -> None:
    today(MONDAY)
    ran(world.precompute(tmp_path / "train", chat_template=template))
    today(TUESDAY)
    heldout = {"dataset": world.heldout, "split": "test", "chat_template": template}
    ran(world.precompute(tmp_path / "tuesday", **heldout))
    ran(world.precompute(tmp_path / "monday", **heldout, date="2026-11-23"))
    assert (days_of(tmp_path / "tuesday"), days_of(tmp_path / "monday")) == ({"24 Nov 2026"}, {"23 Nov 2026"})
    options = {"cache": tmp_path / "train", "chat_template": template, "max_steps": 1}
    refused = world.align(tmp_path / "refused", **options, eval_cache=tmp_path / "tuesday")
    assert (refused.exit_code, "date: expected '2026-11-23', found '2026-11-24'" in refused.stderr) == (2, True)
    ran(world.align(tmp_path / "run", **options, eval_cache=tmp_path / "monday"))
    given = {"model": str(world.gemma), "cache": tmp_path / "train", "prompts": 0, "out": tmp_path / "metrics"}
    assert _prepare(load_config(EvaluateConfig, None, given)).chat.date == MONDAY


def test_without_a_clock_nothing_depends_on_the_day(world: World, tmp_path: Path, today) -> None:
    today(TUESDAY)
    assert Manifest.load(world.cache).meaning.date is None
    ran(world.precompute(tmp_path / "out"))
    assert content(tmp_path / "out") == content(world.cache)


@pytest.mark.parametrize(
    ("date", "dated", "message"),
    [
        ("2026-11-23", False, "--date: the chat template does not read the clock; leave it out"),
        ("23.11.2026", True, "--date: String should match pattern"),
        ("2026-02-30", True, "--date: expected a day as YYYY-MM-DD (day is out of range"),
    ],
)
def test_a_date_that_is_none_or_of_no_use_is_refused(
    world: World, tmp_path: Path, template: Path, date: str, dated: bool, message: str
) -> None:
    for command, place in (("precompute", world.data), ("sft", world.data)):
        options = {"model": world.gemma, "dataset": place, "out": tmp_path / "out", "date": date}
        options |= {"chat_template": template} if dated else {}
        options |= {"sae": world.saes[0]} if command == "precompute" else {}
        result = fpo(command, *to_arguments(options))
        assert (result.exit_code, message in result.stderr, result.stderr.count("\n")) == (2, True, 1), result.output
        assert not (tmp_path / "out").exists()


def test_a_day_in_a_configuration_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("date: 2026-11-23\n")
    assert load_config(SFTConfig, str(tmp_path / "a.yaml"), {}).date == "2026-11-23"


def test_fine_tuning_that_is_resumed_keeps_its_day(
    world: World, tmp_path: Path, template: Path, today, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 6)

    def sft(out: str, *more: str, **options: Any) -> Any:
        defaults = {"model": world.gemma, "dataset": chat, "chat_template": template, "out": tmp_path / out}
        defaults |= {"batch_size": 2, "max_length": 64, "warmup_steps": 0, "save_steps": 1}
        return fpo("sft", *to_arguments(defaults | options), *more)

    def record(out: str) -> dict[str, Any]:
        return yaml.safe_load((tmp_path / out / "run.yaml").read_text())

    today(MONDAY)
    ran(sft("run", max_steps=1))
    begun = record("run")
    assert begun["date"] == "2026-11-23"
    today(TUESDAY)
    ran(sft("run", "--resume", max_steps=2))
    assert {name: record("run")[name] for name in ("date", "data_sha256")} == {
        name: begun[name] for name in ("date", "data_sha256")
    }
    other = sft("run", "--resume", max_steps=3, date="2026-11-24")
    assert (other.exit_code, "date: was '2026-11-23', is '2026-11-24'" in other.stderr) == (2, True), other.output
    ran(sft("tuesday", max_steps=1))
    fresh = record("tuesday")
    assert fresh["date"] == "2026-11-24"
    assert fresh["data_sha256"] != begun["data_sha256"]


@pytest.mark.slow
def test_ranks_of_one_run_live_on_the_day_of_the_first(
    world: World, tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 6)
    options = {"model": world.gemma, "dataset": chat, "chat_template": template, "out": tmp_path / "run"}
    options |= {"batch_size": 2, "max_length": 64, "warmup_steps": 0, "max_steps": 1, "device": "cpu"}
    days = on_ranks(fine_tune_about_midnight, tmp_path, ["sft", *to_arguments(options)])
    assert days == ["2026-11-23", "2026-11-23"]
    assert yaml.safe_load((tmp_path / "run/run.yaml").read_text())["date"] == "2026-11-23"
