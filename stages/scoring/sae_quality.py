"""How well an SAE fits activations: how many features fire, and how much variance they explain.

In: an SAE and activations, or a reference model with the first pairs of its data. Out: an `SAEFit`; a UserError for an
SAE that is of no use for the model.

Shapes: N activations, D hidden size, M SAE width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...cache.errors import UserError
from ...cache.schema import Pair
from ..data.chat import ChatFormat
from ..data.preferences import Preferences
from ..data.tokenize import Limits, tokenize_pair
from ..model.anatomy import causal_lm
from ..model.models import Recipe, autocast
from ..model.sae import SiteSAE
from .features import CHUNK_ENTRIES
from .forward import row_layout, run_body
from .packing import pack

# Prediction positions that stage one tries before it starts: enough to tell a dead SAE from a sparse one.
POSITIONS = 1024
# Below this many positions the variance is too uncertain to refuse an SAE by it.
LEAST_POSITIONS = 128
# If fewer features fire at a position, many responses have no pooled features.
LEAST_L0 = 1.0


@dataclass(frozen=True)
class SAEFit:
    """How well an SAE fits some activations.

    Attributes:
        l0: mean number of features that fire on an activation; NaN if an activation is not finite.
        explained_variance: 1 - squared error / variance of the activations; 1 is perfect, 0 is as good as their mean,
            NaN if they do not vary.
        dead: share of the features that never fire.
        tokens: number of activations.
    """

    l0: float
    explained_variance: float
    dead: float
    tokens: int

    def __str__(self) -> str:
        """One line for the terminal."""
        return (
            f"L0 {self.l0:.1f}, explained variance {self.explained_variance:.3f}, dead features {self.dead:.1%}, on "
            f"{self.tokens} positions"
        )


class FitSums:
    """The sums behind an `SAEFit`, over activations that come in parts; `sae` is a `sae_lens.SAE`."""

    def __init__(self, sae: Any) -> None:
        self._sae, self._count, self._fired_total = sae, 0, 0
        self._error, self._squares = 0.0, 0.0
        self._total = torch.zeros(sae.cfg.d_in, dtype=torch.float64, device=sae.device)
        self._fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Adds activations [N, D] in the SAE's dtype."""
        # `decode` restores the scale that the last `encode` took off.
        features = self._sae.encode(x)
        self._error += float((x - self._sae.decode(features)).double().square().sum())
        self._squares += float(x.double().square().sum())
        self._total += x.double().sum(0)
        self._fired |= (features > 0).any(0)
        self._fired_total += int((features > 0).sum())
        self._count += len(x)

    def fit(self) -> SAEFit:
        """The fit on all activations so far."""
        variance = self._squares - float(self._total.square().sum()) / self._count
        return SAEFit(
            l0=self._fired_total / self._count if math.isfinite(self._squares) else math.nan,
            explained_variance=1 - self._error / variance if variance > 0 else math.nan,
            dead=1 - float(self._fired.float().mean()),
            tokens=self._count,
        )


@torch.no_grad()
def fit_on_pairs(
    model: nn.Module, pairs: Sequence[Pair], saes: Sequence[SiteSAE], recipe: Recipe, *, token_budget: int
) -> list[SAEFit]:
    """The fit of each SAE at the pairs' prediction positions, over which features are pooled."""
    device = next(model.parameters()).device
    sums = [FitSums(site.sae) for site in saes]
    for row in pack(pairs, token_budget, row_layout(model)):
        with autocast(recipe, device):
            _, acts = run_body(model, row.to(device), [site.site for site in saes])
        with torch.autocast(device.type, enabled=False):
            for site, own in zip(saes, sums, strict=True):
                for x_ND in acts[site.site].to(site.sae.dtype).split(max(1, CHUNK_ENTRIES // site.width)):
                    own.add(x_ND)
    return [own.fit() for own in sums]


def first_pairs(model: nn.Module, preferences: Preferences, chat: ChatFormat, limits: Limits) -> list[Pair]:
    """The first pairs of the data, `POSITIONS` positions in all, without those with a token unknown to the model."""
    known = len(causal_lm(model).get_input_embeddings().weight)
    pairs, positions = [], 0
    for raw_row in range(len(preferences)):
        if positions >= POSITIONS:
            break
        pair = tokenize_pair(preferences.example(raw_row), raw_row, chat, limits).pair
        if pair and max(int(ids.max()) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)) < known:
            pairs.append(pair)
            positions += len(pair.chosen_ids) + len(pair.rejected_ids)
    return pairs


def check_fit(sae: SiteSAE, fit: SAEFit) -> None:
    """Refuses an SAE that is dead or explains nothing; numbers that are not finite are left to scoring.

    Raises:
        UserError: too few features fire, or they explain no variance.
    """
    if fit.l0 < LEAST_L0:
        fault = f"{fit.l0:.2g} features fire at a position"
    elif -math.inf < fit.explained_variance <= 0 and fit.tokens >= LEAST_POSITIONS:
        fault = f"its reconstruction explains none of the variance ({fit.explained_variance:.3g})"
    else:
        return
    raise UserError(
        f"--sae: expected an SAE of this model's activations at {sae.site.name}, found that with {sae.spec} {fault}, "
        f"over {fit.tokens} positions; give one that was trained on this model and site, or pass --allow-poor-sae"
    )
