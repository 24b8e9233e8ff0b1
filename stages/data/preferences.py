"""Preference data to examples: a prompt, a chosen and a rejected response, whatever shape they were stored in.

In: a hub id with configuration and split, or a local file or folder. Out: `Example`s, and a hash of their content.
raw_rows.py opens the data, shapes.py reads the prompt's columns; this file finds where the responses begin: after the
last turn that both sides share.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from ...cache.errors import UserError
from .chat import Example, Message, Text, Turns
from .raw_rows import RawRows, load_rows
from .shapes import (
    PARTS,
    SCORES,
    SIDES,
    Row,
    asked,
    bare,
    check_readable,
    check_said,
    is_no_prompt,
    of_both_sides,
    of_conversations,
    of_messages,
    option,
    plain_name,
    shape_of,
    tools_of,
    with_system,
)
from .turns import from_json, read_text


class Read(NamedTuple):
    """A row as it was read.

    Attributes:
        example: the preference pair.
        guessed: whether the prompt is a guess: the common beginning of two texts.
    """

    example: Example
    guessed: bool


class Preferences:
    """Preference examples of one split, in the order of the raw rows.

    Attributes:
        source: the hub id or path it was loaded from.
        split: the split's name, as it was asked for.
    """

    def __init__(self, rows: RawRows | Sequence[Row], *, source: str, split: str) -> None:
        """Takes rows as dicts; `load_preferences` opens files, folders and data sets on the hub."""
        self._rows = rows
        self._columns = (
            rows.columns if isinstance(rows, RawRows) else dict.fromkeys(name for row in rows for name in row)
        )
        self.source = source
        self.split = split

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, i: int) -> Example:
        """The example in raw row `i`.

        Raises:
            UserError: the row has a value of a wrong type or an unknown shape; the message has the row's number.
        """
        return self._read(i).example

    @property
    def content_hash(self) -> str:
        """SHA-256 over all examples, scores included: independent of file format, shape and unused columns."""
        return self._survey[0]

    @property
    def guessed_prompts(self) -> int:
        """How many prompts are guesses: no column held one, so the common beginning of both texts is taken."""
        return self._survey[1]

    @cached_property
    def _survey(self) -> tuple[str, int]:
        digest, guessed = hashlib.sha256(), 0
        for i in range(len(self)):
            e, was_guessed = self._read(i)
            texts = [_plain(text) for text in (e.prompt, e.chosen, e.rejected)]
            content = [*texts, e.score_chosen, e.score_rejected, *([list(e.tools)] if e.tools else [])]
            digest.update(json.dumps(content).encode() + b"\n")
            guessed += was_guessed
        return digest.hexdigest(), guessed

    def _read(self, i: int) -> Read:
        try:
            return read_pair(self._rows[i], self._columns)
        except (UserError, RecursionError) as error:
            raise UserError(f"{self.source}, row {i} of split {self.split!r}: {error}") from error


def load_preferences(
    source: str,
    *,
    split: str,
    config: str | None = None,
    limit: int | None = None,
    renames: Sequence[str] = (),
) -> Preferences:
    """Opens preference data.

    A local file is the whole split, whatever its name. In a folder, the split is the sub-folder `<split>/`, the files
    `data/<split>-*`, or the files whose names begin with the split's; or the folder is one that `save_to_disk` wrote.

    Args:
        source: a local file or folder, or else a hub id.
        split: the name of the split.
        config: the hub data set's configuration; local data has none.
        limit: keep only the first so many raw rows.
        renames: each `NEW=OLD` renames column OLD to NEW.

    Raises:
        UserError: there is no such file, folder, hub data set, split or column; a file is damaged or of another kind;
            or a setting would be ignored.
    """
    rows = load_rows(source, split, config, limit, renames=renames)
    try:
        shape_of(rows.columns)
        check_readable(rows.columns)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return Preferences(rows, source=source, split=split)


def _plain(text: Text) -> Any:
    if isinstance(text, str):
        return text
    return [[message.role, message.content, *([message.more] if message.more else [])] for message in text]


# One row.


def read_pair(row: Row, columns: Collection[str]) -> Read:
    """The example in a raw row; null counts as empty.

    Args:
        row: the row.
        columns: the names of the data set's columns; the row may lack some.

    Raises:
        UserError: a value has a wrong type, or a part of the conversation cannot be used.
    """
    shape = shape_of(columns)
    prompt = shape.prompt(row)
    chosen, rejected = _sides(row)
    if isinstance(prompt, tuple) and shape.prompt in (of_conversations, of_messages):
        prompt = before(prompt, chosen, rejected)
    guessed = False
    parts: tuple[Text, Text, Text]
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
        parts = join(prompt, chosen, rejected)
    elif (dialogues := split_dialogues(prompt, chosen, rejected)) is not None:
        parts = dialogues
    elif shape.prompt is not of_both_sides:
        talk = {"system", "tools"} & set(columns)  # plain text has no place for them
        parts = join(asked(prompt), chosen, rejected) if talk else (prompt, chosen, rejected)
    else:
        parts = _guessed(row, chosen, rejected)
        guessed = bool(parts[0].strip())
    prompt, chosen, rejected = parts
    if isinstance(prompt, tuple):
        prompt = with_system(prompt, row)
    score_chosen, score_rejected = (_score(row, name) for name in SCORES)
    check_said(row, prompt, chosen, used={*shape.columns, "system", "tools"})
    return Read(Example(prompt, chosen, rejected, score_chosen, score_rejected, tools_of(row)), guessed)


def _sides(row: Row) -> tuple[Text, Text]:
    """Both responses; each may begin with the conversation before it."""
    values = [row[name] if name in row else row.get(other) for name, other in SIDES.items()]
    parsed = [from_json(value, name) for name, value in zip(SIDES, values, strict=True)]
    if not any(isinstance(value, str) and value for value in parsed):
        values = parsed  # JSON on both sides; JSON on one side alone is the answer itself
    chosen, rejected = (read_text(value, name) for name, value in zip(SIDES, values, strict=True))
    for text, other in ((chosen, rejected), (rejected, chosen)):
        if isinstance(text, str) and text and isinstance(other, tuple) and other:
            raise UserError("expected 'chosen' and 'rejected' of one kind, found text beside messages")
    return chosen, rejected


def _score(row: Row, name: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"expected a finite number or null in {name!r}, found {value!r:.80}")
    return number


def _guessed(row: Row, chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning of two texts as the prompt; refused where another column may hold the prompt."""
    for name, value in row.items():
        if not value or name in {*SIDES, *SIDES.values()}:
            continue
        if name in ("system", "tools"):
            raise UserError(
                f"expected a column with the prompt beside {name!r}, found none; name it with --map prompt=…"
            )
        several_words = isinstance(value, str) and len(value.split()) > 1
        if plain_name(name) in PARTS or (several_words and not is_no_prompt(name)):
            raise UserError(
                f"expected a column with the prompt, found none, and {name!r}, which may be it; say so with "
                f"--map {option('prompt', name)}, or leave it out with --map {option('unused', name)}"
            )
    return common_beginning(chosen, rejected)


