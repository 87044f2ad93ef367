"""What a knowledge base's owner must be told, from the ledger alone; how it is told: `orrery.alerts`. Light."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from orrery.alerts import SEVERITY, Alert, Missed, What, clean, told_of
from orrery.attempts import folder_of
from orrery.fields import seconds
from orrery.ledger import Entry, moment
from orrery.rag.spec import KnowledgeBaseSpec

REFUSED = 3  # generations kept back in a row, of which somebody must know
Found = Iterable[tuple[What, str, str, dict[str, Any]]]


def holding(
    project: str,
    spec: KnowledgeBaseSpec,
    entries: Sequence[Entry],
    now: datetime,
    *,
    pages: str = "",
    missed: Missed | None = None,
) -> list[Alert]:
    """Return what holds now, from a project's whole ledger (`alerts.KINDS`, oldest first). `pages`: Airflow's URL."""
    ended = _ended(project, entries)
    found = [*_late(spec, entries, ended, missed), *_stale(spec, ended, now), *_refused(project, entries)]
    runbook = spec.runbook or f"{pages.rstrip('/')}/dags/{project}.reindex"
    return [
        Alert(kind, clean(subject, 100), project, clean(spec.owner, 100), SEVERITY[kind], clean(said), runbook, facts)
        for kind, subject, said, facts in found
    ]


def _ended(project: str, entries: Sequence[Entry]) -> list[Entry]:
    """Return the reindexes of Airflow's runs that came to a verdict, oldest first: sources and index were compared."""
    prefix = f"{project}/runs/{project}.reindex--"
    gates = (e for e in entries if e.kind == "run" and e.payload.get("verb") == "gate" and e.key.startswith(prefix))
    return [e for e in gates if e.payload.get("status") == "done"]


def _late(spec: KnowledgeBaseSpec, entries: Sequence[Entry], ended: Sequence[Entry], missed: Missed | None) -> Found:
    """A reindex that has not ended within `alerts.late`; until one of that day or a later one has."""
    why: dict[str, tuple[str, str]] = {}
    for told in told_of(entries):
        if told.alert.kind == "late" and not told.ended:
            why[told.alert.subject] = (told.at, told.alert.reason)
    if missed is not None:
        said = f"the reindex of {missed.partition} is late: it has not ended well within {spec.alerts.late}"
        why.setdefault(missed.partition, (moment(missed.queued), said))
    for day, (since, said) in sorted(why.items()):
        if not any(e.at >= since and str(e.payload["key"]) >= day for e in ended):
            yield "late", day, said, {"since": since}


def _stale(spec: KnowledgeBaseSpec, ended: Sequence[Entry], now: datetime) -> Found:
    """No reindex has ended well for longer than `alerts.stale`: what is answered may not be true any more."""
    if not ended:
        return
    last = ended[-1]
    age = (now - datetime.fromisoformat(last.at)).total_seconds()
    if age > seconds(spec.alerts.stale):
        said = f"the last reindex that ended well is of {last.at[:16]}, {age / 3600:.0f} hours ago; "
        said += f"at most {spec.alerts.stale} should pass"
        yield "stale", "reindex", said, {"since": last.at, "hours": round(age / 3600, 1)}


def _refused(project: str, entries: Sequence[Entry]) -> Found:
    """The gate has kept the last generations back, one after the other."""
    decisions = [e for e in entries if e.kind == "decision" and e.payload.get("verb") == "gate"]
    row: dict[str, Entry] = {}
    for entry in decisions:
        if not folder_of(entry.payload).startswith(f"{project}/runs/{project}."):
            continue
        if entry.payload.get("verdict") == "promote":
            row.clear()
        else:
            row[str(entry.payload.get("output"))] = entry
    if len(row) >= REFUSED:
        last = list(row.values())[-1]
        why = (last.payload.get("reasons") or ["no reason on record"])[0]
        said = f"{len(row)} generations in a row were kept back; the last, of {last.payload['key']}: {why}"
        yield "refused", f"since-{next(iter(row.values())).payload['key']}", said, {"refused": len(row)}
