"""The tables that a project's functions return: called, checked, and made plain.

Plain: strings are `string`, integers `int64`, other numbers `double` with null for NaN, times
`timestamp[us, UTC]`. One form per kind, so that what Feast gives back, offline and online, is equal. A column
without any value may have no type either (Arrow's null): it stays so, and takes that of the other partitions.
"""

from __future__ import annotations

import traceback
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orrery.bundle import one_process
from orrery.data.tables import KEY, LABEL, LABEL_TIME, PREDICTION_TIME, RESERVED
from orrery.errors import DataError, OrreryError, UserError
from orrery.features.definitions import Definitions, Derive, Rows, View, where

EVENT_TIME, AVAILABLE_TIME = "event_time", "available_time"
UTC = pa.timestamp("us", tz="UTC")
# Rows on which a derive is tried one by one, to see that it looks at no other row.
ALONE = 8
# Vectorised numbers may differ in their last bits with the count of rows, and cancellation makes more of it. The same
# row again differs in nothing: a wider tolerance would let the seconds since 1970 pass for the same a moment later.
CLOSE, SAME = 1e-9, 1e-15


def rows_table(rows: Rows, raw: pa.Table, task: str) -> pa.Table:
    """Return the rows: key, prediction_time, label, label_time, then all other columns; in the function's order."""
    here = f"@rows {rows.source}"
    table = call(here, rows.function, raw)
    _need(here, rows.function, table, RESERVED)
    columns = {
        KEY: _key(here, table[KEY]),
        PREDICTION_TIME: instants(table[PREDICTION_TIME], f"{here}: {PREDICTION_TIME}"),
        LABEL: _label(here, table[LABEL], task),
        LABEL_TIME: instants(table[LABEL_TIME], f"{here}: {LABEL_TIME}"),
    }
    if columns[PREDICTION_TIME].null_count:
        raise DataError(f"{here}: {columns[PREDICTION_TIME].null_count:,} rows have no {PREDICTION_TIME}")
    _check_labels(here, columns)
    rest = {n: table[n] for n in table.column_names if n not in RESERVED}
    return statics(here, pa.table({**columns, **rest}))


def statics(here: str, table: pa.Table) -> pa.Table:
    """Make the features among a table's columns plain; helpers (`_...`) and reserved columns stay as they are."""
    for i, name in enumerate(table.column_names):
        if name not in RESERVED and not name.startswith("_"):
            table = table.set_column(i, name, plain(table[name], f"{here}: {name}"))
    return table


def view_table(view: View, raw: pa.Table) -> pa.Table:
    """Return a view's rows: `on` columns, event_time, available_time, values; rows nobody can see are left out."""
    here = f"@view {view.name}"
    table = call(here, view.function, raw)
    _need(here, view.function, table, (*view.on, EVENT_TIME, AVAILABLE_TIME))
    columns = {n: join_column(table[n], f"{here}: {n}") for n in view.on}
    columns |= {n: instants(table[n], f"{here}: {n}") for n in (EVENT_TIME, AVAILABLE_TIME)}
    values = [n for n in table.column_names if n not in columns]
    hidden = [n for n in values if n.startswith("_")]
    if hidden or not values:
        problem = f"column {hidden[0]} begins with _" if hidden else "there is no column beyond keys and times"
        raise DataError(f"{here}: {problem}", hint="the other columns of a view are its features")
    columns |= {n: plain(table[n], f"{here}: {n}") for n in values}
    return _seen(here, pa.table(columns), view.on)


def derived(definitions: Definitions, rows: pa.Table) -> pa.Table:
    """Apply the derives in order to rows without label and label_time; the features come out plain.

    Raises `DataError` for a derive that changes rows, or that gives a row other values when it comes alone.
    """
    rows = rows.select([n for n in rows.column_names if n not in (LABEL, LABEL_TIME)])
    for each in definitions.derives:
        found = _derive(each, rows)
        _check_alone(each, rows.slice(0, ALONE), found.slice(0, ALONE))
        rows = found
    return rows


def derived_online(definitions: Definitions, rows: pa.Table) -> pa.Table:
    """Like `derived`, less the second look: the same functions have passed it offline."""
    for each in definitions.derives:
        rows = _derive(each, rows)
    return rows


