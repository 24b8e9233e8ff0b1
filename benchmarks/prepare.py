"""The folder that the contestants of a benchmark share.

In: a `Setting`. Out: a folder with `model`, `sae` and `cache`; every contestant takes its token ids from the cache.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpo.cache.identity import Meaning, SiteMeaning
from fpo.cache.manifest import Noise, ShardReport
from fpo.cache.reader import open_cache
from fpo.cache.schema import FORMAT_VERSION, CachedPair, Pair, pair_id
from fpo.cache.writer import CacheWriter
from fpo.stages.model.models import Recipe, find_model, is_hub_id, load_model
from fpo.stages.model.sae import SiteSAE, load_sae
from fpo.stages.model.tokenizer import load_tokenizer
from fpo.stages.precompute.reference import describe_numerics
from fpo.stages.scoring.measure import measure_pairs

from .measuring import Result, in_fresh_process
from .pairs import amounts, choose, random_pairs, real_pairs, size
from .setting import KEPT, Setting, attention_of, load, random_sae
from .shapes import configuration


def prepared(setting: Setting, folder: Path) -> Result:
    """Calls `prepare` in a new process, so that the parent does not hold its memory."""
    return in_fresh_process(prepare, setting=setting, folder=folder)


def prepare(setting: Setting, folder: Path) -> Result:
    """Writes `model`, `sae` and `cache` into a folder.

    Returns:
        `amounts` of the `measured` pairs and of `all` pairs that they were chosen from.
    """
    tokenizer = save_model(setting, folder / "model")
    model = load(setting, folder, attention_of(setting, folder))
    random_sae(model.config.get_text_config().hidden_size, setting.width, setting.site).save_model(folder / "sae")
    sae = load_sae(str(folder / "sae"), device=setting.device)
    candidates = real_pairs(setting, tokenizer) if setting.dataset else random_pairs(setting, model.config.vocab_size)
    pairs = choose(candidates, setting)
    measured = measure_pairs(model, pairs, [sae], setting.recipe, token_budget=setting.token_budget, keep_features=KEPT)
    write_cache(folder / "cache", measured, [sae], setting, model)
    measured_pairs = pairs[setting.warmup * setting.batch :]
    return {"measured": amounts(measured_pairs, setting.batch), "all": amounts(candidates, setting.batch)}


def save_model(setting: Setting, folder: Path) -> Any:
    """Saves the configuration of a hub id, else weights and tokenizer too; returns the tokenizer."""
    if is_hub_id(setting.model):
        configuration(setting.model).save_pretrained(folder)
        return None
    source = find_model(setting.model)
    model: Any = load_model(source, attention="eager", device="cpu")
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(folder)
    return tokenizer


def cached_pairs(folder: Path) -> list[Pair]:
    """The pairs of the folder's cache: first the warm-up's, then the measured ones."""
    cache = open_cache(folder / "cache", sites=[])
    return [cache[number].pair for number in range(len(cache))]


def write_cache(
    folder: Path, rows: Sequence[CachedPair], saes: Sequence[SiteSAE], setting: Setting, model: Any
) -> None:
    """Writes measured pairs as a cache of one shard, as stage one does."""
    sites = tuple(SiteMeaning(sae.site.name, sae.sha256, sae.width, sae.architecture) for sae in saes)
    meaning = meaning_of(sites, setting.recipe, KEPT, setting.max_length)
    writer = CacheWriter(folder, meaning, describe_numerics(model, setting.token_budget, len(rows)), len(rows))
    renamed = []
    for number, row in enumerate(rows):
        name = pair_id(row.pair.prompt_ids, row.pair.chosen_ids, row.pair.rejected_ids, number)
        renamed.append(dataclasses.replace(row, pair=dataclasses.replace(row.pair, pair_id=name)))
    counts = {"scored_tokens": sum(size(row.pair) for row in rows), "ties": 0}
    noise = Noise(0.0, (0.0,) * len(saes))
    writer.write_shard(renamed, ShardReport(0, 0, len(rows), (), counts, noise))
    assert writer.finish() is not None, "the only shard is written"


def meaning_of(sites: tuple[SiteMeaning, ...], recipe: Recipe, keep_features: int, max_length: int) -> Meaning:
    """The meaning of a cache whose pairs, model and tokenizer have no file to hash."""
    nothing = "0" * 64
    return Meaning(
        format_version=FORMAT_VERSION,
        model=nothing,
        tokenizer=nothing,
        chat_template="",
        date=None,
        sites=sites,
        recipe=recipe,
        pooling="mean over prediction positions",
        keep_features=keep_features,
        max_length=max_length,
        max_prompt_length=max_length // 2,
        truncation="",
        skip_rules=(),
        drop_ties=False,
        turns="all",
        dataset=nothing,
        split="benchmark",
        limit=None,
        order="raw",
    )
