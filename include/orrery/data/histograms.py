"""Histograms that merge: counts per bin of each column, over Arrow, for data of any size.

The bins are made once, of a reference, and everything else is counted on them; counts of two parts add up to the
counts of both, whatever the order, so row groups are counted by threads, by Spark's tasks (`count_batches` in
`mapInArrow`), or by one call, and the sums are the same integers. In memory are, per thread, one batch of a row group.

    numeric    inner edges e1 < e2 < …:  (-inf, e1) [e1, e2) … [ek, inf)  then null
    category   one bin per value, then unseen (a value that is none of these), then null

NaN counts as null. A column of Arrow's null type is all null. Needs numpy and pyarrow only: Spark's workers import it.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orrery.data.tables import KEY, sample
from orrery.errors import DataError

# Deciles: the usual choice for a population stability index (Siddiqi, Credit Risk Scorecards, 2006).
QUANTILES = 10
# Quantiles are taken from this many rows at most: the rank of an edge is then off by about 0.1 % of the rows, which
# moves no comparison, since both sides are counted on the same edges. Counts are of all rows, always.
BIN_ROWS = 200_000
# More values than this are no category; a model's own vocabularies are smaller (training.schema.MAX_CATEGORIES).
MAX_VALUES = 10_000
# Half a megabyte a column: what is compared with each edge stays in a core's cache.
BATCH = 65_536
MAX_THREADS = 8
# What `count_batches` hands back to Spark.
SPARK_SCHEMA = "counts string"

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Numeric:
    """Bins of numbers, by their inner edges (ascending, finite); an edge belongs to the bin above it."""

    edges: tuple[float, ...]

    @property
    def size(self) -> int:
        """Number of bins, null included."""
        return len(self.edges) + 2

    def tally(self, column: pa.Array) -> Ints:
        """Count one column of a batch. Raises `DataError` for what is no number."""
        values = _floats(column)
        # Comparing with each of a few edges is several times as fast as a binary search per value.
        above = [np.count_nonzero(values >= edge) for edge in np.asarray(self.edges, np.float64)]
        present = len(values) - np.count_nonzero(np.isnan(values))
        falling = np.array([present, *above, 0], np.int64)
        return np.append(falling[:-1] - falling[1:], len(values) - present)


@dataclass(frozen=True)
class Category:
    """Bins of texts: the values known."""

    values: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of bins, unseen and null included."""
        return len(self.values) + 2

    def tally(self, column: pa.Array) -> Ints:
        """Count one column of a batch. Raises `DataError` for what is no text."""
        if pa.types.is_null(column.type):
            return self._all_null(len(column))
        if not _is_text(column.type):
            raise DataError(f"it is {column.type}, not text")
        known, unseen, null = pa.array(self.values, pa.string()), len(self.values), len(self.values) + 1
        if not pa.types.is_dictionary(column.type):
            column = column.cast(pa.string()).dictionary_encode()
        place = pc.fill_null(pc.index_in(column.dictionary.cast(pa.string()), value_set=known), unseen)
        # A dictionary may itself hold a null.
        place = np.where(column.dictionary.is_null().to_numpy(zero_copy_only=False), null, place.to_numpy())
        rows = np.bincount(column.indices.drop_null().to_numpy(), minlength=len(place))
        counts = np.zeros(self.size, np.int64)
        np.add.at(counts, place, rows)
        counts[null] += column.indices.null_count
        return counts

    def _all_null(self, rows: int) -> Ints:
        counts = np.zeros(self.size, np.int64)
        counts[-1] = rows
        return counts


Bins: TypeAlias = Mapping[str, Numeric | Category]


@dataclass(frozen=True)
class Counts:
    """Rows per bin of each column (null is the last, unseen of a category the one before). `+` merges, exactly."""

    rows: int
    bins: Bins
    counts: Mapping[str, tuple[int, ...]]

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of both. Raises `DataError` when their bins are not the same."""
        if self.bins != other.bins:
            raise DataError("histograms of different bins cannot be merged")
        merged = {n: tuple(a + b for a, b in zip(c, other.counts[n], strict=True)) for n, c in self.counts.items()}
        return Counts(self.rows + other.rows, self.bins, merged)

    def of(self, name: str) -> Ints:
        """Return the counts of one column [bins]."""
        return np.array(self.counts[name], np.int64)

    def nulls(self, name: str) -> int:
        """Return how many rows of a column have no value."""
        return self.counts[name][-1]

    def unseen(self, name: str) -> int:
        """Return how many rows of a category have a value without a bin; 0 for numbers."""
        return self.counts[name][-2] if isinstance(self.bins[name], Category) else 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` gives the same counts back."""
        columns: dict[str, Any] = {}
        for name, bins in self.bins.items():
            own = {"edges": list(bins.edges)} if isinstance(bins, Numeric) else {"values": list(bins.values)}
            columns[name] = {**own, "counts": list(self.counts[name])}
        return {"rows": self.rows, "columns": columns}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """Read what `to_dict` made. Raises `DataError` for anything else."""
        try:
            bins = {n: _bins(column) for n, column in data["columns"].items()}
            counts = {n: tuple(int(c) for c in column["counts"]) for n, column in data["columns"].items()}
            made = cls(int(data["rows"]), bins, counts)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise DataError(f"not a histogram: {type(e).__name__}: {e}") from None
        for name, column in counts.items():
            if len(column) != bins[name].size or sum(column) != made.rows or min(column) < 0:
                raise DataError(f"not a histogram: the counts of {name} are not {made.rows:,} rows in its bins")
        return made


