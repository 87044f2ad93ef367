"""Metrics from labels and predictions. Plain numpy: importing sklearn for ten formulas costs a second per step.

Labels `y` and predictions `p` have one entry per row: y [N] of 0.0/1.0 and p [N] a probability (binary),
y [N] class numbers and p [N, C] (multiclass), y [N] and p [N] values (regression). A metric that is not
defined on the rows given (one class only, constant labels, no rows) is NaN, never 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Task = Literal["binary", "multiclass", "regression"]

# Exports are float32: its resolution around 1 is the smallest probability of an error that they can express.
EPSILON = float(np.finfo(np.float32).eps)
BINS = 15
THRESHOLD = 0.5


def auc(y: Array, p: Array) -> float:
    """Area under the ROC curve; ties count half (Mann-Whitney U; Hanley & McNeil 1982, eq. 1)."""
    positives = float(y.sum())
    negatives = len(y) - positives
    if not positives or not negatives:
        return float("nan")
    rank_sum = float(mid_ranks(p)[y > 0].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def mid_ranks(values: Array) -> Array:
    """Return ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Array = last - (counts - 1) / 2
    return mean[inverse]


def roc(y: Array, p: Array) -> tuple[Array, Array]:
    """Return the ROC curve's false and true positive rates, one point per distinct prediction, from (0, 0)."""
    tp, fp = _cumulated(y, p)
    return np.concatenate(([0.0], fp / fp[-1])), np.concatenate(([0.0], tp / tp[-1]))


def precision_recall(y: Array, p: Array) -> tuple[Array, Array]:
    """Return precision and recall, one point per distinct prediction, highest first."""
    tp, fp = _cumulated(y, p)
    return tp / (tp + fp), tp / tp[-1]


def _cumulated(y: Array, p: Array) -> tuple[Array, Array]:
    """Return how many positives and negatives have a prediction of at least each distinct value, highest first."""
    order = np.argsort(-p, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(p[order]) != 0, True))
    tp = np.cumsum(y[order])[ends]
    return tp, ends + 1 - tp


def average_precision(y: Array, p: Array) -> float:
    """Sum of precision times step in recall, without interpolation (Davis & Goadrich 2006; as in sklearn)."""
    if not y.sum():
        return float("nan")
    precision, recall = precision_recall(y, p)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def log_losses(y: Array, p: Array) -> Array:
    """Return each row's negative log-likelihood, binary; probabilities are clipped by `EPSILON`."""
    q = np.clip(p, EPSILON, 1 - EPSILON)
    losses: Array = -np.log(np.where(y > 0, q, 1 - q))
    return losses


def log_loss(y: Array, p: Array) -> float:
    """Mean negative log-likelihood (Good 1952)."""
    return _mean(log_losses(y, p))


def brier(y: Array, p: Array) -> float:
    """Mean squared difference of probability and outcome (Brier 1950, one class)."""
    return _mean((p - y) ** 2)


def calibration_error(y: Array, p: Array, bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015) over bins of equal mass (Nixon et al. 2019).

    Rows with equal predictions stay in one bin, so the order of the rows changes nothing.
    """
    counts, predicted, observed = calibration(y, p, bins)
    return float(np.sum(counts * np.abs(predicted - observed)) / len(y)) if len(y) else float("nan")


def calibration(y: Array, p: Array, bins: int = BINS) -> tuple[Array, Array, Array]:
    """Return count, mean prediction and mean label of each bin that holds rows."""
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    bin_of = (first * bins // max(len(y), 1))[inverse]
    n = np.bincount(bin_of, minlength=bins).astype(np.float64)
    held = n > 0
    n = n[held]
    predicted = np.bincount(bin_of, weights=p, minlength=bins)[held] / n
    observed = np.bincount(bin_of, weights=y, minlength=bins)[held] / n
    return n, predicted, observed


def accuracy(y: Array, p: Array) -> float:
    """Share of rows on the right side of 0.5 (0.5 itself says yes)."""
    return _mean((p >= THRESHOLD) == (y > 0))


def multiclass_log_losses(y: npt.NDArray[np.int64], p: Array) -> Array:
    """Return each row's negative log-likelihood; probabilities are clipped by `EPSILON`."""
    losses: Array = -np.log(np.clip(p[np.arange(len(y)), y], EPSILON, 1.0))
    return losses


def multiclass_log_loss(y: npt.NDArray[np.int64], p: Array) -> float:
    """Mean negative log-likelihood of the true class."""
    return _mean(multiclass_log_losses(y, p))


def multiclass_accuracy(y: npt.NDArray[np.int64], p: Array) -> float:
    """Share of rows whose most probable class is the true one; of equals, the first class."""
    return _mean(p.argmax(axis=1) == y)


def rmse(y: Array, p: Array) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(_mean((p - y) ** 2)))


def mae(y: Array, p: Array) -> float:
    """Mean absolute error."""
    return _mean(np.abs(p - y))


def r2(y: Array, p: Array) -> float:
    """One minus the squared error over that of the labels' mean; NaN for constant labels."""
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    return 1 - float(((p - y) ** 2).sum()) / total if total else float("nan")


METRICS_OF: dict[str, dict[str, Callable[..., float]]] = {
    "binary": {
        "auc": auc,
        "average_precision": average_precision,
        "log_loss": log_loss,
        "brier": brier,
        "calibration_error": calibration_error,
        "accuracy": accuracy,
    },
    "multiclass": {"log_loss": multiclass_log_loss, "accuracy": multiclass_accuracy},
    "regression": {"rmse": rmse, "mae": mae, "r2": r2},
}


def all_metrics(task: Task, y: npt.NDArray[np.generic], p: Array) -> dict[str, float]:
    """Return every metric of a task; NaN where it is not defined on these rows."""
    return {name: function(y, p) for name, function in METRICS_OF[task].items()}


def _mean(values: npt.NDArray[np.generic]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
