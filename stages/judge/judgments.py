"""Judgments on disk: one line each, appended when it is made, so that what was asked once is never asked again.

In: tasks, each with its messages. Out: `judgments.jsonl`, and for each task its judgment, from the file or from the
judge. A judgment's key is the hash of what it was asked, of whom, and how it was drawn.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...cache.errors import UserError
from ...cache.files import canonical_json, decode, parse_json
from .client import Asking, Endpoint, Messages, Reply

FILE = "judgments.jsonl"


@dataclass(frozen=True)
class Task:
    """One thing to ask a judge.

    Attributes:
        question: which question it is about.
        order: `ab` if our answer is called A, `ba` if it is called B; empty for a score.
        turn: the turn that is judged, from 1.
        messages: what the judge is asked.
    """

    question: str
    order: str
    turn: int
    messages: Messages


@dataclass(frozen=True)
class Judgment:
    """What a judge said to one task.

    Attributes:
        key: hash of the messages, the judge and how it was asked.
        question: as the task's.
        order: as the task's.
        turn: as the task's.
        reply: the text.
        verdict: what it says: a preference for answer A from 0 to 1, one of five verdicts or a score; None if nothing.
        prompt_tokens: read by the judge.
        reply_tokens: written by it.
    """

    key: str
    question: str
    order: str
    turn: int
    reply: str
    verdict: float | str | None
    prompt_tokens: int
    reply_tokens: int


def key_of(messages: Messages, judge: str, asking: Asking) -> str:
    """The key of a judgment; the endpoint's address is no part of it."""
    return hashlib.sha256(canonical_json([list(messages), judge, asdict(asking)]).encode()).hexdigest()


def read_judgments(folder: Path) -> dict[str, Judgment]:
    """The judgments of a folder by key. A last line that was cut short, as by a kill, is removed from the file.

    Raises:
        UserError: another line is no judgment.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    content = path.read_bytes()
    if cut := len(content) - (content.rfind(b"\n") + 1):
        with path.open("r+b") as file:
            file.truncate(len(content) - cut)
        content = content[: len(content) - cut]
    found = {}
    for number, line in enumerate(content.splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            judgment = decode(Judgment, parse_json(line), where)
        except ValueError as error:
            raise UserError(f"{error}; delete the line to have it judged again") from error
        found[judgment.key] = judgment
    return found


async def judge_all(
    tasks: Sequence[Task],
    endpoint: Endpoint,
    asking: Asking,
    verdict_of: Callable[[Reply], float | str | None],
    folder: Path,
    on_judgment: Callable[[Judgment], Any] = lambda judgment: None,
) -> list[Judgment]:
    """Judges what has not been judged yet, some tasks at a time; the first error stops all, what was judged is kept.

    Args:
        tasks: what to ask; equal ones are asked once.
        endpoint: the judge.
        asking: how it is asked.
        verdict_of: reads a reply.
        folder: where the judgments lie; it exists.
        on_judgment: called after each new judgment, for progress.

    Returns:
        A judgment for each task, in their order.

    Raises:
        UserError: from the endpoint, or a file that holds something else.
    """
    known = read_judgments(folder)
    keys = [key_of(task.messages, endpoint.judge, asking) for task in tasks]
    open_tasks = {key: task for key, task in zip(keys, tasks, strict=True) if key not in known}
    turn = asyncio.Semaphore(endpoint.concurrency)

    with (folder / FILE).open("a", encoding="utf-8") as file:

        async def judge(key: str, task: Task) -> None:
            async with turn:
                reply = await endpoint.ask(task.messages, asking)
            found = Judgment(
                key,
                task.question,
                task.order,
                task.turn,
                reply.text,
                verdict_of(reply),
                reply.prompt_tokens,
                reply.reply_tokens,
            )
            file.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
            file.flush()
            known[key] = found
            on_judgment(found)

        try:
            async with asyncio.TaskGroup() as group:
                for key, task in open_tasks.items():
                    group.create_task(judge(key, task))
        except* UserError as errors:
            raise errors.exceptions[0] from None
    return [known[key] for key in keys]
