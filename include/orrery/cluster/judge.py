"""What became of the pods of one unit, folded from their documents as the API server tells them. Pure and light.

A *unit* is what one attempt of a step is made of: one pod, or several of one training. Documents are raw JSON, as they
come; whatever they lack or hold in the wrong shape is taken as not told. What has to be remembered is remembered here,
since a pod that was told to go is often gone within a second of its end, and takes its conditions with it.

Times are those of the caller's clock, in seconds since the epoch: the cluster's may differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from orrery.endings import Ending, Kind

CONTAINER = "base"  # as the pod operator calls it; what a cluster injects beside it does not count
MARGIN_S = 10.0  # from when a pod should be gone until it is taken for lost: the kubelet's own slowness
HEARD_S = 60.0  # from a rank's end by itself until its peer's node, if that has died, is missed: 40-50 s of silence
SETTLE_S = 2.0  # from a container's death by a signal until nothing more is expected to say why
LONGEST = 1500  # characters of others' words in a message
INDEX = "batch.kubernetes.io/job-completion-index"
REPLICA_TYPE, REPLICA_INDEX = "training.kubeflow.org/replica-type", "training.kubeflow.org/replica-index"

# Why a pod was told to go, where its status says it without the condition DisruptionTarget.
TAKEN = frozenset({"Terminated", "Shutdown", "NodeShutdown", "Preempting", "Evicted"})
# The kubelet's refusals of a pod that the scheduler had sent it. It has not run, another node may take it.
REFUSED = re.compile(r"^(OutOf\S+|UnexpectedAdmissionError|NodeAffinity|TopologyAffinityError)$")
# A container that waits for one of these waits for ever, or for somebody who mends it.
IMAGE = frozenset({"ErrImageNeverPull", "InvalidImageName", "ImageInspectError", "SignatureValidationFailed"})
PULL = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"})
CONFIG = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "PreCreateHookError",
        "PreStartHookError",
        "PostStartHookError",
    }
)
# The same, once the container has ended by it.
NOT_STARTED = frozenset({"StartError", "ContainerCannotRun"})
PASSES = re.compile(
    r"time(d )?-?out|deadline exceeded|connection (was )?(refused|reset|aborted|closed)|refused the connection"
    r"|no such host|server misbehaving|temporary failure|no route to host|network is unreachable|broken pipe"
    r"|tls:? handshake|remote error: tls|\bEOF\b|request cancell?ed|too ?many ?requests|pull rate limit"
    r"|QPS exceeded|\b(429|5\d\d) [A-Z]|(status|code|response)[^\n]{0,120}?\b(429|5\d\d)\b|no space left on device"
    r"|is reserved for|RegistryUnavailable",
    re.IGNORECASE,
)
# What the kubelet says between two tries to pull, before 1.31 without the reason.
HOLDS_BACK = re.compile(r'Back-off pulling image "[^"]*"')
OWN_DISK = re.compile(r"exceed(s|ed) (the (total )?limit|its local)", re.IGNORECASE)
# Ready goes False for these without the node being silent.
NOT_SILENT = frozenset({"ContainersNotReady", "ReadinessGatesNotReady", "PodCompleted", "PodFailed"})
# What an event about a pod that is gone without a word says of why.
EVENTS: dict[str, tuple[Kind, str]] = {
    "TaintManagerEviction": ("interrupted", "DeletionByTaintManager"),
    "Preempted": ("interrupted", "PreemptionByScheduler"),
    "Evicted": ("interrupted", "TerminationByKubelet"),
    "NodeShutdown": ("interrupted", "TerminationByKubelet"),
    "NodeNotReady": ("node_lost", "NodeNotReady"),
    "NodeLost": ("node_lost", "NodeLost"),
}
# How well an ending is known: a later one replaces an earlier one of a lower rank alone.
RANK: dict[Kind, int] = {"unplaced": 0, "gone": 0, "node_lost": 1, "exited": 2}
BEST = 3
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Member(BaseModel):
    """One pod, as it was seen last, and what of it is remembered."""

    model_config = ConfigDict(extra="forbid")
    name: str = ""
    uid: str = ""
    index: int | None = Field(None, description="Its rank among the unit's pods.")
    node: str = ""
    image: str = ""
    phase: str = ""
    seen_at: float = Field(0.0, description="When it was seen first.")
    started_at: float | None = Field(None, description="When its container was first seen running, or ended.")
    ended_at: float | None = Field(None, description="When its end was first seen.")
    unplaced: str = Field("", description="The scheduler's words.")
    holds: str = Field("", description="What the container, or one before it, waits for: the reason.")
    held: str = Field("", description="The kubelet's words on that.")
    pull: str = Field("", description="Why the image could not be pulled, the last that was told.")
    code: int | None = None
    reason: str = Field("", description="The container's: OOMKilled, Error, Completed, StartError, …")
    words: str = Field("", description="The container's termination message.")
    init: str = Field("", description="Which container before it failed.")
    status_reason: str = ""
    status_message: str = ""
    disruption: str = Field("", description="Who told it to go.")
    disruption_message: str = ""
    deleted_at: float | None = Field(None, description="When it was first seen being deleted.")
    gone_by: float | None = Field(None, description="When it should be gone at the latest, for its deletion.")
    silent_at: float | None = Field(None, description="Since when its node says nothing.")
    memory_limit: int | None = None
    gone: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.gone or self.code is not None or self.phase in ("Succeeded", "Failed")

    @property
    def started(self) -> bool:
        """Whether its container has ever run."""
        return self.started_at is not None

    @property
    def last_words(self) -> dict[str, Any]:
        """What the step itself wrote last (see `orrery.lastwords`), or nothing."""
        try:
            found = json.loads(self.words) if self.words.startswith("{") else {}
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def update(self, pod: Mapping[str, Any], container: str, now: float) -> None:
        """Take in the pod's document."""
        meta, spec, status = (_dict(pod, part) for part in ("metadata", "spec", "status"))
        self.name, self.uid = _text(meta, "name") or self.name, _text(meta, "uid") or self.uid
        self.node = _text(spec, "nodeName") or self.node
        self.index = _index(meta) if self.index is None else self.index
        self.phase = _text(status, "phase") or self.phase
        self.status_reason = _text(status, "reason") or self.status_reason
        self.status_message = _text(status, "message") or self.status_message
        self._asked(spec, container)
        self._conditions(list(_dicts(status, "conditions")), now)
        self._deletion(meta, now)
        self._container(status, container, now)
        if self.ended and self.ended_at is None:
            self.ended_at = now

    def _asked(self, spec: Mapping[str, Any], container: str) -> None:
        wanted = _named(list(_dicts(spec, "containers")), container)
        self.image = _text(wanted, "image") or self.image
        limit = size(_dict(_dict(wanted, "resources"), "limits").get("memory"))
        self.memory_limit = self.memory_limit if limit is None else limit

    def _conditions(self, conditions: Sequence[Mapping[str, Any]], now: float) -> None:
        by_type = {_text(c, "type"): c for c in conditions}
        target = by_type.get("DisruptionTarget", {})
        if _text(target, "status") == "True":
            self.disruption = _text(target, "reason") or self.disruption or "DisruptionTarget"
            self.disruption_message = _text(target, "message") or self.disruption_message
        elif _text(target, "status") == "False" and self.deleted_at is None and not self.ended:
            # Taken back, in so many words: an eviction that came to nothing for two minutes.
            self.disruption = self.disruption_message = ""
        placed = by_type.get("PodScheduled", {})
        waits = _text(placed, "status") == "False"
        self.unplaced = (_text(placed, "message") or _text(placed, "reason")) if waits else ""
        ready = by_type.get("Ready", {})
        silent = self.phase in ("Running", "Unknown") and (
            _text(ready, "status") in ("False", "Unknown")
            and _text(ready, "reason") not in NOT_SILENT
            # Where the kubelet itself says that the pod is not ready, it says so of the containers too.
            and _text(by_type.get("ContainersReady", {}), "status") != "False"
        )
        silent = silent or self.phase == "Unknown" or self.status_reason == "NodeLost"
        self.silent_at = (self.silent_at if self.silent_at is not None else now) if silent else None

    def _deletion(self, meta: Mapping[str, Any], now: float) -> None:
        if not meta.get("deletionTimestamp"):
            return
        self.deleted_at = now if self.deleted_at is None else self.deleted_at
        grace = meta.get("deletionGracePeriodSeconds")
        by = self.deleted_at + (float(grace) if isinstance(grace, int) and 0 <= grace < 10**7 else 30.0)
        self.gone_by = by if self.gone_by is None else min(by, self.gone_by)

    def _container(self, status: Mapping[str, Any], container: str, now: float) -> None:
        statuses = list(_dicts(status, "containerStatuses"))
        mine = _named(statuses, container)
        state = _dict(mine, "state")
        ended = _dict(state, "terminated") or (
            _dict(_dict(mine, "lastState"), "terminated") if self.phase in ("Succeeded", "Failed") else {}
        )
        if _dict(state, "running") or "running" in state or ended:
            never = _text(ended, "reason") in NOT_STARTED
            self.started_at = now if self.started_at is None and not never else self.started_at
        if ended:
            self._end(ended)
        elif self.phase == "Failed" and not self.started:
            self._init_failed(status)
        waits = {} if ended else _dict(state, "waiting")
        for before in _dicts(status, "initContainerStatuses"):
            if _text(held := _dict(_dict(before, "state"), "waiting"), "reason") in IMAGE | PULL | CONFIG:
                waits = held
        self.holds, self.held = _text(waits, "reason"), _text(waits, "message")
        if self.holds in PULL and self.held and not HOLDS_BACK.fullmatch(self.held):
            self.pull = self.held
        if self.phase == "Succeeded" and self.code is None:
            self.code = 0

    def _end(self, ended: Mapping[str, Any]) -> None:
        code = ended.get("exitCode")
        self.code = code if isinstance(code, int) and not isinstance(code, bool) else self.code
        self.reason = _text(ended, "reason") or self.reason
        self.words = _text(ended, "message") or self.words

    def _init_failed(self, status: Mapping[str, Any]) -> None:
        for before in _dicts(status, "initContainerStatuses"):
            ended = _dict(_dict(before, "state"), "terminated")
            if ended and ended.get("exitCode") not in (0, None):
                self.init = _text(before, "name") or "?"
                self._end(ended)
                return

    # How it ended ------------------------------------------------------------------------------------------------

    def ending(self, now: float, wait_until: float, silent: float) -> Ending | None:
        """Return how it ended, or cannot go on; None: it goes on."""
        if self.ended:
            return self.over(now)
        if self.gone_by is not None and now >= self.gone_by + MARGIN_S:
            by = self.told or ("" if self.silent_at is None else "NodeNotReady")
            return self._made("node_lost", f"was told to go, and nobody saw it end{self._late(now)}", by)
        if self.silent_at is not None and now >= self.silent_at + silent:
            told = f"its node has been silent for {now - self.silent_at:.0f} s"
            return self._made("node_lost", told, self.told or "NodeNotReady")
        if self.disruption or self.deleted_at is not None or self.started:
            return None
        if held := self._held():
            return held
        if now >= wait_until:
            waited = f"has not been started within {now - self.seen_at:.0f} s"
            return self._made("unplaced", f"{waited}: {self.waiting() or self.phase}", self._why_not(), PLACE)
        return None

    def due(self, now: float, wait_until: float, silent: float) -> float | None:
        """Return when `ending` may say something else although nothing changes."""
        if self.ended:
            return self._settled_at() if self._unsettled(now) else None
        times = [
            None if self.gone_by is None else self.gone_by + MARGIN_S,
            None if self.silent_at is None else self.silent_at + silent,
            None if self.started or self.disruption or self.deleted_at is not None else wait_until,
        ]
        return min((t for t in times if t is not None), default=None)

    def waiting(self) -> str:
        """Return why its container does not run yet, in the cluster's words; empty when it does or did."""
        if self.started or self.ended:
            return ""
        if self.unplaced:
            return self.unplaced[:LONGEST]
        told = self.pull if self.holds in PULL and self.pull else self.held
        return ": ".join(filter(None, (self.holds, told)))[:LONGEST] or self.phase or "Pending"

    @property
    def told(self) -> str:
        """Who told it to go, in Kubernetes' words."""
        taken = self.status_reason if self.status_reason in TAKEN else ""
        return self.disruption or taken

    @property
    def lost(self) -> bool:
        """Whether its container's end was not seen: a node that was cut off or restarted has found it gone."""
        return self.reason == "ContainerStatusUnknown" or (self.reason == "Unknown" and self.code == 255)

    @property
    def primary(self) -> bool:
        """Whether its end explains others', rather than follows from them."""
        return bool(self.told) or self.reason == "OOMKilled" or self.status_reason == "DeadlineExceeded"

    def asked(self, began: float | None) -> bool:
        """Whether it was told to go. Once a pod has ended (`began`), the Job deletes the others: that tells nothing."""
        return bool(self.told) or (self.deleted_at is not None and began is not None and self.deleted_at < began)

    def cause(self, began: float | None, now: float) -> Ending | None:
        """Return what it is likely to end by, where others have ended by themselves (since `began`) and it has not."""
        if self.silent_at is not None:
            told = f"its node has been silent for {now - self.silent_at:.0f} s"
            return self._made("node_lost", told, self.told or "NodeNotReady")
        if self.asked(began):
            return self._made("interrupted", f"is told to go: {self._interruption()}", self.told or "deleted")
        return None

    def over(self, now: float) -> Ending | None:
        """Return how it ended; None: it may still be told."""
        if self.status_reason == "DeadlineExceeded":
            return self._made("deadline", self.status_message or "ran longer than it may", "DeadlineExceeded", DEADLINE)
        if self.reason == "OOMKilled" and not self.init:
            return self._made("out_of_memory", self._memory(), "OOMKilled", MEMORY)
        if self.status_reason == "Evicted" and not self.disruption and OWN_DISK.search(self.status_message):
            return self._made("config", f"was evicted for what it wrote itself: {self.status_message}", "Evicted", DISK)
        if self.told:
            return self._made("interrupted", f"was told to go: {self._interruption()}", self.told)
        if self._unsettled(now):
            return None
        if not self.started and REFUSED.match(self.status_reason):
            return self._made("unplaced", f"was refused by its node: {self._status()}", self.status_reason)
        if self.reason in NOT_STARTED:
            return self._made("config", f"could not be started: {self.words or self.reason}", self.reason, CONFIGURE)
        silent = self.silent_at is not None and self.code is None
        if silent or self.lost or REFUSED.match(self.status_reason):
            by = "NodeNotReady" if silent else self.reason or self.status_reason
            return self._made("node_lost", "was lost with its node", by)
        if self.code is None and self.gone:
            by = "deleted" if self.deleted_at is not None else ""
            return self._made("gone", "is gone: somebody removed it" if by else "is gone, without a word why", by)
        return self._exited()

    def _exited(self) -> Ending:
        if self.init:
            return self._made("exited", f"container {self.init} before the step's failed", f"Init:{self.reason}")
        if self.deleted_at is not None and self.code in (143, 137):
            if self.code == 143:
                return self._made("interrupted", "was deleted, and ended when told to", "deleted")
            return self._made("gone", "was deleted, and killed when its time to end was over", "deleted")
        if self.code == 143:
            return self._made("interrupted", "ended when told to", "SIGTERM")
        status = f": {self._status()}" if self.status_reason else ""
        return self._made("exited", f"ended by itself{status}", self.reason if self.code else "")

    def _unsettled(self, now: float) -> bool:
        """Whether a container died by a signal, and the pod's own status may still come to say why."""
        open_ = self.code in (137, 143) and self.phase not in ("Failed", "Succeeded") and not self.gone
        return open_ and not self.primary and self.deleted_at is None and now < self._settled_at()

    def _settled_at(self) -> float:
        return (self.ended_at or 0.0) + SETTLE_S

    def _held(self) -> Ending | None:
        """Return that it waits for what will not come, or None."""
        pulls = self.holds in PULL
        told = self.pull if pulls and self.pull else self.held
        if self.holds in IMAGE:
            return self._made("image", f"{self.holds}: {told}", self.holds, PUSH)
        plain = told.replace(self.image, "") if self.image else told
        if self.holds not in PULL | CONFIG or PASSES.search(plain) or self.holds == "RegistryUnavailable":
            return None
        if pulls:
            return self._made("image", f"{self.holds}: {told}", self.holds, PUSH)
        return self._made("config", f"{self.holds}: {told}", self.holds, CONFIGURE)

    def _why_not(self) -> str:
        return "Unschedulable" if self.unplaced else self.holds

    def _status(self) -> str:
        return ": ".join(filter(None, (self.status_reason, self.status_message)))

    def _interruption(self) -> str:
        words = dict.fromkeys(filter(None, (self.disruption, self.disruption_message, self._status())))
        return "; ".join(words) or "somebody deleted it"

    def _late(self, now: float) -> str:
        return "" if self.deleted_at is None else f" {now - self.deleted_at:.0f} s later"

    def _memory(self) -> str:
        words = self.last_words
        limit = self.memory_limit or _whole(words.get("memory_limit"))
        used, at = _whole(words.get("memory_peak")), words.get("at")
        told = [f"the limit is {readable(limit)}" if limit else "", f"{readable(used)} were in use" if used else ""]
        when = f" {at:.0f} s after its start" if used and isinstance(at, int | float) else ""
        return "ran out of memory" + (": " if any(told) else "") + ", ".join(filter(None, told)) + when

    def _made(self, kind: Kind, message: str, by: str = "", hint: str = "") -> Ending:
        where = f" on node {self.node}" if self.node else ""
        code = f" (exit code {self.code})" if self.code is not None else ""
        whole = f"pod {self.name}{where}: {message[:LONGEST]}{code}"
        said = self.last_words.get("message")
        if said and kind in ("exited", "interrupted") and self.code:
            whole += f": {str(said)[:LONGEST]}"
        return Ending(kind=kind, message=whole, hint=hint, code=self.code, by=by)


