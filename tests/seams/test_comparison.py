"""Every column and every figure of `fpo table` shows the number that the runs have, under the unit that it names."""

from typing import Any

import numpy as np
import pytest
import torch
from judge_server import Answer, completion, serving
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from pairs import score_alone
from scipy.stats import spearmanr
from seams.comparison import ROWS, Comparison, assert_cell, compare, shown
from seams.lab import by_hand, lines_of, plain_model
from tiny_world import SITES

TRAINED = [label for label in ROWS if label != "SFT"]

# Title -> the number's name where it was measured, and what its unit makes of it.
UNITS = {
    "accuracy raw, %": ("accuracy/raw", 100),
    "accuracy implicit, %": ("accuracy/implicit", 100),
    "margin raw, nats/token": ("margin/raw", 1),
    "margin implicit, nats": ("margin/implicit", 1),
    "H, nats/token": ("diversity/entropy", 1),
    "repeated 4-grams, %": ("diversity/repetition", 100),
    "that end, %": ("length/finished", 100),
    "KL chosen, nats": ("kl/chosen", 1),
    "KL rejected, nats": ("kl/rejected", 1),
    "KL margin, nats": ("kl/margin", 1),
    "feature MSE chosen": ("features/mse_chosen", 1),
    "feature MSE rejected": ("features/mse_rejected", 1),
    "feature MSE margin": ("features/mse_margin", 1),
    "peak memory of tensors, MB": ("train_peak_memory_bytes", 1e-6),
    "tokens/s": ("train_tokens_per_second", 1),
    "training, s": ("train_runtime", 1),
}


@pytest.fixture(scope="session")
def three(lab) -> Comparison:
    """Three seeds."""
    return compare(lab, "table", table_section={"seeds": [3, 5, 8]})


@pytest.fixture(scope="session")
def one(lab) -> Comparison:
    """One seed, whose curves have four points after the start."""
    return compare(lab, "table", table_section={"seeds": [3]}, max_steps=4)


def test_every_column_shows_mean_and_deviation_of_its_number_in_its_unit(three):
    parts = [shown(three, number=number) for number in range(3)]
    assert all([line[""] for line in part] == list(ROWS) for part in parts)
    lines = [one | two | three for one, two, three in zip(*parts, strict=True)]
    assert set(lines[0]) == {"", *UNITS}
    for line in lines:
        for title, (name, scale) in UNITS.items():
            values = three.ends(line[""], name)
            assert len(values) == (
                0 if line[""] == "SFT" and name.startswith(("accuracy/implicit", "margin/implicit", "train")) else 3
            )
            assert_cell(line[title], values, scale)


def test_ablations_show_the_numbers_of_their_runs(lab):
    made = compare(lab, "table", "--ablations", table_section={"seeds": [1, 2]})
    assert made.result.exit_code == 0, made.result.output
    for number, part in enumerate(("sites", "alpha", "layers")):
        lines = shown(made, "ablations.md", number)
        assert len(lines) == len(made.csv(f"{part}.csv"))
        for line in lines:
            runs = [one for one in made.fabricated.evaluated if one.step is None and row_of(one, part) == line[""]]
            assert sorted(one.seed for one in runs) == [1, 2], line[""]
            for title, (name, scale) in UNITS.items():
                if title in line:
                    assert_cell(line[title], [one.metrics[name] for one in runs], scale)
            for title, chosen in (("constrained sites", True), ("other sites", False)):
                drifts = [
                    [value for site, value in of_sites(one).items() if (site in one.training.site) == chosen]
                    for one in runs
                ]
                if all(drifts):
                    assert_cell(line[f"feature MSE, {title}"], [float(np.mean(values)) for values in drifts], 1)


def of_sites(run: Any) -> dict[str, float]:
    """The feature MSE at each site."""
    prefix = "features/mse "
    return {name.removeprefix(prefix): value for name, value in run.metrics.items() if name.startswith(prefix)}


