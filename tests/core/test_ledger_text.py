"""What `orrery ledger` says of requests, approvals and alerts."""

from __future__ import annotations

from pathlib import Path

import pytest

from orrery import ledger_text, requests
from orrery.ledger import Ledger


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


def said(book: Ledger) -> list[str]:
    entries = book.find("p")
    return [line for e in entries if (line := ledger_text.line(e, entries))]


def test_a_request_stands_where_it_was_asked_with_what_became_of_it(book: Ledger) -> None:
    window = "2013-01..2013-03"
    requests.submit(
        book, "p", window=window, source="drift", by="p.monitor", why="auc fell by 0.05", id="2013-03",
        evidence={"health": "p/monitor/x/manifest.json"},
    )  # fmt: skip
    assert said(book) == [f"drift {window}: open  by p.monitor"]
    assert ledger_text.details(book.find("p")[0]) == ["auc fell by 0.05", "health: p/monitor/x/manifest.json"]
    requests.take(book, "p", window, "p.train--1")
    assert said(book) == [f"drift {window}: taken up by p.train--1  by p.monitor"]


def test_an_approval_is_a_question_and_then_its_answer(book: Ledger) -> None:
    asked = {"window": "w", "until": "2026-11-26T06:00:00+00:00"}
    book.record("p", "approval", "run/w", "intent", "ada", asked)
    assert said(book) == ["w: asked until 2026-11-26T06:00:00+00:00  by ada"]
    book.record("p", "approval", "run/w", "done", "bob", {**asked, "approved": False})
    assert said(book) == ["w: rejected  by bob"]


def test_an_alert_says_what_holds_how_it_went_out_and_that_it_ended(book: Ledger) -> None:
    alert = {"kind": "late", "subject": "2013-04", "owner": "ops", "reason": "no scores", "channels": ["webhook"]}
    book.record("p", "alert", "late/2013-04/1", "intent", "orrery", alert)
    book.record("p", "alert", "late/2013-04/1/webhook/1", "intent", "orrery", {"channel": "webhook", "of": "x"})
    assert said(book) == [
        "late 2013-04: holds  for ops",
        "late/2013-04/1/webhook/1: not delivered, no answer yet",
    ]
    sent = {"channel": "webhook", "delivered": False, "error": "500"}
    book.record("p", "alert", "late/2013-04/1/webhook/1", "done", "orrery", sent)
    book.record("p", "alert", "late/2013-04/1", "done", "orrery", {"ended": True})
    first, second = said(book)
    assert first.startswith("late 2013-04: ended 20") and second.endswith("webhook/1: not delivered, 500")


def test_other_entries_read_as_before(book: Ledger) -> None:
    book.record("p", "promotion", "r", "intent", "eve", {"version": "2", "from": None, "model": "m"})
    assert said(book) == ["(intent) – → 2  by eve"]
    book.record("p", "promotion", "r", "done", "eve", {"version": "2", "from": "1", "model": "m"})
    book.record("p", "decision", "r/w", "done", "eve", {"verb": "gate", "key": "w", "verdict": "kept"})
    assert said(book) == ["1 → 2  by eve", "gate w: kept  by eve"]