# Where the responses begin.


def join(prompt: Text, chosen: Text, rejected: Text) -> tuple[Turns, Turns, Turns]:
    """The shared turns and both responses, of parts that are not all text.

    Raises:
        UserError: a side neither follows the prompt nor begins with it.
    """
    sides = [_answer(side) for side in (chosen, rejected)]
    if isinstance(prompt, tuple):
        return split_turns(*(_after(prompt, side) for side in sides))
    if prompt.strip() and all(side[0].role == "assistant" for side in sides if side):
        return join((Message("user", prompt),), *sides)
    for side in filter(None, sides):
        if not any(bare(prompt) in bare(message.content) for message in side):
            raise UserError(
                f"expected the text of the prompt among the turns of both sides, which begin with {side[0].role!r}, "
                "found it in none; leave one of the two out"
            )
    return split_turns(*sides)


def before(told: Turns, chosen: Text, rejected: Text) -> Turns:
    """The turns before the responses, of a conversation that may end with the chosen response.

    Raises:
        UserError: it ends with an answer that is not the chosen one.
    """
    answer = _answer(chosen)
    if told == answer:
        return ()  # both sides hold the whole conversation
    if answer and told[-len(answer) :] == answer:
        return told[: -len(answer)]
    alone = all(side[0].role == "assistant" for side in map(_answer, (chosen, rejected)) if side)
    if alone and told and told[-1].role == "assistant":
        raise UserError("expected a conversation that both sides answer, found one whose last turn is another answer")
    return told


def split_turns(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """The turns that both sides share, and those that follow on either side."""
    shorter, longer = sorted((chosen, rejected), key=len)
    if longer[: len(shorter)] == shorter:
        # The longer side begins with the other one: only its last answer can be the response.
        shared = len(longer) - (bool(longer) and longer[-1].role == "assistant")
    else:
        shared = next(i for i in range(len(shorter)) if chosen[i] != rejected[i])
    return longer[:shared], chosen[shared:], rejected[shared:]


def _answer(side: Text) -> Turns:
    if isinstance(side, tuple):
        return side
    return (Message("assistant", side),) if side else ()


def _after(prompt: Turns, side: Turns) -> Turns:
    """The prompt and one side, which may repeat the prompt; only one of the two may hold the system turn."""
    if side[: len(prompt)] == prompt:
        return side
    first, rest = prompt[:1], prompt[1:]
    if first[0].role == "system" and rest and side[: len(rest)] == rest:
        return first + side
    if side and side[0].role == "system" and side[1 : 1 + len(prompt)] == prompt:
        return side
    if side and prompt[-1].role == "user" and side[0].role in ("user", "system"):
        raise UserError(f"expected an answer to the prompt or the prompt itself, found a turn of {side[0].role!r}")
    return prompt + side


def common_beginning(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The longest common beginning of two texts, and what follows it on either side.

    As in TRL, a space at the end of the common beginning belongs to the responses.
    """
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), shorter)
    if chosen == rejected:
        shared = 0
    elif 0 < shared < shorter and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_dialogues(prompt: str, chosen: str, rejected: str) -> tuple[Turns, Turns, Turns] | None:
    """The turns of Anthropic-HH dialogues, where both sides or the prompt are dialogues; None for other texts.

    Raises:
        UserError: both sides are dialogues, but they do not hold the prompt.
    """
    sides = [side for side in (chosen, rejected) if side]
    if sides and all(map(_is_dialogue, sides)):
        if not all(bare(prompt) in bare(side) for side in sides):
            raise UserError(
                "expected the text of 'prompt' in the dialogues of 'chosen' and 'rejected', found other text"
            )
        return split_turns(_parse_dialogue(chosen), _parse_dialogue(rejected))
    if not _is_dialogue(prompt):
        return None
    turns = _parse_dialogue(prompt)
    opened = turns[-1] == Message("assistant", "")
    answers = [(Message("assistant", side.strip()),) for side in (chosen, rejected)]
    return turns[:-1] if opened else turns, answers[0], answers[1]


def _is_dialogue(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _parse_dialogue(text: str) -> Turns:
    """The turns of a dialogue, without white space at the ends of their contents."""
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", text)
    return tuple(Message(roles[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True))
