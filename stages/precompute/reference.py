"""The frozen reference of stage one, and what a cache says of how it was made.

In: a model with its tokenizer and SAEs, preferences, limits. Out: the cache's identity (what it means, and what rounds
its numbers) and a line of its provenance.
"""

import datetime
import importlib.metadata
import math
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...cache.identity import Meaning, Numerics, SiteMeaning
from ...cache.schema import FORMAT_VERSION
from ..data.chat import ChatFormat
from ..data.preferences import Preferences
from ..data.tokenize import SKIP_REASONS, Limits
from ..model.anatomy import decoder_layers
from ..model.compile import are_compiled
from ..model.models import ModelSource, Recipe
from ..model.sae import SiteSAE
from ..model.tokenizer import tokenizer_sha256
from ..scoring.sae_quality import SAEFit


@dataclass(frozen=True, eq=False)
class Reference:
    """A frozen model and what it measures.

    Attributes:
        source: where the model came from.
        model: the causal LM, in eval mode.
        chat: tokenizer and chat template.
        saes: the SAEs of the sites to read, in the cache's order.
        recipe: the compute recipe.
        fits: of each SAE on the first pairs of the data; empty if it was not measured.
    """

    source: ModelSource
    model: Any
    chat: ChatFormat
    saes: tuple[SiteSAE, ...]
    recipe: Recipe
    fits: tuple[SAEFit, ...] = ()


def describe_numerics(model: Any, token_budget: int, shard_size: int) -> Numerics:
    """What changes rounding but not meaning."""
    device, layers = next(model.parameters()).device, decoder_layers(model)
    cuda = device.type == "cuda"
    return Numerics(
        attention=model.config._attn_implementation + (" in compiled layers" if are_compiled(layers) else ""),
        token_budget=token_budget,
        shard_size=shard_size,
        device=torch.cuda.get_device_name(device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        threads=0 if cuda else torch.get_num_threads(),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "sae-lens")},
    )


def describe_meaning(
    reference: Reference, preferences: Preferences, limits: Limits, *, keep_features: int | None, limit: int | None
) -> Meaning:
    """What the cache will mean; its hash is the cache's fingerprint."""
    return Meaning(
        format_version=FORMAT_VERSION,
        model=reference.source.sha256,
        tokenizer=tokenizer_sha256(reference.chat.tokenizer),
        chat_template=reference.chat.template,
        date=None if reference.chat.date is None else reference.chat.date.isoformat(),
        sites=tuple(SiteMeaning(sae.site.name, sae.sha256, sae.width, sae.architecture) for sae in reference.saes),
        recipe=reference.recipe,
        pooling="mean over prediction positions",
        keep_features=keep_features,
        max_length=limits.max_length,
        max_prompt_length=limits.max_prompt_length,
        truncation="prompt keeps BOS and its end, response keeps its start",
        skip_rules=tuple(SKIP_REASONS),
        drop_ties=limits.drop_ties,
        turns=limits.turns,
        dataset=preferences.content_hash,
        split=preferences.split,
        limit=limit,
        order="raw",
    )


def provenance(
    reference: Reference, preferences: Preferences, shards: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """Who made it, when and how fast: nothing of it is identity."""
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "model": reference.source.name,
        "saes": [sae.spec for sae in reference.saes],
        "sae_fits": [
            {name: value if math.isfinite(value) else None for name, value in asdict(fit).items()}
            for fit in reference.fits
        ],
        "dataset": preferences.source,
        "shards": shards,
        "scored_tokens": tokens,
        "seconds": round(seconds, 1),
        "fpo": importlib.metadata.version("fpo"),
        "git_revision": git_revision(),
    }


def git_revision() -> str | None:
    """The revision of this project's working copy, if the code runs from one; None otherwise."""
    project = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(project), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        top, _, revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")
    except OSError:
        return None
    return revision.strip() or None if Path(top) == project else None
