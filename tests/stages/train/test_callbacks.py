import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fpo.stages.train.callbacks import LiveLine, MetricsFile, PairMeans, RunRecord, summary
from hypothesis import given
from hypothesis import strategies as st
from pairs import many_examples

numbers = st.floats(-1e6, 1e6)


class Ranks:
    """What accelerate does on several ranks that all counted the same."""

    device = torch.device("cpu")

    def __init__(self, number: int) -> None:
        self.number = number

    def reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return value * self.number


def state(step: int = 0, first: bool = True) -> Any:
    return SimpleNamespace(global_step=step, is_world_process_zero=first)


def log(folder: Any, step: int, first: bool = True, **logs: Any) -> None:
    MetricsFile().on_log(SimpleNamespace(output_dir=str(folder)), state(step, first), None, logs)


def lines(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@many_examples
@given(rows=st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=5), ranks=st.integers(1, 3))
def test_a_mean_is_that_over_all_pairs_however_they_came_in_rows(rows, ranks):
    means = PairMeans()
    for row in rows:
        means.add({"x": torch.tensor(row, dtype=torch.float64)})
    values = [value for row in rows for value in row]
    found = means.read(Ranks(ranks))
    assert found["x"] == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-6)
    assert means.read(Ranks(ranks)) == {}


def test_a_value_that_was_taken_once_counts_once():
    means = PairMeans()
    means.add({"x": torch.ones(3), "once": torch.tensor(5.0)})
    means.add({"x": torch.zeros(1)})
    assert means.read(Ranks(1)) == {"once": 5.0, "x": 0.75}


def test_means_hold_no_graph():
    means = PairMeans()
    means.add({"x": torch.ones(2, requires_grad=True) * 2})
    assert not means._sums["x"].requires_grad


def test_every_line_is_json_with_its_step_and_null_for_what_is_no_number(tmp_path):
    log(tmp_path / "new", 3, loss=0.5, epoch=1, note="a")
    log(tmp_path / "new", 4, loss=math.nan, grad_norm=math.inf)
    assert lines(tmp_path / "new") == [
        {"step": 3, "loss": 0.5, "epoch": 1, "note": "a"},
        {"step": 4, "loss": None, "grad_norm": None},
    ]


def test_only_the_first_process_writes(tmp_path):
    log(tmp_path, 1, first=False, loss=1.0)
    RunRecord("a: 1\n").on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state(first=False), None)
    assert list(tmp_path.iterdir()) == []


def begin(folder: Any, log_history: list[dict[str, Any]], first: bool = True) -> None:
    of_checkpoint = SimpleNamespace(log_history=log_history, is_world_process_zero=first)
    MetricsFile().on_train_begin(SimpleNamespace(output_dir=str(folder)), of_checkpoint, None)


@many_examples
@given(steps=st.lists(st.integers(0, 9), max_size=9).map(sorted), data=st.data())
def test_a_run_forgets_what_its_checkpoint_does_not_know_and_keeps_the_rest_as_it_was(tmp_path_factory, steps, data):
    folder = tmp_path_factory.mktemp("run")
    for step in steps:
        log(folder, step, loss=1 / 3)
    before = lines(folder) if steps else []
    known = data.draw(st.integers(0, len(steps)))
    begin(folder, before[:known])
    assert (lines(folder) if steps else []) == before[:known]


def test_a_line_that_was_cut_by_a_crash_is_dropped(tmp_path):
    log(tmp_path, 1, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    begin(tmp_path, [{"step": 1, "loss": 1.0}])
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_run_that_begins_makes_no_file_before_it_logs_and_other_processes_never_write(tmp_path):
    begin(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
    log(tmp_path, 1, loss=1.0)
    begin(tmp_path, [], first=False)
    assert len(lines(tmp_path)) == 1


def test_the_record_is_written_when_training_begins(tmp_path):
    RunRecord("a: 1\n").on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state(), None)
    assert (tmp_path / "run.yaml").read_text() == "a: 1\n"


def test_a_summary_says_what_changed_and_omits_what_was_not_measured():
    before = {"step": 0, "eval_loss": 0.69, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0}
    after = {"step": 9, "eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.25}
    after |= {"eval_features/mse_chosen": 0.001, "eval_features/mse_rejected": 0.002}
    speed = {"step": 9, "train_tokens_per_second": 1234.5}
    assert summary([before, after, speed]) == [
        "held-out accuracy: 50.0% before, 75.0% after",
        "held-out margin: 0 before, 1.25 after",
        "feature drift D_F on held-out pairs: 0.001 chosen, 0.002 rejected",
        "1,234 tokens/s",
    ]
    assert summary([after])[0] == "held-out accuracy: 75.0% after"  # a resumed run without its step 0
    assert summary([{"step": 9, "loss": 0.5}, speed]) == ["1,234 tokens/s"]


def test_without_a_terminal_each_logging_step_is_one_plain_line(capfd):
    line = LiveLine(SimpleNamespace(tokens_per_second=lambda: 1234.4))
    args = SimpleNamespace(disable_tqdm=False)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=20)
    line.on_train_begin(args, state, None)
    state.global_step = 10
    line.on_step_end(args, state, None)
    line.on_log(args, state, None, logs={"loss": 0.5, "rewards/accuracies": 0.75, "constraint/delta": 0.001})
    line.on_log(args, state, None, logs={"eval_loss": 0.4, "eval_rewards/margins": 2.0})
    line.on_log(args, state, None, logs={"parity/logps": 0.0})
    line.on_train_end(args, state, None)
    found = capfd.readouterr()
    first, second = found.out.splitlines()
    assert first.startswith("step 10/20: loss 0.5, accuracy 75.0%, δ 0.001, 1,234 tokens/s, 00:0")
    assert second == "step 10/20, held out: loss 0.4, margin 2"
    assert not found.err
