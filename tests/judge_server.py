"""A server in this process that speaks as an OpenAI-compatible endpoint, and fails as it is told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What it does with a request: (status, headers, body), after perhaps a sleep; a body of bytes is sent as it is.
Answer = tuple[int, dict[str, str], Any]
Respond = Callable[[dict[str, Any]], Answer]


def completion(text: str | None, top: list[dict[str, float]] | None = None, **usage: int) -> Answer:
    """A reply; `top` has the log-probabilities of each position's likeliest tokens."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top is not None:
        content = [
            {
                "token": next(iter(likeliest), ""),
                "logprob": 0.0,
                "top_logprobs": [{"token": token, "logprob": logp} for token, logp in likeliest.items()],
            }
            for likeliest in top
        ]
        choice["logprobs"] = {"content": content}
    counted = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9} | usage
    return 200, {}, {"id": "1", "object": "chat.completion", "choices": [choice], "usage": counted}


class Server:
    """What was asked of a running server, and its address."""

    def __init__(self, respond: Respond) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = 0
        self._running = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body | {"path": self.path})
                    outer.headers.append(dict(self.headers))
                    outer._running += 1
                    outer.at_once = max(outer.at_once, outer._running)
                try:
                    status, headers, content = respond(body)
                    sent = content if isinstance(content, bytes) else json.dumps(content).encode()
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(sent))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(sent)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with lock:
                        outer._running -= 1

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @contextmanager
    def running(self) -> Iterator["Server"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


@contextmanager
def serving(*answers: Answer | Respond) -> Iterator[Server]:
    """A server that gives these answers in turn, and the last one ever after; a function answers what it is asked."""
    left = list(answers)
    lock = threading.Lock()

    def respond(body: dict[str, Any]) -> Answer:
        with lock:
            answer = left.pop(0) if len(left) > 1 else left[0]
        return answer(body) if callable(answer) else answer

    with Server(respond).running() as server:
        yield server


def hang(seconds: float) -> Respond:
    """Answers too late."""

    def respond(body: dict[str, Any]) -> Answer:
        time.sleep(seconds)
        return completion("late")

    return respond
