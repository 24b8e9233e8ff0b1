import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fpo.cache.identity import IdentityError
from fpo.cache.manifest import Manifest
from fpo.cache.reader import open_cache, verify
from fpo.cache.writer import CacheWriter
from fpo.stages.data.tokenize import Limits
from fpo.stages.model.sae import Site
from fpo.stages.precompute import shards
from fpo.stages.precompute.reference import Reference
from fpo.stages.precompute.shards import precompute
from fpo.stages.scoring.parity import apart, tolerance
from pairs import score_alone
from tiny import save_tiny_sae, tiny_sae
from tiny_world import LIMITS, SITES, SKIPPED, TIES, files, ran, rows, write_rows

RAW_ROWS = 14
# What hashes of the cache's content cover; provenance and locks are outside.
CONTENT = ("data/", "manifest.json", "README.md")


def content(folder) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.startswith(CONTENT)}


@pytest.fixture(scope="module")
def reference(world):
    return world.reference()


@pytest.fixture
def write(world, reference, tmp_path) -> Callable[..., Manifest | None]:
    """Stage one into `tmp_path / name`, four raw rows a shard."""

    def run(name: str = "out", limits: Limits = LIMITS, **settings: Any) -> Manifest | None:
        limit = settings.get("limit")
        defaults = {"keep_features": None, "token_budget": 160, "shard_size": 4}
        return precompute(reference, world.preferences(limit), limits, tmp_path / name, **(defaults | settings))

    return run


