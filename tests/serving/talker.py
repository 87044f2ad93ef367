"""A small, real HTTP server that speaks as much of OpenAI's protocol as a test wants, and breaks it where it says so."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = ["The ", "answer ", "is ", "42 ", "[1]."]


@dataclass
class Talker:
    """What it heard, and how it behaves: `behave` gets the handler and the request's body, or nothing special happens."""

    behave: Callable[[Handler, dict[str, Any]], bool] = lambda handler, body: False
    heard: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    broken_off: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    talker: Talker

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self.talker.headers.append({k.lower(): v for k, v in self.headers.items()})
        if not self.talker.behave(self, {}):
            self.say(200, {"object": "list", "data": [{"id": "small", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.talker.heard.append(body)
        self.talker.headers.append({k.lower(): v for k, v in self.headers.items()})
        try:
            if self.talker.behave(self, body):
                return
            if body.get("stream"):
                self.begin()
                for word in WORDS:
                    self.piece(word)
                self.piece(None, finish="stop")
                self.done()
            else:
                self.say(200, completion("".join(WORDS)))
        except OSError:
            self.talker.broken_off.set()
            self.close_connection = True

    def say(self, status: int, body: object, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        ).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def piece(self, text: str | None, finish: str | None = None) -> None:
        delta = {} if text is None else {"content": text}
        chunk = {
            **{"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "small"},
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }
        self.raw(f"data: {json.dumps(chunk)}\n\n")

    def raw(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def done(self) -> None:
        self.raw("data: [DONE]\n\n")
        self.end()

    def end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def hang(self) -> None:
        """Stay silent until the test ends, or the client goes."""
        self.connection.settimeout(0.05)
        while not self.talker.closing.is_set():
            with suppress(TimeoutError):
                if not self.connection.recv(1):
                    raise OSError
        self.close_connection = True

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()
        self.close_connection = True
        raise OSError


def completion(text: object) -> dict[str, Any]:
    return {
        **{"id": "c", "object": "chat.completion", "created": 1, "model": "small"},
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        return  # a connection that a test broke


@contextmanager
def talking() -> Iterator[Talker]:
    """Serve on a free port of loopback."""
    talker = Talker()
    handler = type("Mine", (Handler,), {"talker": talker})
    server = _Server(("127.0.0.1", 0), handler)
    talker.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield talker
    finally:
        talker.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.01)
    return False
