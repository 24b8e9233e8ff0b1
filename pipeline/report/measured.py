"""The figures of a comparison, from the folders of its runs.

In: evaluated runs. Out: curves over training, and figures drawn, saved and ready for the page.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from ...cache.reader import open_cache
from ..facts import short_note
from . import figures
from .figure_data import Bars, Curve, Tokens
from .jobs import Step
from .page import PageFigure
from .plan import Plan, Run
from .results import Record, by_row, read_record
from .style import save

# Whose tokens are held against Appendix B's bound.
BOUND_ROWS = ("dpo", "tdpo2", "simpo", "fpo")


def curves_of(snapshots: Mapping[Run, Mapping[int, Step]]) -> list[Curve]:
    """KL and feature MSE over training, from the evaluation of each snapshot by step."""
    curves = []
    for run, evaluations in snapshots.items():
        points = {0: {"kl/chosen": 0.0, "kl/rejected": 0.0, "features/mse_chosen": 0.0, "features/mse_rejected": 0.0}}
        points |= {step: read_record(run, evaluation) for step, evaluation in sorted(evaluations.items())}
        at = {key: [float(point[key]) for point in points.values()] for key in points[0]}
        curves.append(
            Curve(
                method=run.row,
                step=list(points),
                chosen=at["kl/chosen"],
                rejected=at["kl/rejected"],
                margin=[abs(a - b) for a, b in zip(at["kl/rejected"], at["kl/chosen"], strict=True)],
                mse_chosen=at["features/mse_chosen"],
                mse_rejected=at["features/mse_rejected"],
            )
        )
    return curves


def comparison_figures(
    plan: Plan, runs: Sequence[Run], records: Sequence[Record], curves: Sequence[Curve], folder: Path
) -> list[PageFigure]:
    """Draws and saves every figure.

    Args:
        plan: what was run.
        runs: every row under every seed.
        records: theirs.
        curves: of the first seed's runs.
        folder: where PNG and SVG go.
    """
    note, seed = short_note(plan), f"seed {plan.config.seeds[0]}"
    note_of_seed = f"{note}; {seed} alone" if len(plan.config.seeds) > 1 else note
    trained = {row: found for row, found in by_row(records).items() if row != "sft"}
    memory = {row: [record["train/peak_memory_bytes"] / 1e6 for record in found] for row, found in trained.items()}
    chosen, rejected = (
        Bars({row: [run[f"features/mse_{side}"] for run in found] for row, found in trained.items()}, "activation²")
        for side in ("chosen", "rejected")
    )
    top_k = plan.evaluation(runs[0]).config.top_k
    drawn: list[tuple[str, str, Callable[[], Figure]]] = [
        (
            "figure-2-left",
            "Figure 2, left: how fast pooled feature activations fall with their rank in a response.",
            lambda: figures.activation_by_rank(ranked_activations(plan), top_k, note),
        ),
        (
            "figure-3",
            f"Figure 3: sequential KL to the reference on held-out pairs over training, {seed}.",
            lambda: figures.kl_over_training(curves, note_of_seed),
        ),
        (
            "figure-4-left",
            "Figure 4, left: peak memory of tensors in training.",
            lambda: figures.peak_memory(Bars(memory, "MB"), note),
        ),
        (
            "figure-4-right",
            "Figure 4, right: feature MSE to the reference after training.",
            lambda: figures.feature_mse(chosen, rejected, note),
        ),
        (
            "kl-against-mse",
            f"Not in the paper: KL against feature MSE across methods at equal steps, {seed}.",
            lambda: figures.kl_against_mse(curves, note_of_seed),
        ),
        (
            "token-bound",
            f"Not in the paper: per token, the KL against the bound of its Appendix B, {seed}.",
            lambda: figures.token_bound(bound_tokens(plan, runs, records), note_of_seed),
        ),
    ]
    made = []
    for name, caption, draw in drawn:
        svg = save(draw(), folder, name)
        made.append(PageFigure(caption, svg.read_text(), caption))
    return made


def ranked_activations(plan: Plan) -> np.ndarray:
    """Pooled activations of held-out responses at the constraint's site, [R, K] descending, 0 where there is none."""
    (site, *_) = plan.evaluation(Run("sft", "SFT", plan.config.seeds[0], None)).config.site
    cache = open_cache(plan.heldout_cache.out, sites=[site], trust_hashes=True)
    responses = [side for i in range(len(cache)) for side in (cache[i].chosen, cache[i].rejected)]
    rows = [np.sort(side.features[0].values)[::-1] for side in responses]
    ranked_RK = np.zeros((len(rows), max(len(row) for row in rows)))
    for target, row in zip(ranked_RK, rows, strict=True):
        target[: len(row)] = row
    return ranked_RK


def bound_tokens(plan: Plan, runs: Sequence[Run], records: Sequence[Record]) -> list[Tokens]:
    """KL and feature change of held-out tokens after training, under the first seed."""
    found = []
    for run, record in zip(runs, records, strict=True):
        if run.row in BOUND_ROWS and run.seed == plan.config.seeds[0]:
            table = pq.read_table(plan.evaluation(run).out / "tokens.parquet")
            squares = table["feature_sq"].to_numpy()
            found.append(Tokens(run.row, table["kl"].to_numpy(), squares, record["bound/spectral_norm"]))
    return found
