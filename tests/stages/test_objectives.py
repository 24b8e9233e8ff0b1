import math
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fpo.cache.schema import CachedPair, Pair
from fpo.stages.batches import RowCollator
from fpo.stages.methods import METHODS, Objective, make_objective
from fpo.stages.objectives import PairLosses, PairScores, pair_losses
from fpo.stages.packing import pack
from fpo.stages.scoring import RowScores, live_reference, measure_pairs, score_row
from fpo.stages.sites import Site
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
    many_examples,
    random_pairs,
    score_alone,
)
from tiny import tiny_sae
from torch import Tensor
from torch.nn.functional import logsigmoid

SAES = [tiny_sae(site=Site(2, "resid_post")), tiny_sae(site=Site(3, "mlp_out"), seed=1)]
TOP_K = 8


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_hand(method: str, **settings: float) -> float:
    """The loss of the pair that method.md's figures are checked on, with no divergence."""
    scores = PairScores(
        chosen_logp=numbers(-1 - 0.5 - 0.25),
        rejected_logp=numbers(-2 - 1.5),
        chosen_ref_logp=numbers(-1.2 - 0.7 - 0.1),
        rejected_ref_logp=numbers(-1.6 - 1.4),
        chosen_tokens=numbers(3),
        rejected_tokens=numbers(2),
        chosen_divergence=numbers(3.0),
        rejected_divergence=numbers(5.0),
    )
    return pair_losses(make_objective(method, **settings), scores).loss.item()


def test_losses_computed_by_hand():
    assert by_hand("dpo", beta=0.1) == pytest.approx(0.6563501408, abs=5e-11)
    assert by_hand("fpo", alpha=0.0, beta=2.0) == pytest.approx(0.4143700869, abs=5e-11)
    assert by_hand("simpo", beta=2.0, gamma=1.0) == pytest.approx(0.2339625251, abs=5e-11)


# TRL as the independent implementation


def random_scores(seed: int, size: int = 7) -> tuple[PairScores, list[Tensor]]:
    """Random pairs, and the token log-probs of chosen and rejected under policy and reference behind them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2, size), generator=generator)
    mask = (torch.arange(8) < lengths[..., None]).double()
    tokens = -torch.rand(2, 2, size, 8, generator=generator, dtype=torch.float64) * 3 * mask
    sums, counts = tokens.sum(-1), lengths.double()
    scores = PairScores(sums[0, 0], sums[0, 1], sums[1, 0], sums[1, 1], counts[0], counts[1])
    return scores, [mask.flatten(0, 1), tokens[0].flatten(0, 1)]


def trl_dpo_loss(loss_type: str, beta: float, seed: int) -> Tensor:
    """`DPOTrainer`'s own loss; only the model is replaced, by given log-probs."""
    from trl import DPOTrainer

    scores, (mask, token_logps) = random_scores(seed)
    blank = torch.zeros_like(token_logps)
    outputs = SimpleNamespace(log_probs=token_logps, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    trainer = object.__new__(DPOTrainer)
    unchanged = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    settings: dict[str, Any] = {
        "model": SimpleNamespace(training=False),
        "accelerator": unchanged,
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "beta": beta,
        "use_weighting": False,
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }
    vars(trainer).update(settings)
    mask = torch.nn.functional.pad(mask, (1, 0)).long()  # the prompt's only token
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": scores.chosen_ref_logp,
        "ref_rejected_logps": scores.rejected_ref_logp,
    }
    return trainer._compute_loss(lambda **kwargs: outputs, inputs, False)


@pytest.mark.parametrize(
    ("loss_type", "method", "settings"), [("sigmoid", "dpo", {}), ("sigmoid_norm", "fpo", {"alpha": 0.0})]
)
def test_dpo_and_length_normalised_dpo_are_trls(loss_type, method, settings):
    for seed in range(3):
        scores, _ = random_scores(seed)
        if method == "fpo":
            divergences = {"chosen_divergence": scores.chosen_tokens, "rejected_divergence": scores.rejected_tokens}
            scores = PairScores(**vars(scores) | divergences)
        found = pair_losses(make_objective(method, beta=0.3, **settings), scores).loss.mean()
        torch.testing.assert_close(found, trl_dpo_loss(loss_type, 0.3, seed), rtol=1e-12, atol=0)


