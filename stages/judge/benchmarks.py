"""Each benchmark's terms: what a judge is asked about two models' answers, and what its judgments come to.

In: questions, both models' answers, judgments. Out: tasks; a summary. Both orders are always asked: a question counts
where the judgments of both hold a verdict, and all others are counted as unparsed.

Legend: Q questions that count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...cache.errors import UserError
from ..evaluate.answers import Question
from .answer_files import Answers, Judged
from .client import Reply
from .judgments import Judgment, Task
from .prompts import FIVE_VERDICTS, PREFERENCE, SCORE, SCORE_BY_REFERENCE, Template
from .rates import Battles, Floats, Rate, arena_rates, length_controlled, mean_rate
from .verdicts import FIVE, preference_by_logprobs, preference_by_text, score_of_ten, verdict_of_five

Mode = Literal["logprob", "verdict"]
OURS_FIRST, THEIRS_FIRST = "ab", "ba"
OURS, THEIRS = "ours", "theirs"


@dataclass(frozen=True)
class Summary:
    """What the judgments come to.

    Attributes:
        rates: by name; shares lie between 0 and 1, MT-Bench's scores between 1 and 10, differences between their ends.
        categories: the first of the rates, by category; empty where there are none.
        first: how much of the preference goes to the answer that comes first, one half without bias; None for scores.
        judged: judgments.
        unparsed: judgments without a verdict.
        counted: questions of which every judgment holds one.
        lengths: mean characters of an answer, ours and theirs.
    """

    rates: dict[str, Rate]
    categories: dict[str, Rate]
    first: float | None
    judged: int
    unparsed: int
    counted: int
    lengths: tuple[float, float]


def default_templates(benchmark: Judged) -> tuple[Template, Template | None]:
    """The project's own words for a benchmark, and those for questions with a reference, where it has such."""
    if benchmark == "mt-bench":
        return SCORE, SCORE_BY_REFERENCE
    return (FIVE_VERDICTS if benchmark == "arena-hard" else PREFERENCE), None


def verdict_reader(benchmark: Judged, mode: Mode) -> Callable[[Reply], float | str | None]:
    """What reads the replies of a benchmark's judge."""
    if benchmark == "arena-hard":
        return lambda reply: verdict_of_five(reply.text)
    if benchmark == "mt-bench":
        return lambda reply: score_of_ten(reply.text)
    if mode == "verdict":
        return lambda reply: preference_by_text(reply.text)

    def by_logprobs(reply: Reply) -> float | None:
        if not reply.positions:
            raise UserError("--mode logprob: expected log-probabilities from the endpoint, found none; --mode verdict")
        return preference_by_logprobs(reply)

    return by_logprobs


def check_answered(questions: Sequence[Question], answers: Answers, option: str) -> None:
    """Refuses answers of which some question has none, or has too few turns."""
    missing = [question for question in questions if question.key not in answers.turns]
    if missing:
        raise UserError(
            f"{option}: expected answers to {len(questions)} questions, found none to {len(missing)}, the first "
            f"{str(missing[0].key)[:60]!r}; give the answers to the same questions"
        )
    for question in questions:
        if len(answers.turns[question.key]) < len(question.prompts):
            raise UserError(
                f"{option}: expected {len(question.prompts)} turns to {str(question.key)[:60]!r}, found "
                f"{len(answers.turns[question.key])}"
            )


def tasks_of(
    benchmark: Judged,
    questions: Sequence[Question],
    ours: Answers,
    theirs: Answers | None,
    templates: tuple[Template, Template | None],
) -> list[Task]:
    """All that is to be judged; `theirs` is None where a benchmark scores one model alone."""
    if benchmark == "mt-bench":
        sides = {OURS: ours} | ({THEIRS: theirs} if theirs else {})
        return [
            Task(str(question.key), side, turn, _graded(question, answers.turns[question.key], turn, templates))
            for question in questions
            for side, answers in sides.items()
            for turn in range(1, len(question.prompts) + 1)
        ]
    assert theirs is not None
    tasks = []
    for question in questions:
        mine, other = ours.turns[question.key][0], theirs.turns[question.key][0]
        for order, first, second in ((OURS_FIRST, mine, other), (THEIRS_FIRST, other, mine)):
            fields = {"question": question.prompts[0], "answer_a": first, "answer_b": second}
            tasks.append(Task(str(question.key), order, 1, templates[0].messages(fields)))
    return tasks


def _graded(
    question: Question, answers: Sequence[str], turn: int, templates: tuple[Template, Template | None]
) -> Sequence[Mapping[str, str]]:
    """The messages that ask for a grade of one turn, with the reference of that turn where there is one."""
    said = [
        f"User: {prompt}\n\nAssistant: {answer}"
        for prompt, answer in zip(question.prompts[:turn], answers[:turn], strict=True)
    ]
    reference = question.references[turn - 1] if len(question.references) >= turn else ""
    plain, by_reference = templates
    template = by_reference if by_reference and reference else plain
    return template.messages({"conversation": "\n\n".join(said), "reference": reference})


