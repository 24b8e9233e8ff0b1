"""A model's answers to the questions of three benchmarks, written as the benchmarks' judges read them.

In: a question file as the benchmark publishes it, a model and its chat format. Out: a file of answers.

- AlpacaEval 2: `alpaca_eval.json` in, `model_outputs.json` out; each is a JSON list.
- Arena-Hard v0.1 and v2.0: `question.jsonl` in, `model_answer/MODEL.jsonl` out.
- MT-Bench: `question.jsonl` in, `model_answer/MODEL.jsonl` out; questions have two turns.

The judges of Arena-Hard and MT-Bench take the model's name from the name of the answer file. Answer ids are hashes of
the answers, so a second run differs from the first in its time stamps alone.
"""

import itertools
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError
from transformers import PreTrainedModel

from ...cache.errors import UserError
from ...cache.files import canonical_json, decode, parse_json, write_atomically
from ...cache.schema import Int32
from ..data.chat import ChatFormat, Message, Turns
from ..model.tokenizer import check_tokens
from .generate import Sampling, check_room, generate

Benchmark = Literal["alpaca-eval", "arena-hard", "mt-bench"]
Format = Literal["alpaca-eval", "arena-hard-v0.1", "arena-hard-v2.0", "mt-bench"]
Respond = Callable[[list[Turns], list[float]], list[str]]

# FastChat's `temperature_config`; the categories that it gives 0.7, and unknown ones, take 0.7.
MT_BENCH_TEMPERATURES = dict.fromkeys(("coding", "extraction", "math", "reasoning"), 0.0) | {
    "humanities": 0.1,
    "stem": 0.1,
}


@dataclass(frozen=True)
class Question:
    """A question of any benchmark.

    Attributes:
        format: how the benchmark writes the question and reads the answers.
        id: the benchmark's; AlpacaEval has none and finds answers by the question's text.
        prompts: what the user says, turn by turn.
        temperature: at which the benchmark has it answered.
        category: the benchmark's: AlpacaEval's data set, Arena-Hard's cluster or category, MT-Bench's category.
        references: right answers, one a turn, that a judge may be shown; empty for most questions.
    """

    format: Format
    id: int | str | None
    prompts: tuple[str, ...]
    temperature: float
    category: str | None = None
    references: tuple[str, ...] = ()

    @property
    def key(self) -> int | str:
        """What answers name it by: the benchmark's id, or AlpacaEval's instruction."""
        return self.prompts[0] if self.id is None else self.id

    def record(self, answers: Sequence[str], model_name: str, tstamp: float) -> dict[str, Any]:
        """The answers, one a turn, as the judge reads them.

        The formats are those of AlpacaEval's `evaluate_from_model`, Arena-Hard's `gen_answer.py` of 2024 (v0.1) and of
        2025 (v2.0; its `add_markdown_info.py` adds the counts for style control), and MT-Bench's `gen_model_answer.py`.
        `tstamp` is in seconds since 1970; AlpacaEval has none.
        """
        if self.format == "alpaca-eval":
            asked = {"dataset": self.category, "instruction": self.prompts[0]}
            return {**asked, "output": answers[0], "generator": model_name}
        answer_id = str(uuid.uuid5(uuid.NAMESPACE_OID, canonical_json([self.id, model_name, list(answers)])))
        if self.format == "arena-hard-v2.0":
            ids = {"uid": self.id, "ans_id": answer_id, "model": model_name}
            user = {"role": "user", "content": self.prompts[0]}
            assistant = {"role": "assistant", "content": {"answer": answers[0]}}
            return {**ids, "messages": [user, assistant], "tstamp": tstamp}
        turns = list(answers) if self.format == "mt-bench" else [{"content": text} for text in answers]
        ids = {"question_id": self.id, "answer_id": answer_id, "model_id": model_name}
        return {**ids, "choices": [{"index": 0, "turns": turns}], "tstamp": tstamp}


# Rows of question files; other fields are ignored.


