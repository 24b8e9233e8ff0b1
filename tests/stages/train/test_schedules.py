"""Every step has the learning rate of transformers' schedule of that name; settings that cannot be used are refused."""

import json
import math
import re
from typing import Any

import pytest
import torch
from fpo.pipeline.config import AlignConfig
from fpo.pipeline.config_files import load_config
from fpo.stages.train.config import RowConfig
from fpo.stages.train.schedules import SCHEDULES, check_rates, check_settings
from hypothesis import given
from hypothesis import strategies as st
from tiny_world import files, fpo, metrics, ran
from transformers import SchedulerType, get_scheduler

PEAK, STEPS = 1e-3, 6
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.5}],
    "cosine_with_restarts": [{"num_cycles": 2}],
    "polynomial": [{}, {"lr_end": 1e-5, "power": 2.0}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 3}],
    "cosine_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.1}],
    "cosine_warmup_with_min_lr": [{"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}],
    "warmup_stable_decay": [
        {"num_decay_steps": 2, "decay_type": "1-sqrt"},
        {"num_decay_steps": 1, "num_stable_steps": 3},
    ],
}
CASES = [(name, settings) for name, several in SETTINGS.items() for settings in several]


def test_every_schedule_of_transformers_is_tried_or_follows_a_metric():
    assert (
        set(SETTINGS) == set(SCHEDULES) == {kind.value for kind in SchedulerType} - {"greedy", "reduce_lr_on_plateau"}
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_rate_of_every_step_is_transformers_own(world, tmp_path, name, settings):
    warmup = None if name == "constant" else 2
    options = {"method": "dpo", "max_steps": STEPS, "lr": PEAK, "lr_scheduler": name, "warmup_steps": warmup}
    options["lr_scheduler_kwargs"] = json.dumps(settings) if settings else None
    ran(world.align(tmp_path / "run", **options))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    arguments: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": STEPS}
    if "num_stable_steps" in settings:
        arguments["num_training_steps"] = None
    schedule = get_scheduler(name, optimizer, scheduler_specific_kwargs=settings, **arguments)
    expected = []
    for _ in range(STEPS):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [line["learning_rate"] for line in metrics(tmp_path / "run") if "loss" in line] == expected
    assert len(set(expected)) > 1 or name == "constant"


def test_a_file_has_the_settings_as_a_mapping(tmp_path):
    (tmp_path / "run.yaml").write_text("lr_scheduler_kwargs: {num_decay_steps: 2, decay_type: linear}\n")
    shown = ran(fpo("config", "show", "--config", tmp_path / "run.yaml")).stdout
    (tmp_path / "again.yaml").write_text(shown)
    for name in ("run.yaml", "again.yaml"):
        found = load_config(AlignConfig, str(tmp_path / name), {}).lr_scheduler_kwargs
        assert found == {"num_decay_steps": 2, "decay_type": "linear"}


WRONG = {
    "unknown name": ("sometimes", None, "--lr-scheduler: expected one of linear, .*, found 'sometimes'"),
    "plateau": ("reduce_lr_on_plateau", None, "--lr-scheduler: .*reduce_lr_on_plateau, which follows a metric"),
    "greedy": ("greedy", None, "--lr-scheduler: .*greedy, which follows a metric"),
    "unknown setting": ("cosine", '{"min_lr": 0}', "--lr-scheduler-kwargs: cosine takes num_cycles, found min_lr"),
    "no settings": ("linear", '{"power": 2}', "--lr-scheduler-kwargs: linear takes no settings, found power"),
    "the Trainer's": ("cosine", '{"num_training_steps": 2}', "takes num_cycles, found num_training_steps"),
    "would be ignored": ("constant_with_warmup", '{"num_cycles": 2}', "takes no settings, found num_cycles"),
    "no decay": ("warmup_stable_decay", None, "--lr-scheduler-kwargs: warmup_stable_decay needs num_decay_steps"),
    "no minimum": ("cosine_with_min_lr", None, "cosine_with_min_lr needs min_lr or min_lr_rate"),
    "both": ("cosine_with_min_lr", '{"min_lr": 0, "min_lr_rate": 0}', "needs min_lr or min_lr_rate, and not both"),
    "too long": ("warmup_stable_decay", '{"num_decay_steps": 5}', "fit the run's 6 steps, found .* and decay of 5"),
    "too short": ("warmup_stable_decay", '{"num_decay_steps": 1, "num_stable_steps": 0}', "rate of 0 from step 3 of 6"),
    "text": ("polynomial", '{"power": "two"}', "--lr-scheduler-kwargs: polynomial cannot use {'power': 'two'}"),
    "above the peak": ("polynomial", '{"lr_end": 1}', "polynomial cannot use .*lr_end"),
    "negative": ("polynomial", '{"lr_end": -1}', "--lr-scheduler-kwargs: expected rates from 0, found -"),
    "not finite": ("cosine", '{"num_cycles": NaN}', "rate of 0 from step 2 of 6"),
    "no JSON": ("cosine", "num_cycles=2", "--lr-scheduler-kwargs: .*expected a mapping in JSON"),
    "twice": ("cosine", '{"num_cycles": 2, "num_cycles": 3}', "--lr-scheduler-kwargs: .*each key once"),
    "a list": ("cosine", "[2]", "--lr-scheduler-kwargs: .*dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_line_and_nothing_is_written(world, tmp_path, case):
    name, settings, message = WRONG[case]
    options = {"lr_scheduler": name, "lr_scheduler_kwargs": settings, "warmup_steps": 2, "max_steps": STEPS}
    result = world.align(tmp_path / "run", method="dpo", **options)
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("fpo:"))
    assert re.search(message, line), line
    assert not files(tmp_path / "run")


@given(st.data())
def test_what_is_let_through_trains_in_every_step_but_those_of_warm_up_and_the_last(data):
    number = st.one_of(st.integers(-2, 12), st.floats(allow_nan=True, width=32), st.none())
    known = {
        "polynomial": ["lr_end", "power"],
        "cosine": ["num_cycles"],
        "cosine_with_min_lr": ["min_lr", "min_lr_rate", "num_cycles"],
        "warmup_stable_decay": ["num_decay_steps", "num_stable_steps", "min_lr_ratio"],
        "inverse_sqrt": ["timescale"],
    }
    name = data.draw(st.sampled_from(sorted(known)))
    settings = data.draw(st.dictionaries(st.sampled_from(known[name]), number))
    warmup, steps = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 12))
    try:
        check_settings(name, settings)
        check_rates(name, settings, lr=PEAK, warmup_steps=warmup, steps=steps)
    except ValueError as error:
        assert str(error).startswith("--lr-scheduler-kwargs: ") and "\n" not in str(error)
        return
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    total = None if settings.get("num_stable_steps") is not None else steps
    schedule: Any = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=settings)
    rates = [schedule.lr_lambdas[0](step) for step in range(steps + 1)]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates)
    assert steps <= warmup + 2 or any(rates[-3:-1])


def test_settings_of_the_python_class_are_checked_alike(tmp_path):
    with pytest.raises(ValueError, match=r"\A--lr-scheduler-kwargs: cosine takes num_cycles, found cycles\Z"):
        RowConfig(output_dir=str(tmp_path), use_cpu=True, lr_scheduler_type="cosine", lr_scheduler_kwargs={"cycles": 2})


@pytest.mark.slow
def test_only_a_schedule_that_does_not_look_at_the_length_lets_it_change(world, tmp_path):
    ran(world.align(tmp_path / "run", method="dpo", max_steps=2, lr_scheduler="inverse_sqrt"))
    ran(world.align(tmp_path / "run", "--resume", method="dpo", max_steps=3, lr_scheduler="inverse_sqrt"))
    share = {"method": "dpo", "lr_scheduler": "constant_with_warmup", "warmup_steps": 0.5}
    ran(world.align(tmp_path / "share", max_steps=2, **share))
    result = world.align(tmp_path / "share", "--resume", max_steps=4, **share)
    assert (result.exit_code, "max_steps: was 2, is 4" in result.stderr) == (2, True), result.stderr
