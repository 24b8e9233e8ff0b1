"""A chat format, which is a tokenizer with a chat template: from turns to token ids, cut between prompt and answers.

In: an `Example` or a conversation (turns or plain text), a tokenizer, optionally a chat template's text and a date.
Out: the token ids of prompt and responses, cut where the template begins the answer, and which of them are learnt.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from ...cache.errors import UserError
from .cutting import Answer, Cutter, Lesson, Span
from .rendering import (
    ANEW,
    EMPTY,
    LEFT_OUT,
    OPENING,
    SHARED,
    SPEAKERS,
    Renderer,
    SkipError,
    TemplateRefusalError,
    Tools,
)

# Gemma's template, for base models, whose tokenizers have none.
GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ (message['content'] | trim) + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

PROBE = "fpo-probe-answer"  # an answer that no template contains


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: the speaker: `system`, `user`, `assistant`, `tool`, ….
        content: the text; empty in a turn that only calls tools.
        more: other fields that a template may read: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`, ….
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)


Turns = tuple[Message, ...]
Text = Turns | str


@dataclass(frozen=True)
class Example:
    """One preference pair: the prompt that both sides share, and the two responses.

    Attributes:
        prompt: the turns that both sides share, or plain text, which is rendered without a template.
        chosen: the preferred response alone: an assistant turn, perhaps with others after it (no turn if the row had no
            answer), or plain text.
        rejected: the other response, in one of the same forms.
        score_chosen: the annotator's score of the chosen response, if there is one.
        score_rejected: the annotator's score of the rejected response.
        tools: JSON schemas of the tools that the conversation may call; a template reads them.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    score_chosen: float | None = None
    score_rejected: float | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def tie(self) -> bool:
        """Whether both responses have a score and the scores are equal."""
        return self.score_chosen is not None and self.score_chosen == self.score_rejected


