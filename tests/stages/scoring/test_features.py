from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fpo.stages.scoring import features
from fpo.stages.scoring.features import (
    CachedFeatures,
    FeatureDrift,
    feature_drift,
    keep_largest,
    largest_features,
    pooled_features,
    selected_features,
)
from hypothesis import given
from hypothesis import strategies as st
from pairs import dense_drift, few_examples, many_examples
from tiny import tiny_sae
from torch import Tensor

LENGTHS = [5, 1, 12, 2]
ARCHITECTURES = ["jumprelu", "standard", "topk", "layer_norm"]


def make_sae(kind: str) -> Any:
    """A tiny SAE; "layer_norm" is a ReLU SAE that normalises what it reads."""
    if kind != "layer_norm":
        return tiny_sae(architecture=kind).sae
    from sae_lens import SAE

    sae = SAE.from_dict({"architecture": "standard", "d_in": 32, "d_sae": 64, "normalize_activations": kind})
    sae.load_state_dict(tiny_sae(architecture="standard").sae.state_dict())
    sae.b_enc.data /= 2  # its input is of norm 1 a coordinate
    return sae.eval().requires_grad_(False)


def activations(seed: int = 0) -> Tensor:
    """What the tiny models put out at the tiny SAEs' site."""
    return 2 * torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(seed))


def dense_pooled(sae: Any, acts_TD: Tensor) -> Tensor:
    return torch.stack([sae.encode(part).mean(0) for part in acts_TD.split(LENGTHS)])


def cache_of(pooled_RM: Tensor, keep: int | None = None) -> CachedFeatures:
    return CachedFeatures.collate([keep_largest(pooled_M, keep) for pooled_M in pooled_RM], pooled_RM.shape[1])


class Identity:
    """An SAE whose features are the positive part of what it reads, so that pooled features can be dictated."""

    def __init__(self, width: int) -> None:
        self.cfg = SimpleNamespace(d_sae=width, architecture=lambda: "standard")
        self.W_enc, self.b_enc = torch.eye(width), torch.zeros(width)

    def process_sae_in(self, x: Tensor) -> Tensor:
        return x

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def drift_of(own: Sequence[float], reference: Sequence[float], top_k: int) -> tuple[FeatureDrift, list[int]]:
    """D_F of one response with these pooled features, and the features that it depends on."""
    acts = torch.tensor([own], requires_grad=True)
    drift = feature_drift(Identity(len(own)), acts, [1], cache_of(torch.tensor([reference])), top_k)
    drift.mse_R.sum().backward()
    assert acts.grad is not None
    return drift, acts.grad[0].nonzero().flatten().tolist()


@pytest.fixture
def several_chunks(monkeypatch):
    monkeypatch.setattr(features, "CHUNK_ENTRIES", 64 * 3)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_pooled_features_are_the_mean_of_every_feature(several_chunks, kind):
    sae = make_sae(kind)
    found = pooled_features(sae, activations(), LENGTHS)
    torch.testing.assert_close(found, dense_pooled(sae, activations()), rtol=0, atol=1e-6)
    assert 0.05 < (found > 0).float().mean() < 0.95


def test_a_response_has_the_same_features_to_the_bit_wherever_it_lies():
    sae, acts = make_sae("jumprelu"), activations()
    together = pooled_features(sae, acts, LENGTHS)
    for number, part in enumerate(acts.split(LENGTHS)):
        assert torch.equal(pooled_features(sae, part.clone(), [len(part)])[0], together[number])


@pytest.mark.parametrize("top_k", [1, 6, 64])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_two_passes_give_the_value_and_gradient_of_the_full_encode(several_chunks, kind, top_k):
    sae = make_sae(kind)
    reference_RM = dense_pooled(sae, activations() + 0.3 * activations(seed=1))
    acts = activations().requires_grad_()
    drift = feature_drift(sae, acts, LENGTHS, cache_of(reference_RM), top_k)

    acts_2 = activations().requires_grad_()
    expected = torch.stack(
        [dense_drift(*sides, top_k) for sides in zip(dense_pooled(sae, acts_2), reference_RM, strict=True)]
    )
    assert expected.min() > 0
    torch.testing.assert_close(drift.mse_R, expected, rtol=1e-5, atol=1e-9)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    (found,) = torch.autograd.grad(drift.mse_R @ weights, acts)
    (gradient,) = torch.autograd.grad(expected @ weights, acts_2)
    assert (found - gradient).abs().max() <= 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("kind", ["jumprelu", "standard"])
