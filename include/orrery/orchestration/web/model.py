"""What is known of a project's model, from the ledger alone: champion, health, what is pending, what was decided.

Plain JSON-able values, the same for the page and for its JSON twin; only what is shown is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from orrery import alerts, approvals, cost_report, costs, platform, requests
from orrery.errors import OrreryError
from orrery.ledger import Entry, Ledger, unfinished
from orrery.orchestration.web.verdict import STATUS
from orrery.spec import METRICS, PRIMARY, ModelSpec, load_model

PARTITIONS = 36  # shown of the health; three years of months
DECISIONS, ALERTS, PAGE = 12, 8, 25
TRAININGS, ATTEMPTS = 10, 400  # shown of the costs, and how many attempts are read to find them
# Health decisions read to find the latest of each partition: cleared and repeated runs decide again.
DECIDED = 4 * PARTITIONS
HEALTH = (
    *("observed", "observed_low", "observed_high", "promised", "promised_low", "promised_high", "loss"),
    *("loss_low", "loss_high", "rows", "labelled", "quarantine", "prediction_psi", "features_drifted"),
)


def read(
    book: Ledger, project: str, runs: Mapping[str, tuple[str, str]] | None = None, before: int | None = None
) -> dict[str, Any]:
    """Return all that the Model tab shows. `runs`: name in the ledger -> (Dag id, run id); `before`: an entry's id."""
    spec = _spec(project)
    runs = runs or {}
    changes = book.find(project, "promotion", "rollback")
    champion = book.champion(project)
    stack = book.champions(project)
    asked = [r for r in requests.find(book, project) if r.open]
    questions = book.find(project, "approval")
    health = _health(book, project)
    metric = next((h["primary"] for h in reversed(health) if h["primary"]), None) or (
        PRIMARY[spec.task] if spec else "auc"
    )
    return {
        "project": project,
        "metric": metric,
        "higher_is_better": METRICS.get(metric, True),
        "champion": _champion(champion, changes),
        "rollback": _targets(champion.version if champion else None, stack, book.versions(project)),
        "history": [_change(e, runs) for e in reversed(changes) if e.phase == "done"],
        "unfinished": [_change(e, runs) for e in unfinished(changes)],
        "health": health,
        "costs": _costs(book, project, spec),
        "challenger": _challenger(book, project, champion.version if champion else None),
        "approvals": _questions(questions, runs),
        "answers": [_answer(e, runs) for e in reversed(questions) if e.phase == "done"][:ALERTS],
        "requests": [_asked(r, runs) for r in reversed(asked)],
        "retrain_on": [*spec.retrain.on, *(["cron"] if spec.retrain.cron else [])] if spec else [],
        "decisions": [_decision(e, runs) for e in book.recent(project, "decision", phase="done", limit=DECISIONS)],
        "alerts": _alerts(alerts.told_of(book.find(project, "alert"))),
        "ledger": _page(book, project, runs, before),
    }


def _spec(project: str) -> ModelSpec | None:
    """Return the project's spec; a page is shown without it where the API server has no projects folder."""
    with suppress(OrreryError):
        return load_model(platform.project_folder(project))
    return None


def _champion(now: Any, changes: list[Entry]) -> dict[str, Any] | None:
    if now is None:
        return None
    last = next(e for e in reversed(changes) if e.phase == "done")
    return {
        "version": now.version,
        "since": now.since,
        "by": now.actor,
        "reason": now.reason,
        "how": last.kind,
        "window": last.payload.get("window", ""),
        "model": now.model,
    }


def _targets(now: str | None, stack: list[str], ever: dict[str, str]) -> list[str]:
    """Return the versions that a rollback may go to; the one before comes first, one that was left comes last."""
    return [v for v in dict.fromkeys([*reversed(stack), *reversed(ever)]) if v != now]


