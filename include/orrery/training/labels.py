"""Labels as numbers: 0/1, an index into the classes, or the value itself."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orrery.data.tables import LABEL
from orrery.errors import DataError
from orrery.training.schema import is_categorical

Task = Literal["binary", "multiclass", "regression"]
Labels: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.int64]


def is_known(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a mask of the labels that are there (NaN is not)."""
    return pc.invert(pc.is_null(column, nan_is_null=True))


def classes(table: pa.Table, task: Task) -> tuple[str, ...]:
    """Return the classes of a multiclass label as text, sorted; none for the other tasks."""
    if task != "multiclass":
        return ()
    return tuple(sorted(str(v) for v in pc.unique(table[LABEL].cast(pa.string())).to_pylist()))


def encode(table: pa.Table, task: Task, names: tuple[str, ...] = ()) -> Labels:
    """Return the labels of rows that have one.

    binary: float32 [N] of 0 and 1; regression: float32 [N]; multiclass: int64 [N], index in `names`, -1 for a
    class that is not in it. Raises `DataError` for a label that the task cannot have.
    """
    column = table[LABEL]
    if task == "multiclass":
        found = pc.index_in(column.cast(pa.string()), value_set=pa.array(names, pa.string()))
        return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int64)
    if is_categorical(column.type):
        raise DataError(
            f"the label is {column.type}, the task is {task}",
            hint="label it with a number or a boolean in features.py, or set `task: multiclass` in spec.yaml",
        )
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values = np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{int((~np.isfinite(values)).sum()):,} labels are infinite", hint="clip them in features.py")
    if task == "binary" and (strange := sorted(set(np.unique(values).tolist()) - {0.0, 1.0})):
        shown = ", ".join(f"{v:g}" for v in strange[:5])
        raise DataError(f"a binary label is 0 or 1 (or a boolean); found {shown}", hint="see `task` in spec.yaml")
    return values.astype(np.float32)
