"""The one door to a training: recorded once, taken up once, and which windows a calendar asks for."""

from __future__ import annotations

import random
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orrery import requests
from orrery.ledger import Ledger
from orrery.partitions import shift, window_ending, window_name
from orrery.spec import ModelSpec


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


def spec(window: int = 3, **retrain: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "version": 1,
            "kind": "model",
            "owner": "a",
            "task": "binary",
            "label": {"column": "late"},
            "sources": {"rows": {"uri": "file:///x/{partition}.csv", "partition": "month"}},
            "train": {"window": window},
            "retrain": retrain or {"on": ["each"]},
        }
    )


def ask(book: Ledger, source: str = "each", window: str = "2013-01..2013-03", id: str = "once", **more: object):
    values: dict = {"by": "ada", "why": "because", "asked_by": "run-1", **more}
    return requests.submit(book, "p", window=window, source=source, id=id, **values)  # type: ignore[arg-type]


def test_a_request_is_on_record_once_with_who_why_and_window(book: Ledger) -> None:
    first = ask(book, evidence={"health": "p/monitor/x/manifest.json"})
    again = ask(book, by="eve", why="another reason")
    assert first == again
    assert (first.source, first.window, first.by, first.why) == ("each", "2013-01..2013-03", "ada", "because")
    assert first.open and first.evidence == {"health": "p/monitor/x/manifest.json"}
    assert len(book.find("p", "request")) == 1
    assert requests.find(book, "another") == []


def test_an_unknown_source_is_refused(book: Ledger) -> None:
    with pytest.raises(ValueError, match="'moon' is no source"):
        ask(book, source="moon")


def test_one_training_takes_up_all_that_is_open_for_its_window_and_nothing_else(book: Ledger) -> None:
    ask(book), ask(book, source="drift", id="2013-03"), ask(book, source="ui", id="run-7", force=True)
    other = ask(book, window="2013-02..2013-04")
    taken = requests.take(book, "p", "2013-01..2013-03", "train-1")
    assert [r.source for r in taken] == ["each", "drift", "ui"]
    assert all(r.taken_by == "train-1" for r in taken) and taken[2].force
    assert requests.take(book, "p", "2013-01..2013-03", "train-2") == []
    assert [r.key for r in requests.take(book, "p", "2013-01..2013-03", "train-1")] == [r.key for r in taken]
    assert requests.of_run(book, "p", "train-1") == taken
    assert [r for r in requests.find(book, "p") if r.open] == [other]


