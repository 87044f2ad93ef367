"""The time split: no row in two parts, the parts in order, and nothing trained on before its label was known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orrery.errors import DataError
from orrery.spec import Split
from orrery.training.split import Parts, split

START = datetime(2013, 1, 1, tzinfo=UTC)
STAMP = pa.timestamp("us", tz="UTC")


def table(hours: list[int], labels: list[float | None], delays: list[int | None]) -> pa.Table:
    times = [START + timedelta(hours=h) for h in hours]
    known = [None if d is None else t + timedelta(hours=d) for t, d in zip(times, delays, strict=True)]
    return pa.table(
        {
            "key": [str(i) for i in range(len(hours))],
            "prediction_time": pa.array(times, STAMP),
            "label": pa.array(labels, pa.float64()),
            "label_time": pa.array(known, STAMP),
        }
    )


ROW = st.tuples(
    st.integers(0, 300),
    st.one_of(st.none(), st.floats(-5, 5), st.just(float("nan"))),
    st.one_of(st.none(), st.integers(0, 30)),
)


@given(st.lists(ROW, min_size=1, max_size=60), st.floats(0.05, 0.45), st.floats(0.05, 0.45))
def test_parts_are_disjoint_ordered_and_purged(
    rows: list[tuple[int, float | None, int | None]], tune: float, holdout: float
) -> None:
    given_table = table([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    try:
        parts = split(given_table, Split(tune=tune, holdout=holdout), "regression")
    except DataError:
        return
    keys = [parts.fit["key"].to_pylist(), parts.tune["key"].to_pylist(), parts.holdout["key"].to_pylist()]
    flat = [k for part in keys for k in part]
    assert len(flat) == len(set(flat))
    assert len(flat) + parts.unlabelled + parts.purged == len(rows)
    assert parts.tune_start < parts.holdout_start
    assert (
        pc.max(parts.fit["prediction_time"]).as_py() < parts.tune_start <= pc.min(parts.tune["prediction_time"]).as_py()
    )
    assert (
        pc.max(parts.tune["prediction_time"]).as_py()
        < parts.holdout_start
        <= pc.min(parts.holdout["prediction_time"]).as_py()
    )
    for part, end in ((parts.fit, parts.tune_start), (parts.tune, parts.holdout_start)):
        assert part["label_time"].null_count == 0
        assert pc.max(part["label_time"]).as_py() <= end
    for part in (parts.fit, parts.tune, parts.holdout):
        assert not pc.any(pc.is_null(part["label"], nan_is_null=True)).as_py()


def even(n: int = 100, **options: int) -> Parts:
    delay = options.get("delay", 1)
    return split(
        table(list(range(n)), [float(i % 2) for i in range(n)], [delay] * n), Split(tune=0.1, holdout=0.2), "binary"
    )


def test_shares_and_bounds() -> None:
    parts = even()
    assert parts.bounds == {"tune_start": "2013-01-03T22:00:00+00:00", "holdout_start": "2013-01-04T08:00:00+00:00"}
    assert parts.counts == {"fit": 70, "tune": 10, "holdout": 20, "unlabelled": 0, "purged": 0}


def test_a_label_known_too_late_is_purged_from_fit_and_tune_but_not_from_the_holdout() -> None:
    parts = even(delay=3)  # a label known exactly when the next part begins stays
    assert parts.counts == {"fit": 68, "tune": 8, "holdout": 20, "unlabelled": 0, "purged": 4}


def test_rows_in_another_order_make_the_same_parts() -> None:
    one = table(list(range(50)), [1.0, 0.0] * 25, [1] * 50)
    other = one.take(list(reversed(range(50))))
    parts, again = (split(t, Split(), "binary") for t in (one, other))
    assert parts.bounds == again.bounds
    assert set(parts.holdout["key"].to_pylist()) == set(again.holdout["key"].to_pylist())


def test_naive_times_are_read_as_utc() -> None:
    aware = table(list(range(20)), [1.0, 0.0] * 10, [0] * 20)
    naive = aware.set_column(1, "prediction_time", aware["prediction_time"].cast(pa.timestamp("us")))
    assert (
        split(naive, Split(tune=0.2, holdout=0.2), "binary").bounds
        == split(aware, Split(tune=0.2, holdout=0.2), "binary").bounds
    )


@pytest.mark.parametrize(
    ("hours", "labels", "delays", "says"),
    [
        ([1, 2, 3], [None, None, float("nan")], [1, 1, 1], "none of the window's 3 rows has a label"),
        ([5] * 20, [1.0, 0.0] * 10, [1] * 20, "the fit part has no rows"),
        (list(range(20)), [1.0, 0.0] * 10, [500] * 20, "the fit part has no rows"),
        (list(range(20)), [1.0] * 20, [0] * 20, "every label of the window is 1.0"),
        (list(range(20)), [1.0, 0.0] * 8 + [1.0] * 4, [0] * 20, "the holdout part has no row labelled 0.0"),
    ],
)
def test_what_cannot_be_split_is_refused(
    hours: list[int], labels: list[float | None], delays: list[int | None], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        split(table(hours, labels, delays), Split(tune=0.2, holdout=0.2), "binary")


def test_a_row_without_prediction_time_is_refused() -> None:
    broken = table([1, 2, 3], [1.0, 0.0, 1.0], [1, 1, 1])
    broken = broken.set_column(1, "prediction_time", pa.array([None, START, START], STAMP))
    with pytest.raises(DataError, match="1 rows have no prediction_time"):
        split(broken, Split(), "binary")


def test_a_class_that_only_the_later_parts_have_is_refused() -> None:
    labels = pa.array(["a", "b"] * 8 + ["c"] * 4)
    rows = table(list(range(20)), [0.0] * 20, [0] * 20).set_column(2, "label", labels)
    with pytest.raises(DataError, match="the fit part has no row labelled c"):
        split(rows, Split(tune=0.1, holdout=0.15), "multiclass")