def test_a_judge_s_columns_and_figure_show_what_it_said_of_first_answers(lab):
    def larger(body: dict[str, Any]) -> Answer:
        """Prefers the larger number with a probability of 0.8."""
        content = body["messages"][-1]["content"]
        one, other = (int(content.split(f"<answer_{name}>")[1].split("<")[0]) for name in ("a", "b"))
        of_first = 0.5 + 0.3 * np.sign(one - other)
        return completion("?", [{"A": float(np.log(of_first)), "B": float(np.log(1 - of_first))}])

    with serving(larger) as server:
        flags = ("--judge-endpoint", server.url, "--judge", "some-judge")
        made = compare(lab, "table", *flags, table_section={"seeds": [3]})
    assert made.result.exit_code == 0, made.result.output
    said: dict[tuple[str, float], list[int]] = {}
    for run in made.fabricated.evaluated:
        if run.step is None and run.config.prompts:
            said[run.label, 1.0 if run.config.temperature is None else run.config.temperature] = run.said

    def rate(label: str, at: float) -> float:
        pairs = zip(said[label, at], said["SFT", at], strict=True)
        return float(np.mean([0.5 + 0.3 * np.sign(mine - other) for mine, other in pairs]))

    lines = {line[""]: line for line in shown(made)}
    for label in TRAINED:
        assert_cell(lines[label]["win rate against SFT by the judge, %"], [rate(label, 1.0)], 100)
    assert {line["replies without a verdict, %"] for label, line in lines.items() if label != "SFT"} == {"0.0"}
    (axes,) = made.figure("Win rate against SFT").axes
    of_colour = colours(made.figure("Win rate against SFT"))
    assert [of_colour[to_hex(line.get_color())] for line in axes.lines] == TRAINED
    for line in axes.lines:
        label = of_colour[to_hex(line.get_color())]
        assert list(line.get_xdata()) == [0.2, 0.4, 0.6, 0.8, 1.0]
        assert list(line.get_ydata()) == pytest.approx([100 * rate(label, at) for at in line.get_xdata()])


def row_of(run: Any, part: str) -> str | None:
    """The row of an ablation that a run belongs to, by how it was trained."""
    if run.training is None:
        return None
    alpha = 0.5 if run.training.alpha is None else run.training.alpha
    stop, site = run.training.stop_gradient is not False, run.training.site
    if part != "alpha":
        return "+".join(site) if alpha == 0.5 and stop else None
    if site != (SITES[0].name,):
        return None
    return "α = 0" if alpha == 0 else f"α = {alpha:g}, {'with' if stop else 'without'} sg"


def test_the_csv_has_the_same_numbers_without_units(three):
    for line in three.csv("comparison.csv"):
        assert line["seeds"] == "3"
        for name, _ in UNITS.values():
            values = three.ends(line["label"], name)
            keys = [key for key in line if key.replace("train/", "train_").startswith(of_csv(name))]
            assert len(keys) == 2
            if values:
                expected = [np.mean(values), np.std(values, ddof=1)]
                assert [float(line[key]) for key in keys] == pytest.approx(expected)
            else:
                assert [line[key] for key in keys] == ["", ""]


def of_csv(name: str) -> str:
    return {"train_runtime": "train_seconds"}.get(name, name) + " "


# Figures, read back from what matplotlib draws.


def colours(figure: Figure) -> dict[str, str]:
    """Colour -> method, as the legend has it."""
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    return {to_hex(handle.get_color()): text for handle, text in zip(legend.legend_handles, texts, strict=True)}


def ticks(axis: Any) -> dict[float, str]:
    return {
        float(tick): label.get_text() for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    }


def dots(axes: Axes) -> list[np.ndarray[Any, Any]]:
    """The points of each scatter of a panel."""
    return [np.asarray(part.get_offsets()) for part in axes.collections if isinstance(part, PathCollection)]


def whiskers(axes: Axes) -> list[np.ndarray[Any, Any]]:
    """Begin and end of each error bar of a panel."""
    parts = [part for part in axes.collections if isinstance(part, LineCollection)]
    return [segment for part in parts for segment in part.get_segments()]


def curve(made: Comparison, label: str, name: str) -> dict[int, float]:
    """A metric after each step that was measured."""
    runs = [each for each in made.fabricated.evaluated if each.label == label]
    last = 4
    return {0: 0.0} | {each.step or last: each.metrics[name] for each in sorted(runs, key=lambda r: r.step or last)}


