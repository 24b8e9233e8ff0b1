"""Chat data to tokenised conversations whose assistant turns are learnt.

In: a hub id with configuration and split, or a local file or folder, with a column `messages` or `conversations`; a
chat format and a length. Out: token ids with a mask of the assistant's tokens, and counts of what was skipped or cut.
`datasets.map` tokenises: it shows progress, and its cache spares tokenising the same data again.
"""

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from ...cache.errors import UserError
from ...cache.files import canonical_json, sha256_file, sha256_text
from ..model.tokenizer import tokenizer_sha256
from . import chat as chat_file
from . import cutting, rendering, shapes
from . import turns as turns_file
from .chat import ChatFormat, Turns, is_blank
from .raw_rows import load_rows, parse_row
from .rendering import ANEW, EMPTY, LEFT_OUT, OPENING, REFUSED, SHARED, SkipError, Tools
from .shapes import check_readable, conversation_column, read_conversation
from .tokenize import Conversation

CONVERSATION_SKIP_REASONS = (
    "no messages",
    "no assistant turn",
    "no turn before the first answer",
    EMPTY,
    SHARED,
    ANEW,
    OPENING,
    LEFT_OUT,
    REFUSED,
    "no learnt token after truncation",
)

FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),
        "learnt": datasets.List(datasets.Value("bool")),
        "skipped": datasets.Value("string"),
        "truncated": datasets.Value("bool"),
        "row": datasets.Value("int32"),
    }
)


# The code on which the tokens of a row depend.
CODE = [__file__, *(module.__file__ for module in (chat_file, cutting, rendering, shapes, turns_file))]


