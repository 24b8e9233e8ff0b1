import argparse
import json
import sys

import pytest
import torch

from benchmarks.limit import rate_of
from benchmarks.measuring import Meter, in_fresh_process, in_turn, measured, medians
from benchmarks.reporting import markdown, report


def test_a_meter_tells_what_some_work_took_beyond_what_was_there():
    held = []
    result = measured("cpu", lambda: held.append(torch.zeros(1000)), repeats=2)
    assert result["extra_bytes"] == 4000
    assert 0 < result["seconds"] < 1 and result["resident_bytes"] > result["tensor_bytes"]
    with Meter("cpu") as meter:
        kept = torch.zeros(250)
        assert meter.read()["extra_bytes"] == kept.nbytes
        meter.reset()
        assert meter.read()["extra_bytes"] == 0


@pytest.mark.slow
def test_a_function_runs_in_a_process_of_its_own_and_its_fault_is_shown():
    assert in_fresh_process(rate_of, device="cpu", recipe="fp32")["rate"] > 1e8
    with pytest.raises(RuntimeError, match="nowhere"):
        in_fresh_process(rate_of, device="nowhere", recipe="fp32")


def test_contestants_run_in_turn_and_medians_are_taken():
    asked: list[str] = []
    results = in_turn(["a", "b"], 3, lambda name: {"seconds": float(len(asked)), "_": asked.append(name)})
    assert asked == ["a", "b", "a", "b", "a", "b"]
    assert [results[name]["seconds"] for name in "ab"] == [2.0, 3.0]
    assert len(results["a"]["runs"]) == 3


def test_one_failure_is_a_failure_of_all():
    assert medians([{"seconds": 1}, {"failed": "out of memory"}]) == {"failed": "out of memory"}


def test_the_table_has_the_report_s_numbers_and_the_report_no_name_of_the_data(tmp_path, monkeypatch, capsys):
    options = argparse.Namespace(json=tmp_path / "report" / "a.json", dataset="/home/me/pairs.parquet")
    monkeypatch.setattr(sys, "argv", ["x", "--dataset", options.dataset, "--batch", "2"])
    rows = [{"": "one", "s": 0.123456, "n": 1234, "_hidden": 1}, {"": "two", "s": 2345.6, "n": None, "_hidden": 2}]
    report(options, {"Table": rows}, note="here")
    assert capsys.readouterr().out.strip().endswith("| one | 0.123 | 1,234 |\n| two | 2,346 |  |")
    content = json.loads(options.json.read_text())
    assert content["command"].endswith("--dataset PAIRS --batch 2")
    assert content["note"] == "here" and content["tables"]["Table"] == rows
    assert content["hardware"]["cores"] >= 1 and content["versions"]["torch"] == torch.__version__


def test_markdown_hides_keys_that_begin_with_an_underscore():
    assert markdown([{"a": 1, "_b": 2}]) == "| a |\n| --- |\n| 1 |"
