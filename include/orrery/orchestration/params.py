"""What a person may ask of one run: the form in the UI, the JSON schema behind REST, and the strict reading of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from airflow.sdk import Param

from orrery import partitions
from orrery.errors import RequestError, nearest
from orrery.partitions import EXAMPLES, PATTERNS, Grain
from orrery.plan import Planner, safe_name


@dataclass(frozen=True)
class Asked:
    """One run's request, read and checked."""

    partitions: tuple[str, ...]
    reason: str
    force: bool
    dry_run: bool
    actor: str


def form(grain: Grain, *, window: bool, length: int = 1) -> dict[str, Param]:
    """Return the params of a Dag that works on a partition (or on a window of `length` of them)."""
    key, example = PATTERNS[grain], EXAMPLES[grain]
    params: dict[str, Param] = {}
    if window:
        params["window"] = Param(
            None,
            type=["null", "string"],
            pattern=f"^{key}(\\.\\.{key})?$",
            maxLength=60,
            title="Window",
            description=f"First and last {grain}, both included, such as {example}..{example}. "
            f"One {grain} alone means the {length} that end with it.",
        )
    else:
        params["partition"] = Param(
            None,
            type=["null", "string"],
            pattern=f"^{key}$",
            maxLength=30,
            title="Partition",
            description=f"The {grain} to work on, such as {example}. Leave empty when the run has a partition key.",
        )
    params["reason"] = Param("", type="string", maxLength=500, title="Reason", description="Why; goes into the ledger.")
    params["force"] = Param(False, type="boolean", title="Force", description="Do the work although nothing changed.")
    params["dry_run"] = Param(False, type="boolean", title="Dry run", description="Say what would be done; do nothing.")
    return params


def read(context: Mapping[str, Any], planner: Planner, *, window: bool) -> Asked:
    """Return what the run was asked for. Raises `RequestError` (64): unknown key, no partition, or a malformed one."""
    run, params = context["dag_run"], context["params"]
    conf = run.conf or {}
    allowed = set(form(planner.spec.grain, window=window))
    unknown = sorted(str(k)[:80] for k in conf if k not in allowed)
    if unknown:
        raise RequestError(f"the run's conf has an unknown key {unknown[0]!r}", hint=nearest(unknown[0], allowed))
    given = params.get("window" if window else "partition")
    if given and run.partition_key:
        raise RequestError(
            f"the run has a partition key ({run.partition_key}) and a {'window' if window else 'partition'} ({given})",
            hint="give one",
        )
    keys = _keys(given or run.partition_key, planner, window=window)
    return Asked(keys, str(params["reason"]), bool(params["force"]), bool(params["dry_run"]), actor(run))


def _keys(text: str | None, planner: Planner, *, window: bool) -> tuple[str, ...]:
    grain, length = planner.spec.grain, planner.spec.train.window
    if not text:
        what = "window" if window else "partition"
        raise RequestError(
            f"the run names no {what}", hint=f"give {what}, such as {EXAMPLES[grain]}: no clock chooses data"
        )
    if not window:
        partitions.parse(text, grain)
        return (text,)
    last = partitions.quarter_end(text) if grain == "month" else None
    if last or ".." not in text:
        return partitions.window_ending(last or text, grain, length)
    return partitions.window(text, grain)


def actor(dag_run: Any) -> str:
    """Return who asked: the authenticated user, or what started the run."""
    return dag_run.triggering_user_name or f"airflow ({_value(dag_run.run_type)})"


def run_name(dag_run: Any) -> str:
    """Return the run's name in the store and the ledger. A cleared run is a run of its own: it may be asked anew."""
    cleared = f"--cleared-{dag_run.clear_number}" if dag_run.clear_number else ""
    return safe_name(f"{dag_run.dag_id}--{dag_run.run_id}{cleared}")


def _value(kind: Any) -> str:
    return str(getattr(kind, "value", kind))
