"""How fast `score` is, against the ways in which Spark calls Python, and against ONNX Runtime with no Spark at all.

    .venvs/spark/bin/python tests/benchmarks/bench_spark.py

A million rows like the flights', the real flight model (weights not trained, exported in the ml environment), two
local cores. All jobs run in one Spark session with Spark's own JVM compiler settings, do the whole job (Parquet in,
Parquet out) on the same million rows, cache their ONNX session per worker, are warmed first, and must agree on every
prediction. `score` also reads back, reconciles and commits. The rivals read one file of equal size per core, so that
each core has the same share (asserted): Spark would cut a single file into unequal parts. What is compared is rows per
second, the best of three rounds. Measure on a quiet machine: beside other work, short jobs find moments of rest that long
ones do not.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orrery.contract import StepConfig
from orrery.data.tables import write_parquet
from orrery.scoring import parts, session
from orrery.step import execute
from orrery.store import File, Manifest, Store, content_digest
from orrery.training.schema import Schema

ROOT = Path(__file__).resolve().parent.parent.parent
ML = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs")) / "ml" / "bin" / "python"
ROWS, WARM = 1_000_000, 4_000
CORES, ROUNDS = 2, 3
VIEWS = {
    "weather": ("humid", "wind_speed", "wind_gust", "precip", "visib", "pressure"),
    "origin_departures": ("overdue_1h", "overdue_3h", "overdue_24h", "very_overdue_3h", "delay_3h"),
    "origin_arrivals": ("delay_3h", "delay_24h", "lost_3h"),
    "carrier_here": ("overdue_3h", "overdue_24h", "delay_3h"),
    "destination": ("delay_3h", "delay_24h", "overdue_3h"),
    "route": ("delay_24h", "delay_336h"),
}
OWN = ("distance", "departure_minute", "arrival_minute", "departure_sin", "departure_cos")
JOINED = tuple(f"{view}__{column}" for view, columns in VIEWS.items() for column in columns)
NUMERIC = (*OWN, *JOINED)
SIZES = {"carrier": 16, "departure_hour": 20, "dest": 104, "origin": 3, "weekday": 7}
SCHEMA = Schema(
    task="binary",
    numeric_columns=NUMERIC,
    vocabularies={name: tuple(f"{name}{i:03d}" for i in range(size)) for name, size in SIZES.items()},
    missing=JOINED,
)
# The Spark session that rivals know: the JVM's second compiler and compiled queries (`score` does without them).
CONF = {
    "spark.sql.codegen.wholeStage": "true",
    "spark.sql.codegen.factoryMode": "FALLBACK",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=4",
    "spark.driver.memory": "3g",
    "spark.sql.files.maxPartitionBytes": "1g",  # a file is never cut: one task per file, one file per core
}
# Run in the ml environment: argv = schema.json, model.onnx, the project's folder.
EXPORT = """
import sys
from pathlib import Path
import numpy as np
import torch
from orrery.bundle import load_module
from orrery.training import Dataset
from orrery.training.export import to_onnx
from orrery.training.network import Head, Inputs, Network
from orrery.training.schema import Schema
schema = Schema.model_validate_json(Path(sys.argv[1]).read_text())
model = load_module(Path(sys.argv[3]), "flight_delay", "model")
torch.manual_seed(0)
module = model.build(schema, model.Params())
width = len(schema.numeric_columns)
network = Network(schema, Inputs(schema, np.zeros(width), np.ones(width)), module, Head("binary"))
rows = np.random.default_rng(0)
few = Dataset(
    rows.normal(size=(64, width)).astype(np.float32),
    np.stack([rows.integers(0, n, 64) for n in schema.categorical.values()], axis=1),
    np.zeros(64, np.float32),
    schema,
)
Path(sys.argv[2]).write_bytes(to_onnx(network, few))
"""


def rows_like_flights(rows: int) -> pa.Table:
    """27 numbers, most of them with some nulls, and five categories."""
    random = np.random.default_rng(0)
    start = np.datetime64("2013-03-01T00:00", "us")
    columns: dict[str, Any] = {
        "key": pa.array([f"2013-03-01-UA-{i:08d}-EWR" for i in range(rows)]),
        "prediction_time": pa.array(start + np.arange(rows) * np.timedelta64(1, "s"), pa.timestamp("us", tz="UTC")),
    }
    for name in NUMERIC:
        mask = random.random(rows) < 0.03 if name in SCHEMA.missing else None
        columns[name] = pa.array(random.normal(size=rows), mask=mask)
    for name, values in SCHEMA.vocabularies.items():
        ids = pa.array(random.integers(0, len(values), rows).astype(np.int32))
        columns[name] = pa.DictionaryArray.from_arrays(ids, pa.array(values)).cast(pa.string())
    return pa.table(columns)


def write_shares(table: pa.Table, folder: Path) -> None:
    """Write a table as one file per core, all with the same number of rows."""
    folder.mkdir()
    rows = table.num_rows // CORES
    for core in range(CORES):
        write_parquet(table.slice(core * rows, rows), folder / f"share-{core}.parquet")


# What `parts.open_model` takes, and keeps for the life of a worker: store, path, digest.
Model = tuple[str, str, str]


class Bench:
    """A store with the features and the model committed, and the jobs to compare."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(f"file://{folder}/store")
        table = rows_like_flights(ROWS)
        self.whole, self.shares, self.warm = folder / "whole.parquet", folder / "shares", folder / "warm"
        write_parquet(table, self.whole)
        write_shares(table, self.shares)
        write_shares(table.slice(0, WARM), self.warm)
        schema, model = folder / "schema.json", folder / "model.onnx"
        schema.write_text(SCHEMA.model_dump_json())
        project = ROOT / "include" / "projects" / "flight_delay"
        subprocess.run([ML, "-c", EXPORT, schema, model, project], check=True)
        candidate = self._commit("train", {"model.onnx": model, "schema.json": schema})
        self.model: Model = (self.store.uri, candidate.uri("model.onnx"), candidate.files["model.onnx"].sha256)
        features = self._commit("materialize", {"features.parquet": self.whole})
        self.inputs = {"features": (features.ref,), "model": (candidate.ref,)}
        self.runs = 0

    def _commit(self, verb: str, files: dict[str, Path]) -> Manifest:
        done = {}
        for name, path in files.items():
            file = self.store.upload(path, f"flights/{verb}/x/a/{name}")
            done[name] = File(path=f"a/{name}", size=file.size, sha256=file.sha256)
        made = Manifest(
            project="flights", verb=verb, key="2013-03", address="x", digest=content_digest(done), files=done
        )
        self.store.put(made.path, made.model_dump_json().encode())
        return made

    def score(self) -> Path:
        """The whole step: read, encode, predict, write, read back, reconcile, commit. Returns the scores' folder."""
        self.runs += 1
        values = {
            "project": "flights", "verb": "score", "key": "2013-03", "partitions": ("2013-03",),
            "params": {"model_version": "7", "spark_master": f"local[{CORES}]"}, "inputs": self.inputs,
            "store": self.store.uri, "bundle": "0" * 64, "address": f"{self.runs:032d}", "run": "r", "task": "score",
            "folder": f"flights/runs/r/score/{self.runs}",
        }  # fmt: skip
        scratch = self.folder / f"scratch{self.runs}"
        scratch.mkdir()
        result = execute(StepConfig.model_validate(values), self.store, scratch, {})
        assert result.metrics["rows"] == ROWS
        assert result.output is not None
        manifest = self.store.manifest(result.output)
        assert manifest is not None
        return Path(self.store.full(manifest.uri("part-00000.parquet"))).parent

    def spark_job(self, spark: Any, source: Path, add: Callable[[Any], Any]) -> Path:
        """Parquet in, a `prediction` column added by `add`, Parquet out: the job that the udfs do."""
        from pyspark.sql import functions as f

        target = self.folder / "out"
        shutil.rmtree(target, ignore_errors=True)
        frame = add(spark.read.parquet(str(source))).withColumn("model_version", f.lit("7"))
        frame.select("key", "prediction_time", "prediction", "model_version").write.parquet(str(target))
        return target


