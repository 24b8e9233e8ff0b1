"""What the commands that train a model share: the Trainer's settings, resuming, the record of a run.

In: a `RunConfig`, and which options were given on the command line. Out: keyword arguments of a `RowConfig`, callbacks,
the checkpoint to go on from; or one line that says what cannot be.
"""

import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...cache.files import remove_leftovers
from ...stages.train.callbacks import RunRecord, Snapshots
from ...stages.train.checkpoints import CONFIGS
from ...stages.train.schedules import is_endless
from ..config import RunConfig, to_yaml
from ..progress import console
from .inputs import check_new, compiles, device_of
from .run_record import FINISHED, RECORD, differing, mark_finished, read_record, sole_writer

# What a resumed run may change: where things are and what it tells meanwhile; its length too,
# unless the learning rates depend on it.
RESUME_MAY_CHANGE = (
    *("resume", "cache", "eval_cache", "trust_hashes"),
    *("logging_steps", "save_steps", "eval_steps", "snapshot_steps", "report_to", "push_to_hub"),
)
LENGTH = ("max_steps", "epochs")

VERSIONS = ("fpo", "torch", "transformers", "tokenizers", "datasets", "sae-lens")


def trainer_settings(config: RunConfig, given: frozenset[str]) -> dict[str, Any]:
    """The Trainer's settings, by `RowConfig`'s names.

    Raises:
        ValueError: if an option would be ignored, or the batch cannot be shared among batches and devices.
    """
    if {"epochs", "max_steps"} <= given:
        raise ValueError("--epochs: --max-steps alone says when to stop; leave one of them out")
    if config.lr_scheduler == "constant" and "warmup_steps" in given:
        raise ValueError("--warmup-steps: the schedule 'constant' ignores it; use constant_with_warmup")
    if "checkpoint_every" in given and not config.activation_checkpointing:
        raise ValueError("--checkpoint-every: no layer is recomputed without --activation-checkpointing; add it")
    parts = config.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % parts:
        raise ValueError(
            f"--batch-size: expected a multiple of accumulation x devices ({parts}), found {config.batch_size}"
        )
    return {
        "output_dir": str(config.out),
        "token_budget": config.token_budget,
        "bf16": config.dtype == "bf16",
        "use_cpu": device_of(config) == "cpu",
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
        "compile_layers": compiles(config),
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "report_to": config.report_to,
        "push_to_hub": config.push_to_hub,
        "hub_strategy": "end",
    }


def check_resume(config: RunConfig, out: Path, identity: Mapping[str, str]) -> None:
    """Refuses to mix two runs in one folder.

    Args:
        config: the configuration of the run that is to begin or to go on.
        out: its folder.
        identity: hashes of what it reads, under the names that they have in `run.yaml`.

    Raises:
        FileNotFoundError: there is nothing to resume.
        ValueError: a new run finds files, or a resumed one a link, other settings or other inputs.
    """
    if os.environ.get("RANK", "0") != "0":  # the others may come when the first has already written
        return
    if out.is_dir():
        remove_leftovers(out)
    if not config.resume:
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"--out: expected a new or empty folder, found files in {out}; pass --resume to go on")
        check_new(out)
        return
    if not (out / RECORD).exists():
        raise FileNotFoundError(f"--resume: expected a run in {out}, found no {RECORD}; leave --resume out")
    for path in out.rglob("*"):
        if path.is_symlink():  # what is written there would be elsewhere
            raise ValueError(f"--resume: expected no link in {out}, found {path}; put what it stands for in its place")
    free = RESUME_MAY_CHANGE + (LENGTH if is_endless(config.lr_scheduler, config.warmup_steps) else ())
    if changed := differing(read_record(out, "--resume"), config, identity, free):
        raise ValueError(f"--resume: expected the settings of the run in {out}; {changed}")


def is_finished(config: RunConfig, out: Path) -> bool:
    """Whether the run that is to go on has nothing left to do; if so, says it.

    That is what `finish` wrote into `run.yaml`, unless the run is to be longer now. Every rank looks for itself.

    Raises:
        ValueError: it is to be longer and has no checkpoint to go on from, or is to be uploaded only now.
    """
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
            raise ValueError(f"--resume: expected a checkpoint to go on from in {out}, found none; give another --out")
        return False
    if config.push_to_hub and not before.get("push_to_hub"):
        raise ValueError(f"--push-to-hub: the run in {out} is finished; upload it with `hf upload OWNER/NAME {out}`")
    if os.environ.get("RANK", "0") == "0":
        console.print(f"{out}: finished after {step} steps; nothing was left to do, and nothing was changed")
    return True


def finish(trainer: Any, out: Path) -> None:
    """Saves what was trained and, once that is on disk, writes into `run.yaml` that the run is finished.

    A run that goes on writes its `run.yaml` anew before anything else, without that.
    """
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        mark_finished(out, step=trainer.state.global_step, epoch=float(trainer.state.epoch))


@contextmanager
def sole_run(config: RunConfig, out: Path, identity: Mapping[str, str]) -> Iterator[None]:
    """Around a training: two runs that saw the same empty folder, or go on from the same checkpoint, are one too many.

    Raises:
        ValueError: another process trains into the folder; or as `check_resume`, which is asked again.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with sole_writer(out):
        check_resume(config, out, identity)
        yield


def last_checkpoint(config: RunConfig) -> str | None:
    """The checkpoint that a resumed run goes on from; None for a new one, or where none was written yet.

    One that was cut off while it was saved is passed over.
    """
    if not config.resume or not isinstance(config.out, Path):
        return None
    names = ((folder, folder.name.removeprefix("checkpoint-")) for folder in config.out.glob("checkpoint-*"))
    steps = {int(step): folder for folder, step in names if step.isdecimal()}
    for _, folder in sorted(steps.items(), reverse=True):
        if _is_whole(folder):
            return str(folder)
        console.print(f"{folder}: cut off while it was saved, passed over")
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer's state, which it writes last, is there to its end."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return True


def run_callbacks(config: RunConfig, record: Mapping[str, Any]) -> list[TrainerCallback]:
    """The record of the run, which is its configuration, versions and `record`, and snapshots where they are wanted."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    callbacks: list[TrainerCallback] = [RunRecord(to_yaml(config, {**record, "versions": versions}))]
    if config.snapshot_steps:
        callbacks.append(Snapshots(config.snapshot_steps))
    return callbacks


@contextmanager
def missing_trackers() -> Iterator[None]:
    """Around the making of a Trainer: a tracker that is not installed is the user's mistake.

    Raises:
        ValueError: if `--report-to` names one.
    """
    try:
        yield
    except RuntimeError as error:  # how transformers says it
        raise ValueError(f"--report-to: {error}") from error
