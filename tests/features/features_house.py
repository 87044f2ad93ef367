"""A small project in a real store: its clean partitions committed, its materialize step run in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orrery import bundle, step
from orrery.contract import Result, StepConfig
from orrery.data.tables import write_parquet
from orrery.features.definitions import Definitions, View, collect
from orrery.spec import ModelSpec
from orrery.store import File, Manifest, Ref, Store, content_digest

START = datetime(2013, 3, 1, tzinfo=UTC)
TIME = pa.timestamp("us", tz="UTC")


def at(hours: float) -> datetime:
    """`hours` after the start of March."""
    return START + timedelta(hours=hours)


def spec(task: str = "binary", **weather: Any) -> ModelSpec:
    sources = {"flights": {"uri": "file:///f/{partition}"}, "weather": {"uri": "file:///w/{partition}", **weather}}
    document = {"version": 1, "kind": "model", "owner": "t", "task": task, "label": {"column": "late"}}
    return ModelSpec.model_validate({**document, "sources": sources})


def module(text: str, folder: Path) -> ModuleType:
    (folder / "features.py").write_text(text)
    return bundle.load_module(folder, "tiny", "features")


def definitions(text: str, folder: Path, **kwargs: Any) -> Definitions:
    return collect(module(text, folder), spec(**kwargs))


def view(name: str = "weather", on: tuple[str, ...] = ("origin",), ttl: str = "2h") -> View:
    return View(name, on, ttl, "weather", lambda table: table)


def weather(*rows: tuple[str, float, float, float | None], column: str = "wind") -> pa.Table:
    """(origin, hours of event_time, hours of available_time, wind) -> what a view function returns."""
    origin, event, available, value = zip(*rows, strict=True) if rows else ((), (), (), ())
    return pa.table(
        {
            "origin": pa.array(origin, pa.string()),
            "event_time": pa.array([at(h) for h in event], TIME),
            "available_time": pa.array([at(h) for h in available], TIME),
            column: pa.array(value, pa.float64()),
        }
    )


def flights(*rows: tuple[str, float]) -> pa.Table:
    """(origin, hours of prediction_time) -> rows, keys f0, f1, ..."""
    origin, times = zip(*rows, strict=True)
    return pa.table(
        {
            "key": [f"f{i}" for i in range(len(rows))],
            "prediction_time": pa.array([at(h) for h in times], TIME),
            "origin": pa.array(origin, pa.string()),
        }
    )


FEATURES = """
import pyarrow as pa
import pyarrow.compute as pc
from orrery.features import derive, rows, view

@rows
def flights(raw):
    return raw

@view(on=["origin"], ttl="2h")
def weather(raw):
    return raw

@derive
def doubled(rows):
    return rows.append_column("double_wind", pc.multiply(rows["weather__wind"], 2.0))
"""
SPEC = """
version: 1
kind: model
owner: test
task: binary
label: {column: late}
sources:
  flights: {uri: "${data}/flights/{partition}.parquet"}
  weather: {uri: "${data}/weather/{partition}.parquet"}
"""


def labelled(rows: pa.Table) -> pa.Table:
    """`rows` with label 0 and 1 in turn, known a day after the prediction."""
    later = [t + timedelta(days=1) for t in rows["prediction_time"].to_pylist()]
    label = pa.array([float(i % 2) for i in range(rows.num_rows)])
    return rows.append_column("label", label).append_column("label_time", pa.array(later, TIME))


@dataclass
class Project:
    """A project folder beside its store."""

    root: Path
    features: str = FEATURES
    spec: str = SPEC
    history: list[Ref] = field(default_factory=list)
    runs: int = 0

    def __post_init__(self) -> None:
        self.folder = self.root / "tiny"
        self.folder.mkdir()
        self.store = Store(f"file://{self.root / 'store'}")

    def clean(self, key: str, **tables: pa.Table) -> Ref:
        """Commit one clean partition, as validate would."""
        files = {}
        for name, table in tables.items():
            target = Path(self.store.full(f"tiny/validate/v{key}/a/{name}.parquet"))
            target.parent.mkdir(parents=True, exist_ok=True)
            write_parquet(table, target)
            data = target.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            files[f"{name}.parquet"] = File(path=f"a/{name}.parquet", size=len(data), sha256=digest)
        manifest = Manifest(
            project="tiny", verb="validate", key=key, address=f"v{key}", digest=content_digest(files), files=files
        )
        self.store.put(manifest.path, manifest.model_dump_json().encode())
        return manifest.ref

    def materialize(self, clean: Ref, *history: Ref, sample: float = 1.0, **params: Any) -> Result:
        """Run the step for one partition, each time at a new address."""
        self.runs += 1
        (self.folder / "features.py").write_text(self.features)
        (self.folder / "spec.yaml").write_text(self.spec)
        packed = bundle.pack(self.folder)
        bundle.push(self.store, packed)
        config = StepConfig(
            project="tiny",
            verb="materialize",
            key=clean.key,
            partitions=(clean.key,),
            sample=sample,
            params=params,
            inputs={"clean": (clean,), "history": history},
            store=self.store.uri,
            bundle=packed.digest,
            address=f"m{self.runs}",
            run=f"r{self.runs}",
            task="materialize",
            folder=f"tiny/runs/r{self.runs}/materialize/1",
        )
        scratch = self.root / f"scratch{self.runs}"
        scratch.mkdir()
        return step.execute(config, self.store, scratch, {})

    def table(self, result: Result) -> pa.Table:
        return pq.read_table(self._file(result, "features.parquet"))

    def schema(self, result: Result) -> dict[str, str]:
        found: dict[str, str] = json.loads(self._file(result, "schema.json").read_text())
        return found

    def _file(self, result: Result, name: str) -> Path:
        assert result.output
        manifest = self.store.manifest(result.output)
        assert manifest is not None
        return Path(self.store.full(manifest.uri(name)))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def define(tmp_path: Path) -> Callable[..., Definitions]:
    return lambda text, **kwargs: definitions(text, tmp_path, **kwargs)
