from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from features_house import at, flights, view, weather
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from orrery.errors import DataError
from orrery.features.definitions import View
from orrery.features.join import join
from orrery.features.known import latest_known
from orrery.features.shapes import view_table

MICROSECOND = 1 / 3.6e9


def joined(rows: pa.Table, *views: tuple[View, pa.Table]) -> pa.Table:
    known = []
    for each, table in views:
        as_written = dataclasses.replace(each, function=lambda _, table=table: table)
        known.append((each, latest_known(each, view_table(as_written, table))))
    with TemporaryDirectory() as folder:
        return join(rows, known, Path(folder) / "feast")


def winds(rows: pa.Table, table: pa.Table, ttl: str = "2h") -> list[Any]:
    return joined(rows, (view(ttl=ttl), table))["weather__wind"].to_pylist()


def test_each_row_is_given_what_was_known_at_its_time() -> None:
    table = weather(("JFK", 8, 9, 8.0), ("JFK", 9, 10, 9.0), ("JFK", 10, 11, 10.0), ("LGA", 9, 10, 90.0))
    rows = flights(("JFK", 10.5), ("JFK", 9.5), ("LGA", 10.5), ("EWR", 10.5), ("JFK", 8.5), ("JFK", 11.5))
    # The report of 10 o'clock is out at 11: a join that looked one hour ahead would find 10.0 for the first row.
    assert winds(rows, table) == [9.0, 8.0, 90.0, None, None, 10.0]


@pytest.mark.parametrize("ttl", ["90s", "2h", "36h", "3d"])
def test_a_value_is_seen_from_its_instant_until_just_before_it_is_as_old_as_the_ttl(ttl: str) -> None:
    hours = view(ttl=ttl).ttl_us * MICROSECOND
    table = weather(("JFK", 10, 10, 1.0))
    ends = (10 - MICROSECOND, 10.0, 10 + hours - MICROSECOND, 10 + hours)
    assert winds(flights(*[("JFK", e) for e in ends]), table, ttl) == [None, 1.0, 1.0, None]


def test_an_expired_value_does_not_bring_an_older_one_back() -> None:
    table = weather(("JFK", 1, 1, 1.0), ("JFK", 9, 9, 9.0))
    assert winds(flights(("JFK", 10.5), ("JFK", 11.5)), table, "2h") == [9.0, None]


def test_a_missing_value_that_is_the_latest_known_stays_missing() -> None:
    assert winds(flights(("JFK", 10)), weather(("JFK", 8, 9, 8.0), ("JFK", 9, 9.5, None))) == [None]


def test_a_late_report_is_not_seen() -> None:
    assert winds(flights(("JFK", 4.5)), weather(("JFK", 2, 3, 20.0), ("JFK", 1, 4, 10.0))) == [20.0]


def test_rows_alike_in_all_but_their_key_each_get_their_value() -> None:
    assert winds(flights(("JFK", 4), ("JFK", 4), ("JFK", 4)), weather(("JFK", 3, 3, 3.0))) == [3.0, 3.0, 3.0]


def test_names_that_feast_or_duckdb_would_lose_come_through() -> None:
    table = weather(("JFK", 3, 3, 3.0), column="wind_y")
    for i, name in enumerate(("Wind", "wind", "event_timestamp", "row", "available", "entity_row_id")):
        table = table.append_column(name, pa.array([float(i)]))
    found = joined(flights(("JFK", 4)), (view(), table)).to_pylist()[0]
    assert [found[f"weather__{n}"] for n in ("wind_y", "Wind", "wind", "row", "entity_row_id")] == [
        3.0,
        0.0,
        1.0,
        3.0,
        5.0,
    ]


def test_types_come_back_as_they_went_in() -> None:
    table = weather(("JFK", 3, 3, 3.0), ("LGA", 3, 3, None))
    table = table.append_column("count", pa.array([2**60 + 1, None], pa.int64()))
    table = table.append_column("fog", pa.array([True, None])).append_column("sky", pa.array(["grey", None]))
    found = joined(flights(("JFK", 4), ("LGA", 4), ("EWR", 4)), (view(), table))
    assert found["weather__count"].to_pylist() == [2**60 + 1, None, None]
    assert [str(found.schema.field(f"weather__{n}").type) for n in ("wind", "count", "fog", "sky")] == [
        "double", "int64", "bool", "string",
    ]  # fmt: skip
    assert found["weather__sky"].to_pylist() == ["grey", None, None]


def test_keys_may_be_integers_and_may_be_missing() -> None:
    table = pa.table(
        {
            "gate": pa.array([7, 8, None]),
            "event_time": [at(1)] * 3,
            "available_time": [at(1)] * 3,
            "busy": [0.7, 0.8, 0.9],
        }
    )
    rows = flights(("JFK", 2), ("JFK", 2), ("JFK", 2)).append_column("gate", pa.array([8, None, 7], pa.int32()))
    found = joined(rows, (view("gates", ("gate",)), table))
    assert found["gates__busy"].to_pylist() == [0.8, None, 0.7]


