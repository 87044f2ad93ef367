"""The append-only record: runs, decisions, promotions. Written by the orchestrator alone, never by a step.

An effect on the world is three facts: `intent` (about to), the effect itself, `done`. A crash in between
leaves an intent without a done; driving the same key again finishes it. One (project, kind, key, phase)
exists at most once, so nothing is recorded twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InterfaceError, OperationalError, ProgrammingError

from orrery.databases import REFUSED, scrub, with_driver
from orrery.errors import RequestError, TryAgain, UserError

Kind = Literal["run", "decision", "promotion", "rollback", "request", "approval", "alert", "housekeeping"]
Phase = Literal["intent", "done"]
# So much of a key stands in the ledger as it is, however long it is.
KEPT = 185

metadata = sa.MetaData()
entries = sa.Table(
    "orrery_ledger",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("project", sa.String(63), nullable=False, index=True),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("key", sa.String(250), nullable=False),
    sa.Column("phase", sa.String(10), nullable=False),
    sa.Column("actor", sa.String(250), nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.UniqueConstraint("project", "kind", "key", "phase", name="orrery_ledger_once"),
)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger. `at` is ISO 8601 in UTC."""

    id: int
    at: str
    project: str
    kind: Kind
    key: str
    phase: str
    actor: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Champion:
    """The model version in use: its number in the registry, the manifest of its training, and since when."""

    version: str
    model: str
    since: str
    actor: str
    reason: str


@lru_cache(maxsize=8)
def _engine(url: str, process: int) -> sa.Engine:
    """Return the engine of one process: a connection must not be shared with a fork."""
    url = with_driver(url)
    try:
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            engine = sa.create_engine(url, connect_args={"timeout": 30})
        else:
            engine = sa.create_engine(url, pool_pre_ping=True)
    except (ArgumentError, ImportError, OSError) as e:
        shown = e.strerror if isinstance(e, OSError) else type(e).__name__
        raise UserError(
            f"the ledger's URL cannot be used ({shown})",
            hint="ORRERY_LEDGER, such as sqlite:////srv/ledger.db or postgresql+psycopg://…",
        ) from None
    with _reachable(url):
        try:
            metadata.create_all(engine)
        except (ProgrammingError, IntegrityError, OperationalError) as e:
            if "already exists" not in str(e):
                raise
            metadata.create_all(engine)  # two processes made the table at once: now it is there
    return engine


@contextmanager
def _reachable(url: str) -> Iterator[None]:
    """Turn what a database says into an error with the right exit code, without its password."""
    try:
        yield
    except DBAPIError as e:
        parsed = sa.engine.make_url(url)
        said = scrub(str(e.orig), parsed)
        shown = parsed.render_as_string(hide_password=True)
        if REFUSED.search(said) or not isinstance(e, OperationalError | InterfaceError):
            raise UserError(
                f"the ledger {shown} cannot be used: {said}",
                hint="check ORRERY_LEDGER: the database, its login and grants (a file: that its folder may be written)",
            ) from None
        raise TryAgain(f"the ledger {shown} cannot be reached: {said}") from None


