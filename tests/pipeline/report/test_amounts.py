from pathlib import Path

import pytest
from fpo.cache.manifest import Manifest
from fpo.cache.reader import open_cache
from fpo.pipeline.config import RunConfig
from fpo.pipeline.report.amounts import Data, data_of
from fpo.pipeline.report.jobs import Step
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples
from tiny_world import rows, write_rows

HUB = "HuggingFaceH4/ultrafeedback_binarized"


def step(command: str, **options) -> Step:
    return Step(command, command, RunConfig(**{"out": Path("runs") / command, **options}))


def test_the_paper_s_data_have_their_published_rows_and_assumed_lengths():
    found = data_of(step("precompute", dataset=HUB, split="train_prefs", max_length=2048), {})
    assert (found.count, found.tokens, found.answered) == (61_135, 845, 660)
    assert "assumed" in found.origin
    assert data_of(step("precompute", dataset=HUB, split="test_prefs", limit=300), {}).count == 300
    assert data_of(step("precompute", dataset=HUB, split="test_prefs", limit=10**6), {}).count == 2000
    chat = data_of(step("sft", dataset="HuggingFaceH4/ultrachat_200k", split="train_sft", max_length=2048), {})
    assert (chat.count, chat.sides) == (207_865, 1)


def test_rows_of_an_unknown_data_set_are_said_to_be_assumed():
    assert "rows" in data_of(step("precompute", dataset="somebody/pairs"), {}).origin


def test_local_rows_are_counted_and_their_texts_measured(tmp_path):
    made = rows(3, 9)
    file = str(write_rows(tmp_path / "pairs.jsonl", made))
    found = data_of(step("precompute", dataset=file, max_length=4096), {})
    prompts = sum(len(row["chosen"][0]["content"]) for row in made) / 9
    answers = sum(len(row[side][1]["content"]) for row in made for side in ("chosen", "rejected")) / 18
    assert found.count == 9
    assert (found.prompt, found.response) == (pytest.approx(prompts / 4), pytest.approx(answers / 4))
    assert data_of(step("precompute", dataset=file, limit=4), {}).count == 4
    talks = [{"messages": row["chosen"]} for row in made]
    talked = data_of(step("sft", dataset=str(write_rows(tmp_path / "talks.jsonl", talks)), max_length=4096), {})
    assert talked.tokens == pytest.approx(sum(len(m["content"]) for row in talks for m in row["messages"]) / 9 / 4)


def test_a_training_goes_over_what_its_cache_will_hold(world):
    maker = step("precompute", dataset=str(world.data), out=Path("runs/cache"), limit=5)
    for command in ("align", "evaluate"):
        assert data_of(step(command, cache=maker.out), {maker.out: maker}) == data_of(maker, {})


def test_a_finished_cache_says_its_own_lengths(world):
    pairs = [cached.pair for cached in open_cache(world.cache)]
    found = data_of(step("align", cache=world.cache), {})
    assert found.count == len(pairs)
    assert found.prompt == pytest.approx(sum(len(pair.prompt_ids) for pair in pairs) / len(pairs))
    responses = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    assert found.answered == pytest.approx(responses / len(pairs))
    assert found.tokens * len(pairs) == pytest.approx(Manifest.load(world.cache).counts["scored_tokens"])


def test_what_is_neither_there_nor_made_is_refused():
    with pytest.raises(FileNotFoundError, match="manifest"):
        data_of(step("align", cache=Path("no/cache")), {})


@many_examples
@given(
    prompt=st.floats(1, 5000),
    response=st.floats(1, 5000),
    sides=st.sampled_from([1, 2]),
    longest=st.integers(2, 5000),
    longest_prompt=st.integers(1, 5000),
)
def test_lengths_are_cut_to_the_limits_and_never_below_a_token(prompt, response, sides, longest, longest_prompt):
    cut = Data(3, prompt, response, sides, "").within(longest, longest_prompt)
    assert cut.prompt + cut.response <= longest * (1 + 1e-9)
    assert cut.prompt <= prompt and cut.response <= response
    if sides == 2:
        assert cut.prompt <= longest_prompt and cut.response >= 1
    if prompt + response <= longest and prompt <= longest_prompt:
        assert (cut.prompt, cut.response) == (prompt, response)


@many_examples
@given(prompt=st.integers(1, 40), response=st.integers(1, 40), sides=st.sampled_from([1, 2]))
def test_positions_attended_to_are_those_of_the_packed_mask(prompt, response, sides):
    # Token i of a prompt sees i + 1 positions; token i of a response the prompt and its own i + 1.
    counted = sum(range(1, prompt + 1)) + sides * sum(prompt + i for i in range(1, response + 1))
    tokens = prompt + sides * response
    assert Data(1, prompt, response, sides, "").attended == pytest.approx(counted - tokens / 2)
