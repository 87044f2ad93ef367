"""One watch of a namespace's pods for all who wait for one: a list, then what changes, over one connection.

Whoever waits for a unit's pods subscribes to it; the first one opens the watch, the last one closes it. It lives on the
event loop of its subscribers. What keeps the API server from answering is logged and borne: after a pause it goes on
where it was, and where that is too old (410) it lists again and tells what has vanished meanwhile.

Documents are raw JSON. Errors of single questions are `ApiException` (an answer that refuses), `aiohttp.ClientError`
and `TimeoutError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import aiohttp
from kubernetes_asyncio.client import Configuration
from kubernetes_asyncio.client.exceptions import ApiException

if TYPE_CHECKING:
    from kubernetes_asyncio.client import ApiClient

RELIST = 3  # watches that failed in a row, after which all is listed anew
LABEL = "orrery/unit"
PAGE = 500  # pods per answer of a list
FIRST_S, LONGEST_S = 0.2, 30.0  # pauses while the API server does not answer
CONFIRM_S = 0.5  # how long the watch may take to tell of a pod that was made before its subscriber came
ANSWER_S = 30.0
# The server ends a watch after so long, and says something (a bookmark) about each minute: a connection that is
# silent for longer is dead, though nobody has said so.
WATCH_S, SILENT_S = 290, 90.0
HEALTHY_S = 5.0  # a watch that lives for so long is none that fails
LOG_SILENT_S = 600.0  # a step may say nothing for long; asking again costs one request
OVER_S = 3.0  # the kubelet tells of a container's end up to two seconds after its log has ended
LONGEST_LINE = 1 << 20

log = logging.getLogger("orrery.cluster")
Connect = Callable[[], "AbstractAsyncContextManager[ApiClient]"]
Document = dict[str, Any]
Query = Mapping[str, str]


class Change(NamedTuple):
    """A pod as it is now, or as it was last before it was gone."""

    kind: Literal["seen", "gone"]
    pod: Document


class Expired(Exception):
    """What the watch would go on from is too old: it has to list again."""


def roomy() -> Configuration:
    """Return a configuration for `connect` whose client holds any number of connections: one is taken by each log."""
    configuration = Configuration()
    configuration.connection_pool_maxsize = 0
    return configuration


class Api:
    """A connection to the cluster. It opens itself, and anew when the server does not know its token any more."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._lock = asyncio.Lock()
        self._now: _Connection | None = None
        self.closed = False

    @property
    def client(self) -> ApiClient:
        """The client in use. Raises `ConnectionError` where there is none yet."""
        if self._now is None:
            raise ConnectionError("not connected to the cluster")
        return self._now.client

    async def ask(
        self, method: str, path: str, query: Query | None = None, body: object = None, timeout: float = ANSWER_S
    ) -> Document:
        """Send one request; return the answer's document. Raises `ApiException` for what is refused (404, 409, …)."""
        limit = aiohttp.ClientTimeout(total=timeout)
        async with self._answer(method, path, query, body, limit) as answer:
            found = json.loads(await answer.read() or b"{}")
            return found if isinstance(found, dict) else {}

    @contextlib.asynccontextmanager
    async def stream(self, path: str, query: Query, silent: float) -> AsyncIterator[aiohttp.StreamReader]:
        """Open a body that goes on; `silent`: seconds without a byte after which it is given up (`TimeoutError`)."""
        limit = aiohttp.ClientTimeout(connect=ANSWER_S, sock_connect=ANSWER_S, sock_read=silent)
        async with self._answer("GET", path, query, None, limit) as answer:
            yield answer.content

    async def close(self) -> None:
        """Close the connection, for good. Whoever reads from it still does so to the end."""
        async with self._lock:
            self.closed = True
            now, self._now = self._now, None
        if now is not None:
            await now.leave()

    @contextlib.asynccontextmanager
    async def _answer(
        self, method: str, path: str, query: Query | None, body: object, limit: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        for last in (False, True):
            connection = await self._open()
            connection.users += 1
            try:
                answer = await connection.send(method, path, query, body, limit)
                try:
                    if answer.status == 401 and not last:
                        await self._renew(connection)
                        continue
                    await _refuse(answer)
                    yield answer
                    return
                finally:
                    answer.close() if not answer.content.at_eof() else answer.release()
            finally:
                await connection.leave()

    async def _open(self) -> _Connection:
        async with self._lock:
            if self.closed:
                raise ConnectionError("the connection to the cluster is closed")
            if self._now is None:
                context = self._connect()
                self._now = _Connection(await context.__aenter__(), context)
            return self._now

    async def _renew(self, refused: _Connection) -> None:
        """Let go of a connection that was refused; whoever reads from it still does so to the end."""
        async with self._lock:
            mine, self._now = self._now is refused, None if self._now is refused else self._now
        if mine:
            await refused.leave()


class _Connection:
    """One client, closed when nobody uses it any more."""

    def __init__(self, client: ApiClient, context: AbstractAsyncContextManager[ApiClient]) -> None:
        self.client, self._context = client, context
        self.users = 1  # the Api itself

    async def send(
        self, method: str, path: str, query: Query | None, body: object, limit: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        answer: aiohttp.ClientResponse = await self.client.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params={"Accept": "*/*" if path.endswith("/log") else "application/json"},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=limit,
        )
        return answer

    async def leave(self) -> None:
        self.users -= 1
        if self.users == 0:
            await self._context.__aexit__(None, None, None)


async def _refuse(answer: aiohttp.ClientResponse) -> None:
    """Raise `ApiException`, with the server's own words, for an answer that is none."""
    if 200 <= answer.status < 300:
        return
    body = (await answer.text(errors="replace"))[:10_000]
    words = body or answer.reason
    with contextlib.suppress(ValueError):
        told = json.loads(body)
        words = str(told.get("message") or words) if isinstance(told, dict) else words
    error = ApiException(status=answer.status, reason=words)
    error.body, error.headers = body, answer.headers  # type: ignore[assignment]  # as the client's own has them
    raise error


class Subscription:
    """What is told of one unit's pods."""

    def __init__(self, watch: _Watch, unit: str) -> None:
        self._watch, self.unit = watch, unit
        self._changes: list[Change] = []
        self._woken = asyncio.Event()
        self._sure = asyncio.Event()  # what there is, or that there is nothing, is known from after our coming
        self._told = False
        self.count = 0

    @property
    def api(self) -> Api:
        """The shared connection: for logs, creates, deletes."""
        return self._watch.api

    @property
    def client(self) -> ApiClient:
        """The shared connection's client, as it is now. Raises `ConnectionError` where there is none yet."""
        return self._watch.api.client

    @property
    def absent(self) -> bool:
        """Whether it is known that no pod of the unit is there."""
        return self._sure.is_set() and not self._watch.units.get(self.unit)

    @property
    def trouble(self) -> str:
        """Why the cluster cannot be watched just now; empty when it can."""
        return self._watch.trouble

    async def next(self, timeout: float | None) -> list[Change]:
        """Return what has changed since, oldest first; wait for it up to `timeout` seconds, then return nothing.

        The first answer is what is there now. It is empty when no pod is there (`absent`), or time was up before.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                if self._told:
                    await self._woken.wait()
                else:
                    await self._first()
                    self._told = True
        changes, self._changes = self._changes, []
        self._woken.clear()
        return changes

    async def _first(self) -> None:
        failures = 0
        while not self._sure.is_set():
            await _either(self._sure, self._watch.listed)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONFIRM_S):
                    await self._sure.wait()
                    return
            try:
                await self._watch.confirm(self)
            except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as e:
                failures += 1
                log.debug("unit %s cannot be looked at: %s", self.unit, _words(e))
                await asyncio.sleep(pause(failures))

    def put(self, change: Change) -> None:
        """Take in a change."""
        self.count += 1
        self._changes.append(change)
        self._woken.set()
        self._sure.set()

    def sure(self) -> None:
        """Take in that all there is has been told."""
        self._sure.set()


class _Watch:
    """The pods of one namespace, and who waits for which."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api = api
        self.path = f"/api/v1/namespaces/{namespace}/pods"
        self.units: dict[str, dict[str, Document]] = {}
        self.subscribers: dict[str, list[Subscription]] = {}
        self.listed = asyncio.Event()
        self.trouble = ""
        self._failures = 0  # in a row
        self._version = ""

    # Subscribers -------------------------------------------------------------------------------------------------

    def join(self, unit: str) -> Subscription:
        """Return a subscription, with what is known of the unit already."""
        new = Subscription(self, unit)
        self.subscribers.setdefault(unit, []).append(new)
        for pod in self.units.get(unit, {}).values():
            new.put(Change("seen", pod))
        return new

    def leave(self, left: Subscription) -> None:
        """Forget a subscription."""
        self.subscribers[left.unit].remove(left)
        if not self.subscribers[left.unit]:
            del self.subscribers[left.unit]

    async def confirm(self, who: Subscription) -> None:
        """Ask for one unit's pods alone: the watch has told nothing of them, and may only be late."""
        before = who.count
        found = await self.api.ask("GET", self.path, {"labelSelector": f"{LABEL}={who.unit}"})
        if who.count == before:  # else the watch knows better: it may have told its end already
            for pod in _items(found):
                self._seen(pod)
        who.sure()

    # The watch ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """List, follow, and go on whatever happens, until cancelled; then close the connection."""
        try:
            await self._go_on()
        finally:
            await self.api.close()

    async def _go_on(self) -> None:
        while True:
            began, version = time.monotonic(), self._version
            try:
                if not self._version:
                    await self._list()
                await self._follow()
                # A watch that ends as it begins, time and again, is a failure that says nothing.
                ended = self._version == version and time.monotonic() - began < HEALTHY_S
                self._failures = self._failures + 1 if ended else 0
                wait = pause(self._failures) if self._failures > 1 else 0.0
            except Expired:
                self._version, wait = "", pause(self._failures)
                self._failures += 1
            except Exception as e:  # whatever `connect` raises too: all others wait for this task
                self._failures = self._failures + 1 if time.monotonic() - began < HEALTHY_S else 1
                wait = max(pause(self._failures), _retry_after(e))
                if self._failures > 1:  # one is nothing: proxies cut connections that are quiet
                    self._troubled(f"the pods of {self.path} cannot be watched: {_words(e)}")
            await asyncio.sleep(wait)

    async def _list(self) -> None:
        here = [s for of_unit in self.subscribers.values() for s in of_unit]
        found: list[Document] = []
        query = {"labelSelector": LABEL, "limit": str(PAGE)}
        while True:
            try:
                page = await self.api.ask("GET", self.path, query)
            except ApiException as e:
                raise (Expired if e.status == 410 else e) from None
            found += _items(page)
            meta = page.get("metadata") or {}
            if not meta.get("continue"):
                break
            query["continue"] = meta["continue"]
        self._replace(found)
        self._version = str(meta.get("resourceVersion") or "")
        self.listed.set()
        self._troubled("")
        for subscriber in here:
            subscriber.sure()

    def _replace(self, found: Iterable[Document]) -> None:
        """Take in all pods there are: those that are not among them are gone."""
        new = {_uid(pod): pod for pod in found}
        for pods in list(self.units.values()):
            for uid, pod in list(pods.items()):
                if uid not in new:
                    self._gone(pod)
        for uid, pod in new.items():
            before = self.units.get(_unit(pod), {}).get(uid)
            if before is None or _version(before) != _version(pod):
                self._seen(pod)

    async def _follow(self) -> None:
        """Take in what changes, from `_version` on, until the server ends it."""
        query = {
            "labelSelector": LABEL,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(int(WATCH_S * random.uniform(0.9, 1.1))),  # noqa: S311 - so that not all come at once
        }
        try:
            async with self.api.stream(self.path, query, SILENT_S) as content:
                async for line in _lines(content):
                    self._event(json.loads(line))
                    self._failures = 0
                    self._troubled("")
        except ApiException as e:
            raise (Expired if e.status == 410 else e) from None

    def _event(self, event: Mapping[str, Any]) -> None:
        kind, pod = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            if pod.get("code") == 410:
                raise Expired
            raise ApiException(status=pod.get("code") or 0, reason=str(pod.get("message") or pod))
        if kind in ("ADDED", "MODIFIED"):
            self._seen(pod)
        elif kind == "DELETED":
            self._gone(pod)
        self._version = _version(pod) or self._version

    def _seen(self, pod: Document) -> None:
        pod.get("metadata", {}).pop("managedFields", None)  # half of a document, and nobody's business here
        self.units.setdefault(_unit(pod), {})[_uid(pod)] = pod
        self._tell(Change("seen", pod))

    def _gone(self, pod: Document) -> None:
        unit = _unit(pod)
        pods = self.units.get(unit, {})
        pods.pop(_uid(pod), None)
        if not pods:
            self.units.pop(unit, None)
        self._tell(Change("gone", pod))

    def _tell(self, change: Change) -> None:
        for subscriber in self.subscribers.get(_unit(change.pod), ()):
            subscriber.put(change)

    def _troubled(self, words: str) -> None:
        if words and not self.trouble:
            log.warning("%s; trying again", words)
        elif self.trouble and not words:
            log.info("the pods of %s are watched again", self.path)
        self.trouble = words


class _Shared(NamedTuple):
    watch: _Watch
    task: asyncio.Task[None]


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, _Shared]] = WeakKeyDictionary()