PLACE = (
    "the cluster needs a machine for it: compare the compute class (cpu, memory, gpu, node_selector, tolerations) "
    "with the nodes; `wait` is how long it may take"
)
MEMORY = "a compute class with more `memory`, or less at a time: a smaller batch, fewer rows, fewer workers"
DISK = "more `storage` (of /tmp) or `shared_memory` (of /dev/shm) in the compute class"
DEADLINE = "`timeout` of the compute class"
PUSH = "is the image pushed under this name, and may the cluster pull it (kubernetes.pull_secrets)?"
CONFIGURE = "what the pod refers to must be in its namespace (Secret, service account), and its image hold `orrery`"


class Seen(BaseModel):
    """All pods of one unit: what is known of them so far. It can be written down and read again."""

    model_config = ConfigDict(extra="forbid")
    unit: str = ""
    pods: int = Field(1, ge=1, description="How many pods the unit has.")
    container: str = CONTAINER
    since: float | None = Field(None, description="When it was first looked at.")
    members: dict[str, Member] = Field(default_factory=dict, description="By uid.")
    known: Ending | None = Field(None, description="The best known end so far.")

    def update(self, pod: Mapping[str, Any], now: float) -> None:
        """Take in a pod of the unit as it is now."""
        self._look(now)
        meta = _dict(pod, "metadata")
        key = _text(meta, "uid") or self._key(_text(meta, "name"))
        if key not in self.members:
            if self.pods == 1:
                self.members.clear()  # made anew under the same name
            self.members[key] = Member(seen_at=now)
        self.members[key].update(pod, self.container, now)

    def removed(self, pod: Mapping[str, Any] | None, name: str, now: float) -> None:
        """Take in that a pod is gone; `pod`: as it was last, where that is told."""
        self._look(now)
        meta = _dict(pod or {}, "metadata")
        key = _text(meta, "uid") or self._key(name or _text(meta, "name"))
        if key not in self.members:
            if self.pods == 1 and self.members:
                return  # an earlier one of the same name
            self.members[key] = Member(seen_at=now, name=name)
        member = self.members[key]
        if pod:
            member.update(pod, self.container, now)
        member.gone = True
        member.ended_at = now if member.ended_at is None else member.ended_at

    def waiting(self) -> str:
        """Return why it does not run yet, in the scheduler's or the kubelet's words; empty when it runs or is over."""
        words = [m.waiting() for m in self._ordered() if m.waiting()]
        here = len(self.members)
        if here < self.pods and not any(m.ended for m in self.members.values()):
            words.append(f"{here} of {self.pods} pods are there" if self.pods > 1 else "the pod is not there yet")
        distinct = list(dict.fromkeys(words))
        if self.pods == 1 or not distinct:
            return "; ".join(distinct)
        waits = sum(bool(m.waiting()) for m in self.members.values()) + max(self.pods - here, 0)
        return f"{waits} of {self.pods} pods wait: {'; '.join(distinct)}"[:LONGEST]

    @property
    def leader(self) -> Member | None:
        """The pod whose end is the unit's: the one with index 0, or the only one."""
        if self.pods == 1:
            return next(iter(self.members.values()), None)
        return next((m for m in self._ordered() if m.index == 0), None)

    def ending(self, now: float, *, wait_until: float, grace: float, silent: float) -> Ending | None:
        """Return how the unit ended, or that it cannot go on; None: it goes on.

        `wait_until`: when waiting for a machine ends. `grace`: seconds from SIGTERM to SIGKILL. `silent`: how many
        seconds of a node's silence are borne. An ending once given stays, unless a better known one comes.
        """
        self._look(now)
        found, known = self._judge(now, wait_until, grace, silent), self.known
        if found is not None and (known is None or found.kind == known.kind or _rank(found) > _rank(known)):
            self.known = found
        return self.known

    def due(self, now: float, *, wait_until: float, grace: float, silent: float) -> float | None:
        """Return when to ask `ending` again although nothing has changed; None: no need to."""
        times = [m.due(now, wait_until, silent) for m in self.members.values()]
        patience = self._patience(now, grace)
        if len(self.members) < self.pods and patience is None:
            times.append(wait_until)
        times.append(patience)
        return min((t for t in times if t is not None), default=None)

    def _judge(self, now: float, wait_until: float, grace: float, silent: float) -> Ending | None:
        leader = self.leader
        if self.pods == 1 and leader is not None:
            return leader.ending(now, wait_until, silent)
        if leader is not None and leader.code == 0 and leader.ended:
            return leader.ending(now, wait_until, silent)
        ends = [(m, e) for m in self._ordered() if (e := m.ending(now, wait_until, silent)) is not None]
        broken = [(m, e) for m, e in ends if not (m.ended and m.code == 0)]
        for member, end in broken:
            if not member.ended:
                return end  # it will never run, or is lost: the others wait for it in vain
        if len(ends) == self.pods and not broken:
            return ends[0][1]
        patience = self._patience(now, grace)
        if broken and (len(ends) == self.pods or patience is None or now >= patience):
            return self._first(broken, now)
        if patience is None and len(self.members) < self.pods and now >= wait_until:
            return Ending(kind="unplaced", message=f"unit {self.unit}: {self.waiting()}", hint=PLACE)
        return None

    def _first(self, broken: list[tuple[Member, Ending]], now: float) -> Ending:
        """Return the end that the others follow from.

        That is what was done to a pod; else that a pod which has not ended is told to go, or its node silent; else
        what ended first, by itself.
        """
        began = self._began

        def order(each: tuple[Member, Ending]) -> tuple[int, float]:
            member, end = each
            if self._explains(member, end):
                return 0, member.ended_at or 0.0
            return (2 if end.kind in ("interrupted", "gone") else 1), member.ended_at or 0.0

        member, end = min(broken, key=order)
        if not self._explains(member, end):
            for other in self._left():
                if (cause := other.cause(began, now)) is not None:
                    member, end = other, cause
                    break
        if self.pods == 1 or member.index is None:
            return end
        how = "ended first" if member.ended else "is why the others ended"
        return end.model_copy(update={"message": f"node {member.index} of the training {how}: {end.message}"})

    def _explains(self, member: Member, end: Ending) -> bool:
        """Tell whether an end is no other's consequence."""
        return member.primary or end.kind in ("node_lost", "config", "image") or member.asked(self._began)

    def _patience(self, now: float, grace: float) -> float | None:
        """Return until when the others may take to end after a pod has, or what became of them be told; or None."""
        began, leader = self._began, self.leader
        if self.pods == 1 or began is None:
            return None
        times = [] if leader is not None and leader.ended else [began + grace + MARGIN_S]
        left = self._left()
        if left and not any(m.cause(began, now) for m in left) and not self._explained(now):
            # A rank that has lost its peer knows it sooner than the cluster does.
            by = [m.gone_by + MARGIN_S for m in left if m.gone_by is not None]
            times.append(max(began + HEARD_S, *by) if by else began + HEARD_S)
        return max(times, default=None)

    def _explained(self, now: float) -> bool:
        """Tell whether a pod has ended by more than itself or another's end."""
        ends = [(m, m.over(now)) for m in self.members.values() if m.ended and m.code != 0]
        return any(end is not None and self._explains(m, end) for m, end in ends)

    @property
    def _began(self) -> float | None:
        """When the first pod ended badly."""
        ended = [m.ended_at for m in self.members.values() if m.ended and m.code != 0 and m.ended_at is not None]
        return min(ended, default=None)

    def _left(self) -> list[Member]:
        """Return the pods that have run and not ended."""
        return [m for m in self._ordered() if m.started and not m.ended]

    def _ordered(self) -> list[Member]:
        return sorted(self.members.values(), key=lambda m: (m.index is None, m.index or 0, m.name))

    def _key(self, name: str) -> str:
        """Return the key of the pod of a name, where no uid is told."""
        return next((k for k, m in self.members.items() if m.name == name), f"name:{name}")

    def _look(self, now: float) -> None:
        self.since = now if self.since is None else self.since


