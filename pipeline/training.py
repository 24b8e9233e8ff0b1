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

from ..cache.files import remove_leftovers
from ..cache.locks import Lock
from ..stages.metrics import RunRecord
from ..stages.snapshots import Snapshots
from .config import RunConfig, to_yaml
from .inputs import check_new, compiles, device_of
from .plain_yaml import read_yaml
from .progress import console

# What a resumed run may change: where things are and what it tells meanwhile; with a constant schedule, its length.
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
    record = out / "run.yaml"
    if out.is_dir():
        remove_leftovers(out)
    if not config.resume:
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"--out: expected a new or empty folder, found files in {out}; pass --resume to go on")
        check_new(out)
        return
    if not record.exists():
        raise FileNotFoundError(f"--resume: expected a run in {out}, found no run.yaml; leave --resume out")
    for path in out.rglob("*"):
        if path.is_symlink():  # what is written there would be elsewhere
            raise ValueError(f"--resume: expected no link in {out}, found {path}; put what it stands for in its place")
    try:
        before = read_yaml(record.read_bytes())
    except ValueError as error:
        raise ValueError(f"--resume: {record}: {error}") from error
    if not isinstance(before, dict):
        raise ValueError(f"--resume: expected the settings of a run in {record}, found {type(before).__name__}")
    free = RESUME_MAY_CHANGE + (LENGTH if config.lr_scheduler.startswith("constant") else ())
    now = {**read_yaml(to_yaml(config).encode()), **identity}
    changed = [
        f"{key}: was {before.get(key)!r}, is {value!r}"
        for key, value in now.items()
        if key not in free and before.get(key) != value
    ]
    if changed:
        raise ValueError(f"--resume: expected the settings of the run in {out}; {'; '.join(changed)}")


@contextmanager
def sole_run(config: RunConfig, out: Path, identity: Mapping[str, str]) -> Iterator[None]:
    """Around a training: two runs that saw the same empty folder, or go on from the same checkpoint, are one too many.

    Raises:
        ValueError: another process trains into the folder; or as `check_resume`, which is asked again.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out)
    try:
        try:
            alone = lock.take()
        except OSError:  # NFS, for one, locks no folders: there nobody can tell
            alone = True
        if not alone:
            raise ValueError(f"--out: another run is writing into {out}; wait for it, or give another folder")
        check_resume(config, out, identity)
        yield
    finally:
        lock.close()


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
