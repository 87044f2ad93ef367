"""A project's lifecycle Dags, from its spec: `<project>.ingest`, `.request`, `.train`, `.score`, `.labels`, …"""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import Any

from airflow.sdk import DAG, BaseOperator, TaskGroup

from orrery import budgets, platform
from orrery.budgets import Budgets
from orrery.catalogue import CATALOGUE
from orrery.contract import Kind
from orrery.errors import SpecError
from orrery.orchestration import notify, params, retry, timetables
from orrery.orchestration.asking import AskOperator, TakeUpOperator
from orrery.orchestration.assets import asset
from orrery.orchestration.operators import TRIAL_NAME, StepOperator
from orrery.orchestration.waiting import LabelsOperator
from orrery.spec import KnowledgeBaseSpec, ModelSpec, Tune, load, seconds

# A wait costs no worker. By the hour, with a delay of a month, so many wait at once.
LABELS_AT_ONCE = 1000


def lifecycle(project: str, doc: str | None) -> dict[str, DAG]:
    """Make the Dags of one project; Airflow finds them by itself. `doc` is the runbook shown on each."""
    declared = load(platform.project_folder(project))
    if isinstance(declared, KnowledgeBaseSpec):
        from orrery.orchestration.knowledge import knowledge_dags

        return knowledge_dags(project, declared, doc)
    spec = declared
    makers = {
        "ingest": _ingest,
        "request": _request,
        "train": _train,
        "score": _score,
        "labels": _labels,
        "monitor": _monitor,
        "rollback": _rollback,
    }
    dags = {name: make(project, spec, doc) for name, make in makers.items()}
    if spec.tune:
        dags["tune"] = _tune(project, spec, doc, spec.tune)
    if spec.watch:
        from orrery.orchestration.watching import watch_dag

        dags["watch"] = watch_dag(project, spec, doc)
    return dags