def summarise(
    benchmark: Judged,
    questions: Sequence[Question],
    ours: Answers,
    theirs: Answers | None,
    judgments: Sequence[Judgment],
    difficulty: Mapping[str, float] | None = None,
) -> Summary:
    """What the judgments of a benchmark come to.

    Args:
        benchmark: the benchmark.
        questions: all that were asked.
        ours: the answers whose win rate it is.
        theirs: the answers that they are compared with; None for scores of one model.
        judgments: one for each task of `tasks_of`.
        difficulty: of each instruction for the other model, by its text, as AlpacaEval publishes it.

    Raises:
        UserError: no question has a verdict in each of its judgments.
    """
    by_question: dict[str, list[Judgment]] = {str(question.key): [] for question in questions}
    for judgment in judgments:
        by_question[judgment.question].append(judgment)
    counted = [q for q in questions if all(found.verdict is not None for found in by_question[str(q.key)])]
    unparsed = sum(judgment.verdict is None for judgment in judgments)
    if not counted:
        raise UserError(
            f"expected verdicts, found none in both orders to any of {len(questions)} questions ({unparsed} of "
            f"{len(judgments)} replies hold none); read judgments.jsonl, and try another judge, --mode or --prompt"
        )
    found = [by_question[str(question.key)] for question in counted]
    if benchmark == "mt-bench":
        rates, values_Q, first = _scores(found, theirs is not None)
    else:
        values_Q, first = _preferences(found)
        longer_Q = np.array([_length(ours, q) - _length(theirs, q) for q in counted])
        rates = {"win rate": mean_rate(values_Q)}
        if benchmark == "arena-hard":
            rates = {"win rate by Bradley–Terry": _arena(found)} | rates
        else:
            known = None if difficulty is None else np.array([difficulty[str(q.key)] for q in counted])
            name = "length-controlled win rate" + (" (minimal form)" if difficulty is None else "")
            rates[name] = length_controlled(values_Q, longer_Q, known)
    labels = np.array([question.category or "" for question in counted])
    categories = {name: mean_rate(values_Q[labels == name]) for name in sorted(set(labels)) if name}
    lengths = tuple(float(np.mean([_length(one, q) for q in questions])) if one else 0.0 for one in (ours, theirs))
    return Summary(rates, categories, first, len(judgments), unparsed, len(counted), (lengths[0], lengths[1]))


def calibration(
    questions: Sequence[Question], chosen: Answers, rejected: Answers, judgments: Sequence[Judgment]
) -> dict[str, Rate]:
    """How a judge of known pairs agrees with them, and how it likes length; pairs that it did not judge are left out.

    Args:
        questions: the pairs' prompts.
        chosen: the answers that people, or a better judge, preferred.
        rejected: the others.
        judgments: those of `tasks_of` with the chosen answers as ours.
    """
    by_question: dict[str, list[Judgment]] = {str(question.key): [] for question in questions}
    for judgment in judgments:
        by_question[judgment.question].append(judgment)
    counted = [q for q in questions if all(found.verdict is not None for found in by_question[str(q.key)])]
    preference_Q, _ = _preferences([by_question[str(question.key)] for question in counted])
    longer_Q = np.array([_length(chosen, question) - _length(rejected, question) for question in counted])
    differ = longer_Q != 0
    rates = {"agreement": mean_rate(np.heaviside(preference_Q - 0.5, 0.5)), "preference": mean_rate(preference_Q)}
    if differ.any():
        for_longer_Q = np.where(longer_Q > 0, preference_Q, 1 - preference_Q)[differ]
        rates["preference for the longer answer"] = mean_rate(for_longer_Q)
        rates["the longer answer is the chosen one"] = mean_rate((longer_Q[differ] > 0).astype(float))
    return rates


def _length(answers: Answers | None, question: Question) -> float:
    return float(sum(map(len, answers.turns[question.key]))) if answers else 0.0


def _preference(judgment: Judgment) -> float:
    """How far the judge prefers the answer that it was shown first."""
    if isinstance(judgment.verdict, str):
        return FIVE[judgment.verdict][0]
    assert judgment.verdict is not None
    return judgment.verdict


def _preferences(found: Sequence[Sequence[Judgment]]) -> tuple[Floats, float]:
    """For each question the preference for our answer, mean of both orders; and that for the first one, of all."""
    ours = [
        [_preference(one) if one.order == OURS_FIRST else 1 - _preference(one) for one in judgments]
        for judgments in found
    ]
    first = float(np.mean([[_preference(one) for one in judgments] for judgments in found]))
    return np.array([np.mean(values) for values in ours]), first


def _arena(found: Sequence[Sequence[Judgment]]) -> Rate:
    """Our win rate by Bradley–Terry; their model is 0, ours 1."""
    games = [(number, one) for number, judgments in enumerate(found) for one in judgments]
    first_B = np.array([int(one.order == OURS_FIRST) for _, one in games])
    outcomes = [FIVE[str(one.verdict)] for _, one in games]
    battles = Battles(
        first_B,
        1 - first_B,
        np.array([outcome for outcome, _ in outcomes]),
        np.array([float(weight) for _, weight in outcomes]),
        np.array([number for number, _ in games]),
    )
    return arena_rates(battles, 2)[1]


def _scores(found: Sequence[Sequence[Judgment]], both: bool) -> tuple[dict[str, Rate], Floats, None]:
    """Mean scores of questions, ours, theirs and the difference; by turn, ours."""

    def of(side: str, turn: int | None = None) -> Floats:
        return np.array(
            [
                np.mean([_preference(one) for one in judgments if one.order == side and turn in (None, one.turn)])
                for judgments in found
                if any(one.order == side and turn in (None, one.turn) for one in judgments)
            ]
        )

    ours_Q = of(OURS)
    rates = {"score": mean_rate(ours_Q)}
    if both:
        rates |= {"score of the other": mean_rate(of(THEIRS)), "difference": mean_rate(ours_Q - of(THEIRS))}
    for turn in sorted({one.turn for judgments in found for one in judgments}):
        rates[f"score, turn {turn}"] = mean_rate(of(OURS, turn))
    return rates, ours_Q, None
