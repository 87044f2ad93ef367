"""The record of who allowed a promotion: asked (intent), answered (done), of exactly one verdict of the gate. Light.

An entry's key is `<run>/<window>`; what binds it is the payload's `verdict`, the manifest of the gate that was
shown. The newest entry of a verdict counts: a cleared run asks anew, and until that is answered nothing stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from orrery.errors import RequestError
from orrery.ledger import Entry, Ledger
from orrery.spec import Approval, seconds
from orrery.store import Manifest

NOBODY = "nobody (the deadline's default)"


@dataclass(frozen=True)
class Answer:
    """What was answered: by whom (a user name, or None for the deadline), when (ISO 8601), with which words."""

    approved: bool
    by: str | None
    at: str
    comment: str = ""


def ask(
    book: Ledger,
    project: str,
    *,
    run: str,
    window: str,
    verdict: Manifest,
    candidate: str,
    terms: Approval,
    approvers: Sequence[str],
    actor: str,
    now: datetime,
) -> Entry:
    """Record that people are asked, once per run and verdict; return the entry. A retry keeps the first deadline."""
    payload = {
        "window": window,
        "verdict": verdict.path,
        "digest": verdict.digest,
        "candidate": candidate,
        "approvers": list(approvers),
        "otherwise": terms.otherwise,
        "until": (now.astimezone(UTC) + timedelta(seconds=seconds(terms.within))).isoformat(timespec="seconds"),
    }
    n = 1
    while True:
        key = f"{run}/{window}" if n == 1 else f"{run}/{window}/{n}"
        book.record(project, "approval", key, "intent", actor, payload)
        found = book.get(project, "approval", key, "intent")
        assert found is not None
        if found.payload["verdict"] == verdict.path:
            return found
        n += 1  # the same run has asked about another verdict: this is another question


def answer(book: Ledger, asked: Entry, given: Answer) -> Entry:
    """Record the answer to a question, once; return what is on record (the first answer counts)."""
    payload = {
        **asked.payload,
        "approved": given.approved,
        "by": given.by,
        "answered": given.at,
        "comment": given.comment,
    }
    book.record(asked.project, "approval", asked.key, "done", given.by or NOBODY, payload)
    found = answered(book, asked)
    assert found is not None
    return found


def answered(book: Ledger, asked: Entry) -> Entry | None:
    """Return the answer to a question, or None."""
    return book.get(asked.project, "approval", asked.key, "done")


def standing(entries: Iterable[Entry], verdict: str) -> Entry | None:
    """Return the newest entry about a verdict: a question, or an answer."""
    mine = [e for e in entries if e.kind == "approval" and e.payload.get("verdict") == verdict]
    return max(mine, key=lambda e: e.id, default=None)


def waiting(entries: Iterable[Entry], now: datetime) -> Entry | None:
    """Return the question that is open now, if any: the project's newest entry, not answered, its time not over."""
    last = max((e for e in entries if e.kind == "approval"), key=lambda e: e.id, default=None)
    if last is None or last.phase != "intent" or datetime.fromisoformat(last.payload["until"]) < now:
        return None
    return last


def require(book: Ledger, project: str, window: str, verdict: str) -> None:
    """Raise `RequestError` (64) unless a promotion by this verdict was allowed, by a person or by the deadline."""
    found = standing(book.find(project, "approval"), verdict)
    if found is not None and found.phase == "done" and found.payload["approved"] is True:
        return
    if found is None:
        why = "nobody was asked about this verdict of the gate"
    elif found.phase == "intent":
        why = f"the question is open until {found.payload['until']}"
    else:
        why = f"{found.actor} rejected it at {found.payload['answered']}"
    raise RequestError(
        f"the candidate of {window} is not approved: {why}",
        hint=f"`gate.approval` of {project} asks for a person: clear the task `approve` of the run in Airflow "
        "(marking it a success approves nothing)",
    )


def told(entry: Entry) -> list[str]:
    """Return an answer in sentences, for the note of the run."""
    p: dict[str, Any] = entry.payload
    did = "approved" if p["approved"] else "rejected"
    who = p["by"] or f"nobody answered within the time; by default it was {did}"
    first = f"{who} {did} it" if p["by"] else who
    return [first, *([f"“{p['comment']}”"] if p["comment"] else [])]