def kinds(table: pa.Table) -> dict[str, str]:
    """Return the feature list: name -> "numeric", "categorical", or "unknown" without a type; for plain features."""
    names = [n for n in table.column_names if n not in RESERVED and not n.startswith("_")]
    return {n: _kind(table.schema.field(n).type) for n in names}


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_null(kind):
        return "unknown"
    return "categorical" if pa.types.is_string(kind) else "numeric"


def plain(column: pa.ChunkedArray, here: str) -> pa.ChunkedArray:
    """Return a feature's column in its plain form. Raises `DataError` for what is no number, boolean or string."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return column
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if pa.types.is_integer(kind):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:
            raise DataError(f"{here}: a value is beyond 64-bit signed integers", hint="cast it to float64") from None
    if pa.types.is_floating(kind):
        column = column.cast(pa.float64())
        return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    raise DataError(
        f"{here} is {kind}; features are numbers, booleans or strings",
        hint="cast it (a decimal to float64), leave it out, or, in @rows, begin its name with _",
    )


def join_column(column: pa.ChunkedArray, here: str) -> pa.ChunkedArray:
    """Return a column that is joined on: string, int64 or boolean. Raises `DataError` for other types."""
    column = plain(column, here)
    if pa.types.is_null(column.type):
        return column.cast(pa.string())
    if pa.types.is_floating(column.type) and column.null_count < len(column):
        raise DataError(
            f"{here} is a floating point number, which cannot be joined on", hint="cast it to int64 or string"
        )
    return column


def instants(column: pa.ChunkedArray, here: str) -> pa.ChunkedArray:
    """Return a column of times in UTC microseconds. Raises `DataError` when it holds no times, or no time zone."""
    if pa.types.is_null(column.type):
        return column.cast(UTC)
    if not pa.types.is_timestamp(column.type):
        raise DataError(f"{here} is {column.type}, not a timestamp with a time zone")
    if column.type.tz is None:
        raise DataError(
            f"{here} has no time zone", hint='pc.assume_timezone(column, "UTC") or pandas .dt.tz_localize("UTC")'
        )
    # Beyond a microsecond nothing is told apart, on either side of the join.
    return column.cast(UTC, safe=False)


def call(here: str, function: Any, table: pa.Table) -> pa.Table:
    """Call a function of features.py. Raises `UserError` with its line when it fails, or returns no Arrow table."""
    try:
        with one_process(where(function)):
            found = function(table)
    except (OrreryError, MemoryError):
        raise
    except (Exception, SystemExit) as e:  # sys.exit() would end the step without a word, and be tried again
        file = function.__code__.co_filename
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == file]
        at = f"{file}:{lines[-1]}" if lines else where(function)
        raise UserError(f"{at}: {here}: {type(e).__name__}: {e}", hint="the function failed on these data") from e
    if not isinstance(found, pa.Table):
        raise DataError(
            f"{where(function)}: {here} returned {type(found).__name__}, not a pyarrow.Table",
            hint="pa.Table.from_pandas(frame, preserve_index=False)",
        )
    doubled = [n for i, n in enumerate(found.column_names) if n in found.column_names[:i]]
    if doubled:
        raise DataError(f"{where(function)}: {here} returned two columns {doubled[0]!r}")
    return found


def _need(here: str, function: Any, table: pa.Table, names: tuple[str, ...]) -> None:
    absent = [n for n in names if n not in table.column_names]
    if absent:
        raise DataError(
            f"{where(function)}: {here} returned no column {', '.join(absent)}",
            hint=f"it returned {', '.join(table.column_names) or 'no columns'}",
        )


def _key(here: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = plain(column, f"{here}: {KEY}")
    if not (pa.types.is_string(column.type) or pa.types.is_int64(column.type)):
        raise DataError(f"{here}: {KEY} is {column.type}", hint="a string (or an integer) that names the row")
    if column.null_count:
        raise DataError(f"{here}: {column.null_count:,} rows have no {KEY}")
    column = column.cast(pa.string())
    if pc.count_distinct(column).as_py() < len(column):
        counts = pc.value_counts(column.combine_chunks())
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        shown = ", ".join(repr(k) for k in sorted(twice.to_pylist())[:3])
        raise DataError(f"{here}: {len(twice):,} keys are there more than once, such as {shown}")
    return column


def _label(here: str, column: pa.ChunkedArray, task: str) -> pa.ChunkedArray:
    column = plain(column, f"{here}: {LABEL}")
    if pa.types.is_string(column.type) and task != "multiclass":
        raise DataError(f"{here}: {LABEL} is a string, the task is {task}", hint="0/1, a boolean or a number")
    if column.null_count == len(column):
        return column.cast(pa.string() if task == "multiclass" else pa.float64())
    return column


def _check_labels(here: str, columns: dict[str, pa.ChunkedArray]) -> None:
    """Raise `DataError` for labels known before the prediction is made (they leak), or known at no time."""
    known = pc.is_valid(columns[LABEL])
    untimed = pc.sum(pc.and_(known, pc.is_null(columns[LABEL_TIME]))).as_py() or 0
    if untimed:
        raise DataError(f"{here}: {untimed:,} rows have a {LABEL} but no {LABEL_TIME}", hint="when was it known?")
    early = pc.fill_null(pc.and_(known, pc.less(columns[LABEL_TIME], columns[PREDICTION_TIME])), False)
    count = pc.sum(early).as_py() or 0
    if count:
        first = columns[KEY].filter(early)[0].as_py()
        raise DataError(
            f"{here}: {count:,} rows know their {LABEL} before {PREDICTION_TIME} (such as {first!r}): a leak",
            hint=f"{LABEL_TIME} is when the truth is known, {PREDICTION_TIME} when the prediction is made",
        )


def _seen(here: str, table: pa.Table, on: tuple[str, ...]) -> pa.Table:
    """Leave out the rows that nobody can see: no `on` value, or never available."""
    keep = pc.is_valid(table[AVAILABLE_TIME])
    for name in on:
        keep = pc.and_(keep, pc.is_valid(table[name]))
    table = table.filter(keep)
    if table[EVENT_TIME].null_count:
        raise DataError(f"{here}: {table[EVENT_TIME].null_count:,} rows have no {EVENT_TIME}")
    return table


def _derive(each: Derive, rows: pa.Table) -> pa.Table:
    here, at = f"@derive {each.name}", where(each.function)
    found = call(here, each.function, rows)
    _need(here, each.function, found, tuple(rows.column_names))
    for name in (KEY, PREDICTION_TIME):
        if name in rows.column_names and not found[name].equals(rows[name]):
            raise DataError(f"{at}: {here} changed {name}", hint="add columns; keep the rows and their order")
    if found.num_rows != rows.num_rows or set(found.column_names) & {LABEL, LABEL_TIME}:
        raise DataError(f"{at}: {here} returned other rows, or a label", hint="add columns; keep the rows as they are")
    return statics(here, found)


def _check_alone(each: Derive, few: pa.Table, expected: pa.Table) -> None:
    """Raise `DataError` when a derive looks at more than its row: at the rows beside it (online there are none), or
    at a clock or a die, which give the same row another value each time.
    """
    for i in range(few.num_rows):
        alone = _derive(each, few.slice(i, 1))
        if (name := _other(_derive(each, few.slice(i, 1)), alone, SAME)) is not None:
            raise DataError(
                f"{where(each.function)}: @derive {each.name}: {name} of a row is another each time it is computed",
                hint="compute it from the row's own columns, without a clock or random numbers",
            )
        if (name := _other(expected.slice(i, 1), alone, CLOSE)) is not None:
            raise DataError(
                f"{where(each.function)}: @derive {each.name}: {name} of a row changes with the rows beside it",
                hint="online a row comes alone: compute it from its own columns",
            )


def _other(a: pa.Table, b: pa.Table, tolerance: float) -> str | None:
    """Return the first feature of `b` that `a` has another value of, or None."""
    features = (n for n in b.column_names if n not in RESERVED and not n.startswith("_"))
    return next((n for n in features if not _alike(a[n], b[n], tolerance)), None)


def _alike(a: pa.ChunkedArray, b: pa.ChunkedArray, tolerance: float) -> bool:
    """Tell whether two columns are equal; vectorised numbers may differ in their last bits with the length."""
    if a.type != b.type:  # a row alone may have nothing but nulls, which have no type of their own
        return bool(a.null_count == len(a) and b.null_count == len(b))
    if not pa.types.is_float64(a.type):
        return bool(a.equals(b))
    close = pc.less_equal(pc.abs(pc.subtract(a, b)), pc.add(tolerance / 1000, pc.multiply(tolerance, pc.abs(a))))
    same = pc.or_(pc.fill_null(close, False), pc.fill_null(pc.equal(a, b), False))
    return bool(pc.all(pc.or_(same, pc.and_(pc.is_null(a), pc.is_null(b)))).as_py() is not False)