def _has_words(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("no_words", "expected words of the user")
    return text


Words = Annotated[str, AfterValidator(_has_words)]


class _AlpacaEval(BaseModel, strict=True):  # tatsu-lab/alpaca_eval, src/alpaca_eval/main.py
    dataset: str
    instruction: Words

    def question(self) -> Question:
        # AlpacaEval leaves the temperature to each model: `models_configs/alpaca-7b` and many others have 0.7.
        return Question("alpaca-eval", None, (self.instruction,), 0.7, self.dataset)


class _Content(BaseModel, strict=True):
    content: Words


class _ArenaHardV01(BaseModel, strict=True):  # lmarena/arena-hard-auto, data/arena-hard-v0.1/question.jsonl
    question_id: str
    turns: list[_Content] = Field(min_length=1)
    cluster: str | None = None

    def question(self) -> Question:
        # The temperature of both versions is in config/gen_answer_config.yaml.
        prompts = tuple(turn.content for turn in self.turns)
        return Question("arena-hard-v0.1", self.question_id, prompts, 0.0, self.cluster)


class _ArenaHardV2(BaseModel, strict=True):  # lmarena/arena-hard-auto, gen_answer.py of 2025
    uid: str
    prompt: Words
    category: str | None = None

    def question(self) -> Question:
        return Question("arena-hard-v2.0", self.uid, (self.prompt,), 0.0, self.category)


class _MTBench(BaseModel, strict=True):  # lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl
    question_id: int
    category: str
    turns: list[Words] = Field(min_length=1)
    reference: list[str] = []

    def question(self) -> Question:
        temperature = MT_BENCH_TEMPERATURES.get(self.category, 0.7)
        return Question(
            "mt-bench", self.question_id, tuple(self.turns), temperature, self.category, tuple(self.reference)
        )


def read_questions(path: Path, benchmark: Benchmark) -> list[Question]:
    """Reads a benchmark's question file.

    Raises:
        UserError: the file does not exist or is not in the benchmark's format; names the line (or entry) and field.
    """
    if not path.is_file():
        raise UserError(f"questions: expected a file, found none at {path}")
    hint = f"give the questions of {benchmark} as they are published"
    where, rows = str(path), []
    try:
        if benchmark == "alpaca-eval":
            entries = enumerate(decode(list[Any], parse_json(path.read_bytes()), "its JSON"), start=1)
            rows = [(f"{path}, entry {number}", entry) for number, entry in entries]
        else:
            for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
                where = f"{path}, line {number}"
                if line.strip():
                    rows.append((where, parse_json(line)))
    except ValueError as error:
        raise UserError(f"{where}: expected JSON of questions, found none ({error}); {hint}") from error
    if not rows:
        raise UserError(f"{path}: expected at least one question, found none; {hint}")
    kind: Any = {"alpaca-eval": _AlpacaEval, "arena-hard": _ArenaHardV01, "mt-bench": _MTBench}[benchmark]
    if benchmark == "arena-hard" and isinstance(rows[0][1], dict) and "uid" in rows[0][1]:
        kind = _ArenaHardV2
    questions: list[Question] = []
    for where, row in rows:
        try:
            question = decode(kind, row, where).question()
        except ValueError as error:
            raise UserError(f"{error}; {hint}") from error
        if question.id is not None and question.id in [known.id for known in questions]:
            raise UserError(f"{where}: expected an id of its own, found {question.id!r} again; {hint}")
        questions.append(question)
    return questions


def answer_questions(
    questions: Sequence[Question], respond: Respond, temperature: float | None = None
) -> list[list[str]]:
    """Answers every turn of every question; the conversation of a later turn holds the answers to the earlier ones.

    `respond` answers conversations, each of which ends with the user, at a temperature for each. `temperature` is that
    of every answer; without it, each question has its own.

    Returns:
        The answers to each question, one a turn.
    """
    conversations: list[Turns] = [() for _ in questions]
    for turn in range(max(len(question.prompts) for question in questions)):
        asked = [number for number, question in enumerate(questions) if turn < len(question.prompts)]
        for number in asked:
            conversations[number] += (Message("user", questions[number].prompts[turn]),)
        temperatures = [questions[number].temperature if temperature is None else temperature for number in asked]
        texts = respond([conversations[number] for number in asked], temperatures)
        for number, text in zip(asked, texts, strict=True):
            conversations[number] += (Message("assistant", text),)
    return [[message.content for message in turns[1::2]] for turns in conversations]


def write_answers(path: Path, questions: Sequence[Question], answers: Sequence[Sequence[str]], model_name: str) -> None:
    """Writes the file that the benchmark's judge reads, whole or not at all."""
    now = time.time()
    records = [question.record(texts, model_name, now) for question, texts in zip(questions, answers, strict=True)]
    if questions[0].format == "alpaca-eval":
        text = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, text.encode())


def write_benchmark_answers(
    model: PreTrainedModel,
    chat: ChatFormat,
    questions: Sequence[Question],
    out_file: Path,
    *,
    model_name: str,
    sampling: Sampling,
    temperature: float | None,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Answers the questions of a benchmark and writes the answers for its judge.

    Args:
        model: the causal LM.
        chat: the model's tokenizer and chat template.
        questions: all of one benchmark.
        out_file: where the answers go, in a folder that exists.
        model_name: what the judge calls the model.
        sampling: how tokens are drawn; its temperature is not read.
        temperature: of every answer; None is each question's own.
        on_batch: as in `generate`.

    Raises:
        UserError: a question has tokens that the model lacks, or may not fit into the model's context.
    """
    for question in questions:
        _check_question(question, model, chat, sampling.max_new_tokens)
    # A seed for every call, or the second turns would be drawn with the first turns' random numbers.
    seeds = itertools.count(sampling.seed)

    def respond(conversations: list[Turns], temperatures: list[float]) -> list[str]:
        texts = [""] * len(conversations)
        for temperature in sorted(set(temperatures)):
            numbers = [number for number, own in enumerate(temperatures) if own == temperature]
            found = generate(
                model,
                [np.asarray(chat.prompt_ids(conversations[number]), dtype=np.int32) for number in numbers],
                samples=1,
                sampling=replace(sampling, temperature=temperature, seed=next(seeds)),
                end_id=chat.end_id,
                on_batch=on_batch,
            )
            for number, (ids,) in zip(numbers, found, strict=True):
                texts[number] = _text(ids, chat)
        return texts

    write_answers(out_file, questions, answer_questions(questions, respond, temperature), model_name)


def _check_question(question: Question, model: PreTrainedModel, chat: ChatFormat, max_new_tokens: int) -> None:
    """Refuses, before hours of generation, a conversation that may turn out too long after them."""
    turns: Turns = (Message("user", question.prompts[0]),)
    for text in question.prompts[1:]:
        turns += (Message("assistant", "."), Message("user", text))
    ids = chat.prompt_ids(turns)
    where = f"question {question.prompts[0][:40]!r}"
    check_tokens(model, [(where, ids)], chat.tokenizer)
    check_room(model, where, len(ids), len(question.prompts) * max_new_tokens)


def _text(ids: Int32, chat: ChatFormat) -> str:
    """The answer as text, up to its closing token or EOS, with which a model may end whatever its template has."""
    closing = (chat.end_id, chat.tokenizer.eos_token_id)
    kept = list(itertools.takewhile(lambda token: token not in closing, ids.tolist()))
    text = chat.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.strip()
