"""Diversity H: against closed forms of policies whose next token is always drawn from one known distribution."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from fpo.stages.data.chat import ChatFormat
from fpo.stages.evaluate.diversity import (
    Sample,
    closing_token,
    distinct_prompts,
    repetition,
    sample_answers,
    sample_metrics,
    score_answers,
)
from fpo.stages.evaluate.generate import Sampling
from fpo.stages.scoring.measure import measure_pairs
from hypothesis import given
from hypothesis import strategies as st
from pairs import calm_gemma2, few_examples, random_pair, random_pairs, score_alone
from tiny import tiny_llama
from tiny_tokenizers import chatml, gemma

END = 1
# Of the tokens 0 to 5. A nucleus of 0.9 is the first four and ends between two tokens, not on one.
PROBS = np.array([0.35, 0.2, 0.25, 0.15, 0.04, 0.01])
PROMPTS = [random_pair(length, 1, 1, length).prompt_ids for length in (3, 9, 5, 12)]


def memoryless(probs: np.ndarray = PROBS) -> Any:
    """A policy whose next token is drawn from `probs` at every position, whatever came before."""
    model = tiny_llama(tie_word_embeddings=False, pad_token_id=None, num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1)
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        model.model.norm.weight.fill_(1)  # the hidden state is ones, up to the norm's epsilon
        logits = torch.full((model.config.vocab_size,), -1e4)
        logits[: len(probs)] = torch.from_numpy(np.log(probs)).float()
        model.lm_head.weight.copy_(logits[:, None].expand(-1, 32) / 32)
    return model


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest most likely tokens that hold `top_p`, renormalised."""
    order = np.argsort(-probs)
    kept = order[: 1 + np.searchsorted(np.cumsum(probs[order]), top_p)]
    truncated = np.zeros_like(probs)
    truncated[kept] = probs[kept]
    return truncated / truncated.sum()


def expectations(q: np.ndarray, longest: int) -> tuple[float, float, float]:
    """E_q of -(1/|y|) log π(y), of |y| and of having ended, where tokens are drawn from q until END or `longest`."""
    surprise = -np.log(PROBS)
    going_on = np.where(np.arange(len(q)) == END, 0, q)
    per_token = going_on @ surprise / going_on.sum()
    entropy = length = 0.0
    for tokens in range(1, longest + 1):
        reached = (1 - q[END]) ** (tokens - 1)
        last, chance = (surprise[END], reached * q[END]) if tokens < longest else (q @ surprise, reached)
        entropy += chance * ((tokens - 1) * per_token + last) / tokens
        length += chance * tokens
    return entropy, length, 1 - (1 - q[END]) ** longest


def sampled(top_p: float, temperature: float = 1.0, longest: int = 6, samples: int = 150) -> list[list[Sample]]:
    return sample_answers(
        memoryless(),
        PROMPTS,
        samples=samples,
        sampling=Sampling(temperature=temperature, top_p=top_p, max_new_tokens=longest, seed=3, batch=100),
        end_id=END,
        recipe="fp32",
        token_budget=4096,
    )


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 1.0), (0.9, 1.0), (0.5, 1.0), (0.9, 2.0)])
def test_h_is_the_expectation_under_what_was_sampled_of_the_whole_policy_s_surprise(top_p, temperature):
    tempered = PROBS ** (1 / temperature)
    expected = expectations(nucleus(tempered / tempered.sum(), top_p), longest=6)
    samples = sampled(top_p, temperature)
    metrics = sample_metrics(samples)
    answers = [sample for of_prompt in samples for sample in of_prompt]
    values = {
        "diversity/entropy": [-sample.logp / len(sample.ids) for sample in answers],
        "length/mean": [len(sample.ids) for sample in answers],
        "length/finished": [sample.ids[-1] == END for sample in answers],
    }
    for (name, drawn), value in zip(values.items(), expected, strict=True):
        error = np.std(drawn) / np.sqrt(len(drawn))
        assert metrics[name]["mean"] == pytest.approx(np.mean(drawn))
        assert abs(metrics[name]["mean"] - value) <= 3.5 * error + 1e-9, name
        assert metrics[name]["n"] == len(PROMPTS)


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3, 4, 5], 0.0),
        ([1, 2, 3], 0.0),
        ([7] * 7, 3 / 4),  # four runs, one of them new
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([1, 2, 3, 4, 2, 3, 4, 1], 0.0),
    ],
)
def test_repetition_is_the_share_of_runs_of_four_that_came_before(ids, share):
    assert repetition(np.array(ids, np.int32)) == pytest.approx(share)
    found = sample_metrics([[Sample(np.array(ids, np.int32), -1.0, True)] * 2])
    assert found["diversity/repetition"]["mean"] == pytest.approx(share)