@contextlib.asynccontextmanager
async def subscribe(key: Hashable, connect: Connect, namespace: str, unit: str) -> AsyncIterator[Subscription]:
    """Wait for one unit's pods on the watch that all of the same `key` (a connection) and namespace share.

    `connect` opens a client when the watch has none, and again when its token has expired; see `roomy`.
    """
    loop = asyncio.get_running_loop()
    mine = _shared.setdefault(loop, {})
    if (key, namespace) not in mine:
        watch = _Watch(Api(connect), namespace)
        # A context of its own: the first subscriber's would put the watch's log lines into that task's log.
        task = loop.create_task(watch.run(), name=f"watch {watch.path}", context=contextvars.Context())
        mine[key, namespace] = _Shared(watch, task)
    watch, task = mine[key, namespace]
    subscription = watch.join(unit)
    try:
        yield subscription
    finally:
        watch.leave(subscription)
        if not watch.subscribers:
            mine.pop((key, namespace), None)
            task.cancel()
            await asyncio.wait([task])


async def follow_log(
    api: Api,
    namespace: str,
    pod: str,
    on_line: Callable[[str], None],
    *,
    container: str,
    over: Callable[[], bool] | None = None,
) -> None:
    """Hand each line of a container's log to `on_line`, from its start to its end, no line twice.

    It goes on after a dropped connection. `over` tells whether the container has ended; without it, a log that has
    nothing new when asked again is taken for ended. Returns when the log ends, or the pod is gone, or nobody may
    read it (which is logged).
    """
    place, failures = _Place(on_line), 0
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
    while True:
        before, wait = place.told, 0.0
        try:
            query = {"follow": "true", "timestamps": "true", "container": container, **place.query()}
            async with api.stream(path, query, LOG_SILENT_S) as content:
                async for line in _lines(content, LONGEST_LINE):
                    place.take(line)
            if await _is_over(over) or (over is None and place.asked and place.told == before):
                return
            failures = 0 if place.told > before else failures + 1
        except ApiException as e:
            if e.status == 403:
                log.warning("the log of pod %s cannot be read: %s", pod, _words(e))
            if e.status in (403, 404):
                return
            failures += 1
            wait = _retry_after(e)
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            log.debug("the log of pod %s was torn off: %s", pod, _words(e))
            failures += 1
        if api.closed or (over is not None and over() and failures > 3):
            return
        place.asked = True
        await asyncio.sleep(max(wait, pause(failures) if failures else 0.0))


