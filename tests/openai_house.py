"""A server that speaks OpenAI's chat protocol, as a test tells it: slow, broken, streaming, lying about citations.

It checks nothing of the request but its form, counts no tokens, and speaks no HTTP beyond what `openai` needs: the
client's own tests (tests/llm) and the check against real servers cover those.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from orrery.platform import LanguageModel

if TYPE_CHECKING:
    from orrery.serving.answering import Model


@dataclass
class OpenAI:
    """What it answers next, and what it was asked."""

    answer: str = "It closes above 60 km/h [1]."
    # What it answers to a prompt, where that matters.
    reply: Callable[[str], str] | None = None
    status: int = 200
    delay: float = 0.0
    between: float = 0.0
    # After so many pieces the connection breaks.
    breaks_after: int | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    at_work: int = 0
    hung_up: int = 0
    url: str = ""

    @property
    def prompt(self) -> str:
        """The last user message."""
        return str(self.asked[-1]["messages"][1]["content"])

    def endpoint(self, timeout: float = 20, context: int = 4096) -> LanguageModel:
        """Return it as platform.yaml names it."""
        return LanguageModel(url=f"{self.url}/v1", model="tiny", timeout=timeout, context=context)

    def model(self, timeout: float = 20, context: int = 4096) -> Model:
        """Return a client of it, as the service makes one."""
        from orrery.llm.client import Model as Client
        from orrery.serving.answering import Model

        endpoint = self.endpoint(timeout, context)
        return Model(Client(endpoint), endpoint.model, endpoint.context, endpoint.timeout)

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.at_work += 1
        try:
            there = await self._waited(request)
        finally:
            self.at_work -= 1
        if not there:
            return Response(status_code=499)
        if self.status != 200:
            return JSONResponse({"error": {"message": "as the test wants"}}, self.status)
        if body.get("stream"):
            return StreamingResponse(self._pieces(), media_type="text/event-stream")
        text = self.reply(str(body["messages"][1]["content"])) if self.reply else self.answer
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return JSONResponse(
            {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
        )

    async def _waited(self, request: Request) -> bool:
        end = time.monotonic() + self.delay
        while time.monotonic() < end:
            if await request.is_disconnected():
                self.hung_up += 1
                return False
            await asyncio.sleep(0.01)
        return True

    async def _pieces(self) -> AsyncIterator[str]:
        def chunk(delta: dict[str, str], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            told = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "tiny", "choices": [choice]}
            return f"data: {json.dumps(told)}\n\n"

        self.at_work += 1
        try:
            for n, word in enumerate(self.answer.split(" ")):
                if n == self.breaks_after:
                    raise ConnectionResetError
                yield chunk({"content": word if n == 0 else f" {word}"})
                await asyncio.sleep(self.between)
            yield chunk({}, "stop")
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.hung_up += 1
            raise
        finally:
            self.at_work -= 1


@contextlib.contextmanager
def openai_server() -> Iterator[OpenAI]:
    """Run one."""
    told = OpenAI()
    app = Starlette(routes=[Route("/v1/chat/completions", told.chat, methods=["POST"])])

    async def quiet(scope: Any, receive: Any, send: Any) -> None:
        with contextlib.suppress(ConnectionResetError):
            await app(scope, receive, send)

    listener = socket.create_server(("127.0.0.1", 0))
    told.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(quiet, log_config=None, lifespan="off", timeout_graceful_shutdown=1, loop="asyncio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield told
    finally:
        server.should_exit = True
        thread.join(10)
