"""The feature that says most on its own: a label that leaked into one shows here as a number the gate can refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orrery.evaluation import metrics
from orrery.evaluation.holdout import Holdout, groups
from orrery.evaluation.metrics import Array, Task
from orrery.training.schema import Schema, to_float

MAX_BINS, ROWS_PER_BIN = 32, 20
METRIC: dict[Task, str] = {"binary": "auc", "multiclass": "accuracy", "regression": "r2"}


def best_single_feature(rows: Holdout, schema: Schema, task: Task) -> dict[str, Any] | None:
    """Return {name, metric, value, chance} of the strongest feature; None where not defined (no features).

    Binary: the AUC of the raw value, either way round, missing values at either end. A category stands for
    the mean label of its other half of the rows, so an identifier cannot recite the labels. Regression: the
    squared correlation. Multiclass: the accuracy of the commonest class per bin (or category), learnt on one
    half of the rows and measured on the other. `chance` is what no feature at all reaches.
    """
    if len(rows.y) < 2:
        return None
    found = {name: value for name, value in _strengths(rows, schema, task).items() if np.isfinite(value)}
    if not found:
        return None
    best = max(sorted(found), key=lambda n: found[n])
    return {"name": best, "metric": METRIC[task], "value": found[best], "chance": _chance(rows, task)}


def _strengths(rows: Holdout, schema: Schema, task: Task) -> dict[str, float]:
    numbers = {name: np.asarray(to_float(rows.table[name]), np.float64) for name in schema.numeric}
    if task == "multiclass":
        y = np.asarray(rows.y, np.int64)
        found = {name: _accuracy(_binned(x), y) for name, x in numbers.items()}
        return found | {name: _accuracy(groups(rows.table, name)[1], y) for name in schema.vocabularies}
    y = rows.mean_label
    found = {name: _strength(x, y, task) for name, x in numbers.items()}
    return found | {name: _categorical(rows.table, name, y, task) for name in schema.vocabularies}


def _chance(rows: Holdout, task: Task) -> float:
    if task == "multiclass":
        return float(np.bincount(np.asarray(rows.y, np.int64)).max() / len(rows.y))
    return 0.5 if task == "binary" else 0.0


def _binned(x: Array) -> npt.NDArray[np.int64]:
    """Return each value's bin: bins of about equal mass, edges at values that occur; missing is a bin of its own."""
    there = x[np.isfinite(x)]
    bins = min(MAX_BINS, max(2, len(x) // ROWS_PER_BIN))
    # Edges that are values themselves keep a code with few values (0, 1, 2 …) apart, each in its bin.
    edges = np.unique(np.quantile(there, np.linspace(0, 1, bins + 1), method="nearest")) if len(there) else there
    return np.where(np.isfinite(x), np.searchsorted(edges, x, side="right"), len(edges) + 1)


def _accuracy(place: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> float:
    """The commonest class per place from the even rows, measured on the odd ones; a place not seen: of all."""
    even = np.arange(len(y)) % 2 == 0
    counts = np.zeros((int(place.max()) + 1, int(y.max()) + 1))
    np.add.at(counts, (place[even], y[even]), 1)
    commonest = np.where(counts.any(axis=1), counts.argmax(axis=1), counts.sum(axis=0).argmax())
    return float(np.mean(commonest[place[~even]] == y[~even]))


def _strength(x: Array, y: Array, task: Task) -> float:
    missing = ~np.isfinite(x)
    if task == "regression":
        filled = np.where(missing, x[~missing].mean() if (~missing).any() else 0.0, x)
        return _squared_correlation(filled, y)
    areas = [metrics.auc(y, np.where(missing, end, x)) for end in ((-np.inf, np.inf) if missing.any() else (0.0,))]
    return float(np.max([max(a, 1 - a) for a in areas]))


def _squared_correlation(x: Array, y: Array) -> float:
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def _categorical(table: pa.Table, name: str, y: Array, task: Task) -> float:
    """Means from the even rows, measured on the odd ones."""
    values, place = groups(table, name)
    even = np.arange(len(y)) % 2 == 0
    means = _means(place[even], y[even], len(values))
    return _strength(means[place[~even]], y[~even], task)


def _means(place: npt.NDArray[np.int64], y: Array, size: int) -> Array:
    counts = np.bincount(place, minlength=size)
    sums = np.bincount(place, weights=y, minlength=size)
    return np.where(counts > 0, sums / np.maximum(counts, 1), y.mean())
