"""Checks of the options of `judge`, by what a scripted server was asked and what the summary says then.

Of six questions our answer to number n is `ours` and n + 1 words, the other model's `theirs` and three words.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fpo.stages.judge import client, rates
from judge_server import Answer, Server, completion, hang, serving
from scipy.optimize import minimize
from seams.lab import Lab
from seams.options import effect
from tiny_world import files, fpo

COUNT = 6
QUESTIONS = [f"Question {n}?" for n in range(COUNT)]
OURS, THEIRS = [f"ours{' word' * (n + 1)}" for n in range(COUNT)], ["theirs" + " word" * 3] * COUNT


def number_of(body: dict[str, Any]) -> int:
    """The question that a judge is asked about."""
    return int(body["messages"][-1]["content"].split("Question ")[1].split("?")[0])


def ours_is_a(body: dict[str, Any]) -> bool:
    content: str = body["messages"][-1]["content"]
    return content.index("ours word") < content.index("theirs word")


def prefers(of_ours: Callable[[int], float]) -> Callable[[dict[str, Any]], Answer]:
    """A judge of a given preference for our answer to each question, whatever stands first; it says more than that."""

    def respond(body: dict[str, Any]) -> Answer:
        share = of_ours(number_of(body))
        share = share if ours_is_a(body) else 1 - share
        return completion("[[B]]", [{"A": math.log(share), "B": math.log(1 - share)}])

    return respond


def says(text: str) -> Callable[[dict[str, Any]], Answer]:
    return lambda body: completion(text)


@dataclass(frozen=True)
class Asked:
    """What came of a call, and what its judge was asked."""

    out: Path
    said: str
    server: Server

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return found

    @property
    def rates(self) -> dict[str, float]:
        return {name: rate["mean"] for name, rate in self.summary["rates"].items()}

    def each(self, name: str) -> set[Any]:
        """What the requests have under a name."""
        return {request.get(name) for request in self.server.requests}


def judged(lab: Lab, respond: Any = None, **options: Any) -> Asked:
    """A call that has to succeed; by default in AlpacaEval's terms, by a judge that likes later questions' answers."""
    out = lab.new("judge")
    with serving(respond or prefers(rising)) as server:
        result = call(lab, server, out, **options)
    assert result.exit_code == 0, result.output
    return Asked(out, result.output, server)


def call(lab: Lab, server: Server, out: Path, **options: Any) -> Any:
    given = {"benchmark": "alpaca-eval", "answers": alpaca(lab, OURS), "against": alpaca(lab, THEIRS)}
    given |= {"endpoint": server.url, "judge": "some-judge", "out": out} | options
    named = {f"--{name.replace('_', '-')}": value for name, value in given.items() if value is not None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "RESAMPLES", 9)  # the intervals are tested in test_rates.py
        return fpo("judge", *(part for pair in named.items() for part in pair))


def refused(lab: Lab, **options: Any) -> str:
    """The line of a call that is refused before anything is asked."""
    with serving(says("A")) as server:
        result = call(lab, server, lab.new("refused"), **options)
    assert (result.exit_code, len(result.stderr.splitlines()), server.requests) == (2, 1, []), result.output
    line: str = result.stderr
    return line


def rising(number: int) -> float:
    return 0.3 + 0.1 * number


def alpaca(lab: Lab, answers: list[str]) -> Path:
    """A file of answers in AlpacaEval's format; `dataset` is a category."""
    path = lab.new(f"{answers[0].split()[0]}.json")
    rows = zip(QUESTIONS, answers, strict=True)
    path.write_text(json.dumps([{"instruction": q, "output": a, "generator": "m", "dataset": "d"} for q, a in rows]))
    return path