def test_the_gradient_costs_the_selected_columns_only(kind):
    sae, acts, kept = make_sae(kind), activations().requires_grad_(), []
    ids_RI = torch.arange(len(LENGTHS) * 4).reshape(len(LENGTHS), 4)

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        found = selected_features(sae, acts, LENGTHS, ids_RI)
    torch.testing.assert_close(found, dense_pooled(sae, acts).gather(1, ids_RI), rtol=0, atol=1e-6)
    assert max(kept) < max(LENGTHS) * sae.cfg.d_sae


def test_without_gradients_the_value_is_the_same_to_the_bit():
    sae, acts = make_sae("jumprelu"), activations()
    cached = cache_of(pooled_features(sae, acts + 0.1, LENGTHS))
    with_gradient = feature_drift(sae, acts.clone().requires_grad_(), LENGTHS, cached, 8).mse_R
    assert with_gradient.requires_grad
    assert torch.equal(with_gradient.detach(), feature_drift(sae, acts, LENGTHS, cached, 8).mse_R)


def test_the_drift_from_itself_is_0_to_the_bit():
    sae, acts = make_sae("jumprelu"), activations()
    cached = cache_of(pooled_features(sae, acts, LENGTHS))
    drift = feature_drift(sae, acts.requires_grad_(), LENGTHS, cached, 8)
    assert drift.mse_R.tolist() == drift.miss_rate_R.tolist() == drift.error_bound_R.tolist() == [0.0] * len(LENGTHS)


positive = st.floats(2**-10, 2**10, width=32)
activation = st.one_of(st.just(0.0), st.sampled_from([0.5, 1.0, 2.0]), positive)  # the middle one makes ties
vectors = st.lists(activation, min_size=1, max_size=12)


@many_examples
@given(values=vectors, k=st.integers(0, 14))
def test_the_largest_are_positive_and_ties_go_to_the_lower_id(values, k):
    ids = largest_features(torch.tensor([values]), k)[0].tolist()
    ranked = sorted((i for i, value in enumerate(values) if value > 0), key=lambda i: (-values[i], i))
    assert len(ids) == min(k, len(values))
    assert sorted(i for i in ids if i < len(values)) == sorted(ranked[:k])


@many_examples
@given(values=vectors, keep=st.one_of(st.none(), st.integers(0, 14)))
def test_the_cache_keeps_exactly_the_largest(values, keep):
    kept = keep_largest(torch.tensor(values), keep)
    ranked = sorted((i for i, value in enumerate(values) if value > 0), key=lambda i: (-values[i], i))
    count = len(ranked) if keep is None else min(keep, len(ranked))
    assert kept.ids.tolist() == sorted(ranked[:count])
    assert kept.values.tolist() == [values[i] for i in kept.ids]
    assert kept.floor == max((values[i] for i in ranked[count:]), default=0.0)
    assert kept.nnz == len(ranked)
    assert (kept.ids.dtype, kept.values.dtype) == (np.uint16, np.float32)


