"""A chat template at work: from messages to text, by the template, a date and the messages, and by nothing else.

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

# The one name by which a template can read the clock, and those by which it can draw at random.
CLOCK = "strftime_now"
RANDOM = ("lipsum", "random")

SPEAKERS = ("system", "user", "assistant")

# What a conversation, or a pair, is skipped for.
REFUSED = "refused by the chat template"
LEFT_OUT = "tools, or their calls or results, left out by the chat template"
ANEW = "turns rendered anew by the chat template once others follow"
OPENING = "answer that the chat template opens otherwise than it asks for it"
SHARED = "prompt and response share a token"
EMPTY = "empty response"

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class SkipError(ValueError):
    """A conversation, or a turn of it, of which no tokens can be made.

    Attributes:
        reason: as it is counted.
    """

    def __init__(self, reason: str, detail: str) -> None:
        """Says `detail`."""
        super().__init__(detail)
        self.reason = reason


class TemplateRefusalError(SkipError):
    """The chat template refuses a conversation, for example because its roles do not alternate."""

    def __init__(self, detail: str) -> None:
        """Says `detail`."""
        super().__init__(REFUSED, detail)


def reads_clock(template: str) -> bool:
    """Whether a template may write the date: it has one name for the clock, and no way to look a name up."""
    return CLOCK in _words(template)


def _words(template: str) -> set[str]:
    """Names and strings in a template's expressions; comments and the text between them are neither."""
    try:
        tokens = [*Environment(autoescape=False).lex(template)]
    except TemplateError:  # rendering will say so
        return set()
    return {word.strip("'\"") for _, kind, word in tokens if kind in ("name", "string")}


class Renderer:
    """A chat template with its clock stopped.

    Attributes:
        template: its text.
        date: the day that it is to the template; None where the template does not read the clock.
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
        # The day of this place, as transformers has it.
        self.date = (date or datetime.date.today()) if reads_clock(template) else None
        self._tokenizer = tokenizer
        if self.date is not None:
            read = self._apply(f"{{{{ {CLOCK}('%Y-%m-%d') }}}}", [{"role": "user", "content": "Hi"}], (), False)
            assert read == self.date.isoformat(), "transformers has another way to read the clock"

    def render(self, messages: Messages, tools: Tools = (), *, answer_next: bool) -> str:
        """The text of a conversation.

        Args:
            messages: its turns. A tool call's `arguments` may be JSON or what it encodes: templates expect the latter,
                some the former. Keys without a value, with which Arrow fills what other rows have, are left out.
            tools: schemas of the tools that may be called.
            answer_next: whether the opening of the assistant's answer follows.

        Raises:
            TemplateRefusalError: the template raises, whatever it is.
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
        """Whether the template drops a tool, a call, what is said beside it or what it returned.

        Names and texts are tried that no template writes by itself.
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
                    # An empty list would be announced by some templates.
                    tools=[without_nulls(tool) for tool in tools] or None,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=answer_next,
                )
        except TemplateError:
            raise
        except Exception as error:  # a template's expressions raise as Python's do: 'a' + 1, 1 / 0, a range too large
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    @contextmanager
    def _stopped_clock(self, template: str) -> Iterator[None]:
        """Sets the template's clock to the date while it renders."""
        if self.date is None:
            yield
            return
        # transformers compiles a template once, and has no other place to set its clock.
        names = chat_template_utils._compile_jinja_template(template).environment.globals
        clock, names[CLOCK] = names[CLOCK], self.date.strftime
        try:
            yield
        finally:
            names[CLOCK] = clock


def _message(message: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """A message as templates read it, the arguments of its tool calls changed by `arguments`."""
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
