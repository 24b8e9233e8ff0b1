"""From a preference example to a tokenised pair.

In: an `Example`, a chat format, and limits of length. Out: the pair, cut to the limits, or why there is none.
"""

from dataclasses import dataclass

import numpy as np

from ..cache.schema import Pair, pair_id
from .chat import ChatFormat, Example, TemplateRefusalError, Text

SKIP_REASONS = (
    "responses of several turns",
    "empty response",
    "identical responses",
    "empty prompt",
    "tie",
    "identical after truncation",
    "refused by the chat template",
)


@dataclass(frozen=True)
class Limits:
    """How much of a pair is kept.

    Attributes:
        max_length: tokens of prompt and one response together; the response's end is cut.
        max_prompt_length: tokens of the prompt; BOS and the prompt's end are kept.
        drop_ties: skip pairs whose scores are equal, instead of only counting them.

    Raises:
        ValueError: the prompt could fill the whole length, or has no room for BOS and one token.
    """

    max_length: int
    max_prompt_length: int
    drop_ties: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                "expected 2 <= max_prompt_length < max_length, so that there is room for a response, "
                f"found {self.max_prompt_length} and {self.max_length}"
            )


@dataclass(frozen=True)
class Tokenized:
    """What became of one raw row.

    Attributes:
        pair: the tokenised pair, or `None` if it was skipped.
        skipped: one of `SKIP_REASONS`, or `None`.
        tie: both responses have the same score (skipped or not).
        prompt_truncated: the prompt was cut.
        responses_truncated: how many of the two responses were cut.
    """

    pair: Pair | None
    skipped: str | None
    tie: bool
    prompt_truncated: bool = False
    responses_truncated: int = 0


def tokenize_pair(example: Example, raw_row: int, chat: ChatFormat, limits: Limits) -> Tokenized:
    """Tokenises one example and cuts it to the limits.

    Args:
        example: the pair as text.
        raw_row: its row number in the split, from 0.
        chat: the chat format that makes tokens of it.
        limits: the lengths to cut to, and what to do with ties.

    Raises:
        ValueError: the chat template does not close every answer alike; the message has the row's number.
    """
    skipped = _reason_to_skip(example, limits)
    if skipped is not None:
        return Tokenized(None, skipped, example.tie)
    try:
        prompt, *responses = chat.prompt_and_responses(example)
    except TemplateRefusalError:
        return Tokenized(None, "refused by the chat template", example.tie)
    except ValueError as error:
        raise ValueError(f"row {raw_row}: {error}") from error
    if responses[0] == responses[1]:  # they differed in white space that the template trims
        return Tokenized(None, "identical responses", example.tie)

    kept_prompt = prompt
    if len(prompt) > limits.max_prompt_length:
        bos = prompt[:1] if prompt[0] == chat.bos_id else []
        kept_prompt = bos + prompt[len(prompt) - limits.max_prompt_length + len(bos) :]
    room = limits.max_length - len(kept_prompt)
    kept = [response[:room] for response in responses]
    if kept[0] == kept[1]:
        return Tokenized(None, "identical after truncation", example.tie)
    ids = [np.asarray(part, dtype=np.int32) for part in (kept_prompt, *kept)]
    return Tokenized(
        Pair(pair_id(ids[0], ids[1], ids[2], raw_row), ids[0], ids[1], ids[2]),
        None,
        example.tie,
        prompt_truncated=len(prompt) > limits.max_prompt_length,
        responses_truncated=sum(len(response) > room for response in responses),
    )


def _reason_to_skip(example: Example, limits: Limits) -> str | None:
    if not example.one_answer_each:
        return "responses of several turns"
    if _is_blank(example.chosen) or _is_blank(example.rejected):
        return "empty response"
    if example.chosen == example.rejected:
        return "identical responses"
    if _is_blank(example.prompt):
        return "empty prompt"
    return "tie" if limits.drop_ties and example.tie else None


def _is_blank(text: Text) -> bool:
    return not (text if isinstance(text, str) else "".join(message.content for message in text)).strip()
