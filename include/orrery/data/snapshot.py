"""Normalised Parquet: the same content is the same bytes, whatever the source's form, batches or metadata."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orrery.data.tables import ROW_GROUP
from orrery.errors import DataError
from orrery.store import trouble

INSTANT = pa.timestamp("us", tz="UTC")


def normal_schema(schema: pa.Schema, where: str) -> pa.Schema:
    """Return the schema that a snapshot has: strings plain, instants in UTC microseconds, no metadata.

    A timestamp without a zone is read as UTC. Raises `DataError` for a name that comes twice, and for a type
    that Parquet cannot hold.
    """
    twice = sorted({n for n in schema.names if schema.names.count(n) > 1})
    if twice:
        raise DataError(f"{where} has the column {twice[0]!r} more than once", hint="rename one of them upstream")
    if not schema.names:
        raise DataError(f"{where} has no columns")
    fields = [pa.field(f.name, _normal_type(f.type)) for f in schema]
    for field in fields:
        _holdable(field, where)
    return pa.schema(fields)


def _normal_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _normal_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return INSTANT if pa.types.is_timestamp(kind) else kind


def _holdable(field: pa.Field, where: str) -> None:
    try:
        pq.ParquetWriter(io.BytesIO(), pa.schema([field])).close()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise DataError(
            f"{where}: column {field.name!r} has type {field.type}, which Parquet cannot hold",
            hint="cast it upstream, or leave the column out",
        ) from None


def write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path) -> int:
    """Write batches as one Parquet file with `schema` (a `normal_schema`); return the number of rows.

    Row groups are cut at fixed rows, so the bytes do not depend on how the batches came. Peak memory: about
    two row groups beside what the reader holds.
    """
    rows, where = 0, str(path)
    # Only what writes is in `trouble`: the batches are read meanwhile, and their reader tells its own.
    with trouble(where):
        writer = pq.ParquetWriter(path, schema, compression="zstd")
    try:
        for group in _groups(batches, schema):
            with trouble(where):
                writer.write_table(group, row_group_size=ROW_GROUP)
            rows += group.num_rows
    finally:
        with trouble(where):
            writer.close()
    return rows


def _groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    pending: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        rest = cast(batch, schema)
        while rest.num_rows:
            part = rest.slice(0, ROW_GROUP - held)
            rest = rest.slice(part.num_rows)
            pending.append(part)
            held += part.num_rows
            if held == ROW_GROUP:
                yield pa.Table.from_batches(pending, schema).combine_chunks()
                pending, held = [], 0
    if pending:
        yield pa.Table.from_batches(pending, schema).combine_chunks()


def cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch with the types of a `normal_schema`."""
    # Only nanoseconds lose anything (below the microsecond); all other casts are exact or fail.
    columns = [
        column if column.type == field.type else pc.cast(column, field.type, safe=not _nanoseconds(column.type))
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _nanoseconds(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) and kind.unit == "ns")


def sha256(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
