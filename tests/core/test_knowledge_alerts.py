"""What a knowledge base's owner is told of: a late reindex, a stale index, generations that are kept back in a row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from orrery import alerts
from orrery.alerts import Missed, settle, told_of
from orrery.ledger import Ledger
from orrery.rag.alerts import holding
from orrery.rag.spec import KnowledgeBaseSpec

P = "notes"
SPEC = KnowledgeBaseSpec.model_validate(
    {"version": 1, "kind": "knowledge_base", "owner": "docs", "sources": {"guides": {"uri": "documents"}}}
)


class Book:
    """A ledger with what Airflow's runs of a knowledge base would write."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(f"sqlite:///{folder}/ledger.db")
        self.n = 0

    def gate(self, day: str, verdict: str, dag: str = "reindex", status: str = "done") -> None:
        self.n += 1
        folder = f"{P}/runs/{P}.{dag}--{self.n}/gate-{day}/1"
        told = {"verb": "gate", "key": day, "status": status, "verdict": verdict, "folder": folder}
        told |= {"output": f"{P}/gate/{self.n:032x}/manifest.json", "reasons": [f"reason {self.n}"]}
        self.ledger.record(P, "run", folder, "done", "t", told)
        if status == "done":
            self.ledger.record(P, "decision", f"{self.n}/{day}", "done", "t", told)

    def holds(self, hours: float = 0, missed: Missed | None = None) -> dict[str, str]:
        """Return state -> reason, some hours from now."""
        now = datetime.now(UTC) + timedelta(hours=hours)
        found = holding(P, SPEC, self.ledger.find(P, *alerts.KINDS), now, pages="http://air/", missed=missed)
        assert all(a.runbook == f"http://air/dags/{P}.reindex" and a.owner == "docs" for a in found)
        return {a.state: a.reason for a in found}

    def tell(self, **kwargs: Any) -> None:
        """Write down what holds, as an occasion does."""
        entries = self.ledger.find(P, *alerts.KINDS)
        found = holding(P, SPEC, entries, datetime.now(UTC), **kwargs)
        settle(self.ledger, P, found, (), told_of(entries))


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


def test_nothing_is_told_of_a_base_that_is_new_or_fresh(book: Book) -> None:
    assert book.holds(1000) == {}
    book.gate("2026-01-05", "promote")
    assert book.holds(35) == {}


def test_it_is_stale_when_no_reindex_has_ended_well_for_too_long(book: Book) -> None:
    book.gate("2026-01-05", "kept")  # it was compared with its sources, whatever came of it
    reason = book.holds(50)["stale/reindex"]
    assert "50 hours ago" in reason and "36h" in reason
    book.gate("2026-01-06", "", status="bug")
    assert "stale/reindex" in book.holds(50)
    book.gate("2026-01-06", "promote", dag="evaluate")  # looks at questions, not at sources
    assert "stale/reindex" in book.holds(50)


def test_a_missed_deadline_is_told_until_a_reindex_of_that_day_or_later_has_ended(book: Book) -> None:
    queued = (datetime.now(UTC) - timedelta(hours=4)).isoformat()
    missed = Missed("reindex", "2026-01-05", queued)
    assert "within 4h" in book.holds(missed=missed)["late/2026-01-05"]
    book.tell(missed=missed)
    assert list(book.holds()) == ["late/2026-01-05"], "it holds on without the deadline's call"
    book.gate("2026-01-04", "promote")
    assert list(book.holds()) == ["late/2026-01-05"]
    book.gate("2026-01-06", "promote")
    assert book.holds() == {}


def test_generations_that_are_kept_back_in_a_row(book: Book) -> None:
    for day in ("05", "06"):
        book.gate(f"2026-01-{day}", "kept")
    assert book.holds() == {}
    book.gate("2026-01-07", "kept")
    assert (
        "3 generations in a row were kept back; the last, of 2026-01-07: reason 3"
        in book.holds()["refused/since-2026-01-05"]
    )
    book.gate("2026-01-08", "promote")
    assert book.holds() == {}
