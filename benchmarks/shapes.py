"""Models with random weights in a known shape, their FLOPs, and one step of FPO on one row.

In: a model's name, layers and vocabulary. Out: the model; SAEs; a pair; a function that runs forward and backward.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fpo.cache.schema import Pair
from fpo.stages.model.models import Recipe, attentions_of, find_model, is_hub_id
from fpo.stages.model.sae import Site, SiteSAE
from fpo.stages.scoring.features import CachedFeatures, keep_largest
from fpo.stages.scoring.forward import row_layout, score_row
from fpo.stages.scoring.packing import pack

from .setting import KEPT, random_sae

# k of D_F: the default of `fpo align`.
TOP_K = 50

# Number of pairs in UltraFeedback's `train_prefs`, from its hub page.
ULTRAFEEDBACK = 61_135

# Shapes of models whose hub pages ask for a licence. Gemma2Config's own defaults are Gemma-2-2B.
_GEMMA2_9B = {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16}
_GEMMA2_9B |= {"num_key_value_heads": 8, "head_dim": 256}
KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "google/gemma-2-2b": ("gemma2", {}),
    "google/gemma-2-9b": ("gemma2", _GEMMA2_9B),
}


def configuration(name: str) -> Any:
    """A model's configuration: a local model's, else one of `KNOWN`, else the hub's."""
    from transformers import AutoConfig

    if not is_hub_id(name):
        source = find_model(name)
        return AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file)
    if name in KNOWN:
        kind, sizes = KNOWN[name]
        return AutoConfig.for_model(kind, **sizes)
    return AutoConfig.from_pretrained(name)


def body_parameters(config: Any) -> int:
    """Number of parameters without embedding and head."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    outside = {id(part.weight): part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    every = sum(weight.numel() for weight in model.parameters())
    return int(every - sum(weight.numel() for weight in outside.values()))


def layer_flops(config: Any, tokens: float, attended: float) -> float:
    """FLOPs of a forward pass below the head: 2 · body · tokens, and 4 · layers · heads · head_dim · attended.

    Args:
        config: the model's configuration.
        tokens: number of tokens.
        attended: positions attended to, summed over the tokens (n²/2 for a causal sequence of n).
    """
    text = config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return float(2 * body_parameters(config) * tokens + 4 * text.num_hidden_layers * width * attended)


def head_flops(config: Any, tokens: float) -> float:
    """FLOPs of the output head: 2 · vocabulary · hidden size · tokens."""
    text = config.get_text_config()
    return float(2 * text.vocab_size * text.hidden_size * tokens)


def measured_rate(device: str, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a device in square matrix products."""
    size = 1024 if torch.device(device).type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)  # on constants a GPU is faster
    float((matrix @ matrix)[0, 0])  # warms up, and waits
    products, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        float((matrix @ matrix)[0, 0])
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)


def random_model(name: str, device: str, *, layers: int | None = None, vocabulary: int | None = None) -> Any:
    """A model with random weights and the attention that `fpo` chooses for it."""
    from transformers import AutoModelForCausalLM

    config = configuration(name)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    config.vocab_size = vocabulary or config.vocab_size
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    attention = attentions_of(kind, config, device)[0]
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()


def saes_at(layers: Sequence[int], hidden: int, width: int, device: str) -> list[SiteSAE]:
    """Random SAEs without decoders, which would double their memory and are never read."""
    made = []
    for layer in layers:
        sae = random_sae(hidden, width, Site(layer, "resid_post"))
        sae.W_dec.data = torch.empty(0)
        made.append(SiteSAE(Site(layer, "resid_post"), sae.to(device).eval().requires_grad_(False), "", ""))
    return made


def random_pair(prompt: int, response: int, vocabulary: int, seed: int = 0) -> Pair:
    """A pair of random tokens, its responses equally long."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, vocabulary, size, dtype=np.int32) for size in (prompt, response, response)]
    return Pair("0" * 16 + "-0", *ids)


def cached_features(pooled: Sequence[torch.Tensor], device: str) -> list[CachedFeatures]:
    """Pooled features as a cache would hold them, scaled by 1.1 so that D_F is not 0."""
    made = []
    for pooled_RM in pooled:
        kept = [keep_largest(row_M * 1.1, KEPT) for row_M in pooled_RM]
        made.append(CachedFeatures.collate(kept, pooled_RM.shape[1]).to(device))
    return made


def fpo_step(model: Any, pairs: Sequence[Pair], saes: Sequence[SiteSAE], recipe: Recipe) -> Callable[[], None]:
    """A function: forward and backward of FPO on one row. Gradients stay allocated, as between two steps of a run."""
    device = next(model.parameters()).device.type
    (row,) = pack(pairs, 2**62, row_layout(model))
    row = row.to(device)
    with torch.no_grad():
        cached = cached_features(score_row(model, row, saes, recipe).pooled, device)

    def step() -> None:
        scores = score_row(model, row, saes, recipe, cached=cached, top_k=TOP_K)
        drift = sum((drift.mse_R.sum() for drift in scores.drifts), start=torch.zeros((), device=device))
        (drift - scores.logps_R.sum()).backward()

    return step
