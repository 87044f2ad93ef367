"""What is in the cluster of earlier attempts at one task and key, read from the API's own documents. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orrery.cluster import gang, names

State = Literal["live", "ending", "dead"]
JOBS = frozenset({"Job", "PyTorchJob"})
ENDED = frozenset({"Succeeded", "Failed"})
# Conditions of a Job, and of Kubeflow's, that has nothing left to do.
OVER = frozenset({"Complete", "Failed", "SuccessCriteriaMet", "FailureTarget", "Succeeded"})


@dataclass(frozen=True)
class Unit:
    """One attempt's pod or Job. `live`: waiting or running; `ending`: told to go; `dead`: has ended, is there still."""

    name: str
    state: State
    attempt: int
    folder: str
    work: str
    address: str  # of what is to be deleted: a Job rather than its pods
    pods: int = 1


def found(documents: Iterable[Mapping[str, Any]]) -> dict[str, Unit]:
    """Return the units that pods and Jobs belong to, the newest attempt first."""
    of: dict[str, list[Mapping[str, Any]]] = {}
    given = list(documents)
    there = {d["metadata"].get("uid") for d in given if d["kind"] != "Pod"}
    for document in given:
        name = (document["metadata"].get("labels") or {}).get(names.UNIT)
        if name:
            of.setdefault(name, []).append(document)
    units = [_unit(name, parts, there) for name, parts in of.items()]
    return {u.name: u for u in sorted(units, key=lambda u: (-u.attempt, u.name))}


def _unit(name: str, parts: list[Mapping[str, Any]], there: set[str | None]) -> Unit:
    jobs = [d for d in parts if d["kind"] != "Pod"]
    pods = [d for d in parts if d["kind"] == "Pod"]
    whole = (jobs or pods)[0]
    states = {_state(d) for d in parts}
    if any(_orphan(d, there) for d in pods):
        states.add("ending")
    state: State = "ending" if "ending" in states else "live" if _lives(jobs, pods) else "dead"
    metadata = whole["metadata"]
    told = metadata.get("annotations") or {}
    attempt = str((metadata.get("labels") or {}).get(names.ATTEMPT, ""))
    return Unit(
        name=name,
        state=state,
        attempt=int(attempt) if attempt.isdecimal() else 0,
        folder=told.get(names.FOLDER, ""),
        work=told.get(names.WORK, ""),
        address=gang.address(whole),
        pods=_size(whole),
    )


def _orphan(pod: Mapping[str, Any], there: set[str | None]) -> bool:
    """Tell whether a pod that has not ended is of a Job that is deleted: the garbage collector is still to come."""
    owners = pod["metadata"].get("ownerReferences") or ()
    jobs = [o for o in owners if o.get("controller") and o.get("kind") in JOBS]
    return _state(pod) == "live" and any(o.get("uid") not in there for o in jobs)


def _lives(jobs: list[Mapping[str, Any]], pods: list[Mapping[str, Any]]) -> bool:
    """Tell whether it works: a Job says it for its pods, which it may not have made yet."""
    return any(_state(d) == "live" for d in jobs or pods)


def _state(document: Mapping[str, Any]) -> State:
    if document["metadata"].get("deletionTimestamp"):
        return "ending"
    status = document.get("status") or {}
    if document["kind"] == "Pod":
        return "dead" if status.get("phase") in ENDED else "live"
    conditions = status.get("conditions") or ()
    return "dead" if any(c.get("type") in OVER and c.get("status") == "True" for c in conditions) else "live"


def _size(document: Mapping[str, Any]) -> int:
    """Return how many pods the unit has."""
    spec = document.get("spec") or {}
    replicas = spec.get("pytorchReplicaSpecs") or {}
    return int(spec.get("completions") or 0) or sum(int(r.get("replicas") or 0) for r in replicas.values()) or 1
