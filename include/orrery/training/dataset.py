"""From a window's committed features to arrays: read, sampled by key, encoded by a schema."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from orrery.data.tables import RESERVED, read_parquet, sample
from orrery.errors import DataError
from orrery.step import Work
from orrery.training import Dataset
from orrery.training.labels import encode
from orrery.training.schema import Schema, feature_names


def read(work: Work) -> pa.Table:
    """Return the window's rows: reserved columns and features, helper columns (`_...`) left out.

    Raises `DataError` when two partitions differ in their features, or when there is no row.
    """
    tables, first = [], ""
    for manifest in work.inputs("features"):
        path = work.open_input(manifest, "features.parquet")
        names = feature_names(pq.read_schema(path))
        tables.append(sample(read_parquet(path, [*RESERVED, *names]), work.config.sample))
        first = first or manifest.key
        _refuse_other(tables[0].column_names, tables[-1].column_names, first, manifest.key)
    if not tables:
        raise DataError("training was given no features", hint="run materialize for the partitions of the window")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
        raise DataError(f"the partitions' features differ in type: {e}", hint="materialize them again") from None
    if table.num_rows == 0:
        raise DataError(f"the window {work.config.key} has no rows at sample {work.config.sample:g}")
    return table


def _refuse_other(first: list[str], names: list[str], key: str, other: str) -> None:
    if difference := sorted(set(first) ^ set(names)):
        raise DataError(
            f"the features of {key} and {other} differ: {', '.join(difference)}",
            hint="features.py has changed in between: run materialize again for the older partition",
        )


def encoded(table: pa.Table, schema: Schema) -> Dataset:
    """Return a part as arrays; a row of a class that the fit part does not have is left out.

    Raises `DataError` for an infinite feature (a missing one is fine).
    """
    numeric, categorical = schema.encode(table)
    if (bad := np.isinf(numeric).any(axis=0)).any():
        names = [n for n, b in zip(schema.numeric, bad, strict=True) if b]
        raise DataError(f"infinite values in {', '.join(names)}", hint="clip them or make them null in features.py")
    label = encode(table, schema.task, schema.classes)
    if schema.task == "multiclass" and (label < 0).any():
        known = label >= 0
        return Dataset(numeric[known], categorical[known], label[known], schema)
    return Dataset(numeric, categorical, label, schema)


def moments(numeric: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and standard deviation per column in float64, NaN left out; a constant column has deviation 1."""
    width = numeric.shape[1]
    mean, std = np.zeros(width), np.ones(width)
    for i in range(width):  # by column: no float64 copy of the whole table
        values = numeric[:, i][~np.isnan(numeric[:, i])].astype(np.float64)
        if len(values):
            mean[i] = values.mean()
            deviation = values.std()
            # Below float32's resolution around the mean the deviation is rounding noise.
            std[i] = deviation if deviation > 1e-6 * max(1.0, abs(mean[i])) else 1.0
    return mean, std
