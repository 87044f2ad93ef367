"""Airflow's scheduler in one process, step by step: its own functions on a real database, tasks run in the order it says.

What a server does in minutes takes seconds here, and a test can look, clear, or kill between two steps. The steps'
work is played (`Played`): these tests are about who asks for what, not about models.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {{column: late, delay: {delay}}}
sources:
  flights: {{uri: "${{data}}/flights/{{partition}}.parquet", partition: month}}
gate: {{auc: {{min: 0.7}}}}
train: {{window: 3}}
retrain: {retrain}
"""
DAG_FILE = '''"""An Airflow Dag file."""
from orrery.orchestration import lifecycle
lifecycle("{name}", __doc__)
'''


def write(home: Path, projects: dict[str, dict[str, str]]) -> None:
    """Write each project's spec and Dag file: name -> `retrain`, `delay`."""
    (home / "dags").mkdir(parents=True)
    for name, fields in projects.items():
        folder = home / "projects" / name
        folder.mkdir(parents=True)
        (folder / "spec.yaml").write_text(SPEC.format(**{"delay": "1d", **fields}))
        (home / "dags" / f"{name}.py").write_text(DAG_FILE.format(name=name))


class Played:
    """Plays the steps: what a verb publishes, without its work. `verdict`: what the monitor says."""

    def __init__(self) -> None:
        self.verdict = "none"
        self.done: list[tuple[str, str, str, str]] = []

    def __call__(self, planner: Any, request: Any, launcher: Any, *_: Any, **__: Any) -> Any:
        from orrery.contract import VERBS, Result

        self.done.append((request.verb, request.key, request.actor, request.reason))
        dataset = VERBS[request.verb].dataset
        if dataset:
            inputs = {}
            if request.verb == "monitor":
                inputs = {"scores": (planner.store.latest_manifest(request.project, "scores", request.key).ref,)}
            publish(planner.store, request.project, request.verb, dataset, request.key, inputs)
        if request.verb == "monitor":
            return Result(verdict=self.verdict, reasons=["auc fell by 0.05"], output="p/monitor/x/manifest.json")
        return Result(verdict="promote" if request.verb == "gate" else None)


def publish(store: Any, project: str, verb: str, dataset: str, key: str, inputs: Any = None) -> None:
    """Publish a made-up output."""
    from orrery.store import File, Manifest, content_digest

    files = {"out": File(path="a1/out", size=1, sha256=f"{verb}{key}{inputs}")}
    address = content_digest(files)[:32]
    manifest = Manifest(
        project=project, verb=verb, key=key, address=address, files=files, digest=content_digest(files),
        inputs=inputs or {}, result={}, created=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )  # fmt: skip
    store.put_if_absent(manifest.path, manifest.model_dump_json().encode())
    store.publish(project, dataset, key, manifest, manifest.created)


