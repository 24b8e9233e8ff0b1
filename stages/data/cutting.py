"""The text of a conversation to token ids, with the spans of its answers.

In: a tokenizer; for each answer, the conversation's text before it and up to its end. Out: the token ids of the whole
conversation, and each answer's span. The conversation is tokenised whole, as the model sees it, because some
tokenizers treat the beginning of a text differently.
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

Span = tuple[int, int]  # first token, and the one after the last


class Answer(NamedTuple):
    """An answer in the text of its conversation.

    Attributes:
        asked: the conversation's text before the answer, with the opening that the template writes for it.
        said: the conversation's text up to the end of the answer's closing.
    """

    asked: str
    said: str


class Lesson(NamedTuple):
    """A conversation in tokens, with the mask of those to learn.

    Attributes:
        ids: token ids up to the end of the last answer.
        learnt: for each token, whether it belongs to an answer.
    """

    ids: list[int]
    learnt: list[bool]


class Cutter:
    """A tokenizer that finds the answers of a conversation among its tokens.

    Attributes:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Finds out whether the tokenizer adds BOS."""
        self.tokenizer = tokenizer
        bos_id = tokenizer.bos_token_id
        # Some tokenizers give no token at all for an empty text.
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        self._bos: list[int] = [bos_id] if bos_id is not None and first == [bos_id] else []

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return list(self._encode(text)["input_ids"])

    def ids(self, text: str) -> list[int]:
        """Token ids of the beginning of a conversation, with one BOS if the tokenizer adds one."""
        return self._with_bos(self.tokens(text))

    def cut(self, answers: Sequence[Answer], appends_eos: bool) -> tuple[list[int], list[Span | None]]:
        """Token ids of a conversation, and the spans of its answers.

        Args:
            answers: the answers in order; the text of each begins with that of the one before.
            appends_eos: append EOS to every answer; without it, the text closes each with an added token.

        Returns:
            Token ids up to the end of the last answer; for each answer its span, or None if it shares a token with the
            text before it (the text alone has other tokens) or with the text after it.
        """
        encoding = self._encode(answers[-1].said)
        whole = self._with_bos(encoding["input_ids"])
        added = len(whole) - len(encoding["input_ids"])
        eos = [self.tokenizer.eos_token_id] if appends_eos else []
        ids: list[int] = []
        spans: list[Span | None] = []
        done = 0
        for answer in answers:
            start = self._length_in(whole, answer.asked)
            stop: int | None
            if appends_eos or not encoding.is_fast:
                stop = self._length_in(whole, answer.said)
            else:
                token = encoding.char_to_token(len(answer.said) - 1)
                stop = None if token is None else added + token + 1
            if start is None or stop is None or not done <= start < stop:
                spans.append(None)
                continue
            start += len(ids) - done
            ids += [*whole[done:stop], *eos]
            spans.append((start, len(ids)))
            done = stop
        return ids + whole[done:], spans

    def lessons(self, answers: Sequence[Answer], appends_eos: bool) -> tuple[list[Lesson], int]:
        """The answers of a conversation in as few lessons as possible.

        An answer joins the lesson of the one before if its text begins with that one's text.

        Args:
            answers: the answers in order.
            appends_eos: as in `cut`.

        Returns:
            The lessons; the number of answers left out because they share a token with the turn before them.
        """
        lessons: list[Lesson] = []
        shared = 0
        for chain in _chains(answers):
            whole, spans = self.cut(chain, appends_eos)
            # An answer that shares a token with the next turn does not do so as the last turn.
            ends_inside = [answer for answer, span in zip(chain[:-1], spans[:-1], strict=True) if span is None]
            found = [*(self.cut([answer], appends_eos) for answer in ends_inside), (whole, spans)]
            lessons += [_lesson(ids, where) for ids, where in found if any(where)]
            shared += sum(where[-1] is None for _, where in found)
        return lessons, shared

    def _length_in(self, whole: list[int], text: str) -> int | None:
        """How many tokens `text`, the beginning of a conversation, has; None if it has other tokens alone."""
        ids = self.ids(text)
        return len(ids) if whole[: len(ids)] == ids else None

    def _with_bos(self, ids: list[int]) -> list[int]:
        return [*self._bos, *ids] if self._bos and ids[:1] != self._bos else list(ids)

    def _encode(self, text: str) -> BatchEncoding:
        # verbose=False: a text longer than the model allows is cut and counted later, so no warning.
        encoding: BatchEncoding = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return encoding


def _chains(answers: Sequence[Answer]) -> list[list[Answer]]:
    """The answers in runs; within a run, each text begins with that of the one before."""
    chains: list[list[Answer]] = []
    for answer in answers:
        if chains and answer.asked.startswith(chains[-1][-1].said):
            chains[-1].append(answer)
        else:
            chains.append([answer])
    return chains


def _lesson(ids: list[int], spans: Sequence[Span | None]) -> Lesson:
    learnt = [False] * len(ids)
    for start, stop in filter(None, spans):
        learnt[start:stop] = [True] * (stop - start)
    return Lesson(ids, learnt)
