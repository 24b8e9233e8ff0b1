import logging
from typing import Any

import numpy as np
import pytest
import torch
from fpo.cache.errors import UserError
from fpo.cache.schema import Int32
from fpo.stages.evaluate.generate import Sampling, generate
from fpo.stages.scoring.forward import attach_scoring
from fpo.stages.scoring.packing import pack
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import calm_gemma2, few_examples, random_pairs
from scipy.stats import chisquare
from tiny import tiny_family, tiny_gemma2, tiny_llama
from transformers import GenerationConfig

MODELS = {
    "gemma2": tiny_gemma2(),
    "gemma2 packed": tiny_gemma2(attn_implementation="packed"),
    "llama": tiny_llama(attn_implementation="packed"),
    "mistral": tiny_family("mistral", attention="packed"),  # a window in every layer
}
END = 127
GREEDY = Sampling(temperature=0, max_new_tokens=12, batch=3)


def prompts_of(*lengths: int, seed: int = 0) -> list[Int32]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 128, length).astype(np.int32) for length in lengths]


def next_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def argmax_loop(model: Any, prompt: Int32, tokens: int) -> list[int]:
    """One prompt alone, without a cache."""
    ids: list[int] = prompt.tolist()
    for _ in range(tokens):
        ids.append(int(next_logits(model, ids).argmax()))
    return ids[len(prompt) :]


def only(answers: list[list[Int32]]) -> list[list[int]]:
    return [answer.tolist() for (answer,) in answers]


@pytest.mark.parametrize("name", MODELS)
@settings(few_examples, max_examples=8)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3), batch=st.integers(1, 3), seed=st.integers(0, 9))
def test_greedy_answers_are_those_of_an_argmax_loop(name, lengths, batch, seed):
    """Which is to say that each token is the likeliest one after all before it: a loop of one forward pass."""
    model, prompts = MODELS[name], prompts_of(*lengths, seed=seed)
    sampling = Sampling(temperature=0, max_new_tokens=9, batch=batch)
    answers = generate(model, prompts, samples=1, sampling=sampling, end_id=END)
    for (answer,), prompt in zip(answers, prompts, strict=True):
        with torch.no_grad():
            whole = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
            likeliest = model(input_ids=whole[None], use_cache=False).logits[0].argmax(-1)
        assert answer.dtype == np.int32
        assert answer.tolist() == likeliest[len(prompt) - 1 : -1].tolist()
        assert END not in answer[:-1]
        assert len(answer) == 9 or answer[-1] == END


def test_greedy_answers_to_prompts_of_other_lengths_are_those_of_an_argmax_loop():
    model, prompts = MODELS["gemma2"], prompts_of(3, 20, 9)
    found = only(generate(model, prompts, samples=1, sampling=GREEDY, end_id=END))
    assert found == [argmax_loop(model, prompt, 12) for prompt in prompts]


def test_an_answer_ends_with_the_closing_token_where_it_is_reached():
    model, prompts = MODELS["gemma2"], prompts_of(3, 20, 9)
    whole = [argmax_loop(model, prompt, 12) for prompt in prompts]
    closing = next(token for token in whole[0][3:] if token not in whole[0][:3] + whole[1] + whole[2])
    found = only(generate(model, prompts, samples=1, sampling=GREEDY, end_id=closing))
    assert found == [whole[0][: whole[0].index(closing) + 1], whole[1], whole[2]]
    first = whole[1][0]
    assert only(generate(model, prompts[1:2], samples=1, sampling=GREEDY, end_id=first)) == [[first]]


def nucleus(logits_V: torch.Tensor, temperature: float, top_p: float) -> dict[int, float]:
    """Probabilities of the fewest likeliest tokens that have at least `top_p` together, summed to 1."""
    probs = torch.softmax(logits_V / temperature, dim=-1).tolist()
    kept: dict[int, float] = {}
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        kept[token] = probs[token]
        if sum(kept.values()) >= top_p:
            break
    return {token: prob / sum(kept.values()) for token, prob in kept.items()}


@pytest.mark.parametrize(("temperature", "top_p"), [(3.0, 0.9), (4.0, 0.7), (4.0, 1.0)])
def test_tokens_are_drawn_from_the_nucleus_alone_with_its_probabilities(temperature, top_p):
    """Pairs of tokens: the second comes from the cache, and after a prompt that was padded."""
    model, prompts, count = MODELS["gemma2"], prompts_of(2, 11), 2000
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=2, seed=1, batch=2 * count)
    answers = generate(model, prompts, samples=count, sampling=sampling, end_id=END)
    for prompt, samples in zip(prompts, answers, strict=True):
        assert len(samples) == count
        firsts = nucleus(next_logits(model, prompt.tolist()), temperature, top_p)
        assert_drawn_from(firsts, [int(sample[0]) for sample in samples])
        common = max(firsts.keys() - {END}, key=firsts.__getitem__)
        seconds = nucleus(next_logits(model, [*prompt.tolist(), common]), temperature, top_p)
        assert_drawn_from(seconds, [int(sample[1]) for sample in samples if sample[0] == common])


