"""What a value of a row says, text or turns in any form in which data sets write them, and where the responses begin.

In: a value of JSON's; a prompt and two responses, which may repeat the prompt. Out: text, `Message`s, tools; what both
sides share, and what follows it on either side: the last turn that they share is the boundary. A turn is
`role`/`content` (OpenAI's form) or `from`/`value` (ShareGPT's), its content text or parts of text; a list of turns may
be JSON in a text.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ...cache.errors import UserError
from .chat import Message, Text, Turns

# Who speaks, by the names that data sets have for them; ShareGPT's form knows no others.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "developer": "developer",
}
CALLS = ("function_call", "tool_call")  # whose content is a call of a tool, as JSON
# What else of a turn chat templates read, and what none reads here; any other key is like an ordinary extra column.
READ = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tool_plan")
NOT_READ = ("audio", "image", "images", "video", "videos", "refusal")
REPR = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)'\s*:")


def read_text(value: Any, name: str) -> Text:
    """The text or the turns in column `name`; null counts as empty text.

    Raises:
        UserError: it is neither.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list | dict):
        raise UserError(f"expected text or messages in {name!r}, found {type(value).__name__}")
    if isinstance(value, dict) and isinstance(value.get("role", value.get("from")), list):
        value = _by_message(value, name)
    return tuple(_message(message, name) for message in (value if isinstance(value, list) else [value]))


def from_json(text: Any, name: str) -> Any:
    """The message or messages that a text holds as JSON; anything else as it is.

    Raises:
        UserError: it holds them as Python writes them, which is no JSON.
    """
    if not isinstance(text, str):
        return text
    if REPR.match(text):
        raise UserError(f"expected messages as JSON in {name!r}, found them as Python writes them; use json.dumps")
    found = parsed(text)
    messages = [parsed(one) if isinstance(one, str) else one for one in (found if isinstance(found, list) else [found])]
    return found if messages and all(map(_is_message, messages)) else text


def parsed(text: str) -> Any:
    """The list or object that a text holds as JSON, perhaps as a text in JSON once more; None if it holds none."""
    if not re.match(r'\s*"?\s*[\[{]', text):
        return None
    try:
        found = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except (ValueError, RecursionError):
        return None
    return parsed(found) if isinstance(found, str) else found


def read_tools(value: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    """JSON schemas of tools, each as `{"type": "function", "function": {"name": …}}`.

    Raises:
        UserError: it is no list of them, nor JSON of one.
    """
    if not value or (isinstance(value, str) and not value.strip()):
        return ()
    found = parsed(value) if isinstance(value, str) else value
    tools = []
    for tool in found if isinstance(found, list) else [found]:
        tool = _without_nulls(parsed(tool) if isinstance(tool, str) else tool)
        if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": tool}
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"expected tools as a list of JSON schemas with a name in {name!r}, found {value!r:.80}")
        if isinstance(function.get("parameters"), str):
            parameters = parsed(function["parameters"])
            if not isinstance(parameters, dict):
                raise UserError(f"expected 'parameters' as a JSON schema in {name!r}, found {value!r:.80}")
            tool = tool | {"function": function | {"parameters": parameters}}
        tools.append(tool)
    return tuple(tools)


