"""What an owner is told of: rules on a ledger, told once, and again when it comes back; approvals and what they bind."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from core_house import SPEC, House

from orrery import alerts, approvals
from orrery.alerts import Missed, claim, clean, holding, sent, settle, told_of
from orrery.errors import RequestError, SpecError
from orrery.ledger import Kind, Ledger
from orrery.platform import load
from orrery.spec import Approval, ModelSpec, load_model
from orrery.store import Manifest

P = "delays"


class Book:
    """A ledger, and its project's spec, with what Airflow's runs would write."""

    def __init__(self, folder: Path, **spec: Any) -> None:
        (folder / "spec.yaml").write_text(SPEC)
        self.ledger = Ledger(f"sqlite:///{folder}/ledger.db")
        base = load_model(folder)
        self.spec = base.model_copy(update=spec)
        self.n = 0

    def run(self, verb: str, key: str, dag: str = "", **payload: Any) -> None:
        self.n += 1
        attempt = f"{P}/runs/{P}.{dag or verb}--{self.n}/{verb}-{key}/1"
        self.ledger.record(P, "run", attempt, "done", "t", {"verb": verb, "key": key, "status": "done", **payload})

    def decide(self, verb: str, key: str, verdict: str, **payload: Any) -> None:
        self.n += 1
        attempt = f"{P}/runs/{P}.train--{self.n}/{verb}-{key}/1"
        told = {"verb": verb, "key": key, "verdict": verdict, "attempt": attempt, "output": f"v{self.n}", **payload}
        self.ledger.record(P, "decision", f"{self.n}/{key}", "done", "t", told)

    def record(self, kind: Kind, key: str, phase: Any, **payload: Any) -> None:
        self.ledger.record(P, kind, key, phase, "t", payload)

    def holds(self, after: str = "0h", missed: Missed | None = None) -> dict[str, str]:
        """Return state -> reason, some hours from now."""
        now = datetime.now(UTC) + timedelta(hours=int(after[:-1]))
        found = holding(P, self.spec, self.ledger.find(P, *alerts.KINDS), now, pages="http://air/", missed=missed)
        return {a.state: a.reason for a in found}

    def tell(self, *channels: str, missed: Missed | None = None) -> list[str]:
        """Do what an occasion does, up to the sending; return the keys that are open."""
        found = holding(P, self.spec, self.ledger.find(P, *alerts.KINDS), datetime.now(UTC), missed=missed)
        return [t.key for t in settle(self.ledger, P, found, channels, told_of(self.ledger.find(P, "alert")))]


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


def test_nothing_is_told_of_a_healthy_project(book: Book) -> None:
    book.run("validate", "2013-01", metrics={"rows_flights": 990.0, "quarantined_flights": 10.0})
    book.run("materialize", "2013-01", dag="ingest")
    book.run("score", "2013-01")
    book.run("monitor", "2013-01", metrics={"labelled": 0.9, "quarantine": 0.01})
    book.decide("monitor", "2013-01", "watch")
    assert book.holds("1000h") == {}


def test_scores_are_late_when_features_wait_too_long_or_a_deadline_was_missed(book: Book) -> None:
    book.run("materialize", "2013-01", dag="ingest")
    book.run("materialize", "2013-02", dag="train")  # a training looks at features again: nobody scores for that
    assert book.holds("5h") == {}
    assert list(book.holds("7h")) == ["late/2013-01"]
    book.run("score", "2013-01", verdict="skipped")
    assert book.holds("7h") == {}
    book.run("materialize", "2013-01", dag="ingest")  # it landed again
    assert list(book.holds("7h")) == ["late/2013-01"]

    queued = datetime.now(UTC) + timedelta(milliseconds=2)
    missed = Missed("score", "2013-03", queued.isoformat().replace("+00:00", "Z"))
    book.run("score", "2013-03", status="bug", error="it broke")
    reason = book.holds(missed=missed)["late/2013-03"]
    assert "its scoring has not ended well within 6h (it broke)" in reason
    book.ledger.record(P, "run", "x", "done", "t", {"verb": "score", "key": "2013-03", "status": "done"})
    assert "late/2013-03" in book.holds(missed=missed)  # a trial at the command line is not the project's scores


def test_what_was_late_stays_open_until_it_is_scored_and_may_be_told_again(book: Book) -> None:
    old = Missed("ingest", "2013-01", "2013-02-02T06:00:00Z")
    assert book.tell(missed=old) == ["late/2013-01/1"]
    assert book.tell() == ["late/2013-01/1"]  # at every later occasion, with no deadline in hand
    assert book.tell(missed=old) == ["late/2013-01/1"]
    assert len(book.ledger.find(P, "alert", phase="intent")) == 1
    book.run("score", "2013-01")
    assert book.tell() == []
    assert book.tell(missed=old) == []  # scored after it was queued: the late callback of a run that is over
    again = Missed("score", "2013-01", (datetime.now(UTC) + timedelta(seconds=1)).isoformat())
    assert book.tell(missed=again) == ["late/2013-01/2"]


def test_missing_labels_and_quarantine(book: Book) -> None:
    book.run("monitor", "2013-01", metrics={"labelled": 0.79, "quarantine": 0.03})
    book.run("validate", "2013-02", metrics={"rows_flights": 97.0, "quarantined_flights": 3.0, "rows_weather": 50.0})
    book.run("validate", "2013-03", metrics={"rows_flights": 98.0, "quarantined_flights": 2.0})  # the bound itself
    found = book.holds()
    assert set(found) == {"labels/2013-01", "quarantine/2013-01", "quarantine/2013-02"}
    assert "79.0% of the rows of 2013-01 have a label" in found["labels/2013-01"]
    assert "3.0% of flights of 2013-02" in found["quarantine/2013-02"]
    # It landed again and is clean; what the monitor said of the earlier data counts no more.
    book.run("validate", "2013-01", metrics={"rows_flights": 100.0, "quarantined_flights": 0.0})
    assert "quarantine/2013-01" not in book.holds()
    book.run("monitor", "2013-01", metrics={"labelled": 0.8, "quarantine": 0.0})
    assert set(book.holds()) == {"quarantine/2013-02"}
    book.run("monitor", "2013-04", metrics={})  # a number that is missing is the monitor's to explain
    assert set(book.holds()) == {"quarantine/2013-02"}


def test_a_champion_gets_stale_by_the_partitions_that_it_scores(book: Book) -> None:
    book.run("register", "2013-01..2013-03", dag="train", version="7")
    book.record("promotion", "r", "done", version="7", model="m", window="2013-01..2013-03")
    for month in range(1, 13):
        book.run("score", f"2014-{month:02d}")
    book.run("score", "2013-02")  # a month of its training scored again is no use of it
    book.run("score", "2014-12")  # nor is one twice
    assert book.holds() == {}
    book.run("score", "2015-01")
    assert "has scored 13 partitions, the last 2015-01" in book.holds()["stale/version-7"]
    book.record("promotion", "s", "done", version="8", model="n", window="2014-10..2014-12")
    assert book.holds() == {}


def test_refused_three_times_in_a_row(book: Book) -> None:
    book.decide("gate", "a", "kept", reasons=["worse"])
    book.decide("gate", "b", "promote")
    book.decide("gate", "c", "kept", output="c")
    book.decide("gate", "c", "kept", output="c")  # the same numbers, judged again
    book.decide("gate", "d", "kept")
    book.decide("monitor", "2013-01", "none")
    assert book.holds() == {}
    book.decide("gate", "e", "kept", reasons=["not better than the champion"])
    assert book.holds() == {
        "refused/version-none": "3 candidates in a row were refused; the last, of e: not better than the champion"
    }
    assert book.tell() == ["refused/version-none/1"]
    book.decide("gate", "f", "kept")
    assert book.tell() == ["refused/version-none/1"]  # four: told already
    book.decide("gate", "g", "promote")
    assert book.tell() == []


def test_a_verdict_to_retrain_needs_a_taker(book: Book) -> None:
    book.decide("monitor", "2013-05", "retrain", reasons=["auc 0.70, promised 0.75"])
    assert book.holds() == {}  # the request is made after the verdict
    assert "no training was asked for: auc 0.70" in book.holds("7h")["untaken/2013-05"]
    book.record("request", "drift/w/1", "intent")
    assert "has not been taken up" in book.holds("7h")["untaken/2013-05"]
    book.record("request", "drift/w/1", "done", run="r")
    assert book.holds("7h") == {}


def test_a_verdict_to_retrain_that_nobody_may_follow_is_told_at_once(book: Book) -> None:
    book.spec = ModelSpec.model_validate({**book.spec.model_dump(by_alias=True), "retrain": {"on": ["manual"]}})
    book.decide("monitor", "2013-05", "retrain", reasons=["worse"])
    assert "a person must ask" in book.holds()["untaken/2013-05"]
    book.decide("monitor", "2013-06", "none")
    assert book.holds() == {}


HOSTILE = "a\r\nBcc: eve@evil.example\r\n\r\n<script>x</script>\u202e\u2066\x00\x1b[31m\u200b" + "é" * 100_000


def test_hostile_texts_become_one_short_line(book: Book) -> None:
    book.spec = book.spec.model_copy(update={"owner": HOSTILE})
    for name in "abc":
        book.decide("gate", name, "kept", reasons=[HOSTILE])
    found = holding(P, book.spec, book.ledger.find(P, *alerts.KINDS), datetime.now(UTC))
    for text in (found[0].reason, found[0].owner):
        assert len(text) <= 500 and "\n" not in text and "\r" not in text
        assert not [c for c in text if unicodedata.category(c)[0] == "C"]
    assert clean("x" * 501) == "x" * 499 + "…" and clean("x" * 500) == "x" * 500
    assert clean(" a\t\u2028b ") == "a b"


def test_each_alert_names_owner_runbook_and_reason(book: Book) -> None:
    book.run("monitor", "2013-01", metrics={"labelled": 0.1})
    entries, now = book.ledger.find(P, *alerts.KINDS), datetime.now(UTC)
    (alert,) = holding(P, book.spec, entries, now, pages="http://air/")
    assert (alert.owner, alert.runbook, alert.severity) == ("ops", f"http://air/dags/{P}.labels", "warning")
    own = book.spec.model_copy(update={"runbook": "https://wiki.example/delays"})
    assert holding(P, own, entries, now)[0].runbook == "https://wiki.example/delays"


def test_each_channel_is_told_once_by_one_process_and_again_when_it_failed(book: Book) -> None:
    book.run("monitor", "2013-01", metrics={"labelled": 0.1})
    assert book.tell("email", "webhook") == ["labels/2013-01/1"]

    def told() -> alerts.Told:
        return told_of(book.ledger.find(P, "alert"))[0]

    now, before = datetime.now(UTC), told()
    first = claim(book.ledger, P, before, "webhook", now)
    assert first == "labels/2013-01/1/webhook/1"
    assert claim(book.ledger, P, before, "webhook", now) is None  # another process, with the same view
    assert claim(book.ledger, P, told(), "webhook", now) is None  # somebody is at it
    assert claim(book.ledger, P, told(), "webhook", now + timedelta(minutes=5)) == "labels/2013-01/1/webhook/2"
    sent(book.ledger, P, "labels/2013-01/1/webhook/2", "webhook", "it answered 500")
    assert told().delivered == {}
    third = claim(book.ledger, P, told(), "webhook", now)
    assert third is not None
    sent(book.ledger, P, third, "webhook", None)
    assert set(told().delivered) == {"webhook"} and claim(book.ledger, P, told(), "webhook", now) is None
    assert told().tries["webhook"][1]["error"] == "it answered 500"
    assert told().waiting("email", now)
    assert claim(book.ledger, P, told(), "sms", now) is None  # a channel that came later is not told of old alerts
    book.run("monitor", "2013-01", metrics={"labelled": 0.9})
    assert book.tell("email", "webhook") == []
    assert told().ended and not told().waiting("email", now)


def test_tries_end(book: Book) -> None:
    book.run("monitor", "2013-01", metrics={"labelled": 0.1})
    book.tell("webhook")
    for _ in range(alerts.MAX_TRIES):
        key = claim(book.ledger, P, told_of(book.ledger.find(P, "alert"))[0], "webhook", datetime.now(UTC))
        assert key is not None
        sent(book.ledger, P, key, "webhook", "down")
    assert claim(book.ledger, P, told_of(book.ledger.find(P, "alert"))[0], "webhook", datetime.now(UTC)) is None


# -- approvals ------------------------------------------------------------------------------------------


def verdict(address: str) -> Manifest:
    return Manifest(project=P, verb="gate", key="w", address=address, files={}, digest=f"d{address}", created="x")


def asks(book: Book, address: str = "a", run: str = "r1", hours: float = 0) -> Any:
    return approvals.ask(
        book.ledger, P, run=run, window="w", verdict=verdict(address), candidate=f"c{address}",
        terms=Approval(), approvers=("ada", "bob"), actor="t", now=datetime.now(UTC) + timedelta(hours=hours),
    )  # fmt: skip


def refusal(book: Book, address: str = "a") -> str:
    with pytest.raises(RequestError) as caught:
        approvals.require(book.ledger, P, "w", verdict(address).path)
    return caught.value.message


def test_an_approval_binds_one_verdict_and_is_recorded_once(book: Book) -> None:
    assert "nobody was asked" in refusal(book)
    asked = asks(book)
    assert asks(book, hours=5).payload["until"] == asked.payload["until"]  # a retry keeps the deadline
    assert "the question is open until" in refusal(book)
    approvals.answer(book.ledger, asked, approvals.Answer(True, "ada", "2026-01-01T00:00:00+00:00", "fine"))
    late = approvals.answer(book.ledger, asked, approvals.Answer(False, "bob", "2026-01-01T00:00:01+00:00"))
    assert (late.payload["by"], late.payload["approved"], late.actor) == ("ada", True, "ada")
    assert late.payload["digest"] == "da"
    approvals.require(book.ledger, P, "w", verdict("a").path)
    assert "nobody was asked" in refusal(book, "b")
    asks(book, "b")  # the same run about another verdict: another question
    assert "the question is open" in refusal(book, "b")
    approvals.require(book.ledger, P, "w", verdict("a").path)


def test_a_cleared_run_asks_anew_and_until_then_nothing_stands(book: Book) -> None:
    approvals.answer(book.ledger, asks(book), approvals.Answer(True, "ada", "2026-01-01T00:00:00+00:00"))
    again = asks(book, run="r1--cleared-1")
    assert "the question is open" in refusal(book)
    approvals.answer(book.ledger, again, approvals.Answer(False, None, "2026-01-01T00:00:00+00:00"))
    assert f"{approvals.NOBODY} rejected it" in refusal(book)


def test_a_question_that_waits_is_told_until_it_is_answered_or_over(book: Book) -> None:
    asked = asks(book)
    assert "waits for an approval by ada, bob" in book.holds()[f"approval/w-{asked.id}"]
    assert book.holds("49h") == {}
    approvals.answer(book.ledger, asked, approvals.Answer(True, "ada", "2026-01-01T00:00:00+00:00"))
    assert book.holds() == {}


def test_register_and_promote_are_refused_without_the_approval(house: House) -> None:
    spec = house.folder / "spec.yaml"
    spec.write_text(SPEC.replace("gate:", "approvers: [ada]\ngate:\n  approval: human"))
    house.verdict("2013-01..2013-01")
    planner = house.planner()
    for verb in ("register", "promote"):
        with pytest.raises(RequestError, match="not approved: nobody was asked"):
            planner.plan(house.request(verb))
    found = house.store.latest_manifest(house.project, "verdict", "2013-01..2013-01")
    assert found is not None
    asked = approvals.ask(
        planner.ledger, house.project, run="r", window="2013-01..2013-01", verdict=found, candidate="c",
        terms=Approval(), approvers=("ada",), actor="t", now=datetime.now(UTC),
    )  # fmt: skip
    approvals.answer(planner.ledger, asked, approvals.Answer(True, "ada", "2026-01-01T00:00:00+00:00"))
    assert planner.plan(house.request("register")).done is None
    assert planner.plan(house.request("promote", options={"version": "1"})).done is None
    house.commit("gate", "verdict", "2013-01..2013-01", inputs=found.inputs, verdict="promote", reasons=["another"])
    with pytest.raises(RequestError, match="nobody was asked"):
        planner.plan(house.request("register"))


# -- platform -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "{webhook: 'a b'}",
        '{webhook: "x\\r\\ny"}',
        "{email: {connection: c, to: []}}",
        "{email: {connection: c, to: ['a@b.c, d@e.f']}}",
        '{email: {connection: c, to: ["a@b.c\\nBcc: d@e.f"]}}',
        "{email: {to: [a@b.c]}}",
        "{sms: x}",
    ],
)
def test_the_platform_refuses_what_is_no_channel(house: House, given: str) -> None:
    file = house.home / "include" / "platform.yaml"
    file.write_text(f"{file.read_text()}\nalerts: {given}\n")
    with pytest.raises(SpecError, match="alerts"):
        load(file)


def test_the_platform_names_channels_by_connection(house: House) -> None:
    file = house.home / "include" / "platform.yaml"
    assert load(file).alerts.webhook is None
    file.write_text(f"{file.read_text()}\nalerts: {{webhook: w, email: {{connection: s, to: [a@b.example]}}}}\n")
    found = load(file).alerts
    assert found.webhook == "w" and found.email is not None and found.email.to == ("a@b.example",)
