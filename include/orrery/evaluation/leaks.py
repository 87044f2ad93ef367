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


def best_single_feature(rows: Holdout, schema: Schema, task: Task) -> dict[str, Any] | None:
    """Return {name, metric, value} of the strongest feature; None where not defined (multiclass, no features).

    Binary: the AUC of the raw value, either way round, missing values at either end. A category stands for
    the mean label of its other half of the rows, so an identifier cannot recite the labels. Regression: the
    squared correlation.
    """
    if task == "multiclass" or len(rows.y) < 2:
        return None
    y = rows.mean_label
    found = {name: _strength(np.asarray(to_float(rows.table[name]), np.float64), y, task) for name in schema.numeric}
    for name in schema.vocabularies:
        found[name] = _categorical(rows.table, name, y, task)
    found = {name: value for name, value in found.items() if np.isfinite(value)}
    if not found:
        return None
    best = max(sorted(found), key=lambda n: found[n])
    return {"name": best, "metric": "auc" if task == "binary" else "r2", "value": found[best]}


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
