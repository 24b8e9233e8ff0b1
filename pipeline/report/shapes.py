"""A model's shape and what follows from it alone: parameters, FLOPs of its tokens, bytes of its activations.

In: a model's name. Out: a `Shape`, from its configuration: a model without storage is made of it, no weights are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...stages.model.models import find_model

# Configurations of the profiles' models, for where their hub pages, whose licence has to be accepted, do not answer.
# Gemma2Config's own defaults are Gemma-2-2B.
_GEMMA2_9B = {
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
}
_GEMMA3_270M = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
_GEMMA3_1B = {
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
KNOWN: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "google/gemma-2-2b": ("gemma2", {}),
    "google/gemma-2-2b-it": ("gemma2", {}),
    "google/gemma-2-9b": ("gemma2", _GEMMA2_9B),
    "google/gemma-2-9b-it": ("gemma2", _GEMMA2_9B),
    "google/gemma-3-270m": ("gemma3_text", _GEMMA3_270M),
    "google/gemma-3-270m-it": ("gemma3_text", _GEMMA3_270M),
    "google/gemma-3-1b-it": ("gemma3_text", _GEMMA3_1B),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal LM.

    Attributes:
        body: parameters but for embedding and head.
        vocabulary: tokens that it knows.
        hidden: size of the residual stream.
        intermediate: size inside an MLP.
        layers: decoder layers.
        heads: query heads of a layer.
        kv_heads: key and value heads of a layer.
        head_dim: size of a head.
        norms: norms of the hidden size in a layer.
        tied: whether the head is the embedding.
        linear_edges: inputs plus outputs of all linear layers of the body: parameters of a LoRA adapter of rank 1.
        sdpa: whether transformers has scaled-dot-product attention for it.
        flex: whether it has flex attention for it.
    """

    body: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norms: int
    tied: bool
    linear_edges: int
    sdpa: bool
    flex: bool

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; an embedding that is also the head counts once."""
        return self.body + self.head * (1 if self.tied else 2)

    def layer_flops(self, tokens: float, attended: float) -> float:
        """FLOPs of a forward pass below the head.

        2 · body · tokens for the matrices, and 4 · layers · heads · head_dim · attended for the scores and what they
        weigh.

        Args:
            tokens: positions that are computed.
            attended: positions attended to, summed over those tokens (of one causal sequence of n, n²/2).
        """
        return 2 * self.body * tokens + 4 * self.layers * self.heads * self.head_dim * attended

    def head_flops(self, tokens: float) -> float:
        """FLOPs of the output head: 2 · vocabulary · hidden a token."""
        return 2 * self.head * tokens

    def layer_bytes(self, tokens: int, itemsize: int, scores: bool) -> float:
        """Bytes that one layer keeps for its backward.

        Counted as in Korthikanti et al. (2022), section 4.1, with the parts of these layers: a norm keeps its input and
        what it normalised in fp32 and gives a product its input; attention keeps queries, keys and values (repeated for
        every head) and its output; a gated MLP keeps gate, its activation, the other factor and their product.

        norms · hidden · (8 + itemsize) + itemsize · 4 · (heads · head_dim + intermediate) a token, and
        8 · heads · tokens where the scores are stored.

        Args:
            tokens: of the row.
            itemsize: bytes of a number in the compute recipe.
            scores: whether attention stores its scores (eager).
        """
        a_token = self.norms * self.hidden * (8 + itemsize)
        a_token += itemsize * 4 * (self.heads * self.head_dim + self.intermediate)
        return tokens * (a_token + (8 * self.heads * tokens if scores else 0))

    def kv_bytes(self, tokens: int, itemsize: int) -> float:
        """Bytes of the keys and values of so many tokens: 2 · layers · kv_heads · head_dim · itemsize a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize * tokens


def is_hub_id(name: str) -> bool:
    """Whether a model's name can only be a hub id here: `find_model` would ask the hub for it."""
    path = Path(name).expanduser()
    local = name.startswith((".", "~", "package:")) or path.is_absolute() or path.suffix == ".gguf" or path.is_dir()
    return not local and name.count("/") == 1


def shape_of(name: str) -> Shape:
    """The shape of a model.

    Args:
        name: as `--model` takes it.

    Raises:
        FileNotFoundError: if it is a path and there is nothing.
        ValueError: if its configuration cannot be had, or is not that of a causal LM.
    """
    return shape_of_config(configuration(name), name)


def shape_of_config(config: Any, name: str) -> Shape:
    """The shape of a transformers configuration; `name` is what an error calls it."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"model {name}: expected a causal LM, found a {config.model_type}; give another one"
        ) from error
    text, layers = config.get_text_config(), getattr(model.get_decoder(), "layers", None)
    if layers is None or not hasattr(text, "intermediate_size"):
        raise ValueError(
            f"model {name}: expected Llama's kind of layers, found a {config.model_type}; give another one"
        )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    outside = {id(embedding): embedding.numel(), id(head): head.numel()}
    weights = [weight for weight in layers[0].parameters() if weight.shape == (text.hidden_size,)]
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.weight is not head]
    return Shape(
        body=sum(weight.numel() for weight in model.parameters()) - sum(outside.values()),
        vocabulary=head.shape[0],
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=len(layers),
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        norms=len(weights),
        tied=embedding is head,
        linear_edges=sum(part.in_features + part.out_features for part in linear),
        sdpa=bool(model._supports_sdpa),
        flex=bool(model._supports_flex_attn),
    )


def configuration(name: str) -> Any:
    """A model's configuration: a local one, else one that is known here, else the hub's."""
    from transformers import AutoConfig

    if not is_hub_id(name):
        source = find_model(name)
        return AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file, trust_remote_code=False)
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except OSError:
        if name in KNOWN:
            kind, sizes = KNOWN[name]
            return AutoConfig.for_model(kind, **sizes)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"model {name}: its configuration is not here and the hub did not give it "
            f"({str(error).splitlines()[0]}); check the name and the network"
        ) from error