def test_two_keys_do_not_run_together() -> None:
    keys = [("a", "bc"), ("ab", "c")]
    times = {"event_time": [at(1)] * 2, "available_time": [at(1)] * 2}
    table = pa.table({"x": [k[0] for k in keys], "y": [k[1] for k in keys], **times, "v": [1.0, 2.0]})
    rows = flights(("JFK", 2), ("JFK", 2))
    rows = rows.append_column("x", pa.array(["ab", "a"])).append_column("y", pa.array(["c", "bc"]))
    assert joined(rows, (view("pairs", ("x", "y")), table))["pairs__v"].to_pylist() == [2.0, 1.0]


def test_a_view_without_rows_gives_missing_values() -> None:
    found = joined(flights(("JFK", 2)), (view(), weather()))
    assert found["weather__wind"].to_pylist() == [None] and found.schema.field("weather__wind").type == pa.float64()


ONE = weather(("JFK", 1, 1, 1.0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (flights(("JFK", 2)).drop_columns(["origin"]), "joined on 'origin', which the rows do not have"),
        (flights(("JFK", 2)).set_column(2, "origin", pa.array([1])), "'origin' is string, in the rows it is int64"),
        (flights(("JFK", 2)).append_column("weather__wind", pa.array([1])), "two features 'weather__wind'"),
    ],
)
def test_sides_that_do_not_fit_are_refused(rows: pa.Table, message: str) -> None:
    with pytest.raises(DataError, match=message):
        joined(rows, (view(), ONE))


def expected(rows: pa.Table, the_view: View, table: pa.Table, column: str) -> list[float | None]:
    """The same by pandas' merge_asof, written without any of our code."""
    frame = table.to_pandas().sort_values(["available_time", "event_time"], kind="stable")
    frame = frame.drop_duplicates([*the_view.on, "available_time"], keep="last")
    frame = frame[frame.groupby(list(the_view.on))["event_time"].cummax() == frame["event_time"]]
    left = rows.to_pandas().reset_index().sort_values("prediction_time", kind="stable")
    found = pd.merge_asof(left, frame, left_on="prediction_time", right_on="available_time", by=list(the_view.on))
    fresh = found["prediction_time"] - found["available_time"] < pd.Timedelta(the_view.ttl_us, "us")
    values = found[column].where(fresh).set_axis(found["index"]).sort_index()
    return [None if np.isnan(v) else float(v) for v in values]


def test_it_equals_merge_asof() -> None:
    rng = np.random.default_rng(3)
    n, m = 3000, 4000
    origins, carriers = np.array(["JFK", "LGA", "EWR"]), np.array(list("ABCDEFGH"))
    rows = flights(*zip(origins[rng.integers(0, 3, n)], rng.integers(0, 12_000, n) / 20, strict=True))
    rows = rows.append_column("carrier", pa.array(carriers[rng.integers(0, 8, n)]))

    def reports(size: int) -> pa.Table:
        event = rng.integers(-2_000, 12_000, size) / 20
        return weather(
            *zip(
                origins[rng.integers(0, 3, size)],
                event,
                event + rng.integers(0, 100, size) / 20,
                rng.normal(size=size),
                strict=True,
            )
        )

    both = reports(m).append_column("carrier", pa.array(carriers[rng.integers(0, 8, m)]))
    views = [
        (view(ttl="2h"), reports(m)),
        (view("delays", ("origin", "carrier"), "36h"), both),
        (view("rare", ttl="9d"), reports(20)),
    ]
    found = joined(rows, *views)
    for the_view, table in views:
        column = f"{the_view.name}__wind"
        want = expected(rows, the_view, table, "wind")
        assert found[column].to_pylist() == want
        assert 0 < sum(v is not None for v in want) <= n


HOURS = st.integers(0, 48).map(lambda h: h / 4)
REPORTS = st.lists(st.tuples(st.sampled_from(["JFK", "LGA"]), HOURS, HOURS, st.floats(-9, 9)), min_size=1, max_size=12)


# No shrinking: a failure would take minutes to tell, and the examples are small already.
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(REPORTS, REPORTS, HOURS)
def test_changing_the_future_changes_no_feature(past: list[Any], future: list[Any], now: float) -> None:
    """Whatever becomes available after the prediction, also about events before it, leaves the row as it was."""
    ahead = [(o, e, now + MICROSECOND + a, w) for o, e, a, w in future]
    behind = [r for r in past if r[2] <= now]
    # The last row is later than all that changes, so that what it may see is within the join's reach.
    rows = flights(("JFK", now), ("LGA", now), ("JFK", now - 1), ("JFK", now + 30))
    without, with_future = (winds(rows, weather(*reports))[:3] for reports in (behind, behind + ahead))
    assert with_future == without
    assert without == (expected(rows, view(), weather(*behind), "wind")[:3] if behind else [None] * 3)