def lines(lab: Lab, name: str, rows: list[dict[str, Any]]) -> Path:
    path = lab.new(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@effect("judge", "config")
def config(lab: Lab, command: str) -> None:
    """Settings of a file are used, those of its section before the rest, and options before both."""
    path = lab.new("config.yaml")
    path.write_text(
        yaml.safe_dump({"seed": 3, "limit": 1, "judge": {"limit": 2, "temperature": 0.5, "judge": "other"}})
    )
    found = judged(lab, config=path, judge=None, temperature=0.25)
    sent = [found.each(name) for name in ("seed", "model", "temperature")]
    assert sent == [{3}, {"other"}, {0.25}] and found.summary["questions"] == 2


@effect("judge", "answers", "against", "out")
def answers(lab: Lab, command: str) -> None:
    """The win rate is that of the first model's answers against the second's; all that is written lies in `--out`."""
    found = judged(lab)
    assert found.rates["win rate"] == pytest.approx(np.mean([rising(n) for n in range(COUNT)]))
    assert found.summary["lengths"] == [np.mean([*map(len, OURS)]), np.mean([*map(len, THEIRS)])]
    exchanged = judged(lab, answers=alpaca(lab, THEIRS), against=alpaca(lab, OURS))
    assert exchanged.rates["win rate"] == pytest.approx(1 - found.rates["win rate"])
    assert set(files(found.out)) == {"run.yaml", "judgments.jsonl", "summary.json", "summary.md", "judge.html"}
    assert str(found.out) in found.said
    assert "--answers" in refused(lab, answers=None) and "--against" in refused(lab, against=None)


@effect("judge", "endpoint", "judge")
def endpoint(lab: Lab, command: str) -> None:
    """The model of that name at that address is asked, and the summary names it."""
    found = judged(lab, judge="another")
    assert len(found.server.requests) == 2 * COUNT  # both orders
    assert found.each("model") == {"another"} and found.each("path") == {"/v1/chat/completions"}
    assert found.summary["judge"] == "another"


@effect("judge", "benchmark", "questions", "reply_tokens")
def benchmark(lab: Lab, command: str) -> None:
    """Each reads its own files, and its own verdicts in replies of such a length."""

    def verdicts(body: dict[str, Any]) -> Answer:
        """Ours is much better once and a little worse in the other five."""
        clear, first = number_of(body) == 0, ours_is_a(body)
        return completion(f"[[{'A>>B' if first else 'B>>A'}]]" if clear else f"[[{'B>A' if first else 'A>B'}]]")

    questions = lines(lab, "q.jsonl", [{"uid": q, "prompt": q, "category": "c"} for q in QUESTIONS])
    sides = {}
    for name, texts in (("answers", OURS), ("against", THEIRS)):
        rows = [
            {"uid": q, "model": name, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in zip(QUESTIONS, texts, strict=True)
        ]
        sides[name] = lines(lab, f"{name}.jsonl", rows)
    found = judged(lab, verdicts, benchmark="arena-hard", questions=questions, reply_tokens=77, **sides)
    assert found.rates["win rate by Bradley–Terry"] == pytest.approx(3 / 8, abs=1e-6)  # a clear verdict counts thrice
    assert found.each("max_tokens") == {77} and found.summary["benchmark"] == "arena-hard"

    talks = [{"question_id": n, "category": "math", "turns": [f"Question {n}?", "And then?"]} for n in range(2)]
    said = [{"question_id": n, "model_id": "m", "choices": [{"turns": ["ours word", "more"]}]} for n in range(2)]
    both = {"questions": lines(lab, "t.jsonl", talks), "answers": lines(lab, "s.jsonl", said), "against": None}

    def grade(body: dict[str, Any]) -> Answer:
        return completion(f"[[{9 - number_of(body) - 4 * ('more' in body['messages'][-1]['content'])}]]")

    found = judged(lab, grade, benchmark="mt-bench", **both)
    assert found.rates == {"score": 6.5, "score, turn 1": 8.5, "score, turn 2": 4.5}
    assert found.each("max_tokens") == {1024}
    assert "--questions" in refused(lab, benchmark="mt-bench", **both | {"questions": None})

    pairs = {
        name: lines(lab, name, [{"prompt": q, "sample": a} for q, a in zip(QUESTIONS, texts, strict=True)])
        for name, texts in (("answers", OURS), ("against", THEIRS))
    }
    assert judged(lab, benchmark="pairwise", **pairs).rates["win rate"] == pytest.approx(0.55)
    assert "expected an answer as alpaca-eval has it" in refused(lab, **pairs)


@effect("judge", "difficulties")
def difficulties(lab: Lab, command: str) -> None:
    """A term of the regression for equal length, in place of the minimal form."""
    of_question = [0.5, -2.0, 3.0, 0.3, -1.0, 0.2]
    table = lab.new("difficulty.csv")
    table.write_text("instruction_difficulty\n" + "".join(f"{value}\n" for value in of_question))
    asked = lab.new("questions.json")
    asked.write_text(json.dumps([{"instruction": q, "dataset": "d"} for q in QUESTIONS]))
    uneven = [0.9, 0.2, 0.95, 0.6, 0.1, 0.3].__getitem__
    with_them = judged(lab, prefers(uneven), questions=asked, difficulties=table).rates
    longer = np.array([len(a) - len(b) for a, b in zip(OURS, THEIRS, strict=True)])
    features = np.stack([np.ones(COUNT), np.tanh(longer / longer.std(ddof=1)), of_question], 1)
    target = np.array([uneven(n) for n in range(COUNT)])

    def controlled(features: Any) -> float:
        """The rate at equal length of a regression by a method without derivatives."""

        def loss(weights: Any) -> float:
            share = 1 / (1 + np.exp(-features @ weights))
            return -float((target * np.log(share) + (1 - target) * np.log(1 - share)).mean())

        options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 10000, "maxfev": 10000}
        weights = minimize(loss, np.zeros(features.shape[1]), method="Nelder-Mead", options=options).x
        equal = features * ([1, 0, 1][: features.shape[1]])
        return float((1 / (1 + np.exp(-equal @ weights))).mean())

    assert with_them["length-controlled win rate"] == pytest.approx(controlled(features), abs=1e-5)
    minimal = judged(lab, prefers(uneven)).rates["length-controlled win rate (minimal form)"]
    assert minimal == pytest.approx(controlled(features[:, :2]), abs=1e-5)
    assert minimal != pytest.approx(with_them["length-controlled win rate"], abs=1e-3)
    assert "--difficulties" in refused(lab, difficulties=table)


@effect("judge", "calibrate", "split")
def calibrate(lab: Lab, command: str) -> None:
    """Known pairs of that split in place of answers; how often the judge agrees with them."""
    folder = lab.new("pairs")
    folder.mkdir()
    for name, right in (("test_prefs", 2), ("validation_prefs", 5)):
        sides = [("ours", "theirs") if n < right else ("theirs", "ours") for n in range(COUNT)]
        lines_in = [
            {"prompt": QUESTIONS[n], "chosen": f"{chosen} word", "rejected": f"{rejected} word"}
            for n, (chosen, rejected) in enumerate(sides)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines_in))
    given = {"benchmark": "pairwise", "answers": None, "against": None, "calibrate": folder}
    for_ours = prefers(lambda number: 0.9)
    assert judged(lab, for_ours, **given).rates["agreement"] == pytest.approx(2 / 6)
    assert judged(lab, for_ours, **given, split="validation_prefs").rates["agreement"] == pytest.approx(5 / 6)
    assert "--calibrate" in refused(lab, calibrate=folder, benchmark="pairwise")
    assert "--split" in refused(lab, split="test_prefs")


