"""The columns of a data set: where each shape of data keeps the prompt, and what other names of columns mean.

In: a raw row and the names of the data set's columns. Out: the prompt of a pair, or a conversation with its tools.
A column that looks like a part of the conversation is read, or repeats what is read, or is refused; other columns are
ignored. docs/data-models-saes.md has the table.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...cache.errors import UserError
from .chat import Message, Text, Turns
from .turns import from_json, parsed, read_text, read_tools

# The two responses, by our names and by OpenAI's; their scores.
SIDES = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
SCORES = ("score_chosen", "score_rejected")

# Columns that hold a part of the conversation, spelled as by `plain_name`; some are read, the others refused.
PARTS = {
    *("prompt", "prompts", "user_prompt", "user_message", "instruction", "instructions", "input", "inputs"),
    *("question", "questions", "query", "queries", "problem", "request", "user_input", "user_query"),
    *("history", "chat_history", "conversation_history", "dialogue_history", "dialog_history"),
    *("context", "contexts", "passage", "passages", "article", "background", "persona"),
    *("message", "messages", "conversation", "conversations", "dialog", "dialogue", "turns"),
    *("system", "system_prompt", "system_message", "system_instruction", "tools", "functions", "document", "documents"),
    *("image", "images", "video", "videos", "audio", "audios"),
}
# Words in the names of columns that hold text but not the prompt.
BESIDES = {
    *("id", "ids", "name", "title", "url", "date", "hash", "split", "subset", "dataset", "source", "origin", "license"),
    *("model", "models", "annotator", "judge", "score", "scores", "rating", "ratings", "rationale", "reason"),
    *("category", "type", "kind", "domain", "topic", "task", "difficulty", "language", "lang", "feedback"),
    *("label", "labels", "tag", "tags", "comment", "comments"),
}
# Other names in use for the columns that are read.
KNOWN_AS = {
    "chosen": (
        *("preferred", "accepted", "win", "winner", "winning", "positive", "pos", "good", "better", "best"),
        *("chosen_response", "response_chosen", "chosen_answer", "preferred_response", "accepted_response", "y_w"),
    ),
    "rejected": (
        *("dispreferred", "unpreferred", "non_preferred", "lose", "loser", "losing", "negative", "neg", "bad", "worse"),
        *("worst", "rejected_response", "response_rejected", "rejected_answer", "y_l"),
    ),
    "prompt": (
        *("query", "problem", "request", "user_prompt", "user_message", "user_input", "user_query", "prompts", "post"),
    ),
    "messages": ("conversation", "dialog", "dialogue", "turns", "chat"),
    "system": ("system_prompt", "system_message", "system_instruction"),
    "tools": ("functions",),
    "instruction": ("instructions",),
    "question": ("questions",),
    "history": ("chat_history", "conversation_history", "dialogue_history", "dialog_history"),
    "input": ("inputs",),
}

Row = Mapping[str, Any]
Tools = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Shape:
    """A way to store the prompt.

    Attributes:
        columns: the columns that hold it; a data set has this shape if it has the first of them.
        prompt: reads the prompt of a row.
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
    return _history(row) + asked("\n".join(part for part in (instruction, given) if part.strip()))


def of_question(row: Row) -> Turns:
    """`question`, after `history`."""
    return _history(row) + asked(read_text(from_json(row.get("question"), "question"), "question"))


def of_conversations(row: Row) -> Turns:
    """ShareGPT's `conversations`: the turns before the responses."""
    return turns_in(row.get("conversations"), "conversations")


def of_input(row: Row) -> Turns:
    """`input`, after `history`; or OpenAI's object of `messages` and `tools`."""
    value = _input(row)
    if not isinstance(value, dict) or "messages" not in value:
        return _history(row) + asked(read_text(from_json(value, "input"), "input"))
    for key in sorted(set(value) - {"messages", "tools", "parallel_tool_calls"}):
        if value[key]:
            raise UserError(f"expected 'messages', 'tools' and 'parallel_tool_calls' in 'input', found {key!r}")
    return turns_in(value["messages"], "input")


def of_messages(row: Row) -> Turns:
    """`messages`: the turns before the responses."""
    return turns_in(row.get("messages"), "messages")


def of_both_sides(row: Row) -> Text:
    """No column: both responses begin with the prompt."""
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
    """The first of `SHAPES` that these columns have.

    Raises:
        UserError: a response has no column; the message names the nearest shape and the options that rename.
    """
    if all(name in columns or other in columns for name, other in SIDES.items()):
        return next(shape for shape in SHAPES if not shape.columns or shape.columns[0] in columns)
    firsts = [shape.columns[0] for shape in SHAPES if shape.columns]
    prompt = next((name for name in firsts if known_as(name, columns) is not None), "prompt")
    raise UserError(unknown_columns((prompt, *SIDES), columns))


