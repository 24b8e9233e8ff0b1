"""The folder that the contestants of a benchmark share: model, SAE, and a cache of the measured pairs.

In: a `Setting`. Out: `model`, `sae` and `cache` in a folder, from which every contestant takes its tokens.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpo.cache.identity import Meaning, SiteMeaning
from fpo.cache.manifest import Noise, ShardReport
from fpo.cache.reader import open_cache
from fpo.cache.schema import FORMAT_VERSION, CachedPair, Pair, pair_id
from fpo.cache.writer import CacheWriter
from fpo.stages.model.models import find_model, is_hub_id, load_model
from fpo.stages.model.sae import SiteSAE, load_sae
from fpo.stages.model.tokenizer import load_tokenizer
from fpo.stages.precompute.reference import describe_numerics
from fpo.stages.scoring.measure import measure_pairs

from .measuring import Result, in_fresh_process
from .pairs import amounts, choose, random_pairs, real_pairs, size
from .setting import KEPT, Setting, attention_of, load, random_sae
from .shapes import configuration


def prepared(setting: Setting, folder: Path) -> Result:
    """`prepare` in a process of its own, so that its memory is not the parent's."""
    return in_fresh_process(prepare_folder, setting=dataclasses.asdict(setting), folder=str(folder))


def prepare_folder(setting: dict[str, Any], folder: str) -> Result:
    """`prepare`, from what JSON can say."""
    return prepare(Setting(**setting), Path(folder))


def prepare(setting: Setting, folder: Path) -> dict[str, Any]:
    """Writes `model`, `sae` and `cache` into a folder.

    Returns:
        What the pairs are like: tokens of prompts and responses, and tokens computed per pair with and without padding,
        of the measured ones and of all that they were chosen from.
    """
    tokenizer = save_model(setting, folder / "model")
    model = load(setting, folder, attention_of(setting, folder))
    sae_of_size = random_sae(model.config.get_text_config().hidden_size, setting.width, setting.site)
    sae_of_size.save_model(folder / "sae")
    sae = load_sae(str(folder / "sae"), device=setting.device)
    candidates = real_pairs(setting, tokenizer) if setting.dataset else random_pairs(setting, model.config.vocab_size)
    pairs = choose(candidates, setting)
    measured = measure_pairs(model, pairs, [sae], setting.recipe, token_budget=setting.token_budget, keep_features=KEPT)
    write_cache(folder / "cache", measured, [sae], setting, model)
    batches = (pairs[setting.warmup * setting.batch :], candidates)
    return dict(zip(("measured", "all"), (amounts(batch, setting.batch) for batch in batches), strict=True))


def save_model(setting: Setting, folder: Path) -> Any:
    """Saves the model for all contestants: its weights and tokenizer, or of a hub id the configuration alone."""
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
    """The pairs of the folder's cache: those of the warm-up, then the measured ones."""
    cache = open_cache(folder / "cache", sites=[])
    return [cache[number].pair for number in range(len(cache))]


def write_cache(
    folder: Path, rows: Sequence[CachedPair], saes: Sequence[SiteSAE], setting: Setting, model: Any
) -> None:
    """Writes measured pairs as a cache of one shard, as stage one does."""
    meaning = meaning_of(setting, [SiteMeaning(s.site.name, s.sha256, s.width, s.architecture) for s in saes])
    writer = CacheWriter(folder, meaning, describe_numerics(model, setting.token_budget, len(rows)), len(rows))
    renamed = [dataclasses.replace(row, pair=_numbered(row.pair, number)) for number, row in enumerate(rows)]
    counts = {"scored_tokens": sum(size(row.pair) for row in rows), "ties": 0}
    noise = Noise(0.0, (0.0,) * len(saes))
    writer.write_shard(renamed, ShardReport(0, 0, len(rows), (), counts, noise))
    assert writer.finish() is not None, "one shard is all"


def _numbered(pair: Pair, row: int) -> Pair:
    """The pair under its row number in this cache."""
    return dataclasses.replace(pair, pair_id=pair_id(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, row))


def meaning_of(setting: Setting, sites: Sequence[SiteMeaning]) -> Meaning:
    """A meaning for a cache of chosen pairs, which is no data set's."""
    nothing = hashlib.sha256(b"").hexdigest()
    return Meaning(
        format_version=FORMAT_VERSION,
        model=nothing,
        tokenizer=nothing,
        chat_template="",
        date=None,
        sites=tuple(sites),
        recipe=setting.recipe,
        pooling="mean over prediction positions",
        keep_features=KEPT,
        max_length=setting.max_length,
        max_prompt_length=setting.max_length // 2,
        truncation="prompt keeps BOS and its end, response keeps its start",
        skip_rules=(),
        drop_ties=False,
        turns="all",
        dataset=nothing,
        split="benchmark",
        limit=None,
        order="raw",
    )
