"""A table of a database as a stream of Arrow record batches: the rows of one partition, by a time column.

The URL is a secret: it comes in an environment variable, and no message, log or traceback shows its password.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from orrery.data.files import Stream
from orrery.data.snapshot import INSTANT
from orrery.data.tables import ROW_GROUP
from orrery.databases import REFUSED, scrub, with_driver
from orrery.errors import DataError, OrreryError, TryAgain, UserError, nearest


@contextlib.contextmanager
def read(secret_env: str, table: str, time_column: str, bounds: tuple[datetime, datetime]) -> Iterator[Stream]:
    """Open the rows of `table` with start <= time_column < end, in the order of time and primary key.

    Timestamps without a zone are taken as UTC. Raises `UserError`, `RequestError` or `DataError` (64) for a
    missing secret, table or column, a refused login, a type without a counterpart; `TryAgain` (75) when the
    database cannot be reached.
    """
    text = os.environ.get(secret_env)
    if not text:
        raise UserError(
            f"the environment variable {secret_env} is not set, so {table} cannot be read",
            hint="the source's `connection` must exist in Airflow; at the command line, set it to a SQLAlchemy URL",
        )
    url = _url(text, secret_env)
    with _hidden(url, table):
        engine = sa.create_engine(url, poolclass=sa.pool.NullPool, hide_parameters=True)
        try:
            with engine.connect().execution_options(stream_results=True, yield_per=ROW_GROUP) as connection:
                found = _reflect(connection, table)
                query = _query(found, time_column, bounds, engine.dialect.name)
                schema = pa.schema([pa.field(c.name, _arrow_type(c, table)) for c in found.columns])
                yield Stream(schema, _batches(connection.execute(query), schema, table))
        finally:
            engine.dispose()


def _url(text: str, secret_env: str) -> sa.URL:
    # Airflow and Heroku write postgres://; SQLAlchemy knows the driver by name.
    text = with_driver(text)
    try:
        url = sa.make_url(text)
        url.get_dialect()
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError, ValueError):
        raise UserError(
            f"{secret_env} is not a SQLAlchemy URL with a driver that is installed",
            hint="postgresql+psycopg://user:password@host/database or sqlite:///file.db",
        ) from None
    return url


@contextlib.contextmanager
def _hidden(url: sa.URL, table: str) -> Iterator[None]:
    """Turn what a database says into an error with the right exit code, without its password."""
    where = f"table {table} of {url.render_as_string(hide_password=True)}"
    try:
        yield
    except OrreryError:
        raise
    except (ValueError, TypeError) as e:  # a value that the driver cannot read as its column's declared type
        raise DataError(f"{where}: {scrub(str(e), url)}", hint="correct the value, or leave it out by a view") from None
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as e:
        said = scrub(str(getattr(e, "orig", None) or e), url)
        if REFUSED.search(said):
            raise UserError(f"{where}: {said}", hint="check the connection's login, database and grants") from None
        raise TryAgain(f"{where} is out of reach: {said}") from None
    except sa.exc.SQLAlchemyError as e:
        said = scrub(str(getattr(e, "orig", None) or e), url)
        raise UserError(f"{where}: {said}", hint="check the table and the grants of the connection's user") from None


def _reflect(connection: sa.Connection, table: str) -> sa.Table:
    schema, _, name = table.rpartition(".")
    try:
        return sa.Table(name, sa.MetaData(), schema=schema or None, autoload_with=connection, resolve_fks=False)
    except sa.exc.NoSuchTableError:
        look = sa.inspect(connection)
        there = [*look.get_table_names(schema or None), *look.get_view_names(schema or None)]
        raise DataError(f"there is no table {table}", hint=nearest(name, there)) from None


def _query(table: sa.Table, time_column: str, bounds: tuple[datetime, datetime], dialect: str) -> sa.Select[Any]:
    """Select the partition's rows in an order that is the same each time, so that the snapshot's bytes are, too."""
    if time_column not in table.c:
        raise DataError(f"{table.fullname} has no column {time_column}", hint=nearest(time_column, table.c.keys()))
    when = table.c[time_column]
    moment: sa.ColumnElement[Any] = when
    start: object
    end: object
    if isinstance(when.type, sa.DateTime) and dialect == "sqlite":
        # Kept as text, with or without fractions and T: compared as such, midnight itself would be left out.
        moment = sa.func.strftime("%Y-%m-%d %H:%M:%f", when)
        start, end = (b.strftime("%Y-%m-%d %H:%M:%S.000") for b in bounds)
    elif isinstance(when.type, sa.DateTime):
        start, end = (b if when.type.timezone else b.replace(tzinfo=None) for b in bounds)
    elif isinstance(when.type, sa.Date) and all(b.hour == 0 for b in bounds):
        start, end = (b.date() for b in bounds)
    else:
        raise DataError(
            f"{table.fullname}.{time_column} has type {when.type}, which does not say when a row belongs",
            hint="`time_column` must be a timestamp (or a date, for partitions of a day and longer)",
        )
    keys = list(table.primary_key.columns) or [c for c in table.c if _orders(c)]
    return sa.select(table).where(moment >= start, moment < end).order_by(when, *keys)


def _orders(column: sa.Column[Any]) -> bool:
    return not isinstance(column.type, sa.JSON | sa.LargeBinary | sa.types.NullType | sa.ARRAY)


def _arrow_type(column: sa.Column[Any], table: str) -> pa.DataType:
    """Return a column's Arrow type by its declared type, so that every partition has the same."""
    kind = column.type
    simple: tuple[tuple[Any, pa.DataType], ...] = (
        (sa.Boolean, pa.bool_()),
        (sa.Integer, pa.int64()),
        (sa.Float, pa.float64()),
        (sa.DateTime, INSTANT),
        (sa.Date, pa.date32()),
        (sa.Time, pa.time64("us")),
        (sa.LargeBinary, pa.binary()),
        ((sa.String, sa.Uuid, sa.JSON), pa.string()),
    )
    for known, arrow in simple:
        if isinstance(kind, known):
            return arrow
    if isinstance(kind, sa.Numeric):
        digits = kind.precision if kind.asdecimal else None
        return pa.decimal128(digits, kind.scale or 0) if digits and digits <= 38 else pa.float64()
    with contextlib.suppress(NotImplementedError):
        if kind.python_type is timedelta:  # the dialects' own intervals share no class
            return pa.duration("us")
    raise DataError(
        f"{table}.{column.name} has type {kind!r}, which has no counterpart in Arrow",
        hint="leave the column out by a view, or cast it there",
    )


def _batches(result: sa.CursorResult[Any], schema: pa.Schema, table: str) -> Iterator[pa.RecordBatch]:
    for rows in result.partitions():
        columns = zip(*rows, strict=True)
        yield pa.RecordBatch.from_arrays(
            [_array(list(values), field, table) for values, field in zip(columns, schema, strict=True)], schema=schema
        )


def _array(values: list[Any], field: pa.Field, table: str) -> pa.Array:
    try:
        return pa.array([_plain(v, field.type) for v in values], field.type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as e:
        odd = next((v for v in values if v is not None), None)
        raise DataError(
            f"{table}.{field.name}: a value does not fit {field.type} ({str(e)[:120]}); the first is {odd!r:.60}",
            hint="the database holds something other than the column's declared type",
        ) from None


def _plain(value: Any, kind: pa.DataType) -> Any:
    """Return a value as Arrow takes it."""
    if value is None:
        return None
    if pa.types.is_string(kind) and not isinstance(value, str):
        return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value
    return float(value) if pa.types.is_floating(kind) else value
