"""The command line: one command a function.

What a command does is in `run_*.py`; its options are fields of `RunConfig`.

In: arguments. Out: exit code 0; 1 if `cache verify` finds damage or numbers are not finite; 2 for a mistake of the
user's, with one line on stderr that says what was expected, what was found and what to do.
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperGroup

from .config import RunConfig, load_config, profile_names, to_yaml
from .errors import user_errors

# typer has a copy of click of its own, and hands out this child of the mistakes in arguments alone.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__base__)


class _CommandLine(TyperGroup):
    """All commands; a mistake in the arguments themselves gives one line too."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs a command and exits."""
        try:
            sys.exit(super().main(*args, **{**extra, "standalone_mode": False}))
        except _UsageError as error:
            said = error.format_message()
            # Without a command it is the help, of many lines.
            typer.echo(said if "\n" in said else f"fpo: {said.rstrip('.')}; --help lists what there is", err=True)
            sys.exit(error.exit_code)


app = typer.Typer(
    cls=_CommandLine,
    help="Feature-level constrained preference optimization, in two offline stages. FPO_HOME is the folder of "
    "remembered hashes, decoded caches and copies of caches in stores (default ~/.cache/fpo); "
    "FPO_TRACEBACK=1 shows where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="Look into a cache.", no_args_is_help=True)
config_app = typer.Typer(help="Look into a configuration.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
app.add_typer(config_app, name="config")

Command = Callable[[RunConfig, frozenset[str]], None]

MODEL = ("model", "device", "attention", "dtype")
TRAINING = (
    *("epochs", "max_steps", "batch_size", "accumulation", "lr", "lr_scheduler", "lr_scheduler_kwargs"),
    *("warmup_steps", "optimizer", "max_grad_norm", "token_budget", "activation_checkpointing", "checkpoint_every"),
    *("compile", "seed", "resume"),
    *("logging_steps", "save_steps", "snapshot_steps", "report_to", "push_to_hub"),
)
DATA = (
    *("dataset", "map", "dataset_config", "split", "chat_template"),
    *("limit", "drop_ties", "max_length", "max_prompt_length"),
)


def _option(name: str) -> inspect.Parameter:
    """The command-line option of a field of `RunConfig`; not given is None."""
    field = RunConfig.model_fields[name]
    default = (
        "" if field.default in (None, ()) or "default" in (field.description or "") else f" [default: {field.default}]"
    )
    kinds = {kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)}
    kind: Any = str  # pydantic reads the text, so that files and options obey the same rules
    flag = f"--{name.replace('_', '-')}"
    if bool in kinds or field.annotation is bool:
        kind, flag = bool, f"{flag}/--no-{name.replace('_', '-')}"
    elif isinstance(field.default, tuple):
        kind = list[str]
    option = typer.Option(flag, help=f"{field.description}{default}", show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def configured(
    group: typer.Typer, name: str, *fields: str, resume: str = "nothing was written"
) -> Callable[[Command], Command]:
    """Registers a command that takes `--config` and the given fields of `RunConfig` as options.

    What it names of the embedded world is made first, except for `config show`.
    """
    config_help = f"YAML file, or a profile: {', '.join(profile_names())}."
    config_option = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, typer.Option("--config", help=config_help, show_default=False)],
    )

    def register(function: Command) -> Command:
        def command(**values: Any) -> None:
            config = values.pop("config")
            given = {key: value for key, value in values.items() if value not in (None, [])}
            with user_errors(resume):
                settings = load_config(config, given, name if group is app else None)
                if group is app:
                    from .world.world import provide

                    settings = provide(settings, fields)
                function(settings, frozenset(given))

        parameters = [config_option, *map(_option, fields)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__ = function.__doc__
        group.command(name)(command)
        return function

    return register


@configured(
    app,
    "precompute",
    *MODEL,
    *DATA,
    *("turns", "date", "sae", "allow_poor_sae", "out", "keep_features", "token_budget", "shard_size", "compile"),
    *("rank", "world_size", "engine", "workers", "repair"),
    resume="finished shards are kept: run the same command again to go on",
)
def precompute(config: RunConfig, given: frozenset[str]) -> None:
    """Stage one: run the frozen reference and its SAEs over preference data, once, into a cache.

    Needs --model, --dataset, --sae and --out, here or in the configuration.
    """
    from .commands.precompute import run_precompute

    run_precompute(config)


@configured(
    app,
    "align",
    *MODEL,
    *("chat_template", "cache", "eval_cache", "trust_hashes", "out", "method", "reference", "sae", "site"),
    *("beta", "alpha", "gamma", "kl_beta", "stop_gradient", "top_k"),
    *TRAINING,
    *("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "merge", "allow_different_start", "eval_steps"),
    resume="--resume goes on from the last checkpoint",
)
def align(config: RunConfig, given: frozenset[str]) -> None:
    """Stage two: train the policy against a cache; the reference model is not loaded.

    Needs --model, --cache and --out, fpo also --sae, here or in the configuration.
    """
    from .commands.align import run_align

    run_align(config, given)


@configured(
    app,
    "sft",
    *MODEL,
    *(field for field in DATA if field not in ("drop_ties", "max_prompt_length")),
    *("date", "out", *TRAINING),
    resume="--resume goes on from the last checkpoint",
)
def sft(config: RunConfig, given: frozenset[str]) -> None:
    """Fine-tune a model on conversations (UltraChat's shape): what preference optimization starts from.

    Needs --model, --dataset and --out, here or in the configuration.
    """
    from .commands.sft import run_sft

    run_sft(config, given)


@configured(
    app,
    "evaluate",
    *MODEL,
    *("base", "cache", "trust_hashes", "method", "reference", "sae", "site", "top_k", "token_budget"),
    *("prompts", "samples", "max_new_tokens", "temperature", "top_p", "generation_batch", "outputs", "questions"),
    *("seed", "out"),
    resume="no metrics.json was written: run the same command again",
)
def evaluate(config: RunConfig, given: frozenset[str]) -> None:
    """Measure a policy on a held-out cache: accuracy, KL and feature MSE to the reference, diversity; or write answers.

    Needs --model and --out, and --cache or --outputs with --questions, here or in the configuration.
    """
    from .commands.evaluate import run_evaluate

    run_evaluate(config, given)


@configured(
    app,
    "train-sae",
    *("model", "device", "attention", *DATA, "site", "width", "tokens", "target_l0", "seed", "out"),
    resume="nothing was written: run the same command again",
)
def train_sae(config: RunConfig, given: frozenset[str]) -> None:
    """Train a JumpReLU SAE on the model's own activations, for models that have no public one.

    Needs --model, --dataset, --site and --out, here or in the configuration.
    """
    from .commands.train_sae import run_train_sae

    run_train_sae(config)


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


Profile = Annotated[str, typer.Option("--config", help="Profile or YAML file.")]
Jobs = Annotated[int | None, typer.Option("--jobs", help=RunConfig.model_fields["jobs"].description, min=1)]
GO_ON = "finished steps are kept: run the same command again to go on"


@app.command("table")
def table(
    config: Profile = "embedded",
    ablations: Annotated[bool, typer.Option("--ablations", help="The ablations instead of the comparison.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every step, what it reads, and what is missing; run nothing.")
    ] = False,
    runs: Annotated[Path | None, typer.Option("--runs", help="Folder of the runs; default runs/<profile>.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder of the tables; default results/<profile>.")] = None,
    jobs: Jobs = None,
) -> None:
    """The paper's comparison: every method under every seed, evaluated; tables, figures and a page."""
    given = {"runs": runs, "out": out, "jobs": jobs}
    with user_errors(GO_ON):
        settings = load_config(config, {name: value for name, value in given.items() if value is not None}, "table")
        from .report.run import run_table

        run_table(config, settings, ablations=ablations, dry_run=dry_run)


@app.command("tune")
def tune(
    config: Profile = "embedded",
    runs: Annotated[Path | None, typer.Option("--runs", help="Folder of the runs; default runs/<profile>.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder of the log; default results/<profile>.")] = None,
    jobs: Jobs = None,
) -> None:
    """Search learning rate and β of every method on the validation split, with one budget for all."""
    given = {"runs": runs, "out": out, "jobs": jobs}
    with user_errors(GO_ON):
        settings = load_config(config, {name: value for name, value in given.items() if value is not None}, "tune")
        from .report.tune import run_tune

        run_tune(config, settings)


CachePlace = Annotated[
    str, typer.Argument(help="Folder of the cache, or its URL in an object store.", show_default=False)
]


@cache_app.command("info")
def cache_info(place: CachePlace) -> None:
    """What is in a cache: pairs, sites, sizes, what was skipped, noise, provenance."""
    from .commands.cache_info import print_info

    with user_errors():
        print_info(place)


@cache_app.command("verify")
def cache_verify(place: CachePlace) -> None:
    """Check every byte of a cache; exit code 1 and the names of what is damaged."""
    from ..cache.reader import verify

    with user_errors():
        damages = verify(place)
    for damage in damages:
        typer.echo(damage)
    if damages:
        raise typer.Exit(1)
    typer.echo("sound")


@configured(config_app, "show", *RunConfig.model_fields)
def config_show(config: RunConfig, given: frozenset[str]) -> None:
    """Print the resolved configuration."""
    typer.echo(to_yaml(config), nl=False)


def main() -> None:
    """Entry point of `fpo`."""
    app()


if __name__ == "__main__":
    main()
