"""What is no longer needed goes: `orrery.housekeeping` keeps the store, daily, `orrery.orphans` the cluster, hourly.

What may go is decided in `orrery.housekeeping`; the same store is kept by `orrery housekeeping` at the command line.
"""

from __future__ import annotations

import json
import logging
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, BaseOperator, CronTriggerTimetable, Param
from airflow.sdk.exceptions import AirflowSkipException

from orrery import platform
from orrery.errors import RequestError, TryAgain, UserError, nearest
from orrery.orchestration import params, retry
from orrery.orchestration.reach import reaching
from orrery.spec import NAME, seconds
from orrery.store import Store

if TYPE_CHECKING:
    from airflow.sdk import Context

    from orrery.housekeeping.units import Orphan, Unit

log = logging.getLogger("orrery.housekeeping")
DAG_ID = "orrery.housekeeping"
ORPHANS = "orrery.orphans"
EVERY = "40 3 * * *"
# A task that is marked failed while no triggerer lives leaves its pod at work, on a machine that costs.
HOURLY = "10 * * * *"
OWNER = "platform"
ANSWER_S = 30.0
PAGE = 500  # objects of the cluster in one answer
JSON = {"Accept": "application/json", "Content-Type": "application/json"}


def housekeeping(doc: str | None) -> DAG:
    """Make the Dag of the store, which runs at a quiet hour. `doc` is the runbook shown on it."""
    dag = _dag(DAG_ID, EVERY, "removes expired checkpoints, old attempts and outputs that nothing refers to", doc)
    with dag:
        StoreOperator(task_id="store", doc_md=StoreOperator.__doc__)
    return dag


def orphans(doc: str | None) -> DAG | None:
    """Make the Dag of the cluster; none where steps run on this machine."""
    if platform.profile() != "kubernetes":
        return None
    dag = _dag(ORPHANS, HOURLY, "removes pods and Jobs that nobody waits for any more", doc)
    with dag:
        PodsOperator(task_id="pods", doc_md=PodsOperator.__doc__)
    return dag


def _dag(name: str, every: str, description: str, doc: str | None) -> DAG:
    light = platform.load().compute_class("cpu-light")
    return DAG(
        dag_id=name,
        # Without a start date the first run is the next tick: none when the Dag is first seen.
        schedule=CronTriggerTimetable(every, timezone="UTC", run_immediately=False),
        catchup=False,
        max_active_runs=1,
        tags=["orrery", f"owner:{OWNER}"],
        description=description,
        doc_md=doc,
        params=form(name),
        default_args={
            **retry.defaults(OWNER),
            "pool": light.pool,
            "execution_timeout": timedelta(seconds=seconds(light.timeout)),
        },
    )


def form(dag: str = DAG_ID) -> dict[str, Param]:
    """Return the params of a run. The scheduled one removes what may go."""
    fields = {
        "dry_run": Param(
            False, type="boolean", title="Dry run", description="Say what would go, and why; remove nothing."
        ),
        "project": Param(
            None, type=["null", "string"], pattern=NAME, title="Project",
            description="Only this project's. Leave empty for the whole store.",
        ),
        "share": Param(
            None, type=["null", "number"], exclusiveMinimum=0, maximum=1, title="Share",
            description="How large a share of a project's outputs, or attempts, this run may remove, where that of "
            "platform.yaml (retention.share) was too small. 1: all that is listed.",
        ),
    }  # fmt: skip
    return {name: field for name, field in fields.items() if dag == DAG_ID or name != "share"}


class StoreOperator(BaseOperator):
    """Removes what is no longer needed from the store and from this machine, and says why of each.

    Red with 64: what was found looks wrong (a clock, a ledger that is another store's, a very large share), and nothing
    was removed. The log lists what would have gone.
    """

    ui_color = "#e8eef7"

    def execute(self, context: Context) -> dict[str, Any]:
        """Return the figures. Raises `UserError` (64), `LeaseHeld` (75) while another run is at it."""
        from orrery.housekeeping import house

        asked = _read(context)
        told = house.keep(
            house.Asked(
                run=params.run_name(context["dag_run"]),
                actor=params.actor(context["dag_run"]),
                dry_run=bool(asked.get("dry_run")),
                project=asked.get("project"),
                share=asked.get("share"),
                logs=_logs(),
            ),
            lambda line: log.info("%s", line),
        )
        return {name: told[name] for name in ("dry_run", "planned", "removed", "on_this_machine", "seconds")}


class PodsOperator(BaseOperator):
    """Removes pods and Jobs of attempts that have ended, or that nobody waits for any more.

    Only of attempts in this house's store: another Airflow may work in the same namespace. Without the kubernetes
    profile there are none, and the task is skipped.
    """

    ui_color = "#e8eef7"

    def execute(self, context: Context) -> dict[str, Any]:
        """Return how many units there were, how many of them of other houses, and how many went, by project."""
        asked = _read(context)
        if platform.profile() != "kubernetes":
            raise AirflowSkipException("steps run on this machine: there are no pods to look after")
        from orrery.housekeeping import units as of

        cluster = Cluster()
        there = cluster.units()
        ours = of.of_store(there, Store(platform.load().store).uri)
        others = len(there) - len(ours)
        units = [u for u in ours if asked.get("project") in (None, u.project)]
        found = self._orphans(context, units)
        gone: list[Orphan] = []
        for orphan in found:
            log.info("%s%s: %s", "would go: " if asked.get("dry_run") else "", orphan.unit.name, orphan.why)
            if not asked.get("dry_run") and cluster.remove(orphan.unit):
                gone.append(orphan)
        log.info("%d units in the cluster, %d orphans, %d removed", len(units), len(found), len(gone))
        if others:
            log.info("%d units are of no attempt in this store, and are left alone: another Airflow's, perhaps", others)
        by_project = {p: sum(o.unit.project == p for o in gone) for p in sorted({o.unit.project for o in gone})}
        _record(context, by_project)
        return {"units": len(units), "others": others, "orphans": len(found), "removed": by_project}

    def _orphans(self, context: Context, units: list[Unit]) -> list[Orphan]:
        from orrery.housekeeping import units as of

        where = platform.load()
        recorded = _recorded(units)
        states = {}
        for dag, tasks in of.unclear(units, recorded).items():
            try:
                states[dag] = context["ti"].get_task_states(dag_id=dag, task_ids=sorted(tasks))
            except Exception as e:  # whatever it is, what Airflow does not say is left alone
                log.warning("Airflow does not tell the states of %s (%s): its units stay", dag, e)
        return of.orphans(units, recorded, states, time.time(), float(seconds(where.retention.pods)))


