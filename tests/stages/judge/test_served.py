"""A server's answers: every turn after the server's own earlier ones, drawn as the benchmark says."""

import json
from typing import Any

import pytest
from fpo.stages.evaluate.answers import Question
from fpo.stages.judge.answer_files import read_answers
from fpo.stages.judge.client import Asking, Endpoint
from fpo.stages.judge.served import answers_of_server
from judge_server import Answer, completion, serving
from tiny_world import fpo, ran

TALKS = [
    Question("mt-bench", 1, ("1 + 1?", "And 2 + 2?"), 0.0, "math"),
    Question("mt-bench", 2, ("Sing.", "Louder."), 0.7, "writing"),
]


def echo(body: dict[str, Any]) -> Answer:
    """Says what it was asked, and after how many messages."""
    return completion(f" {len(body['messages'])}: {body['messages'][-1]['content']}\n")


def test_later_turns_follow_the_server_s_earlier_answers():
    seen = []
    with serving(echo) as server:
        found = answers_of_server(TALKS, Endpoint(server.url, "m"), Asking(9, seed=3, top_p=0.9), None, seen.append)
    assert found == [["1: 1 + 1?", "3: And 2 + 2?"], ["1: Sing.", "3: Louder."]]
    assert sum(seen) == 4
    later = [request for request in server.requests if len(request["messages"]) == 3]
    assert {request["messages"][1]["content"] for request in later} == {"1: 1 + 1?", "1: Sing."}
    assert {(r["messages"][0]["content"], r["temperature"]) for r in server.requests} == {
        ("1 + 1?", 0.0),
        ("Sing.", 0.7),
    }
    assert {(r["max_tokens"], r["seed"], r["top_p"], r["model"]) for r in server.requests} == {(9, 3, 0.9, "m")}


def test_one_temperature_replaces_those_of_the_questions():
    with serving(echo) as server:
        answers_of_server(TALKS, Endpoint(server.url, "m"), Asking(9), 0.4)
    assert {request["temperature"] for request in server.requests} == {0.4}


def test_the_command_writes_what_the_benchmark_reads(tmp_path):
    questions = tmp_path / "question.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"question_id": q.id, "category": q.category, "turns": list(q.prompts)}) + "\n" for q in TALKS
        )
    )
    out = tmp_path / "out"
    given = ["--outputs", "mt-bench", "--questions", questions, "--model", "org/m", "--out", out, "--max-new-tokens", 9]
    with serving(echo) as server:
        ran(fpo("evaluate", *given, "--endpoint", server.url))
        again = fpo("evaluate", *given, "--endpoint", server.url)
    assert again.exit_code == 2 and len(server.requests) == 4  # finished
    found = read_answers(out, "mt-bench")
    assert found.model == "m" and found.turns[2] == ("1: Sing.", "3: Louder.")


@pytest.mark.parametrize("more", [["--prompts", "5"], ["--base", "b"], ["--device", "cpu"], ["--attention", "eager"]])
def test_what_a_server_cannot_be_told_is_refused(tmp_path, more):
    (tmp_path / "q.json").write_text(json.dumps([{"dataset": "d", "instruction": "A?"}]))
    given = ["--outputs", "alpaca-eval", "--questions", tmp_path / "q.json", "--model", "m", "--out", tmp_path / "out"]
    result = fpo("evaluate", *given, "--endpoint", "http://127.0.0.1:9/v1", *more)
    assert result.exit_code == 2 and more[0] in result.stderr and len(result.stderr.splitlines()) == 1
