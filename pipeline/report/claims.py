"""Whether the paper's qualitative claims hold in what was measured.

In: records of a comparison or an ablation (`records.py`), every method's score on every prompt. Out: each claim with
yes, no or cannot tell, and the figures behind it. The thresholds are this project's: the paper gives none.

A difference is told if its 95 % interval over seeds and prompts leaves out 0 and its p-value, corrected for how many
differences the claim makes (Holm), is at most 0.05.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import BySeed, Interval, gain, holm, mean_of
from .records import Record, by_row, mean_and_deviation
from .style import LABELS

FAR_BELOW = 0.5
NEAR = 0.05
TOGETHER = 0.7
RISK = 0.05


@dataclass(frozen=True)
class Claim:
    """One claim with its answer.

    Attributes:
        text: the claim, with its threshold.
        holds: whether it holds here; None if these runs cannot tell.
        figures: the measured figures that decide it.
    """

    text: str
    holds: bool | None
    figures: str

    @property
    def answer(self) -> str:
        """`holds` as a word for the table."""
        return {True: "yes", False: "no", None: "cannot tell"}[self.holds]


@dataclass(frozen=True)
class Scores:
    """How well each row of the comparison does.

    Attributes:
        name: what the score is, as "right answers".
        rows: for each row and seed the score of each prompt or pair, from 0 to 1.
    """

    name: str
    rows: Mapping[str, BySeed]


def comparison_claims(records: Sequence[Record], correlations: Mapping[int, float], scores: Scores) -> list[Claim]:
    """Claims about the methods.

    Args:
        records: those of all rows, the reference included.
        correlations: rank correlation of KL and feature MSE across methods by step, for the seed of the first record.
        scores: of the same rows.
    """
    rows = by_row(records)
    steps = ", ".join(f"step {step}: {value:.2f}" for step, value in sorted(correlations.items())) or "no ranks"
    if len({record["seed"] for record in records}) > 1:
        steps = f"seed {records[0]['seed']}: {steps}"
    return [
        _beats_reference(scores),
        *_beats_others(scores),
        _kl_below(rows),
        Claim(
            f"KL and feature MSE rank the methods alike at every step (rank correlation above {TOGETHER:g})",
            min(correlations.values()) > TOGETHER if correlations else None,
            steps,
        ),
        *(_cost_claims(rows)),
        *_holds_style(rows),
    ]


def ablation_claims(
    weights: Sequence[Record], sites: Scores | None, scores: Scores, entropies: Mapping[str, BySeed]
) -> list[Claim]:
    """Claims about the constraint's site and weight.

    Args:
        weights: records of the ablation of α and the stop-gradient (Table 3, right).
        sites: scores of the site ablation, earliest site first (Table 3, left); None without one.
        scores: scores of `weights`' rows.
        entropies: their H by seed and prompt, nats a token.
    """
    claims = []
    if sites is not None and len(sites.rows) > 1:
        names = list(sites.rows)
        early, late = names[: len(names) // 2], names[len(names) // 2 :]
        found = gain(_pooled(sites.rows, late), _pooled(sites.rows, early))
        claims.append(
            Claim(
                f"Later sites give more {sites.name} than early ones (later half against earlier half)",
                _over_seeds(_told([found])[0], len(next(iter(sites.rows.values())))),
                f"{_points(found)} points; "
                + ", ".join(f"{row} {100 * mean_of(values).mean:.1f} %" for row, values in sites.rows.items()),
            )
        )
    constrained = {record["row"]: record["stop_gradient"] for record in weights if record["alpha"]}
    held = [row for row, stop in constrained.items() if stop is not False]
    free = [row for row, stop in constrained.items() if stop is False]
    without = [record["row"] for record in weights if not record["alpha"]]
    if held and without:
        found = gain(_pooled(scores.rows, held), scores.rows[without[0]])
        text = f"The constraint gives more {scores.name} than α = 0 at the same learning rate and β, mean over α"
        told = _over_seeds(_told([found])[0], len(scores.rows[held[0]]))
        claims.append(Claim(text, told, f"{_points(found)} points"))
    if held and free:
        gains = [gain(_pooled(rows, held), _pooled(rows, free)) for rows in (scores.rows, entropies)]
        texts = (f"The stop-gradient gives more {scores.name}", "The stop-gradient gives more diversity (H)")
        figures = (f"{_points(gains[0])} points", f"{gains[1].text(1, 3)} nats a token")
        for text, told, figure in zip(texts, _told(gains), figures, strict=True):
            claims.append(Claim(f"{text}, mean over α", _over_seeds(told, len(scores.rows[held[0]])), figure))
    return claims


def _pooled(rows: Mapping[str, BySeed], names: Sequence[str]) -> BySeed:
    """The mean over some rows, by seed and prompt."""
    seeds = set.intersection(*(set(rows[name]) for name in names))
    return {seed: np.mean([rows[name][seed] for name in names], axis=0) for seed in seeds}


def _mean(runs: Sequence[Record], key: str) -> float:
    found = mean_and_deviation(runs, key)
    assert found is not None, key
    return found[0]


def _over_seeds(holds: bool | None, seeds: int) -> bool | None:
    """`holds`, but None if it is true of a single seed, which has no deviation; a claim that fails there is false."""
    return None if holds and seeds < 2 else holds


def _beats_reference(scores: Scores) -> Claim:
    """Whether every method does better than the model that it starts from."""
    reference = scores.rows["sft"]
    gains = {row: gain(values, reference) for row, values in scores.rows.items() if row != "sft"}
    told = _told(list(gains.values()))
    figures = ", ".join(f"{LABELS[row]} {_points(found)}" for row, found in gains.items())
    fail = [LABELS[row] for row, higher in zip(gains, told, strict=True) if higher is not True]
    answer = False if False in told else None if None in told else True
    return Claim(
        f"Every aligned method has more {scores.name} than SFT",
        _over_seeds(answer, len(reference)),
        f"SFT {100 * mean_of(reference).mean:.1f} %; points more: {figures}"
        + (f"; not {', '.join(fail)}" if fail else ""),
    )


def _beats_others(scores: Scores) -> list[Claim]:
    """Whether FPO does better than FPO without its constraint, than SimPO and than TDPO-2."""
    others = [row for row in ("fpo-alpha0", "simpo", "tdpo2") if row in scores.rows]
    gains = [gain(scores.rows["fpo"], scores.rows[row]) for row in others]
    return [
        Claim(
            f"FPO has more {scores.name} than {LABELS[row]}",
            _over_seeds(higher, len(scores.rows["fpo"])),
            f"{_points(found)} points; p = {p:.3g} (Holm)",
        )
        for row, found, higher, p in zip(others, gains, _told(gains), holm([g.p for g in gains]), strict=True)
    ]


def _holds_style(rows: Mapping[str, list[Record]]) -> list[Claim]:
    """Whether the constraint holds what no preference rewards; nothing where no rule tells style from content."""
    shifts: list[BySeed] = [
        {record["seed"]: np.array([record["style/shift"]]) for record in rows.get(row, ()) if "style/shift" in record}
        for row in ("fpo-alpha0", "fpo")
    ]
    if not all(shifts):
        return []
    found = gain(*shifts)
    return [
        Claim(
            "FPO's style stays nearer to SFT's than without its constraint (α = 0)",
            _over_seeds(_told([found])[0], len(shifts[1])),
            f"shift {mean_of(shifts[1]).mean:.3f} against {mean_of(shifts[0]).mean:.3f}; {found.text(1, 3)} nearer",
        )
    ]


def _told(gains: Sequence[Interval]) -> list[bool | None]:
    """For each difference whether it is above 0; None where it cannot be told from 0."""
    corrected = holm([found.p for found in gains])
    return [found.mean > 0 if found.tells and p <= RISK else None for found, p in zip(gains, corrected, strict=True)]


def _points(found: Interval) -> str:
    """A difference with its interval, in percentage points."""
    return found.text(100, 1)


def _kl_below(rows: Mapping[str, list[Record]]) -> Claim:
    fpo, simpo = (_mean(rows[row], "kl/chosen") + _mean(rows[row], "kl/rejected") for row in ("fpo", "simpo"))
    return Claim(
        f"FPO's KL to the reference is far below SimPO's (below {FAR_BELOW:g} of it)",
        fpo < FAR_BELOW * simpo,
        f"{fpo / simpo:.2f} of it ({fpo / 2:.3f} against {simpo / 2:.3f} nats a response)",
    )


def _cost_claims(rows: Mapping[str, list[Record]]) -> list[Claim]:
    claims = []
    for key, name, better in (
        ("train/peak_memory_bytes", "peak memory of tensors", -1),
        ("train/tokens_per_second", "tokens per second", 1),
    ):
        fpo, simpo, tdpo2 = (_mean(rows[row], key) for row in ("fpo", "simpo", "tdpo2"))
        claims.append(
            Claim(
                f"FPO's {name} at most {NEAR:.0%} worse than SimPO's and better than TDPO-2's",
                better * (fpo - simpo) >= -NEAR * simpo and better * (fpo - tdpo2) > 0,
                f"{fpo / simpo:.3f} of SimPO's, {fpo / tdpo2:.3f} of TDPO-2's",
            )
        )
    return claims
