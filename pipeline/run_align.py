"""`fpo align`: stage two, from a configuration to a trained policy.

In: a `RunConfig`, and which options were given on the command line. Out: a model or an adapter in `--out`, with
`run.yaml` and `metrics.jsonl`. What can be refused is refused before anything is written.
"""

from pathlib import Path
from typing import Any

import torch

from ..cache.files import sha256_text
from ..cache.manifest import Meaning, differences
from ..cache.reader import Cache, open_cache
from ..stages.align import FPOConfig, FPOTrainer
from ..stages.chat import ChatFormat, load_template
from ..stages.methods import METHODS
from ..stages.models import ModelSource, check_vocabulary, choose_attention, find_model, load_model
from ..stages.parity import check_cache
from ..stages.rehearsal import outside_decoder
from ..stages.sites import check_fits
from .config import RunConfig
from .inputs import device_of, find_reference, required, saes_of_sites, sites_to_read, tokenizer_of_cache
from .progress import console
from .training import check_resume, last_checkpoint, missing_trackers, run_callbacks, sole_run, trainer_settings

# What a held-out split's cache may differ in.
SPLIT_FIELDS = ("dataset", "split", "limit")


def run_align(config: RunConfig, given: frozenset[str]) -> None:
    """`fpo align`."""
    _, place, out = required(config, "model", "cache", "out")
    args = _training_arguments(config, given)
    divergence = METHODS[config.method].divergence
    if divergence == "kl" and config.reference is None:
        raise ValueError(
            f"--reference: method {config.method} measures a KL to a live reference; give its folder or id"
        )
    if divergence != "kl" and "reference" in given:
        raise ValueError(f"--reference: method {config.method} ignores it; leave it out")
    sites = sites_to_read(config, place) if divergence == "features" else []
    cache = open_cache(place, sites=sites, trust_hashes=config.trust_hashes)
    meaning = cache.manifest.meaning
    source = find_model(config.model)  # type: ignore[arg-type]
    tokenizer = _check_start(config, source, meaning)
    eval_cache = None
    if config.eval_cache:
        eval_cache = open_cache(config.eval_cache, sites=sites, trust_hashes=config.trust_hashes)
        _check_same_but_split(config, eval_cache, cache)
    device = device_of(config)
    attention = choose_attention(config.attention, source, device)
    saes = saes_of_sites(config, sites, device)
    check_cache(cache, saes, config.dtype, config.top_k)
    identity = {"cache_fingerprint": meaning.fingerprint()}
    check_resume(config, out, identity)
    policy = load_model(source, attention=attention, device=device)
    check_vocabulary(policy, tokenizer)
    for sae in saes:
        check_fits(sae, policy)
    if config.lora_r:
        policy = _with_lora(policy, source.name, config.lora_r, config.seed)
    reference = None
    if divergence == "kl":
        reference = load_model(find_reference(config, meaning), attention=attention, device=device)
    with missing_trackers():
        trainer = FPOTrainer(
            policy,
            args,
            cache,
            eval_cache,
            saes=saes,
            reference=reference,
            processing_class=tokenizer,
            callbacks=run_callbacks(config, {**identity, "training_device": str(args.device)}),
        )
    if config.merge and trainer.is_fsdp_enabled:
        raise ValueError("--merge: an adapter whose model is sharded by FSDP cannot be merged; leave one of them out")
    with sole_run(config, out, identity):
        trainer.train(resume_from_checkpoint=last_checkpoint(config))
        last_step = [line for line in trainer.state.log_history if line["step"] == trainer.state.global_step]
        if eval_cache is not None and not any("eval_loss" in line for line in last_step):
            trainer.evaluate()
        _save(config, trainer, out)


def _training_arguments(config: RunConfig, given: frozenset[str]) -> FPOConfig:
    objective = {name: getattr(config, name) for name in ("beta", "alpha", "gamma", "kl_beta", "stop_gradient")}
    if METHODS[config.method].divergence != "features":
        for name in sorted({"site", "sae", "top_k"} & given):
            raise ValueError(
                f"--{name.replace('_', '-')}: method {config.method} has no feature constraint; leave it out"
            )
    if "eval_steps" in given and config.eval_cache is None:
        raise ValueError("--eval-steps: there is nothing to evaluate on without --eval-cache; leave it out")
    if config.lora_r and config.model is not None and config.model.endswith(".gguf") and not config.merge:
        raise ValueError("--lora-r: an adapter names the model it belongs to, which a GGUF file cannot be; add --merge")
    if config.merge and not config.lora_r:
        raise ValueError("--merge: there is no adapter to merge without --lora-r; leave it out")
    if config.snapshot_steps and config.lora_r:
        raise ValueError("--snapshot-steps: a snapshot is a whole model, which --lora-r does not train; leave it out")
    settings = trainer_settings(config, given)
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


def _check_start(config: RunConfig, source: ModelSource, meaning: Meaning) -> Any:
    """Refuses a cache of another model, tokenizer or chat template; returns the tokenizer with the cache's template."""
    assert config.cache is not None
    tokenizer = tokenizer_of_cache(source, config.cache, meaning)
    if source.sha256 != meaning.model and not config.allow_different_start:
        raise ValueError(
            f"cache {config.cache}: its reference is not {source.name} (weight hashes {meaning.model[:12]} and "
            f"{source.sha256[:12]}); start from the model that the cache was made with, or pass --allow-different-start"
        )
    template = ChatFormat(tokenizer, load_template(config.chat_template)).template
    if template != meaning.chat_template and not config.allow_different_start:
        hashes = f"{sha256_text(meaning.chat_template)[:12]} and {sha256_text(template)[:12]}"
        raise ValueError(
            f"cache {config.cache}: its chat template is not that of {config.chat_template or source.name} (hashes "
            f"{hashes}); the policy would learn in a format that it is not asked in: give stage one's --chat-template "
            "here too, or pass --allow-different-start to go on in the cache's"
        )
    tokenizer.chat_template = meaning.chat_template
    return tokenizer


def _check_same_but_split(config: RunConfig, eval_cache: Cache, cache: Cache) -> None:
    lines = differences(cache.manifest.meaning, eval_cache.manifest.meaning)
    wrong = [line for line in lines if line.split(":")[0] not in SPLIT_FIELDS]
    if wrong:
        raise ValueError(
            f"--eval-cache {config.eval_cache}: expected a cache like the training cache's but for the split; "
            f"{'; '.join(wrong)}"
        )


def _with_lora(policy: Any, name: str, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    if not Path(name).exists():
        policy.name_or_path = name  # the hub id, not this machine's copy: the adapter says what it belongs to
    torch.manual_seed(seed)  # half of an adapter starts at random, and the Trainer comes too late to seed it
    return get_peft_model(
        policy,
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=outside_decoder(policy)),
    )


def _save(config: RunConfig, trainer: Any, out: Path) -> None:
    if config.merge:
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        console.print(
            f"{out}: the {'adapter' if config.lora_r and not config.merge else 'model'}, run.yaml, metrics.jsonl"
        )
