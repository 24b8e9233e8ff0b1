"""Models with random weights in the shape of a known one, and one step of FPO on one pair.

In: a model's name, and what is to be different. Out: the model; a pair; a function that runs forward and backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fpo.cache.schema import Pair
from fpo.pipeline.report.shapes import configuration, shape_of_config
from fpo.stages.model.models import Recipe
from fpo.stages.model.sites import Site, SiteSAE
from fpo.stages.scoring.attention import PACKED
from fpo.stages.scoring.features import CachedFeatures, keep_largest
from fpo.stages.scoring.flex import FLEX
from fpo.stages.scoring.forward import row_layout, score_row
from fpo.stages.scoring.packing import PackedRow, pack

from .setting import KEPT, random_sae

# k of D_F: the default of `fpo align`.
TOP_K = 50


def random_model(name: str, device: str, *, layers: int | None = None, vocabulary: int | None = None) -> Any:
    """A model of a known shape with random weights, with the attention that `fpo` chooses for it."""
    from transformers import AutoModelForCausalLM

    config = configuration(name)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    config.vocab_size = vocabulary or config.vocab_size
    shape = shape_of_config(config, name)
    attention = FLEX if device == "cuda" and shape.flex else PACKED if shape.sdpa else "eager"
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()


def saes_at(layers: Sequence[int], hidden: int, width: int, device: str) -> list[SiteSAE]:
    """Random SAEs without their decoders, which would take as much memory again and are never read."""
    made = []
    for layer in layers:
        sae = random_sae(hidden, width, Site(layer, "resid_post"))
        sae.W_dec.data = torch.empty(0)
        made.append(SiteSAE(Site(layer, "resid_post"), sae.to(device).eval().requires_grad_(False), "", ""))
    return made


def random_pair(prompt: int, response: int, vocabulary: int, seed: int = 0) -> Pair:
    """A pair of random tokens whose responses are equally long."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, vocabulary, size, dtype=np.int32) for size in (prompt, response, response)]
    return Pair("0" * 16 + "-0", *ids)


def packed_row(model: Any, pairs: Sequence[Pair], device: str) -> PackedRow:
    """All pairs in one row."""
    (row,) = pack(pairs, 2**62, *row_layout(model))
    return row.to(device)


def cached_features(pooled: Sequence[torch.Tensor], device: str) -> list[CachedFeatures]:
    """What a cache would hold of pooled features, moved a little so that there is a drift."""
    made = []
    for pooled_RM in pooled:
        kept = [keep_largest(row_M * 1.1, KEPT) for row_M in pooled_RM]
        made.append(CachedFeatures.collate(kept, pooled_RM.shape[1]).to(device))
    return made


def fpo_step(model: Any, pairs: Sequence[Pair], saes: Sequence[SiteSAE], recipe: Recipe) -> Callable[[], None]:
    """Forward and backward of FPO on one row; gradients stay allocated, as between two steps of a run."""
    device = next(model.parameters()).device.type
    row = packed_row(model, pairs, device)
    with torch.no_grad():
        cached = cached_features(score_row(model, row, saes, recipe).pooled, device)

    def step() -> None:
        scores = score_row(model, row, saes, recipe, cached=cached, top_k=TOP_K)
        drift = sum((drift.mse_R.sum() for drift in scores.drifts), start=torch.zeros((), device=device))
        (drift - scores.logps_R.sum()).backward()

    return step
