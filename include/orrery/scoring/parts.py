"""What one Spark task does: read its row groups, score them, write one part file, and say what it wrote.

This module is imported by Spark's Python workers, on other machines too, so it imports little and keeps the
ONNX session for the life of the worker process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orrery.data.tables import KEY, PREDICTION_TIME, ROW_GROUP, sample
from orrery.errors import OrreryError, TryAgain, UserError
from orrery.store import Store
from orrery.training.schema import Schema

# Two row groups of a features file: a quarter of a second of work, so that many cores are busy to the end.
ROWS_PER_PART = 2 * ROW_GROUP
# Rows per call of ONNX Runtime: what the layers of a small network hold then stays in a core's cache.
BATCH = 4096
EXAMPLES = 5
# What a task hands back to the driver, one row per part.
RESULT = "part long, relative string, rows_read long, rows long, size long, sha256 string, notes string, error string"


@dataclass(frozen=True)
class Item:
    """One part: which row groups of the features file it reads, and how many rows these hold."""

    index: int
    groups: tuple[int, ...]
    rows: int

    @property
    def name(self) -> str:
        """Name in the manifest: by position in the input, never by attempt."""
        return f"part-{self.index:05d}.parquet"


@dataclass(frozen=True)
class Job:
    """Everything that tasks are told; Spark pickles it, so plain values only, and no secret."""

    store: str
    features: str
    model: str
    model_sha256: str
    schema_json: str
    folder: str
    version: str
    sample: float
    items: tuple[Item, ...]

    @property
    def schema(self) -> Schema:
        """The model's signature."""
        return Schema.model_validate_json(self.schema_json)


@dataclass(frozen=True)
class Part:
    """What a task wrote: `relative` to the attempt's folder; rows before and after sampling; what was odd."""

    index: int
    relative: str
    rows_read: int
    rows: int
    size: int
    sha256: str
    unknown: dict[str, dict[str, Any]]
    not_finite: int


def plan_items(rows_per_group: list[int]) -> tuple[Item, ...]:
    """Group neighbouring row groups into parts of at most `ROWS_PER_PART` rows (or one larger row group).

    It depends on the file alone: more cores, or a retry, never change what a part holds.
    """
    items: list[Item] = []
    groups: list[int] = []
    rows = 0
    for group, count in enumerate(rows_per_group):
        if groups and rows + count > ROWS_PER_PART:
            items.append(Item(len(items), tuple(groups), rows))
            groups, rows = [], 0
        groups.append(group)
        rows += count
    return (*items, Item(len(items), tuple(groups), rows))


# -- in the worker -----------------------------------------------------------------------------------


def score_batches(batches: Iterator[pa.RecordBatch], job: Job) -> Iterator[pa.RecordBatch]:
    """What `mapInArrow` calls: for each part number that comes in, score that part and yield what `RESULT` names.

    An error that has an exit code of its own travels as a row, so that it keeps its kind and its hint.
    """
    for batch in batches:
        for index in batch.column(0).to_pylist():
            yield as_batch(index, lambda i=index: score_part(job, job.items[i]))


def as_batch(index: int, work: Any) -> pa.RecordBatch:
    """Return one `RESULT` row for a part, or for the error that `work` raised."""
    row: dict[str, Any] = dict.fromkeys(("relative", "rows_read", "rows", "size", "sha256", "notes", "error"))
    try:
        part: Part = work()
        row |= {n: getattr(part, n) for n in ("relative", "rows_read", "rows", "size", "sha256")}
        row["notes"] = json.dumps({"unknown": part.unknown, "not_finite": part.not_finite}, sort_keys=True)
    except OrreryError as e:
        kind = "try_again" if isinstance(e, TryAgain) else "user" if isinstance(e, UserError) else "bug"
        row["error"] = json.dumps({"kind": kind, "message": e.message, "hint": e.hint})
    texts = {"relative", "sha256", "notes", "error"}
    columns = {"part": pa.array([index], pa.int64())}
    columns |= {n: pa.array([v], pa.string() if n in texts else pa.int64()) for n, v in row.items()}
    return pa.RecordBatch.from_pydict(columns)


def score_part(job: Job, item: Item) -> Part:
    """Score the rows of one part and write them to a file of this try's own; nobody sees it before the commit."""
    store, schema = Store(job.store), job.schema
    model = open_model(job.store, job.model, job.model_sha256)
    source = open_parquet(store, job.features)
    columns = [KEY, PREDICTION_TIME, *schema.columns]
    tables, unknown, not_finite, read = [], Unknown(schema), 0, 0
    for groups in [[g] for g in item.groups] or [
        []
    ]:  # one by one: a part's raw columns need not fit the memory at once
        table = source.read_row_groups(groups, columns=columns, use_threads=False)
        read += table.num_rows
        table = sample(table, job.sample)
        predictions, ids = predict(model, schema, table)
        unknown.add(table, ids)
        finite = np.isfinite(predictions) if predictions.ndim == 1 else np.isfinite(predictions).all(axis=1)
        not_finite += int(len(finite) - finite.sum())
        tables.append(_scores(table, predictions, finite, job.version))
    data = to_parquet(pa.concat_tables(tables))
    relative = f"parts/{item.name.removesuffix('.parquet')}-{os.urandom(6).hex()}.parquet"
    store.put(f"{job.folder}/{relative}", data)
    rows = sum(t.num_rows for t in tables)
    digest = hashlib.sha256(data).hexdigest()
    return Part(item.index, relative, read, rows, len(data), digest, unknown.found, not_finite)


