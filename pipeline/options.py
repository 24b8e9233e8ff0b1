"""The options that several commands share, in groups; `config.py` makes a command's class of them.

In: values from the command line or a YAML file. Out: validated fields. A field's description is the option's help, a
class's `panel` the heading under which `--help` lists its fields.
"""

import datetime
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from ..cache import files
from ..stages.train.methods import METHODS, MethodName

# Names that people know from the Trainer and TRL.
SYNONYMS = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "output_dir": "out",
    "model_name_or_path": "model",
    "dataset_name": "dataset",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that means the same as `name`, or is spelt most like it."""
    known = sorted(known)
    if SYNONYMS.get(name) in known:
        return SYNONYMS[name]
    return difflib.get_close_matches(name[:100], known, n=1, cutoff=0.0)[0]


def choice(known: Iterable[str], synonyms: Mapping[str, str]) -> Callable[[Any], Any]:
    """A validator that reads a choice without regard to case, hyphens and the like, and knows its other names."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    by_name = {plain(name): name for name in known} | {plain(name): meant for name, meant in synonyms.items()}
    names = list(dict.fromkeys(by_name.values()))

    def read(value: Any) -> Any:
        if value is None or (isinstance(value, str) and plain(value) in by_name):
            return value if value is None else by_name[plain(value)]
        near = f"; the nearest is '{by_name[nearest(plain(value), by_name)]}'" if isinstance(value, str) else ""
        raise ValueError(f"expected {', '.join(names[:-1])} or {names[-1]}{near}")

    return read


def _mapping(value: Any) -> Any:
    """A mapping, which is JSON on the command line."""
    if not isinstance(value, str):
        return value

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("expected each key once")
        return found

    try:
        return json.loads(value, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a mapping in JSON, as '{{\"min_lr\": 1e-8}}' ({error})") from error


def _place(value: Any) -> Any:
    return files.as_place(value) if isinstance(value, str) else value


def _folder(value: Any) -> Any:
    place = _place(value)
    if isinstance(place, str):
        raise ValueError("expected a folder; `fpo precompute` alone writes into an object store")
    return place


def _day(value: Any) -> Any:
    """YAML reads a day without quotes as a date."""
    return value.isoformat() if type(value) is datetime.date else value


def _on_calendar(value: str) -> str:
    try:
        datetime.date.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"expected a day as YYYY-MM-DD ({error})") from error
    return value


# A folder, or the URL of one; a folder of this machine alone; a day.
Place = Annotated[files.Place, BeforeValidator(_place)]
Folder = Annotated[Path, BeforeValidator(_folder)]
Day = Annotated[str, BeforeValidator(_day), Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_on_calendar)]

Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    BeforeValidator(choice(("auto", "cpu", "cuda"), {"gpu": "cuda"})),
]
Attention = Annotated[
    Literal["auto", "eager", "packed", "packed_flex"],
    BeforeValidator(
        choice(("auto", "eager", "packed", "packed_flex"), {"sdpa": "packed", "flex_attention": "packed_flex"})
    ),
]
Recipe = Annotated[
    Literal["fp32", "bf16"],
    BeforeValidator(choice(("fp32", "bf16"), {"float32": "fp32", "bfloat16": "bf16"})),
]
read_method = choice(METHODS, {})
Method = Annotated[MethodName, BeforeValidator(read_method)]
Optimizer = Annotated[
    Literal["adam", "rmsprop"],
    BeforeValidator(choice(("adam", "rmsprop"), {"adamw": "adam", "adamw_torch": "adam", "adamw_torch_fused": "adam"})),
]


NEEDED: dict[str, Any] = {"needed": True}
IN_FILE: dict[str, Any] = {"in_file": True}


def option(default: Any, description: str, **limits: Any) -> Any:
    """A field that is an option."""
    return Field(default, description=description, **limits)


def needed(description: str) -> Any:
    """A field without which the command cannot run; it is None until somebody gives it (see `Config.check_ready`)."""
    return Field(None, description=description, json_schema_extra=NEEDED)


def in_file(default: Any, description: str) -> Any:
    """A field that a configuration file sets, and no option."""
    return Field(default, description=description, json_schema_extra=IN_FILE)


