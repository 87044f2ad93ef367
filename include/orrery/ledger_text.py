"""The ledger in sentences, for `orrery ledger`: each entry in a line, and what stands below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orrery.ledger import Entry


def line(entry: Entry, entries: Sequence[Entry]) -> str:
    """Return what an entry says; empty where another one of `entries` says it (an intent that was done)."""
    p = entry.payload
    if entry.kind == "request":
        return _request(entry, entries)
    done = any((e.kind, e.key, e.phase) == (entry.kind, entry.key, "done") for e in entries)
    if entry.kind == "alert":
        return _alert(entry, entries)
    if entry.phase == "intent" and done:
        return ""
    if entry.kind == "approval":
        return _approval(entry)
    if entry.kind == "housekeeping":
        return _housekeeping(entry)
    intent = "(intent) " if entry.phase == "intent" else ""
    if "version" in p and entry.kind != "run":
        return f"{intent}{p.get('from') or '–'} → {p['version']}  by {entry.actor}"
    return f"{intent}{p['verb']} {p['key']}: {p.get('verdict') or p.get('status')}  by {entry.actor}"


def details(entry: Entry) -> list[str]:
    """Return the lines below an entry: reason, reasons, evidence."""
    p = entry.payload
    evidence: dict[str, Any] = p.get("evidence") or {}
    below = [p.get("why"), p.get("reason"), *p.get("reasons", ()), *(f"{n}: {m}" for n, m in evidence.items())]
    return [str(text) for text in below if text]


def _request(entry: Entry, entries: Sequence[Entry]) -> str:
    """Return a request where it was asked, with what became of it."""
    if entry.phase == "done":
        return ""
    taken = next((e for e in entries if (e.kind, e.key, e.phase) == ("request", entry.key, "done")), None)
    state = f"taken up by {taken.payload['run']}" if taken else "open"
    return f"{entry.payload['source']} {entry.payload['window']}: {state}  by {entry.actor}"


def _housekeeping(entry: Entry) -> str:
    """Return what was removed, or was to be by a run that did not come to its end."""
    told: dict[str, dict[str, int]] = entry.payload["removed"]
    each = ", ".join(f"{counts['units']:,} {kind}" for kind, counts in told.items())
    size = sum(counts["bytes"] for counts in told.values())
    verb = "to remove" if entry.phase == "intent" else "removed"
    return f"{verb}: {each or 'nothing'} ({size / 1e6:,.1f} MB)  by {entry.actor}"


def _approval(entry: Entry) -> str:
    p = entry.payload
    if entry.phase == "intent":
        return f"{p['window']}: asked until {p['until']}  by {entry.actor}"
    return f"{p['window']}: {'approved' if p['approved'] else 'rejected'}  by {entry.actor}"


def _alert(entry: Entry, entries: Sequence[Entry]) -> str:
    """Return an alert where it was raised, and each channel's answer; its end stands with it."""
    p, end = entry.payload, next((e for e in entries if (e.kind, e.key, e.phase) == ("alert", entry.key, "done")), None)
    if "channel" in p:
        answer = "delivered" if p.get("delivered") else f"not delivered, {p.get('error', 'no answer yet')}"
        return "" if entry.phase == "intent" and end else f"{entry.key}: {answer}"
    if entry.phase == "done":
        return ""
    return f"{p['kind']} {p['subject']}: {f'ended {end.at[:19]}' if end else 'holds'}  for {p['owner']}"
