"""Is the difference between two models more than chance? The paired bootstrap (Efron & Tibshirani 1993, ch. 16).

Each draw takes N of the N rows with replacement and measures both models on the same draw; the percentile
interval of the differences is what the gate reads. A draw is its vector of row counts, so AUC needs one sort
of the scores in all, and a mean is one matrix product. Rows count as independent: where many rows share a
cause (the flights of one stormy day) the true interval is somewhat wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orrery.evaluation import metrics
from orrery.evaluation.metrics import Array

# Counts of a chunk of draws: about 8 MB per array, which stays near the caches.
CHUNK_CELLS = 1_000_000
# On huge holdouts the interval is narrow and fewer draws do: 1M rows take 200 draws, some ten seconds.
MAX_CELLS = 200_000_000
MIN_DRAWS = 200
LOW, HIGH = 2.5, 97.5

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
        mean: Array = counts @ losses / len(losses)
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
    on_draws: Callable[[float], None] = lambda n: None,
) -> dict[str, Difference]:
    """Return the candidate's difference to each other model, all of them on the same draws.

    `on_draws` is told of progress. Draws on which the metric is not defined are left out (`draws` says how
    many were used).
    """
    sign = 1.0 if higher_is_better else -1.0
    draws = min(draws, max(MIN_DRAWS, MAX_CELLS // max(rows, 1)))
    found: dict[str, list[Array]] = {name: [] for name in others}
    rng = np.random.default_rng(seed)
    for counts in _counts(rng, rows, draws):
        base = candidate(counts)
        for name, other in others.items():
            found[name].append(sign * (base - other(counts)))
        on_draws(float(len(counts)))
    whole = np.ones((1, rows))
    observed = candidate(whole)[0]
    return {
        name: _difference(sign * float(observed - other(whole)[0]), np.concatenate(found[name]))
        for name, other in others.items()
    }


def _counts(rng: np.random.Generator, rows: int, draws: int) -> Iterator[Array]:
    """Yield chunks [K, rows] of how often each draw takes each row. The chunks' size changes no draw."""
    size = max(1, CHUNK_CELLS // rows)
    for start in range(0, draws, size):
        chunk = np.empty((min(size, draws - start), rows))
        for row in chunk:
            row[:] = np.bincount(rng.integers(0, rows, rows), minlength=rows)
        yield chunk


def _difference(delta: float, drawn: Array) -> Difference:
    usable = drawn[np.isfinite(drawn)]
    if not len(usable) or not np.isfinite(delta):
        nan = float("nan")
        return Difference(delta, nan, nan, nan, len(usable))
    low, high = np.percentile(usable, [LOW, HIGH])
    return Difference(delta, float(low), float(high), float(np.mean(usable > 0)), len(usable))
