"""What a table has to say about where its figures come from: hardware, versions, settings, and that a toy is a toy.

In: a plan. Out: lines for the table's foot.
"""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

from ..world.world import world_folder
from .plan import Plan

TOY = (
    "A toy: a made-up language and a Gemma-2 of under a million parameters, trained in minutes. It shows what the "
    "methods do to it, under equal conditions; it says little about language models."
)


def note_of(plan: Plan) -> str:
    """The small print of every figure and table of this profile."""
    name = Path(plan.name).stem
    limits = f"{len(plan.config.seeds)} seed{'s' if len(plan.config.seeds) > 1 else ''}, held-out pairs"
    return f"{TOY} ({limits}.)" if is_toy(plan) else f"Profile {name}: {limits}."


def short_note(plan: Plan) -> str:
    """The small print of a figure, in a few words."""
    return "embedded toy world, under 1 M parameters" if is_toy(plan) else f"profile {Path(plan.name).stem}"


def is_toy(plan: Plan) -> bool:
    """Whether this is the embedded world."""
    return Path(plan.model).is_relative_to(world_folder())


def facts_of(plan: Plan, command: str) -> dict[str, str]:
    """Hardware, versions, the command and how long its steps took."""
    import torch

    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("fpo", "torch", "transformers", "sae-lens", "datasets")
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    facts = {
        "Command": command,
        "Hardware": f"{processor_name()}, {os.cpu_count()} cores, {gpu}; {plan.config.jobs} runs at a time",
        "Versions": f"Python {platform.python_version()}, {versions}",
        "Settings": f"profile {Path(plan.name).name}; seeds {', '.join(map(str, plan.config.seeds))}",
    }
    if is_toy(plan):
        world = json.loads((world_folder() / "world.json").read_text())
        quality = ", ".join(
            f"{site} {sae['l0']:.0f} / {sae['explained_variance']:.2f}" for site, sae in world["saes"].items()
        )
        facts["Right by length alone, by one word alone"] = ", ".join(
            f"{100 * v:.1f} %" for v in world["baselines"].values()
        )
        facts["SAEs, L0 / explained variance"] = quality
        facts["Making the world took"] = f"{world['seconds']:.0f} s"
    return facts


def processor_name() -> str:
    """The processor's name as Linux gives it, else as Python does."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [
            line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
