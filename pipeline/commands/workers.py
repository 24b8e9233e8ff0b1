"""Which of several workers of stage one this process is.

In: options, and the environment that torchrun or SLURM sets. Out: a number and how many there are; the GPU that is
this process's own.
"""

import os
from collections.abc import Mapping

import torch

from ..config import RunConfig

# What tells rank and world size: torchrun, or else srun; both can run inside a task of an array of jobs.
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def place_of(config: RunConfig, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This worker's rank and the world size.

    Args:
        config: `rank` and `world_size` win over the environment.
        environment: variables by name.

    Raises:
        ValueError: if one option is given without the other, or the rank is not below the world size.
    """
    if (config.rank is None) != (config.world_size is None):
        missing = "--rank" if config.rank is None else "--world-size"
        raise ValueError(f"{missing}: expected --rank and --world-size together, found one; give both or neither")
    if config.rank is not None and config.world_size is not None:
        rank, world_size = config.rank, config.world_size
    else:
        rank, world_size = _place_in_environment(environment)
    if rank >= world_size:
        raise ValueError(f"--rank: expected 0 to {world_size - 1}, as --world-size is {world_size}, found {rank}")
    return rank, world_size


def _place_in_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    def number(name: str, default: int) -> int:
        return int(environment.get(name, default))

    launched = (names for names in LAUNCHERS if all(name in environment for name in names))
    names = next(launched, None)
    rank, world_size = (0, 1) if names is None else (int(environment[name]) for name in names)
    first = number("SLURM_ARRAY_TASK_MIN", 0)
    task = (number("SLURM_ARRAY_TASK_ID", first) - first) // number("SLURM_ARRAY_TASK_STEP", 1)
    return task * world_size + rank, number("SLURM_ARRAY_TASK_COUNT", 1) * world_size


def take_own_gpu(device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Makes `cuda` mean this process's GPU, where several processes share a machine."""
    if device == "cuda":
        local_rank = int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", 0)))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())  # SLURM may show each task its own GPU alone
