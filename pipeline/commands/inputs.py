"""What several commands share: opening the model, data, SAEs and cache that options name; the record of a run.

In: a command's configuration. Out: opened data, tokenizer, model and SAEs, or one line that says what is wrong; in a
run's folder `run.yaml`, which says how it was made and whether it came to its end; how far a command is, on stderr.
"""

import datetime
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import typer
from tqdm import tqdm

from ...cache.errors import UserError
from ...cache.files import Place, sync_files, write_atomically
from ...cache.identity import Meaning
from ...cache.locks import Lock
from ...cache.manifest import Manifest
from ...cache.remote import fetch
from ...stages.data.chat import ChatFormat, load_template
from ...stages.data.preferences import Preferences, load_preferences
from ...stages.data.tokenize import Limits
from ...stages.model.adapters import AdapterSource, find_policy
from ...stages.model.models import (
    ModelSource,
    attentions_to_try,
    default_device,
    find_model,
    load_model,
)
from ...stages.model.sae import SiteSAE, load_sae, parse_site
from ...stages.model.tokenizer import load_tokenizer, tokenizer_sha256
from ...stages.scoring.supported import load_supported
from ..base_config import Config
from ..config import PrecomputeConfig, TrainSAEConfig
from ..config_files import read_yaml, to_yaml, write_yaml
from ..options import CompileOptions, FeatureOptions, MethodOptions, ModelOptions, SAEOptions

RECORD = "run.yaml"
# Keys of the record.
FINISHED = "finished"
START_SHA256 = "start_sha256"  # of the model that the policy was before its first step

SECONDS_BETWEEN_LINES = 30.0


def device_of(config: ModelOptions) -> str:
    """The device that `--device` names.

    Raises:
        UserError: torch has no such device here.
    """
    if config.device == "auto":
        return default_device()
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: expected a device of this machine, found '{config.device}': {error}") from error
    return config.device


def compiles(config: CompileOptions, device: str) -> bool:
    """Whether layers are to be compiled: as `--compile` says, else on a GPU."""
    return device != "cpu" if config.compile is None else config.compile


def load_causal_lm(config: ModelOptions, source: ModelSource) -> Any:
    """The model on its device, under the fastest attention that works there."""
    device = device_of(config)
    attentions = attentions_to_try(config.attention, source, device)
    return load_supported(partial(load_model, source, device=device), attentions, typer.echo)


def load_saes(config: SAEOptions, device: str) -> tuple[SiteSAE, ...]:
    """The SAEs that `--sae` names, one a site.

    Raises:
        UserError: two read the same site.
    """
    saes = tuple(load_sae(spec, device=device) for spec in config.sae)
    sites = [sae.site.name for sae in saes]
    if len(set(sites)) < len(sites):
        raise UserError(f"--sae: expected one SAE a site, found {', '.join(sites)}")
    return saes


def load_data(
    config: PrecomputeConfig | TrainSAEConfig,
) -> tuple[ModelSource, Preferences, ChatFormat, Limits]:
    """Where the model is, the preference data, the chat format that makes tokens of it, and how many it may make."""
    turns, date = (config.turns, config.date) if isinstance(config, PrecomputeConfig) else ("all", None)
    limits = Limits(config.max_length, config.max_prompt_length, config.drop_ties, turns)
    template = load_template(config.chat_template)
    preferences = load_preferences(
        config.dataset, split=config.split, config=config.dataset_config, limit=config.limit, renames=config.map
    )
    source = find_model(config.model)
    return source, preferences, chat_format(load_tokenizer(source), template, date), limits


def chat_format(tokenizer: Any, template: str | None, date: str | None) -> ChatFormat:
    """The chat format on a day, today by default.

    Raises:
        UserError: the template does not ask what day it is.
    """
    chat = ChatFormat(tokenizer, template, None if date is None else datetime.date.fromisoformat(date))
    if date is not None and chat.date is None:
        raise UserError("--date: the chat template does not read the clock; leave it out")
    return chat


def sites_to_read(config: FeatureOptions, cache: Place) -> list[str]:
    """Names of the sites whose features are compared: those of `--site`, or the cache's where it has only one.

    Raises:
        UserError: the cache has several, and none is named.
    """
    known = [site.site for site in Manifest.load(fetch(cache)).meaning.sites]
    if not config.site and len(known) > 1:
        raise UserError(f"--site: the cache has {', '.join(known)}; name those whose features are to be read")
    return [parse_site(site).name for site in config.site] or known


def saes_of_sites(config: SAEOptions, sites: list[str], device: str) -> list[SiteSAE]:
    """The SAEs of these sites, in their order, of those that `--sae` names; none for no site.

    Raises:
        UserError: a site has none.
    """
    if not sites:
        return []
    by_site = {sae.site.name: sae for sae in load_saes(config, device)}
    for site in sites:
        if site not in by_site:
            raise UserError(f"--sae: expected an SAE for site {site}, found SAEs for {', '.join(by_site)}")
    return [by_site[site] for site in sites]


