"""Checks a plan before it runs: what each step reads and writes, and what is missing for it.

In: steps. Out: a table of them, and one line for each missing thing, which says what to do. Finished steps need
nothing, and nothing is missing that another step writes. Nothing is estimated: the bytes are those of weights,
gradients and optimiser state, which follow from the model's configuration, and those of finished caches.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import typer

from ...cache.errors import UserError
from ...cache.manifest import Manifest
from ...stages.data.raw_rows import may_be_hub_id
from ...stages.data.row_files import kind_of
from ...stages.model.models import find_model, is_hub_id
from ...stages.train.methods import METHODS
from ..commands.inputs import device_of
from ..commands.jobs import Step
from .hub import Repo, missing_repos
from .page import markdown

# Bytes of optimiser state a trained parameter, in fp32: Adam's two moments, RMSprop's one.
OPTIMISER_BYTES = {"adam": 8, "rmsprop": 4}


def missing(steps: Sequence[Step], jobs: int) -> list[str]:
    """Everything that keeps the unfinished steps from running.

    Args:
        steps: the steps, finished or not.
        jobs: how many run at a time.

    Returns:
        One line for each missing thing, with what to do; empty if nothing is missing. Devices that do not exist are
        reported alone, and memory only if nothing else is missing.
    """
    makers = {step.out: step for step in steps}
    todo = [step for step in steps if not step.done]
    if wrong := wrong_devices(todo):
        return wrong
    lines = [*wrong_recipes(todo), *missing_files(todo, makers), *unknown_saes(todo, makers)]
    lines += missing_repos(needed_repos(todo, makers))
    return lines or memory_too_small(todo, makers, jobs)


def print_plan(steps: Sequence[Step]) -> None:
    """Prints a table with one line for each group of steps that differ only in the seed or the snapshot."""
    makers = {step.out: step for step in steps}
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault(_label(step), []).append(step)
    body = []
    for label, group in groups.items():
        number = f" ×{len(group)}" if len(group) > 1 else ""
        reads = ", ".join(dict.fromkeys(name for step in group for name in _reads(step, makers)))
        writes = re.sub(r"(-seed-\d+.*)?-[0-9a-f]+$", "-…", group[0].out.name)
        finished = sum(step.done for step in group)
        state = "done" if finished == len(group) else f"{finished} done" if finished else ""
        body.append([f"{label}{number}", reads, writes, _size(group[0], makers), state])
    done = sum(step.done for step in steps)
    typer.echo(f"{len(steps) - done} to do, {done} done, in {steps[-1].out.parent}\n")
    typer.echo(markdown(["step", "reads", "writes", "bytes", "done"], body))
    typer.echo("bytes: fp32 weights, gradients and optimiser state, no activations; of a finished cache: its files")


def maker_of(name: str, makers: Mapping[Path, Step]) -> Step | None:
    """The step that writes this folder or one of its parents (a snapshot lies in its run); None if no step does."""
    path = Path(name)
    return next((makers[folder] for folder in (path, *path.parents) if folder in makers), None)


def state_bytes(step: Step, makers: Mapping[Path, Step]) -> int | None:
    """Bytes of a step's fp32 weights and, if it trains, of gradients and optimiser state.

    A lower bound: it counts the weights of a live reference, but neither SAEs nor adapters (LoRA). None if the model's
    configuration is not on this machine.
    """
    config = step.config
    parameters = parameter_count(_base_model(step, makers))
    if parameters is None:
        return None
    trains = step.command in ("align", "sft") and getattr(config, "lora_r", None) is None
    live = _reads_cache(step) and config.reference not in (None, config.model)
    return parameters * (4 + (4 + OPTIMISER_BYTES[config.optimizer] if trains else 0) + (4 if live else 0))


@cache
def parameter_count(name: str) -> int | None:
    """Parameters of a model by its configuration, tied weights once; None if that is not on this machine."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if is_hub_id(name):
            config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        else:
            source = find_model(name)
            config = AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return int(sum(weight.numel() for weight in model.parameters()))


