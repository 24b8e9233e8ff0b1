"""A command's configuration from a YAML file or a profile, with the options of the command line on top.

In: a command's class, the name of a file or profile, options. Out: an instance of the class; and back to YAML.

The keys at the top of a file hold for every command that has such an option. A section with a command's name
(`align: {lr: 1e-6}`) wins over them, and for `fpo align` the settings of its method (`methods: {dpo: {beta: 0.1}}`) win
over both. The `run.yaml` of a run is such a file too.
"""

import contextlib
import importlib.resources
import json
import reprlib
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ValidationError

from ..cache.errors import UserError
from ..stages.train.methods import METHODS
from .base_config import Config, flag
from .config import AlignConfig, EvaluateConfig, PrecomputeConfig, SFTConfig, TrainSAEConfig
from .options import nearest, read_method
from .report_config import JudgeConfig, TableConfig, TuneConfig

# Every command by its name, which is that of its section in a file.
COMMANDS: dict[str, type[Config]] = {
    config.command: config
    for config in (
        *(PrecomputeConfig, AlignConfig, SFTConfig, EvaluateConfig, JudgeConfig),
        *(TrainSAEConfig, TableConfig, TuneConfig),
    )
}
# What `run.yaml` says of a run beside its configuration: ignored when it is read back.
RECORD_KEYS = {
    *("command", "versions", "cache_fingerprint", "start_sha256", "model_sha256", "data_sha256"),
    *("training_device", "finished"),
}
C = TypeVar("C", bound=Config)


class _StrictLoader(yaml.SafeLoader):
    """Refuses what a plain configuration needs none of: aliases (a bomb of a few bytes), tags, and keys given twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem=f"alias '*{event.anchor}'; write it out", problem_mark=mark)
        if tag := getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem=f"tag '{tag}'; leave it out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys, mark = Counter(field_name(key.value) for key, _ in node.value), cast(Any, node.start_mark)
        for key, number in keys.items():
            if number > 1:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' stands twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


def field_name(key: object) -> str:
    """`batch-size` and `batch_size` are one key."""
    return str(key).replace("-", "_")


def read_yaml(data: bytes, where: str) -> dict[str, Any]:
    """The mapping in a YAML file, keys as field names.

    Raises:
        UserError: it is no YAML, not plain, or no mapping; one line that begins with `where`.
    """
    try:
        content = yaml.load(data, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise UserError(f"{where}: expected plain YAML, found: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping of options, found {type(content).__name__}")
    return {field_name(key): value for key, value in content.items()}


def to_yaml(config: Config, record: Mapping[str, Any] | None = None) -> str:
    """The configuration whole, as YAML, and after it what `record` says of a run."""
    missing = {name for name in config.needs() if getattr(config, name) is None}
    content = config.model_dump(mode="json", exclude=missing)
    most_used_first = {name: content[name] for name in config.first if name in content} | content
    return write_yaml(most_used_first | dict(record or {}))


def write_yaml(content: Mapping[str, Any]) -> str:
    """Plain data as YAML that `read_yaml` reads back, keys in their order."""
    unshared = json.loads(json.dumps(dict(content)))  # of a list that stands twice, YAML would write an alias
    text: str = yaml.safe_dump(unshared, sort_keys=False)
    return text


def profile_names() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = importlib.resources.files(__package__) / "profiles"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(command: type[C], name: str | None, given: Mapping[str, Any], *, from_command_line: bool = False) -> C:
    """The configuration of a command.

    Args:
        command: its class.
        name: a YAML file, or a profile's name; None for defaults.
        given: options, by field name; they win over the file.
        from_command_line: whether a person wrote `given`, who is told which of them would be ignored.

    Raises:
        UserError: there is no such file or profile; a key is unknown (the nearest known one is named); a value is not
            what it must be, or contradicts another one.
    """
    shared, sections, methods = _read(name) if name is not None else ({}, {}, {})
    fields = command.model_fields
    values = {key: value for key, value in shared.items() if key in fields} | sections.get(command.command, {})
    if command is AlignConfig:
        method = {**values, **given}.get("method", fields["method"].default)
        with contextlib.suppress(ValueError):  # the class says what is wrong
            values |= methods.get(read_method(method), {})
    values = {key: value for key, value in values.items() if value is not None or fields[key].default is not None}
    try:
        return command.model_validate({**values, **given}, context={"given": given if from_command_line else ()})
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if not first["loc"]:  # a rule of the class, which names its option
            raise UserError(str(cause)) from error
        key = str(first["loc"][0])
        place = flag(key) if key in given else f"{name}: {key}"
        message = str(cause) if cause else first["msg"]
        raise UserError(f"{place}: {message}, found {_shown(first['input'])}") from error


def has_section(name: str, command: type[Config]) -> bool:
    """Whether a file has a section for this command."""
    return command.command in _read(name)[1]


def _read(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The keys that all commands share, the sections of commands, and the settings of methods."""
    path = Path(name).expanduser()
    if path.is_file():
        data = path.read_bytes()
    elif name in profile_names():
        data = (importlib.resources.files(__package__) / "profiles" / f"{name}.yaml").read_bytes()
    else:
        raise UserError(
            f"--config: expected a YAML file or one of the profiles {', '.join(profile_names())}, found no '{name}'"
        )
    content = read_yaml(data, name)
    if "for" in content:
        raise UserError(
            f"{name}: 'for' is no longer a key; move its commands to the top level, and its methods under 'methods'"
        )
    shared = {key: value for key, value in content.items() if key not in RECORD_KEYS}
    known = {field for config in COMMANDS.values() for field in config.model_fields}
    sections = {
        command: _section(shared.pop(key), f"{name}: {command}", config)
        for command, config in COMMANDS.items()
        # `judge` is a command and an option: a mapping is the command's section.
        if (key := field_name(command)) in shared and (isinstance(shared[key], dict) or key not in known)
    }
    methods = shared.pop("methods", {})
    if not isinstance(methods, dict):
        raise UserError(f"{name}: methods: expected methods with their settings, found {_shown(methods)}")
    if unknown := [str(method) for method in methods if method not in METHODS]:
        raise UserError(
            f"{name}: methods: unknown method '{unknown[0]}'; the nearest is '{nearest(unknown[0], METHODS)}'"
        )
    methods = {
        method: _section(settings, f"{name}: methods: {method}", AlignConfig) for method, settings in methods.items()
    }
    if wrong := [method for method, settings in methods.items() if "method" in settings]:
        raise UserError(f"{name}: methods: {wrong[0]}: found 'method', which is {wrong[0]} here; leave it out")
    _check_keys(shared, name, known, {*known, *map(field_name, COMMANDS), "methods"})
    return shared, sections, methods


def _section(content: Any, where: str, config: type[Config]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping of options, found {_shown(content)}")
    values = {field_name(key): value for key, value in content.items()}
    _check_keys(values, where, set(config.model_fields), set(config.model_fields))
    return values


def _check_keys(values: Mapping[str, Any], where: str, known: set[str], near: set[str]) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key[:100]}'; the nearest known key is '{nearest(key, near)}'")


def _shown(value: object) -> str:
    """A value for an error, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    return short.repr(value)
