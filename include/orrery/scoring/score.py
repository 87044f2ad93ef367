"""`score`: the champion's prediction for every row of one partition, by Spark.

Spark hands out parts, not rows. A part is a few row groups of the features file; its task (in `mapInArrow`) reads
them with pyarrow, encodes and scores them with ONNX Runtime, writes one Parquet file below the attempt's folder and
hands back one row that says what it wrote. The other way, rows read and written by Spark and carried through
`mapInArrow`, was measured too: 6.6 s of CPU against 2.6 s (a million rows, two cores, tests/benchmarks), it needs a
jar for every kind of store, and its files differ from run to run. Here nothing but numbers of parts crosses between
Python and the JVM, any store that fsspec knows will do, and a task that Spark tries again or runs twice writes under
another name: only the names that came back are taken up, each once, in the one commit at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orrery.contract import Result, ScoreParams
from orrery.data.tables import KEY, PREDICTION_TIME
from orrery.errors import DataError, OrreryError, TryAgain, UserError
from orrery.scoring import parts
from orrery.scoring.parts import Item, Job, Part
from orrery.scoring.session import SparkFailed, with_spark
from orrery.step import Work
from orrery.training.schema import CHANGED_HINT, Schema

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# Tasks per core: few, since each costs a worker some 50 ms of its own; two, so that a slow core is waited for less.
WAVES = 2
LOOK_EVERY_S = 2.0
FEATURES, MODEL, SCHEMA = "features.parquet", "model.onnx", "schema.json"


def run(work: Work, params: ScoreParams) -> Result:
    """Score one partition. Raises `DataError` when the features are not what the model was trained with."""
    job = plan_job(work, params)
    try:
        made = with_spark(
            params.spark_master, params.spark_conf, work.scratch, partial(score_all, job), _watch(work, job)
        )
    except SparkFailed as e:
        log = work.scratch / "spark.log"
        if log.exists():  # not when a session was lent
            e.details["links"] = {"spark log": work.evidence("spark.log", log)}
        raise
    reconcile(job, made)
    written = read_back(work, job, made)
    report = summarise(job, made, written)
    for part in made:
        work.adopt(job.items[part.index].name, part.relative, part.size, part.sha256)
    work.write_json("report.json", report)
    return _result(report, columns(work, job, made))


def plan_job(work: Work, params: ScoreParams) -> Job:
    """Read the features' footer and the model's schema, check one against the other, cut the work into parts."""
    features, model = work.input("features"), work.input("model")
    schema_json = work.store.read(model.uri(SCHEMA)).decode()
    file = parts.open_parquet(work.store, features.uri(FEATURES))
    check_columns(Schema.model_validate_json(schema_json), file.schema_arrow, features.uri(FEATURES))
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    return Job(
        store=work.store.uri,
        features=features.uri(FEATURES),
        model=model.uri(MODEL),
        model_sha256=model.files[MODEL].sha256,
        schema_json=schema_json,
        folder=work.attempt_folder,
        version=params.model_version,
        sample=work.config.sample,
        items=parts.plan_items(groups),
    )


def check_columns(schema: Schema, table: pa.Schema, where: str) -> None:
    """Raise `DataError` that lists what the features lack, or have in a type that the model cannot take."""
    absent = [c for c in (KEY, PREDICTION_TIME, *schema.columns) if c not in table.names]
    if absent:
        raise DataError(
            f"{where} lacks {', '.join(absent)}, which the model was trained with",
            hint="features.py has changed since: train again, or roll the model back",
            details={"missing": absent},
        )
    if changed := schema.changed(table):
        raise DataError(f"{where}: {'; '.join(changed)}", hint=CHANGED_HINT)


# -- the work, by Spark ------------------------------------------------------------------------------


def score_all(job: Job, spark: Any, task: Callable[..., Any] = parts.score_batches) -> list[Part]:
    """Have every part scored; return what the tasks wrote, by index. Raises what a task raised."""
    count = len(job.items)
    tasks = min(count, WAVES * spark.sparkContext.defaultParallelism)
    rows = spark.range(0, count, 1, tasks).mapInArrow(partial(task, job=job), parts.RESULT).collect()
    for row in rows:
        if row["error"] is not None:
            raise _error(json.loads(row["error"]))
    return sorted((_part(row) for row in rows), key=lambda part: part.index)


def _part(row: Any) -> Part:
    return Part(
        row["part"],
        row["relative"],
        row["rows_read"],
        row["rows"],
        row["size"],
        row["sha256"],
        **json.loads(row["notes"]),
    )


def _error(told: dict[str, str]) -> OrreryError:
    kinds: dict[str, type[OrreryError]] = {"user": UserError, "try_again": TryAgain}
    return kinds.get(told["kind"], OrreryError)(told["message"], hint=told["hint"])


def _watch(work: Work, job: Job) -> Callable[[], None]:
    """Return what says now and then how many parts are written, by looking at the attempt's folder."""
    last = [time.monotonic(), 0.0]

    def look() -> None:
        if time.monotonic() - last[0] < LOOK_EVERY_S:
            return
        last[0] = time.monotonic()
        there = len(work.store.names(f"{job.folder}/parts"))
        if there != last[1]:
            last[1] = there
            work.log.info(f"scored {min(there, len(job.items))} of {len(job.items)} parts")

    return look


# -- what came of it ---------------------------------------------------------------------------------


