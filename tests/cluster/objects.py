"""The objects of the test cluster and all that has happened to them: what lists, watches and selectors answer from."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

Object = dict[str, Any]
KEPT = 20_000  # changes that a watch can go back to


class Kind(NamedTuple):
    """One resource of the API."""

    group: str
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


PODS = Kind("", "v1", "pods", "Pod")
EVENTS = Kind("", "v1", "events", "Event")
NODES = Kind("", "v1", "nodes", "Node", namespaced=False)
NAMESPACES = Kind("", "v1", "namespaces", "Namespace", namespaced=False)
SERVICES = Kind("", "v1", "services", "Service")
SECRETS = Kind("", "v1", "secrets", "Secret")
CONFIG_MAPS = Kind("", "v1", "configmaps", "ConfigMap")
QUOTAS = Kind("", "v1", "resourcequotas", "ResourceQuota")
ACCOUNTS = Kind("", "v1", "serviceaccounts", "ServiceAccount")
CLAIMS = Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
LIMITS = Kind("", "v1", "limitranges", "LimitRange")
JOBS = Kind("batch", "v1", "jobs", "Job")
LEASES = Kind("coordination.k8s.io", "v1", "leases", "Lease")
PRIORITIES = Kind("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", namespaced=False)
ROLES = Kind("rbac.authorization.k8s.io", "v1", "roles", "Role")
BINDINGS = Kind("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
CLUSTER_ROLES = Kind("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", namespaced=False)
CLUSTER_BINDINGS = Kind(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)
PYTORCH_JOBS = Kind("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob")
NETWORK_POLICIES = Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
DEPLOYMENTS = Kind("apps", "v1", "deployments", "Deployment")
KINDS = {(k.group, k.plural): k for k in list(globals().values()) if isinstance(k, Kind)}


class Refused(Exception):
    """What the API answers instead of an object: a Status."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details = code, reason, message, details or {}

    def status(self) -> Object:
        return {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message,
            "reason": self.reason, "details": self.details, "code": self.code,
        }  # fmt: skip


def not_found(kind: Kind, name: str) -> Refused:
    title = f"{kind.plural}.{kind.group}" if kind.group else kind.plural
    return Refused(404, "NotFound", f'{title} "{name}" not found', {"name": name, "kind": kind.plural})


