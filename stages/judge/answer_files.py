"""Models' answers read back from files: those of the benchmarks, and of `fpo evaluate`.

In: a file, or the folder of an evaluation. Out: for each question its answers, one a turn.

- AlpacaEval 2: a JSON list of `instruction`, `output` and `generator`; the question is the instruction.
- Arena-Hard v0.1 and MT-Bench: JSON lines with `question_id` and `choices[0].turns`; v2.0 with `uid` and `messages`.
- any two models: JSON lines, or a JSON list, with prompt and answer under the usual names, such as `samples.jsonl`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...cache.errors import UserError
from ...cache.files import parse_json

Judged = Literal["alpaca-eval", "arena-hard", "mt-bench", "pairwise"]

PROMPTS = ("prompt", "instruction", "question")
ANSWERS = ("sample", "output", "answer", "response", "completion")


@dataclass(frozen=True)
class Answers:
    """A model's answers.

    Attributes:
        model: its name in the file, or the file's.
        turns: by the question's key (`Question.key`), one answer a turn.
    """

    model: str
    turns: dict[int | str, tuple[str, ...]]


def read_answers(path: Path, benchmark: Judged) -> Answers:
    """Reads a model's answers.

    Args:
        path: a file, or the folder of an evaluation, which has `answers-BENCHMARK.json(l)` or `samples.jsonl`.
        benchmark: whose format the file has. Of several samples to a prompt the first is read.

    Raises:
        UserError: there is no such file, a row is not in the format, or a question is answered twice.
    """
    file = _file(path, benchmark)
    turns: dict[int | str, tuple[str, ...]] = {}
    model = None
    for where, row in _rows(file):
        try:
            key, answers, name = _PARSERS[benchmark](row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: expected an answer as {benchmark} has it, found none ({error!r}); give the file that the "
                "benchmark's tools or `fpo evaluate --outputs` wrote"
            ) from error
        model = model or name
        if key in turns:
            if file.name == "samples.jsonl":
                continue
            raise UserError(f"{where}: expected one answer to each question, found another to {str(key)[:60]!r}")
        turns[key] = answers
    if not turns:
        raise UserError(f"{file}: expected answers, found none")
    return Answers(model or file.stem, turns)


def _file(path: Path, benchmark: Judged) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"answers: expected a file or the folder of an evaluation, found none at {path}")
    names = ["samples.jsonl"] if benchmark == "pairwise" else []
    names += [f"answers-{benchmark}.json", f"answers-{benchmark}.jsonl"]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(f"answers: expected {' or '.join(names)} in {path}, found neither; run fpo evaluate with --outputs")


def _rows(file: Path) -> list[tuple[str, Any]]:
    """The rows of a JSON list or of JSON lines, with where each stands."""
    content = file.read_bytes()
    try:
        if content.lstrip().startswith(b"["):
            return [(f"{file}, entry {number}", row) for number, row in enumerate(parse_json(content), 1)]
        lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        return [(f"{file}, line {number}", parse_json(line)) for number, line in lines]
    except ValueError as error:
        raise UserError(f"{file}: expected JSON of answers, found none ({error})") from error


Found = tuple[int | str, tuple[str, ...], str | None]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _alpaca_eval(row: Any) -> Found:
    return _text(row["instruction"]), (_text(row["output"]),), row.get("generator")


def _arena_hard(row: Any) -> Found:
    if "uid" in row:
        answer = row["messages"][-1]["content"]
        return _text(row["uid"]), (_text(answer["answer"] if isinstance(answer, dict) else answer),), row.get("model")
    turns = row["choices"][0]["turns"]
    return _text(row["question_id"]), tuple(_text(turn["content"]) for turn in turns), row.get("model_id")


def _mt_bench(row: Any) -> Found:
    return int(row["question_id"]), tuple(map(_text, row["choices"][0]["turns"])), row.get("model_id")


def _pairwise(row: Any) -> Found:
    def first(names: tuple[str, ...]) -> str:
        name = next((name for name in names if name in row), None)
        if name is None:
            raise KeyError(" or ".join(names))
        return _text(row[name])

    return first(PROMPTS), (first(ANSWERS),), row.get("generator") or row.get("model")


_PARSERS: dict[Judged, Callable[[Any], Found]] = {
    "alpaca-eval": _alpaca_eval,
    "arena-hard": _arena_hard,
    "mt-bench": _mt_bench,
    "pairwise": _pairwise,
}
