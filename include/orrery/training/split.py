"""Past and future: the window's rows in three parts by prediction time, so that no part knows a later one.

    fit | tune (early stopping, calibration) | holdout (evaluation)

A row of an earlier part whose label became known only after the next part had begun is left out (purged):
on that day nobody could have trained on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orrery.data.tables import LABEL, LABEL_TIME, PREDICTION_TIME
from orrery.errors import DataError
from orrery.spec import Split
from orrery.training.labels import Task, is_known

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Bounds:
    """When tune and holdout begin, in microseconds since 1970."""

    tune: int
    holdout: int

    def masks(self, labelled: pa.Table) -> dict[str, npt.NDArray[np.bool_]]:
        """Return which rows are in which part; those in none are purged."""
        when, known = micros(labelled, PREDICTION_TIME), micros(labelled, LABEL_TIME)
        return {
            "fit": (when < self.tune) & (known <= self.tune),
            "tune": (when >= self.tune) & (when < self.holdout) & (known <= self.holdout),
            "holdout": when >= self.holdout,
        }

    @property
    def text(self) -> dict[str, str]:
        """What `split.json` holds."""
        return {"tune_start": _moment(self.tune).isoformat(), "holdout_start": _moment(self.holdout).isoformat()}


@dataclass(frozen=True)
class Parts:
    """The three parts, when each begins, and how many rows are in none."""

    fit: pa.Table
    tune: pa.Table
    holdout: pa.Table
    tune_start: datetime
    holdout_start: datetime
    unlabelled: int
    purged: int

    @property
    def bounds(self) -> dict[str, str]:
        """What `split.json` holds."""
        return {"tune_start": self.tune_start.isoformat(), "holdout_start": self.holdout_start.isoformat()}

    @property
    def counts(self) -> dict[str, int]:
        """Rows per part, and those left out."""
        parts = {"fit": self.fit.num_rows, "tune": self.tune.num_rows, "holdout": self.holdout.num_rows}
        return {**parts, "unlabelled": self.unlabelled, "purged": self.purged}


def split(table: pa.Table, shares: Split, task: Task) -> Parts:
    """Split a window's features. Raises `DataError` when a part is empty or lacks a class."""
    labelled = table.filter(is_known(table[LABEL]))
    if labelled.num_rows == 0:
        raise unlabelled(table.num_rows)
    bounds = Bounds(*starts(micros(labelled, PREDICTION_TIME), shares))
    tables = {name: labelled.filter(pa.array(mask)) for name, mask in bounds.masks(labelled).items()}
    parts = Parts(
        **tables,
        tune_start=_moment(bounds.tune),
        holdout_start=_moment(bounds.holdout),
        unlabelled=table.num_rows - labelled.num_rows,
        purged=labelled.num_rows - sum(t.num_rows for t in tables.values()),
    )
    refuse(parts.counts, parts.bounds, {name: classes_of(t) for name, t in tables.items()}, task)
    return parts


def starts(when: npt.NDArray[np.int64], shares: Split) -> tuple[int, int]:
    """Return when tune and holdout begin (microseconds): the times of the rows at the shares' places.

    Rows of one instant stay together, so a part may be a little larger than its share.
    """
    ordered, n = np.sort(when), len(when)
    at_holdout = min(n - 1, int(n * (1 - shares.holdout)))
    at_tune = min(n - 1, int(n * (1 - shares.holdout - shares.tune)))
    return int(ordered[at_tune]), int(ordered[at_holdout])


def micros(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """Return a time column in microseconds since 1970; an unknown label time is after everything."""
    column = table[name]
    if name == PREDICTION_TIME and column.null_count:
        raise DataError(f"{column.null_count:,} rows have no {name}", hint="set it in features.py's @rows")
    micros = column.cast(pa.timestamp("us", tz="UTC"), safe=False).cast(pa.int64())
    return np.asarray(pc.fill_null(micros, NEVER).to_numpy(), dtype=np.int64)


def _moment(micros: int) -> datetime:
    return EPOCH + timedelta(microseconds=micros)


def unlabelled(rows: int) -> DataError:
    """Return the error for a window of which no row has a label."""
    return DataError(f"none of the window's {rows:,} rows has a label", hint="wait until labels are known")


def classes_of(part: pa.Table) -> set[str]:
    """Return a part's labels as text."""
    return {str(v) for v in pc.unique(part[LABEL]).to_pylist()}


def refuse(counts: dict[str, int], bounds: dict[str, str], found: dict[str, set[str]], task: Task) -> None:
    """Raise `DataError` when a part is empty, or lacks a class that the window has. `found`: each part's classes."""
    for name in ("fit", "tune", "holdout"):
        if counts[name] == 0:
            shown = ", ".join(f"{k} {v:,}" for k, v in counts.items())
            raise DataError(
                f"the {name} part has no rows ({shown}; tune from {bounds['tune_start']}, "
                f"holdout from {bounds['holdout_start']})",
                hint="a longer window, or other shares under `split` in spec.yaml; label_time decides what is purged",
            )
    if task == "regression":
        return
    window = set().union(*found.values())
    if len(window) < 2:
        raise DataError(f"every label of the window is {', '.join(window)}: there is nothing to learn")
    for name in ("fit", "tune", "holdout") if task == "binary" else ("fit",):
        if missing := sorted(window - found[name]):
            raise DataError(
                f"the {name} part has no row labelled {', '.join(missing)}",
                hint="take a longer window or other shares under `split` in spec.yaml",
            )
