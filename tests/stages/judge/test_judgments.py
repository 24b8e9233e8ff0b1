"""Judgments are asked for once, kept when all else is lost, and asked anew when anything of them changes."""

import asyncio
import json
import time
from pathlib import Path

import pytest
from fpo.cache.errors import UserError
from fpo.stages.judge import client
from fpo.stages.judge.client import Asking, Endpoint
from fpo.stages.judge.judgments import FILE, Judgment, Task, judge_all, key_of, read_judgments
from fpo.stages.judge.verdicts import preference_by_text
from hypothesis import given
from hypothesis import strategies as st
from judge_server import Answer, Server, completion, serving
from pairs import many_examples


def task(number: int, order: str = "ab", words: str = "A or B?") -> Task:
    return Task(f"q{number}", order, 1, [{"role": "user", "content": f"{number} {order}: {words}"}])


THREE_TOKENS = Asking(3)
TASKS = [task(number, order) for number in range(5) for order in ("ab", "ba")]


def letter(body: dict) -> Answer:
    """A for an even number, B for an odd one."""
    return completion("AB"[int(body["messages"][0]["content"].split()[0]) % 2])


def run(
    server: Server,
    folder: Path,
    tasks: list[Task] = TASKS,
    asking: Asking = THREE_TOKENS,
    judge: str = "j",
    at_once: int = 3,
) -> list[Judgment]:
    async def all_of_them() -> list[Judgment]:
        async with Endpoint(server.url, judge, 5.0, at_once) as endpoint:
            return await judge_all(tasks, endpoint, asking, lambda reply: preference_by_text(reply.text), folder)

    return asyncio.run(all_of_them())


def test_every_task_has_its_judgment_in_order_and_on_disk(tmp_path):
    with serving(letter) as server:
        found = run(server, tmp_path)
    assert [(one.question, one.order) for one in found] == [(one.question, one.order) for one in TASKS]
    assert [one.verdict for one in found] == [1.0 - int(one.question[1:]) % 2 for one in found]
    assert {one.key: one for one in found} == read_judgments(tmp_path) and len(server.requests) == len(TASKS)
    assert found[0].prompt_tokens == 7 and found[0].reply_tokens == 2


def test_what_was_judged_is_not_asked_again(tmp_path):
    with serving(letter) as server:
        first = run(server, tmp_path, TASKS[:4])
        again = run(server, tmp_path, TASKS)
        assert again[:4] == first and len(server.requests) == len(TASKS)
        assert run(server, tmp_path, [*TASKS, TASKS[0]])[-1] == again[0]
        assert len(server.requests) == len(TASKS)


@pytest.mark.parametrize("change", ["judge", "asking", "words"])
def test_another_judge_prompt_or_sampling_is_another_judgment(tmp_path, change):
    others = {
        "judge": {"judge": "other"},
        "asking": {"asking": Asking(3, temperature=1.0)},
        "words": {"tasks": [task(0, words="Which?")]},
    }
    with serving(letter) as server:
        run(server, tmp_path, TASKS[:1])
        run(server, tmp_path, **({"tasks": TASKS[:1]} | others[change]))
        assert len(server.requests) == 2 and len(read_judgments(tmp_path)) == 2


def test_the_first_error_stops_all_and_what_was_judged_is_kept(tmp_path):
    with serving(letter, letter, letter, (400, {}, b"no")) as server:
        with pytest.raises(UserError, match="found status 400: no"):
            run(server, tmp_path, at_once=1)
        assert len(read_judgments(tmp_path)) == 3 and len(server.requests) < len(TASKS)
    with serving(letter) as server:
        assert len(run(server, tmp_path)) == len(TASKS) and len(server.requests) == len(TASKS) - 3


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    def slowly(body: dict) -> Answer:
        time.sleep(0.05)
        return letter(body)

    with serving(slowly) as server:
        run(server, tmp_path, at_once=3)
    assert server.at_once == 3


def test_a_reply_without_a_verdict_is_kept_and_counts_as_none(tmp_path):
    with serving(completion("I would rather not.")) as server:
        (found,) = run(server, tmp_path, TASKS[:1])
        assert (found.verdict, found.reply) == (None, "I would rather not.")
        run(server, tmp_path, TASKS[:1])
        assert len(server.requests) == 1


@many_examples
@given(cut=st.integers(1, 400))
def test_a_line_cut_short_is_judged_again_and_no_other(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    lines = [
        json.dumps({**vars(Judgment(key, "q", "ab", 1, "A", 1.0, 1, 1))}) + "\n" for key in ("one", "two", "three")
    ]
    whole = "".join(lines).encode()
    (folder / FILE).write_bytes(whole[:-cut])
    kept = whole[:-cut].count(b"\n")
    assert list(read_judgments(folder)) == ["one", "two", "three"][:kept]
    assert (folder / FILE).read_bytes() == "".join(lines[:kept]).encode()


@pytest.mark.parametrize("line", ["{", '{"key": 1}', "[]", "null"])
def test_a_line_that_is_no_judgment_is_named(tmp_path, line):
    (tmp_path / FILE).write_text(line + "\n")
    with pytest.raises(UserError, match="line 1"):
        read_judgments(tmp_path)


def test_keys_tell_all_that_is_asked_apart():
    others = [
        ([{"role": "user", "content": "a"}], "j", Asking(1)),
        ([{"role": "system", "content": "a"}], "j", Asking(1)),
        ([{"role": "user", "content": "a"}], "k", Asking(1)),
        ([{"role": "user", "content": "a"}], "j", Asking(2)),
        ([{"role": "user", "content": "a"}], "j", Asking(1, top_logprobs=5)),
        ([{"role": "user", "content": "a"}], "j", Asking(1, seed=1)),
    ]
    assert len({key_of(*one) for one in others}) == len(others)


def test_a_client_that_waits_between_attempts_holds_up_no_other_task(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.2)
    with serving((500, {}, b""), letter) as server:
        started = time.monotonic()
        assert len(run(server, tmp_path, at_once=2)) == len(TASKS)
        assert time.monotonic() - started < 2
