"""A preference example to a tokenised pair, cut to the limits of length.

In: an `Example`, a chat format and limits. Out: the pair, or the reason why it is skipped. `Conversation` is what both
stages call a tokenised conversation.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import UserError
from ...cache.schema import Int32, Pair, pair_id
from .chat import ChatFormat, Example, Response, Text, Turned, is_blank
from .rendering import ANEW, EMPTY, LEFT_OUT, OPENING, REFUSED, SHARED, SkipError

WHITE_SPACE = "responses that differ in white space alone"

SKIP_REASONS = (
    EMPTY,
    "identical responses",
    WHITE_SPACE,
    "empty prompt",
    "tie",
    SHARED,
    ANEW,
    OPENING,
    LEFT_OUT,
    "identical after truncation",
    "no learnt token after truncation",
    REFUSED,
)


@dataclass(frozen=True, eq=False)
class Conversation:
    """A tokenised conversation.

    Attributes:
        ids: int32 [length], token ids.
        learnt: bool [length], which of them are the assistant's and learnt; never the first one.
        raw_row: its row in the raw data; None if it comes from no data set.
    """

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    raw_row: int | None = None


@dataclass(frozen=True)
class Limits:
    """How much of a pair is kept, and which answers are learnt.

    Attributes:
        max_length: tokens of prompt and one response together; the response's end is cut.
        max_prompt_length: tokens of the prompt; BOS and the prompt's end are kept.
        drop_ties: skip pairs whose scores are equal; without it they are kept and counted.
        turns: which assistant turns of a response of several are learnt.

    Raises:
        UserError: the prompt may fill the whole length, or has no room for BOS and one token.
    """

    max_length: int
    max_prompt_length: int
    drop_ties: bool = False
    turns: Turned = "all"

    def __post_init__(self) -> None:
        if not 2 <= self.max_prompt_length < self.max_length:
            raise UserError(
                "expected 2 <= max_prompt_length < max_length, so that there is room for a response, "
                f"found {self.max_prompt_length} and {self.max_length}"
            )


@dataclass(frozen=True)
class Tokenized:
    """One raw row, tokenised or skipped.

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
        limits: the lengths to cut to, the answers to learn, and whether to drop ties.

    Raises:
        UserError: the pair mixes text and turns, or the template closes this answer differently from others;
            the message has the row's number.
    """
    skipped = _reason_to_skip(example, limits)
    if skipped is not None:
        return Tokenized(None, skipped, example.tie)
    try:
        prompt, *responses = chat.prompt_and_responses(example, limits.turns)
    except SkipError as error:
        return Tokenized(None, error.reason, example.tie)
    except ValueError as error:  # a tokenizer refuses text that is not Unicode as well
        raise UserError(f"row {raw_row}: {error}") from error
    if responses[0] == responses[1]:
        return Tokenized(None, "identical responses", example.tie)

    kept_prompt = prompt
    if len(prompt) > limits.max_prompt_length:
        bos = prompt[:1] if prompt[0] == chat.bos_id else []
        kept_prompt = bos + prompt[len(prompt) - limits.max_prompt_length + len(bos) :]
    room = limits.max_length - len(kept_prompt)
    kept = [_cut(response, room) for response in responses]
    if not all(response.learnt for response in kept):
        return Tokenized(None, "no learnt token after truncation", example.tie)
    if kept[0] == kept[1]:
        return Tokenized(None, "identical after truncation", example.tie)
    ids = (_int32(kept_prompt), _int32(kept[0].ids), _int32(kept[1].ids))
    return Tokenized(
        Pair(pair_id(*ids, raw_row), *ids, _int32(kept[0].learnt).ravel(), _int32(kept[1].learnt).ravel()),
        None,
        example.tie,
        prompt_truncated=len(prompt) > limits.max_prompt_length,
        responses_truncated=sum(len(response.ids) > room for response in responses),
    )


def _cut(response: Response, room: int) -> Response:
    """The response's first `room` tokens, without those after the last one that is learnt."""
    learnt = [(start, min(stop, room)) for start, stop in response.learnt if start < room]
    return Response(response.ids[: learnt[-1][1] if learnt else 0], learnt)


def _int32(values: object) -> Int32:
    return np.asarray(values, dtype=np.int32)


def _reason_to_skip(example: Example, limits: Limits) -> str | None:
    if _is_empty(example.chosen) or _is_empty(example.rejected):
        return EMPTY
    if example.chosen == example.rejected:
        return "identical responses"
    if _without_white_space(example.chosen) == _without_white_space(example.rejected):
        return WHITE_SPACE
    if _is_blank(example.prompt):
        return "empty prompt"
    return "tie" if limits.drop_ties and example.tie else None


def _is_blank(prompt: Text) -> bool:
    return not prompt.strip() if isinstance(prompt, str) else all(map(is_blank, prompt))


def _is_empty(response: Text) -> bool:
    """Whether a response has no answer, or an answer that says nothing."""
    if isinstance(response, str):
        return not response.strip()
    answers = [message for message in response if message.role == "assistant"]
    return not answers or any(map(is_blank, answers))


def _without_white_space(text: Text) -> object:
    if isinstance(text, str):
        return "".join(text.split())
    return [(message.role, "".join(message.content.split()), dict(message.more)) for message in text]
