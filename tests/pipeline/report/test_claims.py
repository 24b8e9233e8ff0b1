from typing import Any

import pytest
from fpo.pipeline.report.claims import Claim, ablation_claims, comparison_claims
from fpo.pipeline.report.style import LABELS

SEEDS = (0, 1, 2)
# What makes every claim true; each row's values by seed.
GOOD: dict[str, dict[str, Any]] = {
    row: {
        "accuracy/raw": (0.60, 0.61, 0.62),
        "kl/chosen": 8.0,
        "kl/rejected": 12.0,
        "train/peak_memory_bytes": 100.0,
        "train/tokens_per_second": 100.0,
    }
    for row in LABELS
}
GOOD["sft"] = {"accuracy/raw": 0.50}
GOOD["fpo"] |= {"accuracy/raw": (0.65, 0.66, 0.67), "kl/chosen": 3.0, "kl/rejected": 3.0}
GOOD["tdpo2"] |= {"train/peak_memory_bytes": 120.0, "train/tokens_per_second": 80.0}


def records(changes: dict[str, dict[str, Any]] | None = None, seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    made = []
    for row, values in GOOD.items():
        for number, seed in enumerate(seeds):
            one: dict[str, Any] = {"row": row, "label": LABELS[row], "seed": seed}
            for key, value in (values | (changes or {}).get(row, {})).items():
                one[key] = value[number] if isinstance(value, tuple) else value
            made.append(one)
    return made


def claims(
    changes: dict[str, dict[str, Any]] | None = None,
    correlations: dict[int, float] | None = None,
    seeds: tuple[int, ...] = SEEDS,
) -> dict[str, Claim]:
    ranks = {10: 0.9, 20: 0.8} if correlations is None else correlations
    names = ("beats", "constraint", "kl", "ranks", "memory", "speed")
    return dict(zip(names, comparison_claims(records(changes, seeds), ranks), strict=True))


def test_all_claims_can_be_true():
    found = claims()
    assert {name: claim.answer for name, claim in found.items()} == dict.fromkeys(found, "yes")


def test_figures_are_those_of_the_records():
    found = claims()
    assert found["beats"].figures.startswith("SFT 50.0 %; DPO +11.0 (sd 1.0), TDPO-1 +11.0 (sd 1.0)")
    assert "FPO +16.0 (sd 1.0)" in found["beats"].figures and "; not" not in found["beats"].figures
    assert "difference +5.00 points (sd 0.00" in found["constraint"].figures
    assert found["kl"].figures == "0.30 of it (3.000 against 10.000 nats a response)"
    assert found["ranks"].figures == "seed 0: step 10: 0.90, step 20: 0.80"
    assert found["memory"].figures == "1.000 of SimPO's, 0.833 of TDPO-2's"
    assert found["speed"].figures == "1.000 of SimPO's, 1.250 of TDPO-2's"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("beats", {"dpo": {"accuracy/raw": (0.52, 0.50, 0.51)}}),  # a gain of one deviation
        ("beats", {"simpo": {"accuracy/raw": 0.5}}),
        ("beats", {"tdpo1": {"accuracy/raw": 0.4}}),
        ("constraint", {"fpo": {"accuracy/raw": (0.60, 0.61, 0.62)}}),
        ("constraint", {"fpo": {"accuracy/raw": (0.61, 0.63, 0.65)}}),  # 1, 2 and 3 points: two deviations, not more
        ("constraint", {"fpo": {"accuracy/raw": (0.55, 0.56, 0.57)}}),
        ("kl", {"fpo": {"kl/chosen": 5.0, "kl/rejected": 5.0}}),  # half, not below
        ("kl", {"fpo": {"kl/chosen": 30.0}}),
        ("memory", {"fpo": {"train/peak_memory_bytes": 106.0}}),
        ("memory", {"tdpo2": {"train/peak_memory_bytes": 100.0}}),
        ("speed", {"fpo": {"train/tokens_per_second": 94.0}}),
        ("speed", {"tdpo2": {"train/tokens_per_second": 100.0}}),
    ],
)
def test_each_claim_can_be_false(name, changes):
    assert claims(changes)[name].answer == "no"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("beats", {"dpo": {"accuracy/raw": (0.521, 0.501, 0.562)}, "sft": {"accuracy/raw": 0.4}}),
        ("constraint", {"fpo": {"accuracy/raw": (0.62, 0.63, 0.6401)}}),
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
def test_each_claim_is_true_just_inside_its_threshold(name, changes):
    assert claims(changes)[name].answer == "yes"


