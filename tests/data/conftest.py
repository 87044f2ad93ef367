"""A small house: one project in a temporary store, driven through the planner and the engine, in this process."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from s3 import s3_bucket, s3_endpoint  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "shop"


@dataclass
class House:
    """A project `shop` with the rows' source `orders` and the source `weather`, both by month."""

    folder: Path
    spec: dict[str, Any]
    runs: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def upstream(self) -> Path:
        return self.folder / "upstream"

    def write_spec(self, **changes: Any) -> None:
        self.spec.update(changes)
        project = self.folder / "projects" / PROJECT
        project.mkdir(parents=True, exist_ok=True)
        (project / "spec.yaml").write_text(yaml.safe_dump(self.spec, sort_keys=False))

    def land(self, source: str, key: str, table: pa.Table) -> Path:
        path = self.upstream / source / f"{key}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        return path

    def run(self, verb: str, key: str = "2024-01", sample: float = 1.0) -> Any:
        """Plan and execute one step; return its result."""
        from orrery.plan import Planner, Request
        from orrery.runner import prepare
        from orrery.step import execute

        number = next(self.runs)
        planner = Planner(PROJECT)
        request = Request(
            project=PROJECT, verb=verb, partitions=(key,), run=f"r{number}", task=verb, sample=sample, force=sample < 1
        )
        plan = planner.plan(request)
        if plan.done is not None:
            return plan.done
        scratch = self.folder / "scratch" / str(number)
        scratch.mkdir(parents=True)
        prepare(plan, planner.store)
        return execute(plan.config, planner.store, scratch, {})

    @property
    def store(self) -> Any:
        from orrery import platform
        from orrery.store import Store

        return Store(platform.load().store)

    def output(self, result: Any) -> Any:
        return self.store.manifest(result.output)

    def table(self, result: Any, name: str) -> pa.Table:
        store = self.store
        with store.open(self.output(result).uri(name)) as file:
            return pq.read_table(file)


def orders(n: int = 200, month: str = "2024-01", **columns: Any) -> pa.Table:
    """n orders, one an hour: id, placed, amount 0..n-1, kind a|b, each column replaceable."""
    start = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    data: dict[str, Any] = {
        "id": [f"{month}-{i:05d}" for i in range(n)],
        "placed": pa.array([start + timedelta(hours=i) for i in range(n)], pa.timestamp("us", tz="UTC")),
        "amount": pa.array([float(i) for i in range(n)]),
        "kind": ["a" if i % 2 else "b" for i in range(n)],
    }
    data.update(columns)
    return pa.table(data)


def weather(n: int = 20) -> pa.Table:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    times = pa.array([start + timedelta(hours=i) for i in range(n)], pa.timestamp("us", tz="UTC"))
    return pa.table({"at": times, "temp": pa.array([5.0 + i for i in range(n)])})


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    """A house whose January has landed, without checks."""
    monkeypatch.setenv("ORRERY_HOME", str(ROOT))
    monkeypatch.setenv("ORRERY_PROJECTS", str(tmp_path / "projects"))
    monkeypatch.setenv("ORRERY_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("ORRERY_LEDGER", f"sqlite:///{tmp_path}/ledger.db")
    monkeypatch.setenv("ORRERY_DATA", f"file://{tmp_path}/upstream")
    spec = {
        "version": 1,
        "kind": "model",
        "owner": "tests",
        "task": "binary",
        "label": {"column": "late"},
        "sources": {
            "orders": {"uri": "${data}/orders/{partition}.parquet"},
            "weather": {"uri": "${data}/weather/{partition}.parquet"},
        },
    }
    made = House(tmp_path, spec)
    made.write_spec()
    made.land("orders", "2024-01", orders())
    made.land("weather", "2024-01", weather())
    return made


@pytest.fixture
def make_orders() -> Callable[..., pa.Table]:
    return orders