class Conversations:
    """Tokenised conversations, in the order of their raw rows and numbered without those that were skipped.

    Where the template renders an answer differently once a turn follows, each answer is a conversation of its own.

    Attributes:
        skipped: how many rows, or answers of a row, were skipped, by reason (`CONVERSATION_SKIP_REASONS`).
        truncated: how many conversations lost tokens at their end.
        tokens: how many tokens all conversations have.
        learnt_tokens: how many of these are the assistant's.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        """Takes the rows of `load_conversations`: the columns of `FEATURES`, with empty lists in skipped rows."""
        self._table = rows.data
        skipped = rows["skipped"][:]
        kept = [i for i, reason in enumerate(skipped) if reason is None]
        self._kept = rows.select(kept).with_format("numpy")
        self.skipped = dict(Counter(reason for reason in skipped if reason is not None))
        self.truncated = sum(rows["truncated"][:])
        self.tokens = int(pc.sum(pc.list_value_length(self._table.column("ids"))).as_py() or 0)
        self.learnt_tokens = int(pc.sum(pc.list_flatten(self._table.column("learnt"))).as_py() or 0)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i: int) -> Conversation:
        (found,) = self.__getitems__([i])
        return found

    def __getitems__(self, numbers: Sequence[int]) -> list[Conversation]:
        """Several at once, as PyTorch's loaders ask for a batch: one access to the table for all."""
        rows = self._kept[list(numbers)]
        return [
            Conversation(np.asarray(ids, np.int32), np.asarray(learnt, np.bool_), int(row))
            for ids, learnt, row in zip(rows["ids"], rows["learnt"], rows["row"], strict=True)
        ]

    def largest_token(self) -> tuple[str, int]:
        """The raw row that holds the largest token id, as "row N", and that id."""
        ids = self._table.column("ids")
        largest = pc.list_flatten(ids).to_numpy()
        place = int(np.argmax(largest))
        number = int(np.searchsorted(np.cumsum(pc.list_value_length(ids).to_numpy()), place, side="right"))
        return f"row {self._table.column('row')[number].as_py()}", int(largest[place])

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all lengths, ids and masks: equal for the same training data, however they were stored."""
        ids, learnt = self._table.column("ids"), self._table.column("learnt")
        digest = hashlib.sha256()
        for column in (pc.list_value_length(ids), pc.list_flatten(ids), pc.list_flatten(learnt)):
            for chunk in column.chunks:
                digest.update(np.ascontiguousarray(chunk.to_numpy(zero_copy_only=False)).tobytes())
        return digest.hexdigest()


def load_conversations(
    source: str,
    *,
    split: str,
    chat: ChatFormat,
    max_length: int,
    config: str | None = None,
    limit: int | None = None,
    renames: Sequence[str] = (),
) -> Conversations:
    """Opens chat data and tokenises it.

    Args:
        source: a local file or folder, or else a hub id, as in `load_preferences`.
        split: the name of the split.
        chat: the chat format.
        max_length: tokens that are kept of a conversation, from its beginning.
        config: the hub data set's configuration; local data has none.
        limit: keep only the first so many raw rows.
        renames: each `NEW=OLD` renames column OLD to NEW.

    Raises:
        UserError: as `load_preferences`; no column holds conversations; a row is malformed, in which case the
            message has its number; or the template closes answers in different ways.
    """
    rows = load_rows(source, split, config, limit, "conversations", renames)
    try:
        conversation_column(rows.columns)
        check_readable(rows.columns)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    tokenised = rows.data.map(
        partial(
            _tokenised_rows,
            columns=tuple(rows.columns),
            chat=chat,
            max_length=max_length,
            source=source,
            split=split,
        ),
        with_indices=True,
        batched=True,
        input_columns=["row"],
        remove_columns=["row"],
        features=FEATURES,
        new_fingerprint=_fingerprint(rows.data, chat, max_length),
        desc="tokenising",
    )
    return Conversations(tokenised)


def tokenize_conversation(
    turns: Turns, chat: ChatFormat, max_length: int, tools: Tools = ()
) -> tuple[list[Conversation], list[str], list[bool]]:
    """Tokenises one conversation up to its last answer: nothing is learnt from later turns.

    Args:
        turns: the conversation.
        chat: the chat format.
        max_length: tokens that are kept, from the beginning.
        tools: schemas of the tools that may be called.

    Returns:
        The conversation, or several where the template renders an answer differently once a turn follows; the reasons
        why the conversation, or an answer of it, is skipped; for each conversation, whether its end was cut.

    Raises:
        UserError: the template closes answers in different ways.
    """
    if (reason := _reason_to_skip(turns)) is not None:
        return [], [reason], []
    try:
        lessons, reasons = chat.lessons(turns, tools)
    except SkipError as error:
        return [], [error.reason], []
    found, truncated = [], []
    for ids, learnt in lessons:
        if not any(learnt[:max_length]):
            reasons.append("no learnt token after truncation")
            continue
        found.append(Conversation(np.asarray(ids[:max_length], np.int32), np.asarray(learnt[:max_length], np.bool_)))
        truncated.append(len(ids) > max_length)
    return found, reasons, truncated


def _reason_to_skip(turns: Turns) -> str | None:
    if not turns:
        return "no messages"
    roles = [message.role for message in turns]
    if "assistant" not in roles:
        return "no assistant turn"
    if not any(message.content.strip() for message in turns[: roles.index("assistant")]):
        return "no turn before the first answer"
    if any(message.role == "assistant" and is_blank(message) for message in turns):
        return EMPTY
    return None


def _tokenised_rows(
    texts: list[str],
    numbers: list[int],
    *,
    columns: Sequence[str],
    chat: ChatFormat,
    max_length: int,
    source: str,
    split: str,
) -> dict[str, list[Any]]:
    """The columns of `FEATURES` for a batch of raw rows: an entry for each conversation and each reason to skip."""
    made: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for row, text in zip(numbers, texts, strict=True):
        try:
            turns, tools = read_conversation(parse_row(text), columns)
            found, reasons, truncated = tokenize_conversation(turns, chat, max_length, tools)
        except (UserError, RecursionError) as error:
            raise UserError(f"{source}, row {row} of split {split!r}: {error}") from error
        entries = [(one.ids, one.learnt, None, cut, row) for one, cut in zip(found, truncated, strict=True)]
        no_tokens = (np.zeros(0, np.int32), np.zeros(0, np.bool_))  # typed: `datasets` joins them with the others
        for entry in [*entries, *((*no_tokens, reason, False, row) for reason in reasons)]:
            for name, value in zip(FEATURES, entry, strict=True):
                made[name].append(value)
    return made


def _fingerprint(rows: datasets.Dataset, chat: ChatFormat, max_length: int) -> str:
    """Names the result by all that it depends on; the fingerprint of `datasets` overlooks changes of the code."""
    content = {
        "rows": rows._fingerprint,
        "tokenizer": tokenizer_sha256(chat.tokenizer),
        "template": chat.template,
        "date": None if chat.date is None else chat.date.isoformat(),
        "max_length": max_length,
        "code": [sha256_file(Path(str(file))) for file in CODE],
        "versions": [importlib.metadata.version(name) for name in ("transformers", "tokenizers")],
    }
    return sha256_text(canonical_json(content))[:32]
