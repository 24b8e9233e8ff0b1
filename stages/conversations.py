"""Chat data to conversations whose assistant turns are to be learnt.

In: a hub id with configuration and split, or a local file or folder, with a column `messages` or `conversations`; a
chat format and a length. Out: token ids with a mask of the assistant's tokens, and what was
skipped or cut. Tokenising is a `datasets.map`: it shows its progress, and the same data are tokenised once.
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

from ..cache.files import canonical_json, sha256_file, sha256_text
from . import boundary, shapes
from . import chat as chat_file
from . import turns as turns_file
from .chat import ChatFormat, TemplateRefusalError, Turns
from .models import tokenizer_sha256
from .packing import Conversation
from .raw_rows import load_rows, parse_row
from .shapes import check_readable, conversation_column, read_conversation

CONVERSATION_SKIP_REASONS = (
    "no messages",
    "no assistant turn",
    "no turn before the first answer",
    "empty answer",
    "refused by the chat template",
    "no learnt token after truncation",
)

FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),
        "learnt": datasets.List(datasets.Value("bool")),
        "skipped": datasets.Value("string"),
        "truncated": datasets.Value("bool"),
    }
)


# What a row becomes depends on these files.
CODE = [__file__, *(module.__file__ for module in (boundary, chat_file, shapes, turns_file))]


class Conversations:
    """Tokenised conversations, in the order of their raw rows; those that were skipped have no number.

    Attributes:
        skipped: how many rows were skipped, by reason (`CONVERSATION_SKIP_REASONS`).
        truncated: how many conversations were cut at their end.
        tokens: tokens of all conversations.
        learnt_tokens: how many of them are the assistant's.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        """Takes rows with the columns of `FEATURES`, empty lists where skipped; `load_conversations` makes them."""
        self._table = rows.data
        skipped = rows["skipped"][:]
        self._raw_rows = [i for i, reason in enumerate(skipped) if reason is None]
        self._kept = rows.select(self._raw_rows).with_format("numpy")
        self.skipped = dict(Counter(reason for reason in skipped if reason is not None))
        self.truncated = sum(rows["truncated"][:])
        self.tokens = int(pc.sum(pc.list_value_length(self._table.column("ids"))).as_py() or 0)
        self.learnt_tokens = int(pc.sum(pc.list_flatten(self._table.column("learnt"))).as_py() or 0)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i: int) -> Conversation:
        row = self._kept[i]
        return Conversation(np.asarray(row["ids"], np.int32), np.asarray(row["learnt"], np.bool_), self._raw_rows[i])

    @cached_property
    def sha256(self) -> str:
        """Hash of all lengths, ids and masks: equal hashes mean the same training data, however they were stored."""
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
        max_length: tokens of a conversation; its end is cut.
        config: the hub data set's configuration; local data has none.
        limit: keep only the first so many raw rows.
        renames: `NEW=OLD`: the column OLD is called NEW.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ValueError: as `load_preferences`; no column with conversations; a row that is malformed, with its number; a
            template that does not only append, or closes answers in different ways.
    """
    rows = load_rows(source, split, config, limit, "conversations", renames)
    try:
        conversation_column(rows.columns)
        check_readable(rows.columns)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    tokenised = rows.data.map(
        partial(
            _tokenised_row,
            columns=tuple(rows.columns),
            chat=chat,
            max_length=max_length,
            source=source,
            split=split,
        ),
        with_indices=True,
        input_columns=["row"],
        remove_columns=["row"],
        features=FEATURES,
        new_fingerprint=_fingerprint(rows.data, chat, max_length),
        desc="tokenising",
    )
    return Conversations(tokenised)


def tokenize_conversation(
    turns: Turns, chat: ChatFormat, max_length: int
) -> tuple[Conversation | None, str | None, bool]:
    """Tokenises one conversation.

    What stands after the last answer is left out: nothing is learnt from it.

    Args:
        turns: the conversation.
        chat: the chat format.
        max_length: tokens that are kept.

    Returns:
        The conversation, or None and the reason to skip it; and whether its end was cut.

    Raises:
        ValueError: the template does not only append, or closes answers in different ways.
    """
    if (reason := _reason_to_skip(turns)) is not None:
        return None, reason, False
    try:
        ids, learnt = chat.conversation(turns)
    except TemplateRefusalError:
        return None, "refused by the chat template", False
    if not any(learnt[:max_length]):
        return None, "no learnt token after truncation", False
    conversation = Conversation(np.asarray(ids[:max_length], np.int32), np.asarray(learnt[:max_length], np.bool_))
    return conversation, None, len(ids) > max_length


def _reason_to_skip(turns: Turns) -> str | None:
    if not turns:
        return "no messages"
    roles = [message.role for message in turns]
    if "assistant" not in roles:
        return "no assistant turn"
    if not any(message.content.strip() for message in turns[: roles.index("assistant")]):
        return "no turn before the first answer"
    if any(message.role == "assistant" and not message.content.strip() for message in turns):
        return "empty answer"
    return None


def _tokenised_row(
    text: str, row: int, *, columns: Sequence[str], chat: ChatFormat, max_length: int, source: str, split: str
) -> dict[str, Any]:
    try:
        turns, _ = read_conversation(parse_row(text), columns)
        found, skipped, truncated = tokenize_conversation(turns, chat, max_length)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}, row {row} of split {split!r}: {error}") from error
    found = found or Conversation(np.zeros(0, np.int32), np.zeros(0, np.bool_))
    return {"ids": found.ids, "learnt": found.learnt, "skipped": skipped, "truncated": truncated}


def _fingerprint(rows: datasets.Dataset, chat: ChatFormat, max_length: int) -> str:
    """Names the result by all that it depends on; the library's own would overlook changes of the code."""
    content = {
        "rows": rows._fingerprint,
        "tokenizer": tokenizer_sha256(chat.tokenizer),
        "template": chat.template,
        "max_length": max_length,
        "code": [sha256_file(Path(str(file))) for file in CODE],
        "versions": [importlib.metadata.version(name) for name in ("transformers", "tokenizers")],
    }
    return sha256_text(canonical_json(content))[:32]
