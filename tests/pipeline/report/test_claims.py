"""Every claim can be true, false and open; the figures beside it are those that decide."""

from typing import Any

import numpy as np
import pytest
from fpo.pipeline.report.claims import Claim, Scores, ablation_claims, comparison_claims
from fpo.pipeline.report.intervals import BySeed
from fpo.pipeline.report.style import LABELS

SEEDS = (0, 1, 2)
PROMPTS = 200
# What makes every claim true.
GOOD: dict[str, dict[str, float]] = {
    row: {
        "kl/chosen": 8.0,
        "kl/rejected": 12.0,
        "train/peak_memory_bytes": 100.0,
        "train/tokens_per_second": 100.0,
    }
    for row in LABELS
}
GOOD["sft"] = {}
GOOD["fpo"] |= {"kl/chosen": 3.0, "kl/rejected": 3.0}
GOOD["tdpo2"] |= {"train/peak_memory_bytes": 120.0, "train/tokens_per_second": 80.0}
SHARES = dict.fromkeys(LABELS, 0.7) | {"sft": 0.5, "fpo": 0.8}


def records(changes: dict[str, dict[str, float]] | None = None) -> list[dict[str, Any]]:
    return [
        {"row": row, "label": LABELS[row], "seed": seed, **values, **(changes or {}).get(row, {})}
        for row, values in GOOD.items()
        for seed in SEEDS
    ]


def by_seed(share: float, rng: np.random.Generator, seeds: tuple[int, ...] = SEEDS) -> BySeed:
    """Shares of right answers of which about `share` are right, four answers a prompt."""
    return {seed: rng.binomial(4, share, PROMPTS) / 4 for seed in seeds}


def scores(shares: dict[str, float] | None = None, seeds: tuple[int, ...] = SEEDS) -> Scores:
    rng = np.random.default_rng(0)
    return Scores("right answers", {row: by_seed(s, rng, seeds) for row, s in (SHARES | (shares or {})).items()})


def claims(
    changes: dict[str, dict[str, float]] | None = None,
    correlations: dict[int, float] | None = None,
    found: Scores | None = None,
) -> dict[str, Claim]:
    ranks = {10: 0.9, 20: 0.8} if correlations is None else correlations
    names = ("beats", "alpha0", "simpo", "tdpo2", "kl", "ranks", "memory", "speed")
    made = comparison_claims(records(changes), ranks, found or scores())
    return dict(zip(names, made, strict=True))


def test_all_claims_can_be_true():
    found = claims()
    assert {name: claim.answer for name, claim in found.items()} == dict.fromkeys(found, "yes")


def test_figures_are_those_of_the_records():
    found = claims()
    assert found["kl"].figures == "0.30 of it (3.000 against 10.000 nats a response)"
    assert found["ranks"].figures == "seed 0: step 10: 0.90, step 20: 0.80"
    assert found["memory"].figures == "1.000 of SimPO's, 0.833 of TDPO-2's"
    assert found["speed"].figures == "1.000 of SimPO's, 1.250 of TDPO-2's"


def test_differences_are_in_points_and_paired():
    """Constant differences have intervals without width, however much the prompts differ."""
    base = {seed: np.random.default_rng(seed).random(PROMPTS) / 2 for seed in SEEDS}
    rows = {row: {seed: values + (row == "fpo") / 4 for seed, values in base.items()} for row in LABELS}
    found = claims(found=Scores("right answers", rows))
    assert found["simpo"].figures.startswith("+25.0 (+25.0 to +25.0) points; p = 0.00")
    assert "FPO +25.0 (+25.0 to +25.0)" in found["beats"].figures
    assert found["beats"].figures.startswith(f"SFT {100 * np.mean(list(base.values())):.1f} %")
    assert found["beats"].figures.endswith("; not DPO, TDPO-1, TDPO-2, SimPO, SimPO+KL, FPO α=0")
    assert found["beats"].answer == "cannot tell"  # equal to the reference, to the bit


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("kl", {"fpo": {"kl/chosen": 5.0, "kl/rejected": 5.0}}),  # half, not below
        ("kl", {"fpo": {"kl/chosen": 30.0}}),
        ("memory", {"fpo": {"train/peak_memory_bytes": 106.0}}),
        ("memory", {"tdpo2": {"train/peak_memory_bytes": 100.0}}),
        ("speed", {"fpo": {"train/tokens_per_second": 94.0}}),
        ("speed", {"tdpo2": {"train/tokens_per_second": 100.0}}),
    ],
)
def test_each_claim_of_distance_and_cost_can_be_false(name, changes):
    assert claims(changes)[name].answer == "no"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("kl", {"fpo": {"kl/chosen": 5.0, "kl/rejected": 4.999}}),
        *(
            (name, {"fpo": {key: value}})
            for name, key in (("memory", "train/peak_memory_bytes"), ("speed", "train/tokens_per_second"))
            for value in (95.0, 105.0)
        ),
        ("memory", {"fpo": {"train/peak_memory_bytes": 50.0}}),
        ("speed", {"fpo": {"train/tokens_per_second": 200.0}}),
    ],
)
def test_each_claim_of_distance_and_cost_is_true_just_inside_its_threshold(name, changes):
    assert claims(changes)[name].answer == "yes"


