"""The edge of the service: request ids, headers, errors, the access log; bodies bounded before they are parsed.

What is logged of a request: its id, who (the token's name), which route, how it ended, milliseconds by stage. Never a
token, a header, a query string or a raw path; the question only where the spec asks for it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError

from orrery import log
from orrery.serving.answering import Trace
from orrery.serving.contract import MAX_BODY
from orrery.serving.metrics import Metrics
from orrery.serving.settings import Settings

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
# The page is its own files alone: nothing inline, nothing from elsewhere, in no frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
QUIET = ("/health", "/metrics")
DRAIN_S = 1.0
# Routes as they are logged: a path may hold anything, a token too.
ROUTES = ("/query", "/feedback", "/info", "/openapi.json", "/health/live", "/health/ready", "/metrics", "/")


class Gone(Exception):
    """The client has hung up."""


class Edge:
    """The outermost layer (ASGI)."""

    def __init__(
        self,
        app: Any,
        *,
        metrics: Metrics,
        hosts: frozenset[str] | None,
        requests: int,
        seconds: float,
        stopping: Callable[[], bool],
    ) -> None:
        self._app, self._metrics, self._hosts, self._stopping = app, metrics, hosts, stopping
        self._most, self._seconds, self.requests = requests, seconds, 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = Trace(uuid.uuid4().hex)
        scope.setdefault("state", {})["trace"] = trace
        response = _Out(send, trace)
        self.requests += 1
        # Parts have their own, shorter times; this one is for who reads an answer slowly, or never.
        limit = asyncio.timeout(self._seconds)
        try:
            async with limit:
                refusal = self._refusal(scope)
                if refusal is not None and refusal.headers.get("connection") == "close":
                    await _drained(receive)
                await (refusal or self._app)(scope, receive, response)
        except asyncio.CancelledError:
            trace.outcome = "cancelled"
            raise
        except Exception as e:
            trace.outcome = "failed"
            if not limit.expired():
                _log_bug(trace, e)
            if response.status is None:
                await error(500, "an error of the service; it is in its log", trace)(scope, receive, response)
        finally:
            self.requests -= 1
            self._note(scope, trace, response.status)

    def _refusal(self, scope: Message) -> Response | None:
        """Return an answer that needs no route: while stopping, and for a name that is not this machine's."""
        trace: Trace = scope["state"]["trace"]
        if self._stopping() and not scope["path"].startswith(QUIET):
            return error(503, "the service is stopping", trace, {"retry-after": "1", "connection": "close"})
        if self.requests > self._most:
            return error(503, "too many requests at once", trace, {"retry-after": "1"})
        if self._hosts is not None:
            host = next((v for k, v in scope["headers"] if k == b"host"), b"").decode("latin-1")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name.strip("[]").lower() not in self._hosts:
                # Without tokens any web page could read the documents, by a name that it lets point to loopback.
                return error(421, "this service answers on loopback, by its own name only", trace)
        return None

    def _note(self, scope: Message, trace: Trace, status: int | None) -> None:
        path = scope["path"]
        if status in (401, 403, 413, 415, 421, 422, 429, 503):
            self._metrics.refused.labels(str(status)).inc()
        if path == "/query":
            trace.outcome = trace.outcome or ("refused" if status and status != 500 else "failed")
            self._metrics.questions.labels(trace.outcome).inc()
            trace.stages["total"] = trace.total
            for stage, seconds in trace.stages.items():
                self._metrics.stage.labels(stage).observe(seconds)
        if path.startswith(QUIET):
            return
        stages = {f"{k}_ms": round(v * 1000, 1) for k, v in trace.stages.items()}
        stages.setdefault("total_ms", round(trace.total * 1000, 1))
        said = {"question": trace.question} if trace.question is not None else {}
        route = path if path in ROUTES else "/sources/{id}" if path.startswith("/sources/") else "other"
        log.get().info(
            "request",
            id=trace.id,
            who=trace.caller,
            route=route,
            status=status or 0,
            outcome=trace.outcome or "-",
            generation=trace.generation[:12] or "-",
            **stages,
            **said,
        )