def test_a_method_that_fails_is_named():
    found = claims({"dpo": {"accuracy/raw": 0.49}, "simpo": {"accuracy/raw": 0.5}})["beats"]
    assert found.figures.endswith("; not DPO, SimPO")


def test_the_constraint_is_judged_by_paired_seeds():
    """Seeds that differ widely, a difference that does not."""
    changes = {
        "fpo": {"accuracy/raw": (0.56, 0.71, 0.90)},
        "fpo-alpha0": {"accuracy/raw": (0.55, 0.70, 0.88)},
    }
    found = claims(changes)["constraint"]
    assert found.answer == "yes" and "+1.33 points (sd 0.58" in found.figures


def test_the_ranks_of_the_worst_step_count():
    assert claims(correlations={1: 0.7, 2: 0.9})["ranks"].answer == "no"
    assert claims(correlations={1: 0.71, 2: 0.9})["ranks"].answer == "yes"
    assert claims(correlations={1: 0.9, 2: -1.0})["ranks"].answer == "no"
    assert claims(correlations={})["ranks"].answer == "cannot tell"


def test_one_seed_cannot_tell_what_deviations_are_asked_for():
    first = {row: {"accuracy/raw": value} for row, value in (("fpo", 0.65), ("fpo-alpha0", 0.6))}
    found = claims(first, seeds=(0,))
    assert (found["beats"].answer, found["constraint"].answer) == ("cannot tell", "cannot tell")
    assert "sd" not in found["beats"].figures + found["constraint"].figures
    found = claims({"fpo": {"accuracy/raw": 0.5}, "fpo-alpha0": {"accuracy/raw": 0.6}}, seeds=(0,))
    assert (found["beats"].answer, found["constraint"].answer) == ("no", "no")


def site(name: str, *accuracies: float) -> list[dict[str, Any]]:
    """A run a seed."""
    return [{"row": name, "label": name, "seed": seed, "accuracy/raw": v} for seed, v in enumerate(accuracies)]


def weight(alpha: float, stop: bool, *entropies: float) -> list[dict[str, Any]]:
    """A run a seed."""
    settings = {"row": f"{alpha} {stop}", "alpha": alpha, "stop_gradient": stop}
    return [{**settings, "seed": seed, "diversity/entropy": value} for seed, value in enumerate(entropies)]


def test_later_sites_are_compared_with_earlier_ones():
    sites = [*site("a", 0.50, 0.52), *site("b", 0.60, 0.61), *site("c", 0.55, 0.57), *site("d", 0.59, 0.60)]
    (found,) = ablation_claims(sites, [])
    assert found.answer == "yes"  # two points under the first seed, two under the second
    assert found.figures == "difference +2.00 points (sd 0.00, paired by seed); a 51.0 %, b 60.5 %, c 56.0 %, d 59.5 %"
    assert ablation_claims([*site("a", 0.6, 0.6), *site("b", 0.6, 0.6)], [])[0].answer == "no"
    assert ablation_claims([*site("a", 0.6, 0.6), *site("b", 0.61, 0.64)], [])[0].answer == "no"  # 1 and 4 points
    assert ablation_claims([*site("a", 0.6), *site("b", 0.7)], [])[0].answer == "cannot tell"
    assert ablation_claims(site("a", 0.6), []) == []


def test_the_stop_gradient_is_judged_by_entropy_without_the_row_that_has_no_constraint():
    weights = [
        *weight(0.0, True, 9.0, 9.0),
        *weight(0.5, True, 1.7, 1.8),
        *weight(0.5, False, 1.5, 1.6),
        *weight(1.0, False, 1.7, 1.8),
    ]
    (found,) = ablation_claims([], weights)
    assert found.answer == "yes"
    assert found.figures == "difference +0.100 nats a token (sd 0.000, paired by seed); 1.750 with, 1.650 without"
    same = [*weight(0.5, True, 1.6, 1.6), *weight(0.5, False, 1.6, 1.6)]
    assert ablation_claims([], same)[0].answer == "no"
    assert ablation_claims([], weight(0.5, True, 1.6)) == []
