"""The figures below are typed from the project's notes on the paper (its Tables 2, 3, 6, 7 and Figure 4)."""

import pytest
from fpo.pipeline.report.paper import paper_columns, win_rates
from fpo.pipeline.report.plan import ALPHAS, ROWS

MODEL, LARGE = "google/gemma-2-2b", "google/gemma-2-9b"


def test_table_2_and_figure_4_stand_beside_the_comparison():
    header, body = paper_columns(MODEL, "comparison", list(ROWS))
    assert len(header) == 3 and all(title.startswith("paper: ") for title in header)
    assert dict(zip(ROWS, body, strict=True)) == {
        "sft": ["–", "–", "–"],
        "dpo": ["59.9", "1.66", "47.6"],
        "tdpo1": ["63.2", "1.65", "50.1"],
        "tdpo2": ["64.2", "1.68", "53.5"],
        "simpo": ["63.4", "1.64", "45.1"],
        "simpo-kl": ["63.6", "1.66", "–"],
        "fpo": ["64.1", "1.68", "45.5"],
        "fpo-alpha0": ["–", "–", "–"],
    }


def test_table_3_stands_beside_sites():
    expected = {
        (7, "resid_post"): "57.2 / 1.645",
        (7, "mlp_out"): "57.4 / 1.609",
        (13, "resid_post"): "59.1 / 1.612",
        (13, "mlp_out"): "61.3 / 1.637",
        (19, "resid_post"): "59.7 / 1.644",
        (19, "mlp_out"): "62.4 / 1.654",
        (25, "resid_post"): "63.6 / 1.680",
        (25, "mlp_out"): "63.4 / 1.671",
    }
    rows = [f"blocks.{layer}.hook_{kind}" for layer, kind in expected]
    assert paper_columns(MODEL, "sites", rows)[1] == [[value] for value in expected.values()]


def test_table_3_stands_beside_alphas():
    without = dict(zip((0.1, 0.5, 1, 2), ("64.1 / 1.630", "63.7 / 1.642", "63.4 / 1.666", "61.9 / 1.643"), strict=True))
    with_sg = dict(zip((0.1, 0.5, 1, 2), ("64.0 / 1.652", "63.6 / 1.680", "62.7 / 1.682", "62.1 / 1.679"), strict=True))
    rows = ["α = 0", *(f"α = {alpha:g}, {which} sg" for which in ("without", "with") for alpha in ALPHAS)]
    _, body = paper_columns(MODEL, "alpha", rows)
    assert body == [["–"], *([without[alpha]] for alpha in ALPHAS), *([with_sg[alpha]] for alpha in ALPHAS)]


def test_table_7_stands_beside_several_layers():
    expected = {
        (25,): "64.1 / 1.68",
        (0, 25): "62.1 / 1.70",
        (12, 25): "61.9 / 1.64",
        (24, 25): "58.2 / 1.66",
        (0, 12, 25): "51.4 / 1.66",
    }
    rows = ["+".join(f"blocks.{layer}.hook_resid_post" for layer in layers) for layers in expected]
    assert paper_columns(MODEL, "layers", rows)[1] == [[value] for value in expected.values()]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            MODEL,
            [
                ["SFT", "54.7 / 55.1 / 53.2 / +0.5"],
                ["DPO", "51.7 / 50.8 / 51.6 / +0.1"],
                ["TDPO-1", "51.5 / 54.4 / 51.4 / +0.3"],
                ["TDPO-2", "50.9 / 54.0 / 50.6 / +0.2"],
                ["SimPO", "51.1 / 52.2 / 51.4 / +0.4"],
            ],
        ),
        (
            LARGE,
            [
                ["SFT", "51.2 / 52.4 / 53.4 / +0.3"],
                ["DPO", "51.0 / 51.0 / 51.2 / +0.1"],
                ["TDPO-1", "50.8 / 50.2 / 51.8 / +0.1"],
                ["TDPO-2", "50.2 / 49.9 / 49.5 / 0.0"],
                ["SimPO", "50.2 / 51.8 / 51.0 / +0.2"],
            ],
        ),
    ],
)
def test_win_rates_are_the_paper_s_and_say_so(model, expected):
    rates = win_rates(model)
    assert rates is not None
    assert rates[1] == expected and "paper" in rates[0][1]


@pytest.mark.parametrize("model", [None, LARGE, "google/gemma-3-270m", "some/folder", "google/gemma-2-2b-it"])
@pytest.mark.parametrize("table", ["comparison", "sites", "alpha", "layers"])
def test_other_models_have_no_figures_of_the_paper(model, table):
    assert paper_columns(model, table, ["dpo", "fpo"]) == ([], [[], []])
    assert (win_rates(model) is None) == (model != LARGE)