def _change(entry: Entry, runs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    p = entry.payload
    return {
        "at": entry.at,
        "kind": entry.kind,
        "from": p.get("from"),
        "version": p.get("version"),
        "window": p.get("window", ""),
        "by": entry.actor,
        "reason": p.get("reason", ""),
        "run": runs.get(entry.key),
    }


def _health(book: Ledger, project: str) -> list[dict[str, Any]]:
    """Return one row per partition, oldest partition first: the latest word of each."""
    latest: dict[str, Entry] = {}
    for entry in book.recent(project, "decision", phase="done", verb="monitor", limit=DECIDED):
        latest.setdefault(str(entry.payload.get("key", "")), entry)
    return [_healthy(key, latest[key]) for key in sorted(latest)[-PARTITIONS:]]


def _healthy(partition: str, entry: Entry) -> dict[str, Any]:
    p = entry.payload
    facts, metrics = p.get("facts") or {}, p.get("metrics") or {}
    return {
        "partition": partition,
        "at": entry.at,
        "verdict": p.get("verdict") or "none",
        "reasons": list(p.get("reasons") or ()),
        "version": _text(facts.get("model_version")),
        "primary": _text(facts.get("primary")),
        **{name: metrics.get(name) for name in HEALTH},
    }


def _costs(book: Ledger, project: str, spec: ModelSpec | None) -> list[dict[str, Any]]:
    """Return the latest trainings, the newest first: where their time went and what they cost."""
    made = {str(e.payload.get("version", "")): str(e.payload.get("model", "")) for e in _registered(book, project)}
    found = costs.trainings(costs.read(book.recent(project, "run", phase="done", verb="train", limit=ATTEMPTS)))
    prices = costs.rates(platform.load(), spec.train.spot.fallback if spec else None)
    rows = cost_report.trainings(found, prices, {**made, **book.versions(project)})
    return rows[: -TRAININGS - 1 : -1]


def _registered(book: Ledger, project: str) -> list[Entry]:
    entries = book.recent(project, "run", phase="done", verb="register", limit=ATTEMPTS)
    return [e for e in reversed(entries) if "version" in e.payload]


def _challenger(book: Ledger, project: str, champion: str | None) -> dict[str, Any] | None:
    """Return the newest registered version that came after the champion and was not made one."""
    newest = next(iter(book.recent(project, "run", verb="register", limit=20)), None)
    version = str(newest.payload.get("version", "")) if newest else ""
    ever = book.versions(project)
    if newest is None or not version or version == champion or version in ever:
        return None
    return {"version": version, "window": newest.payload.get("key", ""), "at": newest.at, "by": newest.actor}


def _questions(entries: list[Entry], runs: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the question that a person may still answer, if any."""
    asked = approvals.waiting(entries, datetime.now(UTC))
    if asked is None:
        return []
    p = asked.payload
    return [
        {
            "at": asked.at,
            "window": _text(p.get("window")),
            "approvers": [_text(a) for a in p.get("approvers") or ()],
            "until": _text(p.get("until")),
            "otherwise": _text(p.get("otherwise")),
            "run": runs.get(asked.key.partition("/")[0]),
        }
    ]


def _answer(entry: Entry, runs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    p = entry.payload
    return {
        "at": entry.at,
        "window": _text(p.get("window")),
        "approved": p.get("approved") is True,
        "by": _text(p.get("by")) or entry.actor,
        "comment": _text(p.get("comment")),
        "run": runs.get(entry.key.partition("/")[0]),
    }


def _asked(request: requests.TrainingRequest, runs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    told = {name: _text(getattr(request, name)) for name in ("at", "by", "source", "window", "why")}
    return {**told, "run": runs.get(request.asked_by)}


def _decision(entry: Entry, runs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    p = entry.payload
    return {
        "at": entry.at,
        "verb": p.get("verb", ""),
        "key": p.get("key", ""),
        "verdict": p.get("verdict") or "done",
        "skipped": p.get("skipped"),
        "reasons": list(p.get("reasons") or ()),
        "by": entry.actor,
        "run": runs.get(entry.key.partition("/")[0]),
    }


def _alerts(told: list[alerts.Told]) -> list[dict[str, Any]]:
    """Return what holds now and then what has ended, the newest first."""
    newest = told[::-1]
    ordered = [t for t in newest if not t.ended] + [t for t in newest if t.ended]
    return [
        {
            "at": t.at,
            "ended": t.ended,
            "kind": t.alert.kind,
            "subject": t.alert.subject,
            "severity": t.alert.severity,
            "reason": t.alert.reason,
            "owner": t.alert.owner,
            "runbook": t.alert.runbook,
            "channels": {c: c in t.delivered for c in t.channels},
        }
        for t in ordered[:ALERTS]
    ]


def _page(book: Ledger, project: str, runs: Mapping[str, tuple[str, str]], before: int | None) -> dict[str, Any]:
    rows = book.recent(project, before=before, limit=PAGE + 1)
    return {
        "total": book.count(project),
        "before": before,
        "older": rows[PAGE - 1].id if len(rows) > PAGE else None,
        "entries": [_line(e, runs) for e in rows[:PAGE]],
    }


def _line(entry: Entry, runs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    p = entry.payload
    told = (
        p.get("error") or p.get("skipped") or p.get("reason") or p.get("why") or next(iter(p.get("reasons") or ()), "")
    )
    parts = entry.key.split("/")
    return {
        "id": entry.id,
        "at": entry.at,
        "kind": entry.kind,
        "phase": entry.phase,
        "what": " ".join(filter(None, (_text(p.get("verb")), _text(p.get("key") or p.get("window"))))) or entry.key,
        "outcome": _outcome(entry),
        "by": entry.actor,
        "told": _text(told),
        "run": runs.get(parts[2] if entry.kind == "run" and len(parts) > 2 else parts[0]),
    }


def _outcome(entry: Entry) -> str:
    p = entry.payload
    if entry.kind in ("promotion", "rollback"):
        return f"version {p.get('version')}" + ("" if entry.phase == "done" else " (intended)")
    if entry.kind == "approval":
        return "asked" if entry.phase == "intent" else "approved" if p.get("approved") is True else "rejected"
    if entry.kind in ("alert", "request"):
        return {"intent": "begun", "done": "ended"}.get(entry.phase, entry.phase)
    if p.get("status") not in (None, "done"):
        return STATUS.get(str(p["status"]), "failed").partition(":")[0]
    return str(p.get("verdict") or ("skipped" if p.get("skipped") else entry.phase))


def _text(value: Any) -> str:
    return "" if value is None else str(value)
