"""The rows that a candidate is measured on: later than all it was fitted and tuned on, label known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orrery.data import tables
from orrery.errors import DataError, nearest
from orrery.evaluation.metrics import Array, Task
from orrery.training import labels


@dataclass(frozen=True)
class Holdout:
    """The rows, and their labels: 0.0/1.0, values, or numbers of `classes` (multiclass)."""

    table: pa.Table
    y: npt.NDArray[Any]
    classes: tuple[str, ...] = ()

    @property
    def mean_label(self) -> Array:
        """The labels as numbers, for means (multiclass: the class's number, which has no mean worth showing)."""
        return np.asarray(self.y, np.float64)


def read(files: Iterable[Path], start: str, share: float = 1.0) -> pa.Table:
    """Return the rows of features files with a label and prediction_time >= `start` (ISO 8601), in file order.

    `share` samples by key, as training does. Raises `DataError` when no row is left.
    """
    parts = []
    for file in files:
        part = tables.read_parquet(file)
        moment = _moment(start, part.schema.field(tables.PREDICTION_TIME).type)
        kept = pc.and_(pc.greater_equal(part[tables.PREDICTION_TIME], moment), labels.is_known(part[tables.LABEL]))
        parts.append(part.filter(kept))
    try:
        table = tables.sample(pa.concat_tables(parts, promote_options="permissive"), share)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
        raise DataError(f"the partitions' features differ in type: {e}", hint="materialize them again") from None
    if not table.num_rows:
        raise DataError(
            f"no row with a label at or after {start}: there is nothing to evaluate on",
            hint="are the labels of the window's last partition known yet? see split.holdout",
        )
    return table


def _moment(text: str, kind: pa.DataType) -> pa.Scalar:
    moment = datetime.fromisoformat(text)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return pa.scalar(moment if kind.tz else moment.replace(tzinfo=None), type=kind)


def moments(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return `prediction_time` [N] in microseconds since 1970; a time without a zone is UTC."""
    micros = table[tables.PREDICTION_TIME].cast(pa.timestamp("us", tz="UTC"), safe=False).cast(pa.int64())
    return np.asarray(micros.to_numpy(), dtype=np.int64)


def share_before(table: pa.Table, moment: str) -> float:
    """Return the share of rows with prediction_time < `moment` (ISO 8601)."""
    later = not_before(table, moment)
    return float((~later).mean()) if len(later) else 0.0


def not_before(table: pa.Table, moment: str) -> npt.NDArray[np.bool_]:
    """Tell of every row [N] whether its prediction_time is at or after `moment` (ISO 8601)."""
    times = table[tables.PREDICTION_TIME]
    return np.asarray(pc.greater_equal(times, _moment(moment, times.type)).to_numpy(), dtype=np.bool_)


def labelled(table: pa.Table, task: Task, classes: tuple[str, ...] = ()) -> Holdout:
    """Return the rows with their labels as numbers. A class that no model knows is added after `classes`.

    Raises `DataError` for a label that the task cannot have.
    """
    known = set(labels.classes(table, task)) - set(classes)
    everything = (*classes, *sorted(known))
    y = labels.encode(table, task, everything)
    return Holdout(table, y if task == "multiclass" else y.astype(np.float64), everything)


def groups(table: pa.Table, name: str) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the distinct values of a column as text, sorted, and each row's place among them.

    Raises `DataError` for a column that is not there.
    """
    if name not in table.column_names:
        raise DataError(f"the features have no column {name!r}", hint=nearest(name, table.column_names))
    texts = pc.fill_null(table[name].cast(pa.string()), "(missing)")
    values = sorted(pc.unique(texts).to_pylist())
    place = pc.index_in(texts, value_set=pa.array(values, pa.string()))
    return values, place.to_numpy(zero_copy_only=False).astype(np.int64)