def test_figure_3_draws_the_kl_of_each_method_after_each_step(one):
    figure = one.figure("KL on chosen")
    of_colour = colours(figure)
    assert list(of_colour.values()) == TRAINED
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == ["KL on chosen", "KL on rejected", "KL margin |rejected − chosen|"]
    for title, axes in panels.items():
        assert len(axes.lines) == len(TRAINED)
        for line in axes.lines:
            label = of_colour[to_hex(line.get_color())]
            chosen, rejected = (curve(one, label, f"kl/{side}") for side in ("chosen", "rejected"))
            values = {"KL on chosen": chosen, "KL on rejected": rejected}.get(
                title, {step: abs(rejected[step] - chosen[step]) for step in chosen}
            )
            assert list(line.get_xdata()) == list(values) == [0, 1, 2, 3, 4]
            assert list(line.get_ydata()) == pytest.approx(list(values.values()))
    assert "nats" in figure.axes[0].get_ylabel()


def test_kl_against_mse_draws_a_point_a_method_and_step_and_their_rank_correlation(one):
    figure = one.figure("KL against feature MSE")
    axes, beside = figure.axes[:2]
    of_colour = colours(figure)
    assert list(of_colour.values()) == TRAINED
    means = {}
    for label in TRAINED:
        for name in ("kl/", "features/mse_"):
            sides = [curve(one, label, f"{name}{side}") for side in ("chosen", "rejected")]
            means[label, name] = [(sides[0][step] + sides[1][step]) / 2 for step in (1, 2, 3, 4)]
    scatters = [part for part in axes.collections if isinstance(part, PathCollection)]
    assert len(scatters) == len(TRAINED)
    for part in scatters:
        label = of_colour[to_hex(part.get_facecolor()[0])]
        np.testing.assert_allclose(
            part.get_offsets(), np.transpose([means[label, "kl/"], means[label, "features/mse_"]])
        )
    assert "KL" in axes.get_xlabel() and "MSE" in axes.get_ylabel()
    (found,) = dots(beside)
    expected = [
        spearmanr(*([means[label, name][at] for label in TRAINED] for name in ("kl/", "features/mse_"))).statistic
        for at in range(4)
    ]
    np.testing.assert_allclose(found[:, 0], expected)
    assert list(found[:, 1]) == [0, 1, 2, 3]
    assert [ticks(beside.yaxis)[row] for row in range(4)] == ["1", "2", "3", "4"]


def test_figure_4_left_draws_mean_deviation_and_seeds_of_memory_in_its_unit(three):
    figure = three.figure("Peak memory of tensors")
    (axes,) = figure.axes
    assert axes.get_xlabel().startswith("MB") and "3 seeds" in axes.get_xlabel()
    rows = ticks(axes.yaxis)
    bars = [bar for part in axes.containers if isinstance(part, BarContainer) for bar in part]
    assert [rows[round(bar.get_y() + bar.get_height() / 2, 6)] for bar in bars] == TRAINED
    for number, (label, bar) in enumerate(zip(TRAINED, bars, strict=True)):
        values = np.array(three.ends(label, "train_peak_memory_bytes")) / 1e6
        mean, deviation = values.mean(), values.std(ddof=1)
        assert bar.get_width() == pytest.approx(mean)
        np.testing.assert_allclose(sorted(dots(axes)[number][:, 0]), sorted(values))
        ends = [part for part in whiskers(axes) if part[0, 1] == pytest.approx(number)]
        assert len(ends) == 2  # white below black
        for part in ends:
            assert sorted(part[:, 0]) == pytest.approx([mean - deviation, mean + deviation])
        assert f"{mean:.3g}" in [text.get_text() for text in axes.texts]


