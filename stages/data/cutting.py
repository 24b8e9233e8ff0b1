"""The text of a conversation to token ids, cut where its answers begin and end.

In: a tokenizer; the texts that ask for an answer and that end with it. Out: token ids of the whole, where answers are.

A conversation is tokenised whole, as the model sees it: some tokenizers begin a text otherwise than they go on.
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

Span = tuple[int, int]  # from this token up to, and without, that one


class Answer(NamedTuple):
    """An answer in the text of its conversation.

    Attributes:
        asked: the conversation's text up to the answer, its opening included.
        said: the text up to the end of what closes the answer.
    """

    asked: str
    said: str


class Lesson(NamedTuple):
    """A conversation in tokens, as a model is to learn it.

    Attributes:
        ids: up to the end of its last answer.
        learnt: for each token, whether it is an answer's.
    """

    ids: list[int]
    learnt: list[bool]


class Cutter:
    """A tokenizer that finds its tokens in a conversation again.

    Attributes:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Finds out whether the tokenizer adds BOS."""
        self.tokenizer = tokenizer
        bos_id = tokenizer.bos_token_id
        # Of a text, because some tokenizers give nothing at all for an empty one.
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        self._bos: list[int] = [bos_id] if bos_id is not None and first == [bos_id] else []

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, and of nothing around it."""
        return list(self._encode(text)["input_ids"])

    def ids(self, text: str) -> list[int]:
        """Token ids of a conversation from its beginning, with BOS once where the tokenizer adds one."""
        return self._with_bos(self.tokens(text))

    def cut(self, answers: Sequence[Answer], appends_eos: bool) -> tuple[list[int], list[Span | None]]:
        """Token ids of a conversation, and where its answers are in it.

        Args:
            answers: each answer's text begins with that of the one before.
            appends_eos: whether EOS is to close every answer; if not, a token that was added to the vocabulary does.

        Returns:
            int ids up to the end of the last answer; a span of them for each answer, None where its tokens are not its
            own: the tokens before it are not those that the text before it has alone, or its end is inside a token.
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
        """A conversation's answers as few lessons: those follow in one whose text begins with that of the one before.

        Args:
            answers: in their order.
            appends_eos: as in `cut`.

        Returns:
            The lessons; the number of answers that are in none, since they share a token with the turn before them.
        """
        lessons: list[Lesson] = []
        shared = 0
        for chain in _chains(answers):
            whole, spans = self.cut(chain, appends_eos)
            # What shares a token with the turn that follows does not do so while it is the last.
            ends_inside = [answer for answer, span in zip(chain[:-1], spans[:-1], strict=True) if span is None]
            found = [*(self.cut([answer], appends_eos) for answer in ends_inside), (whole, spans)]
            lessons += [_lesson(ids, where) for ids, where in found if any(where)]
            shared += sum(where[-1] is None for _, where in found)
        return lessons, shared

    def _length_in(self, whole: list[int], text: str) -> int | None:
        """How many tokens of a conversation are its beginning `text`, if they are those that it has alone."""
        ids = self.ids(text)
        return len(ids) if whole[: len(ids)] == ids else None

    def _with_bos(self, ids: list[int]) -> list[int]:
        return [*self._bos, *ids] if self._bos and ids[:1] != self._bos else list(ids)

    def _encode(self, text: str) -> BatchEncoding:
        # verbose=False: a text over the model's length is no news, it is cut and counted later.
        encoding: BatchEncoding = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return encoding


def _chains(answers: Sequence[Answer]) -> list[list[Answer]]:
    """The answers in runs in which each text begins with that of the one before."""
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
