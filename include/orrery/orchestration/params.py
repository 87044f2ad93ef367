"""What a person may ask of one run: the form in the UI, the JSON schema behind REST, and the strict reading of both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from airflow.sdk import Param

from orrery import faults, partitions, platform
from orrery.errors import RequestError, nearest
from orrery.faults import Fault
from orrery.partitions import EXAMPLES, PATTERNS
from orrery.plan import Planner
from orrery.planner import BasePlanner, safe_name
from orrery.rag.planning import KnowledgePlanner
from orrery.requests import training_window
from orrery.spec import KnowledgeBaseSpec, ModelSpec

# Dag -> the fields of its form. A Dag that works on data has a partition or a window first. `faults` is offered where
# something may be rehearsed: on a laptop.
FIELDS: dict[str, tuple[str, ...]] = {
    "watch": (),
    "ingest": ("partition", "reason", "force", "dry_run", "faults"),
    "request": ("window", "reason", "force", "dry_run"),
    "train": ("window", "reason", "force", "dry_run", "faults"),
    "tune": ("window", "reason", "force", "dry_run", "faults"),
    "score": ("partition", "reason", "force", "dry_run", "faults"),
    "labels": ("partition", "reason"),
    "monitor": ("partition", "reason", "force", "dry_run", "faults"),
    "rollback": ("version", "reason", "dry_run", "faults"),
    "reindex": ("reason", "force", "partial", "dry_run", "faults"),
    "evaluate": ("reason", "force", "dry_run", "faults"),
}


@dataclass(frozen=True)
class Asked:
    """One run's request, read and checked. `partitions` is empty where a Dag works on none."""

    partitions: tuple[str, ...]
    reason: str
    force: bool
    dry_run: bool
    actor: str
    version: str | None = None
    faults: tuple[Fault, ...] = ()
    partial: bool = False


def verb_of(dag_run: Any) -> str:
    """Return which of a project's Dags a run belongs to."""
    return str(dag_run.dag_id).partition(".")[2]


def form(dag: str, spec: ModelSpec | KnowledgeBaseSpec) -> dict[str, Param]:
    """Return the params of one of a project's Dags."""
    grain = spec.grain
    length, longest = (spec.train.window, spec.train.longest) if isinstance(spec, ModelSpec) else (1, None)
    key, example = PATTERNS[grain], EXAMPLES[grain]
    known = {
        "window": lambda: Param(
            None,
            type=["null", "string"],
            pattern=f"^{key}(\\.\\.{key})?$",
            maxLength=60,
            title="Window",
            description=f"First and last {grain}, both included, such as {example}..{example}. "
            f"One {grain} alone means the {length} that end with it"
            + (f", and those before them up to {longest} in all." if longest else "."),
        ),
        "partition": lambda: Param(
            None,
            type=["null", "string"],
            pattern=f"^{key}$",
            maxLength=30,
            title="Partition",
            description=f"The {grain} to work on, such as {example}. Leave empty when the run has a partition key.",
        ),
        "version": lambda: Param(
            None,
            type=["null", "string"],
            pattern="^[0-9]{1,9}$",
            maxLength=9,
            title="Version",
            description="The model version to go back to. Leave empty for the champion before this one.",
        ),
        "reason": lambda: Param(
            "", type="string", maxLength=500, title="Reason", description="Why; goes into the ledger."
        ),
        "force": lambda: Param(
            False, type="boolean", title="Force", description="Do the work although nothing changed."
        ),
        "partial": lambda: Param(
            False,
            type="boolean",
            title="Sources have shrunk",
            description="Go on although more documents are gone or unreadable than `missing` of their source allows.",
        ),
        "dry_run": lambda: Param(
            False, type="boolean", title="Dry run", description="Say what would be done; do nothing."
        ),
        "faults": lambda: Param(
            None,
            type=["null", "string"],
            maxLength=faults.LONGEST,
            title="Faults to rehearse",
            description="What a cluster would do to the steps, such as train: preempt@step=120; *: quota@for=20s. "
            "`orrery faults` lists all.",
        ),
    }
    return {name: known[name]() for name in FIELDS[dag] if name != "faults" or _rehearses()}