def test_figure_4_right_draws_chosen_and_rejected_as_its_legend_has_them(three):
    figure = three.figure("Feature MSE to the reference")
    (axes,) = figure.axes
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    hatches = {bool(handle.get_hatch()): text for handle, text in zip(legend.legend_handles, texts, strict=True)}
    names = ticks(axes.xaxis)
    bars = [bar for part in axes.containers if isinstance(part, BarContainer) for bar in part]
    assert len(bars) == 2 * len(TRAINED)
    points = np.concatenate(dots(axes))
    for bar in bars:
        middle = bar.get_x() + bar.get_width() / 2
        label, side = names[float(round(middle))], hatches[bool(bar.get_hatch())]
        values = np.array(three.ends(label, f"features/mse_{side}"))
        assert bar.get_height() == pytest.approx(values.mean())
        near = points[np.abs(points[:, 0] - middle) < 0.19]
        np.testing.assert_allclose(sorted(near[:, 1]), sorted(values))
        ends = [part for part in whiskers(axes) if part[0, 0] == pytest.approx(middle)]
        assert len(ends) == 2
        for part in ends:
            wanted = [values.mean() - values.std(ddof=1), values.mean() + values.std(ddof=1)]
            assert sorted(part[:, 1]) == pytest.approx(wanted)
    assert axes.get_ylabel().startswith("activation²")


def test_figure_2_draws_the_reference_s_pooled_features_by_rank(lab, one):
    figure = one.figure("Pooled feature activation by rank")
    (axes,) = figure.axes
    reference, sae = plain_model(lab.world.gemma), lab.world.load_sae(0)
    with torch.no_grad():
        rows = [
            np.sort(side.pooled_M(sae).numpy())[::-1]
            for pair in by_hand(lines_of(lab.world.heldout))
            for side in score_alone(reference, pair, [sae.site])
        ]
    pooled = np.array(rows, dtype=np.float64)
    ranks = int((pooled > 0).sum(1).max())
    (mean, line) = axes.lines
    assert list(mean.get_xdata()) == list(range(1, ranks + 1))
    np.testing.assert_allclose(mean.get_ydata(), pooled.mean(0)[:ranks], rtol=1e-4, atol=1e-6)
    assert list(line.get_xdata()) == [50, 50]
    held = pooled[:, :50].sum() / pooled.sum()
    assert f"k = 50: {100 * held:.0f} %" in line.get_label()
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices
    for percentile in (10, 90):
        wanted = np.percentile(pooled, percentile, axis=0)[:ranks]
        for rank, value in enumerate(wanted, start=1):
            assert np.abs(edges[edges[:, 0] == rank][:, 1] - value).min() <= 1e-4 * max(value, 0.01)


def test_the_token_figure_draws_kl_against_its_bound(one):
    figure = one.figure("tokens above")
    panels = [axes for axes in figure.axes if "tokens above" in axes.get_title(loc="left") + axes.get_title()]
    assert len(panels) == 4
    for axes in panels:
        label, share = (axes.get_title(loc="left") or axes.get_title()).split("\n")
        (run,) = (each for each in one.fabricated.evaluated if each.step is None and each.label == label)
        kl = run.tokens["kl"].astype(np.float64)
        bound = run.metrics["bound/spectral_norm"] ** 2 / 2 * run.tokens["feature_sq"].astype(np.float64)
        assert share == f"{100 * (kl > bound).mean():.1f} % of {len(kl)} tokens above"
        (hexagons,) = (part for part in axes.collections if part.get_array() is not None)
        counts = np.asarray(hexagons.get_array())
        assert counts.sum() == len(kl)
        # The centres of hexagons are within a few hundredths of a decade of their tokens, on average.
        centres = np.array([path.vertices[:-1].mean(0) for path in hexagons.get_paths()])
        if len(centres) != len(counts):
            centres = np.asarray(hexagons.get_offsets())
        logs = np.log10(np.abs(centres)) if centres.min() > 0 else centres
        found = (logs * counts[:, None]).sum(0) / counts.sum()
        np.testing.assert_allclose(found, [np.log10(bound).mean(), np.log10(kl).mean()], atol=0.05)
        assert "bound" in axes.get_xlabel()


def test_the_page_says_how_many_seeds(three, one):
    assert "3 seeds" in (three.out / "table.md").read_text()
    assert "1 seed," in (one.out / "table.md").read_text()
