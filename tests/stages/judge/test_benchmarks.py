"""What is asked for each benchmark and what judgments come to, by hand; unparsed replies are counted, never ties."""

import numpy as np
import pytest
from fpo.cache.errors import UserError
from fpo.stages.evaluate.answers import Question
from fpo.stages.judge.answer_files import Answers, Judged
from fpo.stages.judge.benchmarks import (
    Summary,
    calibration,
    check_answered,
    default_templates,
    summarise,
    tasks_of,
    verdict_reader,
)
from fpo.stages.judge.client import Reply
from fpo.stages.judge.judgments import Judgment, Task

QUESTIONS = [Question("alpaca-eval", None, (f"Question {n}?",), 0.7, "even" if n % 2 == 0 else "odd") for n in range(4)]
OURS = Answers("ours", {q.key: (f"ours to {q.key}" + "." * (20 + n),) for n, q in enumerate(QUESTIONS)})
THEIRS = Answers("theirs", {q.key: (f"theirs to {q.key}",) for q in QUESTIONS})
TALKS = [
    Question("mt-bench", 1, ("1 + 1?", "And 2 + 2?"), 0.0, "math", ("two", "four")),
    Question("mt-bench", 2, ("Sing.", "Louder."), 0.7, "writing"),
]
MINE = Answers("mine", {1: ("2", "4"), 2: ("la", "LA")})
YOURS = Answers("yours", {1: ("3", "5"), 2: ("lo", "LO")})


def judged(task: Task, verdict: float | str | None) -> Judgment:
    return Judgment(f"{task}", task.question, task.order, task.turn, "", verdict, 1, 1)


def summary_of(verdicts: dict[tuple[int, str], float | str | None], benchmark: Judged = "alpaca-eval") -> Summary:
    """Of verdicts by question and order, one half where none is named."""
    tasks = tasks_of(benchmark, QUESTIONS, OURS, THEIRS, default_templates(benchmark))
    default = "A=B" if benchmark == "arena-hard" else 0.5
    found = [judged(task, verdicts.get((int(task.question[9]), task.order), default)) for task in tasks]
    return summarise(benchmark, QUESTIONS, OURS, THEIRS, found)


def test_both_orders_are_asked_with_the_answers_exchanged():
    tasks = tasks_of("pairwise", QUESTIONS, OURS, THEIRS, default_templates("pairwise"))
    assert [(task.question, task.order) for task in tasks] == [
        (q.key, order) for q in QUESTIONS for order in ("ab", "ba")
    ]
    for task in tasks:
        content = task.messages[-1]["content"]
        mine, other = (content.index(side.turns[task.question][0]) for side in (OURS, THEIRS))
        assert task.question in content and (mine < other) == (task.order == "ab")


def test_the_rate_is_the_mean_over_questions_of_both_orders():
    # Question 0: we win in both; 1: the first one wins, whoever it is; 2: we lose; 3: three quarters.
    verdicts = {(0, "ab"): 1.0, (0, "ba"): 0.0, (1, "ab"): 1.0, (1, "ba"): 1.0, (2, "ab"): 0.0, (2, "ba"): 1.0}
    found = summary_of(verdicts | {(3, "ab"): 0.8, (3, "ba"): 0.3})
    assert found.rates["win rate"].mean == pytest.approx((1 + 0.5 + 0 + 0.75) / 4)
    assert {name: rate.mean for name, rate in found.categories.items()} == pytest.approx({"even": 0.5, "odd": 0.625})
    assert found.first == pytest.approx((1 + 0 + 1 + 1 + 0 + 1 + 0.8 + 0.3) / 8)
    assert (found.judged, found.unparsed, found.counted) == (8, 0, 4)
    assert found.lengths == (
        np.mean([len(f"ours to Question {n}?") + 20 + n for n in range(4)]),
        len("theirs to Question 0?"),
    )
    assert "length-controlled win rate (minimal form)" in found.rates


def test_a_reply_without_a_verdict_takes_its_question_out_and_is_counted():
    found = summary_of(
        {(0, "ab"): None, (1, "ab"): 1.0, (1, "ba"): 0.0, (2, "ab"): 1.0, (2, "ba"): 0.0, (3, "ba"): None}
    )
    assert found.rates["win rate"].mean == 1.0
    assert (found.judged, found.unparsed, found.counted) == (8, 2, 2)
    none = {(n, order): None for n in range(4) for order in ("ab", "ba")}
    with pytest.raises(
        UserError, match="found none in both orders to any of 4 questions \\(8 of 8 replies hold none\\)"
    ):
        summary_of(none)


