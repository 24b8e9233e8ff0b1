"""A run that would start against another model than its cache's stops before its first step; the right ones go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cache_rows import forge
from fpo.cache.manifest import Manifest
from fpo.cache.reader import open_cache
from fpo.stages.data.chat import GEMMA_TURNS
from pairs import calm_gemma2, calm_llama
from tiny_tokenizers import gemma
from tiny_world import World, files, metrics, ran, rows, save_model, write_rows
from wrong_starts import ALLOWED, LOGPS, REFUSED, fine_tuned, with_hash


def options_of(case: str, world: World, folder: Path) -> dict[str, Any]:
    return (ALLOWED | REFUSED)[case][0](world, folder)


@pytest.mark.parametrize("case", [*ALLOWED, *REFUSED])
def test_a_wrong_start_stops_before_the_first_step_with_one_line(world, tmp_path, tally, case):
    options = options_of(case, world, tmp_path)
    result = world.align(tmp_path / "out", **options)
    said = [line for line in result.stderr.splitlines() if line.startswith("fpo: ")]
    assert (result.exit_code, len(said)) == (2, 1), result.stderr
    for part in (ALLOWED | REFUSED)[case][1]:
        assert part in said[0]
    assert files(tmp_path / "out") == {}
    tally("wrong starts caught by parity")


@pytest.mark.parametrize("case", ALLOWED)
def test_a_wrong_start_goes_on_by_request_and_says_so(world, tmp_path, tries, case):
    if not tries(0, 1) and case not in ("another chat template", "swapped log-probs"):
        pytest.skip("in the long version")
    options = options_of(case, world, tmp_path)
    ran(world.align(tmp_path / "out", "--allow-different-start", max_steps=1, **options))
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["allow_different_start"] is True
    first = metrics(tmp_path / "out")[0]
    beyond = [name for name in ("parity/logps", "parity/mse") if first[name] > first[f"{name}_allowed"]]
    assert bool(beyond) != (case in ("another chat template",))


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_at_all_is_refused_by_request_too(world, tmp_path, case):
    result = world.align(tmp_path / "out", "--allow-different-start", **options_of(case, world, tmp_path))
    assert result.exit_code == 2, result.output
    assert files(tmp_path / "out") == {}


def test_a_cache_in_a_template_of_one_s_own_is_trained_on_with_that_template(world, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(GEMMA_TURNS.replace("model", "assistant"))
    ran(world.precompute(tmp_path / "cache", chat_template=template))
    options = {"cache": tmp_path / "cache", "max_steps": 1}
    assert world.align(tmp_path / "out", **options).exit_code == 2
    ran(world.align(tmp_path / "out", chat_template=template, **options))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template.read_text()


def test_one_step_of_training_is_told_from_rounding(world, tmp_path):
    """In fp32, with hashes that agree; which steps are too small is in docs/reliability.md."""
    result = world.align(tmp_path / "out", **with_hash(world, tmp_path, fine_tuned(world, tmp_path, lr=5e-6)))
    assert (result.exit_code, LOGPS in result.stderr) == (2, True), result.stderr


MODELS = {"gemma": (calm_gemma2, ("eager",)), "llama": (calm_llama, ("packed", "eager"))}


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("family", MODELS)
def test_the_cache_s_own_model_passes_whatever_rounds_otherwise(world, tmp_path, tries, tally, family, recipe):
    make, implementations = MODELS[family]
    for seed in range(tries(1, 12)):
        folder = tmp_path / str(seed)
        model = save_model(folder / "model", lambda seed=seed, **sizes: make(seed, **sizes), gemma())
        data = write_rows(folder / "data.jsonl", rows(seed, 2 + seed))  # down to a noise of two pairs
        common = {"model": model, "dtype": recipe, "cache": folder / "cache", "max_steps": 1}
        settings = {key: common[key] for key in ("model", "dtype")} | {"dataset": data, "attention": implementations[0]}
        ran(world.precompute(folder / "cache", token_budget=(1, 160, 10_000)[seed % 3], **settings))
        threads = torch.get_num_threads()
        for number, attention in enumerate(implementations):
            torch.set_num_threads(1 + number)
            try:
                budget = (10_000, 1, 160)[seed % 3]
                ran(world.align(folder / f"run-{number}", attention=attention, token_budget=budget, **common))
            finally:
                torch.set_num_threads(threads)
            tally("right starts passed by parity")


def test_the_wrong_starts_are_those_of_a_cache_that_is_sound_but_for_what_was_forged(world, tmp_path):
    cache = forge(world.cache, tmp_path / "cache")
    ran(world.align(tmp_path / "out", cache=cache, max_steps=1))
    assert Manifest.load(cache).meaning == open_cache(world.cache).manifest.meaning
