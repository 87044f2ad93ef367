"""Partition keys: time as text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orrery import partitions as p
from orrery.errors import RequestError
from orrery.partitions import Grain

GRAINS: tuple[Grain, ...] = get_args(Grain)
moments = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31, 23), timezones=st.just(UTC))
grains = st.sampled_from(GRAINS)
quick = settings(max_examples=60, deadline=None)


@quick
@given(moments, grains)
def test_a_key_is_the_start_of_the_partition_that_holds_the_moment(moment: datetime, grain: Grain) -> None:
    key = p.key_of(moment, grain)
    start = p.parse(key, grain)
    assert p.key_of(start, grain) == key
    assume(moment.year < 9999)
    begin, end = p.bounds(key, grain)
    assert begin == start <= moment < end
    assert p.parse(p.shift(key, grain, 1), grain) == end


@quick
@given(moments, grains, st.integers(-500, 500))
def test_shift_and_back(moment: datetime, grain: Grain, by: int) -> None:
    assume(600 < moment.year < 9400)
    key = p.key_of(moment, grain)
    there = p.shift(key, grain, by)
    assert p.shift(there, grain, -by) == key
    assert (there > key) == (by > 0)


@quick
@given(moments, grains, st.integers(1, 40))
def test_windows(moment: datetime, grain: Grain, length: int) -> None:
    assume(100 < moment.year < 9900)
    last = p.key_of(moment, grain)
    keys = p.window_ending(last, grain, length)
    assert len(keys) == length
    assert keys[-1] == last
    assert list(keys) == sorted(set(keys))
    assert p.window(p.window_name(keys), grain) == keys
    assert all(p.bounds(a, grain)[1] == p.bounds(b, grain)[0] for a, b in pairwise(keys))


def test_leap_days_and_year_ends() -> None:
    assert p.shift("2016-02-28", "day", 1) == "2016-02-29"
    assert p.shift("2013-12", "month", 1) == "2014-01"
    assert p.shift("2013-01", "month", -1) == "2012-12"
    assert p.shift("2013-12-31T23", "hour", 1) == "2014-01-01T00"
    assert p.window("2013-11..2014-02", "month") == ("2013-11", "2013-12", "2014-01", "2014-02")
    assert p.bounds("2013-02", "month")[1] - p.bounds("2013-02", "month")[0] == timedelta(days=28)
    assert p.window("2013-03", "month") == ("2013-03",)


HOSTILE = [
    "", " ", "2013", "2013-3", "2013-13", "2013-00", "0000-01", "2013-03 ", " 2013-03", "2013-03\n", "2013-03\x00",
    "２０１３-０３", "2013-0٣", "٢٠١٣-٠٣", "2013-03/../../x", "../2013-03", "/etc/passwd", "2013-03;id", "$(id)", "`id`",
    "2013-03-01", "-2013-03", "+013-03", "2013−03", "20130-03", "2013-03..2013-04", "{partition}", "latest", "now",
]  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_anything_but_a_key_is_refused(key: str) -> None:
    with pytest.raises(RequestError, match="is not a month") as e:
        p.parse(key, "month")
    assert "2013-03" in e.value.hint


@pytest.mark.parametrize("key", ["2013-02-30", "2013-03-14T24", "2013-03-14 05", "2013-03-14T5", "2013-03-14T05:00"])
@pytest.mark.parametrize("grain", GRAINS)
def test_no_such_day_or_hour(key: str, grain: Grain) -> None:
    with pytest.raises(RequestError):
        p.parse(key, grain)


def test_a_key_that_is_no_text_and_a_huge_one() -> None:
    with pytest.raises(RequestError):
        p.parse(None, "month")  # type: ignore[arg-type]
    with pytest.raises(RequestError) as e:
        p.parse("9" * 100_000, "year")
    assert len(str(e.value)) < 300


@quick
@given(st.text(max_size=20), grains)
def test_no_text_makes_a_traceback(text: str, grain: Grain) -> None:
    try:
        keys = p.window(text, grain)
    except RequestError:
        return
    assert p.window_name(keys).startswith(keys[0])


@pytest.mark.parametrize(
    "text", ["2013-01..", "..2013-01", "..", "2013-02..2013-01", "2013-01..2013-02..2013-03", "a..b"]
)
def test_malformed_windows(text: str) -> None:
    with pytest.raises(RequestError):
        p.window(text, "month")


def test_a_window_too_long() -> None:
    with pytest.raises(RequestError, match="more than 20,000"):
        p.window("0001-01-01T00..9999-12-31T23", "hour")


@pytest.mark.parametrize(
    ("key", "grain", "by"),
    [("0001-01", "month", -1), ("9999-12", "month", 1), ("0001", "year", -1), ("9999", "year", 1),
     ("0001-01-01", "day", -1), ("9999-12-31T23", "hour", 1), ("2013-01-01", "day", 10**12)],
)  # fmt: skip
def test_time_has_ends(key: str, grain: Grain, by: int) -> None:
    with pytest.raises(RequestError):
        p.shift(key, grain, by)
    if by == 1:
        with pytest.raises(RequestError):
            p.bounds(key, grain)