@effect("judge", "limit")
def limit(lab: Lab, command: str) -> None:
    found = judged(lab, limit=2)
    assert {number_of(body) for body in found.server.requests} == {0, 1}
    assert found.rates["win rate"] == pytest.approx((rising(0) + rising(1)) / 2)


@effect("judge", "mode")
def mode(lab: Lab, command: str) -> None:
    """From the same replies: the probabilities of the two verdicts, or the text, which says B always."""
    read, by_text = judged(lab), judged(lab, mode="verdict")
    assert read.rates["win rate"] == pytest.approx(0.55) and read.summary["first"] == pytest.approx(0.5)
    assert by_text.rates["win rate"] == 0.5 and by_text.summary["first"] == 0.0
    assert (read.each("logprobs"), by_text.each("logprobs")) == ({True}, {None})
    assert "--mode" in refused(lab, mode="logprob", benchmark="arena-hard")


@effect("judge", "prompt")
def prompt(lab: Lab, command: str) -> None:
    """The judge is told these words, and a summary under other words has another hash."""
    words = lab.new("words.txt")
    words.write_text("You are strict.\n---\n{question} | {answer_a} | {answer_b}")
    found = judged(lab, prompt=words)
    system, user = found.server.requests[0]["messages"]
    first, second = (OURS[0], THEIRS[0]) if ours_is_a(found.server.requests[0]) else (THEIRS[0], OURS[0])
    number = number_of(found.server.requests[0])
    assert system == {"role": "system", "content": "You are strict."} and user["role"] == "user"
    assert user["content"] == f"{QUESTIONS[number]} | {first} | {second}".replace(OURS[0], OURS[number])
    assert found.summary["prompt_sha256"] != judged(lab).summary["prompt_sha256"]
    words.write_text("{question} and no answers")
    assert "--prompt" in refused(lab, prompt=words)


@effect("judge", "temperature", "seed")
def sampling(lab: Lab, command: str) -> None:
    found, plain = judged(lab, temperature=0.7, seed=5), judged(lab)
    assert (found.each("temperature"), found.each("seed")) == ({0.7}, {5})
    assert (plain.each("temperature"), plain.each("seed")) == ({0.0}, {0})


@effect("judge", "concurrency")
def concurrency(lab: Lab, command: str) -> None:
    """So many requests are under way at a time, and no more."""

    def slow(body: dict[str, Any]) -> Answer:
        hang(0.2)(body)
        return prefers(rising)(body)

    assert [judged(lab, slow, concurrency=number).server.at_once for number in (1, 3)] == [1, 3]


@effect("judge", "timeout")
def timeout(lab: Lab, command: str) -> None:
    """A reply that takes longer is not waited for, but asked for again; here in vain."""
    late = hang(0.5)
    with pytest.MonkeyPatch.context() as patch, serving(late) as server:
        patch.setattr(client, "FIRST_WAIT", 0.0)
        result = call(lab, server, lab.new("late"), timeout=0.05, limit=1, concurrency=1)
    assert result.exit_code == 2 and "no reply within 0.05 s" in result.stderr
    assert len(server.requests) == client.ATTEMPTS
    judged(lab, lambda body: (late(body), prefers(rising)(body))[1], timeout=30, limit=1)
