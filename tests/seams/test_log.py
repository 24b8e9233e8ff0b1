"""What a training logs beside its losses: misses of the cache, the parity before the first step, its cost."""

import numpy as np
import pytest
import torch
from fpo.cache.reader import open_cache
from pairs import score_alone
from seams.lab import plain_model
from seams.of_training import conversations
from tiny_world import SITES

KEEP = 6


@pytest.mark.parametrize("sites", [(0,), (1,), (0, 1), (1, 0)])
def test_miss_rate_and_error_bound_are_those_of_all_sites_by_hand(lab, sites):
    """method.md, section 3: a feature of the union that the cache cut off is a miss; the floor bounds its error."""
    made = lab.run("precompute", keep_features=KEEP)
    names = tuple(SITES[site].name for site in sites)
    run = lab.run("align", method="fpo", cache=made.folder, top_k=KEEP, lr=1e-2, max_steps=2, site=names)
    policy, reference = run.model(1), plain_model(lab.world.gemma)
    misses, bounds = [], []
    for pair in lab.pairs():
        with torch.no_grad():
            sides = zip(*(score_alone(model, pair, SITES) for model in (policy, reference)), strict=True)
        for own, held in sides:
            rates, errors = [], []
            for site in sites:
                sae = lab.world.load_sae(site)
                own_M, held_M = own.pooled_M(sae).double().numpy(), held.pooled_M(sae).double().numpy()
                largest, kept = (
                    [i for i in np.argsort(-values, kind="stable")[:KEEP] if values[i] > 0]
                    for values in (own_M, held_M)
                )
                floor = np.sort(held_M)[::-1][KEEP]
                missed = set(largest) - set(kept)
                rates.append(len(missed) / len({*largest, *kept}))
                errors.append(sum(max(floor**2, 2 * floor * own_M[i]) for i in missed) / KEEP)
            misses.append(np.mean(rates))
            bounds.append(np.mean(errors))
    assert np.mean(misses) > 0.01
    line = run.steps[1]
    assert line["features/miss_rate"] == pytest.approx(np.mean(misses), rel=1e-6)
    assert line["features/error_bound"] == pytest.approx(np.mean(bounds), rel=1e-3)


def test_parity_is_the_largest_difference_of_policy_and_cache(lab):
    run = lab.run("align", method="fpo", model=lab.other, allow_different_start=True)
    (line,) = (line for line in run.log if "parity/logps" in line)
    policy, reference, sae = plain_model(lab.other), plain_model(lab.world.gemma), lab.world.load_sae(0)
    apart, drifts = [], []
    for pair in lab.pairs():
        with torch.no_grad():
            sides = zip(*(score_alone(model, pair, [sae.site]) for model in (policy, reference)), strict=True)
        for own, held in sides:
            apart.append(abs(float(own.token_logps_T.double().sum() - held.token_logps_T.double().sum())))
            values = [side.pooled_M(sae).double().numpy() for side in (own, held)]
            union = {int(i) for side in values for i in np.argsort(-side, kind="stable")[:50] if side[i] > 0}
            drifts.append(sum((values[0][i] - values[1][i]) ** 2 for i in union) / 50)
    assert line["parity/logps"] == pytest.approx(max(apart), rel=1e-4)
    # Of D_F that difference is logged which is farthest beyond its tolerance.
    assert any(line["parity/mse"] == pytest.approx(drift, rel=1e-3) for drift in drifts)


@pytest.mark.parametrize("command", ["align", "sft"])
def test_tokens_per_second_are_the_tokens_of_all_steps_over_their_time(lab, command):
    """Prompts count once a pair; padding does not count."""
    run = lab.run(command, max_steps=40, snapshot_steps=None, logging_steps=40, save_steps=1000)
    (line,) = (line for line in run.log if "train_runtime" in line)
    if command == "align":
        a_step = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in lab.pairs())
    else:
        a_step = sum(len(ids) for ids, _ in conversations(lab))
    assert line["step"] == 40
    found = line["train_tokens_per_second"] * line["train_runtime"]
    assert found == pytest.approx(40 * a_step, rel=0.25)  # the two clocks begin and end a little apart


def test_the_cache_says_which_side_is_which(lab):
    """The better answer of the data is `chosen`, in ids and in log-probabilities."""
    cache = open_cache(lab.small_cache, sites=[])
    reference = plain_model(lab.world.gemma)
    for row, pair in zip(cache, lab.pairs(), strict=True):
        with torch.no_grad():
            chosen, rejected = (side.token_logps_T.double().sum().item() for side in score_alone(reference, pair))
        assert row.chosen.logp == pytest.approx(chosen, rel=1e-5)
        assert row.rejected.logp == pytest.approx(rejected, rel=1e-5)
        assert (row.chosen.num_tokens, row.rejected.num_tokens) == (len(pair.chosen_ids), len(pair.rejected_ids))
