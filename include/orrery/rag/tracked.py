"""A generation's figures in MLflow, one run per evaluation. An evaluation never fails for want of MLflow.

Beside them stands one run per project, `<project> over time`, to which each evaluation adds its figures as one more
step: MLflow's charts then draw lines over the generations. It is known by its tag. What was added is told by a tag per
generation and key, so an evaluation that is repeated adds nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from orrery.errors import TryAgain, UserError
from orrery.lease import Lease
from orrery.registry import client
from orrery.registry.client import Mlflow, Run
from orrery.registry.tracking import ANSWER_S, attempt_run
from orrery.step import Work
from orrery.store import Store

HISTORY_TAG, POINT_TAG = "orrery.history", "orrery.evaluated."
# MLflow's own tag: what its page shows above a run.
NOTE_TAG = "mlflow.note.content"
NOTE = "One step per evaluated generation; `orrery.evaluated.…` says which. Each has a run of its own, too."
FIGURES = (
    "ndcg_at_10",
    "recall_at_10",
    "mrr",
    "abstained",
    "wrongly_abstained",
    "sentence_support",
    "citation_precision",
    "p50_ms",
    "p99_ms",
    "chunks",
)


def log(work: Work, metrics: Mapping[str, float], plots: Mapping[str, bytes]) -> str | None:
    """Log figures and plots; return the run's id, or None when there is no MLflow or it does not answer."""
    try:
        server = client.from_environment(ANSWER_S)
        if server is None:
            return None
        generation = work.input("generation")
        run = attempt_run(server, work, name=f"evaluate {work.config.key} {generation.address[:12]}")
        told = _points(metrics, 0, run.started)
        params = [{"key": "generation", "value": generation.path}, {"key": "key", "value": generation.key}]
        server.call("POST", "runs/log-batch", run_id=run.id, metrics=told, params=params)
        for name, data in plots.items():
            server.put_file(f"{run.artifacts}/{name.lower().replace(' ', '-')}.png", data)
        server.call("POST", "runs/update", run_id=run.id, status="FINISHED", end_time=int(time.time() * 1000))
    except (TryAgain, UserError) as e:  # Interrupted goes on up
        work.log.warning(f"the evaluation is not in MLflow: {e.message}")
        return None
    return run.id


def over_time(work: Work, metrics: Mapping[str, float]) -> str | None:
    """Add an evaluation's figures to the project's run of all of them; return its id, or None as `log` does."""
    generation = work.input("generation")
    try:
        server = client.from_environment(ANSWER_S)
        if server is None:
            return None
        point = {"key": work.config.key, "generation": generation.path}
        figures = {k: metrics[k] for k in FIGURES if k in metrics}
        return add_point(server, work.store, work.config.folder, work.config.project, point, figures)
    except (TryAgain, UserError) as e:
        work.log.warning(f"the evaluation is not in MLflow's run over time: {e.message}")
        return None


def add_point(
    server: Mlflow, store: Store, attempt: str, project: str, point: Mapping[str, str], metrics: Mapping[str, float]
) -> str:
    """Add figures as the next step of a project's run over time, once for each point; return the run's id.

    One evaluation at a time, by a lease: MLflow would take two runs of one name, and two steps of one number.
    """
    now = int(time.time() * 1000)
    tag = POINT_TAG + hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:16]
    with Lease(store, f"{project}/evaluate/at-over-time/lease", attempt, attempt):
        run = _history(server, server.experiment(project), project, now)
        there = server.run_data(run.id)
        if tag not in {t["key"] for t in there.get("tags", ())}:
            step = 1 + max((int(m["step"]) for m in there.get("metrics", ())), default=-1)
            # Tag and figures in one request. Cut off between them, the next try adds the figures twice: none is lost.
            told = [{"key": tag, "value": json.dumps({**point, "step": step}, sort_keys=True)}]
            server.call("POST", "runs/log-batch", run_id=run.id, metrics=_points(metrics, step, now), tags=told)
        server.call("POST", "runs/update", run_id=run.id, status="FINISHED", end_time=now)
    return run.id


def _history(server: Mlflow, experiment: str, project: str, now: int) -> Run:
    """Return a project's run over time, made when there is none."""
    if (found := server.find_run(experiment, HISTORY_TAG, project)) is not None:
        return found
    tags = {HISTORY_TAG: project, "orrery.project": project, NOTE_TAG: NOTE}
    return server.create_run(experiment, f"{project} over time"[:250], tags, now)


def _points(metrics: Mapping[str, float], step: int, at: int) -> list[dict[str, Any]]:
    """Return what can be drawn of some figures, as MLflow takes it."""
    return [
        {"key": k, "value": float(v), "step": step, "timestamp": at}
        for k, v in sorted(metrics.items())
        if math.isfinite(v)
    ]
