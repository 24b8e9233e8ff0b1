"""The command line: a command's help and options are those of its class in `config.py`, its work is in `commands/`.

In: arguments. Out: exit code 0; 1 if `cache verify` finds damage or numbers are not finite; 2 for a mistake of the
user's, with one line on stderr that says what was expected, what was found and what to do.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperGroup

from .base_config import Config, flag
from .config_files import COMMANDS, field_name, load_config, profile_names, to_yaml
from .errors import user_errors
from .options import IN_FILE, nearest
from .report_config import JudgeConfig, TableConfig, TuneConfig

PANELS = ("Most used", "Data", "Model", "Method", "Optimisation", "Output", "Advanced")

# typer has a copy of click of its own, and hands out this child of the mistakes in arguments alone.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__base__)


class _CommandLine(TyperGroup):
    """All commands; a mistake in the arguments themselves gives one line too."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs a command and exits."""
        try:
            sys.exit(super().main(*args, **{**extra, "standalone_mode": False}))
        except _UsageError as error:
            typer.echo(_told(error), err=True)
            sys.exit(error.exit_code)


def _told(error: Any) -> str:
    """One line for a mistake in the arguments; the help, of many lines, where no command is named."""
    said = error.format_message()
    if hasattr(error, "possibilities"):  # an unknown option
        known = [name for parameter in error.ctx.command.params for name in parameter.opts] or ["--help"]
        near = flag(
            nearest(field_name(error.option_name.lstrip("-")), [field_name(name.lstrip("-")) for name in known])
        )
        return f"fpo: {error.option_name}: `{error.ctx.command_path}` has no such option; the nearest is {near}"
    return said if "\n" in said else f"fpo: {said.rstrip('.')}; --help lists what there is"


app = typer.Typer(
    cls=_CommandLine,
    help="Feature-level constrained preference optimization, in two offline stages. FPO_HOME is the folder of "
    "remembered hashes, decoded caches and copies of caches in stores (default ~/.cache/fpo); "
    "FPO_TRACEBACK=1 shows where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
cache_app = typer.Typer(help="Look into a cache.", no_args_is_help=True)
config_app = typer.Typer(help="Look into a configuration.", no_args_is_help=True)
show_app = typer.Typer(help="Print the resolved configuration of a command, or of all.", invoke_without_command=True)
app.add_typer(cache_app, name="cache")
app.add_typer(config_app, name="config")
config_app.add_typer(show_app, name="show")


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind | None, option]
    )


def _option(config: type[Config], name: str) -> inspect.Parameter:
    """The option of a field. Its text is read by pydantic, so that files and options obey the same rules."""
    field = config.model_fields[name]
    help_text = field.description or ""
    if field.default not in (None, ()) and "default" not in help_text:
        help_text += f" [default: {field.default}]"
    kinds = {*get_args(field.annotation), field.annotation}
    kind: Any = bool if bool in kinds else list[str] if isinstance(field.default, tuple) or name == "site" else str
    flags = f"{flag(name)}/--no-{flag(name)[2:]}" if kind is bool else flag(name)
    option = typer.Option(flags, help=help_text, show_default=False, rich_help_panel=_panel(config, name))
    return _parameter(name, kind, None, option)


def _panel(config: type[Config], name: str) -> str:
    """The heading under which `--help` lists a field: that of the class that declares it."""
    if name in config.first:
        return PANELS[0]
    owner = next(base for base in config.__mro__ if name in inspect.get_annotations(base))
    return cast(type[Config], owner).panel


def _config_option(default: str | None) -> Any:
    help_text = f"YAML file, or a profile: {', '.join(profile_names())}."
    help_text += f" [default: {default}]" if default else ""
    return typer.Option("--config", help=help_text, show_default=False, rich_help_panel=PANELS[0])


def _register(group: typer.Typer, config: type[Config], run: Callable[[Config, str | None], None]) -> None:
    """Makes a command of a class: its options, and what is to be done with the configuration that they make."""

    def command(**values: Any) -> None:
        name = values.pop("config")
        with user_errors(config.go_on):
            given = {key: value for key, value in values.items() if value not in (None, [])}
            run(load_config(config, name, given, from_command_line=True), name)

    fields = [name for name, field in config.model_fields.items() if field.json_schema_extra != IN_FILE]
    fields.sort(key=lambda name: PANELS.index(_panel(config, name)))
    options = [_option(config, name) for name in dict.fromkeys((*config.first, *fields))]
    parameters = [_parameter("config", str, config.profile, _config_option(config.profile)), *options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = config.__doc__
    group.command(config.command)(command)


def _run(config: Config, name: str | None) -> None:
    """Runs a command; what it names of the embedded world is made first."""
    config.check_ready()
    if name is not None and isinstance(config, TableConfig | TuneConfig):
        module = importlib.import_module(f".report.{'run' if isinstance(config, TableConfig) else 'tune'}", __package__)
        getattr(module, f"run_{config.command}")(name, config)
    elif isinstance(config, JudgeConfig):
        importlib.import_module(".report.judge", __package__).run_judge(config)
    else:
        from .commands import run_command
        from .world.world import provide

        run_command(provide(config))


for _config in COMMANDS.values():
    _register(app, _config, _run)


@app.command("merge")
def merge(
    run: Annotated[str, typer.Argument(help="Folder of the run, or hub id of the adapter.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder of the merged model.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="Model that the adapter belongs to; default the one that it names.")
    ] = None,
) -> None:
    """Add a LoRA adapter into its model's weights: a model that needs no PEFT."""
    with user_errors():
        from .commands.merge import run_merge

        run_merge(run, out, base)


CachePlace = Annotated[
    str, typer.Argument(help="Folder of the cache, or its URL in an object store.", show_default=False)
]


@cache_app.command("info")
def cache_info(place: CachePlace) -> None:
    """What is in a cache: pairs, sites, sizes, what was skipped, noise, provenance."""
    with user_errors():
        from .commands.cache import print_info

        print_info(place)


@cache_app.command("verify")
def cache_verify(place: CachePlace) -> None:
    """Check every byte of a cache; exit code 1 and the names of what is damaged."""
    with user_errors():
        from ..cache.reader import verify

        damages = verify(place)
    for damage in damages:
        typer.echo(damage)
    if damages:
        raise typer.Exit(1)
    typer.echo("sound")


@show_app.callback()
def config_show(context: typer.Context, config: Annotated[str | None, _config_option(None)] = None) -> None:
    """Print the resolved configuration of a command, with its options on top; without a command, that of all."""
    if context.invoked_subcommand is None:
        with user_errors():
            for name, command_config in COMMANDS.items():
                text = to_yaml(load_config(command_config, config, {}))
                typer.echo(f"{name}:\n" + "".join(f"  {line}\n" for line in text.splitlines()), nl=False)


for _config in COMMANDS.values():
    _register(show_app, _config, lambda config, name: typer.echo(to_yaml(config), nl=False))


def main() -> None:
    """Entry point of `fpo`."""
    app()


if __name__ == "__main__":
    main()
