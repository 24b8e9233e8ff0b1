"""A judge's endpoint that works, fails for now and fails for good, on a server that does as it is told."""

import asyncio
import datetime
import email.utils
import time

import pytest
from fpo.cache.errors import UserError
from fpo.stages.judge import client
from fpo.stages.judge.client import ATTEMPTS, KEY, Asking, Endpoint, Reply
from judge_server import Answer, completion, hang, serving

FIVE_TOKENS = Asking(5)
ASKED = [{"role": "user", "content": "A or B?"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


def ask(url: str, how: Asking = FIVE_TOKENS, timeout: float = 5.0) -> Reply:
    async def once() -> Reply:
        async with Endpoint(url, "some-judge", timeout) as endpoint:
            return await endpoint.ask(ASKED, how)

    return asyncio.run(once())


def test_the_request_says_what_is_asked_and_of_whom(monkeypatch):
    monkeypatch.setenv(KEY, "a-key")
    with serving(completion("A", [{"A": -0.1, "B": -2.5}], prompt_tokens=11, completion_tokens=1)) as server:
        reply = ask(server.url, Asking(1, 0.5, 5, 3))
    assert reply == Reply("A", ({"A": -0.1, "B": -2.5},), 11, 1)
    (request,) = server.requests
    assert request == {
        "path": "/v1/chat/completions",
        "model": "some-judge",
        "messages": ASKED,
        "max_tokens": 1,
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert server.headers[0]["Authorization"] == "Bearer a-key"


def test_without_a_key_none_is_sent_and_without_log_probabilities_none_are_asked_for(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with serving(completion(None)) as server:
        assert ask(f"{server.url}/") == Reply("", (), 7, 2)
    assert "Authorization" not in server.headers[0] and "logprobs" not in server.requests[0]


@pytest.mark.parametrize(
    "failure",
    [
        (429, {}, {"error": "slow down"}),
        (500, {}, b"oops"),
        (503, {}, b""),
        (200, {}, b'{"choices": [{"mess'),
        (200, {}, {"choices": []}),
        (200, {}, {"object": "error"}),
        (200, {"Content-Length": "1000"}, b'{"choices": ['),
    ],
    ids=["429", "500", "503", "cut JSON", "no choices", "another object", "cut connection"],
)
def test_what_fails_for_now_is_asked_again(failure: Answer):
    with serving(failure, failure, completion("A")) as server:
        assert ask(server.url, timeout=0.5).text == "A"
    assert len(server.requests) == 3


def test_a_server_that_hangs_is_asked_again():
    with serving(hang(1.0), completion("A")) as server:
        assert ask(server.url, timeout=0.2).text == "A"
    assert len(server.requests) == 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_server_s_own_wait_is_obeyed(form):
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
    said = "1" if form == "seconds" else email.utils.format_datetime(later, usegmt=True)
    started = time.monotonic()
    with serving((429, {"Retry-After": said}, b""), completion("A")) as server:
        assert ask(server.url).text == "A"
    assert 0.9 < time.monotonic() - started < 4


def test_what_fails_every_time_is_one_error_that_says_how_to_go_on():
    with serving((500, {}, b"")) as server, pytest.raises(UserError, match="after 6 attempts: status 500; what was"):
        ask(server.url)
    assert len(server.requests) == ATTEMPTS


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {}, {"error": "no such key sk-secret"}), f"expected a key that it accepts, found status 401; set {KEY}"),
        ((403, {}, b""), f"set {KEY}"),
        ((404, {}, {"error": "model not found"}), "the model 'some-judge' there, found status 404"),
        ((400, {}, {"error": "logprobs\nunsupported"}), 'found status 400: {"error": "logprobs\\nunsupported"}'),
    ],
)
def test_what_no_attempt_would_change_is_an_error_at_once(answer, words, monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret")
    with serving(answer) as server, pytest.raises(UserError) as caught:
        ask(server.url)
    assert words in str(caught.value) and "sk-secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000/v1", "expected http://… or https://…, found localhost:8000/v1"),
        ("http://127.0.0.1:9/v1", "no connection"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(url, words, monkeypatch):
    with pytest.raises(UserError, match=words):
        ask(url)