@pytest.mark.parametrize(("width", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_last_id_fits_its_type(width, dtype):
    pooled = torch.zeros(width)
    pooled[-1] = 1.0
    kept = keep_largest(pooled, 8)
    assert kept.ids.dtype == dtype
    assert kept.ids.tolist() == [width - 1]


@many_examples
@given(sides=st.integers(1, 12).flatmap(lambda n: st.tuples(*[st.lists(activation, min_size=n, max_size=n)] * 2)))
def test_drift_is_that_of_the_definition_and_reads_at_most_twice_k_features(sides):
    own, reference = sides
    for top_k in (1, 3, 12):
        drift, read = drift_of(own, reference, top_k)
        assert drift.mse_R.item() == pytest.approx(
            dense_drift(torch.tensor(own), torch.tensor(reference), top_k).item(), rel=1e-12
        )
        assert len(read) <= 2 * top_k
        assert drift.miss_rate_R.item() == drift.error_bound_R.item() == 0.0


def test_tied_features_enter_by_the_lower_id():
    drift, read = drift_of(own=[0.0, 1.0, 1.0, 1.0, 1.0], reference=[4.0, 4.0, 4.0, 0.5, 0.0], top_k=2)
    # Own top 2: features 1 and 2. The reference's: 0 and 1; feature 0 has no gradient below a ReLU.
    assert drift.mse_R.item() == (4.0**2 + 3.0**2 + 3.0**2) / 2
    assert read == [1, 2]


@many_examples
@given(
    sides=st.integers(1, 12).flatmap(lambda n: st.tuples(*[st.lists(activation, min_size=n, max_size=n)] * 2)),
    top_k=st.integers(1, 6),
    more=st.integers(0, 6),
)
def test_a_truncated_cache_errs_by_no_more_than_its_bound(sides, top_k, more):
    own, reference = (torch.tensor([side]) for side in sides)
    full, cut = (
        feature_drift(Identity(own.shape[1]), own, [1], cache_of(reference, keep), top_k)
        for keep in (None, top_k + more)
    )
    error = abs(full.mse_R.item() - cut.mse_R.item())
    assert error <= cut.error_bound_R.item() * (1 + 1e-9) + 1e-9
    if keep_largest(reference[0], top_k + more).floor == 0:
        assert cut.mse_R.item() == full.mse_R.item()
        assert cut.miss_rate_R.item() == cut.error_bound_R.item() == 0.0
    if cut.miss_rate_R.item() == 0:
        assert error == 0


def test_the_bound_is_reached_and_misses_are_counted():
    """The policy's largest feature is one that the cache cut off, by a hair: 0 is read for the floor itself."""
    own, reference = torch.tensor([[5.0, 1.0, 0.0]]), torch.tensor([[2.0, 3.0, 0.0]])
    cut = feature_drift(Identity(3), own, [1], cache_of(reference, 1), 1)
    full = feature_drift(Identity(3), own, [1], cache_of(reference), 1)
    assert (full.mse_R.item(), cut.mse_R.item()) == (3.0**2 + 2.0**2, 5.0**2 + 2.0**2)
    assert cut.error_bound_R.item() == 2 * 2.0 * 5.0
    assert cut.miss_rate_R.item() == 0.5
    assert full.miss_rate_R.item() == 0.0


def test_cached_features_are_padded_without_changing_any():
    rows = [keep_largest(torch.tensor(values), None) for values in ([0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0])]
    cached = CachedFeatures.collate(rows, 3).to("cpu")
    assert cached.ids_RF.tolist() == [[1, 2], [3, 3], [0, 3]]
    assert cached.values_RF.tolist() == [[2.0, 1.0], [0.0, 0.0], [3.0, 0.0]]
    assert CachedFeatures.collate(rows[1:2], 3).ids_RF.tolist() == [[3]]


@few_examples
@given(seed=st.integers(0, 1000), top_k=st.integers(1, 20), keep=st.integers(20, 64))
def test_real_features_of_a_truncated_cache_stay_within_the_bound(seed, top_k, keep):
    sae = make_sae("jumprelu")
    pooled_RM = pooled_features(sae, activations(seed) + activations(seed + 1), LENGTHS)
    full, cut = (
        feature_drift(sae, activations(seed), LENGTHS, cache_of(pooled_RM, kept), top_k) for kept in (None, keep)
    )
    assert torch.all((full.mse_R - cut.mse_R).abs() <= cut.error_bound_R * (1 + 1e-9) + 1e-12)


def test_operands_rounded_to_tf32_move_features_far_less_than_the_bf16_recipe_does():
    """A GPU's products of the SAE under the bf16 recipe, imitated: operands keep ten bits of their fraction."""

    def tf32(values: Tensor) -> Tensor:
        bits = values.contiguous().view(torch.int32)
        return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    sae = make_sae("standard")
    acts = 2 * torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    exact = pooled_features(sae, acts, [400])
    recipe = (pooled_features(sae, acts.to(torch.bfloat16).float(), [400]) - exact).norm()
    sae.W_enc.data = tf32(sae.W_enc.data)
    assert 0 < (pooled_features(sae, tf32(acts), [400]) - exact).norm() < recipe
