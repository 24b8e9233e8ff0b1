"""`fpo judge`: what a judge says of answers, in a benchmark's own terms (method.md section 6).

In: a `JudgeConfig`. Out: in `--out` `run.yaml`, `judgments.jsonl`, to which every judgment is appended when it is made,
and last `summary.json`, `summary.md` and `judge.html`. Stopped and run again, it asks only for what is missing.
"""

import asyncio
import csv
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import typer

from ...cache.errors import UserError
from ...cache.files import write_atomically
from ...stages.data.chat import Turns
from ...stages.data.preferences import load_preferences
from ...stages.evaluate.answers import Question, read_questions
from ...stages.judge.answer_files import Answers, read_answers
from ...stages.judge.benchmarks import (
    Summary,
    calibration,
    check_answered,
    default_templates,
    summarise,
    tasks_of,
    verdict_reader,
)
from ...stages.judge.client import Asking, Endpoint
from ...stages.judge.judgments import Judgment, Task, judge_all, key_of, read_judgments
from ...stages.judge.prompts import PAIR_FIELDS, REFERENCE_FIELDS, SCORE_FIELDS, Template
from ...stages.judge.rates import Rate
from ..commands.inputs import RECORD, Progress, check_folder, differing, read_record, record_of, sole_writer
from ..report_config import JudgeConfig
from .page import Page, Table, write_page

# What a verdict of one token takes, with a few before it that a model may say first.
VERDICT_TOKENS = 8
TOP_LOGPROBS = 20
# An estimate for English text, which is said to be one.
CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class _Contest:
    """What is judged: questions, and the answers to them; `theirs` is None for scores of one model."""

    questions: list[Question]
    ours: Answers
    theirs: Answers | None


def run_judge(config: JudgeConfig) -> None:
    """`fpo judge`."""
    judge_answers(config)
    typer.echo((config.out / "summary.md").read_text())
    typer.echo(f"{config.out}: summary.json, summary.md, judge.html, judgments.jsonl")


def judge_answers(config: JudgeConfig) -> Summary:
    """Judges what has not been judged yet, and writes and returns what it comes to.

    Raises:
        UserError: an option, a file or the endpoint is not as it should be, or no reply holds a verdict.
    """
    out = config.out
    contest = _pairs(config) if config.calibrate is not None else _answers(config)
    templates = _templates(config)
    tasks = tasks_of(config.benchmark, contest.questions, contest.ours, contest.theirs, templates)
    asking = _asking(config)
    _check_out(config)
    with sole_writer(out):
        versions = {"versions": {"fpo": importlib.metadata.version("fpo")}}
        if not (out / RECORD).exists():
            write_atomically(out / RECORD, record_of(config, versions).encode())
        judgments = _judge(config, tasks, asking)
        summary = summarise(
            config.benchmark, contest.questions, contest.ours, contest.theirs, judgments, _difficulties(config)
        )
        rates = summary.rates
        if config.calibrate is not None:
            assert contest.theirs is not None
            rates = calibration(contest.questions, contest.ours, contest.theirs, judgments)
        _write(config, contest, summary, rates, judgments, templates[0])
    return summary


def _answers(config: JudgeConfig) -> _Contest:
    """The answers of two models, or of one, to the same questions."""
    assert config.answers is not None
    ours = read_answers(config.answers, config.benchmark)
    theirs = None if config.against is None else read_answers(config.against, config.benchmark)
    if config.questions is not None and config.benchmark != "pairwise":
        questions = read_questions(config.questions, config.benchmark)
    else:
        questions = [Question("alpaca-eval", None, (str(prompt),), 0.0) for prompt in ours.turns]
        if theirs is not None and (more := [prompt for prompt in theirs.turns if prompt not in ours.turns]):
            raise UserError(
                f"--against: expected answers to the {len(questions)} questions of --answers, found {len(more)} others "
                f"such as {str(more[0])[:60]!r}; give the answers to the same questions"
            )
    questions = questions[: config.limit]
    check_answered(questions, ours, "--answers")
    if theirs is not None:
        check_answered(questions, theirs, "--against")
    return _Contest(questions, ours, theirs)


def _pairs(config: JudgeConfig) -> _Contest:
    """Preference pairs, the chosen answers against the rejected ones; of pairs with one prompt each has its number."""
    assert config.calibrate is not None
    data = load_preferences(config.calibrate, split=config.split, limit=config.limit)
    questions: list[Question] = []
    chosen: dict[int | str, tuple[str, ...]] = {}
    rejected: dict[int | str, tuple[str, ...]] = {}
    for number in range(len(data)):
        example = data.example(number)
        question = Question("alpaca-eval", number, (_text(example.prompt),), 0.0)
        questions.append(question)
        chosen[question.key], rejected[question.key] = (_text(example.chosen),), (_text(example.rejected),)
    return _Contest(questions, Answers("chosen", chosen), Answers("rejected", rejected))


