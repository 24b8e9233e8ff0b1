import pytest
from fpo.cache.reader import open_cache, verify
from fpo.stages.scoring import logprobs

from benchmarks import generated_cache
from benchmarks.growth import fpo_pair


@pytest.fixture
def pair_of(world):
    def run(**changes):
        sizes = {"layers": 2, "vocabulary": None, "tokens": 64, "width": 64, "sites": 1, "recipe": "fp32"}
        return fpo_pair(str(world.llama), **(sizes | changes), device="cpu", repeats=1)

    return run


def test_activations_grow_by_one_vector_of_the_sae_s_width_a_response_and_by_chunks(pair_of, monkeypatch):
    monkeypatch.setattr("fpo.stages.scoring.features.CHUNK_ENTRIES", 2**12)  # chunks of one token, at the widest
    narrow, wide = (pair_of(width=width)["extra_bytes"] for width in (2**10, 2**12))
    a_vector_a_response = 2 * 4 * (2**12 - 2**10)
    assert wide - narrow < 8 * a_vector_a_response


def test_activations_do_not_grow_with_the_vocabulary_beyond_chunks(pair_of, monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK_ENTRIES, "cpu", 2**12)
    monkeypatch.setattr(logprobs, "LEAST_TOKENS", 1)
    small, large = (pair_of(vocabulary=vocabulary)["extra_bytes"] for vocabulary in (2**9, 2**12))
    assert large - small < 8 * 4 * 2**12


def test_every_site_is_read(pair_of):
    assert pair_of(sites=2)["tensor_bytes"] > pair_of(sites=1)["tensor_bytes"]


def test_a_generated_cache_is_sound_and_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(generated_cache, "SHARD", 20)
    monkeypatch.setattr(generated_cache, "BATCHES", 2)
    folder = tmp_path / "cache"
    written = generated_cache.write(folder, pairs=50, tokens=16, features=4)
    assert verify(folder) == []
    assert written["bytes"] == sum(path.stat().st_size for path in (folder / "data").iterdir())
    cache = open_cache(folder)
    assert len(cache) == 50 and cache[49].pair.pair_id.endswith("-49")
    result = generated_cache.open_and_read(folder, trust_hashes=True)
    assert 0 < result["batch_seconds"] <= result["slowest_batch_seconds"] < 1
