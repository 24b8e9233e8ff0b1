"""The shapes in which preference data and conversations are stored, one function each.

In: a raw row and the names of the data set's columns. Out: an `Example`, or a conversation with its tools. What looks
like a part of the conversation is used, or said elsewhere in the row, or refused; other columns do not matter.
docs/data.md has the table.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...cache.errors import UserError
from .chat import Example, Message, Text, Turns
from .column_names import (
    PARTS,
    SCORES,
    SIDES,
    is_no_prompt,
    known_as,
    option,
    plain_name,
    suggested_name,
    unknown_columns,
)
from .turns import bare, before, common_beginning, from_json, join, parsed, read_text, read_tools, split_dialogues

Row = Mapping[str, Any]
Tools = tuple[Mapping[str, Any], ...]


class Read(NamedTuple):
    """What a row says.

    Attributes:
        example: the preference pair.
        guessed: whether its prompt is but the texts' common beginning.
    """

    example: Example
    guessed: bool


@dataclass(frozen=True)
class Shape:
    """A way to store the prompt.

    Attributes:
        columns: the columns that it takes beside both responses; the first decides.
        prompt: the prompt of a row.
    """

    columns: tuple[str, ...]
    prompt: Callable[[Row], Text]


def of_prompt(row: Row) -> Text:
    """`prompt`: text, or messages."""
    return read_text(from_json(row.get("prompt"), "prompt"), "prompt")


def of_instruction(row: Row) -> Turns:
    """Alpaca's `instruction`, with `input` on a line below it where there is one, after `history`."""
    instruction, given = (read_text(row.get(name), name) for name in ("instruction", "input"))
    if not (isinstance(instruction, str) and isinstance(given, str)):
        raise UserError("expected text in 'instruction' and 'input', found messages")
    return _history(row) + _asked("\n".join(part for part in (instruction, given) if part.strip()))


def of_question(row: Row) -> Turns:
    """`question`, after `history`."""
    return _history(row) + _asked(read_text(from_json(row.get("question"), "question"), "question"))


def of_conversations(row: Row) -> Turns:
    """ShareGPT's `conversations`: what was said before both sides."""
    return _turns(row.get("conversations"), "conversations")


def of_input(row: Row) -> Turns:
    """`input`, after `history`; or OpenAI's object of `messages` and `tools`."""
    value = _input(row)
    if not isinstance(value, dict) or "messages" not in value:
        return _history(row) + _asked(read_text(from_json(value, "input"), "input"))
    for key in sorted(set(value) - {"messages", "tools", "parallel_tool_calls"}):
        if value[key]:
            raise UserError(f"expected 'messages', 'tools' and 'parallel_tool_calls' in 'input', found {key!r}")
    return _turns(value["messages"], "input")


def of_messages(row: Row) -> Turns:
    """`messages`: what was said before both sides."""
    return _turns(row.get("messages"), "messages")


def of_both_sides(row: Row) -> Text:
    """Nothing beside both sides: they begin with the prompt."""
    return ""


SHAPES = (
    Shape(("prompt",), of_prompt),
    Shape(("instruction", "input", "history"), of_instruction),
    Shape(("question", "history"), of_question),
    Shape(("conversations",), of_conversations),
    Shape(("input", "history"), of_input),
    Shape(("messages",), of_messages),
    Shape((), of_both_sides),
)


def shape_of(columns: Collection[str]) -> Shape:
    """The shape of a data set with these columns.

    Raises:
        UserError: none has them; names the nearest one.
    """
    if all(name in columns or other in columns for name, other in SIDES.items()):
        return next(shape for shape in SHAPES if not shape.columns or shape.columns[0] in columns)
    firsts = [shape.columns[0] for shape in SHAPES if shape.columns]
    prompt = next((name for name in firsts if known_as(name, columns) is not None), "prompt")
    raise UserError(unknown_columns((prompt, *SIDES), columns))


def check_readable(columns: Mapping[str, str | None]) -> None:
    """Refuses a part of the conversation whose type cannot be read.

    Args:
        columns: with each column its type, if that is it.

    Raises:
        UserError: naming the column.
    """
    for name, kind in columns.items():
        if kind is None:
            continue
        if name in {*SIDES, *SIDES.values(), *SCORES}:
            raise UserError(f"expected text, messages or numbers in {name!r}, found {kind}; store it so")
        if plain_name(name) in PARTS:
            raise UserError(
                f"expected text or messages in {name!r}, found {kind}; leave it out with --map {option('unused', name)}"
            )


