"""What the commands that train a model share: the Trainer's settings, resuming, the record of a run.

In: the configuration of `fpo align` or `fpo sft`. Out: keyword arguments of a `RowConfig`, callbacks, the checkpoint to
go on from; or one line that says what cannot be.
"""

import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ...cache.errors import UserError
from ...cache.files import remove_leftovers
from ...stages.train.callbacks import RunRecord, Snapshots
from ...stages.train.checkpoints import CONFIGS
from ...stages.train.schedules import is_endless
from ..config import TrainingConfig
from .inputs import (
    FINISHED,
    RECORD,
    check_new,
    compiles,
    device_of,
    differing,
    mark_finished,
    read_record,
    record_of,
    sole_writer,
)

# The settings that a resumed run may change: paths, logging and saving; its length too, unless the learning rates
# depend on it.
RESUME_MAY_CHANGE = (
    *("resume", "cache", "eval_cache", "trust_hashes"),
    *("logging_steps", "save_steps", "eval_steps", "snapshot_steps", "report_to", "push_to_hub"),
)
LENGTH = ("max_steps", "epochs")

VERSIONS = ("fpo", "torch", "transformers", "tokenizers", "datasets", "sae-lens")


def trainer_settings(config: TrainingConfig) -> dict[str, Any]:
    """The Trainer's settings, by `RowConfig`'s names.

    Raises:
        UserError: the batch cannot be shared among batches and devices.
    """
    device = device_of(config)
    parts = config.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size: expected a multiple of accumulation x devices ({parts}), found {config.batch_size}"
        )
    return {
        "output_dir": str(config.out),
        "token_budget": config.token_budget,
        "bf16": config.dtype == "bf16",
        "use_cpu": device == "cpu",
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size // parts,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.lr_scheduler,
        "lr_scheduler_kwargs": config.lr_scheduler_kwargs,
        "warmup_steps": config.warmup_steps,
        "optim": {"adam": "adamw_torch_fused", "rmsprop": "rmsprop"}[config.optimizer],
        "weight_decay": 0.0,
        "max_grad_norm": config.max_grad_norm,
        "activation_checkpointing": config.activation_checkpointing,
        "checkpoint_every": config.checkpoint_every,
        "compile_layers": compiles(config, device),
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "report_to": config.report_to,
        "push_to_hub": config.push_to_hub,
        "hub_strategy": "end",
    }


def check_resume(config: TrainingConfig, identity: Mapping[str, str]) -> None:
    """Refuses to mix two runs in one folder.

    Args:
        config: the configuration of the run that is to begin or to go on.
        identity: hashes of what it reads, under the names that they have in `run.yaml`.

    Raises:
        UserError: a new run finds files; a resumed one finds no run, a link, other settings or other inputs.
    """
    out = config.out
    if os.environ.get("RANK", "0") != "0":  # the others may come when the first has already written
        return
    if out.is_dir():
        remove_leftovers(out)
    if not config.resume:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out: expected a new or empty folder, found files in {out}; pass --resume to go on")
        check_new(out)
        return
    if not (out / RECORD).exists():
        raise UserError(f"--resume: expected a run in {out}, found no {RECORD}; leave --resume out")
    for path in out.rglob("*"):
        if path.is_symlink():  # what is written there would be elsewhere
            raise UserError(f"--resume: expected no link in {out}, found {path}; put what it stands for in its place")
    free = RESUME_MAY_CHANGE + (LENGTH if is_endless(config.lr_scheduler, config.warmup_steps) else ())
    if changed := differing(read_record(out, "--resume"), config, identity, free):
        raise UserError(f"--resume: expected the settings of the run in {out}; {changed}")


def is_finished(config: TrainingConfig) -> bool:
    """Whether the run that is to go on has nothing left to do; if so, says it.

    `finish` has marked it so in `run.yaml`, and the run is not to be longer now. Every rank looks for itself.

    Raises:
        UserError: it is to be longer and has no checkpoint to go on from, or is to be uploaded only now.
    """
    out = config.out
    if not config.resume or not (out / RECORD).exists():
        return False
    before = read_record(out, "--resume")
    match before.get(FINISHED):
        case {"step": int(step), "epoch": float(epoch)} if any((out / name).is_file() for name in CONFIGS):
            reached = step >= config.max_steps if config.max_steps else epoch >= config.epochs
        case _:
            return False
    if not reached and any(before.get(name) != getattr(config, name) for name in LENGTH):
        if last_checkpoint(config) is None:
            raise UserError(f"--resume: expected a checkpoint to go on from in {out}, found none; give another --out")
        return False
    if config.push_to_hub and not before.get("push_to_hub"):
        raise UserError(f"--push-to-hub: the run in {out} is finished; upload it with `hf upload OWNER/NAME {out}`")
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"{out}: finished after {step} steps; nothing was left to do, and nothing was changed")
    return True


def finish(trainer: Any, out: Path) -> None:
    """Saves what was trained and, once it is on disk, marks the run as finished in `run.yaml`.

    A run that goes on first writes `run.yaml` anew, without the mark.
    """
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        mark_finished(out, step=trainer.state.global_step, epoch=float(trainer.state.epoch))


@contextmanager
def sole_run(config: TrainingConfig, identity: Mapping[str, str]) -> Iterator[None]:
    """Holds the run's folder while it trains: another run may have seen the same empty folder, or the same checkpoint.

    Raises:
        UserError: another process trains into the folder; or as `check_resume`, which is asked again.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with sole_writer(config.out):
        check_resume(config, identity)
        yield


def last_checkpoint(config: TrainingConfig) -> str | None:
    """The checkpoint that a resumed run goes on from; None for a new one, or where none was written yet.

    One that was cut off while it was saved is passed over.
    """
    if not config.resume:
        return None
    names = ((folder, folder.name.removeprefix("checkpoint-")) for folder in config.out.glob("checkpoint-*"))
    steps = {int(step): folder for folder, step in names if step.isdecimal()}
    for _, folder in sorted(steps.items(), reverse=True):
        if _is_whole(folder):
            return str(folder)
        typer.echo(f"{folder}: cut off while it was saved, passed over")
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer's state, which it writes last, is there to its end."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return True


def run_callbacks(config: TrainingConfig, record: Mapping[str, Any]) -> list[TrainerCallback]:
    """The record of the run, which is its configuration, versions and `record`, and snapshots where they are wanted."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    callbacks: list[TrainerCallback] = [RunRecord(record_of(config, {**record, "versions": versions}))]
    if config.snapshot_steps:
        callbacks.append(Snapshots(config.snapshot_steps))
    return callbacks


@contextmanager
def tracked(name: str) -> Iterator[None]:
    """Makes a Trainer that reports to a tracker.

    Raises:
        UserError: transformers does not know the tracker of `--report-to`, or it is not installed.
    """
    try:
        get_reporting_integration_callbacks(name)
    except ValueError as error:
        raise UserError(f"--report-to: {error}") from error
    try:
        yield
    except RuntimeError as error:  # how transformers says that it is not installed
        raise UserError(f"--report-to: {error}") from error
