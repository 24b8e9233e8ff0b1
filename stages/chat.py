"""The chat format that a model was (or will be) tuned in: from turns to token ids, cut between prompt and answers.

In: an `Example` or a conversation (turns or plain text), a tokenizer, optionally the text of a chat template.
Out: the token ids of the prompt and of each answer, cut where the template puts the boundary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Gemma's turns, for base models, whose tokenizers carry no template.
GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ (message['content'] | trim) + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

PROBE = "fpo-probe-answer"  # an answer that no template writes by itself


class TemplateRefusalError(ValueError):
    """The chat template refuses a conversation, for example because its roles do not alternate."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks: `system`, `user`, `assistant`, `tool`, ….
        content: what is said; empty where the turn has none, as one that only calls tools.
        more: what else of the turn a template may read: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`, ….
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)


Turns = tuple[Message, ...]
Text = Turns | str


@dataclass(frozen=True)
class Example:
    """One preference pair, whatever shape it was stored in: a shared prompt and what follows it on either side.

    Attributes:
        prompt: the turns both sides share, or plain text that takes no template.
        chosen: the preferred response alone: one assistant turn (none if the row had no answer), or plain text.
        rejected: the other response, likewise.
        score_chosen: the annotator's score of the chosen response, if there is one.
        score_rejected: likewise.
        tools: JSON schemas of the tools that the conversation may call; a template reads them.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    score_chosen: float | None = None
    score_rejected: float | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def one_answer_each(self) -> bool:
        """Whether both sides are one answer to the same turns; some of Anthropic-HH's dialogues part earlier."""
        return all(
            isinstance(response, str) or [message.role for message in response] in ([], ["assistant"])
            for response in (self.chosen, self.rejected)
        )

    @property
    def tie(self) -> bool:
        """Whether both responses have a score and the scores are equal."""
        return self.score_chosen is not None and self.score_chosen == self.score_rejected


def load_template(path: Path | str | None) -> str | None:
    """Reads a Jinja chat template; `None` stays `None`, which means the tokenizer's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a chat template (Jinja) at {path}, found no such file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat template {path}: expected UTF-8, found {error}") from error


class ChatFormat:
    """A tokenizer with a chat template: renders examples and cuts them into prompt and response tokens.

    Attributes:
        tokenizer: the tokenizer.
        template: the text of the template in use: the one given, else the tokenizer's own, else `GEMMA_TURNS`.
        bos_id: the token that may begin a prompt, or `None`.
        end_id: the token that closes every templated response: the template's end of turn, or EOS if it writes none.
        probe_ids: token ids of a conversation, with all that the template writes around a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        """Probes the template for what it writes after an answer.

        Raises:
            ValueError: the tokenizer has no EOS, or the template cannot be rendered, leaves the answer out, does not
                only append, or closes answers in different ways.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError(f"expected a tokenizer with an EOS token, found none in {tokenizer.name_or_path!r}")
        own = tokenizer.get_chat_template() if tokenizer.chat_template else GEMMA_TURNS
        self.template = own if template is None else template
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        # A text, because some tokenizers give nothing at all for an empty one.
        self._adds_bos = self.bos_id is not None and self._ids("a", True)[0] == self.bos_id

        asked = (Message("user", "Hi"),)
        _, found, self._closing = self._render((*asked, Message("assistant", PROBE)), False).rpartition(PROBE)
        if not found:
            raise ValueError("the chat template leaves out the assistant's answer; give another one by a file")
        closing_ids = self._ids(self._closing.rstrip())
        self._appends_eos = not closing_ids or closing_ids[-1] not in tokenizer.added_tokens_decoder
        self.end_id: int = tokenizer.eos_token_id if self._appends_eos else closing_ids[-1]
        text = self._render(asked, answer_next=True)
        answer, _ = self._answer(asked, text, (Message("assistant", f"{PROBE}: yes"),))
        self.probe_ids = [*self._prompt_ids(text), *answer]

    def prompt_and_responses(self, example: Example) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the prompt (BOS at most once, the opening of the answer included) and of both responses.

        Each part is encoded on its own, so the prompt's ids are the same for both responses. A response ends with
        the token that ends its turn, without the white space that some templates write after it.

        Raises:
            ValueError: the template refuses the turns, or an answer does not follow the prompt it was asked with.
        """
        prompt, chosen, rejected = example.prompt, example.chosen, example.rejected
        if isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
            if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
                raise ValueError("expected prompt, chosen and rejected all as text or all as turns, found a mixture")
            eos: list[int] = [self.tokenizer.eos_token_id]
            return self._prompt_ids(prompt), self._ids(chosen) + eos, self._ids(rejected) + eos
        prompt = self._accepted(prompt)
        prompt_text = self._render(prompt, answer_next=True)
        chosen_ids, rejected_ids = (self._answer(prompt, prompt_text, answer)[0] for answer in (chosen, rejected))
        return self._prompt_ids(prompt_text), chosen_ids, rejected_ids

    def prompt_ids(self, turns: Turns) -> list[int]:
        """Token ids of a conversation that the assistant answers next, as in `prompt_and_responses`."""
        return self._prompt_ids(self._render(self._accepted(turns), answer_next=True))

    def conversation(self, turns: Turns) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation up to its last answer, and which of them are an answer's.

        Prompt and answers are encoded as in `prompt_and_responses`, and so is what stands between them. Where the
        template writes no end of turn, EOS closes every answer: without it the model could not learn to stop.

        Raises:
            ValueError: the template refuses the turns, or a turn does not follow what stood before it.
        """
        first = [message.role for message in turns].index("assistant")
        prompt = self._accepted(turns[:first])
        turns, said = prompt + turns[first:], ""
        ids: list[int] = []
        learnt: list[bool] = []
        for number in range(len(prompt), len(turns)):
            if turns[number].role != "assistant":
                continue
            asked = self._render(turns[:number], answer_next=True)
            self._check_appends(said, asked)
            asked_ids = self._ids(asked[len(said) :]) if said else self._prompt_ids(asked)
            answer_ids, said = self._answer(turns[:number], asked, turns[number : number + 1])
            ids += asked_ids + answer_ids
            learnt += [False] * len(asked_ids) + [True] * len(answer_ids)
        return ids, learnt

    def _answer(self, prompt: Turns, prompt_text: str, answer: Turns) -> tuple[list[int], str]:
        """Token ids of an answer, and the conversation's text up to its end."""
        text = self._render(prompt + answer, answer_next=False)
        self._check_appends(prompt_text, text)
        if not text.endswith(self._closing):
            raise ValueError(
                f"the chat template closes this answer otherwise than others: expected {self._closing!r} at the end, "
                f"found …{text[-40:]!r}; give a template that closes every answer alike, by a file"
            )
        text = text[: len(text) - len(self._closing) + len(self._closing.rstrip())]
        ids = self._ids(text[len(prompt_text) :])
        return [*ids, self.end_id] if self._appends_eos else ids, text

    def _check_appends(self, before: str, after: str) -> None:
        if not after.startswith(before):
            raise ValueError(
                "the chat template renders a turn differently once another follows: expected the conversation to "
                f"begin with …{before[-40:]!r}; give a template that only appends, by a file"
            )

    def _accepted(self, prompt: Turns) -> Turns:
        """The prompt, its system turn folded into the first user turn if the template refuses or drops it."""
        if not prompt or prompt[0].role != "system":
            return prompt
        system, rest = prompt[0], prompt[1:]
        try:
            if system.content.strip() in self._apply(prompt, answer_next=True):
                return prompt
        except TemplateError:
            pass  # refused: fold it, and let the second rendering speak of anything else that is wrong
        if not rest or rest[0].role != "user":
            return (replace(system, role="user"), *rest)
        parts = [part for part in (system.content, rest[0].content) if part.strip()]
        return (Message("user", "\n\n".join(parts)), *rest[1:])

    def _render(self, messages: Turns, answer_next: bool) -> str:
        try:
            return self._apply(messages, answer_next)
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise TemplateRefusalError(f"the chat template refuses the turns {roles}: {error}") from error

    def _apply(self, messages: Turns, answer_next: bool) -> str:
        turns = [{"role": message.role, "content": message.content, **message.more} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=answer_next
            )
        except TemplateError:
            raise
        except Exception as error:  # a template's expressions raise as Python's do: 'a' + 1, 1 / 0, a range too large
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def _prompt_ids(self, text: str) -> list[int]:
        ids = self._ids(text)
        return [self.bos_id, *ids] if self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        # verbose=False: a text over the model's length is no news, it is cut and counted later.
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
