"""`ingest`: keep what upstream holds for one partition, so that nothing later depends on upstream any more.

Every source becomes one normalised Parquet file. The address is a digest over the content: the same data
are the same snapshot, however often they are read, and a partition that landed again is a new one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from orrery import fingerprint, partitions
from orrery.contract import IngestParams, Result, SourceRef
from orrery.data import files, snapshot
from orrery.errors import DataError, RequestError
from orrery.step import Work
from orrery.store import trouble


@dataclass(frozen=True)
class Snapshot:
    """One source, written apart."""

    path: Path
    rows: int
    size: int
    sha256: str
    schema: pa.Schema


def run(work: Work, params: IngestParams) -> Result:
    """Snapshot every source of the partition. Raises what `files.read` and `sql.read` raise, and `DataError`."""
    taken: dict[str, Snapshot] = {}
    with work.progress("ingest", len(params.sources), "sources") as tick:
        for name, ref in params.sources.items():
            taken[name] = _take(work, name, ref)
            tick()
    warnings = _refuse_empty(work, params, taken)
    with work.at(address(work.config.key, taken)) as fresh:
        if fresh:
            for name, one in taken.items():
                target = work.path(f"{name}.parquet")
                with trouble(str(target)):
                    shutil.move(one.path, target)
    return Result(
        reasons=warnings,
        metrics={f"rows_{name}": float(one.rows) for name, one in taken.items()},
        facts={name: _facts(one) for name, one in taken.items()},
    )


def address(key: str, taken: dict[str, Snapshot]) -> str:
    """Return where a partition's snapshot lies: a digest over its key and the content of its sources."""
    return fingerprint.digest({"key": key, "sources": {name: one.sha256 for name, one in taken.items()}})[:32]


def _take(work: Work, name: str, ref: SourceRef) -> Snapshot:
    where = f"source {name} ({ref.uri or ref.table})"
    path = work.scratch / "snapshot" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open(work, name, ref) as stream:
        schema = snapshot.normal_schema(stream.schema, where)
        rows = snapshot.write(stream.batches, schema, path)
    work.log.info("read", source=name, rows=rows, columns=len(schema))
    return Snapshot(path, rows, path.stat().st_size, snapshot.sha256(path), schema)


@contextlib.contextmanager
def _open(work: Work, name: str, ref: SourceRef) -> Iterator[files.Stream]:
    if ref.uri is not None:
        with files.read(ref.uri, ref.format) as stream:
            yield stream
        return
    if not (ref.table and ref.time_column and ref.secret_env):
        raise RequestError(f"source {name} needs a uri, or table, time_column and secret_env")
    from orrery.data import sql

    bounds = partitions.bounds(work.config.key, work.spec.grain)
    with sql.read(ref.secret_env, ref.table, ref.time_column, bounds) as stream:
        yield stream


def _refuse_empty(work: Work, params: IngestParams, taken: dict[str, Snapshot]) -> list[str]:
    """Return a warning for each source without rows. Raises `DataError` when it is the rows' source."""
    empty = [name for name, one in taken.items() if one.rows == 0]
    for name in empty:
        ref = params.sources[name]
        said = f"source {name} has 0 rows for {work.config.key} ({ref.uri or ref.table})"
        if name == work.spec.rows_source:
            raise DataError(said, hint="nothing can be predicted on: check upstream, then run ingest again")
        work.log.warning(said)
    return [f"source {name} has 0 rows" for name in empty]


def _facts(one: Snapshot) -> dict[str, object]:
    return {
        "rows": one.rows,
        "bytes": one.size,
        "columns": {field.name: str(field.type) for field in one.schema},
    }
