"""What each command can be told: one class a command, whose fields are its options and the keys of its YAML file.

In: values by field name (`config_files.py` reads them). Out: a frozen instance whose values fit together, or one line
that says which do not.
"""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from ..cache.errors import UserError
from ..stages.train.methods import METHODS
from .base_config import Config, flag
from .options import (
    AdapterOptions,
    CacheOptions,
    ChatOptions,
    CompileOptions,
    DataOptions,
    DateOptions,
    Folder,
    MethodOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    Place,
    PreferenceOptions,
    RecipeOptions,
    SAEOptions,
    SeedOptions,
    WorkerOptions,
    needed,
    option,
)


class PrecomputeConfig(
    Config, ModelOptions, RecipeOptions, SAEOptions, PreferenceOptions, DateOptions, CompileOptions, WorkerOptions
):
    """Stage one: run the frozen reference and its SAEs over preference data, once, into a cache."""

    command = "precompute"
    go_on = "finished shards are kept: run the same command again to go on"
    first = ("model", "dataset", "sae", "out", "split")
    panel = "Output"
    out: Place = needed("Folder to write, or a URL, as s3://bucket/cache.")
    turns: Literal["all", "last"] = option(
        "all", "Assistant turns that are learnt of a response of several: all or the last."
    )
    allow_poor_sae: bool = option(
        False, "Use an SAE of which hardly a feature fires on this model, or which explains nothing of it."
    )
    keep_features: PositiveInt | Literal["all"] = option(
        512, "Largest features kept per response and site, or 'all' that are not zero."
    )

    def needs(self) -> list[str]:
        """Without an SAE there are no features to keep."""
        return [*super().needs(), "sae"]

    def check(self) -> None:
        """Workers: both numbers or none, and a pool only of Ray's."""
        if (self.rank is None) != (self.world_size is None):
            missing = "--rank" if self.rank is None else "--world-size"
            raise UserError(f"{missing}: expected --rank and --world-size together, found one; give both or neither")
        if self.workers is not None and self.engine == "local":
            raise UserError(
                "--workers: only --engine ray reads it; leave it out, or start several processes with torchrun"
            )
        if self.repair and self.engine != "local":
            raise UserError("--repair: expected one worker, which reads every shard, found --engine ray; leave one out")


class TrainingConfig(Config, ModelOptions, OptimisationOptions, OutputOptions):
    """What `fpo align` and `fpo sft` have in common."""

    go_on = "--resume goes on from the last checkpoint"

    def check(self) -> None:
        """Options of which one makes the other mean nothing."""
        if {"epochs", "max_steps"} <= self._given:
            raise UserError("--epochs: --max-steps alone says when to stop; leave one of them out")
        if self.lr_scheduler == "constant":
            self.refuse("the schedule 'constant' ignores it; use constant_with_warmup", "warmup_steps")
        if not self.activation_checkpointing:
            self.refuse("no layer is recomputed without --activation-checkpointing; add it", "checkpoint_every")


class AlignConfig(TrainingConfig, ChatOptions, CacheOptions, MethodOptions, AdapterOptions):
    """Stage two: train the policy against a cache; the reference model is not loaded.

    Method fpo needs --sae too; tdpo1, tdpo2 and simpo-kl need --reference.
    """

    command = "align"
    first = ("model", "cache", "out", "method", "sae")
    panel = "Method"
    eval_cache: Place | None = option(None, "Cache of a held-out split, same in all else.")
    beta: PositiveFloat | None = option(None, "β; default the method's (0.1; simpo, simpo-kl 2).")
    alpha: float | None = option(None, "α, weight of the constraint; default 0.5; 0 is off.", ge=0)
    gamma: float | None = option(None, "γ, constant margin of simpo and simpo-kl; default 0.5.")
    kl_beta: PositiveFloat | None = option(None, "β of simpo-kl's constraint; default 0.1.")
    stop_gradient: bool | None = option(None, "Hold D(y_w) fixed in the constraint; default yes.")
    allow_different_start: bool = option(False, "Train although the policy is not the cache's reference; recorded.")
    eval_steps: PositiveInt | None = option(None, "Steps between evaluations; default once, at the end.")

    def needs(self) -> list[str]:
        """A feature constraint needs SAEs, a KL a live reference."""
        divergence = METHODS[self.method].divergence
        more = {"features": ["sae"], "kl": ["reference"], None: []}[divergence]
        return [*super().needs(), "cache", *more]

    def check(self) -> None:
        """Options that this method, or a training without an adapter or held-out pairs, would ignore."""
        super().check()
        divergence = METHODS[self.method].divergence
        if divergence != "kl":
            self.refuse(f"method {self.method} has no use for it", "reference")
        if divergence != "features":
            self.refuse(f"method {self.method} has no feature constraint", "sae", "site", "top_k")
        if self.eval_cache is None:
            self.refuse("there is nothing to evaluate on without --eval-cache", "eval_steps")
        if self.lora_r:
            if self.model and self.model.endswith(".gguf") and not self.merge:
                raise UserError(
                    "--lora-r: an adapter names the model it belongs to, which a GGUF file cannot be; add --merge"
                )
            if self.snapshot_steps:
                raise UserError(
                    "--snapshot-steps: a snapshot is a whole model, which --lora-r does not train; leave it out"
                )
            return
        for name in ("merge", "lora_alpha", "lora_dropout", "lora_targets"):
            if getattr(self, name):
                raise UserError(f"{flag(name)}: there is no adapter without --lora-r; leave it out")


