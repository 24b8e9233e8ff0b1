"""Every loss of method.md section 2, as one formula: L = -log σ(LPD - margin - δ).

In: log-probabilities of chosen and rejected responses under policy and reference, their lengths, and a divergence of
each (the sequential KL or the feature MSE). Out: per pair, the loss and its three terms.

Shapes: B pairs. Everything is float64: 0 must stay 0, so that the first loss is log 2 to the bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .methods import Objective


@dataclass(frozen=True, eq=False)
class PairScores:
    """What a loss is made of, per pair; float64 [B] each, log-probabilities in nats summed over tokens.

    Attributes:
        chosen_logp: log π_θ(y_w|x); `rejected_logp` is that of y_l.
        chosen_ref_logp: log π_ref(y_w|x); `rejected_ref_logp` is that of y_l.
        chosen_tokens: |y_w|; `rejected_tokens` is |y_l|.
        chosen_divergence: D(y_w), the feature MSE or the sequential KL; None if the method has no constraint.
        rejected_divergence: D(y_l); None in the same case.
    """

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_ref_logp: Tensor
    rejected_ref_logp: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_divergence: Tensor | None = None
    rejected_divergence: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PairLosses:
    """The loss of each pair and its terms; float64 [B] each.

    Attributes:
        loss: -log σ(LPD - margin - δ).
        lpd: the policy's log-probability difference, scaled by β.
        margin: what it has to exceed.
        constraint: δ.
        chosen_reward: the implicit reward, β (log π_θ - log π_ref), per token where the method is; `rejected_reward`
            is that of y_l. Their difference never contains the constant γ.
    """

    loss: Tensor
    lpd: Tensor
    margin: Tensor
    constraint: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def pair_losses(objective: Objective, scores: PairScores) -> PairLosses:
    """The loss of each pair (method.md section 2).

    Args:
        objective: the method and its settings.
        scores: the log-probabilities, lengths and divergences.

    Raises:
        ValueError: if the method has a constraint and the divergences are missing.
    """
    rule = objective.rule
    chosen_scale, rejected_scale = (
        objective.beta / tokens if rule.per_token else torch.full_like(logp, objective.beta)
        for tokens, logp in (
            (scores.chosen_tokens, scores.chosen_logp),
            (scores.rejected_tokens, scores.rejected_logp),
        )
    )
    lpd = chosen_scale * scores.chosen_logp - rejected_scale * scores.rejected_logp
    reference = chosen_scale * scores.chosen_ref_logp - rejected_scale * scores.rejected_ref_logp
    margin = reference if rule.reference_margin else torch.full_like(lpd, objective.gamma)
    constraint = _constraint(objective, scores) if rule.divergence else torch.zeros_like(lpd)
    return PairLosses(
        loss=-logsigmoid(lpd - margin - constraint),
        lpd=lpd,
        margin=margin,
        constraint=constraint,
        chosen_reward=chosen_scale * (scores.chosen_logp - scores.chosen_ref_logp),
        rejected_reward=rejected_scale * (scores.rejected_logp - scores.rejected_ref_logp),
    )


def _constraint(objective: Objective, scores: PairScores) -> Tensor:
    """δ = α (β D(y_l) - sg(β D(y_w))); TDPO-1 is the case α = 1 without stop-gradient."""
    chosen, rejected = scores.chosen_divergence, scores.rejected_divergence
    if chosen is None or rejected is None:
        raise ValueError(f"method {objective.method}: expected a divergence of both responses, found none")
    beta = objective.kl_beta if objective.kl_beta is not None else objective.beta
    held = chosen.detach() if objective.stop_gradient else chosen
    return objective.alpha * (beta * rejected - beta * held)