def test_two_trainings_at_once_never_take_up_the_same_request(book: Ledger) -> None:
    for i in range(20):
        ask(book, source="ui", id=f"run-{i}")
    start, got = threading.Barrier(4), dict[str, list[str]]()

    def take(run: str) -> None:
        start.wait()
        got[run] = [r.key for r in requests.take(book, "p", "2013-01..2013-03", run)]

    threads = [threading.Thread(target=take, args=(f"train-{i}",)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    keys = [key for keys in got.values() for key in keys]
    assert len(keys) == len(set(keys)) == 20


def test_a_training_that_began_after_somebody_asked_serves_them_too(book: Ledger) -> None:
    ask(book)
    before = datetime.now(UTC) - timedelta(seconds=1)
    requests.take(book, "p", "2013-01..2013-03", "train-1")
    known = requests.find(book, "p", "2013-01..2013-03")
    served = requests.begun_since(known, before, "train-2")
    assert served is not None and served.taken_by == "train-1"
    assert requests.begun_since(known, datetime.now(UTC) + timedelta(seconds=1), "train-2") is None
    assert requests.begun_since(known, before, "train-1") is None


def test_what_stood_at_a_moment_is_told_as_it_stood(book: Ledger) -> None:
    ask(book)
    moment = datetime.now(UTC) + timedelta(milliseconds=5)
    while datetime.now(UTC) <= moment + timedelta(milliseconds=2):  # the ledger writes milliseconds
        pass
    requests.take(book, "p", "2013-01..2013-03", "train-1")
    assert [r.open for r in requests.find(book, "p", at=moment.isoformat())] == [True]
    assert [r.open for r in requests.find(book, "p")] == [False]


def test_only_what_this_run_asked_and_nobody_took_up_is_lost(book: Ledger) -> None:
    ask(book), ask(book, window="2013-02..2013-04"), ask(book, window="2013-03..2013-05", asked_by="run-2")
    requests.take(book, "p", "2013-01..2013-03", "train-1")
    assert [r.window for r in requests.lost(requests.find(book, "p"), "run-1")] == ["2013-02..2013-04"]


# -- which windows --------------------------------------------------------------------------------------

YEAR = [f"2013-{m:02d}" for m in range(1, 13)]


def windows(ends: list[str], length: int = 3) -> list[str]:
    return [window_name(window_ending(e, "month", length)) for e in ends]


def test_a_month_that_completes_a_window_asks_for_it() -> None:
    assert requests.due(spec(), "2013-03", YEAR[:3], []).windows == ("2013-01..2013-03",)


def test_an_incomplete_window_says_what_is_missing() -> None:
    found = requests.due(spec(), "2013-02", YEAR[:2], [])
    assert found.windows == () and found.why == "2012-12..2013-02 is not complete: no features of 2012-12"
    found = requests.due(spec(on=["quarterly"]), "2013-02", YEAR[:2], [])
    assert found.windows == () and found.why == "2013-01..2013-03 is not complete: no features of 2013-03"
    found = requests.window_of(spec(), "2013-05", ["2013-04"])
    assert found.windows == () and found.why == "2013-03..2013-05 is not complete: no features of 2013-03, 2013-05"


def test_a_late_month_asks_for_every_window_that_it_completes_in_key_order() -> None:
    there = [k for k in YEAR[:6] if k != "2013-03"]
    assert requests.due(spec(), "2013-06", there, []).windows == tuple(windows(["2013-06"]))
    found = requests.due(spec(), "2013-03", YEAR[:6], [])
    assert found.windows == tuple(windows(["2013-03", "2013-04", "2013-05"]))


def test_a_window_is_asked_for_once_whichever_calendar_it_was(book: Ledger) -> None:
    known = [ask(book, source="sensor")]
    found = requests.due(spec(), "2013-03", YEAR[:3], known)
    assert found.windows == () and "2013-01..2013-03" in found.why
    # A person's or the monitor's request is no calendar's.
    assert requests.due(spec(), "2013-03", YEAR[:3], [ask(book, source="ui", window="2013-01..2013-03")]).windows


def test_a_calendar_that_is_switched_on_leaves_the_past_alone() -> None:
    found = requests.due(spec(), "2013-12", YEAR, [], trained=["2013-07..2013-09"])
    assert found.windows == tuple(windows(["2013-10", "2013-11", "2013-12"]))


@pytest.mark.parametrize(
    ("length", "landed", "asked"),
    [
        (3, "2013-03", ["2013-03"]),
        (3, "2013-05", []),
        (1, "2013-06", ["2013-03", "2013-06"]),
        (6, "2013-06", ["2013-06"]),
    ],
)
def test_quarters_need_their_three_months_and_the_window(length: int, landed: str, asked: list[str]) -> None:
    there = YEAR[: YEAR.index(landed) + 1]
    found = requests.due(spec(length, on=["quarterly"]), landed, there, [])
    assert list(found.windows) == windows(asked, length)


def replay(order: list[str], *, at_once: bool, length: int, seed: int) -> list[str]:
    """Play twelve features' events in this order; `at_once`: all features are there before the first event."""
    asked, out = [], list[str]()
    for i, key in enumerate(order):
        for _ in range(1 + (seed + i) % 2):  # events may repeat
            there = YEAR if at_once else sorted(order[: i + 1])
            found = requests.due(spec(length), key, there, asked)
            asked += [
                requests.TrainingRequest("p", f"each/{w}/once", w, "each", "a", "", "", "run") for w in found.windows
            ]
            out += found.windows
    return out


@given(st.permutations(YEAR), st.integers(1, 6), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_shuffled_events_lose_and_double_no_window(order: list[str], length: int, seed: int) -> None:
    all_of_them = windows(YEAR[length - 1 :], length)
    landed_at_once = replay(order, at_once=True, length=length, seed=seed)
    assert landed_at_once == all_of_them  # and in key order
    one_by_one = replay(order, at_once=False, length=length, seed=seed)
    assert sorted(one_by_one) == all_of_them and len(one_by_one) == len(all_of_them)


def test_each_asks_in_key_order_whatever_comes_last() -> None:
    order = [*YEAR]
    random.Random(7).shuffle(order)
    assert replay(order, at_once=True, length=3, seed=0) == windows(YEAR[2:])
    assert shift(YEAR[-1], "month", 1) == "2014-01"


def test_a_window_grows_back_to_the_first_gap_and_not_beyond_the_longest() -> None:
    grown = spec(2).model_copy(update={"train": spec(2).train.model_copy(update={"longest": 4})})
    there = ["2013-01", "2013-03", "2013-04", "2013-05", "2013-06", "2013-07"]
    assert requests.training_window(grown, "2013-05", there) == "2013-03..2013-05"
    assert requests.training_window(grown, "2013-07", there) == "2013-04..2013-07"
    assert requests.training_window(spec(2), "2013-07", there) == "2013-06..2013-07"
    assert requests.window_of(grown, "2013-02", there).windows == ()
    assert requests.due(grown, "2013-04", there[:3], []).windows == ("2013-03..2013-04",)
