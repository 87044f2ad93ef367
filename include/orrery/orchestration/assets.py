"""The assets that chain a project's Dags: `x-orrery://<project>/<dataset>`, partitioned by the time key."""

from __future__ import annotations

from airflow.sdk import Asset

# The verbs with a Dag of their own, `<project>.<verb>`.
DAGS = ("ingest", "train", "score")


def asset(project: str, dataset: str) -> Asset:
    """Return the asset of one of a project's datasets: raw, features, candidate, champion, scores."""
    return Asset(name=f"{project}/{dataset}", uri=f"x-orrery://{project}/{dataset}", group="orrery")
