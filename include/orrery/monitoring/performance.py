"""What the model did on rows whose labels have come, beside what it promised: as a whole and by slice.

A loss is promised less observed (where lower is better, observed less promised): positive is worse, whatever the
metric's direction. Its interval holds both errors, of the promise's holdout and of these rows, which share no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orrery.evaluation import bootstrap, certainty, holdout, metrics
from orrery.evaluation.bootstrap import CONFIDENCE
from orrery.evaluation.certainty import Certainty
from orrery.evaluation.metrics import Array, Task
from orrery.monitoring.joined import PREDICTION
from orrery.monitoring.verdict import Sure, reach
from orrery.spec import METRICS, PRIMARY


@dataclass(frozen=True)
class Loss:
    """How much worse than promised, with a two-sided interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Slice:
    """One value of a column. `loss` is None where the promise says nothing of it.

    Its interval is wide enough for the number of slices that are looked at (Bonferroni), so that `low` above zero
    among many slices is rarely chance.
    """

    column: str
    value: str
    observed: Certainty
    loss: Loss | None


@dataclass(frozen=True)
class Performance:
    """`observed` is None where the metric or its error is not defined; `others`: every metric of the task.

    `bias`: mean label less mean prediction, which a ranking metric does not see; None for a multiclass.
    """

    metric: str
    rows: int
    observed: Certainty | None
    promised: Sure | None
    loss: Loss | None
    others: Mapping[str, float]
    mean_label: float | None
    mean_prediction: float | None
    bias: Certainty | None
    slices: tuple[Slice, ...]


def measure(
    task: Task, table: pa.Table, classes: tuple[str, ...], promise: Mapping[str, Any] | None, columns: Sequence[str]
) -> Performance:
    """Measure rows with `label`, `prediction`, `prediction_time` and slicing `columns` against a `promise`.

    `classes` are the model's (multiclass), in the order of its probabilities; a label that it does not know counts as
    one that it gave no chance. `promise` is a part of an evaluation's report.json (`promise.candidate`).
    Raises `DataError` for a label that the task cannot have.
    """
    metric = PRIMARY[task]
    rows = holdout.labelled(table, task, classes)
    p = _predictions(table, task, len(classes), len(rows.classes))
    units = bootstrap.units(holdout.moments(table))
    observed = certainty.of_primary(task, rows.y, p, units) if len(p) else None
    promised = sure_of(promise) if promise and promise.get("metric") == metric else None
    slices: list[tuple[str, str, Certainty, Sure | None]] = []
    for column in columns:
        if column in table.column_names and len(p):
            told = ((promise or {}).get("slices") or {}).get(column) or {}
            found = certainty.of_slices(task, *holdout.groups(table, column), rows.y, p, units)
            slices += [(column, value, one, sure_of(told.get(value))) for value, one in found.items()]
    share = 1 - (1 - CONFIDENCE) / max(1, sum(then is not None for *_, then in slices))
    number = task != "multiclass" and len(p) > 0
    return Performance(
        metric=metric,
        rows=len(p),
        observed=observed,
        promised=promised,
        loss=loss(metric, observed, promised),
        others=metrics.all_metrics(task, rows.y, p) if len(p) else {},
        mean_label=float(rows.mean_label.mean()) if number else None,
        mean_prediction=float(p.mean()) if number else None,
        bias=certainty.of_mean(rows.mean_label - p, units) if number else None,
        slices=tuple(Slice(c, v, one, loss(metric, one, then, share)) for c, v, one, then in slices),
    )


def loss(metric: str, observed: Certainty | None, promised: Sure | None, confidence: float = CONFIDENCE) -> Loss | None:
    """Return the loss of an observed metric against its promise; None when one of them is not known."""
    if observed is None or promised is None:
        return None
    value = promised.value - observed.value if METRICS[metric] else observed.value - promised.value
    far = reach([Sure(observed.value, observed.se, observed.freedom), promised], 1 - (1 - confidence) / 2)
    return Loss(value, value - far, value + far)


def sure_of(told: Mapping[str, Any] | None) -> Sure | None:
    """Return a `Certainty.told` as numbers; None for none, or for one that lacks them."""
    if not told or any(not isinstance(told.get(n), int | float) for n in ("value", "se", "freedom")):
        return None
    return Sure(float(told["value"]), float(told["se"]), float(told["freedom"]))


def _predictions(table: pa.Table, task: Task, own: int, classes: int) -> Array:
    """Return predictions [N], or [N, classes] with zeros for the classes that the model does not know."""
    column = table[PREDICTION].combine_chunks()
    if task != "multiclass":
        return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    flat = np.asarray(pc.list_flatten(column).to_numpy(zero_copy_only=False), np.float64)
    return np.pad(flat.reshape(-1, own), ((0, 0), (0, classes - own)))
