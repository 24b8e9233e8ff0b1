"""A model's answers to the questions of three benchmarks, in the formats that their judges read.

In: a question file as the benchmark publishes it, a model and its chat format. Out: a file of answers:

- AlpacaEval 2: `alpaca_eval.json` in, `model_outputs.json` out, each a JSON list;
- Arena-Hard: `question.jsonl` in, `model_answer/MODEL.jsonl` out, in the format of v0.1 or v2.0, as the questions are;
- MT-Bench: `question.jsonl` in, `model_answer/MODEL.jsonl` out, two turns a question.

The judges of the last two call a model by the name of its file. Equal answers have equal ids; only time stamps differ.
"""

import itertools
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from ...cache.files import canonical_json, decode, parse_json, write_atomically
from ..data.chat import ChatFormat, Message, Turns
from ..model.tokenizer import check_tokens
from .generate import Int32, Sampling, context_length, generate

Benchmark = Literal["alpaca-eval", "arena-hard", "mt-bench"]
Format = Literal["alpaca-eval", "arena-hard-v0.1", "arena-hard-v2.0", "mt-bench"]
Respond = Callable[[list[Turns], list[float]], list[str]]

# Of FastChat's `temperature_config`, without the categories that have 0.7, which is also that of unknown ones.
MT_BENCH_TEMPERATURES = dict.fromkeys(("coding", "extraction", "math", "reasoning"), 0.0) | {
    "humanities": 0.1,
    "stem": 0.1,
}


@dataclass(frozen=True)
class Question:
    """A question of any benchmark.

    Attributes:
        format: how the benchmark writes it, and what it is answered with.
        id: the benchmark's id; AlpacaEval has none and matches outputs by instruction.
        prompts: what the user says, turn by turn.
        temperature: the benchmark's own.
        dataset: where AlpacaEval has it from.
    """

    format: Format
    id: int | str | None
    prompts: tuple[str, ...]
    temperature: float
    dataset: str | None = None

    def record(self, answers: Sequence[str], model_name: str, tstamp: float) -> dict[str, Any]:
        """The answers as the judge reads them.

        The formats: AlpacaEval's `evaluate_from_model`; Arena-Hard's `gen_answer.py` of 2024 (v0.1) and of 2025 (v2.0),
        whose counts for style control are left to its own `add_markdown_info.py`; MT-Bench's `gen_model_answer.py`.

        Args:
            answers: one a turn.
            model_name: what the judge calls the model.
            tstamp: seconds since 1970; AlpacaEval has none.
        """
        if self.format == "alpaca-eval":
            asked = {"dataset": self.dataset, "instruction": self.prompts[0]}
            return {**asked, "output": answers[0], "generator": model_name}
        answer_id = str(uuid.uuid5(uuid.NAMESPACE_OID, canonical_json([self.id, model_name, list(answers)])))
        if self.format == "arena-hard-v2.0":
            ids = {"uid": self.id, "ans_id": answer_id, "model": model_name}
            contents = {"user": self.prompts[0], "assistant": {"answer": answers[0]}}
            messages = [{"role": role, "content": content} for role, content in contents.items()]
            return {**ids, "messages": messages, "tstamp": tstamp}
        turns = list(answers) if self.format == "mt-bench" else [{"content": text} for text in answers]
        ids = {"question_id": self.id, "answer_id": answer_id, "model_id": model_name}
        return {**ids, "choices": [{"index": 0, "turns": turns}], "tstamp": tstamp}