def _rehearses() -> bool:
    """Tell whether faults may be asked for here."""
    return not faults.refusal(platform.load(), platform.profile())


def read(context: Mapping[str, Any], planner: BasePlanner) -> Asked:
    """Return what a run was asked for: a task's context, or its `dag_run` and `params`.

    Raises `RequestError` (64): unknown key, no partition, or a malformed one.
    """
    dag_run, params = context["dag_run"], context["params"]
    fields = FIELDS[verb_of(dag_run)]
    conf = dag_run.conf or {}
    unknown = sorted(str(k)[:80] for k in conf if k not in fields)
    if unknown:
        raise RequestError(f"the run's conf has an unknown key {unknown[0]!r}", hint=nearest(unknown[0], fields))
    kind = next((name for name in ("window", "partition") if name in fields), None)
    keys: tuple[str, ...] = ()
    if kind:
        given = params.get(kind)
        if given and dag_run.partition_key:
            raise RequestError(
                f"the run has a partition key ({dag_run.partition_key}) and a {kind} ({given})", hint="give one"
            )
        keys = _keys(given or dag_run.partition_key, planner, kind)
    elif isinstance(planner, KnowledgePlanner):
        keys = (dag_run.partition_key or partitions.key_of(dag_run.run_after.astimezone(UTC), planner.grain),)
    return Asked(
        keys,
        str(params.get("reason") or ""),
        bool(params.get("force")),
        bool(params.get("dry_run")),
        actor(dag_run),
        params.get("version"),
        _faults(params.get("faults") or conf.get("faults"), planner) if "faults" in fields else (),
        bool(params.get("partial")),
    )


def _faults(given: object, planner: BasePlanner) -> tuple[Fault, ...]:
    """Return what is to be rehearsed: by the run, else by the variable. Refused where the form does not offer it."""
    text, source = (str(given), "faults") if given else (os.environ.get(faults.VARIABLE, ""), faults.VARIABLE)
    return faults.read(text, planner.platform, platform.profile(), source)


def _keys(text: str | None, planner: BasePlanner, kind: str) -> tuple[str, ...]:
    grain = planner.grain
    if not text:
        raise RequestError(
            f"the run names no {kind}", hint=f"give {kind}, such as {EXAMPLES[grain]}: no clock chooses data"
        )
    if kind == "partition":
        partitions.parse(text, grain)
        return (text,)
    if ".." not in text and isinstance(planner, Planner):
        partitions.parse(text, grain)
        text = training_window(planner.spec, text, set(planner.store.keys(planner.project, "features")))
    return partitions.window(text, grain)


def actor(dag_run: Any) -> str:
    """Return who asked: the authenticated user, or what started the run."""
    return dag_run.triggering_user_name or f"airflow ({value(dag_run.run_type)})"


def run_name(dag_run: Any) -> str:
    """Return the run's name in the store and the ledger. A cleared run is a run of its own: it may be asked anew."""
    cleared = f"--cleared-{dag_run.clear_number}" if dag_run.clear_number else ""
    return safe_name(f"{dag_run.dag_id}--{dag_run.run_id}{cleared}")


def first_name(dag_run: Any) -> str:
    """Return the run's name whether or not it was cleared: for what a run does once, however often it is cleared."""
    return safe_name(f"{dag_run.dag_id}--{dag_run.run_id}")


def task_name(ti: Any) -> str:
    """Return a task's name in the store and the ledger; each of a mapped task has one of its own."""
    mapped = getattr(ti, "map_index", -1)
    return str(ti.task_id) if mapped is None or mapped < 0 else f"{ti.task_id}.{mapped}"


def cleared_names(dag_run: Any) -> tuple[str, ...]:
    """Return the names that the run had before it was cleared, oldest first."""
    first = f"{dag_run.dag_id}--{dag_run.run_id}"
    names = (f"{first}--cleared-{i}" if i else first for i in range(dag_run.clear_number or 0))
    return tuple(safe_name(name) for name in names)


def value(kind: Any) -> str:
    """Return the text of one of Airflow's enumerations."""
    return str(getattr(kind, "value", kind))
