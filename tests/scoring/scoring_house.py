"""A store with committed features and models, and `score` run on them in this process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orrery.contract import Result, StepConfig
from orrery.step import execute
from orrery.store import File, Manifest, Store, content_digest
from orrery.training.schema import Schema

FIXTURES = Path(__file__).parent / "fixtures"
SCHEMA = Schema(
    task="binary",
    numeric_columns=("distance", "wind", "minute"),
    vocabularies={"origin": ("EWR", "JFK", "LGA"), "carrier": ("AA", "UA")},
    missing=("wind",),
)


def features(rows: int, seed: int = 0) -> pa.Table:
    """Rows like flights: three numbers of three types (one with nulls), two categories (one with nulls)."""
    random = np.random.default_rng(seed)
    start = np.datetime64("2013-03-01T00:00", "us")
    wind = random.normal(10, 5, rows)
    return pa.table(
        {
            "key": pa.array([f"f{i:07d}" for i in range(rows)]),
            "prediction_time": pa.array(start + np.arange(rows) * np.timedelta64(1, "s"), pa.timestamp("us", tz="UTC")),
            "label": pa.array(random.integers(0, 2, rows).astype(float)),
            "label_time": pa.array(start + np.arange(rows) * np.timedelta64(2, "s"), pa.timestamp("us", tz="UTC")),
            "distance": pa.array(random.normal(0, 1, rows)),
            "wind": pa.array(wind / 10, mask=wind < 2),
            "minute": pa.array(random.integers(-3, 3, rows)),
            "origin": pa.array(random.choice(["EWR", "JFK", "LGA"], rows)),
            "carrier": pa.array(random.choice(["AA", "UA"], rows), mask=random.random(rows) < 0.1),
        }
    )


class House:
    """One store and the project `flights` in it, with `score` run in this process."""

    def __init__(self, folder: Path, uri: str = "") -> None:
        self.folder = folder
        self.store = Store(uri or f"file://{folder}/store")
        self.scratch = 0

    def commit(self, verb: str, address: str, files: dict[str, bytes]) -> Manifest:
        done = {}
        for name, data in files.items():
            self.store.put(f"flights/{verb}/{address}/a1/{name}", data)
            done[name] = File(path=f"a1/{name}", size=len(data), sha256=hashlib.sha256(data).hexdigest())
        digest = content_digest(done)
        made = Manifest(project="flights", verb=verb, key="2013-03", address=address, digest=digest, files=done)
        self.store.put_if_absent(made.path, made.model_dump_json().encode())
        return made

    def features(self, table: pa.Table, row_group_size: int = 50_000) -> Manifest:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=row_group_size)
        data = bytes(sink.getvalue())
        return self.commit(
            "materialize", hashlib.sha256(data).hexdigest()[:16], {"features.parquet": data, "schema.json": b"{}"}
        )

    def model(self, name: str = "binary", schema: Schema = SCHEMA) -> Manifest:
        files = {
            "model.onnx": (FIXTURES / f"{name}.onnx").read_bytes(),
            "schema.json": schema.model_dump_json().encode(),
        }
        return self.commit("train", f"{name}-{schema.task}-{len(schema.columns)}", files)

    def config(self, features: Manifest, model: Manifest, **more: object) -> StepConfig:
        address = hashlib.sha256(f"{features.digest}{model.digest}{more}".encode()).hexdigest()[:32]
        attempt = more.pop("attempt", 1)
        params = {"model_version": "7", "spark_master": "local[2,3]"} | dict(more.pop("params", {}))  # type: ignore[call-overload]
        values = {
            "project": "flights", "verb": "score", "key": "2013-03", "partitions": ("2013-03",), "params": params,
            "inputs": {"features": (features.ref,), "model": (model.ref,)}, "store": self.store.uri, "bundle": "0" * 64,
            "address": address, "run": "r1", "task": "score", "attempt": attempt,
            "folder": f"flights/runs/r1/score/{attempt}",
        }  # fmt: skip
        return StepConfig.model_validate({**values, **more})

    def score(self, config: StepConfig) -> Result:
        self.scratch += 1
        scratch = self.folder / f"scratch{self.scratch}"
        scratch.mkdir()
        return execute(config, self.store, scratch, {})

    def manifest(self, result: Result) -> Manifest:
        assert result.output is not None
        found = self.store.manifest(result.output)
        assert found is not None
        return found

    def scores(self, result: Result) -> pa.Table:
        manifest = self.manifest(result)
        names = sorted(n for n in manifest.files if n.startswith("part-"))
        return pa.concat_tables([pq.read_table(pa.BufferReader(self.store.read(manifest.uri(n)))) for n in names])

    def report(self, result: Result) -> dict:  # type: ignore[type-arg]
        return self.store.read_json(self.manifest(result).uri("report.json"))  # type: ignore[no-any-return]
