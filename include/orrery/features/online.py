"""Features for one row at a time: the views' latest rows in Feast's online store, and the way back.

What a row is given online at a time equals what materialize gives a row with that prediction_time, as long
as the store holds what was known then: the same ttl, the same derives, the same types.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from orrery.data.tables import PREDICTION_TIME
from orrery.databases import REFUSED
from orrery.errors import DataError, RequestError, TryAgain, UserError
from orrery.features.definitions import Definitions, View
from orrery.features.join import check_names, feast_type, typed, values_of
from orrery.features.known import latest_of_all
from orrery.features.quick_feast import feast, quiet
from orrery.features.shapes import AVAILABLE_TIME, UTC, derived_online, join_column, statics
from orrery.store import trouble

# Beside a view's values; no value of a view can begin with `_`.
AVAILABLE = "_available"
# Up to here each integer is a floating point number.
EXACT = 2**53
# How these libraries call a server that cannot be reached: SQLAlchemy, psycopg, redis.
OUT_OF_REACH = frozenset({"OperationalError", "ConnectionError", "TimeoutError", "PoolTimeout", "BusyLoadingError"})


@dataclass(frozen=True)
class Home:
    """Where a project's online features are.

    `registry`: a folder, or a SQLAlchemy URL; `online`: `sqlite` (in that folder), a postgresql:// or a
    redis:// URL. `$NAME` in a URL is taken from the environment, so that no password is in a config.
    """

    project: str
    registry: str
    online: str

    @property
    def folder(self) -> Path | None:
        """The registry's folder, or None when it is a database."""
        return None if "://" in self.registry else Path(self.registry)


def push(definitions: Definitions, known: Mapping[str, pa.Table], home: Home) -> dict[str, int]:
    """Write the latest row of each view's entities; return how many were written per view.

    `known`: what `latest_known` returned, by the view's name. A row that became available before the one that
    is there is left out, so an older partition overwrites nothing newer. Pushes to a folder wait for each
    other; to a database two at once may both read before one of them writes.
    """
    tables = [(view, latest_of_all(view, known[view.name])) for view in definitions.views]
    with _alone(home), _reaching(home):
        store = _store(home)
        tables = [(view, _typed(store, view, table)) for view, table in tables]
        store.apply(_objects(tables))
        store.refresh_registry()
        return {view.name: _write(store, view, table) for view, table in tables}


def lookup(project: str, rows: pa.Table, *, at: datetime, home: Home | None = None) -> pa.Table:
    """Return `rows` with prediction_time `at`, the views' features as they are in the store, and the derives'.

    Rows have the join columns and the features that @rows gives. Raises `RequestError` where nothing was pushed.
    """
    from orrery import platform
    from orrery.features.definitions import load

    if home is None:
        addresses = platform.load().feast
        home = Home(project, addresses.registry, addresses.online)
    return lookup_with(load(platform.project_folder(project), project), rows, at=at, home=home)


def lookup_with(definitions: Definitions, rows: pa.Table, *, at: datetime, home: Home) -> pa.Table:
    """Like `lookup`, for definitions that are loaded already."""
    if at.tzinfo is None:
        raise RequestError(f"at={at} has no time zone", hint="datetime.now(UTC)")
    times = pa.repeat(pa.scalar(at, UTC), rows.num_rows)
    if PREDICTION_TIME in rows.column_names:
        rows = rows.drop_columns([PREDICTION_TIME])
    rows = statics("rows", rows.append_column(PREDICTION_TIME, times))
    if definitions.views:
        with _reaching(home):
            store = _store(home)
            found = [(view, _read(store, view, rows)) for view in definitions.views]
        check_names(rows, [(view, table) for view, table in found])
        for view, table in found:
            for name in values_of(view, table):
                if name != AVAILABLE:
                    rows = rows.append_column(f"{view.name}__{name}", _fresh(view, table, name, times))
    return derived_online(definitions, rows)