async def _drained(receive: Receive) -> None:
    """Read a small body that nobody wants: closed with bytes unread, a connection is reset, and its answer lost."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while size <= MAX_BODY and (message := await receive()).get("more_body", False):
                size += len(message["body"])


class _Out:
    """Sends a response with our headers, and remembers its status."""

    def __init__(self, send: Send, trace: Trace) -> None:
        self._send, self._trace = send, trace
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {k.lower() for k, _ in message.get("headers", [])}
            extra = {**SECURITY, "x-request-id": self._trace.id, "cache-control": "no-store"}
            headers = [(k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in given]
            message["headers"] = [*message.get("headers", []), *headers]
        await self._send(message)


def _log_bug(trace: Trace, error: Exception) -> None:
    """Log where a bug is, and not what it says: that may repeat the question."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    where = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in reversed(frames))
    log.get().error("a bug", id=trace.id, kind=type(error).__name__, where=where)


def error(status: int, detail: Any, trace: Trace, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error as all of them look."""
    return JSONResponse({"detail": detail, "request_id": trace.id}, status, headers)


def trace_of(request: Request) -> Trace:
    """Return the request's trace."""
    trace: Trace = request.scope["state"]["trace"]
    return trace


async def parsed(request: Request, model: type[M], settings: Settings) -> M:
    """Return the body as `model`. Raises `HTTPException` (408, 413, 415, 422), and `Gone`."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps other sites' forms out: a browser asks before it sends this kind across sites.
        raise HTTPException(415, "send JSON, with Content-Type: application/json")
    body = await _body(request, settings)
    try:
        return model.model_validate_json(body)
    except ValidationError as e:
        # What was sent is not repeated: answers of errors end up in logs.
        wrong = [{"field": ".".join(map(str, one["loc"])), "problem": _problem(dict(one))} for one in e.errors()[:10]]
        raise HTTPException(422, wrong) from None


def _problem(one: dict[str, Any]) -> str:
    return "not JSON" if one["type"] == "json_invalid" else str(one["msg"]).removeprefix("Value error, ")


async def _body(request: Request, settings: Settings) -> bytes:
    """Return at most `MAX_BODY` bytes. More is thrown away as it comes, and its connection closed."""
    declared = request.headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared) > MAX_BODY
    if too_large and int(declared) > settings.drain_bytes:
        raise _too_large()
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                part = message.get("body", b"")
                size += len(part)
                if size > settings.drain_bytes:
                    raise _too_large()
                if size <= MAX_BODY and not too_large:
                    parts.append(part)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise HTTPException(408, "the body came too slowly", {"connection": "close"}) from None
    if too_large or size > MAX_BODY:
        raise _too_large()
    return b"".join(parts)


def _too_large() -> HTTPException:
    return HTTPException(413, f"at most {MAX_BODY:,} bytes", {"connection": "close"})


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; when the client hangs up first it is cancelled, and `Gone` raised."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Gone
    finally:
        for task in (doing, gone):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. The generator ends with the response, whichever way that ends."""

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, events: AsyncGenerator[tuple[str, str], None], ended: Callable[[], None]
    ) -> None:
        super().__init__()
        self._request, self._events, self._ended = request, events, ended
        # Proxies must not gather what is meant to be seen as it comes.
        self._head = [(b"content-type", self.media_type.encode()), (b"x-accel-buffering", b"no")]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Send the events; stop when nobody reads them."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._head})
            await unless_gone(self._request, self._all(send))
        except Gone:
            trace_of(self._request).outcome = "cancelled"
        finally:
            self._ended()

    async def _all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for name, data in events:
                text = f"event: {name}\ndata: {data}\n\n"
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def data_of(fields: dict[str, Any]) -> str:
    """Return an event's data: JSON on one line."""
    return json.dumps(fields, ensure_ascii=False)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a service on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
