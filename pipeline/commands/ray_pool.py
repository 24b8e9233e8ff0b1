"""Stage one on Ray: a pool of actors, each with the model and its SAEs, that are given shard numbers alone.

In: a `RunConfig`. Out: the manifest. Ray hands out numbers and starts a lost actor again; it never sees a row and
never writes: its own Parquet writer names files at random and appends when a job is run again.
"""

import logging
import os
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from ...cache.files import Place
from ...cache.manifest import Manifest
from ...cache.remote import open_writer, read_any_footer
from ...stages.precompute.shards import ShardWorker
from ..config import RunConfig
from ..progress import PairProgress
from .inputs import load_data

# Between two looks at a shard that another worker holds: one of another job, or one that a killed job left dying.
SECONDS_BETWEEN_LOOKS = 1.0


class ShardActor:
    """Writes the shards whose numbers it is given; the model is loaded with the first one, and stays."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the numbers as they came, when their shards are done."""
        for index in batch["item"].tolist():
            while not self._worker.work(index):
                time.sleep(SECONDS_BETWEEN_LOOKS)
        self._worker.leave()
        return batch

    @cached_property
    def _worker(self) -> ShardWorker:
        from .precompute import load_stage_one

        assert self._config.out is not None
        reference, preferences, limits, settings = load_stage_one(self._config)
        return ShardWorker(reference, preferences, limits, self._config.out, **settings)


def run_pool(config: RunConfig, out: Place) -> tuple[Manifest, int]:
    """Writes every shard that is missing by a pool of actors, then the manifest; and how many prompts are guessed.

    Connects to the cluster that `RAY_ADDRESS` names, or starts one on this machine; `out` must be one folder or store
    for all.

    Raises:
        ValueError: as stage one; if the cluster has fewer devices than there are to be workers.
        FloatingPointError: as stage one.
    """
    _, preferences, _, _ = load_data(config)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised here
    try:
        with PairProgress(len(preferences), unit="raw rows", tokens=False) as progress:
            starts = range(0, max(1, len(preferences)), config.shard_size)
            for index in _numbers_of_done_shards(config, len(starts)):
                progress.advance(min(config.shard_size, len(preferences) - starts[index]))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError | FloatingPointError):
            raise type(error.cause)(str(error.cause).partition("\n")[0]) from None  # below it are Ray's own words
        raise
    finally:
        ray.shutdown()
    footer = read_any_footer(out)
    manifest = open_writer(out, footer.meaning, footer.numerics, len(preferences)).finish()
    assert manifest is not None, "every number came back, so every shard is done"
    return manifest, preferences.guessed_prompts


def _numbers_of_done_shards(config: RunConfig, shards: int) -> Iterator[int]:
    """Has the actors write the shards; yields their numbers as they are done."""
    context = DataContext.get_current()
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    # One number a block: a block is what an actor is given, and given again if it is lost.
    numbers = ray.data.from_items(list(range(shards)), override_num_blocks=shards)
    done = numbers.map_batches(ShardActor, batch_size=1, fn_constructor_args=(config,), **_devices(config))
    for row in done.iter_rows():
        yield row["item"]


def _devices(config: RunConfig) -> dict[str, Any]:
    """How many actors, and what each is to have: a GPU, or its share of the cores, which Ray makes its threads."""
    kind = "GPU" if config.device != "cpu" and ray.cluster_resources().get("GPU") else "CPU"
    if config.device == "cuda" and kind == "CPU":
        raise ValueError("--device: expected a GPU in the Ray cluster, found none; use --device cpu")
    devices = int(ray.cluster_resources()[kind])
    workers = config.workers or (devices if kind == "GPU" else 1)
    if workers > devices:
        raise ValueError(f"--workers: expected at most the {devices} {kind}s of the Ray cluster, found {workers}")
    share = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": devices // workers}
    return {"compute": ActorPoolStrategy(size=workers), **share}
