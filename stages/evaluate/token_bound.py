"""Appendix B's bound, per response token: KL(π_ref ‖ π_θ) ≤ (M²/2)·‖Δc‖².

In: policy and reference, pairs, an SAE at one site. Out: for each token the KL and the squared change of all features,
and the constant M = ‖W_U W_decᵀ‖₂, with W_U scaled as the logits are.

The bound holds for small changes, and if logits are a linear map of the features: it leaves out the layers above the
site, the final norm, the soft-cap and the SAE's error. So the share of tokens that violate it is measured.

Shapes: T response tokens of a row, C rows of one chunk, D hidden size, F SAE width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...cache.schema import Float32, Pair
from ..model.anatomy import anatomy, causal_lm
from ..model.models import Recipe, autocast
from ..model.sae import SiteSAE
from ..scoring.features import CHUNK_ENTRIES
from ..scoring.forward import head_weight, reference_state, row_layout, run_body, run_head
from ..scoring.packing import pack
from .heldout import Estimate, estimate


@dataclass(frozen=True, eq=False)
class TokenBound:
    """Both sides of the bound at every response token, pair by pair, chosen before rejected.

    Attributes:
        kl: float32 [tokens], KL(π_ref ‖ π_θ) at the position that predicts the token, nats.
        feature_sq: float32 [tokens], ‖Δc‖² over all features at that position.
        pair_tokens: int64 [pairs], response tokens of each pair.
        spectral_norm: M.
    """

    kl: Float32
    feature_sq: Float32
    pair_tokens: NDArray[np.int64]
    spectral_norm: float

    @property
    def violated(self) -> NDArray[np.bool_]:
        """Whether each token's KL is above its bound."""
        return self.kl > self.spectral_norm**2 / 2 * self.feature_sq.astype(np.float64)

    def metrics(self) -> dict[str, Estimate]:
        """The share of tokens that violate the bound, its interval from resampled pairs, and M."""
        starts = np.cumsum(self.pair_tokens) - self.pair_tokens
        by_pair = np.add.reduceat(self.violated, starts, dtype=np.int64)
        return {
            "bound/violations": estimate(by_pair, self.pair_tokens),
            "bound/spectral_norm": {"mean": self.spectral_norm},
        }


@torch.no_grad()
def product_norm(head_VD: Tensor, decoder_FD: Tensor) -> float:
    """‖head · decoderᵀ‖₂, the largest singular value, from Gram matrices [D, D] in float64.

    The product itself, [V, F], would not fit into memory.
    """
    values_D, vectors_DD = torch.linalg.eigh(_gram(decoder_FD))
    factor_DD = vectors_DD * values_D.clamp(min=0).sqrt()  # factor · factorᵀ is the decoder's Gram matrix
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(factor_DD.T @ _gram(head_VD) @ factor_DD)[-1])))


def _gram(matrix_ND: Tensor) -> Tensor:
    size = matrix_ND.shape[1]
    gram_DD = torch.zeros(size, size, dtype=torch.float64, device=matrix_ND.device)
    for chunk_CD in matrix_ND.split(max(1, CHUNK_ENTRIES // size)):
        gram_DD += chunk_CD.double().T @ chunk_CD.double()
    return gram_DD


@torch.no_grad()
def token_bound(
    policy: nn.Module,
    reference: nn.Module,
    pairs: Sequence[Pair],
    sae: SiteSAE,
    recipe: Recipe,
    *,
    token_budget: int,
) -> TokenBound:
    """Measures both sides of the bound at every response token of the pairs.

    All features of the SAE are compared, in its own dtype. W_U is the reference's head, so M is the same for all
    policies. `token_budget` is in tokens of a packed row.
    """
    device = next(policy.parameters()).device
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for packed in pack(pairs, token_budget, row_layout(policy)):
        row = packed.to(device)
        with autocast(recipe, device):
            hidden_TD, acts = run_body(policy, row, [sae.site])
            ref_hidden_TD, ref_acts = run_body(reference, row, [sae.site])
            _, kl_T = run_head(policy, hidden_TD, row.targets_T, reference_state(reference, ref_hidden_TD))
        feature_sq_T = _feature_distance(sae.sae, acts[sae.site], ref_acts[sae.site])
        sizes = [sum(row.lengths[side : side + 2]) for side in range(0, len(row.lengths), 2)]
        by_pair = zip(kl_T.cpu().split(sizes), feature_sq_T.cpu().split(sizes), strict=True)
        found |= dict(zip(row.pairs, by_pair, strict=True))
    kl, feature_sq = ([found[index][part].numpy() for index in range(len(pairs))] for part in (0, 1))
    return TokenBound(
        kl=np.concatenate(kl),
        feature_sq=np.concatenate(feature_sq),
        pair_tokens=np.array([len(part) for part in kl]),
        spectral_norm=anatomy(causal_lm(reference)).scale * product_norm(head_weight(reference), sae.sae.W_dec),
    )


def _feature_distance(sae: Any, acts_TD: Tensor, ref_acts_TD: Tensor) -> Tensor:
    """‖c - c_ref‖² over all features at each position, fp32 [T]; in chunks of positions, which bound memory."""
    tokens = max(1, CHUNK_ENTRIES // (2 * sae.cfg.d_sae))  # both sides' features of a chunk exist at once
    with torch.autocast(acts_TD.device.type, enabled=False):
        parts = [
            (sae.encode(own_CD) - sae.encode(ref_CD)).float().square().sum(-1)
            for own_CD, ref_CD in zip(acts_TD.split(tokens), ref_acts_TD.split(tokens), strict=True)
        ]
    return torch.cat(parts)
