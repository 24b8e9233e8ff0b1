"""A profile of the comparison that runs in seconds a step, on the world of tiny_world.py."""

import shutil
from pathlib import Path
from typing import Any

from fpo.pipeline.config_files import write_yaml
from tiny_world import SITES, World

NAMES = [site.name for site in SITES]
# In files that runs leave, what tells of time and not of the result.
COSTS = ("train/peak_memory_bytes", "train/tokens_per_second", "train/seconds")


def tiny_profile(
    world: World,
    folder: Path,
    *,
    table: dict[str, Any] | None = None,
    tune: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Writes `tiny.yaml` and its data into a folder.

    Args:
        world: where the model and the SAEs are.
        folder: to write.
        table: changes of what holds for `table` alone.
        tune: changes of what holds for `tune` alone.
        changes: changes of all else.
    """
    prefs = folder / "prefs"
    prefs.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", world.data), ("test", world.heldout), ("validation", world.heldout)):
        shutil.copy(rows, prefs / f"{split}_prefs.jsonl")
    saes = [str(sae) for sae in world.saes]
    settings: dict[str, Any] = {
        "model": str(world.gemma),
        "dataset": str(prefs),
        "sae": saes[:1],
        "site": NAMES[:1],
        "keep_features": "all",
        "max_length": 64,
        "max_prompt_length": 32,
        "token_budget": 160,
        "batch_size": 6,
        "max_steps": 2,
        "snapshot_steps": 1,
        "lr": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "prompts": 2,
        "samples": 2,
        "max_new_tokens": 4,
    }
    sections: dict[str, Any] = {
        "table": {
            "sae": saes,
            "site": NAMES,
            "ablation_sites": NAMES,
            "ablation_sums": ["+".join(NAMES)],
            "seeds": [0],
            "jobs": 2,
        },
        "tune": {
            "validation_split": "validation_prefs",
            "lr_range": [0.2, 3.0],
            "beta_range": [0.5, 100.0],
            "jobs": 2,
        },
    }
    sections["table"] |= table or {}
    sections["tune"] |= tune or {}
    path = folder / "tiny.yaml"
    path.write_text(write_yaml({**settings, **changes, **sections}))
    return path
