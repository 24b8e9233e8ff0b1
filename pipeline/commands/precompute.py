"""`fpo precompute`: stage one, from a configuration to a cache.

In: a `PrecomputeConfig`. Out: a cache in `--out` and its totals on the terminal. What can be refused is refused before
anything is written. Several workers may share a cache: ranks of torchrun or SLURM, each of which runs this, or the
actors of a Ray pool, which are given shard numbers alone. Ray never sees a row and never writes: its own Parquet writer
names files at random and appends when a job is run again.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import typer

from ...cache.errors import UserError
from ...cache.files import Place
from ...cache.manifest import Manifest
from ...cache.remote import open_writer, read_any_footer
from ...stages.data.preferences import Preferences
from ...stages.data.tokenize import Limits
from ...stages.model.sae import check_fits
from ...stages.model.tokenizer import check_vocabulary
from ...stages.precompute.reference import Reference
from ...stages.precompute.shards import ShardWorker, precompute, repair
from ...stages.scoring.sae_quality import check_fit, first_pairs, fit_on_pairs
from ...stages.scoring.supported import check_length
from ..config import PrecomputeConfig
from ..config_files import to_yaml
from ..errors import is_expected
from .inputs import Progress, check_folder, compiles, device_of, load_causal_lm, load_data, load_saes

# The variables that tell rank and world size: torchrun's, else srun's; both can run inside a task of an array of jobs.
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))

# Between two looks at a shard that another worker holds: one of another job, or one that a killed job left dying.
SECONDS_BETWEEN_LOOKS = 1.0


def run_precompute(config: PrecomputeConfig) -> None:
    """`fpo precompute`."""
    if isinstance(config.out, Path):
        check_folder(config.out)
    rank, world_size = place_of(config)
    if config.repair and world_size > 1:
        raise UserError(f"--repair: expected one worker, found {world_size} workers; start one process")
    if config.engine == "local":
        manifest, guessed, tokens_per_second = _run_worker(config, rank, world_size)
    elif world_size > 1:
        raise UserError(f"--engine: ray starts its workers itself, found {world_size} of them; start one process")
    else:
        (manifest, guessed), tokens_per_second = _run_pool(config), 0.0
    if manifest is None:
        typer.echo("shards of this cache are still with other workers; whoever finishes last writes the manifest")
        return
    _print_totals(manifest, config, guessed, tokens_per_second)


def place_of(config: PrecomputeConfig, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This worker's rank and the world size.

    Args:
        config: `rank` and `world_size` win over the environment.
        environment: variables by name.

    Raises:
        UserError: the rank is not below the world size.
    """
    if config.rank is not None and config.world_size is not None:
        rank, world_size = config.rank, config.world_size
    else:
        rank, world_size = _place_in_environment(environment)
    if rank >= world_size:
        raise UserError(f"--rank: expected 0 to {world_size - 1}, as --world-size is {world_size}, found {rank}")
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


def load_stage_one(config: PrecomputeConfig) -> tuple[Reference, Preferences, Limits, dict[str, Any]]:
    """What a worker needs: the reference on its device, the raw rows, limits, `ShardWorker`'s settings."""
    source, preferences, chat, limits = load_data(config)
    device = device_of(config)
    take_own_gpu(device)
    saes = load_saes(config, device)
    model = load_causal_lm(config, source)
    check_vocabulary(model, chat.tokenizer, chat.probe_ids)
    check_length(model, limits.max_length)
    for sae in saes:
        check_fits(sae, model)
    settings = {
        "keep_features": None if config.keep_features == "all" else config.keep_features,
        "token_budget": config.token_budget,
        "shard_size": config.shard_size,
        "limit": config.limit,
        "compiled": compiles(config, device),
        "keep_date": config.date is None,
        "options": to_yaml(config.model_copy(update={"rank": None, "world_size": None})),  # the same for all workers
    }
    pairs = first_pairs(model, preferences, chat, limits)
    fits = fit_on_pairs(model, pairs, saes, config.dtype, token_budget=config.token_budget) if pairs else []
    if not config.allow_poor_sae:
        for sae, fit in zip(saes, fits, strict=False):
            check_fit(sae, fit)
    return Reference(source, model, chat, saes, config.dtype, tuple(fits)), preferences, limits, settings


def _run_worker(config: PrecomputeConfig, rank: int, world_size: int) -> tuple[Manifest | None, int, float]:
    """The manifest if this worker finished last, how many prompts are guessed, and tokens per second."""
    reference, preferences, limits, settings = load_stage_one(config)
    for sae, fit in zip(reference.saes, reference.fits, strict=False):
        if rank == 0:
            typer.echo(f"{sae.site.name}: {fit}")
    if config.repair:
        return _repair(reference, preferences, limits, config.out, settings), preferences.guessed_prompts, 0.0
    with Progress(len(preferences), "precompute") as progress:
        manifest = precompute(
            *(reference, preferences, limits, config.out),
            rank=rank,
            world_size=world_size,
            on_pairs=progress.advance,
            **settings,
        )
    return manifest, preferences.guessed_prompts, progress.tokens_per_second


