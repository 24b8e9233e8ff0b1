"""What a cache says of itself: its noise, what `cache info` and stage one print; and what parity finds in it."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fpo.cache.manifest import ShardReport
from fpo.cache.reader import open_cache
from fpo.cache.schema import CachedPair
from fpo.cache.writer import CacheWriter
from pairs import score_alone
from seams.lab import SIDES, SMALL, Lab, by_hand, in_turns, plain_model, tokens, watched_passes
from tiny_world import SITES, SKIPPED, fpo
from transformers.models.gemma2 import modeling_gemma2


def sizes(lab: Lab) -> list[int]:
    """Tokens of each pair of the small cache, its prompt once."""
    return [len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in lab.pairs()]


@pytest.mark.parametrize("budget", [1, 10_000])
def test_noise_is_measured_with_another_packing(lab, budget):
    """Pairs that were alone are measured together, pairs that were together alone: at least two of a shard."""
    with watched_passes() as passes:
        assert lab.call("precompute", lab.new(), token_budget=budget).exit_code == 0
    each = sizes(lab)
    found = [size for size in passes.scored if size in {*each, sum(each), *(a + b for a in each for b in each)}]
    alone, together = [size for size in found if size in each], [size for size in found if size not in each]
    assert len(alone) >= 2 and together
    assert sum(found) >= sum(each) + sum(each[:2])


def test_a_model_that_depends_on_its_packing_is_noisy(lab):
    """Whatever the row's length does to the numbers is in the noise, or stops stage one."""
    forward = modeling_gemma2.Gemma2Model.forward

    def depends(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        found = forward(self, input_ids=input_ids, **kwargs)
        found.last_hidden_state = found.last_hidden_state * (1 + 1e-6 * input_ids.shape[-1])
        return found

    quiet = lab.run("precompute", token_budget=10_000).open().manifest.noise.logp
    for budget in (1, 60, 10_000):
        out = lab.new()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_gemma2.Gemma2Model, "forward", depends)
            result = lab.call("precompute", out, token_budget=budget)
        if result.exit_code == 0:
            assert open_cache(out, sites=[]).manifest.noise.logp > max(5 * quiet, 1e-5)
        else:
            assert "pack" in result.stderr


# Parity.


def altered(lab: Lab, name: str, change: Callable[[CachedPair], CachedPair], at: int) -> Path:
    """The world's cache of twelve pairs, what it says of one of them changed."""
    cache = open_cache(lab.world.cache, sites=[site.name for site in SITES])
    rows = [cache[i] for i in range(len(cache))]
    rows[at] = change(rows[at])
    meaning, numerics = cache.manifest.meaning, cache.manifest.numerics
    folder = lab.new(name)
    raw_rows = len(rows) + len(SKIPPED)
    writer = CacheWriter(folder, meaning, dataclasses.replace(numerics, shard_size=raw_rows), raw_rows)
    counts, skipped = dict.fromkeys(cache.manifest.counts, 0), tuple(SKIPPED.items())
    writer.write_shard(rows, ShardReport(0, 0, raw_rows, skipped, counts, cache.manifest.noise))
    assert writer.finish() is not None
    return folder


def louder(row: CachedPair) -> CachedPair:
    """Another log-probability of the rejected response."""
    return dataclasses.replace(row, rejected=dataclasses.replace(row.rejected, logp=row.rejected.logp - 1.0))


def larger(row: CachedPair) -> CachedPair:
    """Other features of the chosen response, at the second site."""
    first, second = row.chosen.features
    second = dataclasses.replace(second, values=second.values * 3)
    return dataclasses.replace(row, chosen=dataclasses.replace(row.chosen, features=(first, second)))


@pytest.mark.parametrize("at", [0, 11])
def test_parity_sees_the_first_pair_and_the_last(lab, at):
    found = lab.refused("align", cache=altered(lab, "louder", louder, at))
    assert "log-probs by 1 nats" in found
    cache, names = altered(lab, "larger", larger, at), [site.name for site in SITES]
    for sites in (names[1:], names, names[::-1]):
        assert f"features at {names[1]}" in lab.refused("align", method="fpo", site=tuple(sites), cache=cache)


def test_parity_sees_every_part_of_the_cache(lab):
    """Of any three neighbours at least one is looked at."""
    seen = [lab.call("align", lab.new(), cache=altered(lab, "part", louder, at)).exit_code == 2 for at in range(1, 11)]
    assert all(any(seen[at : at + 3]) for at in range(len(seen) - 2))
    assert sum(seen) >= 5


# What is printed.


