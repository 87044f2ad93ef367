"""`<project>.watch`: waits for partitions to land at the sources and has them ingested, in key order.

A Dag of its own that always runs (`@continuous`), so that a wait is in nobody's way. Nothing is lost and nothing
doubled: what was handed over is remembered partition by partition (`triggers.Watermark`), and the ingest run of
a landing has a name that follows from it, so that after a crash between the two it is found, not started again.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, Asset, BaseOperator
from airflow.sdk.exceptions import AirflowSkipException, ErrorType

from orrery import landing, platform
from orrery.errors import UserError
from orrery.orchestration import retry
from orrery.orchestration.assets import asset
from orrery.orchestration.triggers import LandingTrigger, Watermark
from orrery.spec import ModelSpec, load_model, seconds

if TYPE_CHECKING:
    from airflow.sdk import Context

# An ingest run that begins with this, and was triggered by a task, was asked for by the watch Dag.
PREFIX = "watch__"


def run_id(key: str, fingerprint: str) -> str:
    """Return the name of the ingest run of one landing."""
    return f"{PREFIX}{key}__{fingerprint}"


def watch_dag(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    """Make `<project>.watch`. `doc` is the runbook shown on it."""
    landed = asset(project, "landed")
    light = platform.load().compute_class("cpu-light")
    dag = DAG(
        dag_id=f"{project}.watch",
        schedule="@continuous",
        start_date=datetime(2020, 1, 1, tzinfo=UTC),  # any day that is past
        catchup=False,
        max_active_runs=1,
        tags=["orrery", project, spec.task, f"owner:{spec.owner}"],
        description=f"waits for partitions to land at the sources of {project}",
        doc_md=doc,
        default_args={
            **retry.defaults(spec.owner),
            # A deferred wait takes no slot of the pool, and its time does not count.
            "pool": light.pool,
            "execution_timeout": timedelta(seconds=seconds(light.timeout)),
        },
    )
    with dag:
        watch = WatchOperator(task_id="watch", project=project, landed=landed, inlets=[landed])
        watch >> HandOverOperator(task_id="ingest", project=project, landed=landed, inlets=[landed])
    return dag


class WatchOperator(BaseOperator):
    """Waits, deferred, until partitions have landed; returns them as `[key, fingerprint, written at]`."""

    ui_color = "#e8eef7"

    def __init__(self, *, project: str, landed: Asset, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.project, self.landed = project, landed

    def execute(self, context: Context) -> None:
        """Hand the wait to the triggerer. Raises `UserError` (64) when there is nothing to watch."""
        spec = load_model(platform.project_folder(self.project))
        uris = landing.sources(spec)
        if spec.watch is None or not uris:
            raise UserError(
                f"{self.project} has nothing to watch", hint="`watch` in spec.yaml is for sources with a `uri`"
            )
        for name in sorted(set(spec.sources) - set(uris)):
            self.log.info("source %s is not watched: it is a table, or not by partition", name)
        every = float(seconds(spec.watch))
        trigger = LandingTrigger(asset=self.landed.name, uris=uris, grain=spec.grain, last=spec.ends, every=every)
        self.defer(trigger=trigger, method_name="found")

    def found(self, context: Context, event: dict[str, Any]) -> list[list[str]]:
        """Return what landed; a skip when the wait is only to be renewed."""
        if not event["landed"]:
            raise AirflowSkipException("nothing has landed; the next run of this Dag goes on waiting")
        return list(event["landed"])


class HandOverOperator(BaseOperator):
    """Starts one run of `<project>.ingest` for each partition that landed, in key order."""

    ui_color = "#e8eef7"

    def __init__(self, *, project: str, landed: Asset, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.project, self.landed = project, landed

    def execute(self, context: Context) -> dict[str, str]:
        """Return the runs by partition. A run that is there already was started before a crash: it counts."""
        mark = Watermark(context["asset_state_store"][self.landed])
        runs = {}
        for key, fingerprint, at in context["ti"].xcom_pull(task_ids="watch"):
            runs[key] = run_id(key, fingerprint)
            self._start(runs[key], {"partition": key, "reason": f"landed at {at}" if at else "landed"})
            mark.set(key, fingerprint)
        return runs

    def _start(self, run: str, conf: dict[str, str]) -> None:
        """Ask Airflow for a run, as TriggerDagRunOperator does: by the task's own token, one task for all of them."""
        from airflow.sdk.execution_time.comms import ErrorResponse, TriggerDagRun
        from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS

        answer = SUPERVISOR_COMMS.send(TriggerDagRun(dag_id=f"{self.project}.ingest", run_id=run, conf=conf))
        there = isinstance(answer, ErrorResponse) and answer.error == ErrorType.DAGRUN_ALREADY_EXISTS
        if isinstance(answer, ErrorResponse) and not there:
            raise RuntimeError(f"Airflow did not start {self.project}.ingest {run}: {answer.error.value}")
        self.log.info("%s.ingest %s %s", self.project, run, "had been started" if there else "started")
