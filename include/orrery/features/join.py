"""The point-in-time join, through Feast: each row is given what was known when its prediction is made.

Feast 0.67 with its DuckDB store pairs every row with all the earlier rows of its entity and then keeps the
latest: 28,800 rows with 55,000 rows of three airports are half a billion pairs. So each view is cut into
slots of time first (`known.slots`), and the slot is one more join key.

Its traps, each with a test: a ttl of 36 h is an error (whole days, or less than one); its ttl includes both
ends; it drops columns whose names end in `_y`; DuckDB takes `Wind` and `wind` for one column; integers with
missing values become floating point on their way through pandas; the rows come back in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orrery.data.tables import PREDICTION_TIME
from orrery.errors import DataError
from orrery.features.definitions import View
from orrery.features.known import slots
from orrery.features.quick_feast import feast, quiet
from orrery.features.shapes import AVAILABLE_TIME, EVENT_TIME, join_column

DAY_US = 86_400_000_000
ROW, AVAILABLE = "row", "available"


def join(rows: pa.Table, known: Sequence[tuple[View, pa.Table]], scratch: Path) -> pa.Table:
    """Return `rows` with a column `<view>__<column>` per value, null where nothing was known.

    Rows have at least prediction_time and the `on` columns, and keep their order; `known` are tables of
    `latest_known`. `scratch` is an empty folder of this call's own: Feast's registry must not be shared by
    steps that run at once. Raises `DataError` when names or types of the two sides do not fit.
    """
    names = check_names(rows, known)
    if not known or not rows.num_rows:
        return _append(rows, {n: pa.nulls(rows.num_rows, t) for n, t in names.items()})
    scratch.mkdir(parents=True, exist_ok=True)
    keys = {on: f"on_{i}" for i, on in enumerate(dict.fromkeys(on for view, _ in known for on in view.on))}
    # As text all types of keys are one, and an integer that is missing does not make the others float.
    asked = {key: join_column(rows[on], f"rows: {on}").cast(pa.string()) for on, key in keys.items()}
    asked |= {ROW: pa.array(np.arange(rows.num_rows)), "event_timestamp": rows[PREDICTION_TIME]}
    entities, views, references = [_entity(key, "STRING") for key in keys.values()], [], []
    for view, table in known:
        found, asked[_slot(view)] = _cut(view, table, rows, keys)
        pq.write_table(found, scratch / f"{view.name}.parquet", compression="none")
        entities.append(_entity(_slot(view), "INT64"))
        views.append(_feature_view(view, table, keys, entities, scratch))
        references += [f"{view.name}:{c}" for c in (*_numbered(view, table), AVAILABLE)]
    joined = _ask(pa.table(asked), [*entities, *views], references, scratch)
    return _append(rows, {n: c for view, table in known for n, c in _values(view, table, joined, rows).items()})


def values_of(view: View, table: pa.Table) -> list[str]:
    """Return the columns of a view that are features."""
    return [n for n in table.column_names if n not in (*view.on, EVENT_TIME, AVAILABLE_TIME)]


def check_names(rows: pa.Table, known: Sequence[tuple[View, pa.Table]]) -> dict[str, pa.DataType]:
    """Return the features that views add, with their types. Raises `DataError` when they or the keys do not fit."""
    names: dict[str, pa.DataType] = {}
    for view, table in known:
        for on in view.on:
            if on not in rows.column_names:
                raise DataError(
                    f"@view {view.name} is joined on {on!r}, which the rows do not have",
                    hint=f"the rows have {', '.join(rows.column_names)}; a helper column begins with _",
                )
            ours, theirs = join_column(rows[on], f"rows: {on}"), table[on]
            # A side without any value is joined with nothing, whatever its type.
            if ours.type != theirs.type and all(side.null_count < len(side) for side in (ours, theirs)):
                raise DataError(
                    f"@view {view.name}: {on!r} is {theirs.type}, in the rows it is {ours.type}",
                    hint="cast one of them",
                )
        for column in values_of(view, table):
            name = f"{view.name}__{column}"
            if name in names or name in rows.column_names:
                raise DataError(f"@view {view.name}: there are two features {name!r}", hint="rename the column")
            names[name] = table[column].type
    return names


def _cut(view: View, table: pa.Table, rows: pa.Table, keys: dict[str, str]) -> tuple[pa.Table, pa.Array]:
    """Return what Feast reads of a view, slot by slot, and the slot of each row."""
    times = rows[PREDICTION_TIME].cast(pa.int64()).to_numpy()
    index, slot, width = slots(view, table, int(times.min()), int(times.max()))
    columns = {keys[on]: table[on].cast(pa.string()) for on in view.on}
    columns |= {number: typed(table[name]) for number, name in _numbered(view, table).items()}
    columns |= {AVAILABLE_TIME: table[AVAILABLE_TIME], AVAILABLE: table[AVAILABLE_TIME].cast(pa.int64())}
    found = pa.table(columns).take(pa.array(index))
    return found.append_column(_slot(view), pa.array(slot)), pa.array(times // width)


def _slot(view: View) -> str:
    return f"slot_{view.name}"


def _numbered(view: View, table: pa.Table) -> dict[str, str]:
    """Return what the values are called inside Feast and DuckDB, where not every name would survive."""
    return {f"c{i}": name for i, name in enumerate(values_of(view, table))}


def _entity(name: str, kind: str) -> Any:
    lib = feast()
    return lib.Entity(name=name, join_keys=[name], value_type=lib.ValueType[kind])


def _feature_view(view: View, table: pa.Table, keys: dict[str, str], entities: list[Any], folder: Path) -> Any:
    lib = feast()
    own = [*(keys[on] for on in view.on), _slot(view)]
    schema = [lib.Field(name=n, dtype=feast_type(typed(table[c]).type)) for n, c in _numbered(view, table).items()]
    schema += [lib.Field(name=k, dtype=lib.types.String) for k in own[:-1]]
    schema += [lib.Field(name=n, dtype=lib.types.Int64) for n in (_slot(view), AVAILABLE)]
    file = str(folder / f"{view.name}.parquet")
    return lib.FeatureView(
        name=view.name,
        entities=[e for e in entities if e.name in own],
        ttl=_feast_ttl(view.ttl_us),
        schema=schema,
        source=lib.FileSource(name=f"{view.name}_source", path=file, timestamp_field=AVAILABLE_TIME),
        online=False,
    )


def typed(column: pa.ChunkedArray, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    """Give a column that has no type, for want of values, the type `kind`, or a number's: Feast needs one."""
    return column.cast(kind or pa.float64()) if pa.types.is_null(column.type) else column