def tokenizer_of_cache(source: ModelSource, cache: Place, meaning: Meaning) -> Any:
    """The model's tokenizer, which has to be the cache's.

    Raises:
        UserError: it is another.
    """
    tokenizer = load_tokenizer(source)
    found = tokenizer_sha256(tokenizer)
    if found != meaning.tokenizer:
        raise UserError(
            f"cache {cache}: its tokenizer is not that of {source.name} (hashes {meaning.tokenizer[:12]} and "
            f"{found[:12]}); make a cache with this model"
        )
    return tokenizer


def policy_of(name: str, base: str | None) -> ModelSource | AdapterSource:
    """A model, or an adapter with its base model, which has to be the one that it was trained on.

    Raises:
        UserError: as `find_policy`; the record beside the adapter names another model.
    """
    source = find_policy(name, base)
    if isinstance(source, AdapterSource) and (source.folder / RECORD).exists():
        start = read_record(source.folder, f"adapter {name}").get(START_SHA256)
        if start is not None and start != source.base.sha256:
            raise UserError(
                f"--base: expected the model that the adapter {name} was trained on, found {source.base.name} (weight "
                f"hashes {str(start)[:12]} and {source.base.sha256[:12]})"
            )
    return source


def find_reference(config: MethodOptions, meaning: Meaning) -> ModelSource:
    """The model of `--reference`, which has to be the one that the cache was made with.

    Raises:
        UserError: it is another.
    """
    assert config.reference is not None
    source = find_model(config.reference)
    if source.sha256 != meaning.model:
        raise UserError(
            f"--reference: expected the model that the cache was made with, found {source.name} (weight hashes "
            f"{meaning.model[:12]} and {source.sha256[:12]}); rewards and KL would measure against two models"
        )
    return source


def check_folder(out: Path) -> None:
    """Refuses what cannot be a folder.

    Raises:
        UserError: it, or a folder that it would lie in, is a file.
    """
    for path in (out, *out.parents):
        if path.is_file():
            raise UserError(f"--out: expected a new or empty folder, found a file at {path}; give another one")


def check_new(out: Path) -> None:
    """Refuses to mix the output of two runs.

    Raises:
        UserError: there is anything in the folder, or it is a file.
    """
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out: expected a new or empty folder, found files in {out}; give another one, or empty it")


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Makes a run's folder and holds it while the command writes there.

    Raises:
        UserError: another process writes there.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out)
    try:
        try:
            alone = lock.take()
        except UserError:  # a file system such as NFS may not lock folders, so nobody can tell
            alone = True
        if not alone:
            raise UserError(f"--out: another run is writing into {out}; wait for it, or give another folder")
        yield
    finally:
        lock.close()


def record_of(config: Config, record: Mapping[str, Any]) -> str:
    """The text of `run.yaml`, which can be given as `--config` to make the same run again."""
    if "resume" in type(config).model_fields:
        config = config.model_copy(update={"resume": False})
    return to_yaml(config, {"command": config.command, **record})


def read_record(out: Path, option: str) -> dict[str, Any]:
    """The record in a folder; an error begins with `option`.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is no record.
    """
    return read_yaml((out / RECORD).read_bytes(), f"{option}: {out / RECORD}")


def differing(before: Mapping[str, Any], config: Config, identity: Mapping[str, str], free: Sequence[str]) -> str:
    """The settings and inputs in which a run differs from its record, those of `free` aside; empty if in none.

    An option that the record does not know had its default.
    """
    before = {**read_yaml(to_yaml(type(config)()).encode(), "defaults"), **before}
    now = {**read_yaml(to_yaml(config).encode(), "settings"), **identity}
    return "; ".join(
        f"{key}: was {before.get(key)!r}, is {value!r}"
        for key, value in now.items()
        if key not in free and before.get(key) != value
    )


def mark_finished(out: Path, **end: Any) -> None:
    """Adds to the record that the run is finished, and how, once all its files are on disk."""
    sync_files(out)
    record = out / RECORD
    write_atomically(record, record.read_bytes() + write_yaml({FINISHED: end}).encode())


class Progress:
    """How far a command is: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, total: int, task: str, unit: str = "pairs") -> None:
        terminal = sys.stderr.isatty()
        seconds = 0.1 if terminal else SECONDS_BETWEEN_LINES
        self._bar = tqdm(
            total=total,
            desc=task,
            unit=f" {unit}",
            file=sys.stderr if terminal else _Lines(),
            mininterval=seconds,
            maxinterval=max(10.0, seconds),
            delay=0.0 if terminal else seconds,
            bar_format=None if terminal else "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_fmt}{postfix}, {remaining} left",
        )
        self._tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @property
    def tokens_per_second(self) -> float:
        """Tokens scored so far, over the time."""
        return float(self._tokens / max(1e-9, self._bar.format_dict["elapsed"]))

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Counts rows that are done, and the tokens that were scored for them (0 for rows of finished shards)."""
        self._tokens += tokens
        if self._tokens:
            self._bar.set_postfix_str(f"{self.tokens_per_second:.0f} tokens/s", refresh=False)
        self._bar.update(rows)


class _Lines:
    """Standard error for tqdm where it is no terminal: each state on a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            typer.echo(line, err=True)

    def flush(self) -> None:
        sys.stderr.flush()
