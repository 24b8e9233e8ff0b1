"""The figures of what answers are: every row is drawn and named, no text touches another, numbers are those given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import Drawing, texts
from fpo.pipeline.report.figures import Bars
from fpo.pipeline.report.intervals import Interval
from fpo.pipeline.report.style import LABELS, LOOKS
from fpo.pipeline.report.success_figures import frontier, headline, over_temperature, over_training

NOTE = "embedded toy world, 1 M parameters, mean of 3 seeds"
TRAINED = [method for method in LABELS if method != "sft"]
SHARES = {row: 0.3 + 0.07 * place for place, row in enumerate(LABELS)}


def interval(mean: float, width: float = 0.02) -> Interval:
    return Interval(mean, mean - width, mean + width, 0.01)


def records() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"row": row, "score": share, "kl": kl}
        for row in TRAINED
        for share, kl in zip(rng.uniform(0.2, 0.8, 16), np.exp(rng.uniform(-3, 4, 16)), strict=True)
    ]


def best() -> dict[str, dict[str, Any]]:
    return {record["row"]: record for record in records()}  # the last of each


def curve(row: str) -> list[tuple[int, float, float]]:
    place = list(LABELS).index(row)
    return [(step, SHARES[row] * step / 100, place * step / 50) for step in range(0, 101, 20)]


FIGURES: dict[str, tuple[Any, list[str]]] = {
    "frontier": (lambda: frontier(records(), best(), "right answers", NOTE), TRAINED),
    "headline": (
        lambda: headline(
            "right answers",
            {row: interval(share) for row, share in SHARES.items()},
            {row: interval(0.4 + SHARES[row] / 4) for row in TRAINED},
            Bars({row: [0.1 * 2**n, 0.2 * 2**n] for n, row in enumerate(TRAINED)}, "nats"),
            NOTE,
        ),
        list(LABELS),
    ),
    "headline without wins": (
        lambda: headline(
            "pairs ranked right",
            {row: interval(share) for row, share in SHARES.items()},
            {},
            Bars({row: [0.5] for row in TRAINED}, "nats"),
            NOTE,
        ),
        list(LABELS),
    ),
    "training": (lambda: over_training({row: curve(row) for row in TRAINED}, NOTE), TRAINED),
    "temperature": (
        lambda: over_temperature(
            {row: {at: interval(share * at) for at in (0.2, 0.6, 1.0)} for row, share in SHARES.items()},
            {row: {at: interval(0.5 + at / 10) for at in (0.2, 0.6, 1.0)} for row in TRAINED},
            NOTE,
        ),
        list(LABELS),
    ),
}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawing]:
    folder = tmp_path_factory.mktemp("figures")
    return {name: Drawing(build(), folder, name) for name, (build, _) in FIGURES.items()}


@pytest.mark.parametrize("name", FIGURES)
def test_files_name_and_draw_every_row(name, drawings):
    svg: Path = drawings[name].svg
    shown, drawing = texts(svg), svg.read_text().lower()
    assert NOTE in shown
    for row in FIGURES[name][1]:
        assert LABELS[row] in shown and LOOKS[row].colour.lower() in drawing


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_touches_another(name, drawings):
    assert drawings[name].overlaps() == []


def test_the_headline_says_the_means(drawings):
    lines = texts(drawings["headline"].svg).splitlines()
    for row, share in SHARES.items():
        assert f"{100 * share:.1f}" in lines
        assert row == "sft" or f"{100 * (0.4 + share / 4):.1f}" in lines


def test_the_frontier_never_falls_and_no_trial_lies_above_it():
    (axes,) = frontier(records(), best(), "right answers", NOTE).axes
    for line, row in zip(axes.lines, TRAINED, strict=False):
        kl, reached = (np.asarray(values, float) for values in line.get_data())
        assert (np.diff(reached) >= 0).all() and (np.diff(kl) >= 0).all()
        for record in records():
            if record["row"] == row:
                assert reached[np.searchsorted(kl, record["kl"], side="right") - 1] >= 100 * record["score"] - 1e-9