def feast_type(kind: pa.DataType) -> Any:
    """Return Feast's name of a plain type."""
    types = feast().types
    named = {pa.float64(): types.Float64, pa.int64(): types.Int64, pa.bool_(): types.Bool, pa.string(): types.String}
    return named[kind]


def _feast_ttl(ttl_us: int) -> timedelta:
    """Return a ttl that Feast can take and that is not shorter; `_values` holds the exact bound."""
    if ttl_us < DAY_US:
        return timedelta(microseconds=ttl_us)
    return timedelta(days=-(-ttl_us // DAY_US))


def _ask(asked: pa.Table, objects: list[Any], references: list[str], scratch: Path) -> pa.Table:
    """Return Feast's answer, in the order of the rows."""
    lib = feast()
    config = lib.RepoConfig(
        project="join",
        provider="local",
        registry=str(scratch / "registry.db"),
        offline_store={"type": "duckdb"},
        online_store={"type": "sqlite", "path": str(scratch / "online.db")},
        entity_key_serialization_version=3,
        repo_path=scratch,
    )
    with quiet():
        store = lib.FeatureStore(config=config)
        store.apply(objects)
        job = store.get_historical_features(entity_df=asked.to_pandas(), features=references, full_feature_names=True)
        found = job.to_arrow()
    assert found.num_rows == asked.num_rows, "Feast gave back other rows than it was asked for"
    return found.take(pc.sort_indices(found[ROW]))


def _values(view: View, table: pa.Table, joined: pa.Table, rows: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Return a view's features, null where the value is as old as the ttl (Feast's bound includes that end)."""
    available = joined[f"{view.name}__{AVAILABLE}"]
    age = pc.subtract(rows[PREDICTION_TIME].cast(pa.int64()), available)
    fresh = pc.fill_null(pc.less(age, view.ttl_us), False)
    features = {}
    for number, name in _numbered(view, table).items():
        kind = table[name].type
        if pa.types.is_null(kind):
            features[f"{view.name}__{name}"] = pa.chunked_array([pa.nulls(rows.num_rows)])
            continue
        column = joined[f"{view.name}__{number}"].cast(kind)
        features[f"{view.name}__{name}"] = pc.if_else(fresh, column, pa.scalar(None, kind))
    return features


def _append(rows: pa.Table, columns: dict[str, Any]) -> pa.Table:
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return rows