async def _is_over(over: Callable[[], bool] | None) -> bool:
    """Tell whether the container whose log has ended has ended too; the watch may tell of it a moment later."""
    if over is None:
        return False
    until = time.monotonic() + OVER_S
    while not over() and time.monotonic() < until:
        await asyncio.sleep(0.05)
    return over()


class _Place:
    """How far a log has been read."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._at: tuple[int, int] | None = None  # seconds and nanoseconds of the last line
        self._same = 0  # lines told with that time
        self._skip = 0  # of those, how many are yet to come again
        self.told = 0
        self.asked = False

    def query(self) -> dict[str, str]:
        """Return where to go on from: whole seconds, since the server knows no finer ones."""
        if self._at is None:
            return {}
        self._skip = self._same
        return {"sinceTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._at[0]))}

    def take(self, raw: bytes) -> None:
        """Tell a line that was not told before."""
        stamp, _, text = raw.decode(errors="replace").partition(" ")
        at = _moment(stamp)
        if at is None:
            self.told += 1
            self._on_line(raw.decode(errors="replace"))
            return
        if self._at is not None and (at < self._at or (at == self._at and self._skip > 0)):
            self._skip -= at == self._at
            return
        self._same = self._same + 1 if at == self._at else 1
        self._at, self._skip = at, 0
        self.told += 1
        self._on_line(text)


def _moment(stamp: str) -> tuple[int, int] | None:
    """Return a line's time as seconds since the epoch and nanoseconds, or None where it is none."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)", stamp, re.ASCII)
    if found is None:
        return None
    try:
        whole = datetime.fromisoformat(found[1] + found[3].replace("Z", "+00:00"))
    except ValueError:
        return None
    return int(whole.timestamp()), int((found[2] or "0").ljust(9, "0"))