def read_questions(path: Path, benchmark: Benchmark) -> list[Question]:
    """Reads a benchmark's question file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not of the benchmark's format; the message has the line (or entry) and the field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"questions: expected a file, found none at {path}")
    try:
        rows = _json_list(path) if benchmark == "alpaca-eval" else _json_lines(path)
        if not rows:
            raise ValueError(f"{path}: expected at least one question, found none")
        format: Format = benchmark if benchmark != "arena-hard" else _arena_hard_version(rows[0][1])
        questions = [_question(format, row, where) for where, row in rows]
        ids = [question.id for question in questions]
        for number, (where, _) in enumerate(rows):
            if ids[number] is not None and ids[number] in ids[:number]:
                raise ValueError(f"{where}: expected an id of its own, found {ids[number]!r} again")
    except ValueError as error:
        raise ValueError(f"{error}; give the questions of {benchmark} as they are published") from error
    return questions


def _json_list(path: Path) -> list[tuple[str, Any]]:
    try:
        entries = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found none ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a JSON list, found {type(entries).__name__}")
    return [(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, start=1)]


def _json_lines(path: Path) -> list[tuple[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}, line {number}", parse_json(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected JSON, found none ({error})") from error
    return rows


def _arena_hard_version(row: Any) -> Format:
    return "arena-hard-v2.0" if isinstance(row, dict) and "uid" in row else "arena-hard-v0.1"


def _question(format: Format, row: Any, where: str) -> Question:
    """The question in a row; what else a row holds (references, clusters) is for the judge.

    The formats: tatsu-lab/alpaca_eval, `evaluate_from_model` in `src/alpaca_eval/main.py`; lmarena/arena-hard-auto,
    `data/arena-hard-v0.1/question.jsonl`, and `gen_answer.py` (2025) for v2.0; lm-sys/FastChat,
    `fastchat/llm_judge/data/mt_bench/question.jsonl`. The temperatures: AlpacaEval leaves it to each model, and its own
    `models_configs/alpaca-7b`, as many of local models, has 0.7; Arena-Hard has 0 in
    `config/gen_answer_config.yaml`; MT-Bench has one a category, in `fastchat/llm_judge/common.py`.
    """
    if format == "alpaca-eval":
        dataset = _field(row, "dataset", str, where)
        question = Question(format, None, (_field(row, "instruction", str, where),), 0.7, dataset)
    elif format == "arena-hard-v0.1":
        turns = enumerate(_field(row, "turns", list, where))
        prompts = tuple(_field(turn, "content", str, f"{where}, turns[{number}]") for number, turn in turns)
        question = Question(format, _field(row, "question_id", str, where), prompts, 0.0)
    elif format == "arena-hard-v2.0":
        question = Question(format, _field(row, "uid", str, where), (_field(row, "prompt", str, where),), 0.0)
    else:
        temperature = MT_BENCH_TEMPERATURES.get(_field(row, "category", str, where), 0.7)
        prompts = _field(row, "turns", tuple[str, ...], where)
        question = Question(format, _field(row, "question_id", int, where), prompts, temperature)
    try:
        "".join(question.prompts).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, which no tokenizer reads
        raise ValueError(f"{where}: expected text, found {error}") from error
    if not question.prompts or not all(text.strip() for text in question.prompts):
        raise ValueError(f"{where}: expected words of the user in every turn, found none")
    return question


def _field(row: Any, name: str, kind: Any, where: str) -> Any:
    if not isinstance(row, dict) or name not in row:
        raise ValueError(f"{where}: expected an object with the field {name!r}, found none")
    return decode(kind, row[name], f"{where}: {name}")


def answer_questions(
    questions: Sequence[Question], respond: Respond, temperature: float | None = None
) -> list[tuple[str, ...]]:
    """Answers every turn of every question; a later turn's conversation holds the answers to the earlier ones.

    Args:
        questions: the questions.
        respond: takes conversations, each of which ends with the user, and a temperature for each; returns answers.
        temperature: of every answer; None takes each question's own.

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
    return [tuple(message.content for message in turns[1::2]) for turns in conversations]


def write_answers(
    path: Path,
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    model_name: str,
) -> None:
    """Writes the file that the benchmark's judge reads, whole or not at all."""
    now = time.time()
    records = [question.record(texts, model_name, now) for question, texts in zip(questions, answers, strict=True)]
    if benchmark == "alpaca-eval":
        text = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, text.encode())


def write_benchmark_answers(
    model: PreTrainedModel,
    chat: ChatFormat,
    questions_file: Path,
    benchmark: Benchmark,
    out_file: Path,
    *,
    model_name: str,
    sampling: Sampling,
    temperature_given: bool,
    on_batch: Callable[[int], None] | None = None,
) -> int:
    """Answers a benchmark's questions and writes them for its judge.

    Args:
        model: the causal LM.
        chat: its tokenizer and chat template.
        questions_file: as the benchmark publishes it.
        benchmark: which one it is.
        out_file: where the answers go, in a folder that exists.
        model_name: what the judge calls the model.
        sampling: how tokens are drawn.
        temperature_given: whether `sampling` also says at which temperature; else the benchmark does.
        on_batch: as in `generate`.

    Returns:
        The number of answers, one for each turn of each question.

    Raises:
        FileNotFoundError: there are no such questions, or no such folder.
        ValueError: the questions are not of the benchmark's format, or one may not fit into the model's context.
    """
    if not out_file.parent.is_dir():
        raise FileNotFoundError(f"answers: expected a folder, found none at {out_file.parent}; make it")
    questions = read_questions(questions_file, benchmark)
    for question in questions:
        _check_room(question, model, chat, sampling.max_new_tokens, questions_file)
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

    answers = answer_questions(questions, respond, sampling.temperature if temperature_given else None)
    write_answers(out_file, benchmark, questions, answers, model_name)
    return sum(map(len, answers))


def _check_room(question: Question, model: PreTrainedModel, chat: ChatFormat, max_new_tokens: int, path: Path) -> None:
    """Refuses before hours of generation what may turn out too long after them."""
    limit = context_length(model)
    turns: Turns = (Message("user", question.prompts[0]),)
    for text in question.prompts[1:]:
        turns += (Message("assistant", "."), Message("user", text))
    ids = chat.prompt_ids(turns)
    check_tokens(model, [(f"{path}, {question.prompts[0][:40]!r}", ids)], chat.tokenizer)
    tokens = len(ids)
    if limit is not None and tokens + len(question.prompts) * max_new_tokens > limit:
        raise ValueError(
            f"{path}: expected questions and answers within the model's {limit} tokens, found {tokens} and "
            f"{len(question.prompts)} x max_new_tokens {max_new_tokens} for {question.prompts[0][:40]!r}; lower "
            "max_new_tokens or leave out the question"
        )


def _text(ids: Int32, chat: ChatFormat) -> str:
    """The answer as text, up to its closing token; a model may also end by EOS where its template has another one."""
    closing = (chat.end_id, chat.tokenizer.eos_token_id)
    kept = list(itertools.takewhile(lambda token: token not in closing, ids.tolist()))
    text = chat.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.strip()