def open_parquet(store: Store, path: str) -> pq.ParquetFile:
    """Open a committed Parquet file where it lies: footer first, then only what is asked for."""
    try:
        if store.is_local:
            return pq.ParquetFile(store.full(path), memory_map=True)
        return pq.ParquetFile(store.open(path), pre_buffer=True)
    except FileNotFoundError:
        raise UserError(
            f"{store.uri}/{path} is gone, its manifest is not", hint="run the step that makes it again"
        ) from None
    except pa.ArrowInvalid as e:
        raise UserError(f"{store.uri}/{path} is not a Parquet file: {e}", hint="run materialize again") from None


@lru_cache(maxsize=1)
def open_model(store: str, path: str, sha256: str) -> Any:
    """Load the model, once per worker process (Spark runs one task per core, so one thread each)."""
    # Its Linux build reports to its maker over the network unless told not to, before it is imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    try:
        data = Store(store).read(path)
    except FileNotFoundError:
        raise UserError(
            f"{store}/{path} is gone, its manifest is not", hint="orrery rollback, or train again"
        ) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{store}/{path} is not the file that was committed", hint="it was damaged: train again")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def predict(model: Any, schema: Schema, table: pa.Table) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return predictions, float32 [N] or [N, classes], and the categorical ids [N, k] that went in."""
    numeric, ids = schema.encode(table)
    feed = {n: a for n, a in (("numeric", numeric), ("categorical", ids)) if a.shape[1]}
    shape = (len(numeric), len(schema.classes)) if schema.task == "multiclass" else (len(numeric),)
    out: npt.NDArray[np.float32] = np.empty(shape, dtype=np.float32)
    for start in range(0, len(numeric), BATCH):
        end = min(start + BATCH, len(numeric))
        out[start:end] = model.run(["prediction"], {n: a[start:end] for n, a in feed.items()})[0]
    return out, ids


def _scores(
    table: pa.Table, predictions: npt.NDArray[np.float32], finite: npt.NDArray[np.bool_], version: str
) -> pa.Table:
    """Return the rows to write; a prediction that is not a finite number becomes null."""
    mask = None if finite.all() else ~finite
    if predictions.ndim == 1:
        prediction = pa.array(predictions, pa.float32(), mask=mask)
    else:
        offsets = pa.array(np.arange(len(predictions) + 1, dtype=np.int32) * predictions.shape[1])
        nulls = None if mask is None else pa.array(mask)
        prediction = pa.ListArray.from_arrays(offsets, pa.array(predictions.ravel(), pa.float32()), mask=nulls)
    versions = pa.DictionaryArray.from_arrays(np.zeros(len(table), np.int32), pa.array([version])).cast(pa.string())
    return pa.table(
        {
            KEY: table[KEY],
            PREDICTION_TIME: table[PREDICTION_TIME],
            "prediction": prediction,
            "model_version": versions,
        }
    )


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as Parquet bytes: equal tables become equal bytes (of one pyarrow version).

    A dictionary only for the one value of `model_version`: keys and predictions hardly ever repeat.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(None),
        sink,
        compression="zstd",
        row_group_size=ROWS_PER_PART,
        use_dictionary=["model_version"],
    )
    return bytes(sink.getvalue())


class Unknown:
    """Counts values that the model was not trained with: per column the rows, and the first few in the alphabet."""

    def __init__(self, schema: Schema) -> None:
        self.columns = list(schema.vocabularies)
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, table: pa.Table, ids: npt.NDArray[np.int64]) -> None:
        """Count the rows of `table` whose id is 0 (see `Schema.encode`) though they have a value."""
        for i, name in enumerate(self.columns):
            zero = ids[:, i] == 0
            if not zero.any():
                continue
            values = table[name].filter(pa.array(zero)).drop_null()
            if len(values):
                seen = sorted(pc.unique(values.cast(pa.string())).to_pylist())
                merge_unknown(self.found, name, len(values), seen)


def merge_unknown(found: dict[str, dict[str, Any]], name: str, rows: int, examples: list[str]) -> None:
    """Add counts of one column; the alphabet's first examples of parts merge into those of the whole."""
    before = found.setdefault(name, {"rows": 0, "examples": []})
    before["rows"] += rows
    before["examples"] = sorted({*before["examples"], *examples})[:EXAMPLES]
