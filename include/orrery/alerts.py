"""What a project's owner must be told, from the ledger alone: rules, and the record of what was told. Light.

`holding` is pure: it returns the states that hold now. `settle` writes down which of them are new and which
have ended, so that each is told once per partition (or champion), and again when it comes back:

    phase intent  <kind>/<subject>/<n>              the alert; `n` counts how often this state has come up
    phase intent  <kind>/<subject>/<n>/<channel>/<try>   about to be sent; whoever writes this line sends it
    phase done    <kind>/<subject>/<n>/<channel>/<try>   `delivered`, or why not
    phase done    <kind>/<subject>/<n>              the state has ended

Only what Airflow's runs of the project did counts: an entry of the command line may be a trial on a sample.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from orrery import approvals
from orrery.attempts import folder_of
from orrery.ledger import Entry, Kind, Ledger, moment
from orrery.spec import ModelSpec, seconds

What = Literal["late", "labels", "quarantine", "stale", "refused", "untaken", "approval"]
Severity = Literal["critical", "warning", "info"]
SEVERITY: dict[What, Severity] = {
    "late": "critical",
    "labels": "warning",
    "quarantine": "warning",
    "stale": "warning",
    "refused": "warning",
    "untaken": "warning",
    "approval": "info",
}
# The Dag whose page (and text) helps, where the spec has no runbook.
PAGE: dict[What, str] = {
    "late": "score",
    "labels": "labels",
    "quarantine": "ingest",
    "stale": "train",
    "refused": "train",
    "untaken": "monitor",
    "approval": "train",
}
# The ledger's kinds that the rules read.
KINDS: tuple[Kind, ...] = ("run", "decision", "promotion", "rollback", "request", "approval", "alert")
MAX_REASON = 500
MAX_TRIES = 20  # of one alert on one channel: what has not gone out by then is in the ledger and in the log
# A claim without an end is older than any sending takes (see orchestration.channels.BUDGET): its sender is gone.
CLAIM = timedelta(minutes=2)


@dataclass(frozen=True)
class Alert:
    """One state that someone must know of. `subject` is the partition, the version or the window that it is about."""

    kind: What
    subject: str
    project: str
    owner: str
    severity: Severity
    reason: str
    runbook: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """What it is about, as the ledger's keys say it."""
        return f"{self.kind}/{self.subject}"


@dataclass(frozen=True)
class Told:
    """An alert on record: its key, since when, whether the state has ended, and what each channel's tries came to."""

    key: str
    at: str
    alert: Alert
    channels: tuple[str, ...]
    ended: str | None
    delivered: Mapping[str, str]
    tries: Mapping[str, tuple[Mapping[str, Any], ...]]

    def waiting(self, channel: str, now: datetime) -> bool:
        """Whether a channel must still be told, and nobody is at it."""
        if self.ended or channel not in self.channels or channel in self.delivered:
            return False
        tries = self.tries.get(channel, ())
        if len(tries) >= MAX_TRIES:
            return False
        return not tries or "delivered" in tries[-1] or _age(tries[-1]["at"], now) > CLAIM


@dataclass(frozen=True)
class Missed:
    """A deadline that a run has missed: of ingest, score or reindex, for a partition, queued at (ISO 8601)."""

    verb: Literal["ingest", "score", "reindex"]
    partition: str
    queued: str


