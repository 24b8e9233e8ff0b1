"""Renders a chat template: the text depends on the template, the date and the messages alone.

In: messages as templates read them (`role`, `content`, `tool_calls`, …), schemas of tools. Out: text, or a refusal.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from ...cache.errors import UserError

# The only name by which a template reads the clock, and the names by which it draws at random.
CLOCK = "strftime_now"
RANDOM = ("lipsum", "random")

SPEAKERS = ("system", "user", "assistant")

# Reasons for which a conversation or a pair is skipped.
REFUSED = "refused by the chat template"
LEFT_OUT = "tools, or their calls or results, left out by the chat template"
ANEW = "turns rendered anew by the chat template once others follow"
OPENING = "answer that the chat template opens otherwise than it asks for it"
SHARED = "prompt and response share a token"
EMPTY = "empty response"

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class SkipError(UserError):
    """A conversation, or one turn, cannot be tokenised and is skipped.

    Attributes:
        reason: one of the reasons above, under which it is counted.
    """

    def __init__(self, reason: str, detail: str) -> None:
        """Takes the reason to count and the message."""
        super().__init__(detail)
        self.reason = reason


class TemplateRefusalError(SkipError):
    """The chat template refuses a conversation, for example because its roles do not alternate."""

    def __init__(self, detail: str) -> None:
        """Takes the message."""
        super().__init__(REFUSED, detail)


def reads_clock(template: str) -> bool:
    """Whether a template may write the date; it can read the clock by one name only."""
    return CLOCK in _words(template)


def _words(template: str) -> set[str]:
    """The names and strings in a template's expressions, without comments and literal text."""
    try:
        tokens = [*Environment(autoescape=False).lex(template)]
    except TemplateError:  # rendering reports it
        return set()
    return {word.strip("'\"") for _, kind, word in tokens if kind in ("name", "string")}


class Renderer:
    """A chat template with its clock stopped.

    Attributes:
        template: the template's text.
        date: the day that the template reads; None if it does not read the clock.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, date: datetime.date | None) -> None:
        """Takes the special tokens from the tokenizer; no `date` is today.

        Raises:
            UserError: the template draws at random.
        """
        if found := sorted(_words(template) & set(RANDOM)):
            raise UserError(
                f"expected a chat template that renders a conversation always alike, found {found[0]!r} in it; give "
                "another one by a file"
            )
        self.template = template
        # The local day, as in transformers.
        self.date = (date or datetime.date.today()) if reads_clock(template) else None
        self._tokenizer = tokenizer
        if self.date is not None:
            read = self._apply(f"{{{{ {CLOCK}('%Y-%m-%d') }}}}", [{"role": "user", "content": "Hi"}], (), False)
            assert read == self.date.isoformat(), "transformers has another way to read the clock"

    def render(self, messages: Messages, tools: Tools = (), *, answer_next: bool) -> str:
        """The text of a conversation.

        Args:
            messages: the turns. A tool call's `arguments` may be an object or its JSON text: the object is tried first,
                as most templates expect it, then the text. Null fields are left out.
            tools: schemas of the tools that may be called.
            answer_next: whether to end with the opening of the assistant's answer.

        Raises:
            TemplateRefusalError: the template raises any error.
        """
        try:
            return self._apply(self.template, [_message(message, _decoded) for message in messages], tools, answer_next)
        except TemplateError as error:
            if any(message.get("tool_calls") for message in messages):
                try:
                    return self._apply(
                        self.template, [_message(message, _encoded) for message in messages], tools, answer_next
                    )
                except TemplateError:
                    pass
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateRefusalError(f"the chat template refuses the turns {roles}: {error}") from error

    def leaves_out(self, messages: Messages, tools: Tools) -> bool:
        """Whether the template drops a tool, a call, the text beside a call, or a result.

        Names and texts are replaced by marks that no template contains; all must be in the rendered text.
        """
        marks: list[str] = []

        def mark() -> str:
            marks.append(f"fpo_probe_{len(marks)}_")
            return marks[-1]

        def renamed(tool: Mapping[str, Any]) -> dict[str, Any]:
            inner = tool.get("function")
            if isinstance(inner, Mapping):
                return {**tool, "function": {**inner, "name": mark()}}
            return {**tool, "name": mark()}

        marked = []
        for message in messages:
            calls = message.get("tool_calls")
            if (calls or message["role"] not in SPEAKERS) and message["content"].strip():
                message = {**message, "content": mark()}
            if calls:
                message = {**message, "tool_calls": [renamed(call) for call in calls]}
            marked.append(message)
        others = [renamed(tool) for tool in tools]
        if not marks:
            return False
        text = self.render(marked, others, answer_next=False)
        return not all(name in text for name in marks)

    def _apply(self, template: str, messages: Messages, tools: Tools, answer_next: bool) -> str:
        try:
            with self._stopped_clock(template):
                text = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    # Some templates announce tools for an empty list.
                    tools=[without_nulls(tool) for tool in tools] or None,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=answer_next,
                )
        except TemplateError:
            raise
        except Exception as error:  # a template's expressions raise Python's errors: 'a' + 1, 1 / 0, a range too large
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    @contextmanager
    def _stopped_clock(self, template: str) -> Iterator[None]:
        """Stops the template's clock at the date while it renders."""
        if self.date is None:
            yield
            return
        # transformers caches the compiled template, whose globals are the only place to set the clock.
        names = chat_template_utils._compile_jinja_template(template).environment.globals
        clock, names[CLOCK] = names[CLOCK], self.date.strftime
        try:
            yield
        finally:
            names[CLOCK] = clock


def _message(message: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """A message as templates read it, with `arguments` applied to the function of each tool call."""
    found: dict[str, Any] = without_nulls(message)
    if calls := found.get("tool_calls"):
        found["tool_calls"] = [
            {**call, "function": arguments(call["function"])} if "function" in call else arguments(call)
            for call in calls
        ]
    return found


def _decoded(function: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        value = json.loads(arguments)
    except ValueError:
        return function
    return {**function, "arguments": value} if isinstance(value, dict) else function


def _encoded(function: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        return function
    return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}


def without_nulls(value: Any) -> Any:
    """A value without the null fields that Arrow adds where other rows have a field."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
