"""How sure the primary metric is, in closed form: its value, its standard error, and Student's interval.

AUC: placement values (DeLong, DeLong & Clarke-Pearson 1988), summed over clusters where rows of one day share causes
(Obuchowski 1997). A mean of per-row losses: the cluster-robust error of a ratio of sums (Cochran 1977, 6.3). RMSE:
that of the mean squared error, by the delta method. The units are those of the bootstrap (`bootstrap.units`): whole
UTC days where there are days enough, else rows. No draws: one sort of the predictions, whatever the number of rows.

What it cannot know is that neighbouring days share causes too, and that the next month is another one: an interval
here is about the rows' and the days' chance alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.evaluation import bootstrap, metrics, slices
from orrery.evaluation.bootstrap import CONFIDENCE, Units
from orrery.evaluation.metrics import Array, Task
from orrery.evaluation.quantiles import student_quantile

# With fewer units (or fewer that hold one of the classes) a standard error is itself nearly chance.
MIN_UNITS = 5


@dataclass(frozen=True)
class Certainty:
    """A metric's value, its standard error, and the degrees of freedom that this error has.

    `units` is what was taken as independent, as words: "30 days", "1,204 rows".
    """

    value: float
    se: float
    freedom: int
    units: str
    rows: int

    @property
    def interval(self) -> tuple[float, float]:
        """The two-sided 95 % interval."""
        reach = student_quantile(1 - (1 - CONFIDENCE) / 2, self.freedom) * self.se
        return self.value - reach, self.value + reach

    def told(self, metric: str) -> dict[str, Any]:
        """Return it as JSON: metric, value, low, high, se, freedom, units, rows."""
        low, high = self.interval
        numbers = {"value": self.value, "low": low, "high": high, "se": self.se, "freedom": self.freedom}
        return {"metric": metric, **numbers, "units": self.units, "rows": self.rows}


def of_primary(task: Task, y: npt.NDArray[Any], p: Array, units: Units) -> Certainty | None:
    """Return the task's primary metric (`spec.PRIMARY`); None where it or its error is not defined on these rows.

    Not defined: fewer than `MIN_UNITS` units, or (AUC) fewer than that with a row of each class.
    """
    if task == "binary":
        return of_auc(np.asarray(y, np.float64), p, units)
    if task == "multiclass":
        return of_mean(metrics.multiclass_log_losses(np.asarray(y, np.int64), p), units)
    return of_mean((p - np.asarray(y, np.float64)) ** 2, units, root=True)


def of_slices(
    task: Task, values: list[str], place: npt.NDArray[np.int64], y: npt.NDArray[Any], p: Array, units: Units
) -> dict[str, Certainty]:
    """Return the primary metric per value of a column, where it is defined; `place` [N] is each row's value.

    As in `slices`: none for a column of too many values, and no value of too few rows. `units` are those of all rows;
    a value that is there on too few days (each weekday of a month) is left out: as rows, its error would look small.
    """
    if len(values) > slices.MAX_VALUES:
        return {}
    found = {}
    for number, value in enumerate(values):
        rows = np.flatnonzero(place == number)
        own = _part(units, rows)
        if own is not None and len(rows) >= slices.MIN_ROWS:
            one = of_primary(task, y[rows], p[rows], own)
            if one is not None:
                found[value] = one
    return found


def _part(units: Units, rows: npt.NDArray[np.int64]) -> Units | None:
    """Return the units of some of the rows; None where these are of too few days."""
    if units.of is None:
        return Units(units.by, len(rows))
    days, place = np.unique(units.of[rows], return_inverse=True)
    return Units(units.by, len(days), place.astype(np.int64)) if len(days) >= bootstrap.MIN_DAYS else None


def of_auc(y: Array, p: Array, units: Units, counts: Array | None = None) -> Certainty | None:
    """Return the AUC of labels y [N] (0.0/1.0) and scores p [N].

    `counts` [N]: how many rows each entry stands for, rows that were counted together by day, label and score.
    """
    counts = np.ones(len(y)) if counts is None else counts
    positive = y > 0
    m, n = float(counts[positive].sum()), float(counts[~positive].sum())
    if not m or not n:
        return None
    beats, beaten = _placements(positive, p, counts)
    auc = float(counts[positive] @ beats) / m
    if units.of is None:
        with_positive, with_negative = int(m), int(n)
        of_positive, of_negative = counts[positive] @ (beats - auc) ** 2, counts[~positive] @ (beaten - auc) ** 2
        together = 0.0
    else:
        place, size = units.of, units.count
        by_positive = np.bincount(place[positive], weights=counts[positive] * (beats - auc), minlength=size)
        by_negative = np.bincount(place[~positive], weights=counts[~positive] * (beaten - auc), minlength=size)
        with_positive = int(np.count_nonzero(np.bincount(place[positive], minlength=size)))
        with_negative = int(np.count_nonzero(np.bincount(place[~positive], minlength=size)))
        of_positive, of_negative = by_positive @ by_positive, by_negative @ by_negative
        together = size / (size - 1) * float(by_positive @ by_negative)
    variance = (_unbiased(of_positive, with_positive) / m**2 + _unbiased(of_negative, with_negative) / n**2
                + 2 * together / (m * n))  # fmt: skip
    return _certainty(auc, variance, min(with_positive, with_negative), units, int(m + n))


def _placements(positive: npt.NDArray[np.bool_], p: Array, counts: Array) -> tuple[Array, Array]:
    """Return each positive's share of the negatives that lie below it, each negative's of the positives above it.

    Ties count half.
    """
    _, place = np.unique(p, return_inverse=True)
    of_positive = np.bincount(place[positive], weights=counts[positive], minlength=int(place.max()) + 1)
    of_negative = np.bincount(place[~positive], weights=counts[~positive], minlength=len(of_positive))
    below = (np.cumsum(of_negative) - of_negative / 2) / of_negative.sum()
    above = 1 - (np.cumsum(of_positive) - of_positive / 2) / of_positive.sum()
    return below[place[positive]], above[place[~positive]]


def of_mean(losses: Array, units: Units, root: bool = False) -> Certainty | None:
    """Return the mean of per-row losses [N], or its square root."""
    if not len(losses):
        return None
    mean = float(losses.mean())
    apart = losses - mean
    if units.of is not None:
        apart = np.bincount(units.of, weights=apart, minlength=units.count)
    variance = _unbiased(float(apart @ apart), units.count) / len(losses) ** 2
    if not root:
        return _certainty(mean, variance, units.count, units, len(losses))
    value = mean**0.5
    slope = 1 / (2 * value) if value else 0.0
    return _certainty(value, variance * slope**2, units.count, units, len(losses))


def _unbiased(squares: float, count: int) -> float:
    """Return the variance of a total of `count` independent parts, from the squares of their deviations."""
    return count / (count - 1) * float(squares) if count > 1 else float("nan")


def _certainty(value: float, variance: float, count: int, units: Units, rows: int) -> Certainty | None:
    if count < MIN_UNITS or not np.isfinite(variance) or not np.isfinite(value):
        return None
    # Positives and negatives of a day may offset each other: a small negative sum is an error of zero.
    return Certainty(value, max(variance, 0.0) ** 0.5, count - 1, f"{units.count:,} {units.by}s", rows)