def test_simpo_is_trls(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    scores, _ = random_scores(0)
    trainer = SimpleNamespace(alpha=0.0, accelerator=SimpleNamespace(device="cpu"), beta=2.5, simpo_gamma=0.7)
    trainer.loss_type, trainer.label_smoothing = "simpo", 0.0
    means = (scores.chosen_logp / scores.chosen_tokens, scores.rejected_logp / scores.rejected_tokens)
    expected, *_ = CPOTrainer.cpo_loss(trainer, *means)
    found = pair_losses(make_objective("simpo", beta=2.5, gamma=0.7), scores).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


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
    for batch in RowCollator(budget, 1, tuple(sae.width for sae in saes))(cached)["rows"]:
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
@pytest.mark.parametrize("make", [calm_gemma2, lambda: calm_llama(attn_implementation="sdpa")], ids=["gemma2", "llama"])
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


# The one formula


@many_examples
@given(
    method=st.sampled_from(list(METHODS)),
    values=st.lists(st.floats(-200, 0), min_size=4, max_size=4),
    lengths=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    divergences=st.tuples(st.floats(0, 50), st.floats(0, 50)),
)
def test_the_loss_is_minus_log_sigmoid_of_its_terms(method, values, lengths, divergences):
    objective = make_objective(method)
    scores = PairScores(*map(numbers, values), *map(numbers, map(float, lengths)), *map(numbers, divergences))
    losses = pair_losses(objective, scores)
    u = (losses.lpd - losses.margin - losses.constraint).item()
    assert losses.loss.item() == pytest.approx(math.log1p(math.exp(-u)) if u > -50 else -u, rel=1e-12)
    if objective.rule.reference_margin:
        reward = (losses.chosen_reward - losses.rejected_reward).item()
        assert reward == pytest.approx((losses.lpd - losses.margin).item(), rel=1e-9, abs=1e-9)


def test_equal_pairs_have_equal_rewards_under_every_method():
    """The implicit margin has the reference in it, never the constant γ."""
    scores = PairScores(*[numbers(-3.0)] * 4, *[numbers(4.0)] * 2, *[numbers(1.0)] * 2)
    for method in METHODS:
        losses = pair_losses(make_objective(method), scores)
        assert losses.chosen_reward.item() == losses.rejected_reward.item() == 0.0


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("method", ["tdpo2", "fpo", "simpo-kl"])
def test_the_stop_gradient_holds_the_chosen_divergence_alone(method, stop):
    divergences = [numbers(2.0).requires_grad_(), numbers(3.0).requires_grad_()]
    scores = PairScores(*[numbers(-3.0)] * 4, *[numbers(4.0)] * 2, *divergences)
    losses = pair_losses(make_objective(method, stop_gradient=stop), scores)
    chosen, rejected = torch.autograd.grad(losses.constraint, divergences, allow_unused=True)
    assert rejected.item() == pytest.approx(0.05)
    assert chosen is None if stop else chosen.item() == pytest.approx(-0.05)
    assert losses.constraint.item() == pytest.approx(0.05)


def test_a_constraint_without_divergences_is_refused():
    for method in ("fpo", "tdpo1"):
        with pytest.raises(ValueError, match=f"method {method}: expected a divergence of both responses, found none"):
            pair_losses(make_objective(method), random_scores(0)[0])


# Settings


def test_defaults_are_those_of_the_table():
    assert {name: method.defaults for name, method in METHODS.items()} == {
        "dpo": {"beta": 0.1},
        "tdpo1": {"beta": 0.1},
        "tdpo2": {"beta": 0.1, "alpha": 0.5, "stop_gradient": True},
        "simpo": {"beta": 2.0, "gamma": 0.5},
        "simpo-kl": {"beta": 2.0, "gamma": 0.5, "alpha": 0.5, "kl_beta": 0.1, "stop_gradient": True},
        "fpo": {"beta": 0.1, "alpha": 0.5, "stop_gradient": True},
    }
    for name, method in METHODS.items():
        made = make_objective(name, beta=None, alpha=None)
        assert all(getattr(made, setting) == value for setting, value in method.defaults.items())
        assert made.rule is method


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ppo", {}, r"method: expected one of dpo, simpo, tdpo1, tdpo2, simpo-kl, fpo, found 'ppo'"),
        ("dpo", {"delta": 1.0}, "setting: expected one of beta, found 'delta'"),
        ("dpo", {"alpha": 0.0}, r"--alpha: method dpo ignores it \(it reads beta\); leave it out"),
        ("simpo", {"stop_gradient": False}, "--no-stop-gradient: method simpo ignores it"),
        ("fpo", {"gamma": 0.5}, "--gamma: method fpo ignores it"),
        ("tdpo1", {"alpha": 1.0}, "--alpha: method tdpo1 ignores it"),
        ("fpo", {"kl_beta": 0.1}, "--kl-beta: method fpo ignores it"),
        ("fpo", {"beta": 0.0}, "--beta: expected a number above 0, found 0.0"),
        ("fpo", {"beta": math.nan}, "--beta: expected a number above 0, found nan"),
        ("simpo-kl", {"kl_beta": -1.0}, "--kl-beta: expected a number above 0, found -1.0"),
        ("fpo", {"alpha": -0.1}, "--alpha: expected a number that is not negative, found -0.1"),
        ("fpo", {"alpha": math.inf}, "--alpha: expected a number that is not negative, found inf"),
        ("simpo", {"gamma": math.nan}, "--gamma: expected a number, found nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        make_objective(method, **settings)