def _bins(column: Mapping[str, Any]) -> Numeric | Category:
    if "edges" in column:
        return Numeric(tuple(float(e) for e in column["edges"]))
    return Category(tuple(str(v) for v in column["values"]))


# -- counting ----------------------------------------------------------------------------------------


def nothing(bins: Bins) -> Counts:
    """Return the counts of no rows: what every sum may begin with."""
    return Counts(0, bins, {n: (0,) * b.size for n, b in bins.items()})


def count(table: pa.Table | pa.RecordBatch, bins: Bins) -> Counts:
    """Count the rows of a table. Raises `DataError` for a column that is absent or of another kind than its bins."""
    total = _Tally(bins)
    for batch in table.to_batches(max_chunksize=BATCH) if isinstance(table, pa.Table) else [table]:
        total.add(batch)
    return total.counts()


def count_files(files: Sequence[Path], bins: Bins, *, share: float = 1.0, threads: int | None = None) -> Counts:
    """Count the rows of Parquet files, row group by row group; `share` samples by key, as training does.

    In memory: one batch per thread, however large the files. Raises `DataError` as `count` does.
    """
    texts = [n for n, b in bins.items() if isinstance(b, Category)]

    def one(group: _Group) -> _Tally:
        total = _Tally(bins)
        for batch in group.batches(list(bins), texts, share):
            total.add(batch)
        return total

    total = _Tally(bins)
    for part in _threaded(one, _groups(files), threads):
        total.merge(part)
    return total.counts()


def count_batches(batches: Iterator[pa.RecordBatch], bins: Bins) -> Iterator[pa.RecordBatch]:
    """What Spark's `mapInArrow` calls (with `SPARK_SCHEMA`): one row per task, the counts of its rows as JSON.

    `merged(row["counts"] for row in frame.mapInArrow(partial(count_batches, bins=bins), SPARK_SCHEMA).collect())`.
    """
    total = _Tally(bins)
    for batch in batches:
        total.add(batch)
    yield pa.RecordBatch.from_pydict({"counts": [json.dumps(total.counts().to_dict())]})


def merged(texts: Iterable[str], bins: Bins) -> Counts:
    """Return the sum of what tasks of `count_batches` handed back."""
    return sum((Counts.from_dict(json.loads(text)) for text in texts), nothing(bins))


class _Tally:
    """A running sum of one thread."""

    def __init__(self, bins: Bins) -> None:
        self.bins, self.rows = bins, 0
        self.sums = {n: np.zeros(b.size, np.int64) for n, b in bins.items()}

    def add(self, batch: pa.RecordBatch) -> None:
        self.rows += batch.num_rows
        for name, bins in self.bins.items():
            at = batch.schema.get_field_index(name)
            if at < 0:
                raise DataError(f"there is no column {name} to count", hint="features.py has changed: train again")
            try:
                self.sums[name] += bins.tally(batch.column(at))
            except DataError as e:
                raise DataError(f"column {name} cannot be counted: {e.message}", hint="train again") from None

    def merge(self, other: _Tally) -> None:
        self.rows += other.rows
        for name, counts in other.sums.items():
            self.sums[name] += counts

    def counts(self) -> Counts:
        return Counts(self.rows, self.bins, {n: tuple(c.tolist()) for n, c in self.sums.items()})


@dataclass(frozen=True)
class _Group:
    """One row group of one file; `index` counts over all files."""

    file: Path
    metadata: Any
    group: int
    index: int

    def batches(self, columns: list[str], texts: list[str], share: float = 1.0) -> Iterator[pa.RecordBatch]:
        """Yield the rows, texts as the dictionaries that Parquet keeps them in."""
        there = set(self.metadata.schema.to_arrow_schema().names)
        # Opened per group: no reader is used by two threads. The footer has been read once, for all.
        with pq.ParquetFile(
            self.file, metadata=self.metadata, memory_map=True, read_dictionary=[t for t in texts if t in there]
        ) as source:
            wanted = [c for c in (*columns, *([KEY] if share < 1 else [])) if c in there]
            for batch in source.iter_batches(BATCH, row_groups=[self.group], columns=wanted, use_threads=False):
                if share < 1:
                    yield from sample(pa.Table.from_batches([batch]), share).to_batches()
                else:
                    yield batch


