import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fpo.stages.train.methods import METHODS, make_objective
from fpo.stages.train.objectives import PairScores, pair_losses
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples
from torch import Tensor


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