def lines_of(text: str) -> dict[str, str]:
    """`cache info`'s lines by name; those without one belong to the one before."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        name = line[:14].strip() or name
        found[name] = f"{found.get(name, '')} {line[15:]}".strip()
    return found


@pytest.mark.parametrize("keep", ["all", 6])
def test_info_s_numbers_are_those_of_data_and_model(lab, keep):
    run = lab.run("precompute", limit=8, shard_size=4, keep_features=keep, max_prompt_length=16, max_length=30)
    said = lines_of(fpo("cache", "info", run.folder).stdout)
    pairs = by_hand(lab.rows[:8], max_length=30, max_prompt_length=16)
    shards = sorted((run.folder / "data").iterdir())
    size = sum(shard.stat().st_size for shard in shards)
    assert said["pairs"] == f"{len(pairs)} in {len(shards)} shards of 4 raw rows"
    assert said["size"] == f"{size / 1e6:.1f} MB, {size / len(pairs):.0f} bytes a pair"
    assert said["split"] == "train, limit 8"
    assert said["skipped"] == "empty response 1, identical responses 1"
    assert said["ties"] == "1 (kept)"
    prompts = [len(tokens(in_turns(row["chosen"][0]["content"]))) for row in lab.rows[:8]]
    kept = [i for i in range(8) if i not in (3, 7)]
    answers = [len(tokens(lab.rows[i][side][1]["content"] + "<end_of_turn>")) for i in kept for side in SIDES]
    room = [30 - min(prompts[i], 16) for i in kept for _ in SIDES]
    cut = sum(length > left for length, left in zip(answers, room, strict=True))
    assert said["truncated"] == f"{sum(prompts[i] > 16 for i in kept)} prompts, {cut} responses"
    assert said["lengths"] == "prompt up to 16, with response up to 30 tokens"
    assert said["features kept"] == f"{keep} a response and site"
    reference = plain_model(lab.world.gemma)
    for number, site in enumerate(SITES):
        sae = lab.world.load_sae(number)
        with torch.no_grad():
            sides = [side for pair in pairs for side in score_alone(reference, pair, [site])]
            above = np.array([int((side.pooled_M(sae) > 0).sum()) for side in sides])
        most = np.minimum(above, 10**9 if keep == "all" else keep)
        assert f"{site.name}: jumprelu SAE, width 64" in said[f"site {number}"]
        wanted = f"{above.mean():.0f} features above 0 a response, {most.sum() / above.sum():.1%} of them kept; "
        assert f"{wanted}{(above > most).sum()} of {len(above)} responses were cut" in said[f"site {number}"]
        acts_TD = torch.cat([side.acts[site] for side in sides])
        features_TM = sae.sae.encode(acts_TD)
        error = (acts_TD - sae.sae.decode(features_TM)).square().sum()
        explained = 1 - float(error / (acts_TD - acts_TD.mean(0)).square().sum())
        fit = re.search(r"L0 ([\d.]+), explained variance ([-\d.]+) at first", said[f"site {number}"])
        assert fit and float(fit[1]) == pytest.approx(float((features_TM > 0).sum(1).double().mean()), abs=0.051)
        assert float(fit[2]) == pytest.approx(explained, abs=0.00051)
    assert said["device"].endswith(f"{torch.get_num_threads()} threads")
    assert said["recipe"] == "fp32, packed attention, 160 tokens a row"
    scored = sum(len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    made = re.search(r"2 shards, (\d+) tokens in ([\d.]+) s \((\d+) tokens/s\)", said["provenance"])
    assert made and int(made[1]) == scored
    if float(made[2]):
        assert int(made[3]) == pytest.approx(scored / float(made[2]), abs=1)


def test_stage_one_says_what_it_did(lab):
    run = lab.run("precompute", limit=8, shard_size=4, max_prompt_length=16, max_length=30)
    pairs = by_hand(lab.rows[:8], max_length=30, max_prompt_length=16)
    scored = sum(len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    size = sum(shard.stat().st_size for shard in (run.folder / "data").iterdir())
    wanted = f"{len(pairs)} pairs in 2 shards, {size / 1e6:.1f} MB ({size / len(pairs):.0f} bytes a pair), "
    assert wanted + f"{scored} tokens scored" in run.said
    noise = open_cache(run.folder, sites=[]).manifest.noise
    assert f"noise between two packings: log-probs {noise.logp:.2g} nats" in run.said


def test_the_shards_columns_hold_each_side_s_own(lab):
    """As anyone reads them: `chosen` is the data's better answer."""
    (shard,) = (lab.small_cache / "data").iterdir()
    table = pq.read_table(shard)
    pairs = lab.pairs()
    assert table.num_rows == SMALL
    for side in SIDES:
        column = next(name for name in table.column_names if name.startswith(side) and "ids" in name)
        assert table[column].to_pylist() == [getattr(pair, f"{side}_ids").tolist() for pair in pairs]