class Options(BaseModel):
    """The base of all groups of options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    panel: ClassVar[str] = "Advanced"


class ModelOptions(Options):
    """Which model, and how it computes."""

    panel = "Model"
    model: str = needed("Causal LM: hub id, folder, .gguf file, or package:NAME/FILE.gguf.")
    device: Device = option(
        "auto", "auto (a GPU where there is one), cpu or cuda; CUDA_VISIBLE_DEVICES chooses among GPUs."
    )
    attention: Attention = option(
        "auto", "auto (the fastest that is exact for model and device), eager, packed or packed_flex."
    )


class RecipeOptions(Options):
    """The precision of a forward pass, and how many tokens it holds."""

    panel = "Model"
    dtype: Recipe = option("fp32", "Recipe of both stages: fp32, or bf16 autocast.")
    token_budget: PositiveInt = option(2048, "Tokens of a packed row: sets memory, changes rounding alone.")


class CompileOptions(Options):
    """Whether layers are compiled."""

    compile: bool | None = option(None, "Compile a model's layers (torch.compile); default on a GPU, not on a CPU.")


class ChatOptions(Options):
    """How turns become text."""

    panel = "Data"
    chat_template: str | None = option(None, "Jinja file; default the tokenizer's, or Gemma's turns where it has none.")


class DateOptions(Options):
    """For chat templates that read the clock."""

    panel = "Data"
    date: Day | None = option(
        None,
        "Today's date for a chat template that reads the clock, YYYY-MM-DD; default the day on which the "
        "cache or run is begun.",
    )


class DataOptions(ChatOptions):
    """Which rows are read, and how long they may be."""

    panel = "Data"
    dataset: str = needed("Preference data (sft: conversations): hub id, Parquet/JSON/JSONL/CSV/TSV file, or folder.")
    map: tuple[str, ...] = option((), "Rename a column of the data: NEW=OLD, as chosen=preferred. Repeatable.")
    dataset_config: str | None = option(None, "Configuration of a hub data set.")
    split: str = option("train_prefs", "Split of the data set (UltraChat's for sft is train_sft).")
    limit: PositiveInt | None = option(None, "Use only the first N raw rows; default all.")
    max_length: PositiveInt = option(1024, "Longest prompt and response (sft: conversation), tokens.")


class PreferenceOptions(DataOptions):
    """What pairs have and conversations lack."""

    panel = "Data"
    drop_ties: bool = option(False, "Skip pairs whose scores are equal (default: kept and counted).")
    max_prompt_length: PositiveInt = option(512, "Longest prompt, tokens; its beginning is cut.")


class CacheOptions(Options):
    """A cache to read."""

    panel = "Data"
    cache: Place | None = option(
        None, "Cache that stage one wrote: its folder, or its URL, as hf://datasets/OWNER/NAME."
    )
    trust_hashes: bool = option(
        False, "Skip the SHA-256 of shards that were decoded before, and of their decoded copy."
    )


class SAEOptions(Options):
    """Whose features are computed."""

    panel = "Model"
    sae: tuple[str, ...] = option(
        (), "SAE: release:sae_id, a folder that SAELens saved, or params.npz@site. Repeatable."
    )


class FeatureOptions(SAEOptions):
    """Which features are compared."""

    panel = "Method"
    site: tuple[str, ...] = option(
        (), "Site whose features are compared; default the cache's only one. Repeatable: D_F is their mean."
    )
    top_k: PositiveInt = option(50, "k of D_F, features.")


class MethodOptions(FeatureOptions):
    """The objective."""

    panel = "Method"
    method: Method = option("fpo", f"Objective: {', '.join(METHODS)}.")
    reference: str | None = option(None, "Live reference of tdpo1, tdpo2, simpo-kl and of evaluate's KL (as --model).")


class SeedOptions(Options):
    """The random numbers."""

    seed: int = option(0, "Seed of data order, initialisation and sampling.")


class OptimisationOptions(SeedOptions, RecipeOptions, CompileOptions):
    """The training of a language model."""

    panel = "Optimisation"
    epochs: PositiveFloat = option(1.0, "Passes over the data.")
    max_steps: PositiveInt | None = option(None, "Stop after N steps, whatever --epochs says.")
    batch_size: PositiveInt = option(32, "Pairs (sft: conversations) per optimiser step, over all devices.")
    accumulation: PositiveInt = option(1, "Batches per optimiser step that --batch-size is split into.")
    lr: PositiveFloat = option(5e-7, "Peak learning rate.")
    lr_scheduler: str = option("constant_with_warmup", "Schedule, by the Trainer's names.")
    lr_scheduler_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_mapping)] = option(
        None, "The schedule's own settings in JSON: '{\"min_lr\": 1e-8}' (file: a mapping); default none."
    )
    warmup_steps: float = option(150, "Linear warm-up, steps (below 1: share of all steps).", ge=0)
    optimizer: Optimizer = option("adam", "Optimiser: adam (AdamW without weight decay) or rmsprop.")
    max_grad_norm: float = option(1.0, "Gradient clipping; 0 is off.", ge=0)
    activation_checkpointing: bool = option(False, "Recompute layers in backward: less memory, slower.")
    checkpoint_every: PositiveInt = option(1, "With --activation-checkpointing: recompute every N-th layer.")


class OutputOptions(Options):
    """What a training writes, and how often."""

    panel = "Output"
    out: Folder = needed("Folder to write.")
    resume: bool = option(False, "Go on from the last checkpoint in --out.")
    logging_steps: PositiveInt = option(10, "Steps between log lines.")
    save_steps: PositiveInt = option(200, "Steps between checkpoints (the last two are kept).")
    snapshot_steps: PositiveInt | None = option(
        None, "Steps between snapshots (weights alone, all kept), for curves over training; default none."
    )
    report_to: str = option("none", "Tracker, by the Trainer's names (wandb, tensorboard, ...).")
    push_to_hub: bool = option(False, "Upload the result to the hub.")


class AdapterOptions(Options):
    """LoRA."""

    panel = "Model"
    lora_r: PositiveInt | None = option(None, "Train a LoRA adapter of this rank (PEFT); default none.")
    lora_alpha: PositiveFloat | None = option(None, "LoRA's α, over r the adapter's scale; default 2 r.")
    lora_dropout: float = option(0.0, "Dropout on the adapter's input, in training.", ge=0, lt=1)
    lora_targets: tuple[str, ...] = option(
        (), "Modules that get an adapter, as q_proj; default all linear ones but the head. Repeatable."
    )
    merge: bool = option(False, "With --lora-r: save the merged model, not the adapter.")


class WorkerOptions(Options):
    """How stage one is shared out."""

    shard_size: PositiveInt = option(1024, "Raw rows of a shard.")
    rank: NonNegativeInt | None = option(None, "Number of this worker, from 0; default what torchrun or SLURM says.")
    world_size: PositiveInt | None = option(
        None, "Workers that share the cache out; default what torchrun or SLURM says."
    )
    engine: Literal["local", "ray"] = option(
        "local", "Who hands out shards: local (each worker takes its own) or ray (a pool of workers)."
    )
    workers: PositiveInt | None = option(None, "Ray: workers of the pool; default one a GPU, or one.")
    repair: bool = option(
        False, "Read every byte of the cache in --out and compute the damaged shards again, no other."
    )