def now(nanoseconds: bool = False) -> str:
    """Return the time as Kubernetes writes it: seconds in objects, nanoseconds in logs."""
    at = datetime.now(UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.%f000Z" if nanoseconds else "%Y-%m-%dT%H:%M:%SZ")


def micro() -> str:
    """Return the time as a MicroTime."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class Change:
    """One change of one object; `before` is what it was."""

    version: int
    type: str
    kind: Kind
    before: Object | None
    object: Object


Match = Callable[[Object], bool]


class Objects:
    """The cluster's etcd. Objects that are given out must not be changed: `change` makes a copy."""

    def __init__(self) -> None:
        self.version = 1000
        self.oldest = self.version  # a watch from before this answers 410
        self._all: dict[Kind, dict[tuple[str, str], Object]] = {}
        self.history: list[Change] = []
        self._news = asyncio.Event()
        self.heard: list[Callable[[Change], None]] = []

    # -- reading ---------------------------------------------------------------------------------

    def find(self, kind: Kind, namespace: str, name: str) -> Object | None:
        return self._all.get(kind, {}).get((namespace if kind.namespaced else "", name))

    def get(self, kind: Kind, namespace: str, name: str) -> Object:
        found = self.find(kind, namespace, name)
        if found is None:
            raise not_found(kind, name)
        return found

    def list(self, kind: Kind, namespace: str = "", match: Match | None = None) -> list[Object]:
        """Return the objects in order of namespace and name; without a namespace, of all."""
        there = sorted(self._all.get(kind, {}).items())
        return [o for (ns, _), o in there if (not namespace or ns == namespace) and (match is None or match(o))]

    # -- writing ---------------------------------------------------------------------------------

    def create(self, kind: Kind, namespace: str, obj: Object) -> Object:
        obj = copy.deepcopy(obj)
        meta = obj.setdefault("metadata", {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = f"{meta['generateName']}{uuid.uuid4().hex[:5]}"
        name = meta.get("name", "")
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", name):
            raise Refused(422, "Invalid", f'{kind.name} "{name}" is invalid: metadata.name: Invalid value: "{name}"')
        for key, value in (meta.get("labels") or {}).items():
            if not re.fullmatch(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?", str(value)):
                message = f'{kind.name} "{name}" is invalid: metadata.labels: Invalid value: "{value}" ({key}): a valid label must be an empty string or consist of alphanumeric characters'
                raise Refused(422, "Invalid", message)
        if kind.namespaced:
            meta["namespace"] = namespace
            if self.find(NAMESPACES, "", namespace) is None:
                raise not_found(NAMESPACES, namespace)
        if self.find(kind, namespace, name) is not None:
            title = f"{kind.plural}.{kind.group}" if kind.group else kind.plural
            raise Refused(409, "AlreadyExists", f'{title} "{name}" already exists', {"name": name, "kind": kind.plural})
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        meta.pop("deletionTimestamp", None)
        obj |= {"apiVersion": kind.api_version, "kind": kind.name}
        return self._put("ADDED", kind, None, obj)

    def change(self, kind: Kind, obj: Object, edit: Callable[[Object], None]) -> Object | None:
        """Edit the newest version of an object; None when it is gone, or another has its name."""
        meta = obj["metadata"]
        found = self.find(kind, meta.get("namespace", ""), meta["name"])
        if found is None or found["metadata"]["uid"] != meta["uid"]:
            return None
        new = copy.deepcopy(found)
        edit(new)
        if new == found:
            return found
        return self._put("MODIFIED", kind, found, new)

    def replace(self, kind: Kind, namespace: str, name: str, obj: Object) -> Object:
        found = self.get(kind, namespace, name)
        asked = (obj.get("metadata") or {}).get("resourceVersion")
        if asked and asked != found["metadata"]["resourceVersion"]:
            message = f'Operation cannot be fulfilled on {kind.plural} "{name}": the object has been modified; please apply your changes to the latest version and try again'
            raise Refused(409, "Conflict", message)
        new = copy.deepcopy(obj)
        kept = ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds")
        new["metadata"] = {**new.get("metadata", {}), **{k: v for k, v in found["metadata"].items() if k in kept}}
        new |= {"apiVersion": kind.api_version, "kind": kind.name}
        return self._put("MODIFIED", kind, found, new)

    def remove(self, kind: Kind, obj: Object) -> Object | None:
        """Take an object out; None when it is gone already."""
        meta = obj["metadata"]
        key = (meta.get("namespace", "") if kind.namespaced else "", meta["name"])
        found = self._all.get(kind, {}).get(key)
        if found is None or found["metadata"]["uid"] != meta["uid"]:
            return None
        del self._all[kind][key]
        self.version += 1
        last = copy.deepcopy(found)
        last["metadata"]["resourceVersion"] = str(self.version)
        self._tell(Change(self.version, "DELETED", kind, found, last))
        return last

    def _put(self, type_: str, kind: Kind, before: Object | None, obj: Object) -> Object:
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        key = (obj["metadata"].get("namespace", "") if kind.namespaced else "", obj["metadata"]["name"])
        self._all.setdefault(kind, {})[key] = obj
        self._tell(Change(self.version, type_, kind, before, obj))
        return obj

    def _tell(self, change: Change) -> None:
        self.history.append(change)
        if len(self.history) > KEPT:
            del self.history[: KEPT // 2]
            self.oldest = self.history[0].version - 1
        self.wake()
        for hear in self.heard:
            hear(change)

    # -- watching --------------------------------------------------------------------------------

    def wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def forget(self) -> None:
        """Compact: every watch that asks for what was before now answers 410."""
        self.version += 1
        self.history.clear()
        self.oldest = self.version
        self.wake()

    def since(self, version: int, kind: Kind, namespace: str) -> Iterator[Change]:
        """Return what happened after a version. Raises `Refused` (410) for one too old."""
        if version < self.oldest:
            raise Refused(410, "Expired", f"too old resource version: {version} ({self.oldest})")
        first = len(self.history)
        while first and self.history[first - 1].version > version:
            first -= 1
        for change in self.history[first:]:
            if change.kind == kind and (not namespace or change.object["metadata"].get("namespace") == namespace):
                yield change

    async def news(self, timeout: float) -> None:
        """Wait for a change, at most so long."""
        event = self._news
        try:
            await asyncio.wait_for(event.wait(), timeout)
        except TimeoutError:
            pass


def as_seen(change: Change, match: Match) -> tuple[str, Object] | None:
    """Return the event that a watch with a selector gets: what stops matching is deleted for it."""
    was = change.before is not None and match(change.before)
    if change.type == "DELETED":
        return ("DELETED", change.object) if was else None
    if match(change.object):
        return ("MODIFIED" if was else "ADDED", change.object)
    return ("DELETED", change.object) if was else None


# -- selectors ---------------------------------------------------------------------------------------


def matcher(labels: str, fields: str) -> Match:
    """Return what a labelSelector and a fieldSelector ask for. Raises `Refused` (400)."""
    tests = [*(_label_test(part) for part in _parts(labels)), *(_field_test(part) for part in _parts(fields))]
    return lambda obj: all(test(obj) for test in tests)


def selected_by(selector: Object) -> Match:
    """Return the same for a selector in an object (matchLabels alone)."""
    wanted = selector.get("matchLabels") or {}
    return lambda obj: wanted.items() <= (obj["metadata"].get("labels") or {}).items()


def _parts(selector: str) -> list[str]:
    return [p.strip() for p in re.split(r",(?![^(]*\))", selector) if p.strip()]


def _label_test(part: str) -> Match:
    def labels(obj: Object) -> Object:
        return obj["metadata"].get("labels") or {}

    if found := re.fullmatch(r"(\S+)\s+(in|notin)\s*\(([^)]*)\)", part):
        key, how, text = found.groups()
        values = {v.strip() for v in text.split(",")}
        if how == "in":
            return lambda obj: labels(obj).get(key) in values
        return lambda obj: labels(obj).get(key) not in values
    if found := re.fullmatch(r"([^=!\s]+)\s*(==|=|!=)\s*(\S*)", part):
        key, how, value = found.groups()
        if how == "!=":
            return lambda obj: labels(obj).get(key) != value
        return lambda obj: labels(obj).get(key) == value
    if found := re.fullmatch(r"(!?)\s*([^=!\s,()]+)", part):
        absent, key = bool(found[1]), found[2]
        return lambda obj: (key in labels(obj)) != absent
    raise Refused(400, "BadRequest", f"unable to parse requirement: {part!r}")


def _field_test(part: str) -> Match:
    found = re.fullmatch(r"([\w.]+)\s*(==|=|!=)\s*(.*)", part)
    if not found:
        raise Refused(400, "BadRequest", f"invalid field selector: {part!r}")
    path, how, value = found.groups()

    def field(obj: Object) -> str:
        here: Any = obj
        for name in path.split("."):
            here = here.get(name) if isinstance(here, dict) else None
        return "" if here is None else str(here)

    return (lambda obj: field(obj) != value) if how == "!=" else (lambda obj: field(obj) == value)


# -- patches -----------------------------------------------------------------------------------------


def merged(old: Any, patch: Any) -> Any:
    """Return a JSON merge patch (RFC 7386) applied. Strategic merges are taken for the same: lists are replaced."""
    if not isinstance(patch, dict):
        return patch
    new = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = merged(new.get(key), value)
    return new


def patched(old: Object, operations: list[Object]) -> Object:
    """Return a JSON patch (RFC 6902: add, replace, remove, test) applied."""
    new = json.loads(json.dumps(old))
    for op in operations:
        *way, last = [p.replace("~1", "/").replace("~0", "~") for p in op["path"].split("/")[1:]]
        here: Any = new
        for step in way:
            here = here[int(step)] if isinstance(here, list) else here[step]
        at: Any = (len(here) if last == "-" else int(last)) if isinstance(here, list) else last
        if op["op"] == "test":
            if here[at] != op["value"]:
                raise Refused(422, "Invalid", f"the test of {op['path']} failed")
        elif op["op"] == "remove":
            del here[at]
        elif isinstance(here, list) and op["op"] == "add":
            here.insert(at, op["value"])
        else:
            here[at] = op["value"]
    return new


# -- conditions and quantities -----------------------------------------------------------------------


def set_condition(obj: Object, type_: str, status: str, reason: str = "", message: str = "") -> None:
    """Set one condition of an object's status; its time changes with its status alone."""
    conditions = obj.setdefault("status", {}).setdefault("conditions", [])
    new: Object = {"type": type_, "status": status, "lastProbeTime": None, "lastTransitionTime": now()}
    if reason:
        new["reason"] = reason
    if message:
        new["message"] = message
    for i, old in enumerate(conditions):
        if old["type"] == type_:
            if old["status"] == status:
                new["lastTransitionTime"] = old["lastTransitionTime"]
            conditions[i] = new
            return
    conditions.append(new)


def condition(obj: Object, type_: str) -> Object | None:
    found = (c for c in (obj.get("status") or {}).get("conditions") or [] if c["type"] == type_)
    return next(found, None)


UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(value: Any) -> float:
    """Return an amount of a resource as a number: 500m, 2Gi."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)([a-zA-Z]*)", str(value))
    if not found or found[2] not in UNITS:
        raise Refused(400, "BadRequest", f"quantities must match the regular expression: {value!r}")
    return float(found[1]) * UNITS[found[2]]


def requests_of(pod: Object) -> dict[str, float]:
    """Return what a pod's containers ask for together; a limit counts as request where there is none."""
    total: dict[str, float] = {}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources") or {}
        asked = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        for name, value in asked.items():
            total[name] = total.get(name, 0.0) + quantity(value)
    return total


def is_over(pod: Object) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")
