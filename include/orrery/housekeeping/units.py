"""Which pods and Jobs nobody will ask for again: a pure function of what the cluster, ledger and Airflow say.

A unit is one attempt's objects (`cluster.names`). It is somebody's while its attempt may be at work, or a later
attempt of its task may take it up. What is not sure is left. What an object owns (a Job its pods and its Service)
goes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

from orrery.cluster import gang, names
from orrery.plan import safe_name

# States in which a task has ended, and no attempt of it will come by itself.
ENDED = frozenset({"success", "failed", "skipped", "removed", "upstream_failed"})
ENDED_PHASES = frozenset({"Succeeded", "Failed"})
MOST_CLEARS = 100
# Dag -> run id -> task -> state; None: cleared, about to run.
States: TypeAlias = Mapping[str, Mapping[str, Mapping[str, str | None]]]


@dataclass(frozen=True)
class Thing:
    """One object of the cluster, by its document's metadata."""

    kind: str  # Pod, Job, PyTorchJob
    name: str
    address: str
    uid: str
    created: float
    owned: bool  # by another object, which takes it with it


@dataclass
class Unit:
    """All objects of one attempt."""

    name: str
    project: str
    step: str
    slot: str = ""
    folder: str = ""
    things: list[Thing] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)

    @property
    def newest(self) -> float:
        """When the last of its objects was made."""
        return max((t.created for t in self.things), default=0.0)

    @property
    def run(self) -> str:
        """Its run, as the store calls it."""
        return self.folder.partition("/runs/")[2].partition("/")[0]

    @property
    def over(self) -> bool:
        """Whether all its pods have ended."""
        return bool(self.phases) and all(phase in ENDED_PHASES for phase in self.phases)

    @property
    def dag(self) -> str:
        """The Dag of its run; empty for a run that is none of Airflow's."""
        found = self.run.partition("--")[0]
        return found if "--" in self.run and "." in found else ""


@dataclass(frozen=True)
class Orphan:
    """A unit that may go, and why."""

    unit: Unit
    why: str


def of_documents(documents: Iterable[Mapping[str, Any]]) -> list[Unit]:
    """Return the units of raw documents (`kind`, `metadata`, `status`); what has no label of ours is none."""
    found: dict[str, Unit] = {}
    for document in documents:
        about = document.get("metadata") or {}
        labels, notes = about.get("labels") or {}, about.get("annotations") or {}
        name = labels.get(names.UNIT)
        if not name:
            continue
        unit = found.setdefault(name, Unit(name, labels.get(names.PROJECT, ""), labels.get(names.STEP, "")))
        unit.slot = unit.slot or str(labels.get(names.SLOT, ""))
        unit.folder = unit.folder or str(notes.get(names.FOLDER, ""))
        created = datetime.fromisoformat(str(about["creationTimestamp"])).timestamp()
        owned = bool(about.get("ownerReferences"))
        kind = str(document["kind"])
        unit.things.append(Thing(kind, str(about["name"]), gang.address(document), str(about["uid"]), created, owned))
        if kind == "Pod":
            unit.phases.append(str((document.get("status") or {}).get("phase", "Unknown")))
    return sorted(found.values(), key=lambda u: u.name)


def of_store(units: Iterable[Unit], store: str) -> list[Unit]:
    """Return the units of attempts in one store, by its URI: only of those do its ledger and its Airflow know.

    The namespace may be another Airflow's as well (staging beside prod), to which the others belong.
    """
    return [u for u in units if u.folder and u.slot == names.slot(store, u.folder)]


def unclear(units: Iterable[Unit], recorded: Mapping[str, float]) -> dict[str, set[str]]:
    """Return the Dags that Airflow must be asked about, and the tasks in each."""
    asked: dict[str, set[str]] = {}
    for unit in units:
        if unit.dag and not (unit.over and unit.folder in recorded):
            asked.setdefault(unit.dag, set()).add(unit.step)
    return asked


def orphans(
    units: Iterable[Unit], recorded: Mapping[str, float], states: States, now: float, age: float
) -> list[Orphan]:
    """Return the units that may go.

    `recorded`: attempt folder -> when the ledger recorded its end. `states`: what Airflow says of the tasks of
    `unclear`; a Dag that it did not answer for is missing. `age`: for so many seconds a unit must have been there, and
    its attempt must have ended.
    """
    found = []
    for unit in units:
        if not unit.folder or now - unit.newest <= age:
            continue
        if unit.over and unit.folder in recorded:
            if now - recorded[unit.folder] > age:
                found.append(Orphan(unit, "its pods have ended, and so has its attempt, as the ledger says"))
        elif unit.dag in states:
            mine = _states(unit, states[unit.dag])
            if mine is None:
                found.append(Orphan(unit, "its run is not there any more"))
            elif all(state in ENDED for state in mine):
                found.append(Orphan(unit, "its task does not run any more"))
    return found


def _states(unit: Unit, runs: Mapping[str, Mapping[str, str | None]]) -> list[str | None] | None:
    """Return the states of a unit's task in its run; None: there is no such run any more."""
    for run, tasks in runs.items():
        first = f"{unit.dag}--{run}"
        cleared = (f"{first}--cleared-{n}" for n in range(1, MOST_CLEARS))
        if any(unit.run == safe_name(name) for name in (first, *cleared)):
            # A mapped task's instances are `<task>_<index>`: any of them may be the unit's.
            return [state for task, state in tasks.items() if task == unit.step or task.startswith(f"{unit.step}_")]
    return None