def assert_drawn_from(probs: dict[int, float], drawn: list[int]) -> None:
    assert set(drawn) <= probs.keys()
    expected = {token: prob * len(drawn) for token, prob in probs.items()}
    # Counts below 5 are taken together: the test's approximation needs that.
    common = [token for token in expected if expected[token] >= 5]
    observed = [drawn.count(token) for token in common]
    means = [expected[token] for token in common]
    if len(common) < len(expected):
        observed.append(len(drawn) - sum(observed))
        means.append(len(drawn) - sum(means))
    assert len(means) > 3, "this tests nothing"
    assert chisquare(observed, means).pvalue > 1e-4


def test_answers_depend_on_the_seed_alone():
    model, prompts = calm_gemma2(), prompts_of(5, 9)
    runs = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        sampling = Sampling(seed=seed, max_new_tokens=6, batch=2)
        answers = generate(model, prompts, samples=4, sampling=sampling, end_id=END)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append([answer.tolist() for of_prompt in answers for answer in of_prompt])
    assert runs[0] == runs[1]
    assert not any(ours == theirs for ours, theirs in zip(runs[0], runs[2], strict=True))
    assert len({tuple(answer) for answer in runs[0]}) == 8, "no two batches and no two samples draw alike"


def test_the_models_own_settings_play_no_part_and_stay(caplog, recwarn):
    model, prompts = tiny_gemma2(attention_dropout=0.5), prompts_of(4, 9)
    sampling = Sampling(max_new_tokens=6)
    runs = [generate(model, prompts, samples=2, sampling=s, end_id=5) for s in (GREEDY, sampling)]
    own = GenerationConfig(
        do_sample=True,
        repetition_penalty=9.0,
        top_k=1,
        eos_token_id=[1, 2],
        max_length=3,
        num_beams=2,
        min_new_tokens=4,
        temperature=9.0,
    )
    model.generation_config = own
    model.train()
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        again = [generate(model, prompts, samples=2, sampling=s, end_id=5) for s in (GREEDY, sampling)]
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert str(again) == str(runs)
    assert model.generation_config is own
    assert model.training
    assert not caplog.records
    assert not recwarn.list


def test_a_model_that_scores_inside_its_forward_generates_as_before():
    model, prompts = calm_gemma2(), prompts_of(4, 9)
    expected = only(generate(model, prompts, samples=1, sampling=GREEDY, end_id=5))
    attach_scoring(model)
    assert only(generate(model, prompts, samples=1, sampling=GREEDY, end_id=5)) == expected
    (row,) = pack(random_pairs(0, 1), 1000)
    assert model(packed=row, saes=(), recipe="fp32").logps_R.shape == (2,)


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_llama])
def test_a_model_loaded_for_compiled_attention_generates_and_keeps_it(make):
    prompts = prompts_of(4, 17)
    expected = only(generate(make(attn_implementation="eager"), prompts, samples=1, sampling=GREEDY, end_id=5))
    model = make(attn_implementation="packed_flex")
    assert only(generate(model, prompts, samples=1, sampling=GREEDY, end_id=5)) == expected
    assert model.config._attn_implementation == "packed_flex"


def test_an_interruption_leaves_the_model_as_it_was():
    model = tiny_llama(attn_implementation="packed_flex").train()
    attach_scoring(model)
    own, forward = model.generation_config, model.forward

    def stop(answers: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts_of(4), samples=1, sampling=GREEDY, end_id=5, on_batch=stop)
    assert model.generation_config is own
    assert model.forward is forward
    assert model.training
    assert model.config._attn_implementation == "packed_flex"


def test_progress_counts_every_answer_once():
    seen: list[int] = []
    sampling = Sampling(max_new_tokens=2, batch=4)
    generate(MODELS["llama"], prompts_of(3, 8, 5), samples=3, sampling=sampling, end_id=5, on_batch=seen.append)
    assert seen == [4, 4, 1]


def test_a_prompt_without_room_for_its_answer_is_refused():
    model, sampling = tiny_llama(max_position_embeddings=20), Sampling(max_new_tokens=8)
    assert generate(model, prompts_of(12), samples=1, sampling=sampling, end_id=5)
    with pytest.raises(UserError, match=r"^prompt 1: expected .* within the model's 20 tokens, found 13 .* 8 more; "):
        generate(model, prompts_of(12, 13), samples=1, sampling=sampling, end_id=5)
    with pytest.raises(UserError, match=r"^prompt 0: expected at least one token"):
        generate(model, prompts_of(0), samples=1, sampling=sampling, end_id=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("batch", 0),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=rf"^{name}: expected .*, found {value}$"):
        Sampling(**{name: value})
