"""What several commands take from a configuration: required options, the device, the model's data, the SAEs.

In: a `RunConfig`. Out: opened data, tokenizer and SAEs, or one line that says what is wrong.
"""

from typing import Any

import torch

from ..stages.models import ModelSource, default_device, find_model, load_tokenizer
from ..stages.preferences import ChatFormat, Limits, Preferences, load_preferences, load_template
from ..stages.sites import SiteSAE, load_sae
from .config import RunConfig


def required(config: RunConfig, *names: str) -> tuple[Any, ...]:
    """The values of options that a command cannot do without.

    Raises:
        ValueError: naming the option, if one is missing.
    """
    values = tuple(getattr(config, name) for name in names)
    for name, value in zip(names, values, strict=True):
        if value is None or value == ():
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected a value, found none; give {option} or '{name}' in the configuration")
    return values


def device_of(config: RunConfig) -> str:
    """The device that `--device` names.

    Raises:
        ValueError: if it is none that torch has here.
    """
    if config.device == "auto":
        return default_device()
    try:
        if config.device not in ("cpu", "cuda"):
            raise RuntimeError("neither of them (CUDA_VISIBLE_DEVICES chooses among GPUs)")
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected auto, cpu or cuda, found '{config.device}': {error}") from error
    return config.device


def load_saes(config: RunConfig, device: str) -> tuple[SiteSAE, ...]:
    """The SAEs that `--sae` names, one a site.

    Raises:
        ValueError: if two read the same site.
    """
    saes = tuple(load_sae(spec, device=device) for spec in config.sae)
    sites = [sae.site.name for sae in saes]
    if len(set(sites)) < len(sites):
        raise ValueError(f"--sae: expected one SAE a site, found {', '.join(sites)}")
    return saes


def load_data(config: RunConfig) -> tuple[ModelSource, Preferences, ChatFormat, Limits]:
    """Where the model is, the preference data, how the model's tokenizer and template make tokens of it, and limits."""
    assert config.model is not None and config.dataset is not None
    limits = Limits(config.max_length, config.max_prompt_length, config.drop_ties)
    template = load_template(config.chat_template)
    preferences = load_preferences(config.dataset, split=config.split, config=config.dataset_config, limit=config.limit)
    source = find_model(config.model)
    return source, preferences, ChatFormat(load_tokenizer(source), template), limits
