"""The run configuration: every option of every command, from a YAML file or a profile, options on top.

In: a file or profile name and the options given. Out: one frozen, validated `RunConfig`, which is written whole into
every output. A field's description is the option's help.
"""

import datetime
import difflib
import importlib.resources
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from ..cache import files
from ..stages.train.methods import METHODS, MethodName
from .plain_yaml import field_name, read_yaml, write_yaml

# What `for` of a configuration file may name beside methods; those that read a method's settings; those that may write
# into a store.
COMMANDS = ("precompute", "align", "train-sae", "sft", "evaluate", "table", "tune")
METHOD_COMMANDS = (None, "align")
STORE_COMMANDS = (None, "precompute")

# A folder, or text that is a URL: of `s3://bucket` a Path would make `s3:/bucket`.
Place = Annotated[files.Place, BeforeValidator(lambda value: files.as_place(value) if type(value) is str else value)]

# YAML reads a day that is not quoted as one.
Day = Annotated[
    str,
    BeforeValidator(lambda value: value.isoformat() if type(value) is datetime.date else value),
    Field(pattern=r"^\d{4}-\d{2}-\d{2}$"),
]


def _mapping(value: Any) -> Any:
    """A mapping, which on the command line is JSON."""
    if not isinstance(value, str):
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("expected each key once")
        return found

    try:
        return json.loads(value, object_pairs_hook=once)
    except ValueError as error:
        raise ValueError(f"expected a mapping in JSON, as '{{\"min_lr\": 1e-8}}' ({error})") from error


