import numpy as np
import pytest
import torch
from fpo.cache.schema import Pair
from fpo.stages.model.models import find_model
from fpo.stages.model.tokenizer import load_tokenizer
from tiny_setting import tiny_setting

from benchmarks.pairs import amounts, attended, choose, padded, random_pairs, real_pairs, size
from benchmarks.prepare import cached_pairs, prepare
from benchmarks.setting import load


def pair(prompt: int, chosen: int, rejected: int) -> Pair:
    return Pair("0" * 16 + "-0", *(np.zeros(length, np.int32) for length in (prompt, chosen, rejected)))


def test_tokens_are_counted_with_the_prompt_once_or_padded_to_the_longest_sequence():
    batch = [pair(10, 5, 7), pair(4, 20, 1)]
    assert [size(one) for one in batch] == [22, 25]
    assert padded(batch) == 4 * 24
    found = amounts(batch, 2)
    assert (found["prompt"], found["response"], found["packed"], found["padded"]) == (7, 8.25, 23.5, 48)
    assert attended(pair(10, 4, 0)) == 50 + 4 * 12


def test_warm_up_takes_the_shortest_pairs_and_the_measured_batches_are_the_middle_ones(world):
    setting = tiny_setting(world, batch=2, steps=1)
    short, others = [pair(1, 1, 1), pair(1, 1, 2)], [pair(5, 5 + i * i, 5) for i in range(10)]
    chosen = choose([*others, *short], setting)
    assert chosen[:2] == short
    ratio = padded(chosen[2:]) / sum(map(size, chosen[2:]))
    everything = choose([*others, *short], tiny_setting(world, batch=2, steps=5))[2:]
    ratios = sorted(padded(everything[i : i + 2]) / sum(map(size, everything[i : i + 2])) for i in range(0, 10, 2))
    assert ratio == ratios[2]


def test_generated_lengths_have_the_means_that_were_asked_for_and_the_limit(world):
    setting = tiny_setting(world, prompt=185.0, response=330.0, max_length=2048)
    pairs = random_pairs(setting, 1000, count=4000)
    found = amounts(pairs, 4)
    assert found["prompt"] == pytest.approx(185, rel=0.05) and found["response"] == pytest.approx(330, rel=0.05)
    short = random_pairs(tiny_setting(world, prompt=185.0, response=330.0, max_length=256), 1000, count=100)
    assert all(one.prompt_ids.size + max(one.chosen_ids.size, one.rejected_ids.size) <= 256 for one in short)
    assert all(ids.max() < 1000 for one in short for ids in (one.prompt_ids, one.chosen_ids))


def test_real_pairs_are_those_of_the_data_set_that_are_not_skipped(world):
    assert len(real_pairs(tiny_setting(world), load_tokenizer(find_model(str(world.llama))))) == 12


def test_a_prepared_folder_holds_the_pairs_and_a_model_that_scores_them(prepared):
    setting, folder = prepared
    pairs = cached_pairs(folder)
    assert len(pairs) == setting.batch * (setting.warmup + setting.steps)
    assert sum(map(size, pairs[:2])) <= sum(map(size, pairs[2:4]))
    assert load(setting, folder, None).config._attn_implementation == "sdpa"


def test_of_a_hub_id_the_shape_is_taken_with_the_same_random_weights_each_time(world, tmp_path, monkeypatch):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(world.llama)
    monkeypatch.setattr("benchmarks.prepare.configuration", lambda name: config)
    setting = tiny_setting(world, model="owner/model", dataset=None)
    found = prepare(setting, tmp_path)
    assert found["all"]["pairs"] == 512
    first, second = (load(setting, tmp_path, "eager").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
