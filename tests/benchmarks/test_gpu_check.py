"""`make gpu-check` writes each figure as soon as it is measured, and runs on a CPU too."""

import json
import logging
from typing import Any

import pytest
import torch
from fpo.stages.model import flex
from fpo.stages.train import memory
from torch.nn.attention import flex_attention

from benchmarks import gpu_check, gpu_values
from benchmarks.gpu_bench import TINY, Bench, Report


def lines(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gpu_check.jsonl").read_text().splitlines()]


def test_a_figure_is_on_disk_when_it_is_measured_and_a_second_run_adds_to_it(tmp_path):
    bench = Bench(Report(tmp_path), tmp_path, "cpu", TINY, compiled=False)
    bench.report.add("values", error=1e-6)
    assert [line["error"] for line in lines(tmp_path)] == [1e-6]
    gpu_values.card(Bench(Report(tmp_path), tmp_path, "cpu", TINY, compiled=False))
    assert [line["section"] for line in lines(tmp_path)] == ["values", "card", "card"]
    assert lines(tmp_path)[-1]["bf16_tflops"] > 0


def test_a_section_that_fails_does_not_take_the_next_one_with_it(tmp_path, monkeypatch, capsys):
    def fail(bench: Bench) -> None:
        raise RuntimeError("no such kernel")

    for module, name in ((flex, "BACKEND"), (flex_attention, "_validate_device"), (memory, "COUNTED_STEPS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # `--device cpu` sets them
    monkeypatch.setattr(gpu_values, "values", fail)
    arguments = ["gpu_check", "--device", "cpu", "--tiny", "--out", str(tmp_path), "--sections", "values", "card"]
    monkeypatch.setattr("sys.argv", arguments)
    gpu_check.main()
    found = lines(tmp_path)
    assert "no such kernel" in found[0]["failed"]
    assert found[-1]["section"] == "card"
    assert "no such kernel" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_of_it_runs_on_a_cpu(tmp_path, monkeypatch):
    logging.getLogger("torch.__trace").handlers.clear()
    torch._dynamo.reset()
    for module, name in ((flex, "BACKEND"), (flex_attention, "_validate_device"), (memory, "COUNTED_STEPS")):
        monkeypatch.setattr(module, name, getattr(module, name))
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--pairs", "8", "--batch", "2", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["gpu_check", *arguments])
    gpu_check.main()
    found = lines(tmp_path)
    assert not [line for line in found if "failed" in line]
    assert {line["section"] for line in found} >= set(gpu_check.SECTIONS)
