"""The wait for a step's pods, in Airflow's triggerer: no worker and no slot is taken, and all share one watch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
from airflow.triggers.base import BaseTrigger, TriggerEvent
from kubernetes_asyncio.client.exceptions import ApiException

from orrery.cluster import answers, gang
from orrery.cluster.judge import Member, Seen, explained
from orrery.cluster.watch import Api, Subscription, events_of, follow_log, roomy, subscribe
from orrery.endings import Ending
from orrery.local import relay
from orrery.orchestration.operators import emit

if TYPE_CHECKING:
    from kubernetes_asyncio.client import ApiClient

log = logging.getLogger("orrery.step")
# Airflow 3.3 takes a task whose trigger fires within about 1.5 s of its deferral for one that was killed: the scheduler
# still holds its worker for running.
SOONEST_S = 2.0
LOOK_S = 60.0  # between two looks at a pod of which nothing new is told: is the watch itself alive?
TROUBLE_S = 1.0  # the same while the cluster cannot be watched
EVENTS_S = 20.0  # between two looks for why a Job's pods are not made
LOG_S = 15.0  # what is left of a log may take so long once the pod has ended
FIRST_S, LONGEST_S = 2.0, 30.0  # pauses between two tries to create what was refused
MARGIN_S = 10.0  # beside its grace, what an earlier pod that was told to go may take
KILL_TRIES = 3
# What no waiting mends, once it has lasted for so long: rights, or a connection that is not there any more.
REFUSED = re.compile(r"\b(401|403)\b|AirflowNotFoundException|ConfigException")
REFUSED_S = 600.0


@contextlib.asynccontextmanager
async def connect(
    connection: str | None, in_cluster: bool | None, extras: dict[str, Any] | None = None
) -> AsyncIterator[ApiClient]:
    """Open a client by an Airflow connection (`extras`: its extra, where it has been read already)."""
    # At the first use: whoever only defers to this trigger needs none of it.
    from airflow.providers.cncf.kubernetes.hooks.kubernetes import AsyncKubernetesHook

    hook = AsyncKubernetesHook(
        conn_id=connection, in_cluster=in_cluster, client_configuration=roomy(), connection_extras=extras
    )
    async with hook.get_conn() as client:
        yield client


class PodTrigger(BaseTrigger):
    """Fires when a unit (one pod, or a Job of several) has ended or cannot go on, with the `Ending` and what was seen.

    `documents` are given where creating them was refused for now (quota), or has to wait until the units `after` are
    gone: then the trigger creates them, and goes on trying until `wait_until` (seconds since the epoch). It survives a
    triggerer that is restarted: another one looks at the same unit. When somebody fails, clears or marks the waiting
    task, the unit is deleted.
    """

    def __init__(
        self,
        *,
        unit: str,
        address: str,
        namespace: str,
        connection: str | None,
        in_cluster: bool | None,
        key: str,
        folder: str,
        began: float,
        wait_until: float,
        grace: float,
        silent: float,
        blind: float,
        pods: int = 1,
        container: str = "base",
        documents: list[dict[str, Any]] | None = None,
        after: list[str] | None = None,
        carried: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.unit, self.address, self.namespace = unit, address, namespace
        self.connection, self.in_cluster = connection, in_cluster
        self.key, self.folder, self.began = key, folder, began
        self.wait_until, self.grace, self.silent = wait_until, grace, silent
        self.blind, self.pods, self.container = blind, pods, container
        self.documents, self.after = documents or [], after or []
        # What the operator wants back with the event.
        self.carried = carried or {}
        # The connection's extra, for a wait inside of a worker; never serialized.
        self.extras: dict[str, Any] | None = None
        self._said: dict[str, str] = {}
        self._blind_since = 0.0
        self._logs: dict[str, asyncio.Task[None]] = {}

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return all that another triggerer needs to go on."""
        names = (
            *("unit", "address", "namespace", "connection", "in_cluster", "key", "folder", "began", "wait_until"),
            *("grace", "silent", "blind", "pods", "container", "documents", "after", "carried"),
        )
        return f"{type(self).__module__}.{type(self).__qualname__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait for the end; see `wait`."""
        soonest = time.monotonic() + SOONEST_S
        event = await self.wait()
        await asyncio.sleep(max(soonest - time.monotonic(), 0.0))
        yield TriggerEvent(event)

    async def wait(self) -> dict[str, Any]:
        """Return what the unit came to, once it has ended or cannot go on. Its log is relayed meanwhile."""
        seen = Seen(unit=self.unit, pods=self.pods, container=self.container)
        try:
            async with self._subscribe(self.unit) as subscription:
                ending = await self._created(subscription.api) if self.documents else None
                # Another subscription: what was not there before it was created is not gone.
                async with self._subscribe(self.unit) as fresh:
                    ending = ending or await self._ended(fresh, seen)
                    await self._end_of_logs(seen)
                    if ending.kind == "gone":
                        words = await self._asked(events_of(fresh.api, self.namespace, self._leader(seen).name))
                        ending = explained(ending, words or [])
        finally:
            for each in self._logs.values():
                each.cancel()
        return self._event(seen, ending)

    async def on_kill(self) -> None:
        """Delete the unit; Airflow calls this for a person's act alone, not when the triggerer ends."""
        for left in reversed(range(KILL_TRIES)):
            api = Api(self._connect)
            try:
                await api.ask("DELETE", self.address, body=dict(gang.DELETION))
            except ApiException as e:
                if e.status == 404:
                    return
                log.warning("%s cannot be deleted: %s; %d more tries", self.unit, e.reason, left)
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                log.warning("%s cannot be deleted: %s; %d more tries", self.unit, e, left)
            else:
                log.info("%s is told to stop", self.unit)
                return
            finally:
                await api.close()
            await asyncio.sleep(1.0)

    def _connect(self) -> Any:
        return connect(self.connection, self.in_cluster, self.extras)

    def _subscribe(self, unit: str) -> contextlib.AbstractAsyncContextManager[Subscription]:
        key = (self.connection, self.in_cluster)
        return subscribe(key, self._connect, self.namespace, unit)

    # Creating ----------------------------------------------------------------------------------------------------

    async def _created(self, api: Api) -> Ending | None:
        """Create the unit as soon as it may be there; return why it cannot be, or None."""
        for earlier in self.after:
            await self._gone(earlier)
        pause = FIRST_S
        while True:
            refused = await self._create(api)
            if refused is None:
                log.info("%s is created", self.unit)
                return None
            if refused.kind in ("user", "absent"):
                return Ending(kind="config", message=refused.message, hint=refused.hint, by="Refused")
            self._say("waits", f"{self.unit} is not created yet: {refused.message}")
            left = self.wait_until - time.time()
            if left <= 0:
                told = f"{self.unit} was not created within {time.time() - self.began:.0f} s: {refused.message}"
                return Ending(kind="unplaced", message=told, hint=refused.hint, by="Refused")
            await asyncio.sleep(min(pause, max(left, 0.1)))
            pause = min(pause * 2, LONGEST_S)

    async def _create(self, api: Api) -> answers.Answer | None:
        """Create all objects of the unit, those that are there already left alone; return what was refused."""
        first, *others = self.documents
        try:
            made = await self._put(api, first)
            for document in others:
                await self._put(api, gang.owned(document, made))
        except ApiException as e:
            return answers.read(e.status, e.body or e.reason, self.unit)
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return answers.read(0, f"{type(e).__name__}: {e}", self.unit)
        return None

    async def _put(self, api: Api, document: dict[str, Any]) -> dict[str, Any]:
        try:
            return await api.ask("POST", gang.collection(document), body=document)
        except ApiException as e:
            if answers.read(e.status, e.body or e.reason, "").kind != "exists":
                raise
        # Ours, of before the triggerer was restarted: its name is of this attempt.
        return await api.ask("GET", gang.address(document))

    async def _gone(self, unit: str) -> None:
        """Wait until an earlier unit, which has been told to go, is gone; two must not work side by side."""
        until = time.monotonic() + self.grace + MARGIN_S
        async with self._subscribe(unit) as earlier:
            await earlier.next(MARGIN_S)
            while not earlier.absent:
                if time.monotonic() > until:
                    log.warning("%s is still there: it is taken for lost", unit)
                    return
                self._say(unit, f"{self.unit} is created when {unit}, which was told to stop, is gone")
                await earlier.next(1.0)

    # Waiting -----------------------------------------------------------------------------------------------------

    async def _ended(self, subscription: Subscription, seen: Seen) -> Ending:
        """Fold what is told of the unit's pods until they have come to an end."""
        terms = {"wait_until": self.wait_until, "grace": self.grace, "silent": self.silent}
        looked = 0.0
        while True:
            changes = await subscription.next(self._soon(subscription, seen, seen.due(time.time(), **terms)))
            now = time.time()
            for kind, pod in changes:
                if kind == "seen":
                    seen.update(pod, now)
                else:
                    seen.removed(pod, pod["metadata"]["name"], now)
            if subscription.absent and not seen.members and await self._absent(subscription.api):
                seen.removed(None, self.unit, now)
            self._follow(subscription.api, seen)
            self._tell(subscription, seen)
            if self._sees(subscription, seen) and (ending := seen.ending(now, **terms)) is not None:
                return ending
            if (ending := self._given_up(subscription.trouble, now)) is not None:
                return ending
            if self.pods > 1 and len(seen.members) < self.pods and now > looked + EVENTS_S:
                looked = now
                await self._why_none(subscription.api)

    def _sees(self, subscription: Subscription, seen: Seen) -> bool:
        """Tell whether anything can be judged: a deadline that passes while the cluster is silent says nothing."""
        return not subscription.trouble and (bool(seen.members) or (self.pods > 1 and subscription.absent))

    def _given_up(self, trouble: str, now: float) -> Ending | None:
        """Return an ending where the cluster has been out of sight for longer than the unit could have lived there."""
        self._blind_since = (self._blind_since or now) if trouble else 0.0
        blind_s = now - self._blind_since if trouble else 0.0
        refused = REFUSED.search(trouble)
        if blind_s < (min(REFUSED_S, self.blind) if refused else self.blind):
            return None
        told = f"{self.unit} has been out of sight for {blind_s:.0f} s: {trouble}"
        hint = "kubernetes.connection in platform.yaml, and the rights of Airflow's service account"
        return Ending(kind="config" if refused else "gone", message=told, hint=hint, by="OutOfSight")

    def _soon(self, subscription: Subscription, seen: Seen, due: float | None) -> float:
        """Return for how many seconds to wait for news at most."""
        if subscription.trouble:
            return TROUBLE_S
        soon = LOOK_S if len(seen.members) >= self.pods else EVENTS_S
        if due is None or not self._sees(subscription, seen):
            return soon
        return min(max(due - time.time(), 0.1), soon)

    async def _absent(self, api: Api) -> bool:
        """Tell whether a unit without pods is gone; a Job may not have made any yet."""
        if self.pods == 1:
            return True
        try:
            await api.ask("GET", self.address)
        except ApiException as e:
            return bool(e.status == 404)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
        return False

    async def _why_none(self, api: Api) -> None:
        """Say what the Job's controller says of pods that it cannot make: a quota, mostly."""
        where = f"/api/v1/namespaces/{self.namespace}/events"
        found = await self._asked(api.ask("GET", where, {"fieldSelector": f"involvedObject.name={self.unit}"}))
        failed = [e for e in (found or {}).get("items") or [] if str(e.get("reason", "")).startswith("Failed")]
        if failed:
            self._say("waits", f"{self.unit} waits: {failed[-1].get('message', '')}")

    async def _asked(self, question: Any) -> Any:
        """Return an answer that is only to be told, or None where there is none."""
        try:
            return await question
        except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as e:
            log.debug("no answer: %s", e)
            return None

    # Telling -----------------------------------------------------------------------------------------------------

    def _follow(self, api: Api, seen: Seen) -> None:
        """Relay the log of each pod that runs or has run, from its start."""
        for uid, member in seen.members.items():
            if not member.started or member.gone or uid in self._logs:
                continue
            mark = f"node {member.index}: " if self.pods > 1 and member.index else ""
            follower = follow_log(
                api,
                self.namespace,
                member.name,
                lambda line, mark=mark: relay(line, lambda level, event, fields: emit(level, mark + event, fields)),  # type: ignore[misc]
                container=self.container,
                over=lambda member=member: member.ended,  # type: ignore[misc]
            )
            self._logs[uid] = asyncio.create_task(follower, name=f"log of {member.name}")

    async def _end_of_logs(self, seen: Seen) -> None:
        """Wait for what is left of the logs of pods that have ended; a silent node's never comes."""
        members = seen.members
        left = [t for uid, t in self._logs.items() if members[uid].ended and members[uid].silent_at is None]
        if left:
            done, late = await asyncio.wait(left, timeout=LOG_S)
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.warning("a log was not read to its end: %s: %s", type(error).__name__, error)
            if late:
                log.warning("the log was not read to its end within %.0f s", LOG_S)

    def _tell(self, subscription: Subscription, seen: Seen) -> None:
        """Log what has changed: what it waits for, where it runs, who tells it to go."""
        if subscription.trouble:
            self._say("watch", subscription.trouble)
        if waits := seen.waiting():
            self._say("waits", f"{self.unit} waits: {waits}")
        for member in seen.members.values():
            if member.started:
                self._say(f"runs {member.name}", f"pod {member.name} runs on node {member.node or '?'}")
            if member.told:
                words = ": ".join(filter(None, (member.told, member.disruption_message or member.status_message)))
                self._say(f"told {member.name}", f"pod {member.name} is told to go: {words}", logging.WARNING)
            elif member.deleted_at is not None:
                self._say(f"told {member.name}", f"pod {member.name} is being deleted", logging.WARNING)
            if member.silent_at is not None:
                silent = f"node {member.node} of pod {member.name} is silent; {self.silent:.0f} s are borne"
                self._say(f"silent {member.name}", silent, logging.WARNING)

    def _say(self, about: str, text: str, level: int = logging.INFO) -> None:
        """Log a line, once until another one comes about the same."""
        if self._said.get(about) != text:
            self._said[about] = text
            log.log(level, "%s", text)

    def _leader(self, seen: Seen) -> Member:
        return seen.leader or next(iter(seen.members.values()), Member(name=self.unit))

    def _event(self, seen: Seen, ending: Ending) -> dict[str, Any]:
        leader = self._leader(seen)
        starts = [m.started_at for m in seen.members.values() if m.started_at is not None]
        words = leader.last_words
        return {
            "unit": self.unit,
            "address": self.address,
            "key": self.key,
            "folder": self.folder,
            "carried": self.carried,
            "ending": ending.model_dump(),
            "pod": leader.name,
            "node": leader.node,
            # Until all of its pods ran: a training begins with the last of them.
            "waited_s": round((max(starts) if starts else time.time()) - self.began, 1),
            "memory_peak": words.get("memory_peak"),
            "memory_limit": leader.memory_limit,
            "gone": all(m.gone for m in seen.members.values()) if self.pods == 1 else False,
        }
