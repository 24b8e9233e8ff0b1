from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import Drawing, texts
from fpo.pipeline.report.figures import (
    Bars,
    activation_by_rank,
    feature_mse,
    kl_against_mse,
    kl_over_training,
    peak_memory,
    token_bound,
)
from fpo.pipeline.report.records import Curve, Tokens, rank_correlations
from fpo.pipeline.report.style import LABELS, LOOKS, save
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from pairs import many_examples

NOTE = "embedded toy world, 1 M parameters, mean of 3 seeds"
TRAINED = [method for method in LABELS if method != "sft"]


def curve(method: str, final: float, steps: tuple[int, ...] = (0, 20, 40, 60, 80, 100)) -> Curve:
    chosen = [final * (step / steps[-1]) ** 2 for step in steps]
    return Curve(
        method,
        list(steps),
        chosen,
        [1.3 * value for value in chosen],
        [0.3 * value for value in chosen],
        [0.2 * value for value in chosen],
        [0.4 * value for value in chosen],
    )


def curves(scale: float = 1.0) -> list[Curve]:
    return [curve(*pair) for pair in zip(TRAINED, scale * np.geomspace(30, 0.01, 7), strict=True)]


def tokens(method: str) -> Tokens:
    rng = np.random.default_rng(len(method))
    squares = np.exp(rng.normal(-3, 3, 300)) * (rng.random(300) > 0.05)
    return Tokens(method, squares * np.exp(rng.normal(0, 2, 300)), squares, 1.5)


def descending(rows: int = 20, ranks: int = 64) -> np.ndarray:
    values = np.random.default_rng(0).gamma(0.3, 10, (rows, ranks)) * (np.arange(ranks) < 50)
    return -np.sort(-values, axis=1)


def bars(*values: float) -> Bars:
    spread = {method: [value, 1.1 * value, 0.9 * value] for method, value in zip(LABELS, values, strict=True)}
    return Bars(spread, "squared activation")


MEMORY = Bars({method: [600.0 + 90 * place, 640.0 + 90 * place] for place, method in enumerate(LABELS)}, "MB")
MSE = (bars(0, 6, 2, 0.6, 4, 1.5, 0.1, 0.002), bars(0, 9, 2.5, 0.9, 7, 1.5, 0.1, 0.003))
FEW = ["dpo", "tdpo2", "fpo", "fpo-alpha0"]
# What builds each figure, and the methods that it shows.
FIGURES: dict[str, tuple[Any, list[str]]] = {
    "rank": (lambda: activation_by_rank(descending(), 10, NOTE), []),
    "kl": (lambda: kl_over_training([curve("sft", 0.0), *curves()], NOTE), list(LABELS)),
    "memory": (lambda: peak_memory(MEMORY, NOTE), list(LABELS)),
    "mse": (lambda: feature_mse(*MSE, NOTE), list(LABELS)),
    "kl-mse": (lambda: kl_against_mse(curves(), NOTE), TRAINED),
    "tokens": (lambda: token_bound([tokens(method) for method in FEW], NOTE), FEW),
}


@pytest.fixture(scope="module")
def folder(drawings: dict[str, Drawing]) -> Path:
    return drawings["kl"].svg.parent


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawing]:
    folder = tmp_path_factory.mktemp("figures") / "new"
    return {name: Drawing(build(), folder, name) for name, (build, _) in FIGURES.items()}


@pytest.mark.parametrize("name", FIGURES)
def test_files_are_drawn_and_name_their_methods(name, folder):
    pixels = imread(folder / f"{name}.png")[..., :3]
    assert pixels.std() > 0.05 and pixels.shape[1] > 600
    shown = texts(folder / f"{name}.svg")
    assert all(LABELS[method] in shown for method in FIGURES[name][1])
    assert NOTE in shown
    drawing = (folder / f"{name}.svg").read_text().lower()
    if name != "tokens":  # its colours are counts
        assert all(LOOKS[method].colour.lower() in drawing for method in FIGURES[name][1])


# One with hatches and symbols, one with hexagons, whose counts come from the data alone.
@pytest.mark.parametrize("name", ["mse", "tokens"])
def test_equal_data_give_equal_bytes(name, folder, tmp_path):
    again = save(FIGURES[name][0](), tmp_path, name)
    assert again.read_bytes() == (folder / f"{name}.svg").read_bytes()
    assert "date" not in again.read_text().lower()


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_touches_another(name, drawings):
    assert drawings[name].overlaps() == []