def clean(text: object, limit: int = MAX_REASON) -> str:
    """Return a text of a project in one line: no control or direction characters, cut to `limit`."""
    raw = str(text)[: 4 * limit]  # nothing needs to be read of a huge one that will not be shown
    one = "".join(" " if c.isspace() else c for c in raw if c.isspace() or unicodedata.category(c)[0] != "C")
    line = " ".join(one.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


# -- rules ---------------------------------------------------------------------------------------------


def holding(
    project: str,
    spec: ModelSpec,
    entries: Sequence[Entry],
    now: datetime,
    *,
    pages: str = "",
    missed: Missed | None = None,
) -> list[Alert]:
    """Return what holds now, from a project's whole ledger (`KINDS`, oldest first). `pages`: Airflow's base URL."""
    found: list[tuple[What, str, str, dict[str, Any]]] = [
        *_late(project, spec, entries, now, missed),
        *_labels(project, spec, entries),
        *_quarantine(project, spec, entries),
        *_stale(project, spec, entries),
        *_refused(project, spec, entries),
        *_untaken(spec, entries, now),
        *_approval(entries, now),
    ]
    return [
        Alert(
            kind,
            clean(subject, 100).replace("/", "_"),
            project,
            clean(spec.owner, 100),
            SEVERITY[kind],
            clean(reason),
            spec.runbook or f"{pages.rstrip('/')}/dags/{project}.{PAGE[kind]}",
            facts,
        )
        for kind, subject, reason, facts in found
    ]


Found = Iterable[tuple[What, str, str, dict[str, Any]]]


def _runs(project: str, entries: Iterable[Entry], *verbs: str) -> list[Entry]:
    """Return what Airflow's runs of the project did, of some verbs."""
    mine = (e for e in entries if e.kind == "run" and e.key.startswith(f"{project}/runs/{project}."))
    return [e for e in mine if e.payload.get("verb") in verbs]


def _newest(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Return the newest entry that ended well, by partition."""
    return {e.payload["key"]: e for e in entries if e.payload.get("status") == "done"}


def _late(
    project: str, spec: ModelSpec, entries: Sequence[Entry], now: datetime, missed: Missed | None
) -> list[tuple[What, str, str, dict[str, Any]]]:
    """Scores that are not there: a deadline missed, or features that nobody scored within `alerts.late`.

    It lasts until the partition has been scored (also: found to have no champion to score it with).
    """
    limit, after = seconds(spec.alerts.late), spec.alerts.late
    scored = {k: e.at for k, e in _newest(_runs(project, entries, "score")).items()}
    why: dict[str, tuple[str, str]] = {}  # partition: since, what was waited for
    for told in told_of(entries):
        if told.alert.kind == "late" and not told.ended:
            why[told.alert.subject] = (told.at, told.alert.reason)
    for key, made in _newest(_runs(project, entries, "materialize")).items():
        if made.key.startswith(f"{project}/runs/{project}.ingest--") and _age(made.at, now).total_seconds() > limit:
            said = f"the scores of {key} are late: its features have been there for more than {after}"
            why.setdefault(key, (made.at, said))
    if missed is not None:
        verb = "its scoring" if missed.verb == "score" else "its ingest"
        said = f"the scores of {missed.partition} are late: {verb} has not ended well within {after}"
        why.setdefault(missed.partition, (moment(missed.queued), said))
    failed = {e.payload["key"]: e for e in _runs(project, entries, "ingest", "validate", "materialize", "score")}
    found: list[tuple[What, str, str, dict[str, Any]]] = []
    for key, (since, said) in sorted(why.items()):
        if scored.get(key, "") >= since:
            continue
        last = failed.get(key)
        error = last.payload.get("error") if last is not None else None
        found.append(("late", key, f"{said} ({error})" if error and str(error) not in said else said, {"since": since}))
    return found


def _labels(project: str, spec: ModelSpec, entries: Sequence[Entry]) -> Found:
    """Too few rows of a partition have a label, its label delay having passed."""
    for key, entry in sorted(_newest(_runs(project, entries, "monitor")).items()):
        share = _number(entry, "labelled")
        if share is not None and share < spec.monitor.labelled:
            said = f"{share:.1%} of the rows of {key} have a label; at least {spec.monitor.labelled:.1%} should"
            yield "labels", key, said, {"labelled": share, "least": spec.monitor.labelled}


def _quarantine(project: str, spec: ModelSpec, entries: Sequence[Entry]) -> Found:
    """Too many rows of a partition are in quarantine: of one source (validate), or as the monitor counts them."""
    monitored = _newest(_runs(project, entries, "monitor"))
    validated = _newest(_runs(project, entries, "validate"))
    for key in sorted({*monitored, *validated}):
        shares: dict[str, float] = {}
        if key in validated:
            metrics = validated[key].payload.get("metrics", {})
            for source in spec.sources:
                away, rows = metrics.get(f"quarantined_{source}", 0.0), metrics.get(f"rows_{source}", 0.0)
                shares[source] = away / (away + rows) if away + rows else 0.0
        if key in monitored and (key not in validated or monitored[key].id > validated[key].id):
            share = _number(monitored[key], "quarantine")
            if share is not None:
                shares["the rows"] = share
        worst = max(shares, key=lambda name: shares[name], default=None)
        if worst is not None and shares[worst] > spec.alerts.quarantine:
            most = spec.alerts.quarantine
            said = f"{shares[worst]:.1%} of {worst} of {key} are in quarantine; at most {most:.1%} should"
            yield "quarantine", key, said, {"share": shares[worst], "most": most, "of": worst}


def _stale(project: str, spec: ModelSpec, entries: Sequence[Entry]) -> Found:
    """The champion has scored more partitions, all later than its training, than it should without a newer one."""
    changes = [e for e in entries if e.kind in ("promotion", "rollback") and e.phase == "done"]
    if not changes:
        return
    last, version = changes[-1], str(changes[-1].payload["version"])
    windows = {
        str(e.payload["version"]): e.payload["key"] for e in entries if e.kind == "run" and "version" in e.payload
    }
    end = str(windows.get(version) or last.payload.get("window", "")).rpartition("..")[2]
    scores = (e for e in _runs(project, entries, "score") if e.id > last.id and e.payload.get("verdict") != "skipped")
    used = sorted(key for key in _newest(scores) if key > end)
    if len(used) > spec.alerts.stale:
        said = (
            f"champion version {version}, trained up to {end}, has scored {len(used)} partitions, the last {used[-1]}; "
            f"a newer one should come within {spec.alerts.stale}"
        )
        yield "stale", f"version-{version}", said, {"version": version, "partitions": len(used), "since": last.at}


def _refused(project: str, spec: ModelSpec, entries: Sequence[Entry]) -> Found:
    """The gate has refused the last candidates, one after the other."""
    decisions = [e for e in entries if e.kind == "decision" and e.payload.get("verb", "gate") == "gate"]
    mine = [e for e in decisions if folder_of(e.payload).startswith(f"{project}/runs/{project}.")]
    row: dict[str, Entry] = {}  # by verdict: a gate that ran again on the same numbers refused no other candidate
    for entry in mine:
        if entry.payload.get("verdict") == "promote":
            row.clear()
        elif entry.payload.get("verdict") == "kept":
            row[str(entry.payload.get("output"))] = entry
    if len(row) >= spec.alerts.refused:
        last = list(row.values())[-1]
        champion = [str(e.payload["version"]) for e in entries if _changed(e)][-1:] or ["none"]
        why = (last.payload.get("reasons") or ["no reason on record"])[0]
        said = f"{len(row)} candidates in a row were refused; the last, of {last.payload['key']}: {why}"
        yield "refused", f"version-{champion[0]}", said, {"refused": len(row), "champion": champion[0]}


def _changed(entry: Entry) -> bool:
    return entry.kind in ("promotion", "rollback") and entry.phase == "done"


def _untaken(spec: ModelSpec, entries: Sequence[Entry], now: datetime) -> Found:
    """The monitor's last verdict is retrain, and no training took it up: nobody asks, or nobody listens."""
    verdicts = [e for e in entries if e.kind == "decision" and e.payload.get("verb") == "monitor"]
    # A `watch` that follows may be the cool-down's: only a verdict of none, or a training, ends it.
    last = next((e for e in reversed(verdicts) if e.payload.get("verdict") != "watch"), None)
    if last is None or last.payload.get("verdict") != "retrain":
        return
    done = {e.key for e in entries if e.kind == "request" and e.phase == "done"}
    asked = [e for e in entries if e.kind == "request" and e.phase == "intent" and e.id > last.id]
    if any(e.key in done for e in asked):
        return
    waits = "drift" in spec.retrain.on or bool(asked)
    since = asked[0].at if asked else last.at
    if waits and _age(since, now).total_seconds() <= seconds(spec.alerts.late):
        return
    why = (last.payload.get("reasons") or ["no reason on record"])[0]
    if asked:
        taker = "the request for a training has not been taken up"
    elif waits:
        taker = "no training was asked for"
    else:
        taker = "`retrain.on` does not hold `drift`, so a person must ask for a training"
    said = f"the monitor's verdict for {last.payload['key']} is retrain, and {taker}: {why}"
    yield "untaken", str(last.payload["key"]), said, {"since": since}


def _approval(entries: Sequence[Entry], now: datetime) -> Found:
    """A promotion waits for a person."""
    asked = approvals.waiting(entries, now)
    if asked is not None:
        p = asked.payload
        who = ", ".join(clean(name, 100) for name in p["approvers"][:20])
        said = (
            f"the candidate of {p['window']} waits for an approval by {who}, until {p['until']}; else: {p['otherwise']}"
        )
        yield "approval", f"{p['window']}-{asked.id}", said, {"until": p["until"], "verdict": p["verdict"]}


def _number(entry: Entry, metric: str) -> float | None:
    value = entry.payload.get("metrics", {}).get(metric)
    return float(value) if isinstance(value, int | float) else None


def _age(at: str, now: datetime) -> timedelta:
    return now - datetime.fromisoformat(at)


# -- the record -----------------------------------------------------------------------------------------


def told_of(entries: Iterable[Entry]) -> list[Told]:
    """Return the alerts on record, oldest first, with what became of each."""
    mine = [e for e in entries if e.kind == "alert"]
    ends = {e.key: e for e in mine if e.phase == "done"}
    tries: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for e in mine:
        if e.phase == "intent" and "channel" in e.payload:
            end: Mapping[str, Any] = ends[e.key].payload if e.key in ends else {}
            one = {"at": e.at, **{k: end[k] for k in ("delivered", "error") if k in end}}
            tries.setdefault(e.payload["of"], {}).setdefault(e.payload["channel"], []).append(one)
    found = []
    for e in mine:
        if e.phase != "intent" or "channel" in e.payload:
            continue
        alert = Alert(**{k: v for k, v in e.payload.items() if k != "channels"})
        by: dict[str, list[dict[str, Any]]] = tries.get(e.key, {})
        sent = {c: t["at"] for c, all_ in by.items() for t in all_ if t.get("delivered")}
        ended = ends[e.key].at if e.key in ends else None
        channels = tuple(e.payload["channels"])
        found.append(Told(e.key, e.at, alert, channels, ended, sent, {c: tuple(t) for c, t in by.items()}))
    return found


def settle(
    book: Ledger, project: str, alerts: Sequence[Alert], channels: Collection[str], known: Sequence[Told]
) -> list[Told]:
    """Record what is new and what has ended; return the alerts that hold, as they are on record.

    `known`: what was told when `alerts` were found. What another process has begun since is not this one's to end.
    """
    holds = {a.state for a in alerts}
    open_ = {t.alert.state: t for t in known if not t.ended}
    for state, told in open_.items():
        if state not in holds:
            book.record(project, "alert", told.key, "done", "orrery", {"ended": True})
    for alert in alerts:
        if alert.state not in open_:
            n = 1 + sum(t.alert.state == alert.state for t in known)
            payload = {**asdict(alert), "channels": sorted(channels)}
            book.record(project, "alert", f"{alert.state}/{n}", "intent", "orrery", payload)
    return [t for t in told_of(book.find(project, "alert")) if not t.ended]


def claim(book: Ledger, project: str, told: Told, channel: str, now: datetime) -> str | None:
    """Return the key of a try that is ours to make, or None: told already, or another process is at it."""
    if not told.waiting(channel, now):
        return None
    key = f"{told.key}/{channel}/{len(told.tries.get(channel, ())) + 1}"
    ours = book.record(project, "alert", key, "intent", "orrery", {"channel": channel, "of": told.key})
    return key if ours else None


def sent(book: Ledger, project: str, key: str, channel: str, error: str | None) -> None:
    """Record how a try ended. `error` is None when it was delivered; it holds no secret."""
    payload: dict[str, Any] = {"channel": channel, "delivered": error is None}
    if error is not None:
        payload["error"] = clean(error, 200)
    book.record(project, "alert", key, "done", "orrery", payload)
