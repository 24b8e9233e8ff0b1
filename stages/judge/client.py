"""A judge behind an OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, a vendor): asked, and asked again.

In: messages. Out: the reply's text, its tokens' likeliest alternatives where they were asked for, and what it cost.

Too many requests (429), the server's own failures (5xx), time-outs, lost connections and replies that are cut short are
tried again after a wait that doubles, or as long as the server's `Retry-After` says. All else is an error at once.
"""

import asyncio
import datetime
import email.utils
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import BaseModel

from ...cache.errors import UserError
from ...cache.files import decode, parse_json

# The environment variable with the key, which is never logged or written.
KEY = "FPO_JUDGE_KEY"
ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Asking:
    """How a judge is asked.

    Attributes:
        max_tokens: of a reply.
        temperature: of sampling; 0 is greedy.
        top_logprobs: likeliest tokens whose log-probabilities come with each position; None for none.
        seed: of sampling.
        top_p: probability of the nucleus that is sampled from; 1 is the whole distribution.
    """

    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int | None = None
    seed: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Reply:
    """What a judge said.

    Attributes:
        text: the reply.
        positions: for each of its tokens the log-probabilities, nats, of the likeliest ones; empty if not asked for.
        prompt_tokens: as the server counts them; 0 where it does not.
        reply_tokens: the same of the reply.
    """

    text: str
    positions: tuple[Mapping[str, float], ...]
    prompt_tokens: int
    reply_tokens: int


class _Alternative(BaseModel):
    token: str
    logprob: float


class _Position(BaseModel):
    top_logprobs: list[_Alternative] = []


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    logprobs: _Logprobs | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


class _TryAgainError(Exception):
    """A request that failed for now; `wait` is what the server asks for, seconds."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass
class Endpoint:
    """An endpoint and the judge that it serves; a context manager, which closes its connections.

    Attributes:
        url: up to and including `/v1`, as vLLM and llama.cpp print it.
        judge: the model's name there.
        timeout: seconds that one reply may take.
        concurrency: requests at a time.
    """

    url: str
    judge: str
    timeout: float = 120.0
    concurrency: int = 8
    _client: httpx.AsyncClient = field(init=False, repr=False)

    async def __aenter__(self) -> Self:
        key = os.environ.get(KEY)
        self._client = httpx.AsyncClient(
            timeout=self.timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=self.concurrency),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(self, messages: Messages, how: Asking) -> Reply:
        """One reply.

        Raises:
            UserError: the endpoint refuses the request or the key, does not answer in its format, or failed every
                attempt.
        """
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._ask_once(messages, how)
            except _TryAgainError as error:
                if attempt == ATTEMPTS:
                    raise UserError(
                        f"--endpoint {self.url}: expected a reply, found after {ATTEMPTS} attempts: {error}; "
                        "what was judged is kept, run the same command again to go on"
                    ) from error
                # Between half and all of the wait, so that the requests of one moment do not come back at one moment.
                await asyncio.sleep(error.wait if error.wait is not None else wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("the last attempt returns or raises")

    async def _ask_once(self, messages: Messages, how: Asking) -> Reply:
        body: dict[str, Any] = {"model": self.judge, "messages": list(messages), "max_tokens": how.max_tokens}
        body |= {"temperature": how.temperature, "top_p": how.top_p, "seed": how.seed}
        if how.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": how.top_logprobs}
        try:
            response = await self._client.post(f"{self.url.rstrip('/')}/chat/completions", json=body)
        except httpx.UnsupportedProtocol as error:
            raise UserError(f"--endpoint: expected http://… or https://…, found {self.url}") from error
        except httpx.TimeoutException as error:
            raise _TryAgainError(f"no reply within {self.timeout:g} s") from error
        except httpx.TransportError as error:
            raise _TryAgainError(f"no connection ({error})") from error
        if response.status_code == 429 or response.status_code >= 500:
            raise _TryAgainError(f"status {response.status_code}", _retry_after(response))
        self._check(response)
        try:
            found = decode(_Completion, parse_json(response.content), "the reply")
        except ValueError as error:
            raise _TryAgainError(f"a reply that is no chat completion ({error})") from error
        if not found.choices:
            raise _TryAgainError("a reply without choices")
        choice, usage = found.choices[0], found.usage or _Usage()
        positions = (choice.logprobs.content if choice.logprobs else None) or []
        return Reply(
            choice.message.content or "",
            tuple({one.token: one.logprob for one in position.top_logprobs} for position in positions),
            usage.prompt_tokens,
            usage.completion_tokens,
        )

    def _check(self, response: httpx.Response) -> None:
        """Refuses a status that another attempt would not change."""
        status, said = response.status_code, " ".join(response.text.split())[:200]
        if status in (401, 403):
            raise UserError(f"--endpoint {self.url}: expected a key that it accepts, found status {status}; set {KEY}")
        if status == 404:
            raise UserError(
                f"--endpoint {self.url}: expected {self.url.rstrip('/')}/chat/completions and the model '{self.judge}' "
                f"there, found status 404 ({said}); give the address up to /v1, and as --judge a model that it serves"
            )
        if status >= 400:
            raise UserError(f"--endpoint {self.url}: expected a reply, found status {status}: {said}")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds until the server wants to be asked again, from a number or a date; None where it does not say."""
    said = response.headers.get("Retry-After")
    if said is None:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        at = email.utils.parsedate_to_datetime(said)
    except ValueError:
        return None
    return max(0.0, (at - datetime.datetime.now(datetime.UTC)).total_seconds())
