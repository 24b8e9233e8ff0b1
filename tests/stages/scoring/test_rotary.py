"""Sequences whose rotary frequencies depend on their length score as a fresh model scores each of them alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fpo.cache.schema import Pair
from fpo.stages.data.tokenize import Conversation
from fpo.stages.model.sae import Site
from fpo.stages.scoring.forward import run_body, run_head, score_row
from fpo.stages.scoring.packing import RowLayout, pack, pack_conversations
from fpo.stages.scoring.rotary import forget_lengths, of_same_frequencies, unknown_scaling
from fpo.stages.scoring.supported import check_model
from fpo.stages.train import train_sae
from hypothesis import given
from hypothesis import strategies as st
from pairs import (
    Alone,
    assert_same_gradients,
    few_examples,
    gradients,
    pair_lists,
    random_pair,
    random_pairs,
    score_alone,
    swapped,
)
from tiny import randomize, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaForCausalLM, Phi3Config, PhimoeConfig

THRESHOLD = 20
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": THRESHOLD}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 5.0, 6.0, 7.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def dynamic(**more: Any) -> Any:
    return tiny_llama(max_position_embeddings=THRESHOLD, rope_parameters=DYNAMIC, **more)


def _of(config: Any, attention: str = "eager") -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return randomize(model, 0, embedding_std=0.5, norm_mean=1.0, final_norm_mean=1.0)


def phi3(attention: str) -> Any:
    lengths = {"max_position_embeddings": 80, "original_max_position_embeddings": THRESHOLD, "sliding_window": None}
    return _of(Phi3Config(**SIZES, **lengths, rope_parameters=dict(LONGROPE)), attention)


def phimoe() -> Any:
    """Its rotary embedding scales cosines by a factor that depends on length, and is of a class of its own."""
    scaling = LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.3}
    return _of(PhimoeConfig(**SIZES, num_local_experts=4, max_position_embeddings=80, rope_parameters=scaling))


def gemma3() -> Any:
    """Frequencies of each kind of layer; those of one kind depend on length."""
    kinds = {"full_attention": dict(DYNAMIC), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
    return _of(Gemma3TextConfig(**SIZES, **layers, max_position_embeddings=THRESHOLD, rope_parameters=kinds))


MODELS: dict[str, Callable[[], Any]] = {
    "dynamic packed": lambda: dynamic(attn_implementation="packed"),
    "dynamic eager": lambda: dynamic(attn_implementation="eager"),
    "longrope packed": lambda: phi3("packed"),
    "longrope eager": lambda: phi3("eager"),
    "longrope phimoe": phimoe,
    "dynamic of a kind": gemma3,
}


@pytest.fixture(scope="module", params=MODELS)
def make(request):
    return MODELS[request.param]


def score_response(model: Any, pair: Pair, side: int, sites: Sequence[Site] = ()) -> Alone:
    """Chosen (0) or rejected (1), before which the model has scored nothing of the pair."""
    first = pair if side == 0 else swapped(pair)
    return score_alone(model, first, sites)[0]


def assert_as_alone(make: Callable[[], Any], model: Any, pairs: list[Any], budget: int, pad_to: int = 1) -> None:
    expected = [score_response(make(), pair, side) for pair in pairs for side in (0, 1)]
    for row in pack(pairs, budget, RowLayout(pad_to)):
        found = score_row(model, row, [], "fp32").token_logps_T
        wanted = [expected[2 * index + side].token_logps_T for index in row.pairs for side in (0, 1)]
        torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-5)


@few_examples
@given(pairs=pair_lists(), budget=st.integers(1, 160), pad_to=st.sampled_from([1, 16]))
def test_pairs_around_the_threshold_score_as_alone_by_a_fresh_model(make, pairs, budget, pad_to):
    with torch.no_grad():
        assert_as_alone(make, make(), pairs, budget, pad_to)


@pytest.mark.parametrize("chosen", [THRESHOLD - 6, THRESHOLD - 5, THRESHOLD - 4, THRESHOLD + 9])
def test_a_pair_after_a_longer_one_and_beside_others(make, chosen):
    model = make()
    pairs = [random_pair(5, chosen, 3), random_pair(5, 3, chosen, seed=1), random_pair(2, 2, 2, seed=2)]
    with torch.no_grad():
        score_row(model, next(pack([random_pair(20, 20, 20)], 1)), [], "fp32")
        assert_as_alone(make, model, pairs, 1)
        assert_as_alone(make, model, pairs, 1000)


def test_frequencies_do_depend_on_length(make):
    """What the tests above could not see if nothing did."""
    ids = torch.arange(3, 3 + THRESHOLD + 8)[None]
    with torch.no_grad():
        short, long = make()(input_ids=ids[:, :THRESHOLD]).logits, make()(input_ids=ids).logits
    assert (long[:, :THRESHOLD] - short).abs().max() > 1e-3


def test_gradients_and_activations_are_those_of_separate_sequences(make):
    pairs = [random_pair(5, 20, 3), random_pair(9, 4, 30, seed=1), random_pair(3, 3, 3, seed=2)]
    model, site = make(), Site(1, "resid_post")
    (row,) = pack(pairs, 1000)
    hidden_TD, acts = run_body(model, row, [site])
    logps_T, _ = run_head(model, hidden_TD, row.targets_T)
    weights_T = torch.randn(len(logps_T), generator=torch.Generator().manual_seed(0))
    found = gradients(model, (logps_T * weights_T).sum() + (acts[site].square().mean(-1) * weights_T).sum())
    plain = make()
    total, start = torch.zeros(()), 0
    for pair in pairs:
        for side in (0, 1):
            forget_lengths(plain)
            one = score_response(plain, pair, side, [site])
            part_T = weights_T[start : start + len(one.targets_T)]
            start += len(one.targets_T)
            total = total + (one.token_logps_T * part_T).sum() + (one.acts[site].square().mean(-1) * part_T).sum()
    assert_same_gradients(found, gradients(plain, total), 1e-4)


def test_a_row_is_taken_apart_only_where_lengths_ask_for_it():
    short, mixed = random_pairs(0, 3, longest=6), [*random_pairs(0, 2, longest=6), random_pair(5, 30, 2)]
    for model, pairs, parts in ((dynamic(), short, 1), (dynamic(), mixed, 2), (tiny_llama(), mixed, 1)):
        (row,) = pack(pairs, 1000)
        found = of_same_frequencies(model, row, RowLayout(16))
        assert len(found) == parts
        if parts > 1:
            assert all(part.input_ids_L.numel() % 16 == 0 for part, _ in found)
            assert sorted(torch.cat([targets_T for _, targets_T in found]).tolist()) == list(range(len(row.targets_T)))


def test_conversations_score_as_alone_by_a_fresh_model(make):
    rng, expected = np.random.default_rng(0), []
    texts = [rng.integers(3, 128, size).astype(np.int32) for size in (30, 6, THRESHOLD, THRESHOLD + 1, 9)]
    (row,) = pack_conversations([Conversation(ids, np.arange(len(ids)) > 2) for ids in texts], 1000, RowLayout(16))
    with torch.no_grad():
        for ids in texts:
            expected.append(score_response(make(), Pair("", ids[:3], ids[3:], ids[3:]), 0).token_logps_T)
        found_T = score_row(make(), row, [], "fp32").token_logps_T
    torch.testing.assert_close(found_T, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_sharded_weights_are_refused_where_ranks_would_run_different_numbers_of_passes():
    model, (row,) = dynamic(), pack([random_pair(5, 30, 2)], 1000)
    score_row(model, row, [], "fp32")
    model.model.norm.weight.full_tensor = None  # as a DTensor has one
    with pytest.raises(ValueError, match=r"\Apairs [^\n]* not supported under FSDP; lower --max-length\Z"):
        score_row(model, row, [], "fp32")
    score_row(model, next(pack([random_pair(5, 3, 2)], 1000)), [], "fp32")


@pytest.mark.parametrize("threshold", [10, 15, 40, 200, 400])
def test_a_model_is_found_right_on_either_side_of_what_it_is_tried_with(threshold):
    check_model(tiny_llama(max_position_embeddings=threshold, rope_parameters=DYNAMIC))
    scaling = LONGROPE | {"original_max_position_embeddings": threshold}
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": threshold, "sliding_window": None}
    check_model(_of(Phi3Config(**SIZES, **lengths, rope_parameters=scaling), "packed"))


def test_a_scaling_that_is_not_known_is_refused():
    class OwnRotaryEmbedding(torch.nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            angle = position_ids[..., None] / (1 + position_ids.max() // 30000) * torch.ones(8)
            return angle.cos(), angle.sin()

    model: LlamaForCausalLM = tiny_llama()
    assert unknown_scaling(model) is None
    check_model(model)
    model = tiny_llama()
    model.model.rotary_emb = OwnRotaryEmbedding()
    with pytest.raises(ValueError, match=r"rotary frequencies that depend on length .*OwnRotaryEmbedding"):
        check_model(model)


def test_frequencies_that_a_layer_computes_are_refused_since_checkpointing_computes_them_again():
    model = dynamic()
    model.model.layers[0].rotary_emb = model.model.rotary_emb
    with pytest.raises(ValueError, match=r"rotary frequencies that depend on length inside its layers"):
        check_model(model)
    check_model(dynamic())


def test_an_sae_is_trained_on_activations_of_sequences_as_a_fresh_model_has_them():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 128, size).astype(np.int32) for size in (30, 6, 25, THRESHOLD, 7, 30)]
    found = torch.cat(list(train_sae._activations(dynamic(), sequences, Site(0, "resid_post"))))
    expected = []
    for ids in sequences:
        with torch.no_grad():
            plain = dynamic()(input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
        expected.append(plain.hidden_states[1][0, 1:])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
