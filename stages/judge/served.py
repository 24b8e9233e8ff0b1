"""Answers to a benchmark's questions by a model that a server holds (vLLM, SGLang, llama.cpp).

In: questions and an endpoint. Out: answers, one a turn, drawn by the server. The chat template is the server's, too.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..data.chat import Turns
from ..evaluate.answers import Question, answer_questions
from .client import Asking, Endpoint


def answers_of_server(
    questions: Sequence[Question],
    endpoint: Endpoint,
    how: Asking,
    temperature: float | None,
    on_answer: Callable[[int], None] = lambda count: None,
) -> list[list[str]]:
    """Has a server answer every turn of every question.

    Args:
        questions: all of one benchmark.
        endpoint: the server and, as its judge, the model's name there.
        how: how answers are drawn; its temperature is not read.
        temperature: of every answer; None is each question's own.
        on_answer: called with 1 after each answer, for progress.

    Raises:
        UserError: from the endpoint.
    """

    async def respond_to_all(conversations: list[Turns], temperatures: list[float]) -> list[str]:
        turn = asyncio.Semaphore(endpoint.concurrency)

        async def respond(conversation: Turns, at: float) -> str:
            messages = [{"role": message.role, "content": message.content} for message in conversation]
            async with turn:
                reply = await endpoint.ask(messages, replace(how, temperature=at))
            on_answer(1)
            return reply.text.strip()

        async with endpoint:
            return await asyncio.gather(*map(respond, conversations, temperatures))

    return answer_questions(questions, lambda *asked: asyncio.run(respond_to_all(*asked)), temperature)
