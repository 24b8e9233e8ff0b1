"""`fpo judge` from answers to a summary, against a server that judges as it is told."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fpo.stages.judge import client
from fpo.stages.judge.client import KEY
from fpo.stages.judge.judgments import read_judgments
from judge_server import Answer, completion, serving
from tiny_world import fpo, ran

QUESTIONS = [f"Question {n}?" for n in range(6)]


def answers(path: Path, name: str, words: int, questions: list[str] = QUESTIONS) -> Path:
    """Longer answers to later questions."""
    rows = [
        {"dataset": f"set{n % 2}", "instruction": q, "output": f"{name} " * (words + n), "generator": name}
        for n, q in enumerate(questions)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def given(tmp_path) -> list[Any]:
    ours, theirs = answers(tmp_path / "ours.json", "ours", 5), answers(tmp_path / "theirs.json", "theirs", 2)
    named = ["--benchmark", "alpaca-eval", "--answers", ours, "--against", theirs, "--judge", "some-judge"]
    return ["judge", *named, "--out", tmp_path / "out"]


def ours_always(body: dict[str, Any]) -> Answer:
    """Prefers our answer with a probability of 0.9, wherever it stands."""
    content = body["messages"][-1]["content"]
    first = content.index("ours ") < content.index("theirs ")
    likely, other = ("A", "B") if first else ("B", "A")
    return completion(likely, [{likely: math.log(0.9), other: math.log(0.1)}])


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_preference_becomes_a_win_rate_with_what_it_cost(given, tmp_path):
    with serving(ours_always) as server:
        said = ran(fpo(*given, "--endpoint", server.url)).output
    found = summary(tmp_path / "out")
    assert found["rates"]["win rate"]["mean"] == pytest.approx(0.9)
    assert (found["judged"], found["unparsed"], found["questions"], found["counted"]) == (12, 0, 6, 6)
    assert found["first"] == pytest.approx(0.5) and set(found["categories"]) == set()
    assert "12 judgments, 12 of them to ask for: about" in said and "84 read, 24 written by the judge" in said
    assert "ours against theirs" in said and "| win rate | 90.0 | 90.0 to 90.0 |" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("run.yaml", "judgments.jsonl", "summary.json", "summary.md", "judge.html")
    }


def test_a_second_call_asks_nothing_and_comes_to_the_same(given, tmp_path):
    with serving(ours_always) as server:
        ran(fpo(*given, "--endpoint", server.url))
        first = summary(tmp_path / "out")
        assert "0 of them to ask for" in ran(fpo(*given, "--endpoint", server.url)).output
    assert summary(tmp_path / "out") == first and len(server.requests) == 12


def test_a_call_that_was_stopped_goes_on_where_it_was(given, tmp_path):
    with serving(*[ours_always] * 5, (400, {}, b"stop")) as server:
        stopped = fpo(*given, "--endpoint", server.url, "--concurrency", 1)
    assert stopped.exit_code == 2 and "found status 400: stop" in stopped.stderr
    assert len(read_judgments(tmp_path / "out")) == 5 and not (tmp_path / "out" / "summary.json").exists()
    with serving(ours_always) as server:
        ran(fpo(*given, "--endpoint", server.url))
    assert len(server.requests) == 7 and summary(tmp_path / "out")["rates"]["win rate"]["mean"] == pytest.approx(0.9)


def test_more_questions_are_judged_in_the_same_folder_and_other_settings_in_another(given):
    with serving(ours_always) as server:
        ran(fpo(*given, "--endpoint", server.url, "--limit", 2))
        assert len(server.requests) == 4
        ran(fpo(*given, "--endpoint", server.url))
        assert len(server.requests) == 12
        other = fpo(*given, "--endpoint", server.url, "--mode", "verdict")
    assert other.exit_code == 2 and "mode: was 'logprob', is 'verdict'" in other.stderr


def test_text_is_read_where_no_log_probabilities_are(given, tmp_path):
    with serving(lambda body: completion("[[A]]")) as server:
        refused = fpo(*given, "--endpoint", server.url)
        assert refused.exit_code == 2 and "--mode verdict" in refused.stderr
    (tmp_path / "out" / "run.yaml").unlink()
    (tmp_path / "out" / "judgments.jsonl").unlink()
    with serving(lambda body: completion("[[A]]")) as server:
        ran(fpo(*given, "--endpoint", server.url, "--mode", "verdict"))
    found = summary(tmp_path / "out")
    assert found["rates"]["win rate"]["mean"] == 0.5 and found["first"] == 1.0  # a judge of places alone


def test_known_pairs_calibrate_a_judge(tmp_path):
    def longer(body: dict[str, Any]) -> Answer:
        content = body["messages"][-1]["content"]
        one, other = (content.split(f"<answer_{name}>")[1].split("</answer")[0] for name in ("a", "b"))
        return completion("A" if len(one) > len(other) else "B")

    pairs = [{"prompt": f"Question {n}?", "chosen": "x" * (9 if n < 3 else 2), "rejected": "yyyy"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = ["judge", "--calibrate", tmp_path / "pairs.jsonl", "--judge", "j", "--mode", "verdict"]
    with serving(longer) as server:
        ran(fpo(*given, "--endpoint", server.url, "--out", tmp_path / "out"))
    rates = {name: rate["mean"] for name, rate in summary(tmp_path / "out")["rates"].items()}
    assert rates == {
        "agreement": 0.75,
        "preference": 0.75,
        "preference for the longer answer": 1.0,
        "the longer answer is the chosen one": 0.75,
    }


def test_the_key_is_sent_and_never_written(given, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "sk-very-secret")
    with serving(ours_always) as server:
        said = ran(fpo(*given, "--endpoint", server.url)).output
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very" not in said + "".join(path.read_text() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ["--answers", "nowhere.json"],
            "answers: expected a file or the folder of an evaluation, found none at nowhere",
        ),
        (["--against", "OTHERS"], "found 6 others such as 'Another 0?'"),
        (["--against", "FEWER"], "found none to 2, the first 'Question 4?'"),
        (["--benchmark", "mt-bench"], "--questions: expected the questions of mt-bench"),
        (["--benchmark", "arena-hard", "--mode", "verdict"], "--mode: arena-hard reads text"),
        (["--reply-tokens", "5"], "--reply-tokens: --mode logprob reads no text"),
        (["--split", "test"], "--split: there is no --calibrate"),
        (["--difficulties", "d.csv"], "--difficulties: expected --benchmark alpaca-eval with --questions"),
        (["--prompt", "nowhere.txt"], "--prompt: expected a text file, found none at nowhere.txt"),
        (["--endpoint", "localhost"], "expected http://… or https://…, found localhost"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_asked(given, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.0)
    answers(tmp_path / "others.json", "theirs", 2, [f"Another {n}?" for n in range(6)])
    answers(tmp_path / "fewer.json", "theirs", 2, QUESTIONS[:4])
    files = {"OTHERS": tmp_path / "others.json", "FEWER": tmp_path / "fewer.json"}
    with serving(ours_always) as server:
        result = fpo(*given, "--endpoint", server.url, *(files.get(part, part) for part in change))
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not server.requests
