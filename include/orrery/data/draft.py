"""Draft the `checks` of a spec from data that are there: a start for a person to correct, never a truth.

Every bound has slack, for the next partition is not this one; a check that the data themselves break is
not proposed.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orrery.data import files, snapshot
from orrery.data.families import families
from orrery.data.rules import missing, repeats
from orrery.errors import OrreryError
from orrery.spec import COLUMN, Checks

SMALL_SET = 20  # values
PER_VALUE = 20  # rows that each value of a set must have on average: fewer are rather a coincidence
RANGE_SLACK = 0.5  # of the width seen, to each side that is not zero
NULL_SLACK = 2.0  # times the share seen
ROWS_SLACK = 0.5  # of the smallest partition seen


def draft(sources: Mapping[str, Sequence[Path | str]]) -> dict[str, Any]:
    """Return `checks` in the spec's short form; the first source is the rows' source, its checks lie flat.

    `sources` maps each source to one or more files or URIs, each a partition. Raises what `files.read` raises.
    """
    out: dict[str, Any] = {}
    for place, (name, uris) in enumerate(sources.items()):
        found = checks_of([read(str(uri)) for uri in uris], reserved=set(sources))
        if place == 0:
            out |= found
        elif found:
            out[name] = found
    return out


def read(uri: str) -> pa.Table:
    """Read a whole file of a source, its types as `ingest` makes them."""
    with files.read(uri, None) as stream:
        schema = snapshot.normal_schema(stream.schema, uri)
        return pa.Table.from_batches([snapshot.cast(batch, schema) for batch in stream.batches], schema)


def checks_of(partitions: Sequence[pa.Table], reserved: Iterable[str] = ()) -> dict[str, Any]:
    """Return the drafted checks of one source from some of its partitions; `reserved`: names of sources."""
    table = pa.concat_tables(partitions, promote_options="permissive")
    if table.num_rows == 0:
        return {}
    key = _key(table)
    named = key and all(map(nameable, key))
    out: dict[str, Any] = {"unique": key[0] if len(key) == 1 else key} if named else {}
    out["min_rows"] = round_down(min(t.num_rows for t in partitions) * ROWS_SLACK)
    own = {*Checks.model_fields, *reserved}
    for name in table.column_names:
        found = _column(table[name], is_key=name in key, fixed=all(_one_value(t, name) for t in partitions))
        if not found or not nameable(name):
            continue
        if name in own:  # the name means something else there
            out.setdefault("columns", {})[name] = found
        else:
            out[name] = found
    return out


def nameable(column: str) -> bool:
    """Tell whether a spec can name the column: a space or a dash in it would be refused by `orrery check`."""
    return re.fullmatch(COLUMN, column, flags=re.ASCII) is not None


def _key(table: pa.Table) -> list[str]:
    """Return the column, or pair of columns, that names a row: never missing, never repeated; text first."""
    fit = [n for n in table.column_names if not missing(table[n]).any() and _may_be_key(table[n].type)]
    fit.sort(key=lambda n: (not _sounds_like_key(n), table.column_names.index(n)))
    for name in fit:
        if not repeats(table, [name]).any():
            return [name]
    for first in fit:
        for second in fit[fit.index(first) + 1 :]:
            if (
                "timestamp" in families(table[first].type) | families(table[second].type)
                and not repeats(table, [first, second]).any()
            ):
                return sorted((first, second), key=table.column_names.index)
    return []


def _may_be_key(kind: pa.DataType) -> bool:
    return bool(families(kind) & {"string", "integer", "timestamp"})


def _sounds_like_key(name: str) -> bool:
    return name.lower() in ("id", "key", "uuid") or name.lower().endswith(("_id", "_key", "_uuid"))


def _one_value(table: pa.Table, name: str) -> bool:
    return name not in table.column_names or len(pc.unique(table[name])) <= 1


def _column(column: pa.ChunkedArray, *, is_key: bool, fixed: bool) -> dict[str, Any]:
    """Return one column's checks; `fixed`: it says which partition it is, so its values tell nothing of the next."""
    gone = missing(column)
    share = float(gone.mean())
    there = column.filter(pa.array(~gone))
    kinds = families(column.type)
    found: dict[str, Any] = {}
    if kinds:
        found["type"] = "integer" if "integer" in kinds and share == 0 else min(kinds - {"integer"})
    if share == 0 and not is_key:
        found["required"] = True
    elif 0 < share * NULL_SLACK < 1:
        found["nulls"] = round_up(share * NULL_SLACK, digits=1)
    if is_key or fixed or not len(there):
        return found
    values = _small_set(there)
    if values is not None:
        found["in"] = values
    elif "number" in kinds:
        seen = bounds(pc.min_max(pc.cast(there, pa.float64())).as_py())
        found |= {"between": seen} if seen else {}
    return found


def _small_set(values: pa.ChunkedArray) -> list[Any] | None:
    """Return the values of a column of names, when they are few and each is common enough to be a kind."""
    if not families(values.type) & {"string"}:
        return None
    different = pc.unique(values)
    if len(different) > SMALL_SET or len(values) < PER_VALUE * len(different):
        return None
    return sorted(different.to_pylist())


def bounds(seen: Mapping[str, float]) -> list[float | int] | None:
    """Return [low, high] around what was seen, rounded outward; a column that is never negative stays so."""
    low, high = seen["min"], seen["max"]
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    slack = (high - low or abs(high) or 1.0) * RANGE_SLACK
    bottom = 0.0 if low >= 0 else -round_up(slack - low, digits=2)
    top = 0.0 if high <= 0 and low < 0 else round_up(high + slack, digits=2) if high + slack > 0 else 0.0
    return [_short(bottom), _short(top)]


def round_up(value: float, digits: int) -> float:
    """Round a positive number up to some significant digits: 0.0231 to 0.03, 5123 to 6000."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(round(value / step, 9)) * step:.12g}")


def round_down(value: float) -> int:
    """Round a count down to one significant digit: 13502 to 10000."""
    if value < 1:
        return 0
    step = 10 ** math.floor(math.log10(value))
    return int(value // step * step)


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else value


def main(document: str) -> int:
    """Print, as JSON, the drafted checks, each source's columns with their families, and those that got no check.

    `document`: {source: URI}.
    """
    sources: dict[str, str] = json.loads(document)
    try:
        tables = {name: read(uri) for name, uri in sources.items()}
        checks = draft({name: [uri] for name, uri in sources.items()})
    except OrreryError as e:
        sys.stderr.write(f"{e}\n")
        return e.exit_code
    columns = {
        name: {f.name: min(families(f.type), default="other") for f in table.schema} for name, table in tables.items()
    }
    odd = {name: [c for c in found if not nameable(c)] for name, found in columns.items()}
    left_out = {name: found for name, found in odd.items() if found}
    sys.stdout.write(json.dumps({"checks": checks, "columns": columns, "left_out": left_out}, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