class Cluster:
    """The objects of the namespace that carry our labels, by the operator's own connection."""

    def __init__(self) -> None:
        """Raises `UserError` where Airflow has no such connection."""
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook

        self._where = platform.load().kubernetes
        connection = self._where.connection
        with reaching(connection):
            self._client = KubernetesHook(conn_id=connection, in_cluster=None if connection else True).api_client

    def units(self) -> list[Unit]:
        """Return what is there. Raises `TryAgain`, or `UserError` where it may not be asked for."""
        from orrery.housekeeping import units as of

        job = {"indexed-job": "Job", "pytorchjob": "PyTorchJob"}[self._where.ranks]
        return of.of_documents(d for kind in ("Pod", job) for d in self._list(kind))

    def remove(self, unit: Unit) -> bool:
        """Delete a unit: what is owned goes with its owner. Tell whether all of it is on its way.

        Each object is named by its uid, so that one which has been made anew under its name stays.
        """
        from orrery.cluster import gang

        done = True
        for thing in unit.things:
            if thing.owned:
                continue
            answer = self._ask("DELETE", thing.address, {**gang.DELETION, "preconditions": {"uid": thing.uid}})
            if isinstance(answer, str):
                log.warning("%s %s cannot be removed: %s", thing.kind, thing.name, answer)
                done = False
        return done

    def _list(self, kind: str) -> list[dict[str, Any]]:
        from orrery.cluster import gang, names

        path, found, more = gang.PLACES[kind].format(self._where.namespace), [], ""
        while True:
            query = [("labelSelector", names.UNIT), ("limit", str(PAGE)), *([("continue", more)] if more else [])]
            answer = self._ask("GET", path, query=query)
            if isinstance(answer, str):
                # Kubeflow's kind is not there before its operator is installed: then there are none of it.
                if kind == "PyTorchJob" and "404" in answer:
                    return []
                error = UserError if "HTTP 403" in answer else TryAgain
                raise error(f"{kind}s of namespace {self._where.namespace} cannot be listed: {answer}")
            found += [{**one, "kind": kind} for one in answer.get("items") or ()]
            more = str((answer.get("metadata") or {}).get("continue") or "")
            if not more:
                return found

    def _ask(
        self, method: str, path: str, body: object = None, query: list[tuple[str, str]] | None = None
    ) -> dict[str, Any] | str:
        """Return the answer, or what was said against it; what is gone already is fine to delete."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = self._client.call_api(
                path, method, query_params=query or [], header_params=dict(JSON), body=body,
                auth_settings=["BearerToken"], _preload_content=False, _request_timeout=ANSWER_S,
            )  # fmt: skip
        except ApiException as e:
            if method == "DELETE" and e.status in (404, 409):
                return {}
            return f"HTTP {e.status} {e.reason}: {str(e.body)[:300]}"
        except HTTPError as e:
            return f"the cluster cannot be reached ({type(e).__name__})"
        return dict(json.loads(answer.data or b"{}"))


def _read(context: Context) -> dict[str, Any]:
    """Return what a run was asked for. Raises `RequestError` (64) for a key that is none of the form."""
    fields, conf = form(context["dag_run"].dag_id), context["dag_run"].conf or {}
    unknown = sorted(str(k)[:80] for k in conf if k not in fields)
    if unknown:
        raise RequestError(f"the run's conf has an unknown key {unknown[0]!r}", hint=nearest(unknown[0], fields))
    return {name: context["params"].get(name) for name in fields}


def _recorded(units: list[Unit]) -> dict[str, float]:
    """Return when the ledger recorded the ends of units' attempts, by folder."""
    from orrery.ledger import Ledger

    book, found = Ledger(platform.load().ledger), {}
    for unit in units:
        entry = book.get(unit.folder.partition("/")[0], "run", unit.folder, "done") if unit.folder else None
        if entry is not None:
            found[unit.folder] = datetime.fromisoformat(entry.at).timestamp()
    return found


def _record(context: Context, removed: dict[str, int]) -> None:
    from orrery.ledger import Ledger

    book, run = Ledger(platform.load().ledger), params.run_name(context["dag_run"])
    actor, attempt = params.actor(context["dag_run"]), context["ti"].try_number
    for project, count in removed.items():
        told = {"removed": {"unit": {"units": count, "objects": count, "bytes": 0}}}
        book.record(project or "_housekeeping", "housekeeping", f"{run}/pods/{attempt}", "done", actor, told)


def _logs() -> Path | None:
    """Return Airflow's folder of task logs, where it is one of this machine."""
    from airflow.sdk.configuration import conf

    folder = str(conf.get("logging", "base_log_folder", fallback="") or "")
    return Path(folder) if folder.startswith("/") else None
