"""What the class of every command has: how it is checked, alone and before the command begins.

In: values by field name (`config_files.py` reads them). Out: a frozen instance whose values fit together, or one line
that says which do not.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import PrivateAttr, model_validator

from ..cache.errors import UserError
from .options import NEEDED, Options

# What names of a model or data set can only be paths.
FILE_ENDINGS = (".gguf", ".parquet", ".json", ".jsonl", ".csv", ".tsv", ".jinja")


def flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


class Config(Options):
    """What every command's class has. Its docstring is the command's help."""

    command: ClassVar[str]
    # What is told when the command is interrupted.
    go_on: ClassVar[str] = "nothing was written"
    # The profile of a command that needs one.
    profile: ClassVar[str | None] = None
    # The options that most people need, which `--help` shows first.
    first: ClassVar[tuple[str, ...]] = ()

    _given: frozenset[str] = PrivateAttr(frozenset())

    def model_post_init(self, context: Any) -> None:
        """Takes the names of the options that stand on the command line from the context of the validation."""
        self._given = frozenset((context or {}).get("given", ()))

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Refuses options that contradict each other.

        Raises:
            UserError: they do.
        """

    def refuse(self, reason: str, *names: str) -> None:
        """Refuses options that would be ignored; a file may hold them for other commands, the command line may not.

        Raises:
            UserError: one of them is on the command line.
        """
        for name in names:
            if name in self._given:
                raise UserError(f"{flag(name)}: {reason}; leave it out")

    def needs(self) -> list[str]:
        """The fields without which the command cannot run."""
        return [name for name, field in type(self).model_fields.items() if field.json_schema_extra == NEEDED]

    def check_ready(self) -> None:
        """Refuses a configuration with which the command cannot begin: all that is missing is named at once.

        Raises:
            UserError: a needed option is missing, or a file or cache is not where an option says.
        """
        needs = self.needs()
        needs.sort(key=lambda name: self.first.index(name) if name in self.first else len(self.first))
        if missing := [flag(name) for name in needs if getattr(self, name) in (None, (), "")]:
            raise UserError(
                f"{', '.join(missing)}: expected a value{' for each' * (len(missing) > 1)}, found none; "
                "give it as an option, or in the configuration"
            )
        for name in ("model", "base", "reference", "dataset", "chat_template", "questions"):
            value = getattr(self, name, None)
            if value is not None and _names_a_file(value) and not Path(value).expanduser().exists():
                raise UserError(f"{flag(name)}: expected a file or folder at {value}, found none; correct the path")
        for name in ("cache", "eval_cache"):
            place = getattr(self, name, None)
            if isinstance(place, Path) and not (place / "manifest.json").exists():
                raise UserError(
                    f"{flag(name)}: expected a finished cache in {place}, found no manifest.json; give its folder, or "
                    "run `fpo precompute` to its end"
                )


def _names_a_file(value: str | Path) -> bool:
    if isinstance(value, Path):
        return True
    return value.startswith((".", "/", "~")) or (value.endswith(FILE_ENDINGS) and not value.startswith("package:"))