def explained(ending: Ending, words: Iterable[str]) -> Ending:
    """Return the ending of a pod that is gone without a word, with what events (`Reason: message`) say of why."""
    if ending.kind != "gone":
        return ending
    for word in words:
        kind_by = EVENTS.get(word.partition(":")[0].strip())
        if kind_by is not None:
            kind, by = kind_by
            return ending.model_copy(update={"kind": kind, "by": by, "message": f"{ending.message} ({word[:LONGEST]})"})
    return ending


def size(quantity: object) -> int | None:
    """Return a quantity of Kubernetes (`2Gi`, `512M`, `1e9`) in bytes, or None for what is none."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?(?:e[0-9]{1,2})?)([KMGT]i|[kMGT]?)", str(quantity))
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def readable(size_: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{size_ / 2**30:.2f} GiB" if size_ >= 2**30 else f"{size_ / 2**20:.0f} MiB"


def _rank(ending: Ending) -> int:
    return RANK.get(ending.kind, BEST)


def _index(meta: Mapping[str, Any]) -> int | None:
    labels = {**_dict(meta, "annotations"), **_dict(meta, "labels")}
    told = labels.get(INDEX)
    if told is None and (replica := labels.get(REPLICA_INDEX)) is not None:
        found = _number(replica)
        return found if found is None or labels.get(REPLICA_TYPE) == "master" else found + 1
    return _number(told)


def _number(text: object) -> int | None:
    return int(text) if isinstance(text, str) and re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _named(each: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """Return the one of a name; of another name only where it is alone."""
    found = next((c for c in each if c.get("name") == name), None)
    return found if found is not None else each[0] if len(each) == 1 else {}


def _dict(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = of.get(name)
    return found if isinstance(found, Mapping) else {}


def _dicts(of: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    found = of.get(name)
    return (each for each in found if isinstance(each, Mapping)) if isinstance(found, list) else iter(())


def _text(of: Mapping[str, Any], name: str) -> str:
    found = of.get(name)
    return found if isinstance(found, str) else ""
