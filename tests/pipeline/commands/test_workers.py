import pytest
import torch
from fpo.pipeline.commands.precompute import place_of, take_own_gpu
from fpo.pipeline.config import PrecomputeConfig

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_COUNT": "4"}
ARRAY |= {"SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_MAX": "13", "SLURM_ARRAY_TASK_STEP": "1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1)),
        (TORCHRUN, (2, 4)),
        (SRUN, (1, 3)),
        (TORCHRUN | SRUN, (2, 4)),
        (ARRAY, (2, 4)),
        (ARRAY | SRUN, (7, 12)),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_STEP": "2"}, (2, 4)),
    ],
    ids=["alone", "torchrun", "srun", "torchrun under srun", "array", "srun in an array", "array with a step"],
)
def test_the_launcher_says_which_worker_this_is(environment, place):
    assert place_of(PrecomputeConfig(), environment) == place


def test_workers_of_an_array_are_each_one_of_all():
    tasks = [ARRAY | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NTASKS": "3"} for task in range(10, 14)]
    places = [place_of(PrecomputeConfig(), task | {"SLURM_PROCID": process}) for task in tasks for process in "012"]
    assert places == [(rank, 12) for rank in range(12)]


def test_options_win_over_the_launcher():
    assert place_of(PrecomputeConfig(rank=1, world_size=2), TORCHRUN) == (1, 2)


@pytest.mark.parametrize(
    ("environment", "visible", "gpu"),
    [({"LOCAL_RANK": "3"}, 8, 3), ({"SLURM_LOCALID": "3"}, 4, 3), ({"SLURM_LOCALID": "3"}, 1, 0), ({}, 2, 0)],
    ids=["torchrun", "srun", "srun that shows a task its own GPU", "alone"],
)
def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch, environment, visible, gpu):
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    take_own_gpu("cpu", environment)
    take_own_gpu("cuda", environment)
    assert taken == [gpu]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"rank": 1}, "--world-size"), ({"world_size": 2}, "--rank"), ({"rank": 2, "world_size": 2}, "expected 0 to 1")],
)
def test_a_place_that_is_none_is_refused(world, tmp_path, options, named):
    result = world.precompute(tmp_path / "out", **options)
    assert (result.exit_code, named in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()
