"""The figures of what the methods' answers are: success against KL, over training, and by temperature.

In: records and intervals. Out: matplotlib figures, for `style.save`. A method looks the same in all figures.
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from .figures import Bars
from .intervals import Interval
from .records import Record
from .style import GREY, LABELS, LOOKS, draw_seeds, method_legend, new_figure, plain_log_ticks, styled


@styled
def frontier(records: Sequence[Record], best: Mapping[str, Record], score: str, title_note: str) -> Figure:
    """Score against KL over the trials of each row: a marker a trial, a large one the winner, a line the best so far.

    Args:
        records: all trials, with `row`, `score` and `kl`.
        best: each row's winner.
        score: what the score is.
        title_note: small print.
    """
    figure = new_figure(
        8.5, 4.8, "The line is the best score at this KL or less; the large marker is the winner.", title_note
    )
    axes = figure.subplots()
    rows = list(dict.fromkeys(record["row"] for record in records))
    for row in rows:
        look = LOOKS[row]
        mine = sorted((record for record in records if record["row"] == row), key=lambda record: record["kl"])
        kl, share = [record["kl"] for record in mine], [100 * record["score"] for record in mine]
        axes.scatter(kl, share, 22, look.colour, marker=look.marker, alpha=0.6, linewidths=0)
        reached = [max(share[: number + 1]) for number in range(len(share))]
        axes.step(kl, reached, where="post", color=look.colour, linestyle=look.line, linewidth=1.2)
        winner = best[row]
        axes.scatter(
            winner["kl"], 100 * winner["score"], 120, look.colour, marker=look.marker, edgecolors="black", zorder=3
        )
    axes.set(xscale="log", title=f"{score.capitalize()} against KL to the reference, validation split")
    axes.set(xlabel="sequential KL, mean of chosen and rejected, nats a response", ylabel=f"{score}, %")
    plain_log_ticks(axes, "x")
    method_legend(figure, rows, lines=True)
    return figure


@styled
def headline(
    score: str, scores: Mapping[str, Interval], wins: Mapping[str, Interval], kl: Bars, title_note: str
) -> Figure:
    """For each row its score, its win rate against SFT, both with 95 % intervals over seeds and prompts, and its KL.

    Args:
        score: what the score is.
        scores: from 0 to 1, the reference included.
        wins: win rate against the reference, for all other rows; empty where no rule tells who wins.
        kl: mean KL of chosen and rejected responses by seed, nats a response, for all rows but the reference.
        title_note: small print.
    """
    figure = new_figure(10, 1.6 + 0.34 * len(scores), "Lines: 95 % intervals over seeds and prompts.", title_note)
    *shares, distance = figure.subplots(1, 3 if wins else 2, sharey=True)
    places = {row: place for place, row in enumerate(scores)}
    for axes, found in zip(shares, (scores, wins), strict=False):
        for row, each in found.items():
            look, x = LOOKS[row], 100 * each.mean
            ends = [[100 * (each.mean - each.low)], [100 * (each.high - each.mean)]]
            axes.errorbar(x, places[row], xerr=ends, color=look.colour, marker=look.marker, capsize=3)
            axes.annotate(f"{x:.1f}", (x, places[row]), xytext=(0, 5), textcoords="offset points", ha="center")
    for row, mean in zip(kl.values, kl.means, strict=True):
        distance.scatter(mean, places[row], 40, LOOKS[row].colour, marker=LOOKS[row].marker)
        draw_seeds(distance, places[row], kl.values[row], 0.0, upright=False)
    shares[0].set_yticks(list(places.values()), [LABELS[row] for row in places])
    shares[0].invert_yaxis()
    shares[0].set(title=score.capitalize(), xlabel="%")
    if wins:
        shares[1].set(title="Win rate against SFT", xlabel="%, ties one half")
        shares[1].axvline(50, color=GREY, linewidth=0.8)
    distance.set(title="KL to the reference", xlabel="nats a response, a dot a seed", xscale="log")
    plain_log_ticks(distance, "x")
    return figure


@styled
def over_training(points: Mapping[str, Sequence[tuple[int, float, float]]], title_note: str) -> Figure:
    """Success against the step and against KL, from snapshots.

    Args:
        points: for each row its (optimiser step, share of right answers, KL in nats a response), ascending.
        title_note: small print.
    """
    figure = new_figure(9.5, 4.2, title_note)
    by_step, by_kl = figure.subplots(1, 2, sharey=True)
    for row, found in points.items():
        look = LOOKS[row]
        style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "linewidth": 1.4, "markersize": 5}
        steps, shares, kl = zip(*found, strict=True)
        by_step.plot(steps, [100 * share for share in shares], **style)
        by_kl.plot(kl, [100 * share for share in shares], **style)
    by_step.set(title="Right answers over training", xlabel="optimiser step", ylabel="right answers, %")
    by_kl.set(title="Right answers against KL", xlabel="sequential KL, nats a response", xscale="log")
    plain_log_ticks(by_kl, "x")
    method_legend(figure, list(points), lines=True)
    return figure


@styled
def over_temperature(
    success: Mapping[str, Mapping[float, Interval]], wins: Mapping[str, Mapping[float, Interval]], title_note: str
) -> Figure:
    """Figure 3, right: success, and win rate against SFT at the same temperature, by the temperature of sampling.

    Args:
        success: share of right answers; empty where no rule tells them.
        wins: win rate against SFT, for all other rows.
        title_note: small print.
    """
    shown = {"Right answers": success, "Win rate against SFT": wins} if success else {"Win rate against SFT": wins}
    figure = new_figure(4.75 * len(shown), 4.2, "Bands: 95 % intervals over seeds and prompts.", title_note)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, found) in zip(panels, shown.items(), strict=True):
        for row, points in found.items():
            look, at = LOOKS[row], list(points)
            axes.plot(
                at,
                [100 * point.mean for point in points.values()],
                color=look.colour,
                marker=look.marker,
                linestyle=look.line,
                linewidth=1.4,
                markersize=5,
            )
            low, high = ([100 * getattr(point, end) for point in points.values()] for end in ("low", "high"))
            axes.fill_between(at, low, high, color=look.colour, alpha=0.12, linewidth=0)
        axes.set(title=title, xlabel="temperature", ylabel="%, ties one half" if found is wins else "%")
    method_legend(figure, list(success or wins), lines=True)
    return figure