def load_template(path: Path | str | None) -> str | None:
    """Reads a Jinja chat template; no path gives `None`, which stands for the tokenizer's own template.

    Raises:
        UserError: there is no such file, or it is not UTF-8.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"expected a chat template (Jinja) at {path}, found no such file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"chat template {path}: expected UTF-8, found {error}") from error


Turned = Literal["all", "last"]  # which assistant turns of a response are learnt


class Response(NamedTuple):
    """A response in tokens.

    Attributes:
        ids: token ids from the prompt's end to the end of the last answer.
        learnt: the spans of `ids` that are learnt; the rest is other turns and the template's own text.
    """

    ids: list[int]
    learnt: list[Span]


class ChatFormat:
    """A tokenizer with a chat template: renders examples and cuts them into prompt and response tokens.

    Attributes:
        tokenizer: the tokenizer.
        template: the text of the template in use: the one given, else the tokenizer's own, else `GEMMA_TURNS`.
        date: the day that the template reads; None if it does not read the clock.
        bos_id: the token that may begin a prompt, or `None`.
        end_id: the token that closes an ordinary answer: the template's end of turn, or EOS if it writes none.
        probe_ids: token ids of a short conversation, which hold every token that the template itself writes.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, date: datetime.date | None = None
    ) -> None:
        """Probes the template for the closing that it writes after an answer; `date` defaults to today.

        Raises:
            UserError: the tokenizer has no EOS; or the template cannot be rendered, draws at random, leaves the answer
                out, opens it differently from the generation prompt, or closes answers in different ways.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(f"expected a tokenizer with an EOS token, found none in {tokenizer.name_or_path!r}")
        own = tokenizer.get_chat_template() if tokenizer.chat_template else GEMMA_TURNS
        self.template = own if template is None else template
        self.tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, self.template, date)
        self.date = self._renderer.date
        self.bos_id: int | None = tokenizer.bos_token_id
        self._cutter = Cutter(tokenizer)

        asked = (Message("user", "Hi"),)
        _, found, self._closing = self._render((*asked, Message("assistant", PROBE)), False).rpartition(PROBE)
        if not found:
            raise UserError("the chat template leaves out the assistant's answer; give another one by a file")
        closing_ids = self._cutter.tokens(self._closing.rstrip())
        self._appends_eos = not closing_ids or closing_ids[-1] not in tokenizer.added_tokens_decoder
        self.end_id: int = tokenizer.eos_token_id if self._appends_eos else closing_ids[-1]
        self.probe_ids = [*self._cutter.ids(self._probe(asked)), self.end_id]

    def on(self, date: datetime.date) -> "ChatFormat":
        """The same chat format on another day."""
        return ChatFormat(self.tokenizer, self.template, date)

    def _probe(self, asked: Turns) -> str:
        """A short conversation's text; some templates open only answers with reasoning as they ask for them."""
        plain = Message("assistant", f"{PROBE}: yes")
        reasoned = replace(plain, more={"reasoning_content": PROBE})
        for answer in (plain, reasoned, replace(plain, content=f"<think>\n{PROBE}\n</think>\n\n{PROBE}")):
            try:
                return self._answer(asked, answer).said
            except SkipError as error:
                fault = error
        raise UserError(f"{fault}; give a template that only appends, by a file") from fault

    def prompt_and_responses(self, example: Example, turns: Turned = "all") -> tuple[list[int], Response, Response]:
        """Token ids of the prompt (BOS at most once, the opening of the answer included) and of both responses.

        Prompt and response are tokenised together, and the prompt must keep the ids that it has alone. A response ends
        with the token that closes its last answer, without the white space that some templates write after it.

        Args:
            example: the pair.
            turns: which assistant turns of a response are learnt.

        Raises:
            SkipError: the template refuses the turns, leaves out tools, or renders the prompt or an answer differently
                once a turn follows; prompt and response share a token; or there is no answer to learn.
            UserError: the pair mixes text and turns, or the template closes an answer differently from others.
        """
        prompt, chosen, rejected, tools = example.prompt, example.chosen, example.rejected, example.tools
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            prompt_ids = self._cutter.ids(prompt)
            told = [[Answer(prompt, prompt + said)] for said in (chosen, rejected)]
            texts = [self._response(prompt_ids, answers, turns, appends_eos=True) for answers in told]
            return prompt_ids, texts[0], texts[1]
        if isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
            raise UserError("expected prompt, chosen and rejected all as text or all as turns, found a mixture")
        prompt, sides = self._accepted(prompt, tools), [_up_to_last_answer(side) for side in (chosen, rejected)]
        for side in sides:
            self._check_carried(prompt + side, tools)
        # The prompt ends with the opening of an answer unless a side goes on with another turn.
        prompt_text = self._render(prompt, all(side[0].role == "assistant" for side in sides), tools)
        prompt_ids = self._cutter.ids(prompt_text)
        responses = []
        for side in sides:
            before, answers = prompt_text, self._answers(prompt, side, tools)
            for answer in answers:
                if not answer.asked.startswith(before):
                    raise SkipError(ANEW, _anew(before))
                before = answer.said
            responses.append(self._response(prompt_ids, answers, turns, self._appends_eos))
        return prompt_ids, responses[0], responses[1]

    def prompt_ids(self, turns: Turns) -> list[int]:
        """Token ids of a conversation with the opening of the next answer, as in `prompt_and_responses`."""
        return self._cutter.ids(self._render(self._accepted(turns), answer_next=True))

    def lessons(self, turns: Turns, tools: Tools = ()) -> tuple[list[Lesson], list[str]]:
        """The lessons of a conversation, and a reason for each answer that is not learnt.

        There is one lesson, up to the last answer, unless the template renders an answer differently once a turn
        follows: then every answer is learnt in the form that it has as the last turn. Where the template writes no end
        of turn, EOS closes every answer, so that the model learns to stop.

        Args:
            turns: the conversation, with an assistant turn.
            tools: schemas of the tools that may be called.

        Raises:
            SkipError: the template refuses the turns or leaves out tools; or an answer is empty.
            UserError: the template closes an answer differently from others.
        """
        first = [message.role for message in turns].index("assistant")
        prompt, rest = self._accepted(turns[:first], tools), _up_to_last_answer(turns[first:])
        self._check_carried(prompt + rest, tools)
        reasons: list[str] = []
        answers = self._answers(prompt, rest, tools, reasons)
        lessons, shared = self._cutter.lessons(answers, self._appends_eos)
        return lessons, reasons + [SHARED] * shared

    def _answers(self, prompt: Turns, turns: Turns, tools: Tools, reasons: list[str] | None = None) -> list[Answer]:
        """The answers after a prompt; with `reasons`, an answer that cannot be cut is left out and its reason added."""
        found, before = [], prompt
        for message in turns:
            if message.role == "assistant":
                try:
                    found.append(self._answer(before, message, tools))
                except SkipError as error:
                    if reasons is None or error.reason not in (ANEW, OPENING):
                        raise
                    reasons.append(error.reason)
            before = (*before, message)
        return found

    def _answer(self, prompt: Turns, answer: Message, tools: Tools = ()) -> Answer:
        """One answer, with its text up to the end of the token that closes it."""
        asked = self._render(prompt, True, tools)
        text = self._render((*prompt, answer), False, tools)
        if not text.startswith(asked):
            text = self._as_served(asked, text, answer.content, self._render(prompt, False, tools).rstrip())
        if text.endswith(self._closing):
            closing = self._closing
        else:  # a call of a tool may be closed by a token of its own
            last = self._cutter.tokens(text.rstrip()[-100:])[-1:]
            token = self.tokenizer.added_tokens_decoder.get(last[0]) if last else None
            if token is None or not text.rstrip().endswith(token.content):
                raise UserError(
                    f"the chat template closes this answer otherwise than others: expected {self._closing!r} at the "
                    f"end, found …{text[-40:]!r}; give a template that closes every answer alike, by a file"
                )
            closing = text[text.rindex(token.content) :]
        opened = text[len(asked) : len(text) - len(closing)]
        if not opened.strip():
            raise SkipError(
                EMPTY, f"expected an answer after …{asked[-40:]!r}, found that the chat template writes none"
            )
        return Answer(asked, text[: len(text) - len(closing)] + closing.rstrip())

    def _as_served(self, asked: str, text: str, content: str, before: str) -> str:
        """The text of an answer that begins as the template's generation prompt ends, for example with `<think>`.

        The model continues that generation prompt, but the template renders past answers without it, and some of them
        without the whole reasoning.
        """
        shared = next((i for i, (a, b) in enumerate(zip(asked, text, strict=False)) if a != b), len(text))
        for start in range(shared, max(0, len(asked) - len(content)) - 1, -1):
            if content.startswith(asked[start:]):
                return asked[:start] + content + self._closing
        raise SkipError(OPENING if text.startswith(before) else ANEW, _anew(asked))

    def _response(self, prompt_ids: list[int], answers: list[Answer], turns: Turned, appends_eos: bool) -> Response:
        ids, spans = self._cutter.cut(answers, appends_eos)
        learnt = spans if turns == "all" else spans[-1:]
        size = len(prompt_ids)
        kept = [(start - size, stop - size) for start, stop in filter(None, learnt)]
        if len(kept) < len(learnt) or ids[:size] != prompt_ids:
            raise SkipError(SHARED, f"expected tokens of the prompt's own before …{answers[-1].said[-40:]!r}")
        return Response(ids[size:], kept)

    def _check_carried(self, turns: Turns, tools: Tools) -> None:
        carries = tools or any(message.role not in SPEAKERS or "tool_calls" in message.more for message in turns)
        if carries and self._renderer.leaves_out(_messages(turns), tools):
            raise SkipError(LEFT_OUT, "expected a chat template that writes tools, their calls and their results")

    def _accepted(self, prompt: Turns, tools: Tools = ()) -> Turns:
        """The prompt, its system turn folded into the first user turn if the template refuses or drops it."""
        if not prompt or prompt[0].role != "system":
            return prompt
        system, rest = prompt[0], prompt[1:]
        try:
            if system.content.strip() in self._render(prompt, True, tools):
                return prompt
        except TemplateRefusalError:
            pass  # fold it; the next rendering reports any other fault
        if not rest or rest[0].role != "user":
            return (replace(system, role="user"), *rest)
        parts = [part for part in (system.content, rest[0].content) if part.strip()]
        return (Message("user", "\n\n".join(parts)), *rest[1:])

    def _render(self, turns: Turns, answer_next: bool, tools: Tools = ()) -> str:
        return self._renderer.render(_messages(turns), tools, answer_next=answer_next)


def _messages(turns: Turns) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content, **message.more} for message in turns]


def is_blank(message: Message) -> bool:
    """Whether a turn says nothing: no content but white space, and no tool called."""
    return not (message.content.strip() or message.more.get("tool_calls"))


def _up_to_last_answer(turns: Turns) -> Turns:
    """The turns without those after the last answer: nothing is learnt from them."""
    answers = [number for number, message in enumerate(turns) if message.role == "assistant"]
    if not answers:
        raise SkipError(EMPTY, "expected an assistant turn in a response, found none")
    return turns[: answers[-1] + 1]


def _anew(before: str) -> str:
    return (
        "the chat template renders a turn differently once another follows: expected the conversation to begin with "
        f"…{before[-40:]!r}"
    )
