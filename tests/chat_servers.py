"""A real HTTP server on this machine that speaks the chat completions protocol, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the server sends for one request."""

    body: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    missing_bytes: int = 0  # the connection is closed so many bytes before the announced end


def completion(text: str | None, *, finish_reason: str | None = "stop", usage: bool = True) -> Answer:
    counted = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish_reason,
            }
        ],
    }
    return Answer(json.dumps(body | ({"usage": counted} if usage else {})))


@dataclass
class Served:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies, in the order of their arrival
    keys: list[str | None] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Served]:
    """A server whose `answer` is given a request's body and how many have arrived before it."""
    lock = threading.Lock()
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                before = len(served.requests)
                served.requests.append(body)
                served.keys.append(self.headers["Authorization"])
                served.under_way += 1
                served.most_under_way = max(served.most_under_way, served.under_way)
            given = answer(body, before)
            deadline = time.monotonic() + given.delay_s
            while time.monotonic() < deadline and not ended.wait(0.01):
                pass
            with lock:
                served.under_way -= 1
            content = given.body.encode()
            try:
                self.send_response(given.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in given.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) - given.missing_bytes])
            except ConnectionError:  # who asked has gone
                pass
            if given.missing_bytes:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(url=f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