def on_packed_rows(reference: Reference, action: Callable[[], None]) -> Any:
    """Has `action` done after every packed row; the check of the model's head runs without a mask and is none."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("attention_mask") is not None:
            action()

    return reference.model.get_decoder().register_forward_hook(hook, with_kwargs=True)


@pytest.fixture
def forwards(reference, monkeypatch) -> list[int]:
    """Grows by one with every packed row that the reference runs over."""
    count: list[int] = []
    handle = on_packed_rows(reference, lambda: count.append(1))
    yield count
    handle.remove()


def test_the_cache_holds_what_the_model_says_of_each_response_alone(world, reference):
    cache = open_cache(world.cache)
    sites = [sae.site for sae in reference.saes]
    assert cache.sites == tuple(site.name for site in sites)
    for i in range(len(cache)):
        row = cache[i]
        with torch.no_grad():
            alone = score_alone(reference.model, row.pair, sites)
        for side, truth in zip((row.chosen, row.rejected), alone, strict=True):
            assert side.num_tokens == len(truth.targets_T)
            assert side.logp == pytest.approx(float(truth.token_logps_T.double().sum()), abs=1e-4)
            for features, sae in zip(side.features, reference.saes, strict=True):
                dense = np.zeros(sae.width, np.float32)
                dense[features.ids] = features.values
                np.testing.assert_allclose(dense, truth.pooled_M(sae).detach().numpy(), atol=1e-5)


def test_no_raw_row_is_lost(world):
    manifest = Manifest.load(world.cache)
    assert dict(row for shard in manifest.shards for row in shard.report.skipped) == SKIPPED
    assert manifest.num_pairs + sum(manifest.skipped.values()) == RAW_ROWS
    assert manifest.counts["ties"] == len(TIES)
    cache = open_cache(world.cache)
    assert len(cache) == RAW_ROWS - len(SKIPPED)
    kept = [int(cache[i].pair.pair_id.split("-")[1]) for i in range(len(cache))]
    assert kept == [row for row in range(RAW_ROWS) if row not in SKIPPED]
    pairs = [cache[i].pair for i in range(len(cache))]
    scored = sum(len(ids) for pair in pairs for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    assert manifest.counts["scored_tokens"] == scored


def test_ties_are_dropped_on_request_and_truncation_is_counted(write, tmp_path):
    limits = Limits(max_length=24, max_prompt_length=10, drop_ties=True)
    manifest = write(limits=limits)
    assert manifest.skipped["tie"] == len(TIES)
    pairs = [open_cache(tmp_path / "out")[i].pair for i in range(manifest.num_pairs)]
    longest = max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    assert longest == 24
    assert manifest.counts["truncated_prompts"] == sum(len(pair.prompt_ids) == 10 for pair in pairs) > 0
    assert manifest.counts["truncated_responses"] > 0


def test_progress_counts_every_raw_row_once(write):
    seen: list[tuple[int, int]] = []
    manifest = write(on_pairs=lambda rows, tokens: seen.append((rows, tokens)))
    assert sum(rows for rows, _ in seen) == RAW_ROWS
    assert sum(tokens for _, tokens in seen) == manifest.counts["scored_tokens"]
    seen.clear()
    write(on_pairs=lambda rows, tokens: seen.append((rows, tokens)))
    assert (sum(rows for rows, _ in seen), sum(tokens for _, tokens in seen)) == (RAW_ROWS, 0)


def test_the_next_shard_is_tokenised_while_one_is_measured(write, reference, monkeypatch):
    seen = {row: threading.Event() for row in range(RAW_ROWS)}
    plain = shards.tokenize_pair

    def tokenize(example: Any, raw_row: int, *others: Any) -> Any:
        seen[raw_row].set()
        return plain(example, raw_row, *others)

    monkeypatch.setattr(shards, "tokenize_pair", tokenize)
    waited: list[bool] = []
    handle = on_packed_rows(reference, lambda: waited.append(seen[4].wait(20 if not waited else 0)))
    write()
    handle.remove()
    assert waited[0], "shard 0 waited in its first packed row, and shard 1 was not tokenised"


class Killed(BaseException):
    """Neither an Exception nor expected by anyone."""


@pytest.mark.parametrize("pieces", [1, 3, 6, 9])
def test_a_run_killed_and_resumed_leaves_the_same_bytes(world, write, tmp_path, pieces):
    calls = 0

    def kill(rows: int, tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls > pieces:
            raise Killed

    with pytest.raises(Killed):
        write(on_pairs=kill)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert write() is not None
    assert content(tmp_path / "out") == content(world.cache)
    assert verify(tmp_path / "out") == []


def test_a_failing_forward_pass_leaves_the_finished_shards(world, write, reference, tmp_path):
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt

    handle = on_packed_rows(reference, fail)
    with pytest.raises(KeyboardInterrupt):
        write()
    handle.remove()
    left = content(tmp_path / "out")
    assert left
    assert left.items() < content(world.cache).items()
    write()
    assert content(tmp_path / "out") == content(world.cache)


def test_finished_shards_are_not_computed_again(write, forwards, tmp_path):
    write()
    whole = len(forwards)
    before = content(tmp_path / "out")
    write()
    assert len(forwards) == whole
    shard = sorted((tmp_path / "out" / "data").iterdir())[1]
    shard.unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    write()
    assert 0 < len(forwards) - whole < whole
    assert content(tmp_path / "out") == before


def test_a_damaged_shard_is_written_again(write, tmp_path):
    write()
    before = content(tmp_path / "out")
    shard = sorted((tmp_path / "out" / "data").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-20])
    write()
    assert content(tmp_path / "out") == before


CHANGES = {
    "keep_features": {"keep_features": 8},
    "limit": {"limit": 14},
    "max_length": {"limits": Limits(63, 32)},
    "max_prompt_length": {"limits": Limits(64, 31)},
    "drop_ties": {"limits": Limits(64, 32, True)},
    "token_budget": {"token_budget": 161},
    "shard_size": {"shard_size": 5},
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_setting_on_resume_is_an_error_that_names_it(write, forwards, tmp_path, field):
    write()
    before, passes = files(tmp_path / "out"), len(forwards)
    with pytest.raises(IdentityError, match=rf"\A[^\n]*\b{field}: expected [^\n]*\Z"):
        write(**CHANGES[field])
    assert len(forwards) == passes
    assert files(tmp_path / "out") == before


def test_other_weights_data_or_saes_on_resume_are_errors_that_name_them(world, tmp_path):
    out = tmp_path / "out"
    ran(world.precompute(out, "--limit", "4"))
    for change, field in (
        ({"sae": world.saes[:1]}, "sites"),
        ({"sae": world.saes[::-1]}, "sites[0].site"),
        ({"dataset": world.heldout}, "dataset"),
        ({"split": "test"}, "split"),
        ({"dtype": "bf16"}, "recipe"),
    ):
        result = world.precompute(out, "--limit", "4", **change)
        assert (result.exit_code, field in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("site", range(2))
def test_all_features_leave_no_floor_and_fewer_leave_one(world, write, tmp_path, site):
    whole = open_cache(world.cache)
    write(keep_features=8)
    part = open_cache(tmp_path / "out")
    for i in range(len(whole)):
        for full, kept in zip((whole[i].chosen, whole[i].rejected), (part[i].chosen, part[i].rejected), strict=True):
            full, kept = full.features[site], kept.features[site]
            assert (full.floor, full.nnz) == (0.0, len(full.ids))
            ranked = np.sort(full.values)[::-1]
            assert kept.nnz == full.nnz > 8 == len(kept.ids)
            np.testing.assert_array_equal(np.sort(kept.values)[::-1], ranked[:8])
            assert kept.floor == ranked[8]


@pytest.mark.parametrize("budget", [1, 80, 10_000])
def test_another_token_budget_agrees_within_the_noise(world, write, tmp_path, budget):
    manifest = write(token_budget=budget)
    assert manifest.meaning == Manifest.load(world.cache).meaning
    caches = [open_cache(folder) for folder in (world.cache, tmp_path / "out")]
    rows, others = ([cache[i] for i in range(len(cache))] for cache in caches)
    for found, allowed in zip(apart(rows, others), tolerance(manifest.noise, "fp32", rows), strict=True):
        assert found.logp <= allowed.logp
        assert all(mse <= limit for mse, limit in zip(found.feature_mse, allowed.feature_mse, strict=True))


@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_that_are_not_finite_stop_it_with_the_pair_s_name(world, tmp_path, name):
    reference = world.reference()
    reference.model.get_parameter(name).data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"\Apairs [0-9a-f]{16}-\d+, [^\n]*\Z"):
        precompute(reference, world.preferences(), LIMITS, tmp_path, shard_size=4)
    assert content(tmp_path) == {}


def test_a_feature_that_is_not_finite_names_its_site(world, tmp_path, monkeypatch):
    reference = world.reference()
    reference.saes[1].sae.b_enc.data[7] = torch.inf
    with pytest.raises(
        FloatingPointError, match=rf"\Apairs [0-9a-f]{{16}}-0, [^\n]*: not finite: pooled features at {SITES[1].name}\Z"
    ):
        precompute(reference, world.preferences(), LIMITS, tmp_path, shard_size=4)
    assert content(tmp_path) == {}


class OfTheRow(torch.nn.Module):
    """Rotary frequencies that depend on how long the packed row is, as if every row were one sequence."""

    def __init__(self, inner: Any, ordinary: int) -> None:
        super().__init__()
        self.inner, self.ordinary = inner, ordinary

    def forward(self, x: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        stretch = max(1.0, position_ids.shape[-1] / self.ordinary)
        return self.inner(x, position_ids / stretch, *args, **kwargs)


@pytest.mark.parametrize("token_budget", [1, 160])
def test_a_model_whose_values_depend_on_the_packing_stops_stage_one(
    write, reference, monkeypatch, tmp_path, token_budget
):
    decoder = reference.model.get_decoder()
    monkeypatch.setitem(decoder._modules, "rotary_emb", OfTheRow(decoder.rotary_emb, 40))
    with pytest.raises(
        ValueError, match=r"\Aexpected a pair to mean the same in two packings, found [0-9a-f]{16}-\d+ "
    ):
        write(token_budget=token_budget)
    assert content(tmp_path / "out") == {}


def test_a_data_set_of_which_all_is_skipped_is_an_error_and_gives_no_cache(world, tmp_path):
    made = rows(2, 5)
    for row in made:
        row["rejected"] = row["chosen"]
    for _ in range(2):
        result = world.precompute(tmp_path / "out", dataset=write_rows(tmp_path / "same.jsonl", made))
        assert (result.exit_code, "identical responses 5" in result.stderr) == (2, True), result.output
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_shard_of_which_all_is_skipped_is_kept(world, tmp_path):
    made = rows(2, 6)
    for row in made[:4]:
        row["rejected"] = row["chosen"]
    ran(world.precompute(tmp_path / "out", dataset=write_rows(tmp_path / "some.jsonl", made)))
    manifest = Manifest.load(tmp_path / "out")
    assert [shard.rows for shard in manifest.shards] == [0, 2]
    assert manifest.noise is not None
    assert verify(tmp_path / "out") == []


def test_workers_of_one_cache_share_it_and_the_last_writes_the_manifest(world, write, reference, tmp_path):
    first = Manifest.load(world.cache)
    other = CacheWriter(tmp_path / "out", first.meaning, first.numerics, RAW_ROWS)
    with other.lock(2) as mine:
        assert mine
        assert write() is None
        assert other.missing() == [2]
    assert write() is not None
    assert content(tmp_path / "out") == content(world.cache)


def test_a_worker_takes_its_own_shards_and_then_what_others_have_not_begun(world, write, tmp_path):
    begun: list[int] = []

    def run_the_other(rows: int, tokens: int) -> None:
        begun.append(rows)
        if len(begun) == 1:  # the first worker is in the middle of its first shard
            assert write(rank=1, world_size=2) is None
            done = [path.name for path in sorted((tmp_path / "out" / "data").glob("*.parquet"))]
            assert done == [f"train-0000{shard}-of-00004.parquet" for shard in (1, 2, 3)]

    assert write(rank=0, world_size=2, on_pairs=run_the_other) is not None
    assert content(tmp_path / "out") == content(world.cache)


def test_the_meaning_names_everything_that_the_numbers_depend_on(world, reference):
    meaning = Manifest.load(world.cache).meaning
    assert meaning.model == reference.source.sha256
    assert [(site.site, site.sae) for site in meaning.sites] == [(s.site.name, s.sha256) for s in reference.saes]
    assert (meaning.recipe, meaning.split, meaning.limit, meaning.keep_features) == ("fp32", "train", None, None)
    assert meaning.chat_template == reference.chat.template
    assert meaning.dataset == world.preferences().content_hash


def test_a_site_that_the_model_lacks_is_refused_before_a_folder_is_made(world, tmp_path):
    save_tiny_sae(tmp_path / "sae", 32, 64, 0, "jumprelu", Site(4, "resid_post"))
    result = world.precompute(tmp_path / "out", sae=tmp_path / "sae")
    assert (result.exit_code, "layers are 0 to 3" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_an_sae_of_any_architecture_fills_a_cache(world, reference, tmp_path):
    topk = tiny_sae(architecture="topk", site=SITES[0])
    manifest = precompute(replace(reference, saes=(topk,)), world.preferences(4), LIMITS, tmp_path, limit=4)
    assert manifest.meaning.sites[0].architecture == "topk"
    assert verify(tmp_path) == []


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_what_another_finishes(world, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fpo.pipeline.cli", *world.to_precompute(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob("data/*.parquet")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    ran(world.precompute(out))
    assert content(out) == content(world.cache)
    assert pq.read_table(out / "data", columns=["pair_id"]).num_rows == RAW_ROWS - len(SKIPPED)