# -- the rivals --------------------------------------------------------------------------------------


def row_udf(model: Model, *, arrow: bool) -> Callable[[Any], Any]:
    """A plain Python udf, called row by row; `arrow` is how Spark carries the values, not how it calls."""
    from pyspark.sql import functions as f

    names = list(SCHEMA.vocabularies)
    ids = {n: {v: i + 1 for i, v in enumerate(values)} for n, values in SCHEMA.vocabularies.items()}
    width = len(NUMERIC)

    def predict(*values: Any) -> float:
        numeric = np.array([[np.nan if v is None else v for v in values[:width]]], dtype=np.float32)
        categorical = np.array([[ids[n].get(v, 0) for n, v in zip(names, values[width:], strict=True)]])
        feed = {"numeric": numeric, "categorical": categorical}
        return float(parts.open_model(*model).run(["prediction"], feed)[0][0])

    call = f.udf(predict, "float", useArrow=arrow)
    return lambda frame: frame.withColumn("prediction", call(*SCHEMA.columns))


def pandas_udf(model: Model) -> Callable[[Any], Any]:
    """A vectorised udf: 10,000 rows a call, as pandas series."""
    import pandas as pd
    from pyspark.sql import functions as f

    def predict(*columns: pd.Series) -> pd.Series:
        table = pa.table({n: pa.Array.from_pandas(c) for n, c in zip(SCHEMA.columns, columns, strict=True)})
        return pd.Series(parts.predict(parts.open_model(*model), SCHEMA, table)[0])

    predict.__annotations__ = {"columns": pd.Series, "return": pd.Series}
    call = f.pandas_udf(predict, "float")
    return lambda frame: frame.withColumn("prediction", call(*SCHEMA.columns))


