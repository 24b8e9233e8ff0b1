"""One file a command, and what commands share."""

import importlib

from ..base_config import Config


def run_command(config: Config) -> None:
    """Runs the command that a configuration is for: `run_align` of `align.py`, and so on."""
    name = config.command.replace("-", "_")
    getattr(importlib.import_module(f".{name}", __package__), f"run_{name}")(config)
