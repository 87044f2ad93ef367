"""A project's lifecycle Dags, from its spec: `<project>.ingest`, `.train` and `.score`."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import Any

from airflow.sdk import DAG, TaskGroup

from orrery import platform
from orrery.contract import VERBS
from orrery.orchestration import params, retry, timetables
from orrery.orchestration.assets import asset
from orrery.orchestration.operators import StepOperator
from orrery.spec import ModelSpec, load_model, seconds


def lifecycle(project: str, doc: str | None) -> dict[str, DAG]:
    """Make the Dags of one project; Airflow finds them by itself. `doc` is the runbook shown on each."""
    spec = load_model(platform.project_folder(project))
    return {
        "ingest": _ingest(project, spec, doc),
        "train": _train(project, spec, doc),
        "score": _score(project, spec, doc),
    }


def _ingest(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    dag = _dag(project, "ingest", spec, doc, timetables.ingest_schedule(spec), window=False)
    with dag, TaskGroup("data", prefix_group_id=False):
        steps = [
            _step(project, "ingest", window=False, chain=("validate", "materialize")),
            _step(project, "validate", window=False, outlets=[asset(project, "raw")]),
            _step(project, "materialize", window=False, outlets=[asset(project, "features")]),
        ]
        _chain(steps)
    return dag


def _train(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    dag = _dag(project, "train", spec, doc, timetables.train_schedule(project, spec), window=True)
    rest = ("train", "evaluate", "gate", "register", "promote")
    with dag:
        with TaskGroup("data", prefix_group_id=False):
            data = [_step(project, "materialize", window=True, chain=rest)]
        with TaskGroup("fit", prefix_group_id=False):
            fit = [
                _step(
                    project,
                    "train",
                    window=True,
                    outlets=[asset(project, "candidate")],
                    compute=spec.train.compute,
                ),
                _step(project, "evaluate", window=True),
            ]
        with TaskGroup("release", prefix_group_id=False):
            release = [
                _step(project, "gate", window=True),
                _step(project, "register", window=True),
                # One release at a time: the registry is the smallest server. (A lease guards each project's champion.)
                _step(project, "promote", window=True, outlets=[asset(project, "champion")], pool="orrery-release"),
            ]
        _chain([*data, *fit, *release])
    return dag


def _score(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    dag = _dag(project, "score", spec, doc, timetables.score_schedule(project), window=False)
    with dag:
        _step(project, "score", window=False, outlets=[asset(project, "scores")])
    return dag


def _dag(project: str, verb: str, spec: ModelSpec, doc: str | None, schedule: Any, *, window: bool) -> DAG:
    return DAG(
        dag_id=f"{project}.{verb}",
        schedule=schedule,
        catchup=False,
        # One after the other: features look back, and a gate compares with the champion before it.
        max_active_runs=1,
        tags=["orrery", project, spec.task, f"owner:{spec.owner}"],
        description=(spec.description or f"{verb} of {project}").splitlines()[0][:200],
        doc_md=doc,
        params=params.form(spec.grain, window=window, length=spec.train.window),
        default_args={
            "owner": spec.owner,
            "retries": retry.RETRIES,
            "retry_delay": retry.DELAY,
            "retry_exponential_backoff": 2,
            "max_retry_delay": retry.MAX_DELAY,
            "retry_policy": retry.policy(),
        },
    )


def _step(
    project: str,
    verb: str,
    *,
    window: bool,
    compute: str | None = None,
    pool: str | None = None,
    **kwargs: Any,
) -> StepOperator:
    """Make the task of one verb: its operator by profile; pool and timeout by its compute class."""
    name = compute or VERBS[verb].compute
    klass = platform.load().compute_class(name)
    common: dict[str, Any] = {
        "task_id": verb,
        "project": project,
        "verb": verb,
        "window": window,
        "pool": pool or klass.pool,
        "execution_timeout": timedelta(seconds=seconds(klass.timeout)),
        "doc_md": f"`{verb}` in environment `{VERBS[verb].environment}` on compute class `{name}`.",
        **kwargs,
    }
    if platform.profile() == "kubernetes":
        from orrery.orchestration.pods import PodStepOperator

        return PodStepOperator(compute=name, **common)
    return StepOperator(**common)


def _chain(steps: list[StepOperator]) -> None:
    for before, after in pairwise(steps):
        before >> after