def test_arena_hard_counts_clear_verdicts_three_times():
    verdicts = {(0, "ab"): "A>>B", (0, "ba"): "A>B", (1, "ab"): "A=B", (1, "ba"): "B>A"}
    verdicts |= {(2, "ab"): "B>A", (2, "ba"): "A>>B", (3, "ab"): "A=B", (3, "ba"): "A=B"}
    found = summary_of(verdicts, "arena-hard")
    # Ours: a clear win (3), a loss (1), a tie (1), a win (1), a loss (1), a clear loss (3), two ties (2).
    assert found.rates["win rate by Bradley–Terry"].mean == pytest.approx((3 + 0.5 + 1 + 1) / 12, abs=1e-6)
    assert found.rates["win rate"].mean == pytest.approx((0.5 + 0.75 + 0 + 0.5) / 4)


def test_mt_bench_grades_both_turns_of_both_models_with_the_references_that_there_are():
    tasks = tasks_of("mt-bench", TALKS, MINE, YOURS, default_templates("mt-bench"))
    assert [(task.question, task.order, task.turn) for task in tasks] == [
        (question, side, turn) for question in ("1", "2") for side in ("ours", "theirs") for turn in (1, 2)
    ]
    shown = {(task.question, task.order, task.turn): task.messages[-1]["content"] for task in tasks}
    assert "Assistant: 2" in shown["1", "ours", 1] and "And 2 + 2?" not in shown["1", "ours", 1]
    assert (
        "two" in shown["1", "ours", 1]
        and "four" in shown["1", "theirs", 2]
        and "Assistant: 3" in shown["1", "theirs", 2]
    )
    assert "right_answer" not in shown["2", "ours", 1]
    scores = {("1", "ours"): 9.0, ("1", "theirs"): 3.0, ("2", "ours"): 6.0, ("2", "theirs"): 5.0}
    found = summarise(
        "mt-bench", TALKS, MINE, YOURS, [judged(t, scores[t.question, t.order] + (t.turn == 2)) for t in tasks]
    )
    means = {name: rate.mean for name, rate in found.rates.items()}
    expected = {"score": 8.0, "score of the other": 4.5, "difference": 3.5, "score, turn 1": 7.5, "score, turn 2": 8.5}
    assert means == pytest.approx(expected)
    assert {name: rate.mean for name, rate in found.categories.items()} == {"math": 9.5, "writing": 6.5}
    assert found.first is None


def test_mt_bench_scores_one_model_alone():
    tasks = tasks_of("mt-bench", TALKS, MINE, None, default_templates("mt-bench"))
    found = summarise("mt-bench", TALKS, MINE, None, [judged(task, 7.0) for task in tasks])
    assert set(found.rates) == {"score", "score, turn 1", "score, turn 2"} and found.rates["score"].mean == 7.0


def test_known_pairs_tell_how_a_judge_agrees_and_what_it_likes():
    tasks = tasks_of("pairwise", QUESTIONS, OURS, THEIRS, default_templates("pairwise"))
    shorter = Answers("theirs", THEIRS.turns | {"Question 3?": ("x" * 99,)})
    verdicts = {0: 0.9, 1: 0.8, 2: 0.5, 3: 0.3}  # for ours, longer but in question 3
    found = calibration(
        QUESTIONS,
        OURS,
        shorter,
        [judged(t, verdicts[n] if t.order == "ab" else 1 - verdicts[n]) for t in tasks for n in [int(t.question[9])]],
    )
    assert {name: rate.mean for name, rate in found.items()} == pytest.approx(
        {
            "agreement": (1 + 1 + 0.5 + 0) / 4,
            "preference": (0.9 + 0.8 + 0.5 + 0.3) / 4,
            "preference for the longer answer": (0.9 + 0.8 + 0.5 + 0.7) / 4,
            "the longer answer is the chosen one": 3 / 4,
        }
    )


def test_each_benchmark_reads_replies_in_its_own_way():
    told = Reply("[[A>B]] [[7]] [[A]]", ({"A": -0.1},), 1, 1)
    assert verdict_reader("arena-hard", "logprob")(told) == "A>B"
    assert verdict_reader("mt-bench", "logprob")(told) == 7.0
    assert verdict_reader("pairwise", "verdict")(told) == 1.0
    assert verdict_reader("alpaca-eval", "logprob")(told) == 1.0
    with pytest.raises(UserError, match="--mode logprob: expected log-probabilities"):
        verdict_reader("pairwise", "logprob")(Reply("A", (), 1, 1))


def test_answers_to_other_questions_or_too_few_turns_are_refused():
    with pytest.raises(
        UserError, match="--against: expected answers to 4 questions, found none to 4, the first 'Question 0"
    ):
        check_answered(QUESTIONS, MINE, "--against")
    with pytest.raises(UserError, match="expected 2 turns to '1', found 1"):
        check_answered(TALKS, Answers("short", {1: ("2",), 2: ("la", "LA")}), "--answers")
