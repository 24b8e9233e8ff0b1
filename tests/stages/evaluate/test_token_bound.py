"""Appendix B's bound per token: both sides and its constant against full, dense computations."""

import numpy as np
import pytest
import torch
from fpo.stages.evaluate import token_bound as module
from fpo.stages.evaluate.token_bound import TokenBound, product_norm, token_bound
from fpo.stages.model.sae import Site
from hypothesis import given
from hypothesis import strategies as st
from pairs import calm_gemma2, many_examples, random_pairs, score_alone
from tiny import tiny_sae

SITE = Site(3, "resid_post")


@many_examples
@given(sizes=st.tuples(*[st.integers(1, 40)] * 3), seed=st.integers(0, 99), chunk=st.sampled_from([1, 100, 2**25]))
def test_the_norm_is_that_of_the_explicit_product(sizes, seed, chunk):
    rows, features, width = sizes
    generator = torch.Generator().manual_seed(seed)
    head, decoder = torch.randn(rows, width, generator=generator), torch.randn(features, width, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ENTRIES", chunk)
        found = product_norm(head, decoder)
    expected = torch.linalg.matrix_norm((head.double() @ decoder.double().T), ord=2)
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_the_norm_of_a_decoder_of_nothing_is_0():
    assert product_norm(torch.randn(9, 4), torch.zeros(7, 4)) == 0


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
@pytest.mark.parametrize("budget", [1, 90, 400])
def test_both_sides_are_those_of_full_logits_and_all_features(architecture, budget, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 5 * 2 * 64)  # five positions at a time
    reference, policy, pairs = calm_gemma2(), calm_gemma2(seed=1), random_pairs(4, 5)
    sae = tiny_sae(site=SITE, architecture=architecture)
    kl, feature_sq, tokens = [], [], []
    with torch.no_grad():
        for pair in pairs:
            for own, held in zip(score_alone(policy, pair, [SITE]), score_alone(reference, pair, [SITE]), strict=True):
                ref_logps = held.logps_TV.double()
                kl.append((ref_logps.exp() * (ref_logps - own.logps_TV.double())).sum(-1))
                feature_sq.append((sae.sae.encode(own.acts[SITE]) - sae.sae.encode(held.acts[SITE])).square().sum(-1))
            tokens.append(pair.chosen_ids.size + pair.rejected_ids.size)
    found = token_bound(policy, reference, pairs, sae, "fp32", token_budget=budget)
    assert found.kl.dtype == found.feature_sq.dtype == np.float32
    np.testing.assert_allclose(found.kl, torch.cat(kl).numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.feature_sq, torch.cat(feature_sq).numpy(), rtol=1e-4, atol=1e-4)
    assert found.pair_tokens.tolist() == tokens
    product = reference.get_output_embeddings().weight.detach().double() @ sae.sae.W_dec.double().T
    assert found.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(product, ord=2)), rel=1e-9)


def test_equal_models_violate_nothing():
    model = calm_gemma2()
    found = token_bound(model, model, random_pairs(4, 3), tiny_sae(site=SITE), "fp32", token_budget=90)
    assert not found.kl.any()
    assert not found.feature_sq.any()
    assert found.metrics()["bound/violations"]["mean"] == 0


def test_where_the_bound_s_assumptions_hold_no_token_violates_it():
    # The bound's own derivation: logits W·(W_dec·c), c changed a little.
    generator = torch.Generator().manual_seed(0)
    head, decoder = torch.randn(50, 8, generator=generator) / 8, torch.randn(30, 8, generator=generator) / 8
    features = torch.rand(400, 30, generator=generator)
    change = 1e-2 * torch.randn(400, 30, generator=generator)
    own, held = (torch.log_softmax((c @ decoder @ head.T).double(), -1) for c in (features + change, features))
    kl = (held.exp() * (held - own)).sum(-1).float().numpy()
    bound = TokenBound(kl, change.square().sum(-1).numpy(), np.array([400]), product_norm(head, decoder))
    assert bound.kl.max() > 0
    assert not bound.violated.any()


def test_violations_are_the_share_of_tokens_and_are_resampled_by_pair():
    # With M² / 2 = 2: two of three tokens of the first pair, none of the second's two.
    found = TokenBound(
        np.array([2.1, 2.0, 9.0, 0.0, 1.0], np.float32),
        np.array([1.0, 1.0, 4.0, 0.0, 1.0], np.float32),
        np.array([3, 2]),
        2.0,
    )
    assert found.violated.tolist() == [True, False, True, False, False]
    metrics = found.metrics()
    assert metrics["bound/violations"]["mean"] == 2 / 5
    assert metrics["bound/violations"]["n"] == 2
    assert (metrics["bound/violations"]["low"], metrics["bound/violations"]["high"]) == (0, pytest.approx(2 / 3))
    assert metrics["bound/spectral_norm"] == {"mean": 2.0}