def _groups(files: Sequence[Path]) -> list[_Group]:
    out: list[_Group] = []
    for file in files:
        metadata = pq.read_metadata(file, memory_map=True)
        out += [_Group(file, metadata, g, len(out) + g) for g in range(metadata.num_row_groups)]
    return out


def _threaded(work: Callable[[_Group], T], groups: list[_Group], threads: int | None) -> Iterator[T]:
    """Yield what `work` makes of every group, in their order. What it makes is small."""
    with ThreadPoolExecutor(threads or min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, groups)


# -- making bins -------------------------------------------------------------------------------------


def bins_of(
    table: pa.Table, categories: Mapping[str, Sequence[str] | None] | None = None
) -> dict[str, Numeric | Category]:
    """Return bins of every column of a table in memory: texts by their values, numbers by quantiles."""
    given = dict(categories or {})
    made: dict[str, Numeric | Category] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name not in given and not _is_text(column.type):
            made[name] = Numeric(edges(_floats(column)))
        else:
            values = given.get(name)
            made[name] = _category(name, Counter(_values(column)) if values is None else values)
    return made


def bins_of_files(
    files: Sequence[Path],
    numeric: Sequence[str],
    categories: Mapping[str, Sequence[str] | None],
    *,
    share: float = 1.0,
    threads: int | None = None,
) -> dict[str, Numeric | Category]:
    """Return bins of Parquet files: quantiles of the numbers, and the given values of the categories.

    Categories given as None are looked for in the data. The numbers' quantiles are of at most about `BIN_ROWS` rows,
    drawn by a seed (the same on every run). Raises `DataError` for a category of more than `MAX_VALUES` values.
    """
    groups = _groups(files)
    total = sum(g.metadata.row_group(g.group).num_rows for g in groups)
    drawn = min(1.0, BIN_ROWS / total) if total else 1.0
    looked_for = [n for n, values in categories.items() if values is None]

    def one(group: _Group) -> tuple[dict[str, list[Floats]], dict[str, set[str]]]:
        numbers: dict[str, list[Floats]] = {n: [] for n in numeric}
        texts: dict[str, set[str]] = {n: set() for n in looked_for}
        random = np.random.default_rng(group.index)
        for batch in group.batches([*numeric, *looked_for], looked_for, share):
            chosen = None if drawn >= 1 else pa.array(np.flatnonzero(random.random(batch.num_rows) < drawn))
            for name in numeric:
                column = _column(batch, name)
                numbers[name].append(_floats(column if chosen is None else column.take(chosen)))
            for name in looked_for:
                texts[name].update(_values(_column(batch, name)))
        return numbers, texts

    numbers: dict[str, list[Floats]] = {n: [] for n in numeric}
    found: dict[str, set[str]] = {n: set() for n in looked_for}
    for some, texts in _threaded(one, groups, threads):
        for name in numeric:
            numbers[name] += some[name]
        for name in looked_for:
            _category(name, found[name] | texts[name])  # refuses too many before they fill the memory
            found[name] |= texts[name]
    made: dict[str, Numeric | Category] = {
        n: Numeric(edges(np.concatenate(parts) if parts else np.empty(0))) for n, parts in numbers.items()
    }
    for name, values in categories.items():
        made[name] = _category(name, found[name] if values is None else values)
    return made


def edges(values: Floats, quantiles: int = QUANTILES) -> tuple[float, ...]:
    """Return the inner edges of quantile bins; each is a value that occurs. NaN and infinity are left out.

    A value that takes a bin or more for itself (zeros of a rain gauge, a constant) gets a bin of its own, or one
    could not see it move; there may then be fewer bins, or one more.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ()
    inner = np.quantile(finite, np.arange(1, quantiles) / quantiles, method="inverted_cdf")
    found, times = np.unique(inner, return_counts=True)
    just_above = np.nextafter(found[times > 1], math.inf)
    return tuple(np.unique(np.concatenate([found, just_above[np.isfinite(just_above)]])).tolist())


def _category(name: str, values: Iterable[str]) -> Category:
    distinct = sorted(set(values))
    if len(distinct) > MAX_VALUES:
        raise DataError(
            f"{name} has more than {MAX_VALUES:,} values: it is no category", hint="prefix it with _ to keep it out"
        )
    return Category(tuple(distinct))


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    at = batch.schema.get_field_index(name)
    if at < 0:
        raise DataError(f"there is no column {name} to make bins of", hint="materialize the partition again")
    return batch.column(at)


def _values(column: pa.Array) -> list[str]:
    """Return the distinct texts of a column."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary.take(pc.unique(column.indices.drop_null()))
    return [str(v) for v in pc.unique(column).to_pylist() if v is not None]


def _floats(column: pa.Array) -> Floats:
    """Return a numeric, boolean or null column as float64 [N], NaN where it has no value."""
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), math.nan)
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"it is {kind}, not a number")
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