def read_pair(row: Row, columns: Collection[str]) -> Read:
    """A raw row as an example; null counts as empty.

    Args:
        row: the row.
        columns: the names of the data set's columns; the row may lack some.

    Raises:
        UserError: a value of a wrong type, or a part of the conversation that cannot be used.
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
        talk = {"system", "tools"} & set(columns)  # what plain text has no place for
        parts = join(_asked(prompt), chosen, rejected) if talk else (prompt, chosen, rejected)
    else:
        parts = _guessed(row, chosen, rejected)
        guessed = bool(parts[0].strip())
    prompt, chosen, rejected = parts
    if isinstance(prompt, tuple):
        prompt = _with_system(prompt, row)
    score_chosen, score_rejected = (_score(row, name) for name in SCORES)
    _check_said(row, prompt, chosen, used={*shape.columns, "system", "tools"})
    return Read(Example(prompt, chosen, rejected, score_chosen, score_rejected, _tools(row)), guessed)


def conversation_column(columns: Collection[str]) -> str:
    """The column that holds the conversations of a data set for fine-tuning.

    Raises:
        UserError: there is none.
    """
    for name in ("messages", "conversations"):
        if name in columns:
            return name
    raise UserError(unknown_columns(("messages",), columns))


def read_conversation(row: Row, columns: Collection[str]) -> tuple[Turns, Tools]:
    """A raw row as a conversation, and the tools that it may call.

    Raises:
        UserError: as `read_pair`.
    """
    name = conversation_column(columns)
    turns = _with_system(_turns(row.get(name), name), row)
    _check_said(row, turns, (), used={name, "system", "tools"})
    return turns, _tools(row)


# Parts of a row.


def _sides(row: Row) -> tuple[Text, Text]:
    """Both responses, perhaps with the conversation before them."""
    values = [row[name] if name in row else row.get(other) for name, other in SIDES.items()]
    parsed = [from_json(value, name) for name, value in zip(SIDES, values, strict=True)]
    if not any(isinstance(value, str) and value for value in parsed):
        values = parsed  # JSON on both sides: a single one is an answer that is JSON
    chosen, rejected = (read_text(value, name) for name, value in zip(SIDES, values, strict=True))
    for text, other in ((chosen, rejected), (rejected, chosen)):
        if isinstance(text, str) and text and isinstance(other, tuple) and other:
            raise UserError("expected 'chosen' and 'rejected' of one kind, found text beside messages")
    return chosen, rejected


def _turns(value: Any, name: str) -> Turns:
    found = read_text(from_json(value, name), name)
    if isinstance(found, str):
        if found.strip():
            raise UserError(f"expected messages in {name!r}, found text {found!r:.80}")
        return ()
    return found


def _asked(prompt: Text) -> Turns:
    """A prompt as turns; text is what the user says."""
    if isinstance(prompt, tuple):
        return prompt
    return (Message("user", prompt),) if prompt.strip() else ()


def _input(row: Row) -> Any:
    """`input`, of which OpenAI's object may be JSON in a text."""
    value = row.get("input")
    inner = parsed(value) if isinstance(value, str) else None
    return inner if isinstance(inner, dict) and "messages" in inner else value


def _history(row: Row) -> Turns:
    """`history`: messages, or pairs of what the user said and what was answered."""
    value = row.get("history")
    value = (isinstance(value, str) and parsed(value)) or value
    if isinstance(value, list) and value and all(isinstance(pair, list) for pair in value):
        if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value):
            raise UserError(f"expected pairs of text in 'history', found {value!r:.80}")
        return tuple(
            Message(role, text) for pair in value for role, text in zip(("user", "assistant"), pair, strict=True)
        )
    return _turns(value, "history")


def _with_system(turns: Turns, row: Row) -> Turns:
    """The turns after what `system` says."""
    system = read_text(row.get("system"), "system")
    if not system or not turns:
        return turns
    if not isinstance(system, str):
        raise UserError("expected text in 'system', found messages")
    if not system.strip():
        return turns
    if turns[0].role != "system":
        return (Message("system", system), *turns)
    if turns[0].content.strip() != system.strip():
        raise UserError("expected one system turn, found one in 'system' and another one in the conversation")
    return turns


def _tools(row: Row) -> Tools:
    inner = _input(row)
    return read_tools(row.get("tools") or (inner.get("tools") if isinstance(inner, dict) else None), "tools")


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


# What no shape reads.


def _guessed(row: Row, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Plain texts alone, their common beginning taken for the prompt, unless something else in the row could be it."""
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


def _check_said(row: Row, prompt: Text, chosen: Text, used: set[str]) -> None:
    """Refuses a part of the conversation that is neither used nor said by what is used."""
    for name, value in row.items():
        if plain_name(name) not in PARTS or name in used or not value or _is_said(value, name, prompt, chosen):
            continue
        better = suggested_name(name)
        rename = f"say what it is with --map {option(better, name)}" if better else "put it into one of those"
        read = sorted(used - {"system", "tools"}) or [*SIDES]
        raise UserError(
            f"expected the conversation in {', '.join(map(repr, read))}, found another part of it in {name!r}; "
            f"{rename}, or leave it out with --map {option('unused', name)}"
        )


def _is_said(value: Any, name: str, prompt: Text, chosen: Text) -> bool:
    """Whether what a column says is said by the prompt, or by prompt and chosen response."""
    try:
        text = read_text(from_json(value, name), name)
    except ValueError:
        return False
    if isinstance(text, str):
        said = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
        return not bare(text) or any(bare(text) in bare(one) for one in said)
    if isinstance(prompt, str) or isinstance(chosen, str):
        prompt, chosen = _asked(prompt), (Message("assistant", chosen),) if isinstance(chosen, str) else chosen
    system = len([message for message in prompt[:1] if message.role == "system"])
    return text in [whole[start:] for whole in (prompt, prompt + chosen) for start in (0, system)]
