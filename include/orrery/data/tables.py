"""Committed tables: reading them, sampling them by key, and writing Parquet that is the same bytes each time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orrery.store import trouble

ROW_GROUP = 50_000
# The reserved columns of a features table; every other column whose name does not begin with `_` is a feature.
KEY, PREDICTION_TIME, LABEL, LABEL_TIME = "key", "prediction_time", "label", "label_time"
RESERVED = (KEY, PREDICTION_TIME, LABEL, LABEL_TIME)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table with fixed settings: equal tables become equal bytes (of one pyarrow version)."""
    with trouble(str(path)):
        pq.write_table(table.replace_schema_metadata(None), path, compression="zstd", row_group_size=ROW_GROUP)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a committed Parquet file."""
    return pq.read_table(path, columns=columns, memory_map=True)


def sample(table: pa.Table, share: float, column: str = KEY) -> pa.Table:
    """Return the rows whose key's hash falls below `share` (0 to 1): the same rows on every machine and each time."""
    if share >= 1:
        return table
    bound = int(share * 2**32)
    keep = [
        int.from_bytes(hashlib.blake2b(str(k).encode(), digest_size=4).digest(), "big") < bound
        for k in table[column].to_pylist()
    ]
    return table.filter(pa.array(keep))
