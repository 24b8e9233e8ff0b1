"""The figures of the comparison: the paper's Figures 2 (left), 3 and 4, and two more that test its claims.

In: curves, bars and tokens. Out: matplotlib figures, for `style.save`.

Every figure takes `title_note`, the small print that says which runs it shows. A method looks the same in all figures.
Legend: R responses, K ranks, T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from .records import Curve, Tokens, rank_correlations
from .style import (
    BLUE,
    GREY,
    LABELS,
    LOOKS,
    draw_seeds,
    method_legend,
    new_figure,
    plain,
    plain_log_ticks,
    scale_y_from_zero,
    short,
    styled,
)


@dataclass(frozen=True)
class Bars:
    """One quantity per method and seed.

    Attributes:
        values: one value per seed for each row of the comparison, in the order in which they are drawn.
        unit: unit of the values.
    """

    values: Mapping[str, Sequence[float]]
    unit: str

    @property
    def axis_label(self) -> str:
        """The unit, and what bars and whiskers show."""
        counts = {len(values) for values in self.values.values()}
        if counts == {1}:
            return f"{self.unit}, one seed"
        seeds = " to ".join(f"{count}" for count in sorted({min(counts), max(counts)}))
        return f"{self.unit}, mean ± sd over {seeds} seeds"

    @property
    def means(self) -> list[float]:
        """Mean over seeds for each method."""
        return [float(np.mean(values)) for values in self.values.values()]

    @property
    def deviations(self) -> list[float]:
        """Sample standard deviation over seeds for each method; 0 for one seed, which has none."""
        return [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in self.values.values()]


@styled
def activation_by_rank(pooled_RK: NDArray[np.float64], k: int, title_note: str) -> Figure:
    """Figure 2, left: pooled feature activations by their rank, and the share of their sum in the top k.

    Args:
        pooled_RK: pooled activations of each response, descending and at least 0; short rows are padded with 0.
        k: the number of features that the constraint reads.
        title_note: small print.
    """
    ranks = pooled_RK.shape[1]
    rank, mean = np.arange(1, ranks + 1), pooled_RK.mean(0)
    low, high = np.percentile(pooled_RK, [10, 90], axis=0)
    held = pooled_RK[:, :k].sum() / pooled_RK.sum()

    figure = new_figure(6.4, 4.0, title_note)
    axes = figure.subplots()
    axes.fill_between(rank, low, high, color=BLUE, alpha=0.2, linewidth=0, label="10 to 90 % of responses")
    axes.plot(rank, mean, color=BLUE, label="mean")
    within = f"k = {k}: {100 * held:.0f} % of the sum lies within"
    axes.axvline(k, color="black", linestyle="--", linewidth=1, label=within)
    axes.set(xscale="log", xlim=(1, max(2, ranks)), title="Pooled feature activation by rank")
    axes.set(xlabel="rank of the feature in its response", ylabel="pooled activation")
    plain_log_ticks(axes, "x")
    scale_y_from_zero(axes, mean)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@styled
def kl_over_training(curves: Sequence[Curve], title_note: str) -> Figure:
    """Figure 3: sequential KL over training, on chosen responses, on rejected ones, and the margin between them."""
    figure = new_figure(11, 4.0, title_note)
    panels = figure.subplots(1, 3)
    panels[1].sharey(panels[0])
    titles = ("KL on chosen", "KL on rejected", "KL margin |rejected − chosen|")
    for axes, title, name in zip(panels, titles, ("chosen", "rejected", "margin"), strict=True):
        for curve in curves:
            look = LOOKS[curve.method]
            every = max(1, len(curve.step) // 8)
            style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "markevery": every}
            axes.plot(curve.step, getattr(curve, name), linewidth=1.5, markersize=5, **style)
        axes.set(title=title, xlabel="optimiser step")
    panels[0].set_ylabel("sequential KL, nats a response")
    scale_y_from_zero(panels[0], [value for c in curves for value in (*c.chosen[-1:], *c.rejected[-1:])])
    scale_y_from_zero(panels[2], [curve.margin[-1] for curve in curves])
    method_legend(figure, [curve.method for curve in curves], lines=True)
    return figure


@styled
def peak_memory(memory: Bars, title_note: str) -> Figure:
    """Figure 4, left: peak memory of tensors in training: mean and standard deviation, and a dot for each seed."""
    figure = new_figure(7, 1.4 + 0.36 * len(memory.values), title_note)
    axes = figure.subplots()
    rows = zip(memory.values.items(), memory.means, memory.deviations, strict=True)
    for row, ((method, values), mean, deviation) in enumerate(rows):
        axes.barh(row, mean, height=0.7, color=LOOKS[method].colour)
        draw_seeds(axes, row, values, deviation, upright=False)
        right = max(*values, mean + deviation)
        axes.annotate(short(mean), (right, row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(memory.values)), [LABELS[method] for method in memory.values])
    axes.set(title="Peak memory of tensors in training", xlabel=memory.axis_label)
    axes.invert_yaxis()
    axes.set_xlim(0, (max(max(v) for v in memory.values.values()) or 1.0) * 1.15)
    return figure


@styled
def feature_mse(chosen: Bars, rejected: Bars, title_note: str) -> Figure:
    """Figure 4, right: feature MSE after training on chosen and rejected responses: mean, deviation and seeds."""
    figure = new_figure(8.5, 4.2, title_note)
    axes = figure.subplots()
    for bars, offset, alpha, hatch in ((chosen, -0.2, 1.0, ""), (rejected, 0.2, 0.45, "////")):
        columns = zip(bars.values.items(), bars.means, bars.deviations, strict=True)
        for place, ((method, values), mean, deviation) in enumerate(columns):
            colour = LOOKS[method].colour
            axes.bar(place + offset, mean, 0.4, color=colour, alpha=alpha, hatch=hatch, edgecolor="white")
            draw_seeds(axes, place + offset, values, deviation, upright=True)
    axes.set_xticks(range(len(chosen.values)), [LABELS[method] for method in chosen.values])
    axes.set(title="Feature MSE to the reference after training", ylabel=chosen.axis_label)
    scale_y_from_zero(axes, [*chosen.means, *rejected.means])
    handles = [Patch(color=GREY), Patch(facecolor=f"{GREY}73", edgecolor="white", hatch="////")]
    figure.legend(handles, ["chosen", "rejected"], loc="outside upper left", ncols=2)
    return figure


@styled
def kl_against_mse(curves: Sequence[Curve], title_note: str) -> Figure:
    """KL against feature MSE for each method and step, and at each step the rank correlation across methods."""
    correlations = rank_correlations(curves)
    last = max(step for curve in curves for step in curve.step)
    points = [(c, [step for step in c.step if c.kl[step] > 0 and c.mse[step] > 0]) for c in curves]
    at_zero = sum(sum(step > 0 for step in curve.step) - len(drawn) for curve, drawn in points)
    hidden = f" {at_zero} points at 0 are not drawn." if at_zero else ""
    figure = new_figure(9.5, 4.6, f"The larger the marker, the later the step.{hidden}", title_note)
    axes, beside = figure.subplots(1, 2, width_ratios=(2.2, 1))
    for curve, drawn in points:
        look = LOOKS[curve.method]
        places = [curve.kl[step] for step in drawn], [curve.mse[step] for step in drawn]
        sizes = [15 + 60 * step / last for step in drawn]
        axes.scatter(*places, sizes, look.colour, marker=look.marker, alpha=0.9, linewidths=0.5, edgecolors="white")
    axes.set(xscale="log", yscale="log", title="KL against feature MSE, a point a method and step")
    axes.set(xlabel="sequential KL, mean of chosen and rejected, nats a response")
    axes.set(ylabel="feature MSE, mean of chosen and rejected")
    plain_log_ticks(axes, "x", "y")
    _correlation_panel(beside, correlations, len(curves))
    method_legend(figure, [curve.method for curve in curves], lines=False)
    return figure


def _correlation_panel(axes: Axes, correlations: dict[int, float], methods: int) -> None:
    steps = list(correlations)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.scatter(list(correlations.values()), range(len(steps)), s=20, color="black", zorder=3)
    # Every dot is drawn, but only so many labels that they do not overlap.
    labelled = range(0, len(steps), math.ceil(len(steps) / 18))
    axes.set_yticks(labelled, [f"{steps[row]}" for row in labelled])
    values = axes.secondary_yaxis("right")
    values.set_yticks(labelled, [f"{correlations[steps[row]]:+.2f}" for row in labelled])
    values.spines["right"].set_visible(False)
    values.tick_params(length=0)
    axes.set(xlim=(-1.1, 1.1), ylim=(len(steps) - 0.5, -0.5), xticks=(-1, 0, 1))
    axes.set(title=f"Rank correlation of {methods} methods", xlabel="Spearman's ρ", ylabel="optimiser step")


@styled
def token_bound(tokens: Sequence[Tokens], title_note: str) -> Figure:
    """Appendix B per token: KL against its bound, one panel per method; points above the line violate the bound."""
    drawn = [(each.kl_T > 0) & (each.bound_T > 0) for each in tokens]
    points = [(each.bound_T[keep], each.kl_T[keep]) for each, keep in zip(tokens, drawn, strict=True)]
    everything = np.concatenate([part for pair in points for part in pair])
    low, high = math.floor(np.log10(everything.min())), math.ceil(np.log10(everything.max()) + 1e-9)

    columns = min(4, len(tokens))
    rows = math.ceil(len(tokens) / columns)
    at_zero = sum(int((~keep).sum()) for keep in drawn)
    hidden = f" {at_zero} tokens with a side at 0 are counted, not drawn." if at_zero else ""
    figure = new_figure(1.4 + 2.7 * columns, 0.9 + 2.7 * rows, f"Dashed: KL = bound.{hidden}", title_note)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    limits, hexagons = (10.0 ** (low - 0.3), 10.0 ** (high + 0.3)), []
    for axes, each, (bound, kl) in zip(panels.flat, tokens, points, strict=False):
        axes.plot(limits, limits, color="black", linewidth=1, linestyle="--")
        grid = {"xscale": "log", "yscale": "log", "gridsize": 32, "extent": (low, high, low, high), "mincnt": 1}
        hexagons.append(axes.hexbin(bound, kl, cmap="viridis_r", linewidths=0.1, **grid))
        axes.set(xlim=limits, ylim=limits, xlabel="bound (M²/2)‖Δc‖², nats")
        axes.set_title(f"{LABELS[each.method]}\n{100 * each.share_violated:.1f} % of {len(each.kl_T)} tokens above")
        plain_log_ticks(axes, "x", "y")
    for axes in panels.flat[len(tokens) :]:
        axes.set_visible(False)
    norm = LogNorm(1, max(10.0, *(float(part.get_array().max()) for part in hexagons if part.get_array().size)))
    for part in hexagons:
        part.set_norm(norm)
    figure.colorbar(hexagons[0], ax=panels, label="tokens", format=FuncFormatter(plain))
    figure.supylabel("KL of a token, nats", fontsize=9)
    return figure