@pytest.mark.parametrize(
    ("name", "shares", "answer"),
    [
        ("beats", {"dpo": 0.3}, "no"),  # one that is worse decides, whatever the others do
        ("beats", {"dpo": 0.3, "simpo": 0.5}, "no"),
        ("beats", {"simpo": 0.505}, "cannot tell"),
        ("alpha0", {"fpo-alpha0": 0.9}, "no"),
        ("alpha0", {"fpo-alpha0": 0.8}, "cannot tell"),
        ("simpo", {"simpo": 0.9}, "no"),
        ("tdpo2", {"tdpo2": 0.795}, "cannot tell"),
    ],
)
def test_a_difference_is_told_by_its_interval(name, shares, answer):
    assert claims(found=scores(shares))[name].answer == answer


def test_a_method_that_does_no_better_is_named():
    found = claims(found=scores({"dpo": 0.3, "simpo": 0.505}))["beats"]
    assert found.figures.endswith("; not DPO, SimPO")


def test_the_ranks_of_the_worst_step_count():
    assert claims(correlations={1: 0.7, 2: 0.9})["ranks"].answer == "no"
    assert claims(correlations={1: 0.71, 2: 0.9})["ranks"].answer == "yes"
    assert claims(correlations={1: 0.9, 2: -1.0})["ranks"].answer == "no"
    assert claims(correlations={})["ranks"].answer == "cannot tell"


def test_one_seed_cannot_say_yes_but_can_say_no():
    """Its interval knows nothing of other seeds."""
    found = claims(found=scores(seeds=(0,)))
    assert {found[name].answer for name in ("beats", "alpha0", "simpo", "tdpo2")} == {"cannot tell"}
    found = claims(found=scores({"dpo": 0.3, "simpo": 0.9}, seeds=(0,)))
    assert (found["beats"].answer, found["simpo"].answer) == ("no", "no")


def test_style_is_compared_by_seed_where_it_is_measured():
    def answer(mine: tuple[float, ...], free: tuple[float, ...]) -> tuple[str, str]:
        shifts = {"fpo": mine, "fpo-alpha0": free}
        made = [
            record | ({"style/shift": shifts[record["row"]][record["seed"]]} if record["row"] in shifts else {})
            for record in records()
        ]
        claim = comparison_claims(made, {}, scores())[-1]
        assert "style" in claim.text
        return claim.answer, claim.figures

    assert answer((0.1, 0.1, 0.1), (0.3, 0.3, 0.3)) == (
        "yes",
        "shift 0.100 against 0.300; +0.200 (+0.200 to +0.200) nearer",
    )
    assert answer((0.3, 0.3, 0.3), (0.1, 0.1, 0.1))[0] == "no"
    assert answer((0.1, 0.5, 0.3), (0.3, 0.3, 0.3))[0] == "cannot tell"
    assert not any("style" in claim.text for claim in claims().values())


# Ablations.


def weight(alpha: float, stop: bool | None) -> dict[str, Any]:
    return {"row": f"{alpha} {stop}", "alpha": alpha, "stop_gradient": stop}


def constant(**shares: float) -> Scores:
    """Two seeds whose prompts all have the same score."""
    return Scores("right answers", {row: {s: np.full(9, share) for s in (0, 1)} for row, share in shares.items()})


def test_later_sites_are_compared_with_earlier_ones():
    sites = constant(a=0.5, b=0.6, c=0.55, d=0.61)
    (found,) = ablation_claims([], sites, constant(), {})
    assert found.answer == "yes"
    assert found.figures == "+3.0 (+3.0 to +3.0) points; a 50.0 %, b 60.0 %, c 55.0 %, d 61.0 %"
    assert ablation_claims([], constant(a=0.6, b=0.6), constant(), {})[0].answer == "cannot tell"
    assert ablation_claims([], constant(a=0.7, b=0.6), constant(), {})[0].answer == "no"
    alone = Scores("right answers", {row: {0: np.full(9, share)} for row, share in (("a", 0.5), ("b", 0.7))})
    assert ablation_claims([], alone, constant(), {})[0].answer == "cannot tell"
    assert ablation_claims([], constant(a=0.6), constant(), {}) == [] == ablation_claims([], None, constant(), {})


def test_the_constraint_and_its_stop_gradient_are_judged_apart():
    weights = [weight(0.0, None), weight(0.5, True), weight(0.5, False), weight(1.0, False)]
    names = [record["row"] for record in weights]
    shares = constant(**dict(zip(names, (0.0, 0.7, 0.6, 0.5), strict=True)))
    entropies = constant(**dict(zip(names, (9.0, 1.7, 1.8, 1.9), strict=True))).rows
    added, right, diverse = ablation_claims(weights, None, shares, entropies)
    assert (added.answer, right.answer, diverse.answer) == ("yes", "yes", "no")
    assert added.text.startswith("The constraint gives more") and added.figures == "+70.0 (+70.0 to +70.0) points"
    assert right.figures == "+15.0 (+15.0 to +15.0) points"
    assert diverse.figures == "-0.150 (-0.150 to -0.150) nats a token"
    assert ablation_claims(weights[:2], None, shares, entropies) == [added]
    assert ablation_claims(weights[1:2], None, shares, entropies) == []