class SmallAirflow:
    """A scheduler that does nothing unless told so. Dags are read from `home/dags`."""

    def __init__(self, home: Path) -> None:
        from airflow.utils.db import initdb

        initdb()
        from airflow.dag_processing.bundles.manager import DagBundlesManager
        from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
        from airflow.jobs.job import Job
        from airflow.jobs.scheduler_job_runner import SchedulerJobRunner
        from airflow.models.dag import DagModel
        from sqlalchemy import update

        from orrery.orchestration import operators
        from orrery.plan import Planner

        DagBundlesManager().sync_bundles_to_db()
        self.bag = DagBag(str(home / "dags"))
        assert not self.bag.import_errors, self.bag.import_errors
        sync_bag_to_db(self.bag, "dags-folder", None)
        self.planner = Planner
        self.played = operators.run = Played()
        self.runner = SchedulerJobRunner(job=Job())
        with self.session() as session:
            # Scoring says nothing here, and would ask for a champion.
            session.execute(update(DagModel).values(is_paused=DagModel.dag_id.endswith(".score")))

    def session(self) -> Any:
        from airflow.utils.session import create_session

        return create_session()

    def trigger(self, dag_id: str, by: str = "rest_api", user: str | None = "ada", **more: Any) -> str:
        """Create a run as Airflow's routes and its command line do; return its name."""
        from airflow.models.dagrun import DagRun
        from airflow.models.serialized_dag import SerializedDagModel
        from airflow.sdk import timezone
        from airflow.utils.state import DagRunState
        from airflow.utils.types import DagRunTriggeredByType, DagRunType

        kind = DagRunType(more.pop("run_type", "manual"))
        now = timezone.utcnow()
        with self.session() as session:
            dag = SerializedDagModel.get(dag_id=dag_id, session=session).dag
            name = more.pop("run_id", None) or DagRun.generate_run_id(run_type=kind, logical_date=None, run_after=now)
            dag.create_dagrun(
                run_id=name, logical_date=None, data_interval=None, run_after=now, run_type=kind,
                triggered_by=DagRunTriggeredByType(by), triggering_user_name=user, state=DagRunState.QUEUED,
                session=session, **more,
            )  # fmt: skip
        return name

    def announce(self, project: str, dataset: str, keys: Iterable[str], extra: dict[str, str] | None = None) -> None:
        """Record events of an asset, one for each partition, in this order."""
        from airflow.assets.manager import asset_manager
        from airflow.models.asset import AssetModel
        from sqlalchemy import select

        for key in keys:
            with self.session() as session:
                found = session.scalar(select(AssetModel).where(AssetModel.name == f"{project}/{dataset}"))
                event = asset_manager.register_asset_change(
                    asset=found, extra=extra or {}, partition_key=key, session=session
                )
                # As by a task: an event without one was posted by somebody.
                event.source_task_id, event.source_dag_id = "materialize", f"{project}.ingest"

    def land(self, project: str, keys: Iterable[str], extra: dict[str, str] | None = None) -> None:
        """Have features: in the store, then announced."""
        keys = list(keys)
        for key in keys:
            publish(self.planner(project).store, project, "materialize", "features", key)
        self.announce(project, "features", keys, extra)

    def begin(self) -> list[Any]:
        """Have the scheduler make runs of events and start what may start; return the running ones, oldest first."""
        from airflow.models.dagrun import DagRun
        from airflow.sdk import timezone
        from airflow.utils.state import DagRunState
        from sqlalchemy import func, select

        with self.session() as session:
            self.runner._create_dagruns_for_partitioned_asset_dags(session)
        with self.session() as session:
            waits = (DagRun.state == DagRunState.QUEUED, DagRun.dag_id.not_like("%.score"))
            newest = session.scalar(select(func.max(DagRun.run_after)).where(*waits))
        # SQLite's now() knows whole seconds only: a run of this second is not yet due.
        while newest and newest >= timezone.utcnow().replace(microsecond=0):
            time.sleep(0.05)
        with self.session() as session:
            self.runner._start_queued_dagruns(session)
        with self.session() as session:
            running = (
                select(DagRun.id).where(DagRun.state == DagRunState.RUNNING).order_by(DagRun.start_date, DagRun.id)
            )
            return list(session.scalars(running))

    def settle(self, only: str = "", *, first: bool = False) -> None:
        """Go on until nothing moves any more (`only`: in runs of Dags whose name holds this text).

        `first`: carry only the first tasks of runs and call those ended; the order of runs is seen without their work.
        """
        while sum(self.carry(id, only, first=first) for id in self.begin()):  # each of them, and then again
            pass

    def carry(self, id: int, only: str = "", *, first: bool = False) -> bool:
        """Run the next tasks of a run; False when nothing has moved. A task that fails is left to be tried again."""
        from airflow.dag_processing.dagbag import DagBag
        from airflow.models.dagrun import DagRun
        from airflow.sdk import timezone
        from airflow.sdk.definitions.dag import _run_task
        from airflow.utils.state import DagRunState, TaskInstanceState

        with self.session() as session:
            run = session.get(DagRun, id)
            if only not in run.dag_id:
                return False
            run.dag = self.runner.scheduler_dag_bag.get_dag_for_run(run, session=session)
            before = {t.task_id: t.state for t in run.get_task_instances(session=session)}
            ready, _ = run.update_state(session=session)
            for ti in ready:
                ti.try_number += 1
                ti.state, ti.scheduled_dttm = TaskInstanceState.SCHEDULED, timezone.utcnow()
            session.commit()
            if ready:  # read anew each time: a run's conf is written into the params of the Dag object itself
                dag = DagBag(self.bag.dags[run.dag_id].fileloc).dags[run.dag_id]
                for ti in ready:
                    _run_task(ti=ti, task=dag.task_dict[ti.task_id])
            session.commit()
            session.expire_all()
            if first and ready:
                run.set_state(DagRunState.SUCCESS)
            after = {t.task_id: t.state for t in run.get_task_instances(session=session)}
            return before != after or run.state != DagRunState.RUNNING

    def killed_in(self, where: str) -> None:
        """From now on, this process dies by SIGKILL where a task calls `asking.<where>`."""
        from orrery.orchestration import asking

        setattr(asking, where, lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    def find_lost(self) -> list[str]:
        """Give tasks whose process is gone another try, as the scheduler does; return which."""
        from airflow.models.taskinstance import TaskInstance
        from airflow.utils.state import TaskInstanceState
        from sqlalchemy import select

        with self.session() as session:
            lost = list(session.scalars(select(TaskInstance).where(TaskInstance.state == TaskInstanceState.RUNNING)))
            for ti in lost:
                ti.state = None
            return [f"{ti.dag_id}.{ti.task_id}" for ti in lost]

    def clear(self, dag_id: str, run_id: str, *tasks: str) -> None:
        """Clear tasks of a run, as its button does."""
        from airflow.models.serialized_dag import SerializedDagModel

        with self.session() as session:
            dag = SerializedDagModel.get(dag_id=dag_id, session=session).dag
            dag.clear(task_ids=[(t, -1) for t in tasks], run_id=run_id, session=session)

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """Return a Dag's runs in the order in which they began: key, state, tasks, note, type."""
        from airflow.models.dagrun import DagRun
        from sqlalchemy import select

        with self.session() as session:
            found = session.scalars(
                select(DagRun).where(DagRun.dag_id == dag_id).order_by(DagRun.start_date, DagRun.id)
            )
            return [
                {
                    "run_id": r.run_id, "key": r.partition_key, "state": str(r.state), "note": r.note or "",
                    "tasks": {t.task_id: str(t.state) for t in r.get_task_instances(session=session)},
                }
                for r in found
            ]  # fmt: skip

    def requests(self, project: str) -> list[dict[str, Any]]:
        """Return what is on record of a project's requests, oldest first."""
        from orrery import requests

        return [r.__dict__ for r in requests.find(self.planner(project).ledger, project)]


def told(airflow: SmallAirflow, project: str, **more: Any) -> dict[str, Any]:
    """Return how a project stands: its requests, and the runs of the Dags of the loop."""
    names = ("request", "train", "labels", "monitor")
    return {
        "requests": airflow.requests(project),
        **{name: airflow.runs(f"{project}.{name}") for name in names},
        **more,
    }


def say(end: dict[str, Any]) -> None:
    print("END" + json.dumps(end, default=str), flush=True)
