"""`fpo precompute`: stage one, from a configuration to a cache.

In: a `RunConfig`. Out: a cache in `--out` and its totals on the terminal. What can be refused is refused before
anything is written. Several workers may share a cache: ranks of torchrun or SLURM, each of which runs this, or the
actors of Ray.
"""

from functools import partial
from pathlib import Path
from typing import Any

from ...cache.files import Place
from ...cache.manifest import Manifest
from ...stages.data.preferences import Preferences
from ...stages.data.tokenize import Limits
from ...stages.model.models import attentions_to_try, load_model
from ...stages.model.sae import check_fits
from ...stages.model.tokenizer import check_vocabulary
from ...stages.precompute.reference import Reference
from ...stages.precompute.shards import precompute, repair
from ...stages.scoring.sae_quality import check_fit, first_pairs, fit_on_pairs
from ...stages.scoring.supported import check_length, load_supported
from ..config import RunConfig, to_yaml
from ..progress import PairProgress, console
from .inputs import check_folder, compiles, device_of, load_data, load_saes, required
from .workers import place_of, take_own_gpu


def run_precompute(config: RunConfig) -> None:
    """`fpo precompute`."""
    _, _, _, out = required(config, "model", "dataset", "sae", "out")
    if isinstance(out, Path):
        check_folder(out)
    rank, world_size = place_of(config)
    if config.repair and (config.engine != "local" or world_size > 1):
        found = f"{world_size} workers" if config.engine == "local" else f"--engine {config.engine}"
        raise ValueError(f"--repair: expected one worker, which reads every shard, found {found}; start one process")
    if config.engine == "local":
        manifest, guessed, tokens_per_second = _run_worker(config, out, rank, world_size)
    elif world_size > 1:
        raise ValueError(f"--engine: ray starts its workers itself, found {world_size} of them; start one process")
    else:
        (manifest, guessed), tokens_per_second = _run_pool(config, out), 0.0
    if manifest is None:
        console.print("shards of this cache are still with other workers; whoever finishes last writes the manifest")
        return
    _print_totals(manifest, out, guessed, tokens_per_second)


def _run_worker(config: RunConfig, out: Place, rank: int, world_size: int) -> tuple[Manifest | None, int, float]:
    """The manifest if this worker finished last, how many prompts are guessed, and tokens a second."""
    if config.workers is not None:
        raise ValueError(
            "--workers: only --engine ray reads it; leave it out, or start several processes with torchrun"
        )
    reference, preferences, limits, settings = load_stage_one(config)
    for sae, fit in zip(reference.saes, reference.fits, strict=False):
        if rank == 0:
            console.print(f"{sae.site.name}: {fit}")
    if config.repair:
        return _repair(reference, preferences, limits, out, settings), preferences.guessed_prompts, 0.0
    with PairProgress(len(preferences)) as progress:
        manifest = precompute(
            reference,
            preferences,
            limits,
            out,
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
        console.print(f"{out}: damaged or missing files: {len(damages)}" if damages else f"{out}: nothing to repair")
        for damage in damages:
            console.print(f"  {damage}")

    with PairProgress(len(preferences)) as progress:
        # Without `options`: `run.yaml` says how the cache was made, which was not by repairing it.
        manifest, changed = repair(
            *(reference, preferences, limits, out),
            on_damage=tell,
            on_pairs=progress.advance,
            **{**settings, "options": None},
        )
    for name in changed:
        console.print(
            f"{name}: computed again, with other bytes than the manifest vouched for: this machine rounds otherwise "
            "than the one before, or the shard was altered before its manifest; the cache is sound, its manifest new"
        )
    return manifest


def _run_pool(config: RunConfig, out: Place) -> tuple[Manifest, int]:
    try:
        from .ray_pool import run_pool
    except ModuleNotFoundError as error:
        raise ValueError(f"--engine: expected Ray, found no module {error.name}; pip install 'fpo[ray]'") from error
    return run_pool(config, out)


def load_stage_one(config: RunConfig) -> tuple[Reference, Preferences, Limits, dict[str, Any]]:
    """What a worker of stage one needs: the reference on its device, the raw rows, limits, `ShardWorker`'s settings."""
    source, preferences, chat, limits = load_data(config)
    device = device_of(config)
    take_own_gpu(device)
    saes = load_saes(config, device)
    model = load_supported(
        partial(load_model, source, device=device), attentions_to_try(config.attention, source, device), console.print
    )
    check_vocabulary(model, chat.tokenizer, chat.probe_ids)
    check_length(model, limits.max_length)
    for sae in saes:
        check_fits(sae, model)
    settings = {
        "keep_features": None if config.keep_features == "all" else config.keep_features,
        "token_budget": config.token_budget,
        "shard_size": config.shard_size,
        "limit": config.limit,
        "compiled": compiles(config),
        "keep_date": config.date is None,
        "options": to_yaml(config.model_copy(update={"rank": None, "world_size": None})),  # the same for all workers
    }
    pairs = first_pairs(model, preferences, chat, limits)
    fits = fit_on_pairs(model, pairs, saes, config.dtype, token_budget=config.token_budget) if pairs else []
    if not config.allow_poor_sae:
        for sae, fit in zip(saes, fits, strict=False):
            check_fit(sae, fit)
    return Reference(source, model, chat, saes, config.dtype, tuple(fits)), preferences, limits, settings


def _print_totals(manifest: Manifest, out: Place, guessed: int, tokens_per_second: float) -> None:
    counts = manifest.counts
    console.print(
        f"{out}: {manifest.num_pairs} pairs in {len(manifest.shards)} shards, {manifest.num_bytes / 1e6:.1f} MB "
        f"({manifest.num_bytes / max(1, manifest.num_pairs):.0f} bytes a pair), {counts['scored_tokens']} tokens scored"
    )
    if tokens_per_second:
        console.print(f"this run scored {tokens_per_second:.0f} tokens a second")
    console.print(
        f"ties {counts['ties']}, truncated prompts {counts['truncated_prompts']}, "
        f"truncated responses {counts['truncated_responses']}"
    )
    for reason, number in sorted(manifest.skipped.items()):
        console.print(f"skipped {number}: {reason}")
    if guessed:
        console.print(
            f"guessed prompts {guessed}: no column holds them, so each is the beginning that both texts share"
        )
    if manifest.noise:
        mse = ", ".join(f"{value:.2g}" for value in manifest.noise.feature_mse)
        console.print(f"noise between two packings: log-probs {manifest.noise.logp:.2g} nats, D_F {mse}")
