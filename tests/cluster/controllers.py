"""What a cluster does by itself: admission and quotas, Jobs, Kubeflow's PyTorchJobs, garbage collection, events."""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from cluster.objects import (
    EVENTS,
    JOBS,
    KINDS,
    PODS,
    PRIORITIES,
    PYTORCH_JOBS,
    QUOTAS,
    SERVICES,
    Change,
    Kind,
    Object,
    Refused,
    condition,
    is_over,
    now,
    quantity,
    requests_of,
    set_condition,
)

if TYPE_CHECKING:
    from cluster.api import Cluster

INDEX = "batch.kubernetes.io/job-completion-index"
BACK_OFF_S = 10.0  # until a failed pod of a Job is replaced
UNREACHABLE_S = 300
NODE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


class Controllers:
    """Admission, and the controller manager."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.objects = cluster, cluster.objects
        self._tasks: set[asyncio.Task[Any]] = set()
        self.defaulted: set[str] = set()  # pods whose patience with silent nodes is the cluster's own

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- admission --------------------------------------------------------------------------------

    def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Take up a new object, as the API server and its admission plugins do."""
        if body.get("kind") not in (None, kind.name):
            raise Refused(
                400, "BadRequest", f"{body['kind']} in version {kind.version!r} cannot be handled as a {kind.name}"
            )
        if kind is not PODS:
            return self.objects.create(kind, namespace, self._job(body) if kind is JOBS else body)
        made = self.objects.create(kind, namespace, self._admitted(namespace, body))
        if not any(t.get("key") in NODE_TAINTS for t in body["spec"].get("tolerations") or []):
            self.defaulted.add(made["metadata"]["uid"])
        return made

    def _admitted(self, namespace: str, body: Object) -> Object:
        pod = copy.deepcopy(body)
        name = (pod.get("metadata") or {}).get("name") or (pod.get("metadata") or {}).get("generateName", "")
        spec = pod.get("spec") or {}
        if not spec.get("containers"):
            raise Refused(422, "Invalid", f'Pod "{name}" is invalid: spec.containers: Required value')
        spec.setdefault("restartPolicy", "Always")
        spec.setdefault("terminationGracePeriodSeconds", 30)
        spec.setdefault("schedulerName", "default-scheduler")
        spec.setdefault("serviceAccountName", "default")
        for container in spec["containers"]:
            container.setdefault("imagePullPolicy", "IfNotPresent")
            container.setdefault("terminationMessagePath", "/dev/termination-log")
            container.setdefault("terminationMessagePolicy", "File")
        borne = {t.get("key") for t in spec.get("tolerations") or []}
        for key in NODE_TAINTS:
            if key not in borne:
                patience = {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": UNREACHABLE_S}
                spec.setdefault("tolerations", []).append(patience)
        spec["priority"] = self._priority(name, spec)
        pod["status"] = {"phase": "Pending", "qosClass": "Burstable"}
        pod["spec"] = spec
        if found := pod["metadata"].get("name"):
            try:
                self.objects.get(PODS, namespace, found)
            except Refused:
                pass
            else:
                raise Refused(409, "AlreadyExists", f'pods "{found}" already exists', {"name": found, "kind": "pods"})
        self._within_quota(namespace, name, pod)
        return pod

    def _priority(self, name: str, spec: Object) -> int:
        asked = spec.get("priorityClassName")
        if not asked:
            default = next((c for c in self.objects.list(PRIORITIES) if c.get("globalDefault")), None)
            return int(default["value"]) if default else 0
        found = self.objects.find(PRIORITIES, "", asked)
        if found is None:
            raise Refused(403, "Forbidden", f'pods "{name}" is forbidden: no PriorityClass with name {asked} was found')
        return int(found["value"])

    def _within_quota(self, namespace: str, name: str, pod: Object) -> None:
        asked = self._counted(pod)
        for quota in self.objects.list(QUOTAS, namespace):
            hard = quota["spec"].get("hard") or {}
            quota_name = quota["metadata"]["name"]
            missing = [
                r
                for r in ("requests.cpu", "requests.memory", "limits.cpu", "limits.memory")
                if r in hard and r not in asked
            ]
            if missing:
                message = f'pods "{name}" is forbidden: failed quota: {quota_name}: must specify {",".join(missing)}'
                raise Refused(403, "Forbidden", message, {"name": name, "kind": "pods"})
            used: dict[str, float] = {}
            for other in self.objects.list(PODS, namespace, lambda p: not is_over(p)):
                for resource, amount in self._counted(other).items():
                    used[resource] = used.get(resource, 0.0) + amount
            over = [r for r, most in hard.items() if asked.get(r) and used.get(r, 0) + asked[r] > quantity(most)]
            if over:

                def said(amounts: dict[str, float]) -> str:
                    return ",".join(f"{r}={_amount(r, amounts.get(r, 0))}" for r in sorted(over))  # noqa: B023

                limited = ",".join(f"{r}={hard[r]}" for r in sorted(over))
                message = f'pods "{name}" is forbidden: exceeded quota: {quota_name}, requested: {said(asked)}, used: {said(used)}, limited: {limited}'
                raise Refused(403, "Forbidden", message, {"name": name, "kind": "pods"})

    @staticmethod
    def _counted(pod: Object) -> dict[str, float]:
        amounts = {"pods": 1.0, "count/pods": 1.0}
        for container in pod["spec"]["containers"]:
            resources = container.get("resources") or {}
            for name, value in (resources.get("limits") or {}).items():
                amounts[f"limits.{name}"] = amounts.get(f"limits.{name}", 0.0) + quantity(value)
        return amounts | {f"requests.{name}": amount for name, amount in requests_of(pod).items()}

    # -- deletion ---------------------------------------------------------------------------------

    def delete(self, kind: Kind, obj: Object, options: Object) -> Object:
        """Delete an object, and what it owns."""
        wanted = (options.get("preconditions") or {}).get("uid")
        if wanted and wanted != obj["metadata"]["uid"]:
            message = (
                f"the UID in the precondition ({wanted}) does not match the UID in record ({obj['metadata']['uid']})"
            )
            raise Refused(409, "Conflict", message)
        if kind is PODS:
            grace = options.get("gracePeriodSeconds")
            return self.delete_pod(obj, None if grace is None else int(grace))
        policy = options.get("propagationPolicy")
        # For batch/v1 the server's default leaves a Job's pods alone; whoever wants them gone must say so.
        if policy == "Orphan" or (policy is None and kind is JOBS):
            for owned in self._owned(PODS, obj):
                self.objects.change(PODS, owned, lambda o: o["metadata"].pop("ownerReferences", None))
        return self.objects.remove(kind, obj) or obj

    def delete_pod(self, pod: Object, grace: int | None = None) -> Object:
        """Delete a pod as its DELETE does: at once where nothing runs, else by its kubelet."""
        found = self.objects.get(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"])
        own = found["spec"].get("terminationGracePeriodSeconds", 30)
        period = own if grace is None else grace
        if is_over(found) or not found["spec"].get("nodeName"):
            period = 0
        if period == 0:
            return self.objects.remove(PODS, found) or found
        since = found["metadata"].get("deletionTimestamp")
        if since and period >= found["metadata"].get("deletionGracePeriodSeconds", 0):
            return found

        def edit(obj: Object) -> None:
            obj["metadata"] |= {"deletionTimestamp": _later(period), "deletionGracePeriodSeconds": period}

        return self.objects.change(PODS, found, edit) or found

    def _owned(self, kind: Kind, owner: Object) -> list[Object]:
        uid = owner["metadata"]["uid"]
        return self.objects.list(
            kind, match=lambda o: any(r.get("uid") == uid for r in o["metadata"].get("ownerReferences") or [])
        )

    # -- events -----------------------------------------------------------------------------------

    def event(self, obj: Object, reason: str, message: str, type_: str = "Normal", source: str = "test") -> None:
        """Record an event; one that says the same again is counted."""
        meta = obj["metadata"]
        namespace = meta.get("namespace") or "default"
        for old in self.objects.list(EVENTS, namespace):
            same = (old["involvedObject"].get("uid"), old["reason"], old["message"]) == (meta["uid"], reason, message)
            if same:
                self.objects.change(EVENTS, old, lambda e: e.update(count=e["count"] + 1, lastTimestamp=now()))
                return
        about = {
            "kind": obj["kind"], "namespace": meta.get("namespace"), "name": meta["name"], "uid": meta["uid"],
            "apiVersion": obj["apiVersion"], "resourceVersion": meta["resourceVersion"],
        }  # fmt: skip
        at = now()
        self.objects.create(EVENTS, namespace, {
            "metadata": {"name": f"{meta['name'][:200]}.{uuid.uuid4().hex[:16]}"}, "involvedObject": about,
            "reason": reason, "message": message, "type": type_, "count": 1, "firstTimestamp": at, "lastTimestamp": at,
            "source": {"component": source}, "reportingComponent": source,
        })  # fmt: skip

    # -- Jobs and what they own ---------------------------------------------------------------------

    def hear(self, change: Change) -> None:
        if change.type == "DELETED":
            self._collect(change.object)
        if change.kind in (JOBS, PYTORCH_JOBS) and change.type == "ADDED":
            loop = asyncio.get_running_loop()
            loop.call_soon(self._sync, change.kind, change.object)
        if change.kind is PODS and change.type != "ADDED":
            for reference in change.object["metadata"].get("ownerReferences") or []:
                kind = {"Job": JOBS, "PyTorchJob": PYTORCH_JOBS}.get(reference["kind"])
                owner = (
                    self.objects.find(kind, change.object["metadata"]["namespace"], reference["name"]) if kind else None
                )
                if kind and owner and owner["metadata"]["uid"] == reference["uid"]:
                    if is_over(change.object) or change.type == "DELETED":
                        self._noted(kind, owner, change.object)
                    asyncio.get_running_loop().call_soon(self._sync, kind, owner)

    def _collect(self, owner: Object) -> None:
        """Delete what an object owned, in the background."""
        for kind in list(KINDS.values()):
            for owned in self._owned(kind, owner):
                if kind is PODS:
                    asyncio.get_running_loop().call_soon(self._gone, owned)
                else:
                    self.objects.remove(kind, owned)

    def _gone(self, pod: Object) -> None:
        try:
            self.delete_pod(pod)
        except Refused:
            pass

    def _job(self, body: Object) -> Object:
        job = copy.deepcopy(body)
        spec = job.setdefault("spec", {})
        spec.setdefault("backoffLimit", 6)
        spec.setdefault("completionMode", "NonIndexed")
        if spec["template"]["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
            message = f'Job.batch "{job["metadata"].get("name")}" is invalid: spec.template.spec.restartPolicy: Required value: valid values: "OnFailure", "Never"'
            raise Refused(422, "Invalid", message)
        job["status"] = {}
        return job

    def _noted(self, kind: Kind, job: Object, pod: Object) -> None:
        """Count a pod that has ended, once, as the tracking finalizer sees to it."""
        index = pod["metadata"].get("annotations", {}).get(INDEX, pod["metadata"]["name"])
        uid = pod["metadata"]["uid"]
        good = pod["status"].get("phase") == "Succeeded"

        def edit(obj: Object) -> None:
            seen = obj["status"].setdefault("_seen", {})
            if uid in seen:
                return
            seen[uid] = {"index": index, "good": good, "fails": not good and self._fails(obj, pod)}
            obj["status"]["succeeded" if good else "failed"] = sum(1 for s in seen.values() if s["good"] == good)

        self.objects.change(kind, job, edit)

    @staticmethod
    def _fails(job: Object, pod: Object) -> bool:
        """Tell whether the pod failure policy ends the Job with this pod."""
        for rule in (job["spec"].get("podFailurePolicy") or {}).get("rules") or []:
            if rule["action"] != "FailJob":
                continue
            for wanted in rule.get("onPodConditions") or []:
                found = condition(pod, wanted["type"])
                if found and found["status"] == wanted.get("status", "True"):
                    return True
            if (codes := rule.get("onExitCodes")) and _matches(codes, pod):
                return True
        return False

    def _sync(self, kind: Kind, job: Object) -> None:
        found = self.objects.find(kind, job["metadata"]["namespace"], job["metadata"]["name"])
        if found is None or found["metadata"]["uid"] != job["metadata"]["uid"]:
            return
        over = [c for c in found["status"].get("conditions") or [] if c["type"] in ("Complete", "Failed", "Succeeded")]
        if over:
            return
        (self._sync_job if kind is JOBS else self._sync_pytorch)(found)

    def _sync_job(self, job: Object) -> None:
        spec, seen = job["spec"], list((job["status"].get("_seen") or {}).values())
        completions = spec.get("completions") or spec.get("parallelism") or 1
        done = {s["index"] for s in seen if s["good"]}
        failed = sum(1 for s in seen if not s["good"])
        active = [p for p in self._owned(PODS, job) if not is_over(p)]
        if len(done) >= completions:
            self._end(JOBS, job, "Complete", "CompletionsReached", "Reached expected number of succeeded pods")
            return
        if any(s["fails"] for s in seen):
            self._end(JOBS, job, "Failed", "PodFailurePolicy", "a pod failed as a rule of podFailurePolicy says")
            return
        if failed > spec["backoffLimit"]:
            self._end(JOBS, job, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
            return
        if spec.get("suspend"):
            return
        there = {p["metadata"]["annotations"][INDEX] for p in active}
        wanted = [str(i) for i in range(completions) if str(i) not in there and str(i) not in done]
        room = (spec.get("parallelism") or 1) - len(active)
        again = failed > 0
        for index in wanted[: max(room, 0)]:
            if again:
                self.spawn(self._later_pod(job, index))
            else:
                self._pod(job, index)

    async def _later_pod(self, job: Object, index: str) -> None:
        await asyncio.sleep(BACK_OFF_S * self.cluster.pace)
        found = self.objects.find(JOBS, job["metadata"]["namespace"], job["metadata"]["name"])
        there = {p["metadata"]["annotations"][INDEX] for p in self._owned(PODS, job) if not is_over(p)}
        if found and found["metadata"]["uid"] == job["metadata"]["uid"] and index not in there:
            self._pod(found, index)

    def _pod(self, job: Object, index: str) -> None:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        pod = copy.deepcopy(job["spec"]["template"])
        meta = pod.setdefault("metadata", {})
        labels = {INDEX: index, "job-name": name, "batch.kubernetes.io/job-name": name, "controller-uid": uid,
                  "batch.kubernetes.io/controller-uid": uid}  # fmt: skip
        meta["labels"] = {**(meta.get("labels") or {}), **labels}
        meta["annotations"] = {**(meta.get("annotations") or {}), INDEX: index}
        meta["name"] = f"{name}-{index}-{uuid.uuid4().hex[:5]}"
        pod["spec"].setdefault("hostname", f"{name}-{index}")
        for container in pod["spec"]["containers"]:
            container.setdefault("env", []).append({"name": "JOB_COMPLETION_INDEX", "value": index})
        self._make(job, "Job", "batch/v1", pod)

    def _make(self, owner: Object, kind: str, version: str, pod: Object) -> None:
        meta = owner["metadata"]
        pod["metadata"]["ownerReferences"] = [
            {"apiVersion": version, "kind": kind, "name": meta["name"], "uid": meta["uid"], "controller": True}
        ]
        try:
            self.create(PODS, meta["namespace"], pod)
        except Refused as e:
            self.event(owner, "FailedCreate", f"Error creating: {e.message}", "Warning", "job-controller")
            if e.reason != "AlreadyExists":
                self.spawn(self._again(JOBS if kind == "Job" else PYTORCH_JOBS, owner))

    async def _again(self, kind: Kind, owner: Object) -> None:
        await asyncio.sleep(max(BACK_OFF_S * self.cluster.pace, 0.05))
        self._sync(kind, owner)

    def _end(self, kind: Kind, job: Object, type_: str, reason: str, message: str) -> None:
        """End a Job: its pods that still run are deleted first."""

        def edit(obj: Object) -> None:
            if kind is JOBS:
                before = "SuccessCriteriaMet" if type_ == "Complete" else "FailureTarget"
                set_condition(obj, before, "True", reason, message)
            set_condition(obj, type_, "True", reason, message)
            obj["status"]["completionTime"] = now()

        self.objects.change(kind, job, edit)
        self.event(
            job, reason, message, "Normal" if type_ in ("Complete", "Succeeded") else "Warning", "job-controller"
        )
        for pod in self._owned(PODS, job):
            if not is_over(pod):
                self._gone(pod)

    # -- Kubeflow ----------------------------------------------------------------------------------

    def _sync_pytorch(self, job: Object) -> None:
        specs, seen = job["spec"]["pytorchReplicaSpecs"], list((job["status"].get("_seen") or {}).values())
        world = sum(s.get("replicas", 1) for s in specs.values())
        if any(not s["good"] for s in seen):
            self._end(PYTORCH_JOBS, job, "Failed", "PyTorchJobFailed", "a replica failed")
            return
        if len(seen) >= world:
            self._end(PYTORCH_JOBS, job, "Succeeded", "PyTorchJobSucceeded", "all replicas are done")
            return
        there = {p["metadata"]["name"] for p in self._owned(PODS, job)} | {s["index"] for s in seen}
        rank = 0
        for kind in ("Master", "Worker"):
            for number in range(specs.get(kind, {}).get("replicas", 0)):
                name = f"{job['metadata']['name']}-{kind.lower()}-{number}"
                if name not in there:
                    self._replica(job, kind, number, rank, world, name, specs[kind]["template"])
                rank += 1

    def _replica(self, job: Object, kind: str, number: int, rank: int, world: int, name: str, template: Object) -> None:
        pod = copy.deepcopy(template)
        meta, master = pod.setdefault("metadata", {}), f"{job['metadata']['name']}-master-0"
        meta["name"] = name
        meta["labels"] = {
            **(meta.get("labels") or {}), "training.kubeflow.org/job-name": job["metadata"]["name"],
            "training.kubeflow.org/operator-name": "pytorchjob-controller",
            "training.kubeflow.org/replica-type": kind.lower(), "training.kubeflow.org/replica-index": str(number),
        }  # fmt: skip
        port = self.cluster.kubelet.port_of(job["metadata"]["uid"], "23456")
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world, "PYTHONUNBUFFERED": 1,
                "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "PET_NODE_RANK": rank, "PET_NNODES": world}  # fmt: skip
        for container in pod["spec"]["containers"]:
            named = {v["name"] for v in container.get("env") or []}
            container.setdefault("env", []).extend(
                {"name": k, "value": str(v)} for k, v in told.items() if k not in named
            )
        service = {
            "metadata": {"name": name, "ownerReferences": [
                {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
            ]},
            "spec": {"clusterIP": "None", "selector": meta["labels"]},
        }  # fmt: skip
        if self.objects.find(SERVICES, job["metadata"]["namespace"], master if kind == "Master" else name) is None:
            self.objects.create(SERVICES, job["metadata"]["namespace"], service)
        self._make(job, "PyTorchJob", "kubeflow.org/v1", pod)


def _matches(codes: Object, pod: Object) -> bool:
    """Tell whether a pod's containers ended as `onExitCodes` says."""
    for status in pod["status"].get("containerStatuses") or []:
        if codes.get("containerName") not in (None, status["name"]):
            continue
        ended = status["state"].get("terminated")
        if ended and ended["exitCode"] != 0:
            listed = ended["exitCode"] in codes["values"]
            if listed == (codes["operator"] == "In"):
                return True
    return False


def _later(seconds: float) -> str:
    from datetime import UTC, datetime, timedelta

    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _amount(resource: str, value: float) -> str:
    """Return an amount as a quota's message writes it."""
    if "memory" in resource or "storage" in resource:
        for unit, size in (("Gi", 2**30), ("Mi", 2**20)):
            if value and value % size == 0:
                return f"{value / size:.0f}{unit}"
    return f"{value:.0f}" if value == int(value) else f"{value * 1000:.0f}m"
