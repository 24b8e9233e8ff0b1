"""`fpo align`: stage two, from a configuration to a trained policy.

In: a `RunConfig`, and which options were given on the command line. Out: a model or an adapter in `--out`, with
`run.yaml` and `metrics.jsonl`. What can be refused is refused before anything is written.
"""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import torch
import yaml

from ..cache.manifest import Manifest, Meaning, differences
from ..cache.reader import Cache, open_cache
from ..stages.align import FPOConfig, FPOTrainer
from ..stages.methods import METHODS
from ..stages.metrics import RunRecord
from ..stages.models import ModelSource, choose_attention, find_model, load_model, load_tokenizer, tokenizer_sha256
from ..stages.parity import check_cache
from ..stages.sites import SiteSAE, check_fits, parse_site
from .config import RunConfig, to_yaml
from .inputs import device_of, load_saes, required
from .progress import console

# What a held-out split's cache may differ in.
SPLIT_FIELDS = ("dataset", "split", "limit")

# What a resumed run may change: where things are and what it tells meanwhile; with a constant schedule, its length.
RESUME_MAY_CHANGE = (
    *("resume", "cache", "eval_cache", "trust_hashes"),
    *("logging_steps", "save_steps", "eval_steps", "report_to", "push_to_hub"),
)
LENGTH = ("max_steps", "epochs")


def run_align(config: RunConfig, given: frozenset[str]) -> None:
    """`fpo align`."""
    _, cache_folder, out = required(config, "model", "cache", "out")
    args = _training_arguments(config, given)
    divergence = METHODS[config.method].divergence
    if divergence == "kl" and config.reference is None:
        raise ValueError(
            f"--reference: method {config.method} measures a KL to a live reference; give its folder or id"
        )
    if divergence != "kl" and "reference" in given:
        raise ValueError(f"--reference: method {config.method} ignores it; leave it out")
    sites = _sites_to_read(config, cache_folder) if divergence == "features" else []
    cache = open_cache(cache_folder, sites=sites, trust_hashes=config.trust_hashes)
    meaning = cache.manifest.meaning
    source = find_model(config.model)  # type: ignore[arg-type]
    tokenizer = _check_start(config, source, meaning)
    eval_cache = None
    if config.eval_cache:
        eval_cache = open_cache(config.eval_cache, sites=sites, trust_hashes=config.trust_hashes)
        _check_same_but_split(eval_cache, cache)
    device = device_of(config)
    attention = choose_attention(config.attention, source, device)
    saes = _load_constraint_saes(config, sites, device)
    check_cache(cache, saes, config.dtype, config.top_k)
    if os.environ.get("RANK", "0") == "0":  # the others may come when it has already written
        _check_resume(config, out, cache)
    policy = load_model(source, attention=attention, device=device)
    for sae in saes:
        check_fits(sae, policy)
    if config.lora_r:
        policy = _with_lora(policy, source.name, config.lora_r, config.seed)
    reference = None
    if divergence == "kl":
        reference = load_model(_find_reference(config, meaning), attention=attention, device=device)
    versions = {name: importlib.metadata.version(name) for name in ("fpo", "torch", "transformers", "sae-lens")}
    record = {"cache_fingerprint": meaning.fingerprint(), "versions": versions, "training_device": str(args.device)}
    try:
        trainer = FPOTrainer(
            policy,
            args,
            cache,
            eval_cache,
            saes=saes,
            reference=reference,
            processing_class=tokenizer,
            callbacks=[RunRecord(to_yaml(config, record))],
        )
    except RuntimeError as error:  # how transformers says that a tracker is not installed
        raise ValueError(f"--report-to: {error}") from error
    trainer.train(resume_from_checkpoint=_last_checkpoint(out) if config.resume else None)
    last_step = [line for line in trainer.state.log_history if line["step"] == trainer.state.global_step]
    if eval_cache is not None and not any("eval_loss" in line for line in last_step):
        trainer.evaluate()
    _save(config, trainer, out)


def _training_arguments(config: RunConfig, given: frozenset[str]) -> FPOConfig:
    settings = ("beta", "alpha", "gamma", "kl_beta", "stop_gradient")
    objective = {name: getattr(config, name) for name in settings}
    if METHODS[config.method].divergence != "features":
        for name in sorted({"site", "sae", "top_k"} & given):
            raise ValueError(
                f"--{name.replace('_', '-')}: method {config.method} has no feature constraint; leave it out"
            )
    if "eval_steps" in given and config.eval_cache is None:
        raise ValueError("--eval-steps: there is nothing to evaluate on without --eval-cache; leave it out")
    if {"epochs", "max_steps"} <= given:
        raise ValueError("--epochs: --max-steps alone says when to stop; leave one of them out")
    if config.lr_scheduler == "constant" and "warmup_steps" in given:
        raise ValueError("--warmup-steps: the schedule 'constant' ignores it; use constant_with_warmup")
    if config.lora_r and config.model is not None and config.model.endswith(".gguf") and not config.merge:
        raise ValueError("--lora-r: an adapter names the model it belongs to, which a GGUF file cannot be; add --merge")
    if config.merge and not config.lora_r:
        raise ValueError("--merge: there is no adapter to merge without --lora-r; leave it out")
    parts = config.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % parts:
        raise ValueError(
            f"--batch-size: expected a multiple of accumulation x devices ({parts}), found {config.batch_size}"
        )
    return FPOConfig(
        output_dir=str(config.out),
        method=config.method,
        **objective,
        top_k=config.top_k,
        token_budget=config.token_budget,
        allow_different_start=config.allow_different_start,
        bf16=config.dtype == "bf16",
        use_cpu=device_of(config) == "cpu",
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size // parts,
        per_device_eval_batch_size=config.batch_size // parts,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_steps,
        optim={"adam": "adamw_torch_fused", "rmsprop": "rmsprop"}[config.optimizer],
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.activation_checkpointing,
        seed=config.seed,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if config.eval_cache and config.eval_steps else "no",
        eval_steps=config.eval_steps,
        report_to=config.report_to,
        push_to_hub=config.push_to_hub,
        hub_strategy="end",
    )


