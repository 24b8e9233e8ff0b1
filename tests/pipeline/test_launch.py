"""Stage two as launchers start it, and the configurations for `accelerate launch` in `pipeline/launch/`."""

import argparse
import importlib.resources
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from ranks import FSDP
from safetensors.torch import load_file
from tiny_world import World, metrics, ran, state_of

FOLDER = Path(str(importlib.resources.files("fpo.pipeline"))) / "launch"


def launched(file: str) -> tuple[argparse.Namespace, dict[str, str]]:
    """What `accelerate launch` makes of a configuration: its arguments, and the environment of every rank."""
    args = launch_command_parser().parse_args(["--config_file", str(FOLDER / file), "-m", "fpo.pipeline.cli"])
    args, _, _ = _validate_launch_command(args)
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_a_configuration_launches_fsdp2_as_the_tests_run_it(devices):
    args, environment = launched(f"fsdp-{devices}.yaml")
    assert (args.use_fsdp, args.num_processes) == (True, devices)
    assert {name: environment[name] for name in FSDP} == FSDP
    assert environment.get("FSDP_OFFLOAD_PARAMS", "false") == environment.get("FSDP_ACTIVATION_CHECKPOINTING", "false")


def test_every_configuration_is_tested():
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"fsdp-{devices}.yaml" for devices in (1, 4, 8)]


def test_fsdp_that_would_be_ignored_is_refused(world: World, tmp_path, monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setitem(os.environ, name, value)
    result = world.align(tmp_path / "run", device="cpu")
    assert (result.exit_code, "FSDP: expected GPUs" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_align_under_torchrun_is_the_run_of_one_process(world: World, tmp_path):
    options = {"epochs": 2, "batch_size": 8, "eval_cache": world.eval_cache, "lr": 1e-3}  # 12 pairs: 8, then 4
    ran(world.align(tmp_path / "one", **options))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fpo.pipeline.cli", *world.to_align(tmp_path / "two", **options)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in [name for name in line if "loss" in name or "rewards" in name or "logps" in name]:
            assert other[name] == pytest.approx(line[name], rel=1e-3, abs=1e-6), name
    weights, other_weights = (load_file(tmp_path / which / "model.safetensors") for which in ("one", "two"))
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4)
    before = state_of(tmp_path / "two")
    again = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True)
    said = again.stdout.replace("\n", " ")
    assert (again.returncode, said.count("finished after 4 steps")) == (0, 1), again.stderr
    assert state_of(tmp_path / "two") == before