def _read(store: Any, view: View, rows: pa.Table) -> pa.Table:
    """Return what the store has for each row: the `on` columns, the values, and since when they are available."""
    missing = [on for on in view.on if on not in rows.column_names]
    if missing:
        raise DataError(f"@view {view.name} is joined on {missing[0]!r}, which the rows do not have")
    asked = pa.table({on: join_column(rows[on], on) for on in view.on})
    keys = list(zip(*(asked[on].cast(pa.string()).to_pylist() for on in view.on), strict=True))
    distinct = [k for k in dict.fromkeys(keys) if None not in k]
    types = _types(store, view)
    values = _ask(store, view, distinct, list(types))
    place = {k: i for i, k in enumerate(distinct)}
    index = pa.array([place.get(k) for k in keys], pa.int64())
    for name, kind in types.items():
        asked = asked.append_column(name, pa.array(values[name], kind).take(index))
    return asked


def _types(store: Any, view: View) -> dict[str, pa.DataType]:
    """Return a view's values as the registry knows them."""
    plain = {feast_type(kind): kind for kind in (pa.float64(), pa.int64(), pa.bool_(), pa.string())}
    try:
        fields = store.get_feature_view(view.name).features
    except feast().errors.FeatureViewNotFoundException:
        raise RequestError(
            f"view {view.name} of {store.project} has nothing online yet",
            hint="features: {online: true} in spec.yaml, then run materialize",
        ) from None
    return {f.name: plain[f.dtype] for f in fields}


def _typed(store: Any, view: View, table: pa.Table) -> pa.Table:
    """Give a column without values the type that the store holds it in: what others pushed must stay readable."""
    untyped = [f.name for f in table.schema if pa.types.is_null(f.type)]
    types: dict[str, pa.DataType] = {}
    if untyped:
        with contextlib.suppress(RequestError):  # nothing was pushed yet
            types = _types(store, view)
    for name in untyped:
        table = table.set_column(table.schema.get_field_index(name), name, typed(table[name], types.get(name)))
    return table


def _ask(store: Any, view: View, keys: list[tuple[str, ...]], names: list[str]) -> dict[str, list[Any]]:
    """Return the values of some entities, each in the order of `keys`; None where the store has nothing."""
    if not keys:
        return {name: [] for name in names}
    entities = {on: [k[i] for k in keys] for i, on in enumerate(_join_keys(view))}
    found = store.get_online_features(
        features=[f"{view.name}:{n}" for n in names], entity_rows=[dict(zip(entities, k, strict=True)) for k in keys]
    ).to_dict()
    return {name: found[name] for name in names}


def _fresh(view: View, table: pa.Table, name: str, times: pa.Array) -> pa.ChunkedArray:
    """Return one column, null where the value is not available yet at that time or is as old as the ttl."""
    age = pc.subtract(times.cast(pa.int64()), table[AVAILABLE])
    fresh = pc.and_(pc.greater_equal(age, 0), pc.less(age, view.ttl_us))
    return pc.if_else(pc.fill_null(fresh, False), table[name], pa.scalar(None, table[name].type))


def _write(store: Any, view: View, table: pa.Table) -> int:
    """Write the rows that are not older than what is there; return their number."""
    import pandas as pd

    table = table.append_column(AVAILABLE, table[AVAILABLE_TIME].cast(pa.int64()))
    columns = {k: table[on].cast(pa.string()) for k, on in zip(_join_keys(view), view.on, strict=True)}
    there = _ask(store, view, list(zip(*(c.to_pylist() for c in columns.values()), strict=True)), [AVAILABLE])
    newer = pc.less_equal(pa.array(there[AVAILABLE], pa.int64()), table[AVAILABLE])
    columns |= {n: table[n] for n in (*values_of(view, table), AVAILABLE_TIME)}
    rows = pa.table(columns).filter(pc.fill_null(newer, True))
    for part in _exactly(rows):
        frame = part.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
        store.write_to_online_store(view.name, df=frame, allow_registry_cache=False)
    return int(rows.num_rows)


def _exactly(rows: pa.Table) -> list[pa.Table]:
    """Split rows so that Feast loses no digit: it makes integers with missing ones among them floating point."""
    parts = [rows] if rows.num_rows else []
    for field in rows.schema:
        if pa.types.is_int64(field.type) and rows[field.name].null_count:
            ends = pc.min_max(rows[field.name]).as_py()
            if max(abs(ends["min"] or 0), abs(ends["max"] or 0)) > EXACT:
                halves = [(p.filter(pc.is_null(p[field.name])), p.filter(pc.is_valid(p[field.name]))) for p in parts]
                parts = [half for pair in halves for half in pair if half.num_rows]
    return parts


