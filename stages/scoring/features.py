"""Pooled SAE features of responses, their largest entries, and the feature constraint D_F.

In: an SAE, and activations at its site for the prediction positions of several responses. Out: for each response, the
features' mean activations (fp32), the largest of them, and D_F to cached reference features.

Activations of all features at all positions never exist at once: pooling runs in chunks without gradient, and the
gradient runs through the few columns of the encoder on which D_F depends.

Shapes: T tokens of a row, R responses of a row, D hidden size, M SAE width, K largest features, F cached features,
I = 2K looked-up features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...cache.schema import SparseFeatures

# Feature activations that exist at once: 32 Mi entries, 128 MiB in fp32.
CHUNK_ENTRIES = 2**25

# Architectures in which a feature depends on its own encoder column alone, so that a few can be computed by themselves.
COLUMNWISE = ("standard", "jumprelu")


@dataclass(frozen=True, eq=False)
class CachedFeatures:
    """Reference features of a row's responses at one site, padded to a rectangle.

    Attributes:
        ids_RF: int64, ascending, padded with the SAE's width.
        values_RF: float32, padded with 0.
        floor_R: float32, the largest reference activation that is not in the cache; 0 if all are.
    """

    ids_RF: Tensor
    values_RF: Tensor
    floor_R: Tensor

    @staticmethod
    def collate(features: Sequence[SparseFeatures], width: int) -> "CachedFeatures":
        """Pads the features of R responses to the longest of them (at least one column)."""
        columns = max(1, *(len(response.ids) for response in features))
        ids_RF = torch.full((len(features), columns), width, dtype=torch.int64)
        values_RF = torch.zeros(len(features), columns)
        for number, response in enumerate(features):
            ids_RF[number, : len(response.ids)] = torch.from_numpy(response.ids.astype("int64"))
            values_RF[number, : len(response.values)] = torch.from_numpy(response.values.copy())
        return CachedFeatures(ids_RF, values_RF, torch.tensor([response.floor for response in features]))

    def to(self, device: torch.device | str) -> "CachedFeatures":
        """A copy with its tensors on `device`."""
        return CachedFeatures(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def pin_memory(self) -> "CachedFeatures":
        """A copy in pinned memory, from which a GPU copies while it computes."""
        return CachedFeatures(*(tensor.pin_memory() for tensor in vars(self).values()))


@dataclass(frozen=True, eq=False)
class FeatureDrift:
    """How far the policy's features are from the reference's, per response of a row (method.md sections 2 and 3).

    Attributes:
        mse_R: float64, D_F, with gradient to the activations.
        miss_rate_R: float64, share of the looked-up features that the cache had cut off; they count as 0.
        error_bound_R: float64, a bound on the error of `mse_R` due to them.
    """

    mse_R: Tensor
    miss_rate_R: Tensor
    error_bound_R: Tensor


def _encode(sae: Any, acts_CD: Tensor) -> Tensor:
    """`sae.encode` without gradient; in one array of its size instead of five where features do not compete."""
    if sae.cfg.architecture() not in COLUMNWISE:
        return sae.encode(acts_CD)  # type: ignore[no-any-return]
    acts_CM: Tensor = (sae.process_sae_in(acts_CD) @ sae.W_enc).add_(sae.b_enc)
    cutoff = sae.threshold.clamp(min=0) if sae.cfg.architecture() == "jumprelu" else 0.0
    return acts_CM.masked_fill_(acts_CM <= cutoff, 0)


@torch.no_grad()
def pooled_features(sae: Any, acts_TD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean activation of every feature over each response's positions, in chunks of tokens, without gradient.

    Args:
        sae: a SAELens SAE of any architecture.
        acts_TD: activations at the site, responses one after the other.
        lengths: tokens of each response, R entries that sum to T.

    Returns:
        float32 [R, M].
    """
    width = sae.cfg.d_sae
    pooled_RM = torch.zeros(len(lengths), width, device=acts_TD.device)
    with torch.autocast(acts_TD.device.type, enabled=False):
        for number, response_TD in enumerate(acts_TD.detach().split(list(lengths))):
            # Chunks end with their response, so that its result does not depend on what it is packed with.
            for chunk_CD in response_TD.split(max(1, CHUNK_ENTRIES // width)):
                pooled_RM[number] += _encode(sae, chunk_CD).sum(0, dtype=torch.float32)
            pooled_RM[number] /= lengths[number]
    return pooled_RM


def largest_features(values_RN: Tensor, k: int) -> Tensor:
    """Columns of the k largest positive entries of each row; ties go to the lower column.

    Args:
        values_RN: float32, not negative.
        k: how many at most.

    Returns:
        int64 [R, min(k, N)], in no particular order, padded with N where fewer than k entries are positive.
    """
    columns = values_RN.shape[1]
    # Floats that are not negative order as their bits do; the complement of the column breaks ties.
    order = (columns - 1) - torch.arange(columns, device=values_RN.device)
    keys_RN = (values_RN.contiguous().view(torch.int32).to(torch.int64) << 32) | order
    ids_RK = torch.topk(keys_RN, min(k, columns), dim=1, sorted=False).indices
    return torch.where(values_RN.gather(1, ids_RK) > 0, ids_RK, columns)


@dataclass(frozen=True, eq=False)
class LargestFeatures:
    """The features of several responses that the cache will store, on the device that computed them.

    Attributes:
        ids_RK: int64, ascending, padded with the SAE's width; None if `values_RK` holds all features.
        values_RK: float32; arbitrary on padding.
        floor_R: float32, the largest activation left out; 0 if none was.
        nnz_R: int64, number of activations above 0.
    """

    ids_RK: Tensor | None
    values_RK: Tensor
    floor_R: Tensor
    nnz_R: Tensor

    def to(self, device: torch.device | str) -> "LargestFeatures":
        """A copy with its tensors on `device`, made without waiting."""
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def stored(self, width: int) -> list[SparseFeatures]:
        """One entry a response; ids are uint16, or uint32 above 65,536 features. The tensors must be on the host."""
        dtype = "uint16" if width <= 2**16 else "uint32"
        made, floors, counts = [], self.floor_R.tolist(), self.nnz_R.tolist()
        for number, values_K in enumerate(self.values_RK.numpy()):
            ids_K = np.flatnonzero(values_K > 0) if self.ids_RK is None else self.ids_RK[number].numpy()
            kept_K = ids_K < width
            values_F = values_K[ids_K] if self.ids_RK is None else values_K[kept_K]
            made.append(SparseFeatures(ids_K[kept_K].astype(dtype), values_F, floors[number], counts[number]))
        return made


def select_largest(pooled_RM: Tensor, keep: int | None) -> LargestFeatures:
    """The largest features of each response, in a few operations for all of them.

    Args:
        pooled_RM: float32, finite mean activations, on any device.
        keep: how many of the largest to keep; None for all that are above 0.
    """
    nnz_R = (pooled_RM > 0).sum(1)
    if keep is None:
        return LargestFeatures(None, pooled_RM, pooled_RM.new_zeros(len(pooled_RM)), nnz_R)
    ids_RK = largest_features(pooled_RM, keep).sort(dim=1).values
    # A row with padding keeps every activation above 0, so zeroing the last column in the padding's place is harmless.
    inside_RK = ids_RK.clamp(max=pooled_RM.shape[1] - 1)
    left_out_RM = pooled_RM.scatter(1, inside_RK, 0)
    return LargestFeatures(ids_RK, pooled_RM.gather(1, inside_RK), left_out_RM.amax(1), nnz_R)


def keep_largest(pooled_M: Tensor, keep: int | None) -> SparseFeatures:
    """`select_largest` of one response, as the cache stores it."""
    return select_largest(pooled_M.cpu()[None], keep).stored(len(pooled_M))[0]


def _encode_columns(sae: Any, acts_TD: Tensor, ids_I: Tensor) -> Tensor:
    """The columns `ids_I` of `sae.encode`, [T, I], computed alone."""
    pre_TI = sae.process_sae_in(acts_TD) @ sae.W_enc.T[ids_I].T + sae.b_enc[ids_I]
    acts_TI = torch.relu(pre_TI)
    if sae.cfg.architecture() == "jumprelu":
        acts_TI = acts_TI * (pre_TI > sae.threshold[ids_I])
    return acts_TI


def selected_features(sae: Any, acts_TD: Tensor, lengths: Sequence[int], ids_RI: Tensor) -> Tensor:
    """Mean activation of a few features of each response, with gradient to the activations.

    ReLU and JumpReLU SAEs compute these columns alone. In other architectures features compete: all are encoded, in
    chunks that backward computes again.

    Args:
        sae: a SAELens SAE.
        acts_TD: activations at the site, responses one after the other.
        lengths: tokens of each response.
        ids_RI: int64, feature ids of each response.

    Returns:
        [R, I], in the SAE's dtype.
    """
    columnwise = sae.cfg.architecture() in COLUMNWISE
    means = []
    with torch.autocast(acts_TD.device.type, enabled=False):
        for response_TD, ids_I in zip(acts_TD.split(list(lengths)), ids_RI, strict=True):
            if columnwise:
                means.append(_encode_columns(sae, response_TD, ids_I).mean(0))
                continue
            sums = [
                checkpoint(lambda chunk, ids=ids_I: sae.encode(chunk)[:, ids].sum(0), chunk_CD, use_reentrant=False)
                for chunk_CD in response_TD.split(max(1, CHUNK_ENTRIES // sae.cfg.d_sae))
            ]
            means.append(torch.stack(sums).sum(0) / len(response_TD))
    return torch.stack(means)


def feature_drift(
    sae: Any, acts_TD: Tensor, lengths: Sequence[int], reference: CachedFeatures, top_k: int
) -> FeatureDrift:
    """D_F of each response to its cached reference (method.md section 2).

    It is the sum of squared differences over the union of both top-k sets, divided by k. Values come from
    `pooled_features`, which also filled the cache, and are the same to the bit; gradients come from
    `selected_features` (the choice of features has none).

    Args:
        sae: a SAELens SAE.
        acts_TD: the policy's activations at the site, responses one after the other.
        lengths: tokens of each response.
        reference: the cached features of the same responses.
        top_k: k.
    """
    width = sae.cfg.d_sae
    pooled_RM = pooled_features(sae, acts_TD, lengths)
    positions_RK = largest_features(reference.values_RF, top_k)
    padded_ids_RF = torch.nn.functional.pad(reference.ids_RF, (0, 1), value=width)
    own_ids_RK, reference_ids_RK = largest_features(pooled_RM, top_k), padded_ids_RF.gather(1, positions_RK)
    ids_RI = torch.cat([own_ids_RK, reference_ids_RK], dim=1).sort(dim=1).values
    counted_RI = ids_RI < width
    counted_RI[:, 1:] &= ids_RI[:, 1:] != ids_RI[:, :-1]
    ids_RI = ids_RI.clamp(max=width - 1)

    own_RI = pooled_RM.gather(1, ids_RI)
    if torch.is_grad_enabled() and acts_TD.requires_grad:
        gradient_RI = selected_features(sae, acts_TD, lengths, ids_RI)
        own_RI = own_RI + (gradient_RI - gradient_RI.detach())

    positions_RI = torch.searchsorted(reference.ids_RF, ids_RI).clamp(max=reference.ids_RF.shape[1] - 1)
    found_RI = reference.ids_RF.gather(1, positions_RI) == ids_RI
    reference_RI = torch.where(found_RI, reference.values_RF.gather(1, positions_RI), 0)
    squares_RI = torch.where(counted_RI, (own_RI.double() - reference_RI.double()).square(), 0)

    floor_R1 = reference.floor_R.double()[:, None]
    missed_RI = counted_RI & ~found_RI & (floor_R1 > 0)
    bound_RI = torch.maximum(floor_R1.square(), 2 * floor_R1 * own_RI.detach().double())
    return FeatureDrift(
        mse_R=squares_RI.sum(1) / top_k,
        miss_rate_R=missed_RI.sum(1) / counted_RI.sum(1).clamp(min=1),
        error_bound_R=torch.where(missed_RI, bound_RI, 0).sum(1) / top_k,
    )
