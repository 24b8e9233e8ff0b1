import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fpo.stages.model.sae import Site
from fpo.stages.scoring import features, logprobs
from fpo.stages.scoring.features import CachedFeatures, keep_largest
from fpo.stages.scoring.forward import attach_scoring, live_reference, run_body, score_row
from fpo.stages.scoring.measure import measure_pairs
from fpo.stages.scoring.packing import RowLayout, pack
from hypothesis import given
from hypothesis import strategies as st
from pairs import (
    assert_same_gradients,
    calm_gemma2,
    calm_llama,
    dense_drift,
    few_examples,
    gradients,
    learnt_tokens,
    pair_lists,
    random_pair,
    random_pairs,
    score_alone,
    with_context,
)
from tiny import tiny_family, tiny_gemma2, tiny_sae
from torch import Tensor

MODELS: dict[str, Callable[[], Any]] = {
    "gemma2": calm_gemma2,
    "gemma2 packed": lambda: calm_gemma2(attn_implementation="packed"),
    "gemma2 untied": lambda: calm_gemma2(tie_word_embeddings=False),
    "llama eager": lambda: calm_llama(attn_implementation="eager"),
    "llama packed": lambda: calm_llama(attn_implementation="packed"),
}
# The last layer's residual stream, and both hooks and all kinds of encoder below it.
SAES = [
    tiny_sae(site=Site(2, "resid_post")),
    tiny_sae(site=Site(1, "mlp_out"), architecture="standard", seed=1),
    tiny_sae(site=Site(3, "resid_post"), architecture="topk", seed=2),
]
SITES = [sae.site for sae in SAES]
TOP_K = 8


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK_ENTRIES, "cpu", 128 * 7)
    monkeypatch.setattr(logprobs, "LEAST_TOKENS", 1)
    monkeypatch.setattr(features, "CHUNK_ENTRIES", 64 * 7)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def random_weights(pairs: list[Any], seed: int = 0) -> Tensor:
    """How much each number of each response counts in a loss: log-prob, then the drift at each site."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(pairs), 2, 1 + len(SAES), generator=generator, dtype=torch.float64)


def references(pairs: list[Any], seed: int = 0) -> list[list[list[Tensor]]]:
    """Pooled features of a made-up reference, by pair, side and site."""
    generator = torch.Generator().manual_seed(seed)
    return [[[torch.relu(torch.rand(64, generator=generator) - 0.7) for _ in SAES] for _ in range(2)] for _ in pairs]


def packed_loss(model: Any, pairs: list[Any], budget: int, pad_to: int) -> Tensor:
    """A loss of log-probs and drifts at every site, from packed rows."""
    weights, cached = random_weights(pairs), references(pairs)
    total = torch.zeros((), dtype=torch.float64)
    for row in pack(pairs, budget, RowLayout(pad_to)):
        sides = [cached[index][side] for index in row.pairs for side in (0, 1)]
        collated = [
            CachedFeatures.collate([keep_largest(side[site], None) for side in sides], 64) for site in range(len(SAES))
        ]
        scores = score_row(model, row, SAES, "fp32", cached=collated, top_k=TOP_K)
        numbers = torch.stack([scores.logps_R, *(drift.mse_R for drift in scores.drifts)], dim=1)
        total = total + (numbers.unflatten(0, (-1, 2)) * weights[list(row.pairs)]).sum()
    return total


def alone_loss(model: Any, pairs: list[Any]) -> Tensor:
    """The same loss from separate sequences, full logits and all features."""
    weights, cached = random_weights(pairs), references(pairs)
    total = torch.zeros((), dtype=torch.float64)
    for number, pair in enumerate(pairs):
        for side, alone in enumerate(score_alone(model, pair, SITES)):
            numbers = [alone.token_logps_T.double().sum()]
            for sae, reference_M in zip(SAES, cached[number][side], strict=True):
                numbers.append(dense_drift(alone.pooled_M(sae), reference_M, TOP_K))
            total = total + (torch.stack(numbers) * weights[number, side]).sum()
    return total


@few_examples
@given(pairs=pair_lists(), budget=st.integers(1, 160), pad_to=st.sampled_from([1, 16]))
def test_packed_rows_score_as_separate_sequences(model, pairs, budget, pad_to):
    with torch.no_grad():
        for row in pack(pairs, budget, RowLayout(pad_to)):
            scores = score_row(model, row, SAES, "fp32")
            responses = [alone for index in row.pairs for alone in score_alone(model, pairs[index], SITES)]
            tokens = scores.token_logps_T.split(list(row.lengths))
            for number, (alone, token_logps) in enumerate(zip(responses, tokens, strict=True)):
                torch.testing.assert_close(token_logps, alone.token_logps_T, rtol=0, atol=2e-6)
                total = alone.token_logps_T.double().sum()
                torch.testing.assert_close(scores.logps_R[number], total, rtol=1e-7, atol=1e-5)
                for sae, pooled_RM in zip(SAES, scores.pooled, strict=True):
                    torch.testing.assert_close(pooled_RM[number], alone.pooled_M(sae), rtol=1e-5, atol=1e-5)


@few_examples
@given(pairs=pair_lists(), budget=st.integers(1, 160), seed=st.integers(0, 99))
def test_context_in_a_response_is_read_and_not_scored(model, pairs, budget, seed):
    several = [with_context(pair, seed) for pair in pairs]
    cached = measure_pairs(model, several, SAES, "fp32", token_budget=budget, keep_features=None)
    for pair, row in zip(several, cached, strict=True):
        with torch.no_grad():
            alone = score_alone(model, pair, SITES)
        for truth, side, learnt in zip(alone, (row.chosen, row.rejected), learnt_tokens(pair), strict=True):
            assert side.num_tokens == len(learnt)
            assert side.logp == pytest.approx(float(truth.token_logps_T[learnt].double().sum()), abs=1e-5)
            for sae, kept in zip(SAES, side.features, strict=True):
                dense_M = torch.zeros(sae.width)
                dense_M[kept.ids.astype("int64")] = torch.from_numpy(kept.values)
                pooled_M = sae.sae.encode(truth.acts[sae.site][learnt]).mean(0)
                torch.testing.assert_close(dense_M, pooled_M, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "packed"])
@pytest.mark.parametrize("family", ["gemma3", "mistral", "qwen2"])
def test_other_families_with_windows_score_as_separate_sequences(family, attention):
    model, pairs = tiny_family(family, attention=attention), random_pairs(3, 4)
    with torch.no_grad():
        for row in pack(pairs, 200):
            scores = score_row(model, row, SAES, "fp32")
            responses = [alone for index in row.pairs for alone in score_alone(model, pairs[index], SITES)]
            for number, alone in enumerate(responses):
                expected = alone.token_logps_T.double().sum()
                torch.testing.assert_close(scores.logps_R[number], expected, rtol=1e-5, atol=1e-5)
                for sae, pooled_RM in zip(SAES, scores.pooled, strict=True):
                    torch.testing.assert_close(pooled_RM[number], alone.pooled_M(sae), rtol=1e-4, atol=1e-4)
        ids = torch.arange(24)[None]
        full = model(input_ids=ids).logits[0, -1]
        last_window = model(input_ids=ids[:, -8:], position_ids=ids[:, -8:]).logits[0, -1]
    assert (full - last_window).abs().max() > 1e-3, "what is before the window has to matter, or this tests nothing"


@few_examples
@given(pairs=pair_lists(most=3), budget=st.integers(1, 160), pad_to=st.sampled_from([1, 16]))
def test_packed_rows_have_the_gradients_of_separate_sequences(model, pairs, budget, pad_to):
    packed, alone = packed_loss(model, pairs, budget, pad_to), alone_loss(model, pairs)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, packed), gradients(model, alone))


def test_activation_checkpointing_changes_no_gradient(model):
    pairs, trained = random_pairs(5, 3), copy.deepcopy(model).train()
    trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(trained, packed_loss(trained, pairs, 100, 1))
    expected = gradients(model, packed_loss(model, pairs, 100, 1))
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_every_weight_gets_a_gradient(model):
    found = gradients(model, packed_loss(model, random_pairs(5, 3), 100, 1))
    assert {name for name, grad in found.items() if grad.abs().max() > 0} == dict(model.named_parameters()).keys()


def test_a_sharp_model_differs_from_separate_sequences_by_its_rounding():
    """Logits of up to 30 and hard attention, where both soft-caps bend and fp32 rounds more."""
    model, pairs = tiny_gemma2(), random_pairs(1, 6)
    with torch.no_grad():
        for row in pack(pairs, 200):
            found = score_row(model, row, [], "fp32").token_logps_T
            expected = [alone.token_logps_T for index in row.pairs for alone in score_alone(model, pairs[index])]
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-4)


def test_the_window_and_both_soft_caps_matter():
    """What the tests above could not see if the tiny model did not use them."""
    pairs = random_pairs(1, 6)
    (row,) = pack(pairs, 1000)
    plain = score_row(calm_gemma2(), row, [], "fp32").token_logps_T
    for without in ({"sliding_window": 512}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}):
        assert (score_row(calm_gemma2(**without), row, [], "fp32").token_logps_T - plain).abs().max() > 1e-3


def test_the_last_layers_site_is_before_the_final_norm():
    model, site = calm_gemma2(), Site(3, "resid_post")
    (row,) = pack([random_pair(6, 9, 4)], 100)
    with torch.no_grad():
        hidden_TD, acts = run_body(model, row, [site])
        chosen = model(input_ids=row.input_ids_L[None, :15], output_hidden_states=True)
        torch.testing.assert_close(hidden_TD[:9], chosen.hidden_states[-1][0, 5:14], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.model.norm(acts[site]), hidden_TD, rtol=1e-5, atol=1e-5)
    assert (acts[site] - hidden_TD).abs().max() > 0.5


def test_the_kl_is_that_of_full_distributions_with_its_gradient():
    policy, reference, pairs = calm_gemma2(), calm_gemma2(seed=1), random_pairs(2, 4)
    weights = random_weights(pairs)[:, :, 0]
    packed = alone = torch.zeros((), dtype=torch.float64)
    for row in pack(pairs, 120):
        live = live_reference(reference, row, "fp32")
        assert not live.hidden_TD.requires_grad
        kl_R = score_row(policy, row, [], "fp32", reference=live).kl_R
        packed = packed + (kl_R.unflatten(0, (-1, 2)) * weights[list(row.pairs)]).sum()
    for pair, weight in zip(pairs, weights, strict=True):
        with torch.no_grad():
            held = score_alone(reference, pair)
        for own, ref, factor in zip(score_alone(policy, pair), held, weight, strict=True):
            kl = torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=ref.logps_TV.double()),
                torch.distributions.Categorical(logits=own.logps_TV.double()),
            )
            alone = alone + kl.sum() * factor
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(policy, packed), gradients(policy, alone))
    assert all(weight.grad is None for weight in reference.parameters())


def test_bf16_is_close_to_fp32_and_scores_in_fp32():
    model, pairs = calm_gemma2(), [random_pair(6, 5, 4)]
    (row,) = pack(pairs, 100)
    exact, rounded = (score_row(model, row, SAES[:1], recipe) for recipe in ("fp32", "bf16"))
    assert rounded.token_logps_T.dtype == rounded.pooled[0].dtype == torch.float32
    assert 0 < (exact.token_logps_T - rounded.token_logps_T).abs().max() < 0.2
    found = gradients(model, rounded.logps_R.sum())
    for name, grad in gradients(model, exact.logps_R.sum()).items():
        assert found[name].dtype == torch.float32
        assert (found[name] - grad).norm() < 0.1 * grad.norm(), name


def test_the_sae_runs_in_its_own_dtype_outside_the_recipe(monkeypatch):
    (row,) = pack([random_pair(6, 5, 4)], 100)
    seen = []
    encode = features._encode

    def watched(sae: Any, acts_CD: Tensor) -> Tensor:
        result = encode(sae, acts_CD)
        seen.append((torch.is_autocast_enabled("cpu"), result.dtype))
        return result

    monkeypatch.setattr(features, "_encode", watched)
    with torch.no_grad():
        score_row(calm_gemma2(), row, SAES[:1], "bf16")
    assert set(seen) == {(False, torch.float32)}


def test_pairs_are_measured_in_their_order_whatever_the_packing():
    model, pairs, rows = calm_gemma2(), random_pairs(4, 7), []
    measured = measure_pairs(model, pairs, SAES, "fp32", token_budget=100, keep_features=5, on_row=rows.append)
    alone = measure_pairs(model, pairs, SAES, "fp32", token_budget=1, keep_features=5)
    assert sorted(index for row in rows for index in row.pairs) == list(range(7))
    for pair, cached, single in zip(pairs, measured, alone, strict=True):
        assert cached.pair is pair
        for side, other, ids in (
            (cached.chosen, single.chosen, pair.chosen_ids),
            (cached.rejected, single.rejected, pair.rejected_ids),
        ):
            assert side.num_tokens == len(ids)
            assert side.logp == pytest.approx(other.logp, rel=1e-7, abs=1e-5)
            assert len(side.features) == len(SAES)
            for ours, theirs in zip(side.features, other.features, strict=True):
                assert ours.ids.tolist() == theirs.ids.tolist()
                assert len(ours.ids) == min(5, ours.nnz)


def test_a_number_that_is_not_finite_is_refused_with_its_pair():
    pair = random_pair(3, 3, 3)
    model = calm_gemma2(tie_word_embeddings=False)
    model.lm_head.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match=f"pair {pair.pair_id}: not finite: log-probabilities"):
        measure_pairs(model, [pair], [], "fp32", token_budget=1, keep_features=5)
    sae = copy.deepcopy(SAES[0].sae)
    sae.b_enc.data[7] = math.inf
    broken = dataclasses.replace(SAES[0], sae=sae)
    with pytest.raises(
        FloatingPointError, match=f"pair {pair.pair_id}: not finite: pooled features at {broken.site.name}"
    ):
        measure_pairs(calm_gemma2(), [pair], [broken], "fp32", token_budget=1, keep_features=5)


def test_scoring_inside_the_forward_is_the_same_and_other_calls_are_as_before():
    model, (row,) = calm_gemma2(), pack(random_pairs(4, 2), 1000)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        scores, logits = score_row(model, row, SAES, "fp32"), model(input_ids=ids).logits
        attach_scoring(model)
        inside = model(packed=row, saes=SAES, recipe="fp32")
        assert torch.equal(inside.token_logps_T, scores.token_logps_T)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(inside.pooled, scores.pooled, strict=True))
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_a_fresh_adapter_scores_as_the_model_that_it_wraps():
    from peft import LoraConfig, get_peft_model

    model, (row,) = calm_gemma2(), pack(random_pairs(4, 2), 1000)
    with torch.no_grad():
        expected = score_row(model, row, SAES, "fp32")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        attach_scoring(adapted)
        found = adapted(packed=row, saes=SAES, recipe="fp32")
    assert torch.equal(found.logps_R, expected.logps_R)
    assert torch.equal(found.pooled[0], expected.pooled[0])
    grads = gradients(adapted, adapted(packed=row, saes=(), recipe="fp32").logps_R.sum())
    assert grads.keys() == {name for name, _ in adapted.named_parameters() if "lora" in name}
