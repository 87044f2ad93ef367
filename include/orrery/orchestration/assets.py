"""The assets that chain a project's Dags: `x-orrery://<project>/<dataset>`, partitioned by the time key."""

from __future__ import annotations

from airflow.sdk import Asset

# The verbs with a Dag of their own, `<project>.<verb>`: of a model, of a knowledge base, of either.
DAGS = ("watch", "ingest", "request", "train", "tune", "score", "labels", "monitor", "rollback")
KNOWLEDGE_DAGS = ("reindex", "evaluate", "rollback")
ALL_DAGS = (*DAGS, *KNOWLEDGE_DAGS)


def asset(project: str, dataset: str) -> Asset:
    """Return one of a project's assets: landed, raw, features, request, candidate, champion, scores, …, live."""
    return Asset(name=f"{project}/{dataset}", uri=f"x-orrery://{project}/{dataset}", group="orrery")
