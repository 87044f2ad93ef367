"""A knowledge base's run over time, in a real MLflow: one run, one step for each generation, whoever comes twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orrery.rag.tracked import HISTORY_TAG, add_point
from orrery.registry.client import Mlflow
from orrery.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}")


def runs(server: Mlflow, project: str) -> list[str]:
    """Return the runs over time of a project, oldest first."""
    told = server.call(
        "POST",
        "runs/search",
        experiment_ids=[server.experiment(project)],
        filter=f"tags.`{HISTORY_TAG}` = '{project}'",
        order_by=["attributes.start_time ASC"],
    )
    return [run["info"]["run_id"] for run in told["runs"]]


def history(server: Mlflow, run: str, metric: str) -> list[tuple[int, float]]:
    found: list[dict[str, Any]] = server.call("GET", "metrics/get-history", run_id=run, metric_key=metric)["metrics"]
    return [(int(p["step"]), float(p["value"])) for p in found]


def test_each_generation_is_one_step_however_often_it_is_told(server: Mlflow, store: Store) -> None:
    first = {"key": "2026-01-05", "generation": "notes/index/a"}
    second = {"key": "2026-01-06", "generation": "notes/index/b"}
    run = add_point(server, store, "a1", "over", first, {"ndcg_at_10": 0.6, "p99_ms": 9.0})
    assert add_point(server, store, "a1", "over", first, {"ndcg_at_10": 0.6, "p99_ms": 12.0}) == run
    assert add_point(server, store, "a1", "over", second, {"ndcg_at_10": 0.7, "mrr": float("nan")}) == run
    assert history(server, run, "ndcg_at_10") == [(0, 0.6), (1, 0.7)]
    assert history(server, run, "p99_ms") == [(0, 9.0)]  # as it was measured first
    assert runs(server, "over") == [run]


def test_projects_are_kept_apart(server: Mlflow, store: Store) -> None:
    point = {"key": "2026-01-05", "generation": "a"}
    assert add_point(server, store, "a1", "one", point, {"mrr": 0.5}) != add_point(
        server, store, "a1", "other", point, {"mrr": 0.4}
    )


def test_evaluations_that_come_at_once_make_one_run_and_a_step_each(server: Mlflow, store: Store) -> None:
    server.experiment("raced")
    points = [{"key": f"2026-01-{day:02d}", "generation": "a"} for day in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda p: add_point(server, store, p["key"], "raced", p, {"mrr": 0.5}), points))
    assert runs(server, "raced") == list(set(made))
    assert sorted(history(server, made[0], "mrr")) == [(step, 0.5) for step in range(4)]
