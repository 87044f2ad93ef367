"""The routes: what is asked of which part. See `contract` for what they take and give."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException as AnyHTTPException

from orrery.errors import OrreryError, TryAgain
from orrery.rag.answers.texts import clean, heading_text, one_line
from orrery.rag.spec import KnowledgeBaseSpec
from orrery.serving import feedback as thumbs
from orrery.serving.answering import (
    Answering,
    Begun,
    DoneEvent,
    Event,
    Model,
    NotReady,
    SourcesEvent,
    TokenEvent,
    TooSlow,
    Trace,
)
from orrery.serving.contract import FILTERS, Answer, Feedback, Health, Info, Noted, Passage, Query
from orrery.serving.declared import Declared
from orrery.serving.knowledge import Opener
from orrery.serving.live import Live
from orrery.serving.metrics import CONTENT_TYPE, Metrics
from orrery.serving.pressure import Full, Rate
from orrery.serving.settings import Settings
from orrery.serving.tokens import ANONYMOUS, Caller, Tokens
from orrery.serving.web import Edge, EventStream, Gone, data_of, error, parsed, trace_of, unless_gone
from orrery.store import Store

PAGE = Path(__file__).parent / "page"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
CHUNK_ID = re.compile(r"[0-9a-fA-F-]{32,36}")


@dataclass
class Service:
    """Everything that one process serves with."""

    project: str
    spec: KnowledgeBaseSpec
    store: Store
    opener: Opener
    scratch: Path
    tokens: Tokens | None = None
    model: Model | None = None
    settings: Settings = field(default_factory=Settings)
    stopping: bool = False
    declared: Declared | None = None

    def __post_init__(self) -> None:
        # Who may read what is asked of the spec as it is now; everything else stays as it was when the service began.
        self.access = self.declared or Declared(self.spec)
        self.metrics = Metrics(self.project)
        self.live = Live(self.store, self.project, self.opener, self.settings, self.scratch)
        self.live.watchers.append(self.metrics)
        self.answering = Answering(self.spec, self.access, self.live, self.metrics, self.settings, self.model)
        self.recent = thumbs.Recent(self.settings.remembered, self.settings.remembered_for)
        self.rate = Rate(self.settings.feedback_per_minute)
        # Beside the searches' threads: a store that hangs must not hold up the end, as the loop's own threads would.
        self.noting = ThreadPoolExecutor(2, thread_name_prefix="feedback")
        self.asked = 0

    @property
    def problems(self) -> list[str]:
        """What is wrong now."""
        self.access.look()
        broken = [self.tokens.problem if self.tokens else None, self.access.problem]
        if self.answering.breaker.open:
            broken.append("the language model does not answer: the passages' own sentences are given until it does")
        return [*self.live.problems, *(b for b in broken if b)]

    def health(self) -> Health:
        """How the service is."""
        now = self.live.current
        status = "stopping" if self.stopping else "starting" if now is None else "degraded" if self.problems else "ok"
        return Health.model_validate(
            {
                "status": status,
                "generation": now.name if now else None,
                "version": now.pointer.version if now else None,
                "problems": self.problems,
            }
        )

    def scrape(self) -> bytes:
        """Return the metrics as they are now."""
        m, a = self.metrics, self.answering
        m.in_flight.set(self.asked)
        m.queued.labels("search").set(a.searching.waiting)
        m.queued.labels("model").set(a.writing.waiting)
        m.breaker.set(int(a.breaker.open))
        m.outage.set(int(self.live.outage is not None))
        return m.text()


bearer = HTTPBearer(
    auto_error=False, description="A token of the service's file; see `python -m orrery.serving token`."
)


def caller(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> Caller:
    """Return who asks. Raises 401, which never says why."""
    service: Service = request.app.state.service
    trace, began = trace_of(request), time.perf_counter()
    found = ANONYMOUS if service.tokens is None else service.tokens.caller(given.credentials) if given else None
    trace.add("auth", time.perf_counter() - began)
    if found is None:
        raise HTTPException(401, "a valid bearer token is needed", {"www-authenticate": 'Bearer realm="orrery"'})
    trace.caller = found.name
    return found


Who = Annotated[Caller, Depends(caller)]


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """Describe a body that the route reads itself, for openapi.json."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def build(service: Service) -> Edge:
    """Return the application. Its lifespan follows the live generation."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(service.live.follow())
        try:
            yield
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            await service.answering.close()
            service.noting.shutdown(wait=False, cancel_futures=True)
            await service.live.close()

    # The usual pages of documentation load scripts from elsewhere; openapi.json stays.
    app = FastAPI(
        title=f"Orrery: {service.project}",
        description=service.spec.description,
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    _errors(app)
    _questions(app, service)
    _others(app, service)
    _machines(app, service)
    if PAGE.is_dir():
        app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
    return Edge(
        app,
        metrics=service.metrics,
        hosts=LOOPBACK if service.tokens is None else None,
        requests=service.settings.requests,
        seconds=service.settings.request_timeout + service.answering.limit,
        stopping=lambda: service.stopping,
    )


def _errors(app: FastAPI) -> None:
    """Say what goes wrong in one shape."""

    def later(request: Request, detail: str, after: int) -> JSONResponse:
        trace_of(request).outcome = "refused"
        return error(503, detail, trace_of(request), {"retry-after": str(after)})

    @app.exception_handler(AnyHTTPException)
    async def http(request: Request, e: AnyHTTPException) -> JSONResponse:
        return error(e.status_code, e.detail, trace_of(request), dict(e.headers or {}))

    @app.exception_handler(Full)
    async def full(request: Request, e: Full) -> JSONResponse:
        return later(request, e.what, e.after)

    @app.exception_handler(NotReady)
    async def not_ready(request: Request, _: NotReady) -> JSONResponse:
        return later(request, "no generation is open yet", 5)

    @app.exception_handler(TooSlow)
    async def too_slow(request: Request, _: TooSlow) -> JSONResponse:
        return later(request, "the search took too long", 2)

    @app.exception_handler(TryAgain)
    async def away(request: Request, _: TryAgain) -> JSONResponse:
        return later(request, "what the service needs does not answer", 5)

    @app.exception_handler(Gone)
    async def gone(request: Request, _: Gone) -> Response:
        trace_of(request).outcome = "cancelled"
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def bug(request: Request, _: Exception) -> JSONResponse:
        return error(500, "an error of the service; it is in its log", trace_of(request))


def _questions(app: FastAPI, service: Service) -> None:
    answering = service.answering

    @app.post("/query", response_model=Answer, openapi_extra=_body(Query))
    async def query(request: Request, who: Who) -> Response:
        """Answer a question, with sources."""
        trace = trace_of(request)
        asked = await parsed(request, Query, service.settings)
        service.asked += 1
        streaming = False
        try:
            if asked.stream or "text/event-stream" in request.headers.get("accept", ""):
                begun = await unless_gone(request, answering.begin(asked, who, trace))
                streaming = True
                return EventStream(request, _stream(service, begun, who, trace), lambda: _ended(service, begun))
            answer = await unless_gone(request, _whole(service, asked, who, trace))
            return Response(answer.model_dump_json(), media_type="application/json")
        finally:
            if not streaming:
                service.asked -= 1


def _ended(service: Service, begun: Begun) -> None:
    begun.end()
    service.asked -= 1


async def _whole(service: Service, query: Query, who: Caller, trace: Trace) -> Answer:
    begun = await service.answering.begin(query, who, trace)
    try:
        async with aclosing(service.answering.events(begun, trace, stream=False)) as events:
            async for event in events:
                if isinstance(event, DoneEvent):
                    service.recent.add(query.question, event.answer, who)
                    return event.answer
    finally:
        begun.end()
    raise AssertionError("events end with the answer")


async def _stream(service: Service, begun: Begun, who: Caller, trace: Trace) -> AsyncGenerator[tuple[str, str], None]:
    try:
        async with aclosing(service.answering.events(begun, trace, stream=True)) as events:
            async for event in events:
                if isinstance(event, DoneEvent):
                    service.recent.add(begun.query.question, event.answer, who)
                yield _sse(event, begun, trace)
    except Exception:
        yield "error", data_of({"detail": "an error of the service; it is in its log", "request_id": trace.id})
        raise


def _sse(event: Event, begun: Begun, trace: Trace) -> tuple[str, str]:
    match event:
        case SourcesEvent(sources):
            shown = [s.model_dump() for s in sources]
            fields = {"query_id": trace.id, "generation": begun.serving.name, "sources": shown}
            return "sources", data_of(fields)
        case TokenEvent(text):
            return "token", data_of({"text": text})
        case DoneEvent(answer):
            return "done", answer.model_dump_json()


def _others(app: FastAPI, service: Service) -> None:
    @app.get("/sources/{id}", response_model=Passage)
    async def source(id: str, request: Request, who: Who) -> Response:
        """Return a whole passage, when the token's groups may read it."""
        found, generation = None, ""
        if CHUNK_ID.fullmatch(id):
            work = service.answering.passage(id, who, trace_of(request))
            found, generation = await unless_gone(request, work)
        if found is None:
            raise HTTPException(404, "no such passage")
        passage = Passage(
            id=found.id,
            document=found.document,
            source=found.source,
            title=one_line(found.title),
            uri=one_line(found.uri),
            heading=heading_text(found.heading),
            page=found.page,
            text=clean(found.text),
            generation=generation,
        )
        return Response(passage.model_dump_json(), media_type="application/json")

    @app.post("/feedback", response_model=Noted, openapi_extra=_body(Feedback))
    async def give(request: Request, who: Who) -> Noted:
        """Note a thumb. This stores the question's text; nothing else does."""
        if wait := service.rate.take(who.name):
            raise HTTPException(429, "too many thumbs", {"retry-after": str(wait)})
        asked = await parsed(request, Feedback, service.settings)
        given = service.recent.get(asked.query_id, who)
        if given is None:
            raise HTTPException(404, "no answer of the last hour has this query_id")
        try:
            async with asyncio.timeout(service.settings.store_timeout):
                work = partial(thumbs.note, service.store, service.project, asked, given)
                noted = await asyncio.get_running_loop().run_in_executor(service.noting, work)
        except (OrreryError, TimeoutError, OSError):
            raise HTTPException(503, "the store does not answer", {"retry-after": "30"}) from None
        if not noted:
            raise HTTPException(429, "this answer has been judged often enough", {"retry-after": "3600"})
        service.metrics.feedback.labels(asked.thumb).inc()
        return Noted()

    @app.get("/info", response_model=Info)
    async def info(who: Who) -> Info:
        """Tell what is answered from, and by whom."""
        now, spec = service.live.current, service.spec
        return Info(
            project=service.project,
            description=spec.description,
            owner=spec.owner,
            generation=now.name if now else None,
            version=now.pointer.version if now else None,
            proven=now.pointer.proven if now else None,
            model=service.answering.model_name,
            embedder=now.knowledge.embedder if now else None,
            counts={"passages": now.knowledge.count, "sources": len(service.access.spec.sources)} if now else {},
            filters=list(FILTERS),
            top_k=(now.asking if now else spec).retrieval.top_k,
            name=who.name,
            groups=sorted(who.groups),
            logs_questions=spec.answers.log_questions,
            feedback=thumbs.NOTICE,
        )


def _machines(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", response_model=Health)
    async def live() -> Health:
        """Tell that the process answers."""
        return service.health()

    @app.get("/health/ready", response_model=Health)
    async def ready() -> Response:
        """Tell whether questions can be answered: 200 only with a generation open."""
        health = service.health()
        status = 200 if health.status in ("ok", "degraded") else 503
        return Response(health.model_dump_json(), status, media_type="application/json")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(service.scrape(), headers={"content-type": CONTENT_TYPE})
