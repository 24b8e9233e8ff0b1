"""What would fail later in a plan, found before anything starts.

In: steps. Out: one line for each thing that is missing, which says what to do. Only steps that are not done count, and
what an earlier step writes is not missing.
"""

import difflib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.filesize import decimal

from ...stages.data.hub_data import may_be_hub_id
from ...stages.data.row_files import kind_of
from ...stages.model.models import find_model
from ..commands.inputs import device_of
from ..hub import Repo, missing_repos
from .estimates import estimate_plan, loads_saes, maker_of
from .jobs import Step
from .shapes import is_hub_id


def missing(steps: Sequence[Step], jobs: int) -> list[str]:
    """Everything that keeps steps from running.

    Args:
        steps: the steps; those that are done need nothing.
        jobs: how many run at a time.

    Returns:
        One line each, with what to do; empty if all is there.
    """
    makers = {step.out: step for step in steps}
    todo = [step for step in steps if not step.done]
    if wrong := wrong_devices(todo):
        return wrong
    lines = [*wrong_recipes(todo), *missing_files(todo, makers), *unknown_saes(todo, makers)]
    lines += missing_repos(needed_repos(todo, makers))
    try:
        estimate = estimate_plan(steps, jobs)
    except (ValueError, OSError) as error:  # nearly always what a line above says already
        return lines or [" ".join(str(error).split())]
    if todo:
        device = device_of(todo[0].config)
        lines += memory_too_small(estimate.memory, free_memory(device), device, min(jobs, len(todo)))
        lines += disk_too_small(estimate.disk, todo[0].out.parent)
    return lines


def wrong_devices(steps: Sequence[Step]) -> list[str]:
    """`--device` names one that is not here."""
    lines = []
    for config in (step.config for step in steps):
        try:
            device_of(config)
        except ValueError as error:
            lines.append(str(error).splitlines()[0])
    return _unique(lines)


def wrong_recipes(steps: Sequence[Step]) -> list[str]:
    """What a CPU cannot do, or only so slowly that nobody would want it."""
    lines = []
    for config in (step.config for step in steps if device_of(step.config) == "cpu"):
        if config.dtype == "bf16":
            lines.append("--dtype: bf16 is for GPUs, and the device is a CPU; give --dtype fp32, or run on a GPU")
        if config.attention == "packed_flex":
            lines.append("--attention: packed_flex has no backward on a CPU; leave it out, or run on a GPU")
    return _unique(lines)


def missing_files(steps: Sequence[Step], makers: Mapping[Path, Step]) -> list[str]:
    """Local models, data, SAEs, caches, templates and questions that are not there and that no step writes."""
    lines = []
    for step in steps:
        config = step.config
        for name in _outer_models(step, makers):
            if not is_hub_id(name):
                lines += _no_model(name)
        for spec in _outer_saes(step, makers):
            if not _is_published(spec) and not Path(spec).exists():
                lines.append(
                    f"sae: expected a folder that SAELens saved, params.npz@site or release:sae_id, found none at "
                    f"{spec}; train it with `fpo train-sae`, or correct the name"
                )
        if _reads_data(step) and config.dataset and not _is_hub_data(config.dataset) and not _there(config.dataset):
            lines.append(f"dataset: expected a file or folder at {config.dataset}, found none; correct the path")
        if step.command in ("align", "evaluate"):
            for cache in (config.cache, config.eval_cache):
                if (
                    isinstance(cache, Path)
                    and maker_of(str(cache), makers) is None
                    and not (cache / "manifest.json").exists()
                ):
                    lines.append(
                        f"cache: expected a finished cache at {cache}, found none; make it with `fpo precompute`"
                    )
        for option, path in (("chat_template", config.chat_template), ("questions", config.questions)):
            if path is not None and not _there(str(path)):
                lines.append(f"{option}: expected a file at {path}, found none; correct the path")
    return _unique(lines)


def unknown_saes(steps: Sequence[Step], makers: Mapping[Path, Step]) -> list[str]:
    """`release:sae_id` that SAELens' list does not have."""
    lines = []
    for spec in _published(steps, makers):
        release, sae_id = spec.split(":")
        releases = _registry()
        if release not in releases:
            near = difflib.get_close_matches(release, releases, n=1, cutoff=0.0)[0]
            lines.append(f"sae {spec}: SAELens knows no release '{release}'; the nearest name is '{near}'")
        elif sae_id not in releases[release].saes_map:
            near = difflib.get_close_matches(sae_id, releases[release].saes_map, n=1, cutoff=0.0)[0]
            lines.append(f"sae {spec}: release '{release}' has no '{sae_id}'; the nearest name is '{near}'")
    return lines


def needed_repos(steps: Sequence[Step], makers: Mapping[Path, Step]) -> list[Repo]:
    """What steps would take from the hub: models, data, SAEs that SAELens knows."""
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
    """Bytes that the device has left: of a GPU its own, of a CPU what programs could take."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def memory_too_small(needed: float, free: float, device: str, jobs: int) -> list[str]:
    """The largest steps that would run at a time do not fit the device."""
    if needed <= free:
        return []
    less = "lower --jobs or --token-budget" if jobs > 1 else "lower --token-budget, or take a larger device"
    return [
        f"memory: about {decimal(round(needed))} are needed on {device} for {jobs} at a time, "
        f"{decimal(round(free))} are free; {less}"
    ]


def disk_too_small(needed: float, runs: Path) -> list[str]:
    """What will be written does not fit the runs folder."""
    there = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed <= free:
        return []
    return [
        f"disk: about {decimal(round(needed))} will be written in {runs}, {decimal(free)} are free; make room, or give "
        "another folder with --runs"
    ]


def _reads_data(step: Step) -> bool:
    return step.command in ("precompute", "sft", "train-sae")


def _outer_models(step: Step, makers: Mapping[Path, Step]) -> list[str]:
    """Models that a step loads and no step writes."""
    names = [step.config.model, step.config.reference if step.command in ("align", "evaluate") else None]
    return [name for name in names if name is not None and maker_of(name, makers) is None]


def _outer_saes(step: Step, makers: Mapping[Path, Step]) -> list[str]:
    """SAEs that a step loads and no step writes, without the site that may follow them."""
    if not loads_saes(step):
        return []
    specs = [spec if Path(spec).exists() else spec.partition("@")[0] for spec in step.config.sae]
    return [spec for spec in specs if maker_of(spec, makers) is None]


def _published(steps: Sequence[Step], makers: Mapping[Path, Step]) -> list[str]:
    """SAEs by SAELens' names."""
    return _unique([spec for step in steps for spec in _outer_saes(step, makers) if _is_published(spec)])


def _is_published(spec: str) -> bool:
    return not Path(spec).exists() and not spec.endswith(".npz") and re.fullmatch(r"[^:]+:[^:]+", spec) is not None


def _registry() -> Mapping[str, Any]:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()  # type: ignore[no-any-return]


def _is_hub_data(source: str) -> bool:
    return not _there(source) and may_be_hub_id(source) and kind_of(Path(source)) is None


def _there(path: str) -> bool:
    return Path(path).expanduser().exists()


def _no_model(name: str) -> list[str]:
    try:
        find_model(name)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _unique(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(lines))
