"""Runs the service: checks what it needs, listens, and ends in order when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from orrery import log, platform
from orrery.errors import SpecError, UserError, nearest
from orrery.serving.answering import Model
from orrery.serving.app import Service, build
from orrery.serving.declared import Declared
from orrery.serving.opening import RagOpener
from orrery.serving.settings import Settings
from orrery.serving.tokens import VARIABLE, Tokens
from orrery.serving.web import is_loopback
from orrery.store import Store

# What the server itself needs to close, after the questions have ended.
CLOSING_S = 1
# Open connections hear a 503 for this long, and balancers see that it is not ready, before it stops to listen.
NOTICE_S = 0.3
# Connections that the kernel holds until they are taken: with few, a burst waits a second for its next try instead of
# hearing a 503.
BACKLOG = 1024


class _Protocol(H11Protocol):
    """uvicorn's h11, which bounds the size of headers, with a bound on their time as well."""

    header_timeout = Settings().header_timeout

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = self.loop.call_later(self.header_timeout, self._check)

    def data_received(self, data: bytes) -> None:
        # uvicorn's own timer of an idle connection ends with the first byte that comes. This one runs on from that
        # byte, whatever else drips in, until a request has come whole.
        if self._head is None and self._waits():
            self._head = self.loop.call_later(self.header_timeout, self._check)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._disarm()

    def _waits(self) -> bool:
        """Tell whether nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _check(self) -> None:
        """Close a connection whose next request has not come whole."""
        self._head = None
        if self._waits() and not self.transport.is_closing():
            self.transport.close()

    def _disarm(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """uvicorn, but signals are ours: first the questions end, then the server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone."""
        yield


def make(service: Service, host: str) -> Server:
    """Return a server for `service`, to be given its sockets."""
    settings = service.settings
    # What it says of malformed requests would let anybody fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        build(service),
        host=host,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.connections,
        backlog=BACKLOG,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=CLOSING_S,
        h11_max_incomplete_event_size=settings.header_bytes,
    )
    return Server(config)


async def run(server: Server, service: Service, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends it at once."""
    loop = asyncio.get_running_loop()
    stops: list[asyncio.Task[None]] = []

    def stop() -> None:
        if service.stopping:
            server.should_exit = server.force_exit = True
            return
        log.get().info("stopping", in_flight=service.asked)
        service.stopping = True
        stops.append(loop.create_task(drain(server, service)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await server.serve(sockets=[listener])


async def drain(server: Server, service: Service) -> None:
    """Let the questions that have begun end, new ones being refused by now; then tell the server to exit."""
    end = asyncio.get_running_loop().time() + service.settings.stop
    await asyncio.sleep(NOTICE_S)
    while service.asked and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.05)
    server.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `UserError` when the address is taken, or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise UserError(f"cannot listen on {host}:{port}: {why}", hint="choose another --port or --host") from None


def tokens_of(file: Path | None, host: str) -> Tokens | None:
    """Return the tokens; None, said in the log, on loopback without a file. Raises `UserError` elsewhere without."""
    if file is not None:
        return Tokens(file)
    if not is_loopback(host):
        raise UserError(
            f"on {host} the service can be reached from elsewhere, so it needs tokens",
            hint=f"make one with `python -m orrery.serving token NAME --groups a,b`, and name its file by {VARIABLE}",
        )
    log.get().warning("no tokens: whoever reaches this machine's loopback may ask, and reads what everyone may read")
    return None


def model_of(name: str | None, known: dict[str, platform.LanguageModel]) -> Model | None:
    """Return the spec's language model. Raises `SpecError` when platform.yaml has none of this name."""
    if name is None:
        return None
    if name not in known:
        raise SpecError(f"llm: {name!r} is not in platform.yaml (llms)", hint=nearest(name, known))
    from orrery.llm.client import Model as Client

    endpoint = known[name]
    return Model(Client(endpoint), endpoint.model, endpoint.context, endpoint.timeout)


def serve(project: str, host: str, port: int, tokens: Path | None, settings: Settings | None = None) -> int:
    """Serve a project until told to stop; return the exit code. Raises `UserError` for what must be put right first."""
    settings = settings or Settings()
    where = platform.load()
    folder = platform.project_folder(project)
    declared = Declared.read(folder)
    spec = declared.spec
    guard = tokens_of(tokens, host)
    model = model_of(spec.llm, where.llms)
    listener = listen(host, port)
    scratch = Path(tempfile.mkdtemp(prefix=f"orrery-serve-{os.getpid()}-"))
    try:
        service = Service(
            project=project,
            spec=spec,
            declared=declared,
            store=Store(where.store),
            opener=RagOpener(spec, where.qdrant, settings.threads, folder),
            scratch=scratch,
            tokens=guard,
            model=model,
            settings=settings,
        )
        server = make(service, host)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        log.get().info("listening", url=url, project=project, model=service.answering.model_name)
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(run(server, service, listener))
        log.get().info("stopped")
    finally:
        listener.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return 0
