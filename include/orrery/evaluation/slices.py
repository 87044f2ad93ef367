"""How a model does on parts of the rows, and how far apart groups are. Arrays in, small JSON out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.evaluation import metrics
from orrery.evaluation.metrics import Array, Task
from orrery.spec import Disparity

MAX_VALUES = 50
MIN_ROWS = 200


def of_column(
    values: list[str], place: npt.NDArray[np.int64], y: npt.NDArray[Any], p: Array, task: Task, primary: str
) -> list[dict[str, Any]]:
    """Return one entry per value with at least `MIN_ROWS` rows; none for a column with too many values.

    The primary metric is None where it is not defined on those rows. Means are of label and prediction
    (multiclass: the accuracy instead).
    """
    if len(values) > MAX_VALUES:
        return []
    out: list[dict[str, Any]] = []
    for number, value in enumerate(values):
        rows = np.flatnonzero(place == number)
        if len(rows) < MIN_ROWS:
            continue
        measured = metrics.METRICS_OF[task][primary](y[rows], p[rows])
        entry: dict[str, Any] = {"value": value, "rows": len(rows)}
        entry[primary] = measured if np.isfinite(measured) else None
        if task == "multiclass":
            entry["accuracy"] = metrics.multiclass_accuracy(y[rows], p[rows])
        else:
            entry |= {"mean_label": float(y[rows].mean()), "mean_prediction": float(p[rows].mean())}
        out.append(entry)
    return out


def disparity(
    values: list[str], place: npt.NDArray[np.int64], y: npt.NDArray[Any], p: Array, task: Task, rule: Disparity
) -> dict[str, Any]:
    """Return each group's figure and the largest difference between two groups of at least `rule.min_rows` rows.

    `error`: the mean of prediction less label (multiclass: the share that is wrong). `flagged`: the share flagged,
    at the threshold that flags as many rows as are positive (Feldman et al. 2015 compare these shares between
    groups). The difference is None with fewer than two such groups.
    """
    min_rows = rule.min_rows
    per_row, what = _outcome(y, p, task, rule.of)
    shares = {
        value: float(per_row[place == number].mean())
        for number, value in enumerate(values)
        if int((place == number).sum()) >= min_rows
    }
    difference = max(shares.values()) - min(shares.values()) if len(shares) > 1 else None
    return {"what": what, "min_rows": min_rows, "groups": shares, "difference": difference}


def _outcome(y: npt.NDArray[Any], p: Array, task: Task, of: str) -> tuple[npt.NDArray[Any], str]:
    if task == "binary" and of == "flagged":
        flagged = max(1, round(float(y.sum())))
        threshold = np.sort(p)[::-1][flagged - 1]
        return p >= threshold, "share flagged"
    if task == "multiclass":
        return p.argmax(axis=1) != y, "share wrong"
    return p - y, "mean error"
