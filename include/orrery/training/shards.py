"""A part's encoded rows in one Parquet file of equal row groups: written while it is encoded, read group by group.

A group is about half a megabyte; its rows are neighbours in the table that they come from. Numbers lie as they are
(float32, NaN where missing), ids as int32 behind a dictionary, uncompressed: it is read once an epoch and must not
cost more than the training itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from orrery.data.tables import LABEL
from orrery.errors import OrreryError
from orrery.store import trouble
from orrery.training import Dataset
from orrery.training.schema import Schema

GROUP_BYTES = 512 << 10  # small, so that few of them, drawn from all over the part, make a shuffled window
MIN_GROUP, MAX_GROUP = 2_048, 65_536  # rows: a column of fewer costs more to open than to read


def row_bytes(schema: Schema) -> int:
    """Return what one encoded row takes in memory."""
    label = 8 if schema.task == "multiclass" else 4
    return 4 * len(schema.numeric) + 8 * len(schema.categorical) + label


@dataclass(frozen=True)
class Layout:
    """`rows` dealt into `groups` row groups in order; the first `rows % groups` of them have one row more."""

    rows: int
    groups: int

    def size(self, group: int) -> int:
        """Return a group's rows."""
        return self.rows // self.groups + (group < self.rows % self.groups)

    @property
    def largest(self) -> int:
        """Rows of the largest group."""
        return -(-self.rows // self.groups)


def layout(rows: int, schema: Schema, lanes: int) -> Layout:
    """Return groups of about `GROUP_BYTES`, a multiple of `lanes` of them."""
    wanted = min(max(GROUP_BYTES // row_bytes(schema), MIN_GROUP), MAX_GROUP)
    return Layout(rows, lanes * max(1, round(rows / wanted / lanes)))


@dataclass(frozen=True)
class Shards:
    """A written file. Small and picklable: every process opens it for itself."""

    path: Path
    schema: Schema
    layout: Layout

    @property
    def rows(self) -> int:
        """Rows of the part."""
        return self.layout.rows

    def open(self) -> pq.ParquetFile:
        """Open the file for `read`; not for two threads at a time.

        Neither mapped (its pages would count as the process's memory) nor read by Arrow's own threads, which a
        forked process does not have.
        """
        return pq.ParquetFile(self.path, memory_map=False, pre_buffer=False)

    def read(self, groups: Sequence[int], file: pq.ParquetFile | None = None) -> Dataset:
        """Return the rows of these groups, one after the other."""
        file = file or self.open()
        data = empty(self.schema, sum(self.layout.size(g) for g in groups))
        at = 0
        for group in groups:
            if rows := self.layout.size(group):
                _copy(file.read_row_group(group, use_threads=False), data, at)
                at += rows
        return data

    def head(self, rows: int) -> Dataset:
        """Return the first rows (at most `rows`)."""
        groups = min(self.layout.groups, -(-rows // max(1, self.layout.rows // self.layout.groups)))
        return cut(self.read(range(groups)), slice(0, rows))

    def spread(self, limit: int) -> Dataset:
        """Return at most `limit` bytes of rows: whole groups, evenly spaced over the part; at least one."""
        wanted = max(1, min(self.layout.groups, limit // (row_bytes(self.schema) * self.layout.largest)))
        chosen = np.linspace(0, self.layout.groups - 1, wanted).round().astype(int)
        return self.read([int(g) for g in chosen])


class Writer:
    """Writes a part whose number of rows is known from the start, piece by piece."""

    def __init__(self, path: Path, schema: Schema, layout: Layout) -> None:
        self.shards = Shards(path, schema, layout)
        kinds = [(name, pa.float32()) for name in schema.numeric] + [(name, pa.int32()) for name in schema.categorical]
        kinds.append((LABEL, pa.int64() if schema.task == "multiclass" else pa.float32()))
        self._fields = pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds])
        self._file = pq.ParquetWriter(
            path, self._fields, compression="none", use_dictionary=list(schema.categorical), write_statistics=False
        )
        self._waiting: list[Dataset] = []
        self._group = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trouble(str(self.shards.path)):
            self._file.close()
        if error is None and (self._waiting or self._group < min(self.shards.layout.groups, self.shards.rows)):
            left = sum(d.rows for d in self._waiting)
            raise OrreryError(f"{self.shards.path.name}: {self._group} groups and {left} rows of {self.shards.layout}")

    def add(self, data: Dataset) -> None:
        """Take the next rows; whole groups are written at once."""
        self._waiting.append(data)
        whole = join(self._waiting)
        at = 0
        while self._group < self.shards.layout.groups:
            size = self.shards.layout.size(self._group)
            if size == 0 or at + size > whole.rows:
                break
            self._write(cut(whole, slice(at, at + size)))
            at += size
            self._group += 1
        rest = cut(whole, slice(at, None))
        self._waiting = [rest] if rest.rows else []

    def _write(self, data: Dataset) -> None:
        columns = [*data.numeric.T, *data.categorical.T.astype(np.int32), data.label]
        table = pa.table([pa.array(np.ascontiguousarray(c)) for c in columns], schema=self._fields)
        with trouble(str(self.shards.path)):
            self._file.write_table(table, row_group_size=max(1, data.rows))


def empty(schema: Schema, rows: int) -> Dataset:
    """Return arrays for so many rows, not filled."""
    label: npt.NDArray[np.float32] | npt.NDArray[np.int64] = np.empty(
        rows, dtype=np.int64 if schema.task == "multiclass" else np.float32
    )
    numeric = np.empty((rows, len(schema.numeric)), dtype=np.float32)
    return Dataset(numeric, np.empty((rows, len(schema.categorical)), dtype=np.int64), label, schema)


def cut(data: Dataset, rows: slice | npt.NDArray[np.int64]) -> Dataset:
    """Return some rows: a view for a slice, a copy for places."""
    return Dataset(data.numeric[rows], data.categorical[rows], data.label[rows], data.schema)


def join(pieces: Sequence[Dataset]) -> Dataset:
    """Return pieces, of which there is at least one, in one."""
    if len(pieces) == 1:
        return pieces[0]
    numeric, categorical = (np.concatenate([getattr(p, n) for p in pieces]) for n in ("numeric", "categorical"))
    return Dataset(numeric, categorical, np.concatenate([p.label for p in pieces]), pieces[0].schema)


def _copy(table: pa.Table, data: Dataset, at: int) -> None:
    rows = slice(at, at + table.num_rows)
    for i, name in enumerate(data.schema.numeric):
        data.numeric[rows, i] = table[name].to_numpy()
    for i, name in enumerate(data.schema.categorical):
        data.categorical[rows, i] = table[name].to_numpy()
    data.label[rows] = table[LABEL].to_numpy()
