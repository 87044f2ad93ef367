"""Where a person's request for a training came from: the UI, REST or Airflow's command line.

Airflow keeps that with the run (`triggered_by`) and tells it to no task, so the scheduler's listener writes the
request down when the run begins, before any of its tasks. Should it fail, the first task does, without the origin.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow.listeners import hookimpl

from orrery import requests
from orrery.errors import OrreryError, RequestError
from orrery.orchestration import params
from orrery.partitions import window_name
from orrery.plan import Planner
from orrery.requests import Source, TrainingRequest

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

log = logging.getLogger("orrery.requests")
BY_AIRFLOW: dict[str, Source] = {"ui": "ui", "rest_api": "rest", "cli": "cli", "test": "cli"}
# What starts runs by itself; all else is somebody's doing.
AUTOMATIC = frozenset({"scheduled", "backfill", "asset_triggered"})


def by_person(dag_run: Any) -> bool:
    """Tell whether somebody triggered the run, rather than a schedule or an asset."""
    return params.value(dag_run.run_type) not in AUTOMATIC


def on_record(context: Mapping[str, Any], planner: Planner, source: Source = "manual") -> TrainingRequest | None:
    """Return a person's run as a request, recorded once however often it is cleared; None for a dry run.

    Raises `RequestError` (64) for a run that asks for what cannot be.
    """
    asked = params.read(context, planner)
    if asked.dry_run:
        return None
    window, run = window_name(asked.partitions), params.first_name(context["dag_run"])
    # By the run alone: one partition means the window that ends with it, which may have grown since.
    mine = [r for r in requests.find(planner.ledger, planner.project) if r.asked_by == run]
    if mine:
        return mine[0]
    return requests.submit(
        planner.ledger,
        planner.project,
        window=window,
        source=source,
        by=asked.actor,
        why=asked.reason,
        id=run,
        asked_by=run,
        force=asked.force,
    )


class Origin:
    """Writes down a person's request for a training when the run begins."""

    @hookimpl
    def on_dag_run_running(self, dag_run: DagRun, msg: str) -> None:
        """Record the request of `<project>.train` or `<project>.request`; what is malformed its first task refuses."""
        project, _, verb = dag_run.dag_id.partition(".")
        if verb not in ("train", "request") or not by_person(dag_run):
            return
        source = BY_AIRFLOW.get(params.value(dag_run.triggered_by), "manual")
        try:
            on_record({"dag_run": dag_run, "params": dag_run.conf or {}}, Planner(project), source)
        except RequestError as e:
            log.info("run %s asks for nothing: %s", dag_run.run_id, e.message)
        except OrreryError as e:
            log.warning("the request of run %s is not on record yet: %s", dag_run.run_id, e.message)
        except Exception:
            log.exception("the request of run %s is not on record yet", dag_run.run_id)