def _ingest(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    schedule = timetables.ingest_schedule(spec)
    dag = lifecycle_dag(project, "ingest", spec, doc, schedule, end_date=timetables.end_date(spec))
    with dag, TaskGroup("data", prefix_group_id=False):
        chain(
            step(project, "ingest", chain=("validate", "materialize")),
            step(project, "validate", outlets=[asset(project, "raw")]),
            step(project, "materialize", outlets=[asset(project, "features")]),
        )
    return dag


def _request(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    schedule = timetables.request_schedule(project, spec)
    # A calendar of its own ends with the data; one that follows features has none to end.
    end = timetables.end_date(spec) if spec.retrain.cron else None
    with (dag := lifecycle_dag(project, "request", spec, doc, schedule, end_date=end)):
        _light(AskOperator, "request", project, outlets=[asset(project, "request")])
    return dag


def _train(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    dag = lifecycle_dag(project, "train", spec, doc, timetables.after(project, "request"))
    rest = ("train", "evaluate", "gate", "register", "promote")
    _check_fallback(spec)
    with dag:
        first = _light(TakeUpOperator, "request", project)
        with TaskGroup("data", prefix_group_id=False):
            data = step(project, "materialize", chain=rest)
        with TaskGroup("fit", prefix_group_id=False):
            fit = [
                step(
                    project,
                    "train",
                    most=budgets.of("train", spec),
                    outlets=[asset(project, "candidate")],
                    compute=spec.train.compute,
                ),
                step(project, "evaluate"),
            ]
        with TaskGroup("release", prefix_group_id=False):
            release = [
                step(project, "gate"),
                *_approve(project, spec),
                step(project, "register"),
                # One release at a time: the registry is the smallest server. (A lease guards each project's champion.)
                step(project, "promote", outlets=[asset(project, "champion")], pool="orrery-release"),
            ]
        chain(first, data, *fit, *release)
    return dag


def _check_fallback(spec: ModelSpec) -> None:
    """Raise `SpecError` for a fallback that the task could not run on: told now, not on the day it is needed."""
    if spec.train.spot.fallback is None:
        return
    where = platform.load()
    names = (spec.train.compute, spec.train.spot.fallback)
    first, second = (where.compute_class(name).sagemaker is not None for name in names)
    if first != second:
        raise SpecError(
            f"train.spot.fallback: {names[1]!r} {'is' if second else 'is not'} a SageMaker class, "
            f"train.compute {names[0]!r} {'is' if first else 'is not'}",
            hint="one task runs on one kind of platform: name a class of the same kind",
        )


def _tune(project: str, spec: ModelSpec, doc: str | None, terms: Tune) -> DAG:
    """A search: as many trials at a time as the spec allows and the pool has slots for, then the decision."""
    with (dag := lifecycle_dag(project, "tune", spec, doc, None)):
        data = step(project, "materialize", chain=("trial", "tune"))
        kind, arguments = _task(project, "trial", compute=terms.compute or spec.train.compute)
        trials = kind.partial(
            **arguments, max_active_tis_per_dagrun=terms.parallel, map_index_template=TRIAL_NAME
        ).expand(number=list(range(terms.trials)))
        data >> trials >> step(project, "tune")
    return dag


def _score(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    with (dag := lifecycle_dag(project, "score", spec, doc, timetables.after(project, "features"))):
        step(project, "score", outlets=[asset(project, "scores")])
    return dag


def _labels(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    schedule = timetables.after(project, "scores")
    with (dag := lifecycle_dag(project, "labels", spec, doc, schedule, max_active_runs=LABELS_AT_ONCE)):
        _light(LabelsOperator, "labels", project, outlets=[asset(project, "labels")])
    return dag


def _monitor(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    with (dag := lifecycle_dag(project, "monitor", spec, doc, timetables.after(project, "labels"))):
        monitor = step(project, "monitor", outlets=[asset(project, "health")])
        # Beside each other: a report that fails keeps no request back.
        monitor >> [
            _light(AskOperator, "request", project, outlets=[asset(project, "request")]),
            step(project, "report"),
        ]
    return dag


def _rollback(project: str, spec: ModelSpec, doc: str | None) -> DAG:
    with (dag := lifecycle_dag(project, "rollback", spec, doc, None)):
        step(project, "rollback", outlets=[asset(project, "champion")], pool="orrery-release")
    return dag


def lifecycle_dag(
    project: str,
    verb: str,
    spec: ModelSpec | KnowledgeBaseSpec,
    doc: str | None,
    schedule: Any,
    *,
    max_active_runs: int = 1,
    **kwargs: Any,
) -> DAG:
    """Make one of a project's Dags, without tasks."""
    return DAG(
        dag_id=f"{project}.{verb}",
        schedule=schedule,
        catchup=False,
        # One after the other: features look back, a gate compares with the champion before it, a verdict of the
        # monitor with those before it. Queued runs begin in the order in which they were asked for.
        max_active_runs=max_active_runs,
        tags=["orrery", project, spec.task if isinstance(spec, ModelSpec) else "knowledge", f"owner:{spec.owner}"],
        description=(spec.description or f"{verb} of {project}").splitlines()[0][:200],
        doc_md=doc,
        deadline=notify.deadline(project, verb, spec),
        params=params.form(verb, spec),
        default_args=retry.defaults(spec.owner),
        **kwargs,
    )


def step(
    project: str,
    verb: str,
    *,
    compute: str | None = None,
    pool: str | None = None,
    most: Budgets | None = None,
    kind: Kind = "model",
    **kwargs: Any,
) -> StepOperator:
    """Make the task of one verb."""
    operator, arguments = _task(project, verb, compute=compute, pool=pool, most=most, kind=kind, **kwargs)
    return operator(**arguments)


def _task(
    project: str,
    verb: str,
    *,
    compute: str | None = None,
    pool: str | None = None,
    most: Budgets | None = None,
    kind: Kind = "model",
    **kwargs: Any,
) -> tuple[type[StepOperator], dict[str, Any]]:
    """Return a verb's operator, by profile, and its arguments: pool and timeout by compute class, retries by cause."""
    found = CATALOGUE[kind][verb]
    name = compute or found.compute
    most = most or Budgets()
    common: dict[str, Any] = {
        "task_id": verb,
        "project": project,
        "verb": verb,
        "kind": kind,
        "compute": name,
        **_class(name),
        "retries": most.retries,
        "retry_policy": retry.BudgetPolicy(project, most),
        # The policy names each wait itself. What is left to Airflow are workers that vanished: always the same wait.
        "retry_delay": timedelta(seconds=budgets.INTERRUPTED_S),
        "retry_exponential_backoff": 0,
        "doc_md": f"`{verb}` in environment `{found.environment}` on compute class `{name}`.",
        **notify.task_callbacks(project, verb),
        **kwargs,
    }
    if pool:
        common["pool"] = pool
    if platform.load().compute_class(name).sagemaker is not None:
        from orrery.orchestration.sagemaker import SageMakerStepOperator

        return SageMakerStepOperator, common
    if platform.profile() == "kubernetes":
        from orrery.orchestration.pods import PodStepOperator

        return PodStepOperator, common
    return StepOperator, common


def _light(operator: type[BaseOperator], task_id: str, project: str, **kwargs: Any) -> BaseOperator:
    """Make a task that Airflow's worker does itself: it reads and writes the ledger, or waits."""
    common = {**_class("cpu-light"), **notify.task_callbacks(project, task_id), **kwargs}
    return operator(task_id=task_id, project=project, doc_md=operator.__doc__, **common)


def _approve(project: str, spec: ModelSpec) -> list[BaseOperator]:
    """Return the task that asks a person, when the spec wants one asked; only then its imports are paid for."""
    if spec.approval is None:
        return []
    from orrery.orchestration.approval import approve_task

    return [approve_task(project, spec, pool=_class("cpu-light")["pool"])]


def _class(name: str) -> dict[str, Any]:
    found = platform.load().compute_class(name)
    return {"pool": found.pool, "execution_timeout": timedelta(seconds=seconds(found.timeout))}


def chain(*tasks: BaseOperator) -> None:
    """Have tasks run one after the other."""
    for before, after in pairwise(tasks):
        before >> after
