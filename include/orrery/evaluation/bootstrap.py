"""Is the difference between two models more than chance? The paired bootstrap (Efron & Tibshirani 1993, ch. 16).

Each draw takes N of N units with replacement and measures both models on the same draw; the percentile interval
of the differences is what the gate reads. Rows of one day share causes (a storm, a strike), so where the holdout
spans days enough the unit is the whole UTC day of `prediction_time`: the cluster bootstrap (Davison & Hinkley 1997,
ch. 3; Cameron, Gelbach & Miller 2008). With fewer than `MIN_DAYS` days the unit is the row, and the true
interval may be wider; the report says which it was. Neighbouring days are not quite independent either (one
evening's storm may cross midnight UTC), so what is left out makes the interval somewhat too narrow, not too wide.

A percentile interval of few units is too narrow, by sqrt((n - 1) / n) and by taking a normal quantile for Student's
t; so its percentiles are moved outwards by just that much (the expanded percentile interval of Hesterberg 2015).

A draw is its vector of row counts, so AUC needs one sort of the scores in all, and a mean is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from orrery.evaluation import metrics
from orrery.evaluation.metrics import Array
from orrery.evaluation.quantiles import student_quantile

# Counts of a chunk of draws: about 8 MB per array, which stays near the caches.
CHUNK_CELLS = 1_000_000
# On huge holdouts the interval of drawn rows is narrow and fewer draws do: 1M rows take 200 draws, some ten
# seconds. Days are as few as ever and their extremes count: with 200 draws the seed could turn the verdict.
MAX_CELLS = 200_000_000
MIN_DRAWS = {"row": 200, "day": 1_000}
CONFIDENCE = 0.95
# Fewer days than this say too little about how days differ (Cameron et al. 2008 study five to thirty clusters).
MIN_DAYS = 10
DAY_US = 86_400_000_000

# Takes row counts [K, N], returns the metric of each draw [K].
Statistic = Callable[[Array], Array]


@dataclass(frozen=True)
class Difference:
    """How much better the candidate is on the primary metric: positive is better, whatever the metric's direction."""

    delta: float
    low: float
    high: float
    share_better: float
    draws: int


@dataclass(frozen=True)
class Units:
    """What a draw takes whole: `of` [N] is the unit of each row, numbered from 0; None: each row is one."""

    by: Literal["day", "row"]
    count: int
    of: npt.NDArray[np.int64] | None = None


def units(moments: npt.NDArray[np.int64]) -> Units:
    """Return days where rows, at `moments` [N] in microseconds since 1970 (UTC), span `MIN_DAYS` days; else rows."""
    days, place = np.unique(moments // DAY_US, return_inverse=True)
    if len(days) < MIN_DAYS:
        return Units("row", len(moments))
    return Units("day", len(days), place.astype(np.int64))


def auc_statistic(y: Array, p: Array) -> Statistic:
    """Return the AUC as a function of row counts; ties count half. NaN where a draw holds one class."""
    order = np.argsort(p, kind="stable")
    positive = y[order]
    starts = np.flatnonzero(np.append(True, np.diff(p[order]) != 0))
    tied = len(starts) < len(p)

    def statistic(counts: Array) -> Array:
        sorted_counts = counts[:, order]
        pos = sorted_counts * positive
        neg = sorted_counts - pos
        if tied:
            pos, neg = np.add.reduceat(pos, starts, axis=1), np.add.reduceat(neg, starts, axis=1)
        below = np.cumsum(neg, axis=1)
        below -= neg / 2
        pairs = pos.sum(axis=1) * neg.sum(axis=1)
        wins = np.einsum("kn,kn->k", pos, below)
        return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)

    return statistic


def mean_statistic(losses: Array, root: bool = False) -> Statistic:
    """Return the mean of per-row losses (or its square root) as a function of row counts."""

    def statistic(counts: Array) -> Array:
        mean: Array = counts @ losses / counts.sum(axis=1)  # draws of days differ in their number of rows
        return np.sqrt(mean) if root else mean

    return statistic


def primary_statistic(task: metrics.Task, y: npt.NDArray[np.generic], p: Array) -> Statistic:
    """Return the task's primary metric (`spec.PRIMARY`) as a function of row counts."""
    if task == "binary":
        return auc_statistic(np.asarray(y, np.float64), p)
    if task == "multiclass":
        return mean_statistic(metrics.multiclass_log_losses(np.asarray(y, np.int64), p))
    return mean_statistic((p - np.asarray(y, np.float64)) ** 2, root=True)


def differences(
    candidate: Statistic,
    others: Mapping[str, Statistic],
    rows: int,
    *,
    higher_is_better: bool,
    draws: int,
    seed: int,
    by: Units | None = None,
    on_draws: Callable[[float], None] = lambda n: None,
) -> dict[str, Difference]:
    """Return the candidate's difference to each other model, all of them on the same draws of `by` (default: rows).

    `on_draws` is told of progress. Draws on which the metric is not defined are left out (`draws` says how
    many were used).
    """
    by = by or Units("row", rows)
    sign = 1.0 if higher_is_better else -1.0
    draws = min(draws, max(MIN_DRAWS[by.by], MAX_CELLS // max(rows, 1)))
    found: dict[str, list[Array]] = {name: [] for name in others}
    rng = np.random.default_rng(seed)
    for counts in _counts(rng, rows, by, draws):
        base = candidate(counts)
        for name, other in others.items():
            found[name].append(sign * (base - other(counts)))
        on_draws(float(len(counts)))
    whole = np.ones((1, rows))
    observed = candidate(whole)[0]
    percentiles = _percentiles(by.count)
    return {
        name: _difference(sign * float(observed - other(whole)[0]), np.concatenate(found[name]), percentiles)
        for name, other in others.items()
    }


def _counts(rng: np.random.Generator, rows: int, by: Units, draws: int) -> Iterator[Array]:
    """Yield chunks [K, rows] of how often each draw takes each row. The chunks' size changes no draw."""
    size = max(1, CHUNK_CELLS // rows)
    for start in range(0, draws, size):
        chunk = np.empty((min(size, draws - start), rows))
        for row in chunk:
            taken = np.bincount(rng.integers(0, by.count, by.count), minlength=by.count)
            row[:] = taken if by.of is None else taken[by.of]
        yield chunk


def _percentiles(count: int) -> tuple[float, float]:
    """Return the percentiles of a two-sided 95 % interval from `count` units (Hesterberg 2015)."""
    if count < 2:
        return 0.0, 100.0
    t = student_quantile(1 - (1 - CONFIDENCE) / 2, count - 1)
    tail = NormalDist().cdf(-t * (count / (count - 1)) ** 0.5)
    return 100 * tail, 100 * (1 - tail)


def _difference(delta: float, drawn: Array, percentiles: tuple[float, float]) -> Difference:
    usable = drawn[np.isfinite(drawn)]
    if not len(usable) or not np.isfinite(delta):
        nan = float("nan")
        return Difference(delta, nan, nan, nan, len(usable))
    low, high = np.percentile(usable, percentiles)
    return Difference(delta, float(low), float(high), float(np.mean(usable > 0)), len(usable))