@pytest.mark.parametrize(
    "figure",
    [
        lambda: kl_over_training([curve("fpo", 2000.0, (0, 99_999)), curve("dpo", 1e-4)], NOTE),
        lambda: kl_against_mse([curve(method, 2.0**n, tuple(range(61))) for n, method in enumerate(FEW)], NOTE),
        lambda: token_bound([tokens(method) for method in TRAINED[:5]], NOTE),
        lambda: token_bound([Tokens("fpo", np.ones(1), np.ones(1), 1.0)], NOTE * 3),
        lambda: peak_memory(Bars({"fpo": [0.0]}, "GB"), NOTE),
    ],
    ids=["large and small", "many steps", "two rows", "one token", "zero"],
)
def test_no_text_touches_another_at_the_extremes(figure, tmp_path):
    assert Drawing(figure(), tmp_path, "figure").overlaps() == []


def test_methods_are_told_apart():
    assert LOOKS.keys() == LABELS.keys()
    for part in zip(*LOOKS.values(), strict=True):
        assert len(set(part)) == len(LABELS)


def test_figures_say_what_was_measured(folder):
    pooled = descending()
    assert f"k = 10: {100 * pooled[:, :10].sum() / pooled.sum():.0f} %" in texts(folder / "rank.svg")
    memory = texts(folder / "memory.svg")
    assert all(f"\n{620 + 90 * place}\n" in f"\n{memory}\n" for place in range(len(LABELS)))
    assert "tensors" in memory and "mean ± sd over 2 seeds" in memory
    assert texts(folder / "kl-mse.svg").count("+1.00") == 5
    shares = texts(folder / "tokens.svg")
    for method in FEW:
        each = tokens(method)
        above = sum(kl > 0.5 * 1.5**2 * square for kl, square in zip(each.kl_T, each.feature_sq_T, strict=True))
        assert f"{100 * above / 300:.1f} % of 300 tokens" in shares


def test_the_smallest_of_very_different_methods_is_still_drawn_apart_from_zero():
    for panel in kl_over_training(curves(), NOTE).axes:
        lowest, highest = panel.transData.transform([(0, line.get_ydata()[-1]) for line in panel.lines])[[-1, 0], 1]
        bottom = panel.transData.transform((0, 0))[1]
        assert (lowest - bottom) > 0.02 * (highest - bottom)
        assert panel.get_ylim()[0] == 0


@pytest.mark.parametrize("span", [1.01, 3, 30, 1e4])
def test_log_axes_of_any_span_have_ticks(span):
    kls = np.geomspace(3, 3 * span, 4).tolist()
    panel = kl_against_mse([curve(method, kl, (0, 9)) for method, kl in zip(FEW, kls, strict=True)], NOTE).axes[0]
    for axis, (low, high) in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
        assert 2 <= sum(low <= tick <= high for tick in axis.get_majorticklocs()) <= 8


def test_a_token_breaks_the_bound_only_above_it():
    each = Tokens("fpo", np.array([1.0, 3.0, 2.0, 0.0, -1e-9]), np.array([1.0, 1.0, 1.0, 0.0, 0.0]), 2.0)
    assert each.bound_T.tolist() == [2, 2, 2, 0, 0]
    assert each.share_violated == 1 / 5


def at_step(kl: list[float], mse: list[float], step: int = 10) -> list[Curve]:
    """Curves with step 0 and one more, whose means over chosen and rejected are these."""
    return [
        Curve(method, [0, step], [0, a / 2], [0, 1.5 * a], [0, a], [0, b], [0, b])
        for method, a, b in zip(TRAINED, kl, mse, strict=False)
    ]


def test_rank_correlation_by_hand():
    # Ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: covariance 2.25, both variances 4.5.
    assert rank_correlations(at_step([1, 2, 2, 40], [0.1, 7, 2, 2])) == {10: pytest.approx(0.5)}
    assert rank_correlations(at_step([1, 2, 3], [3, 2, 1])) == {10: pytest.approx(-1)}


@many_examples
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=7))
def test_rank_correlation_is_pearsons_of_mean_ranks(pairs):
    def ranks(values):
        return [sum(v < own for v in values) + (sum(v == own for v in values) + 1) / 2 for own in values]

    kl, mse = (list(column) for column in zip(*pairs, strict=True))
    found = rank_correlations(at_step(kl, mse))
    if len(set(kl)) == 1 or len(set(mse)) == 1:
        assert found == {}
    else:
        assert found[10] == pytest.approx(np.corrcoef(ranks(kl), ranks(mse))[0, 1])


def test_rank_correlation_reads_shared_steps_alone():
    found = rank_correlations([curve("dpo", 3), curve("fpo", 1), curve("simpo", 2, (0, 40, 70, 100))])
    assert list(found) == [40, 100]
