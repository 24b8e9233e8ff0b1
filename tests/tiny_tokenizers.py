"""Byte-level tokenizers of a few hundred tokens, in the two chat formats that matter here."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["What is the capital of France?", "The capital of France is Paris.", "It is Lyon, I think.", "user model\n"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _train(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def chatml() -> PreTrainedTokenizerFast:
    """No BOS of its own; its template closes a turn with `<|im_end|>` and a line break, and takes system turns."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train(["<|im_start|>", "<|im_end|>", "<|endoftext|>"]), eos_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def gemma(turn_tokens: bool = True) -> PreTrainedTokenizerFast:
    """Adds BOS to every text, and has no template, as Gemma's base models; without `turn_tokens`, turns are text."""
    special = ["<bos>", "<eos>"] + ["<start_of_turn>", "<end_of_turn>"] * turn_tokens
    backend = _train(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