def _by_message(columns: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Messages of which each field is a list, as `datasets` stores a `Sequence` of them."""
    lists = {key: values for key, values in columns.items() if values is not None}
    if not all(isinstance(values, list) for values in lists.values()) or len(set(map(len, lists.values()))) > 1:
        raise UserError(f"expected fields of messages as lists of one length in {name!r}, found {columns!r:.80}")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    role = value.get("role", value.get("from"))
    return isinstance(role, str) and role.lower() in ROLES and bool({"content", "value", "tool_calls"} & set(value))


def _message(value: Any, name: str) -> Message:
    message = parsed(value) if isinstance(value, str) else value
    of_sharegpt = isinstance(message, dict) and message.get("role") is None and "from" in message
    role_key, content_key = ("from", "value") if of_sharegpt else ("role", "content")
    if not isinstance(message, dict) or not isinstance(message.get(role_key), str):
        raise UserError(f"expected messages with 'role' and 'content' as text in {name!r}, found {value!r:.80}")
    said: str = message[role_key]
    role = ROLES.get(said.strip().lower(), said)
    if of_sharegpt and said.strip().lower() not in ROLES:
        raise UserError(f"expected one of {', '.join(ROLES)} as 'from' in {name!r}, found {said!r:.80}")
    for key in NOT_READ:
        if message.get(key):
            raise UserError(f"expected messages of text in {name!r}, found {key!r} in one of {role!r}")
    more = {key: message[key] for key in READ if message.get(key) not in (None, "", [])}
    if message.get("function_call"):  # OpenAI's form before there were `tool_calls`
        more["tool_calls"] = [message["function_call"]]
    if content_key not in message and not more:
        raise UserError(f"expected messages with 'role' and 'content' as text in {name!r}, found {value!r:.80}")
    if role == "assistant" and message.get("weight") == 0:
        raise UserError(f"expected answers that are all learnt in {name!r}, found one of OpenAI's 'weight' 0")
    content = _content(message.get(content_key), name, value)
    if said.strip().lower() in CALLS:
        return Message(role, "", more | {"tool_calls": _calls(parsed(content), name)})
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], name)
    return Message(role, content, more)


def _content(content: Any, name: str, message: Any) -> str:
    """Text, or parts of text one after another."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise UserError(f"expected messages with 'role' and 'content' as text in {name!r}, found {message!r:.80}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"expected content as text or parts of text in {name!r}, found a part of type {kind!r}")
        texts.append(part["text"])
    return "".join(texts)


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Calls of tools in the one form that templates read, arguments as an object wherever they are one."""
    calls = []
    found = parsed(value) if isinstance(value, str) else value
    for call in found if isinstance(found, list) else [found]:
        call = _without_nulls(parsed(call) if isinstance(call, str) else call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"expected calls of tools with a name in {name!r}, found {value!r:.80}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            inner = parsed(arguments)
            arguments = inner if isinstance(inner, dict) else arguments
        made = {"id": call["id"]} if call.get("id") else {}
        calls.append({**made, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _without_nulls(value: Any) -> Any:
    """Without the fields that are null: where rows are a table, those that a row lacks are."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


# Where the responses begin.


def join(prompt: Text, chosen: Text, rejected: Text) -> tuple[Turns, Turns, Turns]:
    """A conversation of turns, of which some parts may be text.

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
    """What was said before both sides, of a conversation that may hold the chosen one too.

    Raises:
        UserError: it ends with another answer.
    """
    answer = _answer(chosen)
    if told == answer:
        return ()  # both sides say it all
    if answer and told[-len(answer) :] == answer:
        return told[: -len(answer)]
    alone = all(side[0].role == "assistant" for side in map(_answer, (chosen, rejected)) if side)
    if alone and told and told[-1].role == "assistant":
        raise UserError("expected a conversation that both sides answer, found one whose last turn is another answer")
    return told


def bare(text: str) -> str:
    """A text without what data sets change in one of two copies: case, white space and punctuation."""
    letters = "".join(filter(str.isalnum, text.casefold()))
    return letters or " ".join(text.split())


def split_turns(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Shared turns, and what follows them on either side."""
    shorter, longer = sorted((chosen, rejected), key=len)
    if longer[: len(shorter)] == shorter:
        # One side is the other's beginning, or equal to it: what can differ is the last answer alone.
        shared = len(longer) - (bool(longer) and longer[-1].role == "assistant")
    else:
        shared = next(i for i in range(len(shorter)) if chosen[i] != rejected[i])
    return longer[:shared], chosen[shared:], rejected[shared:]


def _answer(side: Text) -> Turns:
    if isinstance(side, tuple):
        return side
    return (Message("assistant", side),) if side else ()


def _after(prompt: Turns, side: Turns) -> Turns:
    """The conversation of one side, which may begin with the prompt; a system turn may be in one of them alone."""
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


# Text.


def common_beginning(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The longest common beginning of two texts, and what follows it on either side.

    As TRL does: a space at its end belongs to the responses.
    """
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), shorter)
    if chosen == rejected:
        shared = 0
    elif 0 < shared < shorter and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_dialogues(prompt: str, chosen: str, rejected: str) -> tuple[Turns, Turns, Turns] | None:
    """The turns of Anthropic-HH dialogues: both sides, or the prompt alone; None for other texts.

    Raises:
        UserError: both sides are dialogues, and the prompt is no part of them.
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
    """The turns of a dialogue, in the roles' usual names; contents lose white space at both ends."""
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", text)
    return tuple(Message(roles[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True))
