"""What is known about a flight one hour before it is due to leave.

The label says whether it arrives more than 15 minutes behind schedule. Nothing that happens to the flight
itself (dep_time, dep_delay, arr_time, arr_delay, arrived, air_time) may become a feature. What happened to EARLIER
flights may, from the moment it was known: the views below emit one row for each such moment.

Times are instants in UTC; delays are minutes, clipped; a minute of day is 0..1439, New York time, as in
the timetable. Trailing means are named <what>_<hours>h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from orrery.features import derive, rows, view

PREDICTION_LEAD = pd.Timedelta(hours=1)
LATE_MINUTES = 15
# From the gate to the reader: the aircraft or the ramp reports, a carrier's system passes it on. Minutes in
# practice; ten are on the safe side.
ARRIVAL_REPORTED_AFTER = pd.Timedelta(minutes=10)
# A report named 14:00 is read within that hour (mostly at 14:51): known when the hour is over.
WEATHER_REPORTED_AFTER = pd.Timedelta(hours=1)
# One flight that is ten hours behind must not drown the forty others in a three-hour mean.
SHORTEST_DELAY, LONGEST_DELAY = -30.0, 180.0
WEEKDAYS = np.array(["mon", "tue", "wed", "thu", "fri", "sat", "sun"])


@rows
def flights(raw: pa.Table) -> pa.Table:
    """One row per flight. label: 1.0 late, 0.0 not, null when it was cancelled or diverted."""
    frame = _flights(raw)
    arrives = frame["arr_delay"].notna() & frame["arrived"].notna()
    day = pd.to_datetime(frame[["year", "month", "day"]])
    return _table(
        {
            "key": frame["flight_id"],
            "prediction_time": frame["scheduled_departure"] - PREDICTION_LEAD,
            "label": (frame["arr_delay"] > LATE_MINUTES).astype("float64").where(arrives),
            "label_time": frame["arrival_known"].where(arrives),
            "origin": frame["origin"],
            "dest": frame["dest"],
            "carrier": frame["carrier"],
            # Names, not numbers: the model learns one vector per day. No day of year: it would not extrapolate.
            "weekday": WEEKDAYS[day.dt.weekday],
            "distance": frame["distance"].astype("float64"),
            "departure_minute": _minute_of_day(frame["sched_dep_time"]),
            "arrival_minute": _minute_of_day(frame["sched_arr_time"]),
        }
    )


@view(on=["origin"], ttl="3h")
def weather(raw: pa.Table) -> pa.Table:
    """Give the last hourly report of the origin airport.

    Units: humid %, wind mph, precip log(1 + hundredths of an inch), visib miles, pressure hPa.

    No temperature: it tells the season first of all, and a model that saw only winter reads July wrongly.
    """
    frame = raw.to_pandas()
    return _table(
        {
            "origin": frame["origin"],
            "event_time": frame["time_hour"],
            "available_time": frame["time_hour"] + WEATHER_REPORTED_AFTER,
            "humid": frame["humid"],
            # Beyond hurricane force the sensor is wrong, not the wind (1048 mph in February 2013).
            "wind_speed": frame["wind_speed"].where(frame["wind_speed"] <= 100),
            # No gust is reported when there is none.
            "wind_gust": frame["wind_gust"].fillna(0.0),
            "precip": np.log1p(100 * frame["precip"]),
            "visib": frame["visib"],
            "pressure": frame["pressure"],
        }
    )


@view(on=["origin"], ttl="12h", source="flights")
def origin_departures(raw: pa.Table) -> pa.Table:
    """How punctually the origin airport dispatches: share overdue by 15 min, mean departure delay."""
    frame = _flights(raw)
    overdue, very_overdue = _overdue(frame, 15), _overdue(frame, 60)
    return _trailing(
        frame,
        on=["origin"],
        columns={
            "overdue_1h": (overdue, 1),
            "overdue_3h": (overdue, 3),
            "overdue_24h": (overdue, 24),
            "very_overdue_3h": (very_overdue, 3),
            "delay_3h": (_departure_delay(frame), 3),
        },
    )


@view(on=["origin"], ttl="12h", source="flights")
def origin_arrivals(raw: pa.Table) -> pa.Table:
    """How the flights of the origin airport ended: mean arrival delay, and what they lost after leaving the gate."""
    frame = _flights(raw)
    delay = _arrival_delay(frame)
    return _trailing(
        frame,
        on=["origin"],
        columns={"delay_3h": (delay, 3), "delay_24h": (delay, 24), "lost_3h": (_lost_after_departure(frame), 3)},
    )


@view(on=["origin", "carrier"], ttl="12h", source="flights")
def carrier_here(raw: pa.Table) -> pa.Table:
    """How this carrier does at this airport: share overdue by 15 min, mean arrival delay."""
    frame = _flights(raw)
    overdue = _overdue(frame, 15)
    return _trailing(
        frame,
        on=["origin", "carrier"],
        columns={
            "overdue_3h": (overdue, 3),
            "overdue_24h": (overdue, 24),
            "delay_3h": (_arrival_delay(frame), 3),
        },
    )


@view(on=["dest"], ttl="24h", source="flights")
def destination(raw: pa.Table) -> pa.Table:
    """How flights to this destination do: mean arrival delay, share overdue by 15 min (a ground stop there)."""
    frame = _flights(raw)
    delay = _arrival_delay(frame)
    return _trailing(
        frame,
        on=["dest"],
        columns={"delay_3h": (delay, 3), "delay_24h": (delay, 24), "overdue_3h": (_overdue(frame, 15), 3)},
    )


@view(on=["origin", "dest", "carrier"], ttl="3d", source="flights")
def route(raw: pa.Table) -> pa.Table:
    """How this carrier did on this route: mean arrival delay over a day and over two weeks."""
    frame = _flights(raw)
    delay = _arrival_delay(frame)
    return _trailing(
        frame,
        on=["origin", "dest", "carrier"],
        columns={"delay_24h": (delay, 24), "delay_336h": (delay, 14 * 24)},
    )


@derive
def calendar(rows: pa.Table) -> pa.Table:
    """Hour of departure, as a name and as a point on the clock's circle (23:59 is next to 00:00)."""
    minute = rows["departure_minute"].to_numpy()
    turn = 2 * np.pi * minute / 1440
    hour = [f"h{hour:02d}" for hour in (minute // 60).astype(int)]
    rows = rows.append_column("departure_hour", pa.array(hour, pa.string()))
    rows = rows.append_column("departure_sin", pa.array(np.sin(turn)))
    return rows.append_column("departure_cos", pa.array(np.cos(turn)))


# -- what is known, and since when -------------------------------------------------------------------


def _flights(raw: pa.Table) -> pd.DataFrame:
    """Return the raw rows with when each end of the flight was known: `departed`, `arrival_known`; null for never.

    A departure is seen by the airport that predicts, at once; an arrival is reported from elsewhere.
    """
    frame: pd.DataFrame = raw.to_pandas()
    frame["departed"] = frame["scheduled_departure"] + _minutes(frame["dep_delay"])
    frame["arrival_known"] = frame["arrived"] + ARRIVAL_REPORTED_AFTER
    return frame


def _departure_delay(frame: pd.DataFrame) -> pd.DataFrame:
    return _known(frame["departed"], frame["dep_delay"].clip(SHORTEST_DELAY, LONGEST_DELAY))


def _arrival_delay(frame: pd.DataFrame) -> pd.DataFrame:
    return _known(frame["arrival_known"], frame["arr_delay"].clip(SHORTEST_DELAY, LONGEST_DELAY))


def _lost_after_departure(frame: pd.DataFrame) -> pd.DataFrame:
    """Minutes lost between gate and gate: queues before take-off, holding, head wind."""
    return _known(frame["arrival_known"], (frame["arr_delay"] - frame["dep_delay"]).clip(-60, 120))


def _overdue(frame: pd.DataFrame, minutes: int) -> pd.DataFrame:
    """1.0 for a flight that has not left `minutes` after schedule, 0.0 for one that left before.

    Known at the departure, or at schedule + `minutes` when it is still there by then. Delays of flights
    that did leave miss those that are stuck, and these are the news: a cancelled flight counts as stuck.
    """
    waited = frame["dep_delay"].fillna(np.inf).clip(upper=minutes)
    return _known(frame["scheduled_departure"] + _minutes(waited), (waited >= minutes).astype("float64"))


def _known(since: pd.Series, value: pd.Series) -> pd.DataFrame:
    """Facts, one per flight (same index): `value`, and the instant `known` since when anyone could have it."""
    return pd.DataFrame({"known": since, "value": value}).dropna()


# -- trailing means ----------------------------------------------------------------------------------


def _trailing(frame: pd.DataFrame, on: Sequence[str], columns: Mapping[str, tuple[pd.DataFrame, int]]) -> pa.Table:
    """Emit, per group `on`, one row at each instant when something became known: every column's mean as of then.

    A column is (facts, hours): the mean over the facts known in (instant - hours, instant], null when there is none.
    """
    groups = frame.groupby(list(on), sort=False).ngroup()
    facts = {id(each): each.assign(group=groups.loc[each.index]) for each, _ in columns.values()}
    moments = pd.concat([each[["group", "known"]] for each in facts.values()]).drop_duplicates()
    # A flight with no value in an `on` column (group -1) belongs to nobody's mean.
    moments = moments[moments["group"] >= 0]
    first = frame[list(on)].groupby(groups).first()
    emitted: dict[str, object] = {name: first[name].loc[moments["group"]].to_numpy() for name in on}
    emitted |= {"event_time": moments["known"].array, "available_time": moments["known"].array}
    for name, (each, hours) in columns.items():
        emitted[name] = _window_mean(facts[id(each)], moments, hours)
    return _table(emitted)


def _window_mean(facts: pd.DataFrame, moments: pd.DataFrame, hours: int) -> npt.NDArray[np.float64]:
    """Mean value per moment, over the facts of its group that became known in (moment - hours, moment]."""
    start = min(facts["known"].min(), moments["known"].min())
    order, ends = _positions(facts, start), _positions(moments, start)
    sort = np.argsort(order, kind="stable")
    order = order[sort]
    total = np.concatenate([[0.0], np.cumsum(facts["value"].to_numpy()[sort])])
    last = np.searchsorted(order, ends, side="right")
    before = np.searchsorted(order, ends - hours * 60, side="right")
    count = last - before
    return np.where(count > 0, (total[last] - total[before]) / np.maximum(count, 1), np.nan)


def _positions(table: pd.DataFrame, start: pd.Timestamp) -> npt.NDArray[np.int64]:
    """One number per row that sorts by group, then by minute; groups lie further apart than any window reaches."""
    minutes = ((table["known"] - start) // pd.Timedelta(minutes=1)).to_numpy(np.int64)
    return table["group"].to_numpy(np.int64) * 10_000_000 + minutes


def _minute_of_day(clock: pd.Series) -> pd.Series:
    """517 is 5:17 in the timetable: minute 317."""
    return (clock // 100 * 60 + clock % 100).astype("float64")


def _minutes(count: pd.Series) -> pd.Series:
    # pandas rounds what lies in memory where a NaN is, and may warn of an overflow there: give it none.
    minutes: pd.Series = pd.to_timedelta(count.fillna(0), unit="min")
    return minutes.where(count.notna())


def _table(columns: Mapping[str, object]) -> pa.Table:
    """Arrow table; NaN becomes null, times become UTC microseconds."""
    table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
    utc = pa.timestamp("us", tz="UTC")
    fields = [field.with_type(utc) if pa.types.is_timestamp(field.type) else field for field in table.schema]
    return table.cast(pa.schema(fields)).replace_schema_metadata(None)
