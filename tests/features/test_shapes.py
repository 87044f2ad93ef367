from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from features_house import TIME, at, flights, labelled, weather

from orrery.bundle import FORKED
from orrery.errors import DataError, UserError
from orrery.features.definitions import Definitions, Derive, Rows, View
from orrery.features.shapes import derived, kinds, plain, rows_table, view_table

GOOD = labelled(flights(("JFK", 1), ("LGA", 2), ("EWR", 3)))
Change = Callable[[pa.Table], pa.Table]


def made(change: Change, task: str = "binary") -> pa.Table:
    return rows_table(Rows("flights", change), GOOD, task)


def put(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def test_good_rows_pass_and_come_out_plain() -> None:
    def more(table: pa.Table) -> pa.Table:
        table = table.append_column("distance", pa.array([1, 2, None], pa.int16()))
        table = table.append_column("wind", pa.array([1.5, float("nan"), 2.0], pa.float32()))
        table = table.append_column("_day", pa.array([at(0)] * 3, TIME))
        return put(table, "origin", table["origin"].dictionary_encode())

    found = made(more)
    assert found.column_names[:4] == ["key", "prediction_time", "label", "label_time"]
    assert found["wind"].to_pylist() == [1.5, None, 2.0]
    assert kinds(found) == {"origin": "categorical", "distance": "numeric", "wind": "numeric"}
    assert found.schema.field("_day").type == TIME


def test_a_column_without_any_value_keeps_no_type() -> None:
    """A float would contradict the text of another partition; a typed column keeps its type."""

    def more(table: pa.Table) -> pa.Table:
        return table.append_column("gate", pa.nulls(3)).append_column("sky", pa.nulls(3, pa.string()))

    found = made(more)
    assert (found.schema.field("gate").type, found.schema.field("sky").type) == (pa.null(), pa.string())
    assert kinds(found) == {"origin": "categorical", "gate": "unknown", "sky": "categorical"}


def test_times_become_utc_microseconds() -> None:
    def local(table: pa.Table) -> pa.Table:
        return put(table, "prediction_time", table["prediction_time"].cast(pa.timestamp("ns", tz="America/New_York")))

    assert made(local)["prediction_time"].equals(GOOD["prediction_time"])


def test_the_label_may_be_unknown() -> None:
    empty = pa.nulls(3)
    found = made(lambda t: put(put(t, "label", empty), "label_time", empty))
    assert (found["label"].null_count, found.schema.field("label").type) == (3, pa.float64())
    assert found.schema.field("label_time").type == TIME


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["label_time"]), "returned no column label_time"),
        (lambda t: t.to_pydict(), r"test_shapes.py:\d+: @rows flights returned dict, not a pyarrow.Table"),
        (lambda t: put(t, "key", pa.array(["a", "b", "a"])), "1 keys are there more than once, such as 'a'"),
        (lambda t: put(t, "key", pa.array(["a", None, "c"])), "1 rows have no key"),
        (lambda t: put(t, "key", pa.array([1.0, 2.0, 3.0])), "key is double"),
        (lambda t: put(t, "prediction_time", pa.array([1, 2, 3])), "prediction_time is int64, not a timestamp"),
        (lambda t: put(t, "prediction_time", t["prediction_time"].cast(pa.timestamp("us"))), "no time zone"),
        (lambda t: put(t, "prediction_time", pa.nulls(3, TIME)), "3 rows have no prediction_time"),
        (lambda t: put(t, "label", pa.array(["yes", "no", "no"])), "label is a string, the task is binary"),
        (lambda t: put(t, "label_time", pa.nulls(3, TIME)), "3 rows have a label but no label_time"),
        (lambda t: put(t, "label_time", pa.array([at(1), at(1.9), at(5)], TIME)), r"1 rows know .*'f1'.*a leak"),
        (lambda t: t.append_column("when", t["label_time"]), "when is timestamp.*features are numbers"),
        (lambda t: t.append_column("origin", t["origin"]), "two columns 'origin'"),
    ],
)
def test_rows_of_another_shape_are_refused(change: Change, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        made(change)
    assert error.value.exit_code == 64


def test_a_function_that_fails_is_the_users_and_the_line_is_told() -> None:
    with pytest.raises(UserError, match=r"test_shapes\.py:\d+: @rows flights: KeyError.*wnid"):
        made(lambda t: t["wnid"])


def test_a_function_that_exits_is_the_users_too() -> None:
    with pytest.raises(UserError, match=r"test_shapes\.py:\d+: @rows flights: SystemExit: 0") as error:
        made(lambda t: sys.exit(0))
    assert error.value.exit_code == 64


@pytest.mark.parametrize("fails", [False, True])
def test_a_fork_in_a_function_ends_where_it_would_come_back(fails: bool) -> None:
    children: list[int] = []

    def forks(table: pa.Table) -> pa.Table:
        child = os.fork()
        if child:
            children.append(child)
        elif fails:
            raise KeyError("wind")
        return table

    before = os.getpid()
    try:
        made(forks)
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == FORKED
    finally:
        if os.getpid() != before:
            os._exit(0)  # as the tests' own process it would go on with all tests, twice


def seen(table: pa.Table, the_view: View | None = None) -> pa.Table:
    the_view = the_view or View("weather", ("origin",), "2h", "weather", lambda t: t)
    return view_table(the_view, table)


def test_rows_that_nobody_can_see_are_left_out() -> None:
    table = weather(("JFK", 1, 1, 1.0), ("LGA", 1, 1, 2.0), ("EWR", 1, 1, 3.0))
    table = put(table, "origin", pa.array(["JFK", None, "EWR"]))
    table = put(table, "available_time", pa.array([at(1), at(1), None], TIME))
    assert seen(table)["wind"].to_pylist() == [1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["available_time"]), "@view weather returned no column available_time"),
        (lambda t: t.drop_columns(["event_time", "origin"]), "returned no column origin, event_time"),
        (lambda t: t.drop_columns(["wind"]), "no column beyond keys and times"),
        (lambda t: put(t, "event_time", pa.nulls(1, TIME)), "1 rows have no event_time"),
        (lambda t: put(t, "available_time", pa.array(["2013"])), "available_time is string, not a timestamp"),
        (lambda t: put(t, "origin", pa.array([1.5])), "origin is a floating point number"),
        (lambda t: put(t, "wind", pa.array([[1.0]])), r"@view weather: wind is list.*\n.*cast it"),
        (lambda t: put(t, "wind", pa.array([timedelta(1)])), "wind is duration"),
        (lambda t: t.append_column("_gust", t["wind"]), "_gust begins with _"),
    ],
)
def test_view_rows_of_another_shape_are_refused(change: Change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        seen(change(weather(("JFK", 1, 1, 1.0))))


def test_a_number_beyond_64_bits_is_refused() -> None:
    with pytest.raises(DataError, match="beyond 64-bit"):
        plain(pa.chunked_array([pa.array([2**63], pa.uint64())]), "x")


def apply(*functions: Change) -> pa.Table:
    derives = tuple(Derive(f"d{i}", f) for i, f in enumerate(functions))
    return derived(Definitions(Rows("flights", lambda t: t), (), derives), made(lambda t: t))


def test_derives_build_on_each_other_and_never_see_the_label() -> None:
    seen_columns: list[list[str]] = []

    def hour(rows: pa.Table) -> pa.Table:
        seen_columns.append(rows.column_names)
        return rows.append_column("hour", pc.hour(rows["prediction_time"]))

    found = apply(hour, lambda rows: rows.append_column("twice", pc.multiply(rows["hour"], 2)))
    assert found["twice"].to_pylist() == [2, 4, 6]
    assert not {"label", "label_time"} & set(seen_columns[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["origin"]), "@derive d0 returned no column origin"),
        (lambda t: t.sort_by([("key", "descending")]), "d0 changed key"),
        (lambda t: t.slice(0, 2), "d0 changed key"),
        (lambda t: t.append_column("label", t["key"]), "other rows, or a label"),
        (
            lambda t: t.append_column("rank", pa.array(range(t.num_rows))),
            "rank of a row changes with the rows beside it",
        ),
        (
            lambda t: t.append_column("share", pa.repeat(1 / t.num_rows, t.num_rows)),
            "share of a row changes with the rows beside it",
        ),
        (
            lambda t: t.append_column("now", pa.repeat(time.time(), t.num_rows)),
            "now of a row is another each time it is computed",
        ),
    ],
)
def test_a_derive_adds_columns_row_by_row_and_nothing_else(change: Change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        apply(change)


def test_a_derive_may_give_nothing_for_a_row() -> None:
    found = apply(lambda t: t.append_column("x", pa.array([None if k == "f0" else k for k in t["key"].to_pylist()])))
    assert found["x"].to_pylist() == [None, "f1", "f2"]
