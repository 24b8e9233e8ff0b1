"""The figures of what the methods' answers are: success against KL, over training, and by temperature.

In: records and intervals. Out: matplotlib figures, for `style.save`. A method looks the same in all figures.
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from .records import Record
from .style import LOOKS, method_legend, new_figure, plain_log_ticks, styled


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
