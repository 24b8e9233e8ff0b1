import pytest
import torch
from fpo.stages.scoring import logprobs
from fpo.stages.scoring.features import feature_drift, pooled_features

from benchmarks.parts import compare, drift_of_all, features, head, packed_logps, packing, padded_logps
from benchmarks.shapes import cached_features, random_model, random_pair, saes_at


def test_a_chunked_head_needs_less_memory_than_all_logits(monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK_ENTRIES, "cpu", 8 * 4000)
    monkeypatch.setattr(logprobs, "LEAST_TOKENS", 1)
    chunked, whole = (head(way, 256, 4000, 16, "cpu") for way in ("chunked", "all logits"))
    assert chunked["extra_bytes"] < 4 * 256 * 4000 < whole["extra_bytes"]


def test_two_passes_compute_what_encoding_all_does():
    (site,) = saes_at([0], 16, 300, "cpu")
    acts_TD = torch.randn(20, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    lengths = [12, 8]
    (cached,) = cached_features([pooled_features(site.sae, acts_TD, lengths)], "cpu")
    found_R = feature_drift(site.sae, acts_TD, lengths, cached, 50).mse_R
    (found_TD,) = torch.autograd.grad(found_R.sum(), acts_TD)
    expected_R = drift_of_all(site.sae, acts_TD, lengths, cached)
    (expected_TD,) = torch.autograd.grad(expected_R.sum(), acts_TD)
    assert found_R.tolist() == pytest.approx(expected_R.tolist(), rel=1e-4)
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-4, atol=1e-7)
    assert min(expected_R.tolist()) > 0


def test_two_passes_need_less_memory_in_training_than_all_features(monkeypatch):
    monkeypatch.setattr("fpo.stages.scoring.features.CHUNK_ENTRIES", 2**14)
    few, all_ = (features(way, 128, 2**12, 16, "cpu") for way in ("two passes", "all encoded"))
    assert few["extra_bytes"] < all_["extra_bytes"] / 4


def test_packed_rows_need_less_memory_than_padded_sequences(world):
    results = [packing(way, str(world.llama), 2, 128, 0.5, "cpu") for way in ("packed", "padded")]
    assert results[0]["extra_bytes"] < results[1]["extra_bytes"]


def test_packed_and_padded_rows_are_scored_alike(world, monkeypatch):
    found = []

    def keep(hidden_TD, head_VD, targets_T, **options):
        logps = logprobs.token_scores(hidden_TD, head_VD, targets_T, **options)
        found.append(float(logps[0].sum()))
        return logps

    monkeypatch.setattr("benchmarks.parts.token_scores", keep)
    model = random_model(str(world.llama), "cpu", layers=2)
    pairs = [random_pair(5, 3 + seed, model.config.vocab_size, seed) for seed in range(3)]
    with torch.no_grad():
        packed_logps(model, pairs, 2**62, "cpu")
        padded_logps(model, pairs, "cpu")
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_way_that_did_not_fit_is_shown_and_has_no_ratio(monkeypatch):
    answers = iter([{"seconds": 1.0, "extra_bytes": 2_000_000}, {"failed": "out of memory"}])
    monkeypatch.setattr("benchmarks.parts.in_fresh_process", lambda *args, **options: next(answers))
    (row,) = compare(None, "ours", "plain", [{"width": 4}], {})
    assert row == {"width": 4, "ours, s": 1.0, "plain, s": "out of memory", "ours, MB": 2.0, "plain, MB": None}