def memory_too_small(steps: Sequence[Step], makers: Mapping[Path, Step], jobs: int) -> list[str]:
    """A line if `jobs` steps of the largest size do not fit the device, even without their activations."""
    if not steps:
        return []
    device, together = device_of(steps[0].config), min(jobs, len(steps))
    needed = together * max(state_bytes(step, makers) or 0 for step in steps)
    if needed <= (free := free_memory(device)):
        return []
    less = "lower --jobs" if together > 1 else "take a larger device, or train an adapter with --lora-r"
    return [
        f"memory: {needed / 1e9:.1f} GB of weights and optimiser state are needed on {device} ({together} at a time), "
        f"{free / 1e9:.1f} GB are free; {less}"
    ]


def wrong_devices(steps: Sequence[Step]) -> list[str]:
    """Devices that steps ask for and this machine does not have."""
    lines = []
    for step in steps:
        try:
            device_of(step.config)
        except UserError as error:
            lines.append(str(error).splitlines()[0])
    return _unique(lines)


def wrong_recipes(steps: Sequence[Step]) -> list[str]:
    """Options that need a GPU, in steps that run on a CPU."""
    lines = []
    for config in (step.config for step in steps if device_of(step.config) == "cpu"):
        if getattr(config, "dtype", "fp32") == "bf16":
            lines.append("--dtype: bf16 is for GPUs, and the device is a CPU; give --dtype fp32, or run on a GPU")
        if config.attention == "packed_flex":
            lines.append("--attention: packed_flex has no backward on a CPU; leave it out, or run on a GPU")
    return _unique(lines)


def missing_files(steps: Sequence[Step], makers: Mapping[Path, Step]) -> list[str]:
    """Local models, data, SAEs, caches, templates and questions that do not exist and that no step writes."""
    lines: list[str] = []

    def need(option: str, expected: str, place: str | Path, advice: str, *, file: str = "") -> None:
        if not (Path(place).expanduser() / file).exists():
            lines.append(f"{option}: expected {expected} at {place}, found none; {advice}")

    for step in steps:
        config = step.config
        for name in _outer_models(step, makers):
            if not is_hub_id(name):
                lines += _no_model(name)
        for spec in _outer_saes(step, makers):
            if not _is_published(spec):
                expected = "a folder that SAELens saved, params.npz@site or release:sae_id"
                need("sae", expected, spec, "train it with `fpo train-sae`, or correct the name")
        if _reads_data(step) and config.dataset and not _is_hub_data(config.dataset):
            need("dataset", "a file or folder", config.dataset, "correct the path")
        if _reads_cache(step):
            for cache in (config.cache, getattr(config, "eval_cache", None)):
                if isinstance(cache, Path) and maker_of(str(cache), makers) is None:
                    need("cache", "a finished cache", cache, "make it with `fpo precompute`", file="manifest.json")
        for option in ("chat_template", "questions"):
            if (path := getattr(config, option, None)) is not None:
                need(option, "a file", path, "correct the path")
    return _unique(lines)


def unknown_saes(steps: Sequence[Step], makers: Mapping[Path, Step]) -> list[str]:
    """Each `release:sae_id` that SAELens does not list, with the nearest name that it does list."""
    lines = []
    for spec in _published(steps, makers):
        release, sae_id = spec.split(":")
        releases = _registry()
        if release not in releases:
            lines.append(f"sae {spec}: SAELens knows no release '{release}'; {_nearest(release, releases)}")
        elif sae_id not in (known := releases[release].saes_map):
            lines.append(f"sae {spec}: release '{release}' has no '{sae_id}'; {_nearest(sae_id, known)}")
    return lines


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    return f"the nearest name is '{difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]}'"


def needed_repos(steps: Sequence[Step], makers: Mapping[Path, Step]) -> list[Repo]:
    """The hub repositories that steps read: models, data sets, and SAEs that SAELens lists."""
    repos: list[Repo] = []
    for step in steps:
        repos += [Repo("model", name) for name in _outer_models(step, makers) if is_hub_id(name)]
        if _reads_data(step) and step.config.dataset and _is_hub_data(step.config.dataset):
            repos.append(Repo("dataset", step.config.dataset))
    for spec in _published(steps, makers):
        release, sae_id = spec.split(":")
        known = _registry().get(release)
        if known is not None and sae_id in known.saes_map:
            repos.append(Repo("model", known.repo_id, known.saes_map[sae_id]))
    return list(dict.fromkeys(repos))