class RunConfig(BaseModel):
    """All settings; a command reads those that its `--help` lists."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="Causal LM: hub id, folder, .gguf file, or package:NAME/FILE.gguf.")
    base: str | None = Field(
        None, description="Model that the adapter given as --model belongs to; default the one that it names."
    )
    dataset: str | None = Field(
        None, description="Preference data (sft: conversations): hub id, Parquet/JSON/JSONL/CSV/TSV file, or folder."
    )
    map: tuple[str, ...] = Field(
        (), description="Rename a column of the data: NEW=OLD, as chosen=preferred. Repeatable."
    )
    dataset_config: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train_prefs", description="Split of the data set (UltraChat's for sft is train_sft).")
    chat_template: str | None = Field(
        None, description="Jinja file; default the tokenizer's, or Gemma's turns where it has none."
    )
    date: Day | None = Field(
        None,
        description="Day that it is to a chat template that reads the clock, YYYY-MM-DD; default the day on which the "
        "cache or run is begun.",
    )
    sae: tuple[str, ...] = Field(
        (), description="SAE: release:sae_id, a folder that SAELens saved, or params.npz@site. Repeatable."
    )
    allow_poor_sae: bool = Field(
        False, description="Use an SAE of which hardly a feature fires on this model, or which explains nothing of it."
    )
    out: Place | None = Field(None, description="Folder to write; precompute: or a URL, as s3://bucket/cache.")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu or cuda.")
    attention: Literal["auto", "eager", "packed", "packed_flex"] = Field(
        "auto", description="auto (the fastest that is exact for model and device), eager, packed or packed_flex."
    )
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Recipe of both stages: fp32, or bf16 autocast.")
    compile: bool | None = Field(
        None, description="Compile a model's layers (torch.compile); default on a GPU, not on a CPU."
    )
    token_budget: PositiveInt = Field(2048, description="Tokens of a packed row; sets memory (results to rounding).")
    seed: int = Field(0, description="Seed of data order, initialisation and sampling.")

    limit: PositiveInt | None = Field(None, description="Use only the first N raw rows; default all.")
    turns: Literal["all", "last"] = Field(
        "all", description="Assistant turns that are learnt of a response of several: all or the last."
    )
    drop_ties: bool = Field(False, description="Skip pairs whose scores are equal (default: kept and counted).")
    keep_features: PositiveInt | Literal["all"] = Field(
        512, description="Largest features kept per response and site, or 'all' that are not zero."
    )
    max_length: PositiveInt = Field(1024, description="Longest prompt and response (sft: conversation), tokens.")
    max_prompt_length: PositiveInt = Field(512, description="Longest prompt, tokens; its beginning is cut.")
    shard_size: PositiveInt = Field(1024, description="Raw rows of a shard.")
    rank: NonNegativeInt | None = Field(
        None, description="Number of this worker, from 0; default what torchrun or SLURM says."
    )
    world_size: PositiveInt | None = Field(
        None, description="Workers that share the cache out; default what torchrun or SLURM says."
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="Who hands out shards: local (each worker takes its own) or ray (a pool of workers)."
    )
    repair: bool = Field(
        False, description="Read every byte of the cache in --out and compute the damaged shards again, no other."
    )
    workers: PositiveInt | None = Field(None, description="Ray: workers of the pool; default one a GPU, or one.")

    cache: Place | None = Field(
        None, description="Cache that stage one wrote: its folder, or its URL, as hf://datasets/OWNER/NAME."
    )
    eval_cache: Place | None = Field(None, description="Cache of a held-out split, same in all else.")
    trust_hashes: bool = Field(
        False, description="Skip the SHA-256 of shards that were decoded before, and of their decoded copy."
    )
    method: MethodName = Field("fpo", description=f"Objective: {', '.join(METHODS)}.")
    reference: str | None = Field(
        None, description="Live reference of tdpo1, tdpo2, simpo-kl and of evaluate's KL (as --model)."
    )
    site: tuple[str, ...] = Field(
        (),
        description="Site: of the features compared (align, evaluate; default the cache's only one; repeatable, D_F is "
        "their mean), or of the SAE (train-sae).",
    )
    beta: PositiveFloat | None = Field(None, description="β; default the method's (0.1; simpo, simpo-kl 2).")
    alpha: float | None = Field(None, ge=0, description="α, weight of the constraint; default 0.5; 0 is off.")
    gamma: float | None = Field(None, description="γ, constant margin of simpo and simpo-kl; default 0.5.")
    kl_beta: PositiveFloat | None = Field(None, description="β of simpo-kl's constraint; default 0.1.")
    stop_gradient: bool | None = Field(None, description="Hold D(y_w) fixed in the constraint; default yes.")
    top_k: PositiveInt = Field(50, description="k of D_F, features.")

    epochs: PositiveFloat = Field(1.0, description="Passes over the data.")
    max_steps: PositiveInt | None = Field(None, description="Stop after N steps, whatever --epochs says.")
    batch_size: PositiveInt = Field(32, description="Pairs (sft: conversations) per optimiser step, over all devices.")
    accumulation: PositiveInt = Field(1, description="Batches per optimiser step that --batch-size is split into.")
    lr: PositiveFloat = Field(5e-7, description="Peak learning rate.")
    lr_scheduler: str = Field("constant_with_warmup", description="Schedule, by the Trainer's names.")
    lr_scheduler_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_mapping)] = Field(
        None,
        description="The schedule's own settings in JSON: '{\"min_lr\": 1e-8}' (file: a mapping); default none.",
    )
    warmup_steps: float = Field(150, ge=0, description="Linear warm-up, steps (below 1: share of all steps).")
    optimizer: Literal["adam", "rmsprop"] = Field("adam", description="Optimiser: adam or rmsprop.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping; 0 is off.")
    activation_checkpointing: bool = Field(False, description="Recompute layers in backward: less memory, slower.")
    checkpoint_every: PositiveInt = Field(1, description="With --activation-checkpointing: recompute every N-th layer.")
    lora_r: PositiveInt | None = Field(None, description="Train a LoRA adapter of this rank (PEFT); default none.")
    lora_alpha: PositiveFloat | None = Field(None, description="LoRA's α, over r the adapter's scale; default 2 r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input, in training.")
    lora_targets: tuple[str, ...] = Field(
        (), description="Modules that get an adapter, as q_proj; default all linear ones but the head. Repeatable."
    )
    merge: bool = Field(False, description="With --lora-r: save the merged model, not the adapter.")
    resume: bool = Field(False, description="Go on from the last checkpoint in --out.")
    allow_different_start: bool = Field(
        False, description="Train although the policy is not the cache's reference; recorded."
    )
    logging_steps: PositiveInt = Field(10, description="Steps between log lines.")
    save_steps: PositiveInt = Field(200, description="Steps between checkpoints (the last two are kept).")
    eval_steps: PositiveInt | None = Field(None, description="Steps between evaluations; default once, at the end.")
    report_to: str = Field("none", description="Tracker, by the Trainer's names (wandb, tensorboard, ...).")
    push_to_hub: bool = Field(False, description="Upload the result to the hub.")

    snapshot_steps: PositiveInt | None = Field(
        None, description="Steps between snapshots (weights alone, all kept), for curves over training; default none."
    )

    width: PositiveInt = Field(4096, description="Features of the SAE.")
    tokens: PositiveInt = Field(200_000, description="Tokens to train the SAE on.")
    target_l0: PositiveFloat = Field(64.0, description="Features that are to fire per token.")

    prompts: NonNegativeInt = Field(100, description="Prompts to sample answers to; 0 measures no diversity.")
    samples: PositiveInt = Field(25, description="Sampled answers a prompt.")
    max_new_tokens: PositiveInt = Field(512, description="Longest generated answer, tokens.")
    temperature: float = Field(
        1.0, ge=0, description="Temperature of sampling, 0 is greedy; benchmarks have their own if not given."
    )
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus of sampling.")
    generation_batch: PositiveInt = Field(32, description="Answers generated at a time; sets memory.")
    outputs: Literal["alpaca-eval", "arena-hard", "mt-bench"] | None = Field(
        None, description="Write answers to --questions in this benchmark's format, for its judge."
    )
    questions: Path | None = Field(None, description="The benchmark's questions, in its own file format.")

    seeds: tuple[int, ...] = Field((0,), description="Seeds of the comparison, each a run of every method. Repeatable.")
    heldout_split: str = Field("test_prefs", description="Split that the comparison is measured on.")
    validation_split: str | None = Field(None, description="Split that tune chooses on.")
    ablation_sites: tuple[str, ...] = Field((), description="Sites of the ablation, one run each. Repeatable.")
    ablation_sums: tuple[str, ...] = Field(
        (), description="Several sites at once, joined by '+', of the ablation, one run each. Repeatable."
    )
    jobs: PositiveInt = Field(1, description="Runs of the comparison at a time; each has its share of the cores.")
    runs: Path | None = Field(None, description="Folder of the comparison's runs; default runs/<profile>.")


def profile_names() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = importlib.resources.files(__package__) / "profiles"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name: str | None, given: Mapping[str, Any], command: str | None = None) -> RunConfig:
    """Resolves a configuration.

    A file's `for` holds settings of one command or one method, which win over the rest of the file:
    `for: {sft: {lr: 2.0e-5}, dpo: {beta: 0.1}}`. Those of a method are read by the commands that have one.

    Args:
        name: a YAML file, or a profile's name; None for defaults.
        given: options, by field name; they win over the file.
        command: the command that is to run; None for any.

    Raises:
        FileNotFoundError: if there is no such file or profile.
        ValueError: naming the key, what was expected and what was found; an unknown key with the nearest known one.
    """
    content, where = ({}, "options") if name is None else _read(name)
    sections = _sections(content.pop("for", {}), where)
    values = content | sections.get(command or "", {})
    if command in METHOD_COMMANDS:
        values |= sections.get(str({**values, **given}.get("method", RunConfig.model_fields["method"].default)), {})
    _check_keys(content, where)
    try:
        config = RunConfig(**{**values, **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        place = f"--{key.replace('_', '-')}" if key in given else f"{where}: {key}"
        raise ValueError(f"{place}: {first['msg']}, found {_shown(first['input'])}") from error
    if isinstance(config.out, str) and command not in STORE_COMMANDS:
        raise ValueError(f"--out: expected a folder, found {config.out}; only `fpo precompute` writes into a store")
    return config


def has_section(name: str, command: str) -> bool:
    """Whether a file's `for` has settings of this command."""
    content, where = _read(name)
    return command in _sections(content.get("for", {}), where)