def _text(turns: Turns | str) -> str:
    """A text or a turn as it is, several turns with the names of who speaks."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)


def _templates(config: JudgeConfig) -> tuple[Template, Template | None]:
    if config.prompt is None:
        return default_templates(config.benchmark)
    fields = (SCORE_FIELDS, REFERENCE_FIELDS) if config.benchmark == "mt-bench" else (PAIR_FIELDS,)
    return Template.read(config.prompt, *fields), None


def _asking(config: JudgeConfig) -> Asking:
    if config.benchmark in ("alpaca-eval", "pairwise") and config.mode == "logprob":
        return Asking(VERDICT_TOKENS, config.temperature, TOP_LOGPROBS, config.seed)
    return Asking(config.reply_tokens, config.temperature, None, config.seed)


def _difficulties(config: JudgeConfig) -> dict[str, float] | None:
    """AlpacaEval's published difficulties by instruction: one for each question, in their order."""
    if config.difficulties is None:
        return None
    assert config.questions is not None
    questions = read_questions(config.questions, "alpaca-eval")
    try:
        rows = list(csv.DictReader(config.difficulties.read_text(encoding="utf-8").splitlines()))
        values = [float(row["instruction_difficulty"]) for row in rows]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--difficulties: expected a CSV file with a column instruction_difficulty at {config.difficulties}, found "
            f"none ({error!r})"
        ) from error
    if len(values) != len(questions):
        raise UserError(f"--difficulties: expected {len(questions)} values, one a question, found {len(values)}")
    return {str(question.key): value for question, value in zip(questions, values, strict=True)}


def _check_out(config: JudgeConfig) -> None:
    """Refuses a folder of anything but judgments under the same settings."""
    check_folder(config.out)
    if not config.out.is_dir() or not any(config.out.iterdir()):
        return
    found = read_record(config.out, "--out") if (config.out / RECORD).is_file() else {}
    if found.get("command") != "judge":
        raise UserError(f"--out: expected a new or empty folder, found other files in {config.out}; give another one")
    free = ("out", "limit", "endpoint", "concurrency", "timeout")
    if changed := differing(found, config, {}, free):
        raise UserError(
            f"--out: expected the settings of the judgments in {config.out}; {changed}; give another folder, or empty "
            "it"
        )


def _judge(config: JudgeConfig, tasks: Sequence[Task], asking: Asking) -> list[Judgment]:
    """Judges what is missing, and says before what it will cost."""
    known = read_judgments(config.out)
    keys = {key_of(task.messages, config.judge, asking): task for task in tasks}
    left = [task for key, task in keys.items() if key not in known]
    read = sum(len(message["content"]) for task in left for message in task.messages) // CHARACTERS_A_TOKEN
    typer.echo(
        f"{len(keys)} judgments, {len(left)} of them to ask for: about {read} tokens to read, at most "
        f"{asking.max_tokens * len(left)} to write"
    )

    async def all_of_them(progress: Progress) -> list[Judgment]:
        async with Endpoint(config.endpoint, config.judge, config.timeout, config.concurrency) as endpoint:
            read = verdict_reader(config.benchmark, config.mode)
            return await judge_all(tasks, endpoint, asking, read, config.out, lambda _: progress.advance(1))

    with Progress(len(left), "judge", "judgments") as progress:
        return asyncio.run(all_of_them(progress))


def _write(
    config: JudgeConfig,
    contest: _Contest,
    summary: Summary,
    rates: Mapping[str, Rate],
    judgments: Sequence[Judgment],
    template: Template,
) -> None:
    """Writes the summary as JSON, Markdown and a page."""
    scale, unit = (1.0, "") if config.benchmark == "mt-bench" else (100.0, ", %")
    rows = [[name, *_cells(rate, scale)] for name, rate in rates.items()]
    header = ["", f"mean{unit}", "95 % interval", "standard error"]
    tables = [
        Table(f"{contest.ours.model} against {contest.theirs.model if contest.theirs else 'nobody'}", header, rows)
    ]
    if summary.categories:
        rows = [[name, *_cells(rate, scale)] for name, rate in summary.categories.items()]
        tables.append(Table("By category", header, rows))
    facts = {
        "Judge": f"{config.judge}, {config.mode if config.benchmark in ('alpaca-eval', 'pairwise') else 'verdict'}",
        "Prompt": f"sha256 {template.sha256[:12]}",
        "Judgments": f"{summary.judged}, of them without a verdict {summary.unparsed} "
        f"({100 * summary.unparsed / max(1, summary.judged):.1f} %)",
        "Questions": f"{len(contest.questions)}, with verdicts in every judgment {summary.counted}",
        "Preference for the answer that comes first": "–" if summary.first is None else f"{100 * summary.first:.1f} %",
        "Mean length, characters": " and ".join(f"{length:.0f}" for length in summary.lengths),
        "Tokens": f"{sum(one.prompt_tokens for one in judgments)} read, "
        f"{sum(one.reply_tokens for one in judgments)} written by the judge",
    }
    document: dict[str, Any] = {
        "benchmark": config.benchmark,
        "judge": config.judge,
        "prompt_sha256": template.sha256,
        "rates": {name: asdict(rate) for name, rate in rates.items()},
        "categories": {name: asdict(rate) for name, rate in summary.categories.items()},
        "first": summary.first,
        "judged": summary.judged,
        "unparsed": summary.unparsed,
        "questions": len(contest.questions),
        "counted": summary.counted,
        "lengths": list(summary.lengths),
    }
    write_atomically(config.out / "summary.json", (json.dumps(document, indent=1) + "\n").encode())
    listed = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    write_atomically(config.out / "summary.md", ("".join(table.markdown for table in tables) + listed).encode())
    write_page(config.out / "judge.html", Page(f"FPO: {config.benchmark}", "", None, tables, [], facts))


def _cells(rate: Rate, scale: float) -> list[str]:
    digits = 1 if scale > 1 else 2
    mean, low, high, error = (f"{scale * value:.{digits}f}" for value in (rate.mean, rate.low, rate.high, rate.error))
    return [mean, f"{low} to {high}", error]
