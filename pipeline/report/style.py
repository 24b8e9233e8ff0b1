"""The style of all figures: the look of each method, shared scales and small print, and the writing of files.

In: matplotlib figures. Out: the same, styled, and their PNG and SVG files.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ...cache.files import write_atomically
from ...stages.train.methods import METHODS, Look

# The rows of the comparison in the order of its table, and the looks of the two that are no methods.
_ROWS = ("sft", "dpo", "tdpo1", "tdpo2", "simpo", "simpo-kl", "fpo", "fpo-alpha0")
_OTHERS = {
    "sft": ("SFT", Look("#808080", "X", (0, (1, 2)))),
    "fpo-alpha0": ("FPO α=0", Look("#009E73", "*", (0, (8, 2)))),
}
_SHOWN = {name: (method.label, method.look) for name, method in METHODS.items()} | _OTHERS
# Methods that are not in the table come last.
LABELS = {name: _SHOWN[name][0] for name in dict.fromkeys((*_ROWS, *_SHOWN))}
LOOKS = {name: _SHOWN[name][1] for name in LABELS}
BLUE, GREY = LOOKS["tdpo2"].colour, LOOKS["sft"].colour

# Ratio of highest to lowest value above which a linear axis would hide the lowest.
_WIDE = 20.0

# A decorator for functions that build or draw a figure. Text stays text in the SVG; the fixed salt makes its ids equal.
styled = rc_context(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.linewidth": 0.7,
        "svg.fonttype": "none",
        "svg.hashsalt": "fpo",
    }
)


def new_figure(width: float, height: float, *small_print: str) -> Figure:
    """An empty figure of this size in inches, with each part of the small print on its own line at the foot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    lines = [textwrap.fill(part, int(width * 12)) for part in small_print if part]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=9, color="#555555")
    return figure


def method_legend(figure: Figure, methods: Sequence[str], *, lines: bool) -> None:
    """A legend of methods above the panels: markers, and with `lines` also the line styles of curves."""
    looks = [LOOKS[method] for method in methods]
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.line if lines else "none", markersize=6)
        for look in looks
    ]
    labels = [LABELS[method] for method in methods]
    figure.legend(handles, labels, loc="outside upper left", ncols=8, handlelength=3 if lines else 1, columnspacing=1.4)


def plain_log_ticks(axes: Axes, *which: Literal["x", "y"]) -> None:
    """Gives log axes a few ticks with plain numbers. Call it after drawing: the choice depends on the limits."""
    for name in which:
        axis = axes.xaxis if name == "x" else axes.yaxis
        low, high = sorted(axes.get_xlim() if name == "x" else axes.get_ylim())
        decades = LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=5)
        axis.set_major_locator(decades if high > 10 * low else MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(plain))


def scale_y_from_zero(axes: Axes, values: Iterable[float]) -> None:
    """Starts the y axis at 0. If `values` differ widely, the axis is symlog, so that small ones stay readable.

    Call it after drawing: the limits depend on the data.
    """
    positive = [value for value in values if value > 0]
    highest = max(panel.dataLim.y1 for panel in axes.get_shared_y_axes().get_siblings(axes)) or 1.0
    if positive and max(positive) > _WIDE * min(positive):
        threshold = 10.0 ** math.floor(math.log10(max(min(positive), highest / 1e4)))
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.set_ylim(0, 1.5 * highest)
    else:
        axes.set_ylim(0, 1.08 * highest)


def draw_seeds(axes: Axes, place: float, values: Sequence[float], deviation: float, *, upright: bool) -> None:
    """Draws a dot for each seed over the bar at `place`, and the standard deviation around their mean if not 0."""
    mean = sum(values) / len(values)
    # Dots stand side by side, so that equal values stay visible; a white rim makes whiskers visible on black bars.
    places = [place + 0.12 * shift for shift in np.linspace(-1, 1, len(values))] if len(values) > 1 else [place]
    x, y = (place, mean) if upright else (mean, place)
    yerr, xerr = (deviation, None) if upright else (None, deviation)
    for width, colour in ((3, "white"), (1, "black")) if deviation else ():
        axes.errorbar(x, y, yerr, xerr, "none", ecolor=colour, elinewidth=width, capthick=width, capsize=3)
    x_dots, y_dots = (places, values) if upright else (values, places)
    axes.scatter(x_dots, y_dots, s=13, color="white", edgecolors="black", zorder=3, clip_on=False)


def plain(value: float, _: int | None = None) -> str:
    """A tick's number without needless digits; matplotlib also passes the tick's index."""
    return f"{value:g}"


def short(value: float) -> str:
    """A number with three significant digits, or all digits before the point if there are more."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@styled
def save(figure: Figure, folder: Path, name: str) -> Path:
    """Writes `name`.png (150 dpi) and `name`.svg atomically; equal figures give equal SVG bytes.

    Returns:
        Path of the SVG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    undated = {"Date": None, "Creator": None, "Format": None, "Type": None}
    for suffix, metadata in (("png", {}), ("svg", undated)):
        data = io.BytesIO()
        figure.savefig(data, format=suffix, dpi=150, metadata=metadata)
        write_atomically(folder / f"{name}.{suffix}", data.getvalue())
    return folder / f"{name}.svg"
