"""A Kubernetes API server for tests: the real wire protocol over HTTP, its objects in memory, its machines played.

    with Cluster(folder) as cluster:            # in a thread, with a loop of its own
        os.environ["AIRFLOW_CONN_CLUSTER"] = cluster.connection()
        ...
        cluster.nodes.drain("node-a")

`kubelet.py` runs containers as processes, `nodes.py` places pods and plays every way to lose one, `controllers.py` is
Jobs, quotas and garbage collection. README.md says what is not like a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from cluster import objects as o
from cluster.controllers import Controllers
from cluster.kubelet import Kubelet, Play
from cluster.nodes import Nodes
from cluster.objects import KINDS, NAMESPACES, PODS, Kind, Match, Object, Objects, Refused
from cluster.rbac import Asked, Rbac

T = TypeVar("T")
WATCH_S = 1800.0  # after so long the server ends a watch that asked for no time of its own
BOOKMARK_S = 60.0
NAMESPACE = "orrery"
STOP_S = 20.0


@dataclass
class Trouble:
    """What the next matching requests are answered with; code 0: the connection is cut."""

    code: int
    times: int
    pattern: re.Pattern[str]
    message: str
    reason: str


class Cluster:
    """The whole cluster. Its public methods may be called from any thread but its own."""

    def __init__(
        self,
        state: Path,
        *,
        venvs: Path | None = None,
        environment: Mapping[str, str] | None = None,
        pace: float = 1.0,
        play: Play | None = None,
        port: int = 0,
        namespaces: Iterable[str] = ("default", NAMESPACE),
    ) -> None:
        """`state`: a folder for logs and the pods' own folders. `venvs`: the images, `ORRERY_VENVS` or .venvs/.

        `environment` is given to every container beside what its pod says. `pace` multiplies the times that are the
        cluster's own (40 s until a node is missed, 60 s until its pods are collected, …), never what a pod asks for.
        `play`, a coroutine of a pod that returns an exit code, stands in for every container's process.
        """
        self.state, self.pace, self.port = state, pace, port
        self.url = ""
        self.requests: Counter[str] = Counter()
        self.asked: Counter[Asked] = Counter()
        self._troubles: list[Trouble] = []
        self._held: list[tuple[re.Pattern[str], asyncio.Event]] = []
        self._out_until = 0.0
        self._generation = 0  # of streams: who cuts them raises it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Event | None = None
        self._given = {"venvs": venvs, "environment": dict(environment or {}), "play": play}
        self._namespaces = tuple(namespaces)

    # -- life ------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on a loop of its own in a thread."""
        self.state.mkdir(parents=True, exist_ok=True)
        ready, failed = threading.Event(), list[BaseException]()

        def main() -> None:
            try:
                asyncio.run(self._serve(ready))
            except BaseException as e:
                failed.append(e)
                ready.set()

        self._thread = threading.Thread(target=main, name="cluster", daemon=True)
        self._thread.start()
        assert ready.wait(60), "the cluster did not start"
        if failed:
            raise failed[0]

    def stop(self) -> None:
        """End every container's process and stop listening."""
        if self._loop is not None and self._ended is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(STOP_S)
            assert not self._thread.is_alive(), "the cluster did not end"
            self._thread = None

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self.objects = Objects()
        self.rbac = Rbac(self.objects)
        for name in self._namespaces:
            self.objects.create(NAMESPACES, "", {"metadata": {"name": name}, "status": {"phase": "Active"}})
        self.kubelet = Kubelet(self, **self._given)
        self.controllers = Controllers(self)
        self.nodes = Nodes(self)
        self.objects.heard += [self.nodes.hear, self.controllers.hear, self.kubelet.hear]
        self.nodes.add_now("node-a")
        app = web.Application(client_max_size=4 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            self.port = runner.addresses[0][1]
            self.url = f"http://127.0.0.1:{self.port}"
            ready.set()
            await self._ended.wait()
        finally:
            self._cut()
            await self.nodes.close()
            await self.controllers.close()
            await self.kubelet.close()
            await runner.cleanup()

    # -- for tests -------------------------------------------------------------------------------

    def call(self, work: Coroutine[Any, Any, T], timeout: float = 60.0) -> T:
        """Do something in the cluster's thread, and wait for it."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def do(self, work: Callable[[], T]) -> T:
        """Do something short in the cluster's thread."""

        async def once() -> T:
            return work()

        return self.call(once())

    def kube_config(self, token: str = "") -> Object:
        """Return a kubeconfig of this cluster."""
        return {
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
            "users": [{"name": "test", "user": {"token": token} if token else {}}],
        }  # fmt: skip

    def connection(self, token: str = "") -> str:
        """Return an Airflow connection of this cluster, as AIRFLOW_CONN_<NAME> takes it."""
        return json.dumps({"conn_type": "kubernetes", "extra": {"kube_config": json.dumps(self.kube_config(token))}})

    def pods(self, labels: str = "", namespace: str = "") -> list[Object]:
        """Return the pods there are."""
        return self.do(lambda: self.objects.list(PODS, namespace, o.matcher(labels, "")))

    def pod(self, name: str, namespace: str = NAMESPACE) -> Object | None:
        return self.do(lambda: self.objects.find(PODS, namespace, name))

    def wait_for(self, there: Callable[[], T], what: str = "it", seconds: float = 60.0) -> T:
        """Return what is there, once it is."""
        deadline = time.monotonic() + seconds
        while not (found := there()):
            assert time.monotonic() < deadline, f"{what} never came"
            time.sleep(0.01)
        return found

    def wait_for_end(self, name: str, namespace: str = NAMESPACE) -> Object:
        """Return a pod once it has ended."""

        def over() -> Object | None:
            found = self.pod(name, namespace)
            return found if found and o.is_over(found) else None

        return self.wait_for(over, f"the end of {name}")  # type: ignore[return-value]

    def apply(self, *documents: Object) -> None:
        """Create or replace objects: quotas, priority classes, roles, secrets."""
        self.do(lambda: [self._apply(d) for d in documents])

    def _apply(self, document: Object) -> None:
        group, _, _ = document["apiVersion"].rpartition("/")
        kind = next((k for k in KINDS.values() if (k.group, k.name) == (group, document["kind"])), None)
        if kind is None:
            raise Refused(404, "NotFound", f"no matches for kind {document['kind']} of {document['apiVersion']}")
        meta = document["metadata"]
        namespace = meta.get("namespace", NAMESPACE) if kind.namespaced else ""
        if self.objects.find(kind, namespace, meta["name"]):
            self.objects.replace(kind, namespace, meta["name"], document)
        else:
            self.objects.create(kind, namespace, document)

    def token(self, account: str, namespace: str = NAMESPACE) -> str:
        """Return a service account's bearer token."""
        return self.do(lambda: self.rbac.token(namespace, account))

    def secure(self, on: bool = True) -> None:
        """Ask for a token from now on, and judge each request by the roles."""
        self.do(lambda: setattr(self.rbac, "on", on))

    def answer(self, code: int, pattern: str = "", *, times: int = 1, message: str = "", reason: str = "") -> None:
        """Answer the next requests whose `verb resource` matches with an error; code 0 cuts the connection."""
        trouble = Trouble(code, times, re.compile(pattern), message or "the server is unwell", reason)
        self.do(lambda: self._troubles.append(trouble))

    @contextlib.contextmanager
    def hold(self, pattern: str) -> Iterator[None]:
        """Do what the matching requests want, but keep their answers to the end of the block."""
        held = (re.compile(pattern), self.do(asyncio.Event))
        self.do(lambda: self._held.append(held))
        try:
            yield
        finally:
            self.do(lambda: (self._held.remove(held), held[1].set()))

    def outage(self, seconds: float) -> None:
        """Cut every connection, and take none for so long. What runs, runs on."""

        def begin() -> None:
            assert self._loop is not None
            self._out_until = self._loop.time() + seconds
            self._cut()

        self.do(begin)

    def cut(self) -> None:
        """Cut every watch and log that is being followed."""
        self.do(self._cut)

    def forget(self) -> None:
        """Compact: what a watch would go on from is too old (410); open watches are told so."""
        self.do(self.objects.forget)

    def _cut(self) -> None:
        self._generation += 1
        self.objects.wake()
        self.kubelet.wake()

    # -- one request -----------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert self._loop is not None
        if request.path.startswith("/_cluster/"):
            return await self._control(request)
        if self._loop.time() < self._out_until:
            return _dropped(request)
        try:
            asked, kind, sub = self._parse(request)
            self.requests[f"{asked.verb} {asked.resource}"] += 1
            self.asked[asked._replace(name="")] += 1
            if (trouble := self._trouble(asked)) is not None:
                if trouble.code == 0:
                    return _dropped(request)
                raise Refused(trouble.code, trouble.reason, trouble.message)
            self.rbac.check(self.rbac.user(request.headers.get("Authorization", "")), asked)
            answer = await self._do(request, asked, kind, sub)
            for pattern, over in self._held:
                if pattern.search(f"{asked.verb} {asked.resource}"):
                    await over.wait()
            return answer
        except Refused as e:
            headers = {"Retry-After": "1"} if e.code == 429 else {}
            return web.json_response(e.status(), status=e.code, headers=headers)

    def _trouble(self, asked: Asked) -> Trouble | None:
        for trouble in self._troubles:
            if trouble.times and trouble.pattern.search(f"{asked.verb} {asked.resource}"):
                trouble.times -= 1
                return trouble
        return None

    def _parse(self, request: web.Request) -> tuple[Asked, Kind | None, str]:
        parts = [p for p in request.path.split("/") if p]
        if parts[:1] == ["version"]:
            return Asked("get", "", "version", ""), None, ""
        if parts[:2] == ["api", "v1"]:
            group, rest = "", parts[2:]
        elif parts[:1] == ["apis"] and len(parts) > 3:
            group, rest = parts[1], parts[3:]
        else:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        namespace = ""
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, sub = [*rest, "", "", ""][:3]
        kind = KINDS.get((group, plural))
        if kind is None:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        watch = request.query.get("watch", "").lower() in ("1", "true")
        verbs = {"GET": "get" if name else "watch" if watch else "list", "POST": "create", "PUT": "update",
                 "PATCH": "patch", "DELETE": "delete" if name else "deletecollection"}  # fmt: skip
        verb = verbs.get(request.method)
        if verb is None:
            raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        return Asked(verb, group, f"{plural}/{sub}" if sub else plural, namespace, name), kind, sub

    async def _do(self, request: web.Request, asked: Asked, kind: Kind | None, sub: str) -> web.StreamResponse:
        if kind is None:
            return web.json_response({"major": "1", "minor": "32", "gitVersion": "v1.32.0"})
        namespace, name, query = asked.namespace, asked.name, request.query
        if sub == "log":
            return await self._log(request, namespace, name)
        body = await _body(request)
        if sub == "eviction":
            pod = self.objects.get(PODS, namespace, name)
            self.nodes.evict_now(pod, (body.get("deleteOptions") or {}).get("gracePeriodSeconds"))
            return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"}, status=201)
        match = o.matcher(query.get("labelSelector", ""), query.get("fieldSelector", ""))
        if asked.verb == "watch":
            return await self._watch(request, kind, namespace, match)
        if asked.verb == "list":
            return web.json_response(self._page(kind, namespace, match, query))
        if asked.verb == "get":
            return web.json_response(self.objects.get(kind, namespace, name))
        if asked.verb == "create":
            return web.json_response(self.controllers.create(kind, namespace, body), status=201)
        if asked.verb == "update":
            return web.json_response(self.objects.replace(kind, namespace, name, body))
        if asked.verb == "patch":
            return web.json_response(self._patch(request, kind, namespace, name, body))
        found = [self.objects.get(kind, namespace, name)] if name else self.objects.list(kind, namespace, match)
        options = {**dict(query), **body}
        deleted = [self.controllers.delete(kind, obj, options) for obj in found]
        if name and kind == PODS:
            return web.json_response(deleted[0])
        return web.json_response({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

    def _patch(self, request: web.Request, kind: Kind, namespace: str, name: str, body: Any) -> Object:
        found = self.objects.get(kind, namespace, name)
        if "json-patch" in request.headers.get("Content-Type", ""):
            new = o.patched(found, body)
        else:
            new = o.merged(found, body)
        return self.objects.replace(kind, namespace, name, new)

    def _page(self, kind: Kind, namespace: str, match: Match, query: Mapping[str, str]) -> Object:
        found = self.objects.list(kind, namespace, match)
        meta: Object = {"resourceVersion": str(self.objects.version)}
        first, limit = int(query.get("continue") or 0), int(query.get("limit") or 0)
        if limit and len(found) > first + limit:
            meta |= {"continue": str(first + limit), "remainingItemCount": len(found) - first - limit}
        items = found[first : first + limit] if limit else found[first:]
        if "." not in kind.group or kind.group.endswith(".k8s.io"):
            # In a list of the API's own kinds an object does not say what it is; one of a custom kind does.
            items = [{k: v for k, v in item.items() if k not in ("kind", "apiVersion")} for item in items]
        return {"kind": f"{kind.name}List", "apiVersion": kind.api_version, "metadata": meta, "items": items}

    async def _watch(self, request: web.Request, kind: Kind, namespace: str, match: Match) -> web.StreamResponse:
        assert self._loop is not None
        query, generation = request.query, self._generation
        end = self._loop.time() + float(query.get("timeoutSeconds") or WATCH_S)
        bookmarks = query.get("allowWatchBookmarks", "").lower() in ("1", "true")
        asked = query.get("resourceVersion", "")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)

        async def tell(type_: str, obj: Object) -> None:
            await response.write(json.dumps({"type": type_, "object": obj}).encode() + b"\n")

        async def mark() -> None:
            if bookmarks:
                seen = {
                    "metadata": {"resourceVersion": str(version)},
                    "kind": kind.name,
                    "apiVersion": kind.api_version,
                }
                await tell("BOOKMARK", seen)

        with contextlib.suppress(ConnectionError):
            if asked in ("", "0"):
                version = self.objects.version
                for obj in self.objects.list(kind, namespace, match):
                    await tell("ADDED", obj)
            else:
                version = int(asked)
            marked = self._loop.time()
            while True:
                try:
                    changes = list(self.objects.since(version, kind, namespace))
                except Refused as e:
                    await tell("ERROR", e.status())
                    break
                version = self.objects.version
                for change in changes:
                    if (seen := o.as_seen(change, match)) is not None:
                        await tell(*seen)
                if self._generation != generation:
                    return _dropped(request, response)
                if version != self.objects.version:
                    continue
                left = end - self._loop.time()
                if left <= 0:
                    await mark()
                    break
                if self._loop.time() - marked > max(BOOKMARK_S * self.pace, 0.2):
                    await mark()
                    marked = self._loop.time()
                await self.objects.news(min(left, max(BOOKMARK_S * self.pace, 0.2)))
                # A reader that has gone is noticed by writing; ask the connection as well.
                if request.transport is None or request.transport.is_closing():
                    return response
            await response.write_eof()
        return response

    async def _log(self, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
        query, generation = request.query, self._generation
        lines = self.kubelet.log(self.objects.get(PODS, namespace, name), query)
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            async for line in lines:
                if self._generation != generation:
                    return _dropped(request, response)
                if request.transport is None or request.transport.is_closing():
                    return response
                if line:
                    await response.write(line)
            await response.write_eof()
        return response

    async def _control(self, request: web.Request) -> web.StreamResponse:
        """GET /_cluster/requests|pods; POST /_cluster/<failure> with its arguments as JSON."""
        name = request.path.removeprefix("/_cluster/")
        if request.method == "GET" and name == "requests":
            return web.json_response(dict(self.requests))
        if request.method == "GET" and name == "pods":
            return web.json_response(self.objects.list(PODS))
        body = await _body(request)
        try:
            if name == "apply":
                for document in body["documents"]:
                    self._apply(document)
                return web.json_response({})
            if request.method == "POST" and name in self.nodes.failures:
                told = self.nodes.failures[name](**body)
                if asyncio.iscoroutine(told):
                    await told
                return web.json_response({})
        except Refused as e:
            return web.json_response(e.status(), status=e.code)
        except (TypeError, KeyError) as e:
            return web.json_response({"message": f"{type(e).__name__}: {e}"}, status=400)
        known = ", ".join(sorted(self.nodes.failures))
        return web.json_response({"message": f"there is no {name!r}; known: {known}"}, status=404)


async def _body(request: web.Request) -> Any:
    raw = await request.read()
    if not raw:
        return {}
    try:
        return json.loads(raw)
    except ValueError:
        raise Refused(400, "BadRequest", "the object provided is unrecognized") from None


def _dropped(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Cut the connection, as a server that is killed."""
    if request.transport is not None:
        request.transport.abort()
    return response or web.Response()