class Ledger:
    """The ledger at a database URL (SQLite or PostgreSQL). The table is made when it is not there."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url, os.getpid())

    def record(self, project: str, kind: Kind, key: str, phase: Phase, actor: str, payload: dict[str, Any]) -> bool:
        """Append one entry; return False when that entry exists already (then nothing changes)."""
        row = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "project": project,
            "kind": kind,
            "key": _short(key),
            "phase": phase,
            "actor": actor[:250],
            "payload": json.dumps(payload, sort_keys=True),
        }
        with _reachable(self.url):
            try:
                with self.engine.begin() as connection:
                    connection.execute(entries.insert().values(**row))
            except IntegrityError:
                return False
        return True

    def find(
        self, project: str, *kinds: Kind, phase: Phase | None = None, at: str | None = None, prefix: str = ""
    ) -> list[Entry]:
        """Return entries of a project (of some kinds), oldest first, up to the moment `at` (ISO 8601, UTC).

        `prefix`: only those whose key begins so.
        """
        query = sa.select(entries).where(entries.c.project == project).order_by(entries.c.id)
        if kinds:
            query = query.where(entries.c.kind.in_(kinds))
        if phase:
            query = query.where(entries.c.phase == phase)
        if prefix:
            query = query.where(entries.c.key.startswith(prefix, autoescape=True))
        if at:
            query = query.where(entries.c.at <= moment(at))
        with _reachable(self.url), self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [Entry(**{**r, "payload": json.loads(r["payload"])}) for r in rows]

    def recent(
        self,
        project: str,
        *kinds: Kind,
        phase: Phase | None = None,
        verb: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> list[Entry]:
        """Return at most `limit` entries of a project, newest first: of some kinds, of one verb, older than `before`.

        Only these are read and parsed, however long the ledger is.
        """
        query = sa.select(entries).where(entries.c.project == project).order_by(entries.c.id.desc()).limit(limit)
        if kinds:
            query = query.where(entries.c.kind.in_(kinds))
        if phase:
            query = query.where(entries.c.phase == phase)
        if verb:
            # As `record` writes it. Inside of a text the quotes would be escaped, so no text can look like it.
            query = query.where(entries.c.payload.contains(f'"verb": {json.dumps(verb)}', autoescape=True))
        if before is not None:
            query = query.where(entries.c.id < before)
        with _reachable(self.url), self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [Entry(**{**r, "payload": json.loads(r["payload"])}) for r in rows]

    def count(self, project: str) -> int:
        """Return how many entries a project has."""
        query = sa.select(sa.func.count()).where(entries.c.project == project)
        with _reachable(self.url), self.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def get(self, project: str, kind: Kind, key: str, phase: Phase) -> Entry | None:
        """Return one entry, or None."""
        query = sa.select(entries).where(
            entries.c.project == project, entries.c.kind == kind, entries.c.key == _short(key), entries.c.phase == phase
        )
        with _reachable(self.url), self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return Entry(**{**row, "payload": json.loads(row["payload"])}) if row else None

    def champion(self, project: str, at: str | None = None) -> Champion | None:
        """Return the model version in use (at a moment in the past, when given), or None."""
        changes = self.find(project, "promotion", "rollback", phase="done", at=at)
        if not changes:
            return None
        last = changes[-1]
        return Champion(
            last.payload["version"], last.payload["model"], last.at, last.actor, last.payload.get("reason", "")
        )

    def versions(self, project: str) -> dict[str, str]:
        """Return every version that was ever champion and the manifest of its training, oldest first."""
        done = self.find(project, "promotion", "rollback", phase="done")
        return {e.payload["version"]: e.payload["model"] for e in done}

    def champions(self, project: str) -> list[str]:
        """Return the versions from the first champion to the present one, as a stack.

        A promotion lays a version on top, a rollback takes off what lies above its version.
        """
        stack: list[str] = []
        for change in self.find(project, "promotion", "rollback", phase="done"):
            version = str(change.payload["version"])
            if change.kind == "rollback" and version in stack:
                while stack[-1] != version:
                    stack.pop()
            elif stack[-1:] != [version]:  # promoted anew, on another evaluation, it is no other champion
                stack.append(version)
        return stack

    def registered(self, project: str) -> dict[str, str]:
        """Return every registered version and the manifest of its training, oldest first."""
        runs = [e.payload for e in self.find(project, "run") if "version" in e.payload]
        return {str(p["version"]): str(p["model"]) for p in runs}


def unfinished(entries: list[Entry]) -> list[Entry]:
    """Return the intents that were neither done nor overtaken by a later change of the champion."""
    changes = [e for e in entries if e.kind in ("promotion", "rollback")]
    done = {(e.kind, e.key) for e in changes if e.phase == "done"}
    last = max((e.id for e in changes if e.phase == "done"), default=0)
    return [e for e in changes if e.phase == "intent" and (e.kind, e.key) not in done and e.id > last]


def moment(text: str) -> str:
    """Return a moment in UTC as the ledger writes it. Raises `RequestError` for anything but ISO 8601."""
    try:
        parsed = datetime.fromisoformat(text)
        if parsed.tzinfo is None:
            parsed = parsed.replace(tzinfo=UTC)
        # A day without an hour means its end: "--at 2013-04-01" is what was true on that day.
        if _is_day(text):
            parsed = parsed.replace(hour=23, minute=59, second=59, microsecond=999000)
        return parsed.astimezone(UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError):
        raise RequestError(
            f"{text!r} is not a time", hint="ISO 8601, such as 2013-04-01 or 2013-04-01T12:00+00:00"
        ) from None


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _short(key: str) -> str:
    """Return a key that fits its column; a long one keeps a digest, so that two never become one."""
    return key if len(key) <= 250 else f"{key[:KEPT]}-{hashlib.sha256(key.encode()).hexdigest()}"
