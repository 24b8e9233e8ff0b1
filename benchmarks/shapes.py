"""Models with random weights in the shape of a known one, their FLOPs, and one step of FPO on one pair.

In: a model's name, and what is to be different. Out: the model; a pair; a function that runs forward and backward.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fpo.cache.schema import Pair
from fpo.stages.model.attention import PACKED
from fpo.stages.model.flex import FLEX
from fpo.stages.model.models import Recipe, find_model, is_hub_id
from fpo.stages.model.sae import Site, SiteSAE
from fpo.stages.scoring.features import CachedFeatures, keep_largest
from fpo.stages.scoring.forward import row_layout, score_row
from fpo.stages.scoring.packing import PackedRow, pack

from .setting import KEPT, random_sae

# k of D_F: the default of `fpo align`.
TOP_K = 50

# Pairs of UltraFeedback's `train_prefs`, from its hub page.
ULTRAFEEDBACK = 61_135

# Shapes of models whose hub pages ask for a licence. Gemma2Config's own defaults are Gemma-2-2B.
_GEMMA2_9B = {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16}
_GEMMA2_9B |= {"num_key_value_heads": 8, "head_dim": 256}
KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "google/gemma-2-2b": ("gemma2", {}),
    "google/gemma-2-9b": ("gemma2", _GEMMA2_9B),
}


def configuration(name: str) -> Any:
    """A model's configuration: a local one, else one that is known here, else the hub's."""
    from transformers import AutoConfig

    if not is_hub_id(name):
        source = find_model(name)
        return AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file)
    if name in KNOWN:
        kind, sizes = KNOWN[name]
        return AutoConfig.for_model(kind, **sizes)
    return AutoConfig.from_pretrained(name)


def body_parameters(config: Any) -> int:
    """Parameters of the layers and norms: all but embedding and head."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    outside = {id(part.weight): part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    every = sum(weight.numel() for weight in model.parameters())
    return int(every - sum(weight.numel() for weight in outside.values()))


def layer_flops(config: Any, tokens: float, attended: float) -> float:
    """FLOPs of a forward pass below the head: 2 · body · tokens, and 4 · layers · heads · head_dim · attended.

    Args:
        config: the model's.
        tokens: positions that are computed.
        attended: positions attended to, summed over those tokens (of one causal sequence of n, n²/2).
    """
    text = config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return float(2 * body_parameters(config) * tokens + 4 * text.num_hidden_layers * width * attended)


def head_flops(config: Any, tokens: float) -> float:
    """FLOPs of the output head: 2 · vocabulary · hidden a token."""
    text = config.get_text_config()
    return float(2 * text.vocab_size * text.hidden_size * tokens)


def measured_rate(device: str, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a matrix product of a device."""
    size = 1024 if torch.device(device).type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)  # a GPU is faster on constants
    float((matrix @ matrix)[0, 0])  # starts what starts once, and waits for it
    products, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        float((matrix @ matrix)[0, 0])
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)


def random_model(name: str, device: str, *, layers: int | None = None, vocabulary: int | None = None) -> Any:
    """A model of a known shape with random weights, with the attention that `fpo` chooses for it."""
    from transformers import AutoModelForCausalLM

    config = configuration(name)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    config.vocab_size = vocabulary or config.vocab_size
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    flex, sdpa = kind._supports_flex_attn, kind._supports_sdpa
    attention = FLEX if device == "cuda" and flex else PACKED if sdpa else "eager"
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
    (row,) = pack(pairs, 2**62, row_layout(model))
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