def free_memory(device: str) -> int:
    """Free bytes of a GPU, or on a CPU the memory that the system says is available."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _reads_data(step: Step) -> bool:
    return step.command in ("precompute", "sft", "train-sae")


def _reads_cache(step: Step) -> bool:
    return step.command in ("align", "evaluate")


def _outer_models(step: Step, makers: Mapping[Path, Step]) -> list[str]:
    """Models that a step loads and no step writes."""
    names = [step.config.model, step.config.reference if _reads_cache(step) else None]
    return [name for name in names if name is not None and maker_of(name, makers) is None]


def _outer_saes(step: Step, makers: Mapping[Path, Step]) -> list[str]:
    """SAEs that a step loads and no step writes, without `@site`."""
    if not _loads_saes(step):
        return []
    specs = [spec if Path(spec).exists() else spec.partition("@")[0] for spec in step.config.sae]
    return [spec for spec in specs if maker_of(spec, makers) is None]


def _published(steps: Sequence[Step], makers: Mapping[Path, Step]) -> list[str]:
    """The SAEs that are named as `release:sae_id`."""
    return _unique([spec for step in steps for spec in _outer_saes(step, makers) if _is_published(spec)])


def _is_published(spec: str) -> bool:
    return not Path(spec).exists() and not spec.endswith(".npz") and re.fullmatch(r"[^:]+:[^:]+", spec) is not None


def _registry() -> Mapping[str, Any]:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()  # type: ignore[no-any-return]


def _is_hub_data(source: str) -> bool:
    there = Path(source).expanduser().exists()
    return not there and may_be_hub_id(source) and kind_of(Path(source)) is None


def _no_model(name: str) -> list[str]:
    try:
        find_model(name)
    except UserError as error:
        return [str(error)]
    return []


def _unique(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def _loads_saes(step: Step) -> bool:
    if step.command == "align":
        return METHODS[step.config.method].divergence == "features"
    return step.command in ("precompute", "evaluate")


def _base_model(step: Step, makers: Mapping[Path, Step]) -> str:
    """The model from which the steps before this one trained its model; no step writes it."""
    assert step.config.model is not None
    maker = maker_of(step.config.model, makers)
    return step.config.model if maker is None else _base_model(maker, makers)


def _reads(step: Step, makers: Mapping[Path, Step]) -> list[str]:
    """What a step reads, in short: labels of the steps that write it, hub ids, last parts of paths."""
    config = step.config
    names = [config.model, getattr(config, "reference", None)]
    names.append(str(config.cache) if _reads_cache(step) else config.dataset)
    found = []
    for name in names:
        if name is not None:
            maker = maker_of(name, makers)
            short = name if is_hub_id(name) else Path(name).name
            found.append(short if maker is None else _label(maker).replace("precompute", "cache"))
    if _loads_saes(step) and config.sae:
        found.append("1 SAE" if len(config.sae) == 1 else f"{len(config.sae)} SAEs")
    return found


def _size(step: Step, makers: Mapping[Path, Step]) -> str:
    if step.command == "precompute" and (step.out / "manifest.json").exists():
        return f"{Manifest.load(step.out).num_bytes / 1e6:.0f} MB of files"
    held = state_bytes(step, makers)
    return "–" if held is None else f"{held / 1e9:.2f} GB" if held >= 1e9 else f"{held / 1e6:.0f} MB"


def _label(step: Step) -> str:
    """A step's label without seed and snapshot, and with short site names."""
    label = re.sub(r", (seed \d+|step-\d+)", "", step.label)
    label = re.sub(r"blocks\.(\d+)\.hook_(\w+)", r"\1 \2", label)
    return step.command if label == f"{step.command} {step.command}" else label