def _repair(
    reference: Reference, preferences: Preferences, limits: Limits, out: Place, settings: dict[str, Any]
) -> Manifest | None:
    def tell(damages: list[str]) -> None:
        typer.echo(f"{out}: damaged or missing files: {len(damages)}" if damages else f"{out}: nothing to repair")
        for damage in damages:
            typer.echo(f"  {damage}")

    with Progress(len(preferences), "repair") as progress:
        # Without `options`: `run.yaml` says how the cache was made, which was not by repairing it.
        manifest, changed = repair(
            *(reference, preferences, limits, out),
            on_damage=tell,
            on_pairs=progress.advance,
            **{**settings, "options": None},
        )
    for name in changed:
        typer.echo(
            f"{name}: computed again, with other bytes than the manifest vouched for: this machine rounds otherwise "
            "than the one before, or the shard was altered before its manifest; the cache is sound, its manifest new"
        )
    return manifest


class ShardActor:
    """Writes the shards whose numbers Ray gives it; the model is loaded with the first one, and stays."""

    def __init__(self, config: PrecomputeConfig) -> None:
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
        reference, preferences, limits, settings = load_stage_one(self._config)
        return ShardWorker(reference, preferences, limits, self._config.out, **settings)


def _run_pool(config: PrecomputeConfig) -> tuple[Manifest, int]:
    """Writes every shard that is missing by a pool of actors, then the manifest; and how many prompts are guessed.

    Connects to the cluster that `RAY_ADDRESS` names, or starts one on this machine; `out` must be one folder or store
    for all.

    Raises:
        UserError: Ray is not installed; the cluster has fewer devices than there are to be workers; as stage one.
        FloatingPointError: as stage one.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(f"--engine: expected Ray, found no module {error.name}; pip install 'fpo[ray]'") from error
    _, preferences, _, _ = load_data(config)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised here
    try:
        with Progress(len(preferences), "precompute", "raw rows") as progress:
            starts = range(0, max(1, len(preferences)), config.shard_size)
            for index in _numbers_of_done_shards(config, len(starts)):
                progress.advance(min(config.shard_size, len(preferences) - starts[index]))
    except ray.exceptions.RayTaskError as error:
        if is_expected(error.cause):
            raise type(error.cause)(str(error.cause).partition("\n")[0]) from None  # below it are Ray's own words
        raise
    finally:
        ray.shutdown()
    footer = read_any_footer(config.out)
    manifest = open_writer(config.out, footer.meaning, footer.numerics, len(preferences)).finish()
    assert manifest is not None, "every number came back, so every shard is done"
    return manifest, preferences.guessed_prompts


def _numbers_of_done_shards(config: PrecomputeConfig, shards: int) -> Iterator[int]:
    """Has the actors write the shards; yields their numbers as they are done."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    # An actor has a GPU, or its share of the cores, which Ray makes its threads.
    kind = "GPU" if config.device != "cpu" and ray.cluster_resources().get("GPU") else "CPU"
    if config.device == "cuda" and kind == "CPU":
        raise UserError("--device: expected a GPU in the Ray cluster, found none; use --device cpu")
    devices = int(ray.cluster_resources()[kind])
    workers = config.workers or (devices if kind == "GPU" else 1)
    if workers > devices:
        raise UserError(f"--workers: expected at most the {devices} {kind}s of the Ray cluster, found {workers}")
    share = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": devices // workers}
    # One number a block: a block is what an actor is given, and given again if it is lost.
    numbers = ray.data.from_items(list(range(shards)), override_num_blocks=shards)
    pool = ActorPoolStrategy(size=workers)
    done = numbers.map_batches(ShardActor, batch_size=1, fn_constructor_args=(config,), compute=pool, **share)
    for row in done.iter_rows():
        yield row["item"]


def _print_totals(manifest: Manifest, config: PrecomputeConfig, guessed: int, tokens_per_second: float) -> None:
    counts = manifest.counts
    typer.echo(
        f"{config.out}: {manifest.num_pairs} pairs in {len(manifest.shards)} shards, {manifest.num_bytes / 1e6:.1f} MB "
        f"({manifest.num_bytes / max(1, manifest.num_pairs):.0f} bytes a pair), {counts['scored_tokens']} tokens scored"
        + (f", {tokens_per_second:.0f} a second by this process" if tokens_per_second else "")
    )
    typer.echo(
        f"ties {counts['ties']}, truncated prompts {counts['truncated_prompts']}, "
        f"truncated responses {counts['truncated_responses']}"
    )
    for reason, number in sorted(manifest.skipped.items()):
        typer.echo(f"skipped {number}: {reason}")
    if guessed:
        typer.echo(f"guessed prompts {guessed}: no column holds them, so each is the beginning that both texts share")
    if manifest.noise:
        mse = ", ".join(f"{value:.2g}" for value in manifest.noise.feature_mse)
        typer.echo(f"noise between two packings: log-probs {manifest.noise.logp:.2g} nats, D_F {mse}")
    typer.echo(f"next: fpo align --model {config.model} --cache {config.out} --sae {config.sae[0]} --out runs/fpo")