def _join_keys(view: View) -> list[str]:
    return [f"on_{i}" for i in range(len(view.on))]


def _objects(tables: list[tuple[View, pa.Table]]) -> list[Any]:
    """Return Feast's entities and feature views. No ttl: Feast would measure it by its own clock."""
    lib = feast()
    widest = max((len(view.on) for view, _ in tables), default=0)
    entities = [
        lib.Entity(name=f"on_{i}", join_keys=[f"on_{i}"], value_type=lib.ValueType.STRING) for i in range(widest)
    ]
    views = []
    for view, table in tables:
        schema = [lib.Field(name=k, dtype=lib.types.String) for k in _join_keys(view)]
        schema += [lib.Field(name=n, dtype=feast_type(table[n].type)) for n in values_of(view, table)]
        schema.append(lib.Field(name=AVAILABLE, dtype=lib.types.Int64))
        # Feast asks for a file; it is never read, since rows come by `write_to_online_store` alone.
        source = lib.FileSource(name=f"{view.name}_source", path=f"{view.name}.parquet", timestamp_field=AVAILABLE_TIME)
        views.append(
            lib.FeatureView(
                name=view.name,
                entities=entities[: len(view.on)],
                ttl=timedelta(0),
                schema=schema,
                source=source,
                tags={"on": ",".join(view.on), "ttl": view.ttl},
            )
        )
    return [*entities, *views]


@lru_cache(maxsize=8)
def _store(home: Home) -> Any:
    lib = feast()
    registry = os.path.expandvars(home.registry)
    if home.folder is not None:
        home.folder.mkdir(parents=True, exist_ok=True)
        registry = f"sqlite:///{home.folder.resolve()}/registry.db"
    config = lib.RepoConfig(
        project=home.project,
        provider="local",
        registry={"registry_type": "sql", "path": registry, "cache_ttl_seconds": 60},
        offline_store={"type": "duckdb"},
        online_store=online_config(home),
        entity_key_serialization_version=3,
        repo_path=home.folder or Path.cwd(),
    )
    return lib.FeatureStore(config=config)


def online_config(home: Home) -> dict[str, Any]:
    """Return Feast's description of the online store. Raises `UserError` for an address of another kind."""
    if home.online == "sqlite":
        if home.folder is None:
            raise UserError("feast.online is sqlite, but feast.registry is no folder to put it in", hint="give a URL")
        return {"type": "sqlite", "path": str(home.folder.resolve() / f"{home.project}.db")}
    url = urlsplit(os.path.expandvars(home.online))
    if url.scheme == "redis":
        options = [f"{url.hostname}:{url.port or 6379}"]
        options += [f"username={unquote(url.username)}"] if url.username else []
        options += [f"password={unquote(url.password)}"] if url.password else []
        options += [f"db={url.path.strip('/')}"] if url.path.strip("/") else []
        return {"type": "redis", "connection_string": ",".join(options)}
    if url.scheme in ("postgresql", "postgresql+psycopg", "postgres"):
        return {
            "type": "postgres",
            "host": url.hostname or "localhost",
            "port": url.port or 5432,
            "database": url.path.strip("/"),
            "user": unquote(url.username or ""),
            "password": unquote(url.password or ""),
            "sslmode": "prefer",
        }
    raise UserError(
        f"feast.online is {(url.scheme or home.online)!r}",
        hint="sqlite, postgresql://user@host/database or redis://host/0",
    )


@contextlib.contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Let one push at a time into a folder."""
    if home.folder is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        with trouble(str(home.folder)):
            home.folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((home.folder / ".lock").open("w"))
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _reaching(home: Home) -> Iterator[None]:
    """Turn "cannot be reached" into `TryAgain`, without the address: it may hold a password."""
    try:
        with quiet():
            yield
    except Exception as e:
        if type(e).__name__ in OUT_OF_REACH or isinstance(e, ConnectionError):
            said = f"the online features of {home.project} cannot be reached ({type(e).__name__})"
            if REFUSED.search(str(e)):
                hint = "check feast in platform.yaml: login, grants, or that the folder may be written"
                raise UserError(said, hint=hint) from e
            raise TryAgain(said) from e
        raise