class SFTConfig(TrainingConfig, DataOptions, DateOptions):
    """Fine-tune a model on conversations (UltraChat's shape): what preference optimization starts from."""

    command = "sft"
    first = ("model", "dataset", "split", "out", "lr")


class EvaluateConfig(Config, ModelOptions, RecipeOptions, CacheOptions, MethodOptions, SeedOptions):
    """Measure a policy on a held-out cache: accuracy, KL and feature MSE to the reference, diversity; or write answers.

    Needs --cache, or --outputs with --questions.
    """

    command = "evaluate"
    go_on = "no metrics.json was written: run the same command again"
    first = ("model", "cache", "out", "method", "sae")
    panel = "Method"
    out: Folder = needed("Folder to write.")
    base: str | None = option(
        None, "Model that the adapter given as --model belongs to; default the one that it names."
    )
    prompts: NonNegativeInt = option(100, "Prompts to sample answers to; 0 measures no diversity.")
    samples: PositiveInt = option(25, "Sampled answers a prompt.")
    max_new_tokens: PositiveInt = option(512, "Longest generated answer, tokens.")
    temperature: float | None = option(
        None, "Temperature of sampling, 0 is greedy; default 1, for answers that of the benchmark.", ge=0
    )
    top_p: float = option(0.95, "Nucleus of sampling.", gt=0, le=1)
    generation_batch: PositiveInt = option(32, "Answers generated at a time; sets memory.")
    outputs: Literal["alpaca-eval", "arena-hard", "mt-bench"] | None = option(
        None, "Write answers to --questions in this benchmark's format, for its judge."
    )
    questions: Path | None = option(None, "The benchmark's questions, in its own file format.")
    endpoint: str | None = option(
        None, "Address up to /v1 of a server that answers --questions with its model --model; none is loaded here."
    )

    def check(self) -> None:
        """Options that lack another one, or that would be ignored without a cache, an SAE or sampling."""
        if self.endpoint is not None and (self.cache is not None or not self.outputs):
            raise UserError(
                "--endpoint: expected --outputs and --questions alone, which a server answers, found others"
            )
        if self.endpoint is not None:
            own = ("base", "attention", "dtype", "device", "compile")
            self.refuse("the server of --endpoint computes", *(name for name in own if name in type(self).model_fields))
        if self.outputs and self.questions is None:
            raise UserError("--questions: expected the file of the benchmark's questions for --outputs, found none")
        if self.questions and self.outputs is None:
            raise UserError("--outputs: expected the benchmark whose --questions are to be answered, found none")
        if self.cache is None and self.outputs is None:
            return  # `check_ready` says that there is nothing to do
        if self.cache is None:
            measuring = ("trust_hashes", "method", "reference", "sae", "site", "top_k", "token_budget", "prompts")
            self.refuse("without --cache there is nothing to measure", *measuring, "samples")
        elif not self.sae:
            self.refuse("without --sae no features are measured", "site", "top_k")
        if self.cache is not None and self.prompts:
            if self.temperature == 0:
                raise UserError("--temperature: expected a number above 0 to sample with, found 0; or pass --prompts 0")
            return
        self.refuse("with --prompts 0 nothing is sampled", "samples")
        if not self.outputs:
            sampling = ("max_new_tokens", "temperature", "top_p", "generation_batch", "seed")
            self.refuse("with --prompts 0 and no --outputs nothing is generated", *sampling)
        if self.temperature == 0:
            self.refuse("at temperature 0 nothing is drawn", "top_p", "seed")

    def check_ready(self) -> None:
        """There must be something to measure or to answer."""
        super().check_ready()
        if self.cache is None and self.outputs is None:
            raise UserError(
                "--cache: expected a cache of a held-out split, or --outputs and --questions, found neither"
            )


class TrainSAEConfig(Config, ModelOptions, PreferenceOptions, SeedOptions):
    """Train a JumpReLU SAE on the model's own activations, for models that have no public one."""

    command = "train-sae"
    go_on = "nothing was written: run the same command again"
    first = ("model", "dataset", "site", "out", "width")
    panel = "Optimisation"
    site: tuple[str, ...] = needed("Site that the SAE reads.")
    out: Folder = needed("Folder to write.")
    width: PositiveInt = option(4096, "Features of the SAE.")
    tokens: PositiveInt = option(200_000, "Tokens to train the SAE on.")
    target_l0: PositiveFloat = option(64.0, "Features that are to fire per token.")

    def check_ready(self) -> None:
        """An SAE reads one site."""
        super().check_ready()
        if len(self.site) > 1:
            raise UserError(f"--site: expected one site to train an SAE for, found {len(self.site)}; give one")
