from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from features_house import at, view, weather

from orrery.features.known import latest_known, latest_of_all, slots


def known(*rows: tuple[str, float, float, float]) -> list[float]:
    return latest_known(view(), weather(*rows))["wind"].to_pylist()


def test_a_late_report_of_an_older_event_tells_nothing_new() -> None:
    # The 2 o'clock report is there at 3; the 1 o'clock report arrives at 4.
    assert known(("JFK", 2, 3, 20.0), ("JFK", 1, 4, 10.0), ("JFK", 3, 5, 30.0)) == [20.0, 30.0]


def test_a_report_is_late_also_behind_one_that_was_itself_followed() -> None:
    assert known(("JFK", 5, 1, 50.0), ("JFK", 2, 2, 20.0), ("JFK", 4, 3, 40.0)) == [50.0]


def test_lateness_is_a_matter_of_one_entity() -> None:
    assert known(("JFK", 2, 3, 20.0), ("LGA", 1, 4, 10.0)) == [20.0, 10.0]


def test_of_reports_at_one_time_the_latest_event_counts_then_the_last() -> None:
    assert known(("JFK", 2, 3, 20.0), ("JFK", 1, 3, 10.0)) == [20.0]
    assert known(("JFK", 1, 3, 10.0), ("JFK", 2, 3, 20.0)) == [20.0]
    assert known(("JFK", 2, 3, 20.0), ("JFK", 2, 3, 21.0)) == [21.0]


def test_a_correction_of_the_same_event_replaces_it_from_when_it_is_there() -> None:
    assert known(("JFK", 2, 4, 21.0), ("JFK", 2, 3, 20.0)) == [20.0, 21.0]


def test_the_order_of_the_rows_does_not_matter() -> None:
    table = weather(*[(o, e, e + lag, e) for o in ("JFK", "LGA") for e in range(6) for lag in (0.5, 3)])
    turned = table.take(pa.array(np.random.default_rng(1).permutation(table.num_rows)))
    assert sorted(latest_known(view(), table).to_pylist(), key=str) == sorted(
        latest_known(view(), turned).to_pylist(), key=str
    )


def test_nothing_known_is_no_trouble() -> None:
    empty = latest_known(view(), weather())
    assert (empty.num_rows, latest_of_all(view(), empty).num_rows, len(slots(view(), empty, 0, 10)[0])) == (0, 0, 0)


def test_the_latest_of_all_is_one_row_an_entity() -> None:
    table = latest_known(
        view(), weather(("JFK", 1, 1, 1.0), ("LGA", 1, 1, 2.0), ("JFK", 3, 3, 3.0), ("LGA", 2, 9, 4.0))
    )
    assert latest_of_all(view(), table).select(["origin", "wind"]).to_pylist() == [
        {"origin": "JFK", "wind": 3.0},
        {"origin": "LGA", "wind": 4.0},
    ]


@pytest.mark.parametrize("ttl", ["30m", "2h", "2d"])
def test_each_time_finds_the_row_that_counts_in_its_own_slot(ttl: str) -> None:
    rng = np.random.default_rng(7)
    hours = np.unique(rng.integers(0, 3000, 60)) / 60
    the_view = view(ttl=ttl)
    table = latest_known(the_view, weather(*[("JFK", float(h), float(h), float(h)) for h in hours]))
    first, last = (int(at(h).timestamp() * 1e6) for h in (10.0, 40.0))
    index, slot, width = slots(the_view, table, first, last)
    available = table["available_time"].cast(pa.int64()).to_numpy()
    for time in np.linspace(first, last, 200).astype(np.int64):
        visible = available[(available <= time) & (available > time - the_view.ttl_us)]
        there = available[index[slot == time // width]]
        assert not len(visible) or visible.max() in there
    assert len(index) < 3 * len(hours)
