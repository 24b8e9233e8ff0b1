"""Answers in the benchmarks' own formats: those that this project writes are read back; others are named."""

import json
from pathlib import Path

import pytest
from fpo.cache.errors import UserError
from fpo.stages.evaluate.answers import Question, write_answers
from fpo.stages.judge.answer_files import Answers, read_answers

QUESTIONS = {
    "alpaca-eval": [Question("alpaca-eval", None, (f"Question {n}?",), 0.7, "helpful_base") for n in range(3)],
    "arena-hard": [Question("arena-hard-v0.1", f"id{n}", (f"Question {n}?",), 0.0) for n in range(3)],
    "mt-bench": [Question("mt-bench", n, (f"Question {n}?", "And then?"), 0.7, "math") for n in range(3)],
}
V2 = [Question("arena-hard-v2.0", f"id{n}", (f"Question {n}?",), 0.0) for n in range(3)]


@pytest.mark.parametrize(("benchmark", "questions"), [*QUESTIONS.items(), ("arena-hard", V2)])
def test_what_this_project_writes_is_read_back(tmp_path, benchmark, questions):
    answers = [[f"Answer {n}, turn {turn}." for turn in range(len(q.prompts))] for n, q in enumerate(questions)]
    name = f"answers-{benchmark}.json{'' if benchmark == 'alpaca-eval' else 'l'}"
    write_answers(tmp_path / name, questions, answers, "our-model")
    expected = Answers("our-model", {q.key: tuple(said) for q, said in zip(questions, answers, strict=True)})
    assert read_answers(tmp_path / name, benchmark) == expected
    assert read_answers(tmp_path, benchmark) == expected  # the folder of the evaluation


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_of_several_samples_of_an_evaluation_the_first_is_read(tmp_path):
    lines = [{"prompt": "A?", "sample": "one"}, {"prompt": "A?", "sample": "two"}, {"prompt": "B?", "sample": "three"}]
    write(tmp_path / "samples.jsonl", lines)
    assert read_answers(tmp_path, "pairwise") == Answers("samples", {"A?": ("one",), "B?": ("three",)})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "A?", "response": "yes"},
        {"instruction": "A?", "output": "yes", "generator": "m"},
        {"question": "A?", "answer": "yes", "model": "m"},
    ],
)
def test_usual_names_of_prompt_and_answer_are_read(tmp_path, row):
    found = read_answers(write(tmp_path / "m.jsonl", [row]), "pairwise")
    assert found == Answers("m", {"A?": ("yes",)})


@pytest.mark.parametrize(
    ("benchmark", "rows", "words"),
    [
        ("alpaca-eval", [{"instruction": "A?"}], "line 1: expected an answer as alpaca-eval has it"),
        ("alpaca-eval", [{"instruction": "A?", "output": 3}], "3 is no text"),
        ("alpaca-eval", [{"instruction": "A?", "output": ""}] * 2, "line 2: expected one answer to each question"),
        ("arena-hard", [{"question_id": "a", "choices": []}], "line 1: expected an answer as arena-hard"),
        ("mt-bench", [{"question_id": 1, "choices": [{"turns": [None]}]}], "None is no text"),
        ("mt-bench", [{"question_id": "one", "choices": [{"turns": ["a"]}]}], "line 1"),
        ("pairwise", [{"prompt": "A?"}], "sample or output or answer"),
        ("pairwise", [{"output": "A"}], "prompt or instruction"),
        ("pairwise", [], "expected answers, found none"),
    ],
)
def test_what_is_no_answer_is_named_in_one_line(tmp_path, benchmark, rows, words):
    with pytest.raises(UserError) as caught:
        read_answers(write(tmp_path / "answers.jsonl", rows), benchmark)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_places_without_answers_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    for path, words in (
        (tmp_path / "nowhere.json", "found none at"),
        (tmp_path, "answers-mt-bench.json or answers-mt-bench.jsonl"),
        (tmp_path / "bad.jsonl", "expected JSON"),
    ):
        with pytest.raises(UserError, match=words):
            read_answers(path, "mt-bench")
