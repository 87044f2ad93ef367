"""From a window's committed features to arrays: read, sampled by key, encoded by a schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from orrery.data.tables import KEY, RESERVED, read_parquet, sample
from orrery.errors import DataError
from orrery.step import Work
from orrery.training import Dataset
from orrery.training.labels import encode
from orrery.training.schema import Schema, feature_names, is_categorical

PIECE_BYTES = 16 << 20


class Window:
    """The features of the config's window, one file per partition: reserved columns and features, helpers left out.

    Raises `DataError` when two partitions differ in their features, or when there is none.
    """

    def __init__(self, work: Work) -> None:
        self.key, self.sample = work.config.key, work.config.sample
        self._paths = {m.key: work.open_input(m, "features.parquet") for m in work.inputs("features")}
        if not self._paths:
            raise DataError("training was given no features", hint="run materialize for the partitions of the window")
        schemas = {key: pq.read_schema(path) for key, path in self._paths.items()}
        first, self.names = next((key, feature_names(schema)) for key, schema in schemas.items())
        for key, schema in schemas.items():
            _refuse_other(self.names, feature_names(schema), first, key)
        self.columns = [*RESERVED, *self.names]
        #: No row, with the types that all partitions' columns fit into.
        self.empty = self._together([s.empty_table().select(self.columns) for s in schemas.values()])

    @property
    def size(self) -> int:
        """Bytes of all its rows, encoded; about, since a sample's rows are known when they are read."""
        rows = sum(pq.read_metadata(path).num_rows for path in self._paths.values())
        width = sum(8 if is_categorical(self.empty.schema.field(name).type) else 4 for name in self.names)
        return int(self.sample * rows * (width + 4))

    def read(self) -> pa.Table:
        """Return all rows. Raises `DataError` when there is none."""
        tables = [sample(read_parquet(path, self.columns), self.sample) for path in self._paths.values()]
        table = self._together(tables)
        self.refuse_empty(table.num_rows)
        return table

    def pieces(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows' given columns in order, a bounded number of bytes at a time."""
        sampled = [KEY] if self.sample < 1 and KEY not in columns else []
        rows = min(max(PIECE_BYTES // (8 * len(columns)), 1_000), 65_536)
        empty = self.empty.select(list(columns))
        for path in self._paths.values():
            with pq.ParquetFile(path, pre_buffer=False) as file:
                for batch in file.iter_batches(rows, columns=[*sampled, *columns], use_threads=False):
                    piece = sample(pa.Table.from_batches([batch]), self.sample).select(list(columns))
                    yield pa.concat_tables([empty, piece], promote_options="permissive")

    def refuse_empty(self, rows: int) -> None:
        """Raise `DataError` when the window has no row."""
        if rows == 0:
            raise DataError(f"the window {self.key} has no rows at sample {self.sample:g}")

    def _together(self, tables: list[pa.Table]) -> pa.Table:
        try:
            return pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
            raise DataError(f"the partitions' features differ in type: {e}", hint="materialize them again") from None


def read(work: Work) -> pa.Table:
    """Return the window's rows; see `Window`."""
    return Window(work).read()


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
    refuse_infinite(schema.numeric, numeric)
    label = encode(table, schema.task, schema.classes)
    if schema.task == "multiclass" and (label < 0).any():
        known = label >= 0
        return Dataset(numeric[known], categorical[known], label[known], schema)
    return Dataset(numeric, categorical, label, schema)


def refuse_infinite(names: Sequence[str], numeric: npt.NDArray[np.float32]) -> None:
    """Raise `DataError` that names the columns with an infinite value."""
    if (bad := np.isinf(numeric).any(axis=0)).any():
        found = [n for n, b in zip(names, bad, strict=True) if b]
        raise DataError(f"infinite values in {', '.join(found)}", hint="clip them or make them null in features.py")


def moments(numeric: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and standard deviation per column in float64, NaN left out; a constant column has deviation 1."""
    width = numeric.shape[1]
    mean, std = np.zeros(width), np.ones(width)
    for i in range(width):  # by column: no float64 copy of the whole table
        values = numeric[:, i][~np.isnan(numeric[:, i])].astype(np.float64)
        if len(values):
            mean[i] = values.mean()
            std[i] = _scale(float(mean[i]), float(values.std()))
    return mean, std


class Moments:
    """Like `moments`, from pieces of the rows: their counts, means and squares merged (Chan et al. 1979)."""

    def __init__(self) -> None:
        self._count = self._mean = self._squares = np.zeros(0)

    def add(self, numeric: npt.NDArray[np.floating]) -> None:
        """Take more rows in: [n, width]."""
        values = numeric.astype(np.float64)
        known = ~np.isnan(values)
        count = known.sum(axis=0).astype(np.float64)
        mean = np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1.0)
        squares = (np.where(known, values - mean, 0.0) ** 2).sum(axis=0)
        if len(self._count) == 0:
            self._count, self._mean, self._squares = count, mean, squares
            return
        total, apart = np.maximum(self._count + count, 1.0), mean - self._mean
        self._squares = self._squares + squares + apart**2 * self._count * count / total
        self._mean = self._mean + apart * count / total
        self._count = self._count + count

    def result(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return mean and standard deviation per column."""
        deviations = np.sqrt(self._squares / np.maximum(self._count, 1.0))
        std = np.array([_scale(m, d) for m, d in zip(self._mean.tolist(), deviations.tolist(), strict=True)])
        return self._mean, std


def _scale(mean: float, deviation: float) -> float:
    """Return a column's deviation; below float32's resolution around the mean it is rounding noise, and 1 is taken."""
    return deviation if deviation > 1e-6 * max(1.0, abs(mean)) else 1.0
