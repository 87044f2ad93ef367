"""An exported model: ONNX graph and schema of one training, loaded from the store and scored on a features table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa
from pydantic import ValidationError

from orrery.errors import DataError, UserError
from orrery.evaluation.metrics import Array
from orrery.store import Manifest
from orrery.training.schema import Schema

BATCH = 8_192
# Latency: ten rounds of 200 runs (so a p99 is not one hiccup), and never longer than two seconds.
WARM_RUNS, TIMED_RUNS, ROUNDS, TIMED_S = 200, 2_000, 10, 2.0
# Probabilities of one row add up to 1 as far as float32 sums do over thousands of classes.
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Latency:
    """Of one row through the graph, in milliseconds."""

    p50_ms: float
    p99_ms: float


class Exported:
    """A graph with its schema. One thread: the same sums in the same order, so the same bits on every run."""

    def __init__(self, graph: Path, schema: Schema, name: str) -> None:
        self.schema, self.name = schema, name
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(os.fspath(graph), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime raises a class per cause, all of them plain Exceptions
            raise UserError(f"{name}: {graph.name} is not a model that onnxruntime can load: {e}") from None

    def predict(self, table: pa.Table, on_rows: Callable[[float], None] = lambda n: None) -> Array:
        """Return the predictions [N], or [N, C] (multiclass), as float64.

        Raises `DataError` when a column is absent, or when predictions are not finite, not probabilities or
        not one per row.
        """
        if not table.num_rows:
            classes = len(self.schema.classes)
            return np.empty((0, classes) if self.schema.task == "multiclass" else 0)
        chunks = []
        for start in range(0, table.num_rows, BATCH):
            chunks.append(self._run(self.schema.feed(table.slice(start, BATCH))))
            on_rows(float(len(chunks[-1])))
        values: Array = np.concatenate(chunks).astype(np.float64)
        self._check(values, table.num_rows)
        return values

    def _run(self, feed: dict[str, Any]) -> Any:
        try:
            return self.session.run(None, feed)[0]
        except Exception as e:  # as above
            raise DataError(
                f"{self.name}: the graph does not take what its schema.json says: {e}",
                hint="see orrery/training/schema.py for the signature",
            ) from None

    def _check(self, values: Array, rows: int) -> None:
        classes = len(self.schema.classes)
        expected = (rows, classes) if self.schema.task == "multiclass" else (rows,)
        if values.shape != expected:
            raise DataError(f"{self.name} predicts shape {list(values.shape)}, expected {list(expected)}")
        finite = np.isfinite(values) if values.ndim == 1 else np.isfinite(values).all(axis=1)
        if not finite.all():
            bad = rows - int(finite.sum())
            raise DataError(
                f"{self.name} predicts NaN or infinity for {bad:,} of {rows:,} rows",
                hint="does the graph fill missing numbers, as the one it was trained with?",
            )
        if self.schema.task == "regression":
            return
        outside = int(((values < 0) | (values > 1)).sum())
        if outside:
            raise DataError(
                f"{self.name}: {outside:,} predictions are no probabilities, "
                f"they go from {values.min():.4g} to {values.max():.4g}",
                hint="the graph ends before its sigmoid or softmax",
            )
        if values.ndim == 2 and (off := int((np.abs(values.sum(axis=1) - 1) > SUM_TOLERANCE).sum())):
            raise DataError(f"{self.name}: the classes' probabilities do not add up to 1 on {off:,} of {rows:,} rows")

    def latency(self, table: pa.Table) -> Latency:
        """Time one row through the graph, in rounds; the quietest round counts, by its p99.

        Other processes of the machine can only add time, so the quietest round is nearest to the model's own. The
        encoding is the caller's part and not in it.
        """
        feed = self.schema.feed(table.slice(0, 1))
        for _ in range(WARM_RUNS):
            self.session.run(None, feed)
        rounds: list[Latency] = []
        end = time.monotonic() + TIMED_S
        while len(rounds) < ROUNDS and (time.monotonic() < end or not rounds):
            times = [self._one_ms(feed) for _ in range(TIMED_RUNS // ROUNDS)]
            rounds.append(Latency(float(np.percentile(times, 50)), float(np.percentile(times, 99))))
        return min(rounds, key=lambda latency: latency.p99_ms)

    def _one_ms(self, feed: Any) -> float:
        began = time.perf_counter_ns()
        self.session.run(None, feed)
        return (time.perf_counter_ns() - began) / 1e6


def read_schema(file: Path, name: str) -> Schema:
    """Read a candidate's schema.json."""
    try:
        return Schema.model_validate_json(file.read_bytes())
    except ValidationError as e:
        first = e.errors()[0]
        raise UserError(
            f"{name}: schema.json: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint="train it again"
        ) from None


def load(
    open_input: Callable[[Manifest, str], Path], training: Manifest, name: str, file: str = "model.onnx"
) -> Exported:
    """Load one graph of a training's output; `name` is how messages call it."""
    schema = read_schema(open_input(training, "schema.json"), name)
    return Exported(open_input(training, file), schema, name)
