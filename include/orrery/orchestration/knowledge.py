"""A knowledge base's Dags, from its spec: `<project>.reindex` every night, `.evaluate` and `.rollback`."""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, CronPartitionTimetable, TaskGroup

from orrery.orchestration import dags
from orrery.orchestration.assets import asset
from orrery.partitions import FORMATS
from orrery.spec import KnowledgeBaseSpec

RELEASE = "orrery-release"


def knowledge_dags(project: str, spec: KnowledgeBaseSpec, doc: str | None) -> dict[str, DAG]:
    """Make the Dags of one knowledge base. `doc` is the runbook shown on each."""
    makers = {"reindex": _reindex, "evaluate": _evaluate, "rollback": _rollback}
    return {name: make(project, spec, doc) for name, make in makers.items()}


def _reindex(project: str, spec: KnowledgeBaseSpec, doc: str | None) -> DAG:
    # The key is the day of the tick itself: it names the generation; what is read is what the sources hold by then.
    schedule = CronPartitionTimetable(spec.schedule, timezone="UTC", run_offset=0, key_format=FORMATS[spec.grain])
    with (dag := dags.lifecycle_dag(project, "reindex", spec, doc, schedule)):
        with TaskGroup("build", prefix_group_id=False):
            build = [
                _step(project, "collect", chain=("chunk", "embed", "index", "evaluate", "gate", "promote")),
                _step(project, "chunk"),
                _step(project, "embed", compute=spec.embedder.compute),
                _step(project, "index"),
            ]
        with TaskGroup("release", prefix_group_id=False):
            release = [
                _step(project, "evaluate"),
                _step(project, "gate"),
                _step(project, "promote", outlets=[asset(project, "live")], pool=RELEASE),
            ]
        dags.chain(*build, *release)
    return dag


def _evaluate(project: str, spec: KnowledgeBaseSpec, doc: str | None) -> DAG:
    """The live generation, proven anew: questions have changed, or somebody doubts."""
    with (dag := dags.lifecycle_dag(project, "evaluate", spec, doc, None)):
        _step(project, "evaluate")
    return dag


def _rollback(project: str, spec: KnowledgeBaseSpec, doc: str | None) -> DAG:
    with (dag := dags.lifecycle_dag(project, "rollback", spec, doc, None)):
        _step(project, "rollback", outlets=[asset(project, "live")], pool=RELEASE)
    return dag


def _step(project: str, verb: str, **kwargs: Any) -> Any:
    return dags.step(project, verb, kind="knowledge_base", **kwargs)
