"""The paper's own results (Yin et al., ICML 2025, arXiv 2411.07618v4), to show beside the measured ones.

In: the base model. Out: columns and tables, labelled as the paper's: none of these figures was measured here. The win
rates need a judge model.
"""

from collections.abc import Sequence

GEMMA_2B, GEMMA_9B = "google/gemma-2-2b", "google/gemma-2-9b"

# Table 2, right: accuracy %, H. Figure 4, left: GPU memory on one H100, GB, mean of the first 1000 steps.
TABLE_2 = {
    "dpo": ("59.9", "1.66"),
    "tdpo1": ("63.2", "1.65"),
    "tdpo2": ("64.2", "1.68"),
    "simpo": ("63.4", "1.64"),
    "simpo-kl": ("63.6", "1.66"),  # Table 6
    "fpo": ("64.1", "1.68"),
}
FIGURE_4 = {"tdpo2": "53.5", "tdpo1": "50.1", "dpo": "47.6", "fpo": "45.5", "simpo": "45.1"}

# Table 2, left: FPO's win rate against each method, as `AlpacaEval 2 (length-controlled) / AlpacaEval 2 / Arena-Hard /
# MT-Bench difference`.
WIN_RATES = {
    "SFT": ("54.7 / 55.1 / 53.2 / +0.5", "51.2 / 52.4 / 53.4 / +0.3"),
    "DPO": ("51.7 / 50.8 / 51.6 / +0.1", "51.0 / 51.0 / 51.2 / +0.1"),
    "TDPO-1": ("51.5 / 54.4 / 51.4 / +0.3", "50.8 / 50.2 / 51.8 / +0.1"),
    "TDPO-2": ("50.9 / 54.0 / 50.6 / +0.2", "50.2 / 49.9 / 49.5 / 0.0"),
    "SimPO": ("51.1 / 52.2 / 51.4 / +0.4", "50.2 / 51.8 / 51.0 / +0.2"),
}
# Table 3: accuracy % / H, by site; by α without and with stop-gradient. Table 7: by the layers that are constrained.
SITES = {
    "blocks.7.hook_resid_post": "57.2 / 1.645",
    "blocks.7.hook_mlp_out": "57.4 / 1.609",
    "blocks.13.hook_resid_post": "59.1 / 1.612",
    "blocks.13.hook_mlp_out": "61.3 / 1.637",
    "blocks.19.hook_resid_post": "59.7 / 1.644",
    "blocks.19.hook_mlp_out": "62.4 / 1.654",
    "blocks.25.hook_resid_post": "63.6 / 1.680",
    "blocks.25.hook_mlp_out": "63.4 / 1.671",
}
ALPHAS = {
    "α = 0.1, without sg": "64.1 / 1.630",
    "α = 0.5, without sg": "63.7 / 1.642",
    "α = 1, without sg": "63.4 / 1.666",
    "α = 2, without sg": "61.9 / 1.643",
    "α = 0.1, with sg": "64.0 / 1.652",
    "α = 0.5, with sg": "63.6 / 1.680",
    "α = 1, with sg": "62.7 / 1.682",
    "α = 2, with sg": "62.1 / 1.679",
}
LAYERS = {
    "25": "64.1 / 1.68",
    "0+25": "62.1 / 1.70",
    "12+25": "61.9 / 1.64",
    "24+25": "58.2 / 1.66",
    "0+12+25": "51.4 / 1.66",
}
SUMS = {"+".join(f"blocks.{layer}.hook_resid_post" for layer in key.split("+")): value for key, value in LAYERS.items()}


def paper_columns(model: str | None, table: str, rows: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the paper's results for a table's rows; no columns for a model other than Gemma-2-2B.

    Args:
        model: the base model.
        table: `comparison`, `sites`, `alpha` or `layers`.
        rows: the keys of the rows; a row that the paper lacks gets an en dash.
    """
    if model != GEMMA_2B:
        return [], [[] for _ in rows]
    if table == "comparison":
        header = ["paper: accuracy, %", "paper: H", "paper: memory, GB"]
        return header, [[*TABLE_2.get(row, ("–", "–")), FIGURE_4.get(row, "–")] for row in rows]
    known = {"sites": SITES, "alpha": ALPHAS, "layers": SUMS}[table]
    return ["paper: accuracy, % / H"], [[known.get(row, "–")] for row in rows]


def win_rates(model: str | None) -> tuple[list[str], list[list[str]]] | None:
    """Header and body of the paper's Table 2, left, for this model; None if the paper has none."""
    if model not in (GEMMA_2B, GEMMA_9B):
        return None
    side = 0 if model == GEMMA_2B else 1
    return ["FPO against", "paper: win rate"], [[name, both[side]] for name, both in WIN_RATES.items()]