def check_readable(columns: Mapping[str, str | None]) -> None:
    """Refuses data whose prompt, response or score is stored in a type that cannot be read, such as an image.

    Args:
        columns: for each column None, or its type if that type cannot be read.

    Raises:
        UserError: one is; the message names the column and its type.
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


def conversation_column(columns: Collection[str]) -> str:
    """The column that holds the conversations of a data set for fine-tuning: `messages`, else `conversations`.

    Raises:
        UserError: there is neither.
    """
    for name in ("messages", "conversations"):
        if name in columns:
            return name
    raise UserError(unknown_columns(("messages",), columns))


def read_conversation(row: Row, columns: Collection[str]) -> tuple[Turns, Tools]:
    """The conversation in a raw row, and the tools that it may call.

    Raises:
        UserError: a value has a wrong type, or a part of the conversation cannot be used.
    """
    name = conversation_column(columns)
    turns = with_system(turns_in(row.get(name), name), row)
    check_said(row, turns, (), used={name, "system", "tools"})
    return turns, tools_of(row)


# Parts of a row.


def turns_in(value: Any, name: str) -> Turns:
    """The messages in column `name`; none for null or blank text."""
    found = read_text(from_json(value, name), name)
    if isinstance(found, str):
        if found.strip():
            raise UserError(f"expected messages in {name!r}, found text {found!r:.80}")
        return ()
    return found


def asked(prompt: Text) -> Turns:
    """A prompt as turns; text becomes a turn of the user."""
    if isinstance(prompt, tuple):
        return prompt
    return (Message("user", prompt),) if prompt.strip() else ()


def _input(row: Row) -> Any:
    """`input`; OpenAI's object in it may be text that holds JSON."""
    value = row.get("input")
    inner = parsed(value) if isinstance(value, str) else None
    return inner if isinstance(inner, dict) and "messages" in inner else value


def _history(row: Row) -> Turns:
    """`history`: messages, or pairs of a question and its answer."""
    value = row.get("history")
    value = (isinstance(value, str) and parsed(value)) or value
    if isinstance(value, list) and value and all(isinstance(pair, list) for pair in value):
        if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value):
            raise UserError(f"expected pairs of text in 'history', found {value!r:.80}")
        return tuple(
            Message(role, text) for pair in value for role, text in zip(("user", "assistant"), pair, strict=True)
        )
    return turns_in(value, "history")


def with_system(turns: Turns, row: Row) -> Turns:
    """The turns, with the text of column `system` before them as a system turn."""
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


def tools_of(row: Row) -> Tools:
    """The tools in column `tools`, or in OpenAI's object in `input`."""
    inner = _input(row)
    return read_tools(row.get("tools") or (inner.get("tools") if isinstance(inner, dict) else None), "tools")


def check_said(row: Row, prompt: Text, chosen: Text, used: set[str]) -> None:
    """Refuses a row with a part of the conversation that is neither read nor repeats what is read.

    Args:
        row: the row.
        prompt: the prompt, or the whole conversation, as it was read.
        chosen: the chosen response as it was read.
        used: the columns that were read.

    Raises:
        UserError: there is one; the message names its column and the options that rename or ignore it.
    """
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
    """Whether a value repeats text of the prompt, or the turns of the prompt, perhaps with the chosen response."""
    try:
        text = read_text(from_json(value, name), name)
    except UserError:
        return False
    if isinstance(text, str):
        said = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
        return not bare(text) or any(bare(text) in bare(one) for one in said)
    if isinstance(prompt, str) or isinstance(chosen, str):
        prompt, chosen = asked(prompt), (Message("assistant", chosen),) if isinstance(chosen, str) else chosen
    system = len([message for message in prompt[:1] if message.role == "system"])
    return text in [whole[start:] for whole in (prompt, prompt + chosen) for start in (0, system)]


# Names of columns.


def plain_name(name: str) -> str:
    """A name in lower case, its words joined by underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def is_no_prompt(name: str) -> bool:
    """Whether a name says that the column does not hold the prompt."""
    return not BESIDES.isdisjoint(plain_name(name).split("_"))


def known_as(name: str, columns: Collection[str]) -> str | None:
    """The column with this name, or the first that spells it differently or has another name in use for it."""
    if name in columns:
        return name
    names = (name, *KNOWN_AS.get(name, ()))
    return next((column for known in names for column in columns if plain_name(column) == known), None)


def suggested_name(name: str) -> str | None:
    """The name that a column needs to be read; None if it has that name, or no name would help."""
    plain = plain_name(name)
    better = next((new for new, others in KNOWN_AS.items() if plain == new or plain in others), None)
    return None if better == name else better


def option(new: str, old: str) -> str:
    """The value of `--map` that renames a column, quoted for a shell where needed."""
    return f"{new}={old}" if re.fullmatch(r"[\w.-]+", old) else f"'{new}={old}'"


def unknown_columns(wanted: Collection[str], columns: Collection[str]) -> str:
    """The message for a data set that lacks wanted columns, with the options that rename the likeliest ones."""
    found = ", ".join(map(repr, columns))
    options = [f"--map {option(new, known_as(new, columns) or 'COLUMN')}" for new in wanted if new not in columns]
    return (
        f"found columns {found}, expected {', '.join(map(repr, wanted))}, the nearest of the shapes in "
        f"docs/data-models-saes.md; rename columns with {' '.join(options)}"
    )


def bare(text: str) -> str:
    """A text without case, white space and punctuation, which data sets change in one of two copies."""
    letters = "".join(filter(str.isalnum, text.casefold()))
    return letters or " ".join(text.split())
