"""What stage two computes from cached rows: the losses of every method, held against a live reference."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fpo.cache.schema import CachedPair
from fpo.stages.model.sae import Site
from fpo.stages.scoring.batches import RowCollator
from fpo.stages.scoring.forward import RowScores, live_reference, score_row
from fpo.stages.scoring.measure import measure_pairs
from fpo.stages.train.methods import METHODS, Objective, make_objective
from fpo.stages.train.objectives import PairLosses, PairScores, pair_losses
from hypothesis import given
from hypothesis import strategies as st
from pairs import (
    Alone,
    assert_same_gradients,
    calm_gemma2,
    calm_llama,
    dense_drift,
    few_examples,
    gradients,
    random_pairs,
    score_alone,
)
from tiny import tiny_sae
from torch import Tensor
from torch.nn.functional import logsigmoid

SAES = [tiny_sae(site=Site(2, "resid_post")), tiny_sae(site=Site(3, "mlp_out"), seed=1)]
TOP_K = 8


# The methods of method.md section 2, each as it is written there


def written_out(objective: Objective, own: Sequence[Alone], held: Sequence[Alone]) -> Tensor:
    """The loss of one pair from full distributions and all features, policy against a live reference."""
    beta, alpha, gamma = objective.beta, objective.alpha, objective.gamma
    size_w, size_l = (len(alone.targets_T) for alone in own)
    logp_w, logp_l = (alone.token_logps_T.double().sum() for alone in own)
    ref_w, ref_l = (alone.token_logps_T.double().sum() for alone in held)
    kl_w, kl_l = (
        (ref.logps_TV.double().exp() * (ref.logps_TV.double() - pol.logps_TV.double())).sum()
        for pol, ref in zip(own, held, strict=True)
    )
    dpo = beta * logp_w - beta * logp_l - (beta * ref_w - beta * ref_l)
    simpo = beta / size_w * logp_w - beta / size_l * logp_l - gamma
    match objective.method:
        case "dpo":
            u = dpo
        case "simpo":
            u = simpo
        case "tdpo1":
            u = dpo - (beta * kl_l - beta * kl_w)
        case "tdpo2":
            u = dpo - alpha * (beta * kl_l - (beta * kl_w).detach())
        case "simpo-kl":
            u = simpo - alpha * (0.1 * kl_l - (0.1 * kl_w).detach())
        case "fpo":
            drift_w, drift_l = (
                sum(dense_drift(pol.pooled_M(sae), ref.pooled_M(sae), TOP_K) for sae in SAES) / len(SAES)
                for pol, ref in zip(own, held, strict=True)
            )
            normalised = (
                beta / size_w * logp_w - beta / size_l * logp_l - (beta / size_w * ref_w - beta / size_l * ref_l)
            )
            u = normalised - alpha * (beta * drift_l - (beta * drift_w).detach())
    return -logsigmoid(u)


def scores_of(scores: RowScores, row: Any, ref_logps_R: Tensor, divergence_R: Tensor | None) -> PairScores:
    lengths = torch.tensor(row.lengths).double()
    return PairScores(
        *(side for values in (scores.logps_R, ref_logps_R, lengths) for side in (values[::2], values[1::2])),
        *(() if divergence_R is None else (divergence_R[::2], divergence_R[1::2])),
    )


def cached_losses(
    objective: Objective, policy: Any, reference: Any, cached: list[CachedPair], budget: int
) -> list[tuple[RowScores, PairLosses]]:
    """What training computes from cached rows, and from a live reference where the method needs one."""
    divergence = objective.rule.divergence
    saes = SAES if divergence == "features" else []
    found = []
    for batch in RowCollator(budget, tuple(sae.width for sae in saes))(cached)["rows"]:
        live = live_reference(reference, batch.packed, "fp32") if divergence == "kl" else None
        scores = score_row(policy, batch.packed, saes, "fp32", cached=batch.cached, top_k=TOP_K, reference=live)
        drift_R = torch.stack([drift.mse_R for drift in scores.drifts]).mean(0) if saes else None
        divergence_R = {"features": drift_R, "kl": scores.kl_R, None: None}[divergence]
        found.append((scores, pair_losses(objective, scores_of(scores, batch.packed, batch.ref_logps_R, divergence_R))))
    return found


def strong(method: str) -> Objective:
    """The method with a β and an α at which its constraint is no small part of the gradient."""
    defaults = METHODS[method].defaults
    return make_objective(method, beta=0.5, alpha=3.0 if "alpha" in defaults else None)


@pytest.mark.parametrize("method", METHODS)
def test_a_perturbed_policy_trains_as_against_a_live_reference(method):
    reference, pairs, objective = calm_gemma2(), random_pairs(7, 5), strong(method)
    cached = measure_pairs(reference, pairs, SAES, "fp32", token_budget=90, keep_features=None)
    policy = perturbed(reference)
    losses = cached_losses(objective, policy, reference, cached, 120)
    found = torch.cat([row.loss for _, row in losses]).sum()

    expected = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        with torch.no_grad():
            held = score_alone(reference, pair, [sae.site for sae in SAES])
        expected = expected + written_out(objective, score_alone(policy, pair, [sae.site for sae in SAES]), held)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if objective.rule.divergence:
        assert all(row.constraint.abs().max() > 1e-3 for _, row in losses), "a constraint of nothing proves nothing"
    assert_same_gradients(gradients(policy, found), gradients(policy, expected))


def perturbed(model: Any) -> Any:
    """A policy some way from the reference `calm_gemma2()`."""
    policy, other = calm_gemma2(), calm_gemma2(seed=1)
    with torch.no_grad():
        for weight, start, target in zip(policy.parameters(), model.parameters(), other.parameters(), strict=True):
            weight.copy_(start + 0.05 * (target - start))
    return policy


@pytest.mark.parametrize("keep", [TOP_K, 11])
def test_a_cache_of_fewer_features_errs_within_its_bound(keep):
    reference, pairs, objective = calm_gemma2(), random_pairs(7, 5), strong("fpo")
    policy = perturbed(reference)
    constraints, bounds, misses = [], [], []
    for kept in (None, keep):
        cached = measure_pairs(reference, pairs, SAES, "fp32", token_budget=90, keep_features=kept)
        with torch.no_grad():
            rows = cached_losses(objective, policy, reference, cached, 120)
        constraints.append(torch.cat([row.constraint for _, row in rows]))
        drifts = [torch.stack([drift.error_bound_R for drift in scores.drifts]).mean(0) for scores, _ in rows]
        bounds.append(torch.cat([drift[::2] + drift[1::2] for drift in drifts]))
        misses.append(max(drift.miss_rate_R.max().item() for scores, _ in rows for drift in scores.drifts))
    assert bounds[0].max() == misses[0] == 0 < misses[1]
    error = (constraints[0] - constraints[1]).abs()
    assert error.max() > 0
    assert torch.all(error <= objective.alpha * objective.beta * bounds[1] + 1e-12)


# The first loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["dpo", "tdpo1", "tdpo2", "fpo"])
@pytest.mark.parametrize(
    "make", [calm_gemma2, lambda: calm_llama(attn_implementation="packed")], ids=["gemma2", "llama"]
)
def test_the_first_loss_is_log_2_to_the_bit(make, method, checkpointing):
    reference, policy, pairs = make(), make().train(), random_pairs(3, 6)
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cached = measure_pairs(reference, pairs, SAES, "fp32", token_budget=120, keep_features=TOP_K)
    for _, losses in cached_losses(make_objective(method), policy, reference, cached, 120):
        assert losses.loss.requires_grad
        assert losses.loss.tolist() == [math.log(2)] * len(losses.loss)
        assert losses.constraint.tolist() == [0.0] * len(losses.loss)
        assert losses.chosen_reward.tolist() == losses.rejected_reward.tolist() == [0.0] * len(losses.loss)


@few_examples
@given(method=st.sampled_from(["dpo", "tdpo1", "tdpo2", "fpo"]), budgets=st.tuples(*[st.integers(1, 200)] * 2))
def test_with_another_packing_the_first_loss_is_log_2_up_to_rounding(method, budgets):
    model, pairs = calm_gemma2(), random_pairs(3, 6)
    cached = measure_pairs(model, pairs, SAES, "fp32", token_budget=budgets[0], keep_features=None)
    with torch.no_grad():
        for _, losses in cached_losses(make_objective(method), model, model, cached, budgets[1]):
            assert (losses.loss - math.log(2)).abs().max() < 1e-6
            assert losses.constraint.abs().max() < 1e-10