def test_truncation_is_told_apart_from_none():
    # The nucleus of 0.5 is tokens 0 and 2: END is never drawn, and the surprise is that of two tokens under all six.
    samples = sampled(0.5)
    assert {token for of_prompt in samples for sample in of_prompt for token in sample.ids.tolist()} == {0, 2}
    for of_prompt in samples:
        for sample in of_prompt:
            assert not sample.finished
            assert sample.logp == pytest.approx(np.log(PROBS[sample.ids]).sum(), rel=1e-4)


def test_prompts_are_what_is_resampled():
    of_prompts = [[Sample(np.array([7, END], np.int32), -2.0 * h, True)] * 25 for h in (1.0, 2.0, 3.0)]
    found = sample_metrics(of_prompts)["diversity/entropy"]
    assert found["mean"] == pytest.approx(2.0)
    assert (found["low"], found["high"]) == (1.0, 3.0)  # one resample in 27 takes a single prompt three times


@few_examples
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=4),
    budget=st.integers(1, 200),
)
def test_each_answer_has_the_log_prob_that_it_has_alone(lengths, budget):
    model = calm_gemma2()
    prompts = [random_pair(4 + number, 1, 1, number).prompt_ids for number in range(len(lengths))]
    answers = [
        [random_pair(1, length, 1, 10 * number + i).chosen_ids for i, length in enumerate(of_prompt)]
        for number, of_prompt in enumerate(lengths)
    ]
    found = score_answers(model, prompts, answers, "fp32", budget)
    assert [len(of_prompt) for of_prompt in found] == [len(of_prompt) for of_prompt in answers]
    with torch.no_grad():
        for prompt, of_prompt, logps in zip(prompts, answers, found, strict=True):
            for answer, logp in zip(of_prompt, logps, strict=True):
                pair = random_pair(1, 1, 1)
                object.__setattr__(pair, "prompt_ids", prompt)
                object.__setattr__(pair, "chosen_ids", answer)
                alone, _ = score_alone(model, pair)
                assert logp == pytest.approx(float(alone.token_logps_T.double().sum()), rel=1e-5, abs=1e-5)


def test_an_answer_that_cannot_be_scored_is_named():
    model = calm_gemma2()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="answers 0 and 1 to prompt 0"):
        score_answers(model, PROMPTS[:1], [[np.array([3], np.int32), np.array([4], np.int32)]], "fp32", 100)


# Prompts and the closing token


def test_prompts_that_repeat_are_taken_once_in_order():
    pairs = random_pairs(0, 4)
    again = [pairs[i] for i in (0, 1, 0, 2, 2, 3)]
    cached = measure_pairs(calm_gemma2(), again, [], "fp32", token_budget=200, keep_features=None)
    found = distinct_prompts(cached, 3)
    assert [pair.pair_id for pair in found] == [pair.pair_id for pair in pairs[:3]]
    assert len(distinct_prompts(cached, 9)) == 4
    # A pair that parts at a turn of the user's: no answer follows its prompt.
    parted = dataclasses.replace(pairs[0], chosen_learnt=np.int32([1, 3]), rejected_learnt=np.int32([2, 3]))
    cached = [dataclasses.replace(row, pair=parted) if row.pair.pair_id == parted.pair_id else row for row in cached]
    assert parted.pair_id not in [pair.pair_id for pair in distinct_prompts(cached, 9)]


@pytest.mark.parametrize("make", [gemma, chatml])
def test_the_closing_token_is_the_one_that_closes_the_cached_responses(make):
    chat = ChatFormat(make())
    eos = chat.tokenizer.eos_token_id
    assert chat.end_id != eos
    for closing in (chat.end_id, eos):
        pairs = random_pairs(0, 4)
        for pair in pairs[:3]:  # the last one was truncated
            for ids in (pair.chosen_ids, pair.rejected_ids):
                ids[-1] = closing
        assert closing_token(pairs, chat) == closing
    cut = random_pairs(0, 1)
    assert closing_token(cut, chat) == chat.end_id
