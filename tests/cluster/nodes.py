"""The scheduler, and every way in which a cluster takes a pod away: the same conditions, reasons and order.

What is called here may be called from a test's thread, or posted: `POST /_cluster/drain {"node": "node-a"}`.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.objects import (
    NODES,
    PODS,
    QUOTAS,
    Change,
    Object,
    Refused,
    condition,
    is_over,
    matcher,
    now,
    quantity,
    requests_of,
    set_condition,
)

if TYPE_CHECKING:
    from cluster.api import Cluster

NODE = "node-a"
MISSED_S = 40.0  # node-monitor-grace-period: until a silent node is marked
REMOVED_S = 20.0  # until a cloud has told that the machine is no more
COLLECTED_S = 60.0  # until the pods of a Node that was deleted are collected
SHUTDOWN_S = 30.0  # shutdownGracePeriod of the kubelet
UNREACHABLE = "node.kubernetes.io/unreachable"
NOT_READY = "node.kubernetes.io/not-ready"
UNSCHEDULABLE = "node.kubernetes.io/unschedulable"
Failure = Callable[..., Any]


def failure(work: Failure) -> Failure:
    """Let a method be called from any thread, and by a request."""

    @functools.wraps(work)
    def safely(self: Nodes, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == self.thread:
            return work(self, *args, **kwargs)
        return self.cluster.do(lambda: work(self, *args, **kwargs))

    safely.is_failure = True  # type: ignore[attr-defined]
    return safely


class Nodes:
    """The machines."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.objects, self.thread = cluster, cluster.objects, threading.get_ident()
        self._off: set[str] = set()
        self._soon = False
        self._preempting: set[str] = set()
        members = {name: getattr(self, name) for name in dir(type(self)) if not name.startswith("_")}
        self.failures = {name: work for name, work in members.items() if getattr(work, "is_failure", False)}

    async def close(self) -> None:
        self._off |= {n["metadata"]["name"] for n in self.objects.list(NODES)}

    def is_on(self, node: str) -> bool:
        """Tell whether a node's kubelet works."""
        return node not in self._off and self.objects.find(NODES, "", node) is not None

    # -- machines come and go ----------------------------------------------------------------------

    def add_now(
        self,
        name: str,
        cpu: str = "64",
        memory: str = "256Gi",
        gpu: int = 8,
        pods: int = 1000,
        labels: dict[str, str] | None = None,
        taints: list[Object] | None = None,
    ) -> None:
        resources = {
            "cpu": cpu,
            "memory": memory,
            "nvidia.com/gpu": str(gpu),
            "pods": str(pods),
            "ephemeral-storage": "1000Gi",
        }
        node: Object = {
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
            "spec": {"taints": taints or []}, "status": {"capacity": resources, "allocatable": resources},
        }  # fmt: skip
        set_condition(node, "Ready", "True", "KubeletReady", "kubelet is posting ready status")
        self._off.discard(name)
        self.objects.create(NODES, "", node)

    @failure
    def add(self, name: str, **more: Any) -> None:
        """A machine joins: cpu, memory, gpu, pods, labels, taints."""
        self.add_now(name, **more)

    @failure
    def remove(self, name: str) -> None:
        """A machine without pods leaves."""
        self.objects.remove(NODES, self.objects.get(NODES, "", name))

    @failure
    def label(self, node: str, labels: dict[str, str]) -> None:
        self._edit(node, lambda n: n["metadata"]["labels"].update(labels))

    @failure
    def cordon(self, node: str = NODE) -> None:
        self._edit(node, lambda n: n["spec"].update(unschedulable=True))

    @failure
    def uncordon(self, node: str = NODE) -> None:
        self._edit(node, lambda n: n["spec"].pop("unschedulable", None))

    # -- ways to lose a pod --------------------------------------------------------------------------

    @failure
    def drain(self, node: str = NODE) -> None:
        """`kubectl drain`: the Eviction API, each pod with its grace."""
        self.cordon(node)
        for pod in self._on(node):
            self.evict_now(pod)

    @failure
    def evict(self, pod: str = "", labels: str = "") -> None:
        for found in self._pick(pod, labels):
            self.evict_now(found)

    def evict_now(self, pod: Object, grace: int | None = None) -> None:
        self._disrupt(pod, "EvictionByEvictionAPI", "Eviction API: evicting")
        self.cluster.controllers.delete_pod(pod, grace)

    @failure
    def taint(self, node: str = NODE, key: str = "maintenance", value: str = "", effect: str = "NoExecute") -> None:
        """Taint a node; the taint manager deletes what does not bear a NoExecute."""
        new = {"key": key, "value": value, "effect": effect}
        self._edit(node, lambda n: n["spec"]["taints"].append(new))
        if effect == "NoExecute":
            for pod in self._on(node):
                patience = self._patience(pod, new)
                if patience is not None:
                    asyncio.get_running_loop().call_later(patience, self._taint_manager, pod, node, key)

    def _taint_manager(self, pod: Object, node: str, key: str) -> None:
        machine = self.objects.find(NODES, "", node)
        if machine is not None and not any(t["key"] == key for t in machine["spec"]["taints"]):
            return
        found = self.objects.find(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"])
        if found is None or found["metadata"]["uid"] != pod["metadata"]["uid"] or is_over(found):
            return
        meta = found["metadata"]
        about = f"{meta['namespace']}/{meta['name']}"
        self.cluster.controllers.event(
            found, "TaintManagerEviction", f"Marking for deletion Pod {about}", source="taint-eviction-controller"
        )
        self._disrupt(found, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
        self.cluster.controllers.delete_pod(found)

    @failure
    def shutdown(self, node: str = NODE, grace: float = SHUTDOWN_S) -> None:
        """Graceful node shutdown, as at the end of a spot machine: the kubelet ends the pods, their objects stay."""
        self._edit(node, lambda n: set_condition(n, "Ready", "False", "KubeletNotReady", "node is shutting down"))
        message = "Pod was terminated in response to imminent node shutdown."
        for pod in self._on(node):
            own = float(pod["spec"].get("terminationGracePeriodSeconds", 30))
            self._worker(pod).stop(min(own, grace), ("Terminated", message), ("TerminationByKubelet", message))

    @failure
    def power_off(self, node: str = NODE, deleted: bool = True, dead: bool = True) -> None:
        """Cut the power. `deleted`: the cloud removes the Node object. Not `dead`: only the network is cut."""
        self._off.add(node)
        for pod in self._on(node):
            worker = self._worker(pod)
            if dead:
                worker.vanish()
            else:
                worker.off = True
                for container in worker.main:
                    container.silent = True
        self.cluster.kubelet.wake()
        self.cluster.controllers.spawn(self._deleted(node) if deleted else self._missed(node))

    async def _deleted(self, node: str) -> None:
        pace = self.cluster.pace
        await asyncio.sleep(REMOVED_S * pace)
        if (machine := self.objects.find(NODES, "", node)) is not None:
            self.objects.remove(NODES, machine)
        await asyncio.sleep((COLLECTED_S - REMOVED_S) * pace)
        for pod in self._on(node):

            def failed(obj: Object) -> None:
                obj["status"]["phase"] = "Failed"
                set_condition(obj, "DisruptionTarget", "True", "DeletionByPodGC", "PodGC: node no longer exists")

            self.objects.change(PODS, pod, failed)
            self.objects.remove(PODS, pod)

    async def _missed(self, node: str) -> None:
        await asyncio.sleep(MISSED_S * self.cluster.pace)
        silent = ("NodeStatusUnknown", "Kubelet stopped posting node status.")
        self._edit(node, lambda n: set_condition(n, "Ready", "Unknown", *silent))
        for pod in self._on(node):
            ready = condition(pod, "Ready") or {}
            about = (ready.get("reason", ""), ready.get("message", ""))
            self.objects.change(PODS, pod, lambda p: set_condition(p, "Ready", "False", *about))  # noqa: B023
            self.cluster.controllers.event(pod, "NodeNotReady", "Node is not ready", "Warning", "node-controller")
        self.taint(node, UNREACHABLE, effect="NoSchedule")
        self.taint(node, UNREACHABLE)

    @failure
    def power_on(self, node: str = NODE) -> None:
        """The machine is back: its kubelet finds the containers of its pods gone."""
        ended = {"exitCode": 137, "reason": "ContainerStatusUnknown", "startedAt": None, "finishedAt": None,
                 "message": "The container could not be located when the pod was terminated"}  # fmt: skip
        self._back(node, ended)

    @failure
    def reboot(self, node: str = NODE) -> None:
        """A power cycle that nobody misses in time: containerd still knows its containers, which it finds dead."""
        self._off.add(node)
        for pod in self._on(node):
            self._worker(pod).vanish()
        self._back(node, {"exitCode": 255, "reason": "Unknown", "startedAt": now(), "finishedAt": now()})

    def _back(self, node: str, ended: Object) -> None:
        self._off.discard(node)

        def back(machine: Object) -> None:
            set_condition(machine, "Ready", "True", "KubeletReady", "kubelet is posting ready status")
            machine["spec"]["taints"] = [t for t in machine["spec"]["taints"] if t["key"] != UNREACHABLE]

        self._edit(node, back)
        for pod in self._on(node):
            if pod["metadata"].get("deletionTimestamp"):
                self.objects.remove(PODS, pod)
                continue

            def lost(obj: Object) -> None:
                obj["status"]["phase"] = "Failed"
                for status in obj["status"].get("containerStatuses") or []:
                    status |= {"state": {"terminated": ended}, "ready": False, "started": False}

            self.objects.change(PODS, pod, lost)

    @failure
    def oom(self, pod: str = "", labels: str = "") -> None:
        """The kernel kills a container that took more than its limit."""
        for found in self._pick(pod, labels):
            for container in self._worker(found).main:
                container.reason = "OOMKilled"
                container.kill()

    @failure
    def kill(self, pod: str = "", labels: str = "") -> None:
        """SIGKILL to the containers, from nowhere."""
        for found in self._pick(pod, labels):
            for container in self._worker(found).main:
                container.kill()

    @failure
    def end(self, code: int = 0, pod: str = "", labels: str = "") -> None:
        """A container ends with a code, wherever it is in its work: one that traps SIGTERM and ends with 0, say."""
        for found in self._pick(pod, labels):
            for container in self._worker(found).main:
                container.forced = code
                container.kill()

    @failure
    def pressure(self, pod: str = "", labels: str = "") -> None:
        """The kubelet evicts for lack of memory on the node: at once, the object stays."""
        for found in self._pick(pod, labels):
            name = found["spec"]["containers"][0]["name"]
            message = f"The node was low on resource: memory. Threshold quantity: 100Mi, available: 52Mi. Container {name} was using 3Gi, request is 1Gi, has larger consumption of memory. "
            self.cluster.controllers.event(found, "Evicted", message, "Warning", "kubelet")
            self._worker(found).stop(0, ("Evicted", message), ("TerminationByKubelet", message))

    @failure
    def preempt(self, pod: str = "", labels: str = "") -> None:
        """The scheduler takes the place for a more important pod."""
        for found in self._pick(pod, labels):
            self._preempt(found)

    def _preempt(self, pod: Object) -> None:
        node = pod["spec"].get("nodeName", NODE)
        message = "default-scheduler: preempting to accommodate a higher priority pod"
        self._disrupt(pod, "PreemptionByScheduler", message)
        self.cluster.controllers.event(
            pod, "Preempted", f"Preempted by a pod on node {node}", source="default-scheduler"
        )
        self.cluster.controllers.delete_pod(pod)

    @failure
    def delete(self, pod: str = "", labels: str = "", grace: int | None = None) -> None:
        """Somebody deletes a pod, without a word."""
        for found in self._pick(pod, labels, over=True):
            self.cluster.controllers.delete_pod(found, grace)

    @failure
    def quota(self, hard: dict[str, str] | None = None, seconds: float = 0.0, namespace: str = "orrery") -> None:
        """Let a ResourceQuota refuse pods, for so long (0: until `no_quota`)."""
        self.no_quota(namespace)
        self.objects.create(QUOTAS, namespace, {"metadata": {"name": "team"}, "spec": {"hard": hard or {"pods": "0"}}})
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self.no_quota, namespace)

    @failure
    def no_quota(self, namespace: str = "orrery") -> None:
        if (found := self.objects.find(QUOTAS, namespace, "team")) is not None:
            self.objects.remove(QUOTAS, found)

    @failure
    def break_image(self, image: str, message: str, seconds: float = 1e9) -> None:
        """Let the pull of an image fail with a message, for so long."""
        self.cluster.kubelet.images[image] = (message, time.monotonic() + seconds)

    # -- the scheduler --------------------------------------------------------------------------------

    def hear(self, change: Change) -> None:
        if change.kind in (PODS, NODES) and not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self._schedule)

    def _schedule(self) -> None:
        self._soon = False
        waiting = [
            p
            for p in self.objects.list(PODS)
            if not p["spec"].get("nodeName") and not is_over(p) and not p["metadata"].get("deletionTimestamp")
        ]
        if not waiting:
            return
        used = self._used()
        for pod in sorted(waiting, key=lambda p: -int(p["spec"].get("priority") or 0)):
            machine, why = self._place(pod, used)
            if machine is None:
                self._unplaced(pod, why)
                continue
            name = machine["metadata"]["name"]
            for resource, amount in {**requests_of(pod), "pods": 1.0}.items():
                used[name][resource] += amount

            def bind(obj: Object) -> None:
                obj["spec"]["nodeName"] = name  # noqa: B023
                set_condition(obj, "PodScheduled", "True")

            self._preempting.discard(pod["metadata"]["uid"])
            bound = self.objects.change(PODS, pod, bind)
            about = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
            if bound:
                self.cluster.controllers.event(
                    bound, "Scheduled", f"Successfully assigned {about} to {name}", source="default-scheduler"
                )

    def _used(self) -> dict[str, Counter[str]]:
        used: dict[str, Counter[str]] = {n["metadata"]["name"]: Counter() for n in self.objects.list(NODES)}
        for pod in self.objects.list(PODS, match=lambda p: bool(p["spec"].get("nodeName")) and not is_over(p)):
            counted = used.setdefault(pod["spec"]["nodeName"], Counter())
            for resource, amount in {**requests_of(pod), "pods": 1.0}.items():
                counted[resource] += amount
        return used

    def _place(self, pod: Object, used: dict[str, Counter[str]]) -> tuple[Object | None, Counter[str]]:
        """Return the node for a pod, or how many nodes are out for which reason."""
        why: Counter[str] = Counter()
        for node in self.objects.list(NODES):
            reasons = self._against(pod, node, used[node["metadata"]["name"]])
            if not reasons:
                return node, why
            why.update(reasons)
        return None, why

    def _against(self, pod: Object, node: Object, used: Counter[str]) -> list[str]:
        labels = node["metadata"].get("labels") or {}
        if node["spec"].get("unschedulable"):
            return ["node(s) were unschedulable"]
        if (condition(node, "Ready") or {}).get("status") != "True":
            return [f"node(s) had untolerated taint {{{NOT_READY}: }}"]
        if not (pod["spec"].get("nodeSelector") or {}).items() <= labels.items():
            return ["node(s) didn't match Pod's node affinity/selector"]
        for taint in node["spec"].get("taints") or []:
            if taint["effect"] != "PreferNoSchedule" and not any(_bears(t, taint) for t in _tolerations(pod)):
                return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"]
        there = node["status"]["allocatable"]
        wanted = {**requests_of(pod), "pods": 1.0}
        lacking = [r for r, amount in wanted.items() if amount and used[r] + amount > quantity(there.get(r, 0))]
        return ["Too many pods" if r == "pods" else f"Insufficient {r}" for r in lacking]

    def _unplaced(self, pod: Object, why: Counter[str]) -> None:
        count = len(self.objects.list(NODES))
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(why.items()))
        message = f"0/{count} nodes are available: {reasons}." if count else "no nodes available to schedule pods"
        if count and self._make_room(pod):
            return
        if count:
            message += f" preemption: 0/{count} nodes are available: {count} Preemption is not helpful for scheduling."
        before = condition(pod, "PodScheduled") or {}
        if before.get("message") == message:
            return
        self.objects.change(PODS, pod, lambda p: set_condition(p, "PodScheduled", "False", "Unschedulable", message))
        self.cluster.controllers.event(pod, "FailedScheduling", message, "Warning", "default-scheduler")

    def _make_room(self, pod: Object) -> bool:
        """Preempt less important pods of one node, if that helps."""
        if pod["metadata"]["uid"] in self._preempting:
            return True
        mine = int(pod["spec"].get("priority") or 0)
        for node in self.objects.list(NODES):
            lesser = [p for p in self._on(node["metadata"]["name"]) if int(p["spec"].get("priority") or 0) < mine]
            used = self._used()[node["metadata"]["name"]]
            victims = []
            for other in sorted(lesser, key=lambda p: int(p["spec"].get("priority") or 0)):
                used.subtract({**requests_of(other), "pods": 1.0})
                victims.append(other)
                if not self._against(pod, node, used):
                    self._preempting.add(pod["metadata"]["uid"])
                    for victim in victims:
                        self._preempt(victim)
                    return True
        return False

    # -- small things -----------------------------------------------------------------------------------

    def _on(self, node: str) -> list[Object]:
        return self.objects.list(PODS, match=lambda p: p["spec"].get("nodeName") == node and not is_over(p))

    def _pick(self, pod: str, labels: str, over: bool = False) -> list[Object]:
        match = matcher(labels, "")
        found = self.objects.list(PODS, match=lambda p: match(p) and pod in ("", p["metadata"]["name"]))
        found = [p for p in found if over or not is_over(p)]
        if not found:
            raise Refused(404, "NotFound", f"no living pod {pod or labels or 'at all'}")
        return found

    def _worker(self, pod: Object) -> Any:
        worker = self.cluster.kubelet.workers.get(pod["metadata"]["uid"])
        if worker is None:
            raise Refused(409, "Conflict", f"pod {pod['metadata']['name']} has no node yet")
        return worker

    def _edit(self, node: str, edit: Callable[[Object], Any]) -> None:
        self.objects.change(NODES, self.objects.get(NODES, "", node), edit)

    def _disrupt(self, pod: Object, reason: str, message: str) -> None:
        self.objects.change(PODS, pod, lambda p: set_condition(p, "DisruptionTarget", "True", reason, message))

    def _patience(self, pod: Object, taint: Object) -> float | None:
        """Return after how many seconds a pod must leave a tainted node; None: it may stay."""
        bearing = [t for t in _tolerations(pod) if _bears(t, taint)]
        if not bearing:
            return 0.0
        limits = [t["tolerationSeconds"] for t in bearing if t.get("tolerationSeconds") is not None]
        if not limits:
            return None
        own = pod["metadata"]["uid"] not in self.cluster.controllers.defaulted
        return float(min(limits)) * (1.0 if own else self.cluster.pace)


def _tolerations(pod: Object) -> list[Object]:
    return pod["spec"].get("tolerations") or []


def _bears(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("key") not in (None, "", taint["key"]):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return True
    return (toleration.get("value") or "") == taint.get("value", "")
