"""`fpo align`: stage two, from a configuration to a trained policy.

In: an `AlignConfig`. Out: a model or an adapter in `--out`, with
`run.yaml` and `metrics.jsonl`. What can be refused is refused before anything is written.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import typer
from transformers import TrainerCallback

from ...cache.errors import UserError, reading
from ...cache.files import sha256_text
from ...cache.identity import Meaning, differences
from ...cache.reader import Cache, open_cache
from ...stages.data.chat import ChatFormat, load_template
from ...stages.model.anatomy import causal_lm
from ...stages.model.models import ModelSource, find_model, load_model
from ...stages.model.sae import check_fits
from ...stages.model.tokenizer import check_vocabulary
from ...stages.scoring.parity import check_cache
from ...stages.scoring.supported import load_supported
from ...stages.train.align import FPOTrainer
from ...stages.train.callbacks import summary
from ...stages.train.config import FPOConfig
from ...stages.train.methods import METHODS
from ...stages.train.rehearsal import outside_decoder
from ..config import AlignConfig
from .inputs import (
    START_SHA256,
    device_of,
    find_reference,
    load_causal_lm,
    saes_of_sites,
    sites_to_read,
    tokenizer_of_cache,
)
from .training import (
    check_resume,
    finish,
    is_finished,
    last_checkpoint,
    run_callbacks,
    sole_run,
    tracked,
    trainer_settings,
)

# What a held-out split's cache may differ in.
SPLIT_FIELDS = ("dataset", "split", "limit")


def run_align(config: AlignConfig, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """`fpo align`; `callbacks` are added to the run's own."""
    out, divergence = config.out, METHODS[config.method].divergence
    assert config.cache is not None
    args = _training_arguments(config)
    sites = sites_to_read(config, config.cache) if divergence == "features" else []
    cache = open_cache(config.cache, sites=sites, trust_hashes=config.trust_hashes)
    meaning = cache.manifest.meaning
    source = find_model(config.model)
    tokenizer = _check_start(config, source, meaning)
    eval_cache = None
    if config.eval_cache:
        eval_cache = open_cache(config.eval_cache, sites=sites, trust_hashes=config.trust_hashes)
        _check_same_but_split(config, eval_cache, cache)
    device = device_of(config)
    saes = saes_of_sites(config, sites, device)
    check_cache(cache, saes, config.dtype, config.top_k)
    identity = {"cache_fingerprint": meaning.fingerprint()}
    check_resume(config, identity)
    if is_finished(config):
        return
    policy = load_causal_lm(config, source)
    policy.name_or_path = source.lasting_name
    check_vocabulary(policy, tokenizer)
    for sae in saes:
        check_fits(sae, policy)
    if config.lora_r:
        policy = _with_lora(policy, config)
    reference = None
    if divergence == "kl":
        load = partial(load_model, find_reference(config, meaning), device=device)
        reference = load_supported(load, (causal_lm(policy).config._attn_implementation,))
    record = {**identity, START_SHA256: source.sha256, "training_device": str(args.device)}
    with tracked(config.report_to):
        trainer = FPOTrainer(
            policy,
            args,
            cache,
            eval_cache,
            saes=saes,
            reference=reference,
            processing_class=tokenizer,
            callbacks=[*run_callbacks(config, record), *callbacks],
        )
    if config.merge and trainer.is_fsdp_enabled:
        raise UserError("--merge: an adapter whose model is sharded by FSDP cannot be merged; leave one of them out")
    with sole_run(config, identity):
        checkpoint = last_checkpoint(config)
        args.eval_on_start = eval_cache is not None and checkpoint is None  # what the summary calls "before"
        trainer.train(resume_from_checkpoint=checkpoint)
        last_step = [line for line in trainer.state.log_history if line["step"] == trainer.state.global_step]
        if eval_cache is not None and not any("eval_loss" in line for line in last_step):
            trainer.evaluate()
        if config.merge:
            trainer.model = trainer.model.merge_and_unload()  # type: ignore[union-attr, operator]
        finish(trainer, out)
    if trainer.is_world_process_zero():
        typer.echo("\n".join(summary(trainer.state.log_history)))
        kept = "adapter" if config.lora_r and not config.merge else "model"
        typer.echo(f"{out}: the {kept}, run.yaml, metrics.jsonl")
        typer.echo(f"next: fpo evaluate --model {out} --cache {config.eval_cache or 'CACHE'} --out {out}-evaluation")


def _training_arguments(config: AlignConfig) -> FPOConfig:
    objective = {name: getattr(config, name) for name in ("beta", "alpha", "gamma", "kl_beta", "stop_gradient")}
    settings = trainer_settings(config)
    return FPOConfig(
        **settings,
        **objective,
        method=config.method,
        top_k=config.top_k,
        allow_different_start=config.allow_different_start,
        per_device_eval_batch_size=settings["per_device_train_batch_size"],
        eval_strategy="steps" if config.eval_cache and config.eval_steps else "no",
        eval_steps=config.eval_steps,
    )


def _check_start(config: AlignConfig, source: ModelSource, meaning: Meaning) -> Any:
    """Refuses a cache of another model, tokenizer or chat template; returns the tokenizer with the cache's template."""
    assert config.cache is not None
    tokenizer = tokenizer_of_cache(source, config.cache, meaning)
    if source.sha256 != meaning.model and not config.allow_different_start:
        raise UserError(
            f"cache {config.cache}: its reference is not {source.name} (weight hashes {meaning.model[:12]} and "
            f"{source.sha256[:12]}); start from the model that the cache was made with, or pass --allow-different-start"
        )
    template = ChatFormat(tokenizer, load_template(config.chat_template)).template
    if template != meaning.chat_template and not config.allow_different_start:
        hashes = f"{sha256_text(meaning.chat_template)[:12]} and {sha256_text(template)[:12]}"
        raise UserError(
            f"cache {config.cache}: its chat template is not that of {config.chat_template or source.name} (hashes "
            f"{hashes}); the policy would learn in a format that it is not asked in: give stage one's --chat-template "
            "here too, or pass --allow-different-start to go on in the cache's"
        )
    tokenizer.chat_template = meaning.chat_template
    return tokenizer


def _check_same_but_split(config: AlignConfig, eval_cache: Cache, cache: Cache) -> None:
    lines = differences(cache.manifest.meaning, eval_cache.manifest.meaning)
    wrong = [line for line in lines if line.split(":")[0] not in SPLIT_FIELDS]
    if wrong:
        raise UserError(
            f"--eval-cache {config.eval_cache}: expected a cache like the training cache's but for the split; "
            f"{'; '.join(wrong)}"
        )


def _with_lora(policy: Any, config: AlignConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    assert config.lora_r is not None
    if alone := [name for name in config.lora_targets if not _is_part(name, policy)]:
        raise UserError(f"--lora-targets: expected names of modules of {type(policy).__name__}, found {alone[0]!r}")
    torch.manual_seed(config.seed)  # half of an adapter starts at random, and the Trainer comes too late to seed it
    alpha = 2 * config.lora_r if config.lora_alpha is None else config.lora_alpha
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets) or "all-linear",
        exclude_modules=outside_decoder(policy),
    )
    with reading("--lora-targets: PEFT cannot put an adapter there"):
        return get_peft_model(policy, settings)


def _is_part(name: str, policy: Any) -> bool:
    return any(path == name or path.endswith(f".{name}") for path, _ in policy.named_modules())
