"""A benchmark's setting on the tiny world."""

from typing import Any

from benchmarks.setting import Setting


def tiny_setting(world: Any, **changes: Any) -> Setting:
    values: dict[str, Any] = {
        "model": str(world.llama),
        "dataset": str(world.data),
        "split": "train",
        "prompt": 20.0,
        "response": 30.0,
        "max_length": 64,
        "batch": 2,
        "steps": 2,
        "warmup": 1,
        "token_budget": 160,
        "recipe": "fp32",
        "device": "cpu",
        "layer": 2,
        "width": 64,
        "optimizer": "adamw_torch_fused",
    }
    return Setting(**(values | changes))
