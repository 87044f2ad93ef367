"""One watch for all: nothing missed, nothing told twice, whatever the API server does in between."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from kubernetes_asyncio.client import ApiClient
from kubernetes_asyncio.client.exceptions import ApiException

from orrery.cluster import watch
from orrery.cluster.watch import Api, Change, Subscription, events_of, follow_log, roomy, subscribe

Doc = dict[str, Any]
SOON = 30.0  # seconds; only a test that fails waits for so long


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_S", 0.01)
    monkeypatch.setattr(watch, "LONGEST_S", 0.05)
    monkeypatch.setattr(watch, "CONFIRM_S", 0.05)
    monkeypatch.setattr(watch, "OVER_S", 0.1)


def on_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test on an event loop, with a server; all that it started must be over at its end."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        async def main() -> None:
            async with asyncio.timeout(2 * SOON):
                server = Server()
                await server.start()
                try:
                    await test(server=server, **given)
                finally:
                    await server.stop()
                mine = asyncio.current_task()
                left = [t for t in asyncio.all_tasks() if t is not mine and "watch" in t.get_name()]
                assert not left, left
                assert server.clients == 0, "a client is still open"
                assert not watch._shared.get(asyncio.get_running_loop())

        asyncio.run(main())
        gc.collect()

    run.__signature__ = _without_server(test)  # type: ignore[attr-defined]
    return run


def _without_server(test: Callable[..., Any]) -> Any:
    import inspect

    told = inspect.signature(test)
    return told.replace(parameters=[p for p in told.parameters.values() if p.name != "server"])


class Server:
    """Pods as an API server lists and watches them, and all that can go wrong with that."""

    def __init__(self) -> None:
        self.pods: dict[str, Doc] = {}
        self.version = 100
        self.history: list[tuple[int, str, Doc]] = []
        self.oldest = 0  # what a watch may go on from
        self.changed = asyncio.Event()
        self.asked: Counter[str] = Counter()
        self.watched_from: list[str] = []
        self.refusals: list[tuple[str, int, dict[str, str]]] = []  # of what, status, headers
        self.token = "first"
        self.streams: list[web.Request] = []
        self.ended: list[web.Request] = []
        self.held = False  # the watch tells nothing for now
        self.half = False  # the next watch event is cut in its middle
        self.expired_by = "event"
        self.page = 10_000
        self.events: list[Doc] = []
        self.logs: list[bytes | str] = []  # of the one pod; a str: how the body ends ("end", "cut", "hang")
        self.since: list[str] = []
        self.clients = 0
        self.opened = 0

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/ns/pods", self._pods)
        app.router.add_get("/api/v1/namespaces/ns/pods/{name}/log", self._log)
        app.router.add_get("/api/v1/namespaces/ns/events", self._events)
        app.router.add_post("/api/v1/namespaces/ns/pods", self._create)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def stop(self) -> None:
        self.cut()
        await self.runner.cleanup()

    # -- what a test does with it --------------------------------------------------------------------

    def put(self, unit: str, name: str = "", uid: str = "", **status: Any) -> Doc:
        """Create or change a pod."""
        name = name or unit
        self.version += 1
        kind = "MODIFIED" if name in self.pods else "ADDED"
        uid = uid or (self.pods[name]["metadata"]["uid"] if name in self.pods else f"uid-{name}-{self.version}")
        meta = {
            "name": name, "uid": uid, "namespace": "ns", "resourceVersion": str(self.version),
            "labels": {"orrery/unit": unit}, "managedFields": [{"manager": "kubelet"}],
        }  # fmt: skip
        doc = {"metadata": meta, "status": {"phase": "Running", **status}}
        self.pods[name] = doc
        self._tell(kind, doc)
        return doc

    def remove(self, name: str) -> None:
        self.version += 1
        doc = self.pods.pop(name)
        doc = {**doc, "metadata": {**doc["metadata"], "resourceVersion": str(self.version)}}
        self._tell("DELETED", doc)

    def bookmark(self) -> None:
        self.version += 10
        self._tell("BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}})

    def _tell(self, kind: str, doc: Doc) -> None:
        self.history.append((self.version, kind, doc))
        self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def cut(self) -> None:
        """Tear off every connection that streams."""
        for request in list(self.streams):
            if request.transport is not None:
                request.transport.abort()

    def forget(self) -> None:
        """Let every version be too old to go on from."""
        self.version += 1
        self.oldest = self.version

    def refuse(self, what: str, *statuses: int, **headers: str) -> None:
        self.refusals += [(what, status, headers) for status in statuses]

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[ApiClient]:
        """Open a client with the token of now, as a kubeconfig gives it."""
        configuration = roomy()
        configuration.host = self.url
        configuration.api_key = {"BearerToken": f"Bearer {self.token}"}
        self.opened += 1
        self.clients += 1
        async with ApiClient(configuration=configuration) as client:
            try:
                yield client
            finally:
                self.clients -= 1

    def subscribe(self, unit: str) -> contextlib.AbstractAsyncContextManager[Subscription]:
        return subscribe("key", self.connect, "ns", unit)

    # -- the wire ------------------------------------------------------------------------------------

    def _refusal(self, request: web.Request, what: str) -> web.Response | None:
        self.asked[what] += 1
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"kind": "Status", "code": 401, "message": "Unauthorized"}, status=401)
        for each in self.refusals:
            if each[0] == what:
                self.refusals.remove(each)
                told = {"kind": "Status", "code": each[1], "message": "the server is unwell"}
                return web.json_response(told, status=each[1], headers=each[2])
        return None

    async def _pods(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        if query.get("watch") == "true":
            return await self._watch(request)
        label = query["labelSelector"]
        if (refusal := self._refusal(request, "list" if label == "orrery/unit" else "confirm")) is not None:
            return refusal
        found = [
            p
            for p in self.pods.values()
            if label in ("orrery/unit", f"orrery/unit={p['metadata']['labels']['orrery/unit']}")
        ]
        at, size = int(query.get("continue", "0")), min(self.page, int(query.get("limit", "100000")))
        meta = {"resourceVersion": str(self.version)} | ({"continue": str(at + size)} if at + size < len(found) else {})
        return web.json_response({"kind": "PodList", "metadata": meta, "items": found[at : at + size]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        assert request.query["labelSelector"] == "orrery/unit"
        assert request.query["allowWatchBookmarks"] == "true"
        assert 200 < int(request.query["timeoutSeconds"]) < 400
        if (refusal := self._refusal(request, "watch")) is not None:
            return refusal
        at = int(request.query["resourceVersion"])
        self.watched_from.append(str(at))
        gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
        if at < self.oldest and self.expired_by == "status":
            return web.json_response(gone, status=410)
        response = web.StreamResponse()
        await response.prepare(request)
        self.streams.append(request)
        try:
            if at < self.oldest:
                await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
                return response
            while True:
                changed = self.changed
                for version, kind, doc in [] if self.held else self.history:
                    if version > at:
                        line = json.dumps({"type": kind, "object": doc}).encode() + b"\n"
                        if self.half:
                            self.half = False
                            await response.write(line[: len(line) // 2])
                            await asyncio.sleep(0.05)
                            self.cut()
                            return response
                        await response.write(line)
                        at = version
                if request.transport is None or request.transport.is_closing() or any(request is r for r in self.ended):
                    return response
                await changed.wait()
        except ConnectionError:
            return response
        finally:
            self.streams.remove(request)

    def end_watches(self) -> None:
        """End every watch as the server does after `timeoutSeconds`: cleanly."""
        self.ended += self.streams
        self.wake()

    async def _create(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal(request, "create")) is not None:
            return refusal
        return web.json_response(self.put((await request.json())["unit"]), status=201)

    async def _events(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal(request, "events")) is not None:
            return refusal
        assert request.query["fieldSelector"] == "involvedObject.kind=Pod,involvedObject.name=p"
        return web.json_response({"items": self.events})

    async def _log(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refusal(request, "log")) is not None:
            return refusal
        query = request.query
        assert (query["follow"], query["timestamps"], query["container"]) == ("true", "true", "base")
        since = query.get("sinceTime", "")
        self.since.append(since)
        response = web.StreamResponse()
        await response.prepare(request)
        self.streams.append(request)
        try:
            for part in list(self.logs):
                if isinstance(part, bytes):
                    # Whole seconds, as the kubelet knows no finer ones.
                    if not since or part[:19].decode() >= since[:19]:
                        await response.write(part)
                    continue
                self.logs.remove(part)
                if part == "hang":
                    await asyncio.sleep(SOON)
                elif part == "cut":
                    await asyncio.sleep(0.02)
                    self.cut()
                return response
        except ConnectionError:
            pass
        finally:
            self.streams.remove(request)
        return response


def told(changes: list[Change]) -> list[tuple[str, str]]:
    return [(c.kind, c.pod["metadata"]["name"]) for c in changes]


def versions(changes: list[Change]) -> list[str]:
    return [c.pod["metadata"]["resourceVersion"] for c in changes]


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON):
        while not true():
            await asyncio.sleep(0.005)


# -- who is told what ---------------------------------------------------------------------------------


@on_a_loop
async def test_two_hundred_subscribers_are_one_list_and_one_watch(server: Server) -> None:
    async def one(number: int) -> list[str]:
        async with server.subscribe(f"unit-{number}") as mine:
            heard = [c.pod["status"]["phase"] for c in await mine.next(SOON)]
            await barrier.wait()
            while heard[-1] != "Succeeded":
                changes = await mine.next(SOON)
                assert {name for _, name in told(changes)} == {f"unit-{number}"}
                heard += [c.pod["status"]["phase"] for c in changes]
            return heard

    barrier = asyncio.Barrier(201)
    for n in range(200):
        server.put(f"unit-{n}", phase="Pending")
    tasks = [asyncio.create_task(one(n)) for n in range(200)]
    await barrier.wait()
    for phase in ("Running", "Succeeded"):
        for n in range(200):
            server.put(f"unit-{n}", phase=phase)
    assert await asyncio.gather(*tasks) == [["Pending", "Running", "Succeeded"]] * 200
    assert server.asked == {"list": 1, "watch": 1}
    assert server.opened == 1


@on_a_loop
async def test_nothing_there_then_something(server: Server) -> None:
    async with server.subscribe("a") as a:
        assert not a.absent, "nobody knows yet"
        assert await a.next(SOON) == []
        assert a.absent
        assert await a.next(0.01) == []
        server.put("a")
        assert told(await a.next(SOON)) == [("seen", "a")]
        assert not a.absent
        server.remove("a")
        assert told(await a.next(SOON)) == [("gone", "a")]
        assert a.absent
    assert server.asked == {"list": 1, "watch": 1}


@on_a_loop
async def test_who_comes_later_is_told_what_is_known(server: Server) -> None:
    server.put("b")
    async with server.subscribe("a") as a:
        await a.next(SOON)
        async with server.subscribe("b") as b, server.subscribe("b") as again:
            assert told(await b.next(SOON)) == told(await again.next(SOON)) == [("seen", "b")]
            server.put("b", phase="Failed")
            assert told(await b.next(SOON)) == told(await again.next(SOON)) == [("seen", "b")]
    assert server.asked == {"list": 1, "watch": 1}


@on_a_loop
async def test_a_watch_that_is_late_does_not_make_a_new_pod_absent(server: Server) -> None:
    async with server.subscribe("a") as a:
        await a.next(SOON)
        server.held = True
        server.put("b")
        async with server.subscribe("b") as b:
            assert told(await b.next(SOON)) == [("seen", "b")]
            assert not b.absent
            server.remove("b")
            server.held = False
            server.wake()
            heard: list[tuple[str, str]] = []
            while not heard or heard[-1][0] != "gone":
                heard += told(await b.next(SOON))
            assert b.absent
    assert server.asked["confirm"] == 1


@on_a_loop
async def test_who_comes_later_for_nothing_asks_once(server: Server) -> None:
    async with server.subscribe("a") as a:
        await a.next(SOON)
        async with server.subscribe("b") as b:
            server.refuse("confirm", 500, 429)
            assert await b.next(SOON) == []
            assert b.absent
    assert server.asked["confirm"] == 3


@on_a_loop
async def test_a_pod_that_ends_while_it_is_asked_for_is_no_ghost(server: Server) -> None:
    """The answer to the question is older than what the watch has told meanwhile."""
    async with server.subscribe("a") as a:
        await a.next(SOON)
        shared = watch._shared[asyncio.get_running_loop()]["key", "ns"].watch
        ask = shared.api.ask

        async def late(*args: Any, **kwargs: Any) -> Doc:
            found = await ask(*args, **kwargs)
            server.held = False
            server.remove("b")
            await until(lambda: b.count >= 2)
            return found

        server.held = True
        server.put("b")
        async with server.subscribe("b") as b:
            shared.api.ask = late  # type: ignore[method-assign]
            assert told(await b.next(SOON)) == [("seen", "b"), ("gone", "b")]
            await asyncio.sleep(0.1)
            assert await b.next(0.01) == []
            assert b.absent


@on_a_loop
async def test_pods_come_in_pages(server: Server) -> None:
    server.page = 3
    for n in range(10):
        server.put("a", f"a-{n}")
    async with server.subscribe("a") as a:
        assert len(await a.next(SOON)) == 10
        await until(lambda: server.streams)
    assert server.asked == {"list": 4, "watch": 1}


@on_a_loop
async def test_documents_are_kept_without_their_managed_fields(server: Server) -> None:
    server.put("a")
    async with server.subscribe("a") as a:
        (change,) = await a.next(SOON)
        assert "managedFields" not in change.pod["metadata"]


@on_a_loop
async def test_time_is_up(server: Server) -> None:
    server.refuse("list", *[500] * 1000)
    async with server.subscribe("a") as a:
        assert await a.next(0.05) == []
        assert not a.absent
        await until(lambda: a.trouble)
        assert "500 the server is unwell" in a.trouble
        server.refusals.clear()
        assert await a.next(SOON) == []
        assert a.absent


# -- the watch is torn off ----------------------------------------------------------------------------


@on_a_loop
async def test_nothing_is_missed_nor_repeated(server: Server) -> None:
    async with server.subscribe("a") as a:
        await a.next(SOON)
        expected = []
        heard: list[str] = []
        for number, tear in enumerate([server.cut, server.end_watches, lambda: setattr(server, "half", True)] * 4):
            expected.append(server.put("a")["metadata"]["resourceVersion"])
            if number % 2:
                while heard != expected:
                    heard += versions(await a.next(SOON))
            tear()
            expected.append(server.put("a")["metadata"]["resourceVersion"])
        while heard != expected:
            heard += versions(await a.next(SOON))
            assert heard == expected[: len(heard)]
    assert server.asked["list"] == 1


@on_a_loop
async def test_bookmarks_say_where_to_go_on(server: Server) -> None:
    async with server.subscribe("a") as a:
        await a.next(SOON)
        await until(lambda: server.streams)
        server.bookmark()
        newest = server.version
        server.put("a")
        await a.next(SOON)
        server.bookmark()
        server.put("b")
        await asyncio.sleep(0.1)
        server.cut()
        await until(lambda: len(server.watched_from) == 2)
    assert int(server.watched_from[1]) > newest


@pytest.mark.parametrize("by", ["event", "status"])
@on_a_loop
async def test_what_vanished_meanwhile_is_told(server: Server, by: str) -> None:
    server.expired_by = by
    for unit in ("stays", "changes", "vanishes", "again"):
        server.put(unit)
    names = ("stays", "changes", "vanishes", "again", "new")
    async with contextlib.AsyncExitStack() as stack:
        subs = {n: await stack.enter_async_context(server.subscribe(n)) for n in names}
        for sub in subs.values():
            await sub.next(SOON)
        await until(lambda: server.streams)
        server.held = True
        first = server.pods["again"]["metadata"]["uid"]
        server.remove("vanishes")
        server.remove("again")
        server.put("again")
        server.put("changes", phase="Failed")
        server.put("new")
        server.forget()
        server.held = False
        server.cut()
        assert told(await subs["vanishes"].next(SOON)) == [("gone", "vanishes")]
        assert subs["vanishes"].absent
        assert told(await subs["changes"].next(SOON)) == [("seen", "changes")]
        assert told(await subs["new"].next(SOON)) == [("seen", "new")]
        gone, seen = await subs["again"].next(SOON)
        assert (gone.kind, gone.pod["metadata"]["uid"]) == ("gone", first)
        assert (seen.kind, seen.pod["metadata"]["uid"]) == ("seen", server.pods["again"]["metadata"]["uid"])
        assert await subs["stays"].next(0.1) == []
    assert server.asked["list"] == 2


@on_a_loop
async def test_a_list_that_expires_between_two_pages_begins_anew(server: Server) -> None:
    server.page = 1
    server.put("a", "a-1")
    server.put("a", "a-2")
    server.refuse("list", 410)
    async with server.subscribe("a") as a:
        assert len(await a.next(SOON)) == 2


@on_a_loop
async def test_a_connection_that_is_dead_without_a_word(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENT_S", 0.1)
    async with server.subscribe("a") as a:
        await a.next(SOON)
        server.held = True
        await until(lambda: server.asked["watch"] >= 3)
        server.put("a")
        server.held = False
        assert told(await a.next(SOON)) == [("seen", "a")]
    assert server.asked["list"] == 1


# -- the server is unwell -----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["list", "watch"])
@on_a_loop
async def test_a_server_that_is_unwell_for_a_while(server: Server, what: str, caplog: pytest.LogCaptureFixture) -> None:
    server.refuse(what, 500, 503, 403)
    server.refuse(what, 429, **{"Retry-After": "0"})
    server.put("a")
    with caplog.at_level(logging.INFO, "orrery.cluster"):
        async with server.subscribe("a") as a:
            assert told(await a.next(SOON)) == [("seen", "a")]
            server.put("a")
            assert told(await a.next(SOON)) == [("seen", "a")]
            assert a.trouble == ""
    assert server.asked[what] == 5
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"], "once, and once when it is over"


@on_a_loop
async def test_it_waits_as_long_as_it_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(watch, "LONGEST_S", 30.0)
    monkeypatch.setattr(watch.asyncio, "sleep", noted)
    server.refuse("list", 429, **{"Retry-After": "7"})
    server.refuse("list", 429, **{"Retry-After": "86400"})
    server.refuse("list", 429, **{"Retry-After": "Thu, 01 Jan 2027"})
    async with server.subscribe("a") as a:
        await a.next(SOON)
    assert waits[:2] == [7.0, 60.0]
    assert 0 < waits[2] < 1


@on_a_loop
async def test_a_token_that_expires(server: Server) -> None:
    async with server.subscribe("a") as a:
        await a.next(SOON)
        old = a.client
        server.token = "second"
        server.cut()
        server.put("a")
        assert told(await a.next(SOON)) == [("seen", "a")]
        assert a.client is not old
        assert (server.opened, server.clients) == (2, 1)
        # The watch lives on; who asks for something else finds the token expired first.
        server.token = "third"
        assert (await a.api.ask("POST", "/api/v1/namespaces/ns/pods", body={"unit": "b"}))["metadata"]["name"] == "b"
        assert server.opened == 3
        # The watch still reads from the client before.
        server.put("a")
        assert told(await a.next(SOON)) == [("seen", "a")]


@on_a_loop
async def test_many_find_the_token_expired_at_once(server: Server) -> None:
    async with server.subscribe("a") as a:
        await a.next(SOON)
        server.token = "second"
        asks = [a.api.ask("POST", "/api/v1/namespaces/ns/pods", body={"unit": f"b{n}"}) for n in range(20)]
        assert len(await asyncio.gather(*asks)) == 20
        assert server.opened == 2


@on_a_loop
async def test_a_token_that_is_refused_for_good(server: Server) -> None:
    connect = server.connect

    @contextlib.asynccontextmanager
    async def stale() -> AsyncIterator[ApiClient]:
        async with connect() as client:
            client.configuration.api_key = {"BearerToken": "Bearer stale"}
            yield client

    server.connect = stale  # type: ignore[method-assign]
    async with server.subscribe("a") as a:
        await until(lambda: a.trouble)
        assert "401" in a.trouble
        assert await a.next(0.01) == []
        with pytest.raises(ApiException, match="Unauthorized"):
            await a.api.ask("GET", "/api/v1/namespaces/ns/events")
        server.connect = connect  # type: ignore[method-assign]
    assert server.clients == 0


@on_a_loop
async def test_a_connection_that_cannot_be_made(server: Server) -> None:
    failures = iter([RuntimeError("no such connection"), OSError("no route"), ValueError("bad kubeconfig")])

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[ApiClient]:
        if (failure := next(failures, None)) is not None:
            raise failure
        async with server.connect() as client:
            yield client

    server.put("a")
    async with subscribe("key", connect, "ns", "a") as a:
        with pytest.raises(ConnectionError):
            _ = a.client
        assert told(await a.next(SOON)) == [("seen", "a")]
        assert a.client is not None


# -- who comes and goes -------------------------------------------------------------------------------


@on_a_loop
async def test_one_that_does_not_listen_holds_nobody_up(server: Server) -> None:
    async with server.subscribe("a") as deaf, server.subscribe("a") as a, server.subscribe("b") as b:
        for sub in (a, b):
            await sub.next(SOON)
        for _ in range(500):
            server.put("a")
        server.put("b")
        assert told(await b.next(SOON)) == [("seen", "b")]
        heard = 0
        while heard < 500:
            heard += len(await a.next(SOON))
        assert len(await deaf.next(SOON)) == 500, "and it misses nothing"


@on_a_loop
async def test_the_last_one_closes(server: Server) -> None:
    for _ in range(3):
        async with server.subscribe("a") as a:
            async with server.subscribe("b") as b:
                await b.next(SOON)
            await a.next(SOON)
            await until(lambda: server.streams)
            assert server.clients == 1
        assert server.clients == 0
        (stream,) = server.streams
        await until(lambda: stream.transport is None or stream.transport.is_closing())  # noqa: B023
        server.wake()
        await until(lambda: not server.streams)
    assert server.opened == 3


@on_a_loop
async def test_one_that_is_cancelled_takes_nobody_with_it(server: Server) -> None:
    async def wait(unit: str) -> None:
        async with server.subscribe(unit) as mine:
            while True:
                await mine.next(None)

    tasks = [asyncio.create_task(wait(f"u{n}")) for n in range(5)]
    async with server.subscribe("a") as a:
        await a.next(SOON)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.put("a")
        assert told(await a.next(SOON)) == [("seen", "a")]
    assert server.asked["watch"] == 1


@on_a_loop
async def test_whoever_leaves_at_once(server: Server) -> None:
    for _ in range(5):
        async with server.subscribe("a"):
            await asyncio.sleep(0)
    assert server.clients == 0


@on_a_loop
async def test_connections_and_namespaces_have_watches_of_their_own(server: Server) -> None:
    server.put("a")
    async with server.subscribe("a") as a, subscribe("other", server.connect, "ns", "a") as other:
        assert told(await a.next(SOON)) == told(await other.next(SOON)) == [("seen", "a")]
        await until(lambda: len(server.streams) == 2)
    assert server.asked == {"list": 2, "watch": 2}


@on_a_loop
async def test_what_the_watch_logs_is_nobodys_tasks(server: Server) -> None:
    """Airflow's triggerer finds a line's task by the context that it is logged in."""
    task_of = contextvars.ContextVar("task_of", default="")
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(task_of.get())

    handler = Handler()
    logging.getLogger("orrery.cluster").addHandler(handler)
    try:
        task_of.set("mine")
        server.refuse("list", 500, 500)
        async with server.subscribe("a") as a:
            await a.next(SOON)
    finally:
        logging.getLogger("orrery.cluster").removeHandler(handler)
    assert found
    assert set(found) == {""}


@on_a_loop
async def test_two_hundred_logs_at_once_leave_room_for_the_watch(server: Server) -> None:
    """A client that holds 100 connections, as it does unless told otherwise, would be full."""
    server.logs = [b"2026-11-29T10:00:00.1Z line\n"]
    server.logs += ["hang"] * 200
    lines: list[str] = []
    async with server.subscribe("a") as a:
        await a.next(SOON)
        logs = [asyncio.create_task(follow_log(a.api, "ns", "p", lines.append, container="base")) for _ in range(200)]
        await until(lambda: len(lines) == 200)
        server.cut()
        server.put("a")
        assert told(await a.next(SOON)) == [("seen", "a")]
        for task in logs:
            task.cancel()
        await asyncio.gather(*logs, return_exceptions=True)


# -- logs ---------------------------------------------------------------------------------------------


async def followed(server: Server, over: Callable[[], bool] | None = None, pod: str = "p") -> list[str]:
    api, lines = Api(server.connect), list[str]()
    try:
        await follow_log(api, "ns", pod, lines.append, container="base", over=over)
    finally:
        await api.close()
    return lines


@on_a_loop
async def test_a_log_to_its_end(server: Server) -> None:
    server.logs = [
        b'2026-11-29T10:00:00.123456789Z {"event": "a"}\n2026-11-29T10:00:00.2Z  b \n',
        b"2026-11-29T10:00:01Z c",
        "end",
    ]
    assert await followed(server, over=lambda: True) == ['{"event": "a"}', " b ", "c"]
    assert server.asked == {"log": 1}


@on_a_loop
async def test_without_a_word_from_the_pod_the_log_is_asked_again(server: Server) -> None:
    server.logs = [b"2026-11-29T10:00:00.1Z a\n", "end", "end"]
    assert await followed(server) == ["a"]
    assert server.asked == {"log": 2}


@pytest.mark.parametrize("tear", ["cut", "end"])
@on_a_loop
async def test_a_torn_log_goes_on_where_it_was(server: Server, tear: str) -> None:
    """Lines of one second, and of one moment, and of another time zone."""
    server.logs = [
        b"2026-11-29T10:00:00.000000001Z a\n", b"2026-11-29T10:00:00.5Z b\n", b"2026-11-29T10:00:00.5Z b\n", tear,
        b"2026-11-29T10:00:00.5Z b\n", b"2026-11-29T10:00:00.500000001Z c\n", tear,
        b"2026-11-29T12:00:01.25+02:00 d\n", tear, b"2026-11-29T10:00:01.250Z e\n", "end",
    ]  # fmt: skip
    ends = sum(isinstance(part, str) for part in server.logs)
    lines = await followed(server, over=lambda: len(server.since) >= ends)
    assert lines == ["a", "b", "b", "b", "c", "d", "e"]
    assert server.since[:3] == ["", "2026-11-29T10:00:00Z", "2026-11-29T10:00:00Z"]


@on_a_loop
async def test_a_log_before_its_container_has_started(server: Server) -> None:
    server.refuse("log", 400, 500, 502, 429)
    server.logs = [b"2026-11-29T10:00:00Z a\n", "end"]
    assert await followed(server, over=lambda: server.asked["log"] == 5) == ["a"]


@pytest.mark.parametrize(("status", "warned"), [(404, False), (403, True)])
@on_a_loop
async def test_a_log_that_cannot_be_read(
    server: Server, status: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server.refuse("log", status)
    assert await followed(server) == []
    assert bool(caplog.records) == warned


@on_a_loop
async def test_a_node_that_gives_no_log_any_more(server: Server) -> None:
    server.refuse("log", *[500] * 100)
    assert await followed(server, over=lambda: True) == []
    assert server.asked["log"] < 10


@on_a_loop
async def test_a_log_outlives_its_token(server: Server) -> None:
    server.logs = [b"2026-11-29T10:00:00Z a\n", "cut", b"2026-11-29T10:00:01Z b\n", "end"]
    api, lines = Api(server.connect), list[str]()

    def on_line(line: str) -> None:
        lines.append(line)
        server.token = "second"

    await follow_log(api, "ns", "p", on_line, container="base", over=lambda: len(lines) > 1)
    await api.close()
    assert lines == ["a", "b"]


@on_a_loop
async def test_a_log_ends_with_its_connection(server: Server) -> None:
    server.logs = [b"2026-11-29T10:00:00Z a\n", "hang"]
    api, lines = Api(server.connect), list[str]()
    task = asyncio.create_task(follow_log(api, "ns", "p", lines.append, container="base"))
    await until(lambda: lines)
    await api.close()
    server.cut()
    await asyncio.wait_for(task, SOON)


@on_a_loop
async def test_lines_of_any_length_and_kind(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LONGEST_LINE", 1 << 16)
    bar = b"2026-11-29T10:00:01Z " + b"=" * (1 << 18)
    server.logs = [b"2026-11-29T10:00:00Z \xff\xfe\n\nno time\n", bar, "end"]
    lines = await followed(server, over=lambda: True)
    assert lines[:2] == ["\ufffd\ufffd", "no time"]
    assert "".join(lines[2:]) == "=" * (1 << 18)
    assert len(lines) > 3, "it was kept whole, however long it grew"


@on_a_loop
async def test_an_error_of_the_reader_is_its_own(server: Server) -> None:
    server.logs = [b"2026-11-29T10:00:00Z a\n", "end"]
    api = Api(server.connect)

    def on_line(line: str) -> None:
        raise KeyError(line)

    with pytest.raises(KeyError):
        await follow_log(api, "ns", "p", on_line, container="base")
    await api.close()


# -- events -------------------------------------------------------------------------------------------


@on_a_loop
async def test_events_in_their_order(server: Server) -> None:
    server.events = [
        {"reason": "Killing", "message": "Stopping container base", "lastTimestamp": "2026-11-29T10:05:00Z"},
        {"reason": "TaintManagerEviction", "message": "Marking for deletion Pod ns/p", "lastTimestamp": None, "eventTime": "2026-11-29T10:04:59.5Z"},
        {"reason": "Scheduled", "firstTimestamp": "2026-11-29T10:00:00Z"},
        {},
    ]  # fmt: skip
    api = Api(server.connect)
    assert await events_of(api, "ns", "p") == [
        "?: ", "Scheduled: ", "TaintManagerEviction: Marking for deletion Pod ns/p", "Killing: Stopping container base",
    ]  # fmt: skip
    await api.close()


@on_a_loop
async def test_events_that_nobody_may_read(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.refuse("events", 403)
    api = Api(server.connect)
    assert await events_of(api, "ns", "p") == []
    await api.close()
    assert "403" in caplog.text


# -- one connection -----------------------------------------------------------------------------------


@on_a_loop
async def test_a_refusal_keeps_the_servers_words(server: Server) -> None:
    server.refuse("create", 403)
    api = Api(server.connect)
    with pytest.raises(ApiException) as refused:
        await api.ask("POST", "/api/v1/namespaces/ns/pods", body={"unit": "a"})
    assert (refused.value.status, refused.value.reason) == (403, "the server is unwell")
    assert json.loads(str(refused.value.body))["kind"] == "Status"
    await api.close()
    with pytest.raises(ConnectionError):
        await api.ask("GET", "/api/v1/namespaces/ns/pods", {"labelSelector": "orrery/unit"})


def test_pauses_grow_and_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert all(0.1 <= watch.pause(0) <= 0.2 for _ in range(20))
    assert all(15 <= watch.pause(n) <= 30 for n in (8, 20, 10**6))
