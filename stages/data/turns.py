"""Turns and tools as data sets store them, to `Message`s.

In: a value of JSON, or text that holds JSON. Out: text, `Message`s, tools. A turn is `role`/`content` (OpenAI's form)
or `from`/`value` (ShareGPT's); its content is text or a list of parts of text.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ...cache.errors import UserError
from .chat import Message, Text
from .rendering import without_nulls

# The roles behind the names that data sets use; ShareGPT's form allows no other names.
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
CALLS = ("function_call", "tool_call")  # a turn whose content is the call of a tool, as JSON
# Other keys of a turn: those that chat templates read, and those that are refused. Any other key is ignored.
READ = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tool_plan")
NOT_READ = ("audio", "image", "images", "video", "videos", "refusal")
REPR = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)'\s*:")


def read_text(value: Any, name: str) -> Text:
    """The text or the turns that column `name` holds; null counts as empty text.

    Raises:
        UserError: the value is neither, or a turn is malformed.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list | dict):
        raise UserError(f"expected text or messages in {name!r}, found {type(value).__name__}")
    if isinstance(value, dict) and isinstance(value.get("role", value.get("from")), list):
        value = _by_message(value, name)
    return tuple(_message(message, name) for message in (value if isinstance(value, list) else [value]))


def from_json(text: Any, name: str) -> Any:
    """The messages in a text that holds them as JSON; any other value unchanged.

    Raises:
        UserError: the text holds messages in Python's notation, with single quotes.
    """
    if not isinstance(text, str):
        return text
    if REPR.match(text):
        raise UserError(f"expected messages as JSON in {name!r}, found them as Python writes them; use json.dumps")
    found = parsed(text)
    messages = [parsed(one) if isinstance(one, str) else one for one in (found if isinstance(found, list) else [found])]
    return found if messages and all(map(_is_message, messages)) else text


def parsed(text: str) -> Any:
    """The list or object that a text holds as JSON, encoded once or several times; None if it holds none."""
    if not re.match(r'\s*"?\s*[\[{]', text):
        return None
    try:
        found = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except (ValueError, RecursionError):
        return None
    return parsed(found) if isinstance(found, str) else found


def read_tools(value: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    """JSON schemas of tools, each as `{"type": "function", "function": {"name": …}}`.

    Raises:
        UserError: the value is neither a list of schemas nor JSON of one.
    """
    if not value or (isinstance(value, str) and not value.strip()):
        return ()
    found = parsed(value) if isinstance(value, str) else value
    tools = []
    for tool in found if isinstance(found, list) else [found]:
        tool = without_nulls(parsed(tool) if isinstance(tool, str) else tool)
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
    """A list of messages from an object of lists, as `datasets` stores a `Sequence` of messages."""
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
    if message.get("function_call"):  # OpenAI's older form of `tool_calls`
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
    """The content of a message: text, or parts of text joined."""
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
    """Calls of tools in the form that templates read; arguments that are JSON of an object become that object."""
    calls = []
    found = parsed(value) if isinstance(value, str) else value
    for call in found if isinstance(found, list) else [found]:
        call = without_nulls(parsed(call) if isinstance(call, str) else call)
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