def _sections(content: Any, where: str) -> dict[str, dict[str, Any]]:
    """The settings under `for`, by command or method."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: for: expected commands or methods with their settings, found {_shown(content)}")
    for name, settings in content.items():
        if name not in (*COMMANDS, *METHODS):
            raise ValueError(f"{where}: for: expected one of {', '.join((*COMMANDS, *METHODS))}, found '{name}'")
        if not isinstance(settings, dict):
            raise ValueError(f"{where}: for: {name}: expected a mapping of options, found {_shown(settings)}")
    sections = {name: {field_name(key): value for key, value in part.items()} for name, part in content.items()}
    for name, settings in sections.items():
        _check_keys(settings, f"{where}: for: {name}")
        if name in METHODS and "method" in settings:
            raise ValueError(f"{where}: for: {name}: found 'method', which is {name} here; leave it out")
    return sections


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    for key in values:
        if key not in RunConfig.model_fields:
            near = difflib.get_close_matches(key[:100], RunConfig.model_fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key '{key[:100]}'; the nearest known key is '{near}'")


def _shown(value: object) -> str:
    """A value for an error, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    return short.repr(value)


def _read(name: str) -> tuple[dict[str, Any], str]:
    path = Path(name).expanduser()
    if path.is_file():
        text = path.read_bytes()
    elif name in profile_names():
        text = (importlib.resources.files(__package__) / "profiles" / f"{name}.yaml").read_bytes()
    else:
        raise FileNotFoundError(
            f"--config: expected a YAML file or one of the profiles {', '.join(profile_names())}, found no '{name}'"
        )
    try:
        content = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected a mapping of options, found {type(content).__name__}")
    return {field_name(key): value for key, value in content.items()}, name


def to_yaml(config: RunConfig, extra: Mapping[str, Any] | None = None) -> str:
    """The configuration whole, as YAML; `extra` keys after it."""
    content = {**config.model_dump(mode="json"), **(extra or {})}
    return write_yaml(content)