def reconcile(job: Job, made: list[Part]) -> None:
    """Raise `OrreryError` unless every part came back once and read exactly the rows it was given."""
    indexes = [part.index for part in made]
    if indexes != list(range(len(job.items))):
        raise OrreryError(f"{len(job.items)} parts were given out, these came back: {indexes}")
    for part in made:
        item: Item = job.items[part.index]
        if part.rows_read != item.rows:
            raise OrreryError(f"{item.name}: read {part.rows_read:,} rows of {item.rows:,}")
        if job.sample >= 1 and part.rows != part.rows_read:
            raise OrreryError(f"{item.name}: wrote {part.rows:,} rows of {part.rows_read:,}")


def read_back(work: Work, job: Job, made: list[Part]) -> pa.ChunkedArray:
    """Read keys and predictions from the files that will be committed; return the predictions.

    Raises `OrreryError` when a file is not what its task reported, or when a key is there twice.
    """
    keys: list[pa.Array] = []
    predictions: list[pa.Array] = []
    for part in made:
        path = f"{job.folder}/{part.relative}"
        if work.store.size(path) != part.size:
            raise OrreryError(f"{path}: {work.store.size(path):,} bytes instead of {part.size:,}")
        file: pq.ParquetFile = parts.open_parquet(work.store, path)
        if file.metadata.num_rows != part.rows:
            raise OrreryError(f"{path}: {file.metadata.num_rows:,} rows instead of {part.rows:,}")
        table = file.read(columns=[KEY, "prediction"])
        keys += table[KEY].chunks
        predictions += table["prediction"].chunks
    check_keys(pa.chunked_array(keys, keys[0].type if keys else pa.string()))
    return pa.chunked_array(predictions, predictions[0].type if predictions else pa.float32())


def columns(work: Work, job: Job, made: list[Part]) -> dict[str, str]:
    """Return the scores' columns and their types: those of the first part, which are those of all."""
    if not made:
        return {}
    schema: pa.Schema = parts.open_parquet(work.store, f"{job.folder}/{made[0].relative}").schema_arrow
    return {field.name: str(field.type) for field in schema}


def check_keys(keys: pa.ChunkedArray) -> None:
    """Raise `OrreryError` for a key that is absent or there twice (all keys in memory: some 100 bytes a row)."""
    if keys.null_count:
        raise OrreryError(f"{keys.null_count:,} rows have no key", hint="materialize wrote features without keys")
    if len(keys) == 0 or pc.count_distinct(keys).as_py() == len(keys):
        return
    counts = pc.value_counts(keys)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    raise OrreryError(
        f"{len(twice):,} keys are there more than once: {', '.join(map(str, twice[:5].to_pylist()))}",
        hint="materialize wrote features whose key is not unique",
    )


def summarise(job: Job, made: list[Part], predictions: pa.ChunkedArray) -> dict[str, Any]:
    """Return report.json: counts that add up, how the predictions are spread, and what the model did not know."""
    unknown: dict[str, dict[str, Any]] = {}
    for part in made:
        for column, seen in part.unknown.items():
            parts.merge_unknown(unknown, column, seen["rows"], seen["examples"])
    rows = sum(part.rows for part in made)
    return {
        "model_version": job.version,
        "rows_read": sum(part.rows_read for part in made),
        "rows": rows,
        "parts": len(made),
        "sample": job.sample,
        "not_finite": sum(part.not_finite for part in made),
        "prediction": spread(predictions, job.schema),
        "unknown": unknown,
    }


def spread(predictions: pa.ChunkedArray, schema: Schema) -> dict[str, Any]:
    """Return mean and quantiles; for many classes, each one's mean probability and share of the rows it wins."""
    valid = predictions.drop_null()
    if schema.task == "multiclass":
        return _by_class(pc.list_flatten(valid).to_numpy().reshape(-1, len(schema.classes)), schema.classes)
    values = valid.to_numpy().astype(np.float64)
    if len(values) == 0:
        return {}
    found = np.quantile(values, QUANTILES)
    return {
        "mean": float(values.mean()),
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, found, strict=True)},
    }


def _by_class(values: npt.NDArray[np.float32], classes: Iterable[str]) -> dict[str, Any]:
    if len(values) == 0:
        return {}
    won = np.bincount(values.argmax(axis=1), minlength=values.shape[1]) / len(values)
    means = values.mean(axis=0, dtype=np.float64)
    each = {c: {"mean": float(m), "share": float(w)} for c, m, w in zip(classes, means, won, strict=True)}
    return {"mean": float(values.max(axis=1).mean(dtype=np.float64)), "classes": each}


def _result(report: dict[str, Any], columns: dict[str, str]) -> Result:
    """Return the result: counts, and one sentence for each thing that a person should look at."""
    reasons = [
        f"{column}: {seen['rows']:,} rows have a value that the model does not know ({', '.join(seen['examples'])})"
        for column, seen in sorted(report["unknown"].items())
    ]
    if report["not_finite"]:
        reasons.append(f"{report['not_finite']:,} rows have no prediction: the model's was not a finite number")
    metrics = {"rows": float(report["rows"]), "unknown_rows": float(sum(s["rows"] for s in report["unknown"].values()))}
    if "mean" in report["prediction"]:
        metrics["mean_prediction"] = report["prediction"]["mean"]
    facts = {"rows": report["rows"], "parts": report["parts"], "columns": columns}
    return Result(reasons=reasons, metrics=metrics, facts=facts)
