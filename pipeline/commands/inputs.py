"""What several commands take from a configuration: required options, the device, the model's data, the SAEs.

In: a `RunConfig`. Out: opened data, tokenizer and SAEs, or one line that says what is wrong.
"""

import datetime
from pathlib import Path
from typing import Any

import torch

from ...cache.files import Place
from ...cache.identity import Meaning
from ...cache.manifest import Manifest
from ...cache.remote import fetch
from ...stages.data.chat import ChatFormat, load_template
from ...stages.data.preferences import Preferences, load_preferences
from ...stages.data.tokenize import Limits
from ...stages.model.adapters import AdapterSource, find_policy
from ...stages.model.models import ModelSource, default_device, find_model
from ...stages.model.sae import SiteSAE, load_sae, parse_site
from ...stages.model.tokenizer import load_tokenizer, tokenizer_sha256
from ..config import RunConfig
from .run_record import RECORD, START_SHA256, read_record


def required(config: RunConfig, *names: str) -> tuple[Any, ...]:
    """The values of options that a command cannot do without.

    Raises:
        ValueError: naming the option, if one is missing.
    """
    values = tuple(getattr(config, name) for name in names)
    for name, value in zip(names, values, strict=True):
        if value in (None, (), ""):
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


def compiles(config: RunConfig) -> bool:
    """Whether layers are to be compiled: as `--compile` says, else on a GPU."""
    return device_of(config) != "cpu" if config.compile is None else config.compile


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
    limits = Limits(config.max_length, config.max_prompt_length, config.drop_ties, config.turns)
    template = load_template(config.chat_template)
    preferences = load_preferences(
        config.dataset, split=config.split, config=config.dataset_config, limit=config.limit, renames=config.map
    )
    source = find_model(config.model)
    return source, preferences, chat_of(config, load_tokenizer(source), template), limits


def chat_of(config: RunConfig, tokenizer: Any, template: str | None) -> ChatFormat:
    """The chat format on the day of `--date`, today by default.

    Raises:
        ValueError: there is no such day, or the template does not ask what day it is.
    """
    try:
        day = None if config.date is None else datetime.date.fromisoformat(config.date)
    except ValueError as error:
        raise ValueError(f"--date: expected a day as YYYY-MM-DD, found {config.date}: {error}") from error
    chat = ChatFormat(tokenizer, template, day)
    if day is not None and chat.date is None:
        raise ValueError("--date: the chat template does not read the clock; leave it out")
    return chat


def sites_to_read(config: RunConfig, cache: Place) -> list[str]:
    """Names of the sites whose features are compared: those of `--site`, or the cache's where it has only one.

    Raises:
        ValueError: if the cache has several and none is named.
    """
    known = [site.site for site in Manifest.load(fetch(cache)).meaning.sites]
    if not config.site and len(known) > 1:
        raise ValueError(f"--site: the cache has {', '.join(known)}; name those whose features are to be read")
    return [parse_site(site).name for site in config.site] or known


def saes_of_sites(config: RunConfig, sites: list[str], device: str) -> list[SiteSAE]:
    """The SAEs of these sites, in their order, of those that `--sae` names; none for no site.

    Raises:
        ValueError: if a site has none.
    """
    if not sites:
        return []
    required(config, "sae")
    by_site = {sae.site.name: sae for sae in load_saes(config, device)}
    for site in sites:
        if site not in by_site:
            raise ValueError(f"--sae: expected an SAE for site {site}, found SAEs for {', '.join(by_site)}")
    return [by_site[site] for site in sites]


def tokenizer_of_cache(source: ModelSource, cache: Place, meaning: Meaning) -> Any:
    """The model's tokenizer, which has to be the cache's.

    Raises:
        ValueError: if it is another.
    """
    tokenizer = load_tokenizer(source)
    found = tokenizer_sha256(tokenizer)
    if found != meaning.tokenizer:
        raise ValueError(
            f"cache {cache}: its tokenizer is not that of {source.name} (hashes {meaning.tokenizer[:12]} and "
            f"{found[:12]}); make a cache with this model"
        )
    return tokenizer


def policy_of(name: str, base: str | None) -> ModelSource | AdapterSource:
    """A model, or an adapter with its base model, which has to be the one that it was trained on.

    Raises:
        ValueError: as `find_policy`; if the record beside the adapter names another model.
    """
    source = find_policy(name, base)
    if isinstance(source, AdapterSource) and (source.folder / RECORD).exists():
        start = read_record(source.folder, f"adapter {name}").get(START_SHA256)
        if start is not None and start != source.base.sha256:
            raise ValueError(
                f"--base: expected the model that the adapter {name} was trained on, found {source.base.name} (weight "
                f"hashes {str(start)[:12]} and {source.base.sha256[:12]})"
            )
    return source


def find_reference(config: RunConfig, meaning: Meaning) -> ModelSource:
    """The model of `--reference`, which has to be the one that the cache was made with.

    Raises:
        ValueError: if it is another.
    """
    assert config.reference is not None
    source = find_model(config.reference)
    if source.sha256 != meaning.model:
        raise ValueError(
            f"--reference: expected the model that the cache was made with, found {source.name} (weight hashes "
            f"{meaning.model[:12]} and {source.sha256[:12]}); rewards and KL would measure against two models"
        )
    return source


def check_folder(out: Path) -> None:
    """Refuses what cannot be a folder.

    Raises:
        ValueError: if it, or a folder that it would lie in, is a file.
    """
    for path in (out, *out.parents):
        if path.is_file():
            raise ValueError(f"--out: expected a new or empty folder, found a file at {path}; give another one")


def check_new(out: Path) -> None:
    """Refuses to mix the output of two runs.

    Raises:
        ValueError: if there is anything in the folder, or it is a file.
    """
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: expected a new or empty folder, found files in {out}; give another one, or empty it")
