"""What the commands should have computed, by plain transformers, PyTorch and scipy, one unpadded sequence at a time.

The formulas and the defaults are those of method.md, written down again here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fpo.cache.schema import Pair
from fpo.stages.model.sae import SiteSAE
from pairs import Alone, dense_drift, score_alone
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, get_scheduler

# method.md, section 4, and the two paragraphs above it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "tdpo1": {"beta": 0.1},
    "tdpo2": {"beta": 0.1, "alpha": 0.5, "stop_gradient": True},
    "simpo-kl": {"beta": 2.0, "gamma": 0.5, "alpha": 0.5, "kl_beta": 0.1, "stop_gradient": True},
    "fpo": {"beta": 0.1, "alpha": 0.5, "stop_gradient": True},
}


@dataclass(frozen=True)
class Objective:
    """A method with what was changed of its settings."""

    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    top_k: int = 50

    def __getattr__(self, name: str) -> Any:
        return (DEFAULTS[self.method] | dict(self.changes))[name]


def losses(
    objective: Objective, policy: Any, reference: Any, pairs: Sequence[Pair], saes: Sequence[SiteSAE] = ()
) -> dict[str, Tensor]:
    """A value a pair [N] for everything that training logs of pairs, under the log's names, and `loss`."""
    sites = [sae.site for sae in saes]
    found: dict[str, list[Tensor]] = {}
    for pair in pairs:
        with torch.no_grad():
            held = score_alone(reference, pair, sites)
        own = score_alone(policy, pair, sites)
        for name, value in _of_pair(objective, own, held, saes).items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def _of_pair(objective: Objective, own: Sequence[Alone], held: Sequence[Alone], saes: Sequence[SiteSAE]) -> Any:
    method, beta = objective.method, objective.beta
    per_token = method in ("simpo", "simpo-kl", "fpo")
    scales = [beta / len(side.targets_T) if per_token else beta for side in own]
    logp = [side.token_logps_T.double().sum() for side in own]
    ref = [side.token_logps_T.double().sum() for side in held]
    u = scales[0] * logp[0] - scales[1] * logp[1]
    reference = scales[0] * ref[0] - scales[1] * ref[1]
    u = u - (objective.gamma if method in ("simpo", "simpo-kl") else reference)
    rewards = [scale * (a - b) for scale, a, b in zip(scales, logp, ref, strict=True)]
    values = {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": torch.heaviside(rewards[0] - rewards[1], torch.tensor(0.5).double()),
        "logps/chosen": logp[0],
        "logps/rejected": logp[1],
    }
    if method in ("tdpo1", "tdpo2", "simpo-kl", "fpo"):
        drift = _divergences(method, own, held, saes, objective.top_k)
        name = "features/mse" if method == "fpo" else "kl"
        values |= {f"{name}_chosen": drift[0], f"{name}_rejected": drift[1]}
        if method == "tdpo1":
            delta = beta * drift[1] - beta * drift[0]
        else:
            weight = objective.kl_beta if method == "simpo-kl" else beta
            chosen = drift[0].detach() if objective.stop_gradient else drift[0]
            delta = objective.alpha * (weight * drift[1] - weight * chosen)
        values["constraint/delta"] = delta
        u = u - delta
    return values | {"loss": -logsigmoid(u)}


def _divergences(
    method: str, own: Sequence[Alone], held: Sequence[Alone], saes: Sequence[SiteSAE], top_k: int
) -> list[Tensor]:
    """D of chosen and rejected: the sequential forward KL, or D_F, its mean over the sites."""
    if method == "fpo":
        drifts = [
            [dense_drift(a.pooled_M(sae), b.pooled_M(sae), top_k) for sae in saes]
            for a, b in zip(own, held, strict=True)
        ]
        return [torch.stack(side).mean() for side in drifts]
    pairs = [(a.logps_TV.double(), b.logps_TV.double()) for a, b in zip(own, held, strict=True)]
    return [(ref.exp() * (ref - pol)).sum() for pol, ref in pairs]


def likelihood(model: Any, conversations: Sequence[tuple[list[int], int]]) -> Tensor:
    """SFT's loss: the mean over learnt tokens of -log π; of each conversation those from a position on are learnt."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, first in conversations:
        sequence = torch.tensor(ids)
        logps = torch.log_softmax(model(input_ids=sequence[None], use_cache=False).logits[0].float(), -1)
        total = total - logps[first - 1 : -1].gather(1, sequence[first:, None]).double().sum()
        count += len(ids) - first
    return total / count


@dataclass(frozen=True)
class Step:
    """One step of plain training: the loss before it, its learning rate, its gradient and the weights after it."""

    loss: float
    lr: float
    gradient: dict[str, Tensor]
    norm: float
    weights: dict[str, Tensor]


def train(
    model: PreTrainedModel,
    loss: Callable[[Any], Tensor],
    steps: int,
    *,
    lr: float,
    schedule: str = "constant_with_warmup",
    warmup: int = 0,
    settings: dict[str, Any] | None = None,
    clip: float = 1.0,
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
) -> list[Step]:
    """Trains by a plain loop: PyTorch's optimiser and clipping, transformers' schedule, no weight decay."""
    weights = dict(model.named_parameters())
    optimizer = optimiser(weights.values(), lr=lr)
    scheduler = get_scheduler(schedule, optimizer, warmup, steps, settings)
    done = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        gradient = {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}
        norm = float(torch.nn.utils.get_total_norm(gradient.values()))
        if clip:
            torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        now = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        after = {name: w.detach().clone() for name, w in weights.items()}
        done.append(Step(value.item(), now, gradient, norm, after))
    return done


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """How far apart two ends of a training are, as a share of how far it went."""
    names = [name for name in expected if name in found]
    apart = sum(float((found[name] - expected[name]).double().square().sum()) for name in names)
    gone = sum(float((expected[name] - start[name]).double().square().sum()) for name in names)
    return float(np.sqrt(apart / gone))