def map_in_arrow(model: Model) -> Callable[[Any], Any]:
    """mapInArrow over the rows that Spark itself reads and writes: the design that `score` was chosen over."""

    def predict(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            table = pa.Table.from_batches([batch])
            scores = pa.array(parts.predict(parts.open_model(*model), SCHEMA, table)[0])
            yield pa.RecordBatch.from_arrays(
                [batch.column("key"), batch.column("prediction_time"), scores], ["key", "prediction_time", "prediction"]
            )

    return lambda frame: frame.mapInArrow(predict, "key string, prediction_time timestamp, prediction float")


def run_alone(bench: Bench, pool: ThreadPoolExecutor) -> Callable[[], None]:
    """ONNX Runtime and nothing else: a thread and a session per core, arrays encoded beforehand."""
    numeric, ids = SCHEMA.encode(pq.read_table(bench.whole))
    models = [parts.open_model.__wrapped__(*bench.model) for _ in range(CORES)]

    def share(core: int) -> None:
        for start in range(core * ROWS // CORES, (core + 1) * ROWS // CORES, parts.BATCH):
            end = min(start + parts.BATCH, (core + 1) * ROWS // CORES)
            models[core].run(["prediction"], {"numeric": numeric[start:end], "categorical": ids[start:end]})

    return lambda: _drain(pool.map(share, range(CORES)))


def without_spark(model: Model, source: Path, target: Path, core: int) -> None:
    """One core's share of `score`'s work in a process of its own: every other row group, Parquet in, Parquet out."""
    session, file, tables = parts.open_model(*model), pq.ParquetFile(source, memory_map=True), []
    for group in range(core, file.metadata.num_row_groups, CORES):
        table = file.read_row_group(group, columns=["key", "prediction_time", *SCHEMA.columns], use_threads=False)
        prediction = pa.array(parts.predict(session, SCHEMA, table)[0])
        tables.append(table.select(["key", "prediction_time"]).append_column("prediction", prediction))
    target.mkdir(exist_ok=True)
    pq.write_table(pa.concat_tables(tables), target / f"part-{core}.parquet", compression="zstd")


def by_hand(bench: Bench, pool: ProcessPoolExecutor) -> Callable[[], None]:
    """The same job as `score` by one Python process per core, started beforehand."""
    share = partial(without_spark, bench.model, bench.whole, bench.folder / "hand")
    return lambda: _drain(pool.map(share, range(CORES)))


def _drain(results: Iterator[None]) -> None:
    for _ in results:
        pass


# -- measuring ---------------------------------------------------------------------------------------


def predictions(folder: Path) -> dict[str, float]:
    """The first rows' predictions by key."""
    table = pa.concat_tables([pq.read_table(p) for p in sorted(folder.rglob("part-*.parquet"))])
    return dict(zip(table["key"].to_pylist(), table["prediction"].to_pylist(), strict=True))


def agree(ours: dict[str, float], theirs: dict[str, float], rows: int) -> None:
    """Raise unless both say the same (float32: a batch and a single row are added up in another order)."""
    keys = sorted(theirs)
    assert len(keys) == rows
    np.testing.assert_allclose([theirs[k] for k in keys], [ours[k] for k in keys], atol=2e-6)


def run() -> list[dict[str, Any]]:
    """Return one row per comparison: `value` is score's rows/s, `ratio` how many times that of `against`."""
    folder = Path(tempfile.mkdtemp(prefix="bench-spark-"))
    try:
        bench = Bench(folder)
        talk: session.Conversation[None] = session.Conversation(folder / "spark.log")
        threads = ThreadPoolExecutor(CORES)
        processes = ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn"))
        with threads, processes, session.opened(talk, f"local[{CORES}]", CONF, folder) as spark:
            return _compare(bench, spark, by_hand(bench, processes), run_alone(bench, threads))
    finally:
        shutil.rmtree(folder)


def refuse_unequal(spark: Any, source: Path, rows: int) -> None:
    """Raise unless Spark gives every core one task, with the same number of rows."""
    from pyspark.sql import functions as f

    found = spark.read.parquet(str(source)).groupBy(f.spark_partition_id()).count().collect()
    assert sorted(r["count"] for r in found) == [rows // CORES] * CORES, found


def _compare(bench: Bench, spark: Any, hand: Callable[[], None], alone: Callable[[], None]) -> list[dict[str, Any]]:
    udfs = {
        "spark_vs_row_udf": (row_udf(bench.model, arrow=False), "udf(useArrow=False): plain, pickled"),
        "spark_vs_arrow_udf": (row_udf(bench.model, arrow=True), "udf(useArrow=True), Spark's default"),
        "spark_vs_pandas_udf": (pandas_udf(bench.model), "pandas_udf"),
        "spark_vs_rows_through_spark": (map_in_arrow(bench.model), "mapInArrow on Spark's own Parquet"),
    }
    others = {
        "spark_vs_onnxruntime": (hand, f"onnxruntime by hand, {CORES} processes, Parquet in and out"),
        "spark_vs_onnxruntime_memory": (alone, f"onnxruntime's run() alone, {CORES} threads, arrays in memory"),
    }
    jobs: dict[str, Callable[[], Any]] = {"score": bench.score}
    refuse_unequal(spark, bench.shares, ROWS)
    for name, (add, _) in udfs.items():
        bench.spark_job(spark, bench.warm, add)
        jobs[name] = partial(bench.spark_job, spark, bench.shares, add)
    jobs |= {name: job for name, (job, _) in others.items()}
    ours = predictions(bench.score())
    hand()
    agree(ours, predictions(bench.folder / "hand"), ROWS)
    speed = dict.fromkeys(jobs, 0.0)
    for _ in range(ROUNDS):  # in turn, so that what else the machine does meets all alike
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            speed[name] = max(speed[name], ROWS / (time.perf_counter() - began))
            if name in udfs:
                agree(ours, predictions(bench.folder / "out"), ROWS)
    texts = {name: what for name, (_, what) in (udfs | others).items()}
    return [
        _row(name, speed["score"], f"{what}: {speed[name]:,.0f} rows/s", speed[name]) for name, what in texts.items()
    ]


def _row(name: str, speed: float, against: str, other: float) -> dict[str, Any]:
    return {"name": name, "value": round(speed), "unit": "rows/s", "against": against, "ratio": round(speed / other, 2)}


if __name__ == "__main__":
    found = run()
    for line in found:
        print(f"{line['name']:28} {line['value']:>10,} {line['unit']}  {line['ratio']:>7}x  {line['against']}")
    print(json.dumps(found))