async def events_of(api: Api, namespace: str, pod: str) -> list[str]:
    """Return what was said of a pod, oldest first, as `Reason: message`; nothing where nobody may ask."""
    selector = f"involvedObject.kind=Pod,involvedObject.name={pod}"
    try:
        found = await api.ask("GET", f"/api/v1/namespaces/{namespace}/events", {"fieldSelector": selector})
    except ApiException as e:
        log.warning("the events of pod %s cannot be read: %s", pod, _words(e))
        return []
    events = [e for e in found.get("items") or [] if isinstance(e, dict)]
    events.sort(key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or e.get("firstTimestamp") or ""))
    return [f"{e.get('reason') or '?'}: {e.get('message') or ''}" for e in events]


def pause(failures: int) -> float:
    """Return how many seconds to wait after so many failures in a row; not the same for all who wait."""
    longest: float = min(FIRST_S * 2 ** min(failures, 20), LONGEST_S)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - nothing secret


async def _lines(content: aiohttp.StreamReader, longest: int | None = None) -> AsyncIterator[bytes]:
    """Yield lines without their ends; those that grow beyond `longest` bytes (progress bars) in pieces."""
    rest = b""
    async for chunk in content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line:
                yield line
        if longest is not None and len(rest) > longest:
            yield rest
            rest = b""
    if rest:
        yield rest


async def _either(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    waits = [asyncio.ensure_future(e.wait()) for e in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()


def _retry_after(error: Exception) -> float:
    """Return for how many seconds the server wants to be left alone."""
    told = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    return min(float(told), 2 * LONGEST_S) if re.fullmatch(r"[0-9]{1,6}", str(told)) else 0.0


def _words(error: Exception) -> str:
    if isinstance(error, ApiException):
        return f"{error.status} {error.reason}"
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _items(document: Mapping[str, Any]) -> list[Document]:
    return [pod for pod in document.get("items") or [] if isinstance(pod, dict)]


def _meta(pod: Document) -> Mapping[str, Any]:
    found = pod.get("metadata")
    return found if isinstance(found, dict) else {}


def _unit(pod: Document) -> str:
    return str((_meta(pod).get("labels") or {}).get(LABEL, ""))


def _uid(pod: Document) -> str:
    return str(_meta(pod).get("uid") or _meta(pod).get("name") or "")


def _version(pod: Document) -> str:
    return str(_meta(pod).get("resourceVersion") or "")
