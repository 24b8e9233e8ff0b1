"""The tokenizer of a model: loaded, identified, and checked against the model's embeddings.

In: a `ModelSource`. Out: the tokenizer; its hash for a cache's fingerprint.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import UserError, reading
from ...cache.files import canonical_json
from .models import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(source: ModelSource) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer beside the weights.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    with reading(f"model {source.name}: transformers cannot load its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, gguf_file=source.gguf_file, local_files_only=True, trust_remote_code=False
        )
        # Without the tokenizer's files, transformers makes up a tokenizer of special tokens alone.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise UserError("expected a tokenizer beside the weights, found no tokens; add the tokenizer's files")
    return tokenizer


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int] = ()) -> None:
    """Checks that the model embeds every ordinary token, and `ids`, which a chat template writes.

    Other added tokens may lack an embedding: some tokenizers have added tokens that no text contains.

    Raises:
        UserError: a token has no embedding.
    """
    check_tokens(model, [("tokenizer", [tokenizer.vocab_size - 1, *ids])], tokenizer)


def check_tokens(
    model: "PreTrainedModel",
    named: Iterable[tuple[str, Sequence[int] | NDArray[np.int32]]],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Checks that the model embeds every token of some texts, which may hold added tokens.

    Args:
        model: the model.
        named: where each text comes from, and its token ids.
        tokenizer: spells the token in the message.

    Raises:
        UserError: a token has no embedding; names the text and the token.
    """
    embeddings: Any = model.get_input_embeddings()
    known = len(embeddings.weight)
    for name, ids in named:
        if len(ids) and (largest := int(np.max(ids))) >= known:
            token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
            raise UserError(
                f"{name}: expected tokens below {known}, which the model embeds, found {largest}{token}; give a model "
                "and a tokenizer that belong together, or a text without this token"
            )


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of the tokenizer's pipeline and special tokens, not of its files or its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:  # state of the last call
        pipeline |= {"truncation": None, "padding": None}
    content = {"pipeline": pipeline, "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
