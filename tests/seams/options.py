"""Which options the commands have, and which check belongs to each.

In: the command line's own declaration. Out: `(command, option)` pairs, and the checks that `@effect` registers. A check
runs the command and compares what it did with what an independent computation says; it takes a `Lab` and the command.
"""

from collections.abc import Callable, Iterator
from typing import Any

import typer
from fpo.pipeline.cli import app
from fpo.pipeline.config_files import COMMANDS
from seams.lab import Lab

Check = Callable[[Lab, str], None]
Key = tuple[str, str]

CHECKS: dict[Key, Check] = {}

# The command of a setting that no command has as an option: a configuration file sets it.
FILE = "file"


def effect(commands: str, *options: str) -> Callable[[Check], Check]:
    """Registers a check of these options of these commands (several are separated by commas), where they have them."""

    def register(check: Check) -> Check:
        for command in commands.split(", "):
            for option in options:
                assert (command, option) not in CHECKS, f"{command} {option} has a check already"
                CHECKS[command, option] = check
        return check

    return register


def declared() -> list[Key]:
    """Every option of every command, and every setting that only a file sets."""
    found = dict(_commands(typer.main.get_command(app)))
    shown = {command: found.pop(f"config show {command}") for command in COMMANDS}
    assert all(set(shown[command]) == set(found[command]) for command in COMMANDS)
    keys = [(command, option) for command, options in found.items() for option in options]
    options = {option for _, option in keys}
    fields = dict.fromkeys(name for config in COMMANDS.values() for name in config.model_fields)
    return [*keys, *((FILE, name) for name in fields if name not in options)]


def _commands(command: Any, name: str = "") -> Iterator[tuple[str, list[str]]]:
    for child, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {child}".strip())
    if not hasattr(command, "commands"):
        yield name, [parameter.name for parameter in command.params]