def _sites_to_read(config: RunConfig, cache_folder: Path) -> list[str]:
    """The sites of the constraint: those given, or the cache's where it has only one."""
    known = [site.site for site in Manifest.load(cache_folder).meaning.sites]
    if not config.site and len(known) > 1:
        raise ValueError(f"--site: the cache has {', '.join(known)}; name those that the constraint is to read")
    return [parse_site(site).name for site in config.site] or known


def _check_start(config: RunConfig, source: ModelSource, meaning: Meaning) -> Any:
    """Refuses a cache of another model or tokenizer; returns the tokenizer with the cache's template."""
    tokenizer = load_tokenizer(source)
    if tokenizer_sha256(tokenizer) != meaning.tokenizer:
        raise ValueError(
            f"cache {config.cache}: its tokenizer is not that of {source.name} (hashes {meaning.tokenizer[:12]} and "
            f"{tokenizer_sha256(tokenizer)[:12]}); make a cache with this model"
        )
    if source.sha256 != meaning.model and not config.allow_different_start:
        raise ValueError(
            f"cache {config.cache}: its reference is not {source.name} (weight hashes {meaning.model[:12]} and "
            f"{source.sha256[:12]}); start from the model that the cache was made with, or pass --allow-different-start"
        )
    if tokenizer.chat_template != meaning.chat_template:
        console.print("the cache's chat template is not the tokenizer's own; the cache's is saved with the policy")
    tokenizer.chat_template = meaning.chat_template
    return tokenizer


def _find_reference(config: RunConfig, meaning: Meaning) -> ModelSource:
    assert config.reference is not None
    source = find_model(config.reference)
    if source.sha256 != meaning.model:
        raise ValueError(
            f"--reference: expected the model that the cache was made with, found {source.name} (weight hashes "
            f"{meaning.model[:12]} and {source.sha256[:12]}); rewards and KL would measure against two models"
        )
    return source


def _check_same_but_split(eval_cache: Cache, cache: Cache) -> None:
    lines = differences(cache.manifest.meaning, eval_cache.manifest.meaning)
    wrong = [line for line in lines if line.split(":")[0] not in SPLIT_FIELDS]
    if wrong:
        raise ValueError(
            f"--eval-cache {eval_cache.folder}: expected a cache like the training cache's but for the split; "
            f"{'; '.join(wrong)}"
        )


def _load_constraint_saes(config: RunConfig, sites: list[str], device: str) -> list[SiteSAE]:
    """The SAEs of the chosen sites, in their order, of those that --sae names."""
    if not sites:
        return []
    required(config, "sae")
    by_site = {sae.site.name: sae for sae in load_saes(config, device)}
    for site in sites:
        if site not in by_site:
            raise ValueError(f"--sae: expected an SAE for site {site}, found SAEs for {', '.join(by_site)}")
    return [by_site[site] for site in sites]


def _check_resume(config: RunConfig, out: Path, cache: Cache) -> None:
    """Refuses to mix two runs in one folder."""
    record = out / "run.yaml"
    if not config.resume:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out: expected a new or empty folder, found files in {out}; pass --resume to go on")
        return
    if not record.exists():
        raise FileNotFoundError(f"--resume: expected a run in {out}, found no run.yaml; leave --resume out")
    try:
        before = yaml.safe_load(record.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--resume: expected YAML in {record}, found: {error}") from error
    free = RESUME_MAY_CHANGE + (LENGTH if config.lr_scheduler.startswith("constant") else ())
    now = {**yaml.safe_load(to_yaml(config)), "cache_fingerprint": cache.manifest.meaning.fingerprint()}
    changed = [
        f"{key}: was {before.get(key)!r}, is {value!r}"
        for key, value in now.items()
        if key not in free and before.get(key) != value
    ]
    if changed:
        raise ValueError(f"--resume: expected the settings of the run in {out}; {'; '.join(changed)}")


def _last_checkpoint(out: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint: str | None = get_last_checkpoint(str(out))
    return checkpoint


def _with_lora(policy: Any, name: str, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    if not Path(name).exists():
        policy.name_or_path = name  # the hub id, not this machine's copy: the adapter says what it belongs to
    torch.manual_seed(seed)  # half of an adapter starts at random, and the Trainer comes too late to seed it
    return get_peft_model(policy, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _save(config: RunConfig, trainer: Any, out: Path) -> None:
    if config.merge:
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(str(out))
    console.print(f"{out}: the {'adapter' if config.lora_r and not config.merge else 'model'}, run.yaml, metrics.jsonl")
