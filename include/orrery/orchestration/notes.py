"""The note on a run: what came of it, so that the list of runs can be read without opening any.

Airflow's scheduler calls the listener; a note that cannot be written is logged and never fails a run. What a
person wrote on the run stays, below ours; ours is written anew each time the run ends (red, cleared, green),
and comes first, since the UI shows a note by its first line.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from airflow.listeners import hookimpl

from orrery.orchestration.assets import ALL_DAGS
from orrery.orchestration.params import first_name, run_name

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

    from orrery.ledger import Entry

log = logging.getLogger("orrery.notes")
MAX_LENGTH = 900  # Airflow's column takes 1000
MARK = "\n— Orrery"  # ends our part
# What a note tells of steps that went well, what matters most first: the UI shows a note by its first line.
TOLD = (
    *("rollback", "gate", "approve", "promote", "tune", "monitor", "score", "ingest", "request"),
    *("collect", "evaluate"),
)


class Notes:
    """Writes the verdict of a project's run on the run."""

    @hookimpl
    def on_dag_run_success(self, dag_run: DagRun, msg: str) -> None:
        """Note a run that ended well: promoted, kept and why, scored."""
        self._note(dag_run)

    @hookimpl
    def on_dag_run_failed(self, dag_run: DagRun, msg: str) -> None:
        """Note a run that failed: the step and the reason."""
        self._note(dag_run)

    def _note(self, dag_run: DagRun) -> None:
        project, _, verb = dag_run.dag_id.partition(".")
        if verb not in ALL_DAGS:
            return
        # A rollback happens once for a run, however often it is cleared.
        name = first_name(dag_run) if verb == "rollback" else run_name(dag_run)
        try:
            if text := note(project, name):
                _write(dag_run, text)
        except Exception:
            log.exception("the note of run %s could not be written", dag_run.run_id)


def _write(dag_run: DagRun, text: str) -> None:
    """Put our part of the note in place. The scheduler commits it; a run of `dag.test()` is in no session any more."""
    from airflow.utils.session import create_session
    from sqlalchemy.orm import object_session

    if object_session(dag_run) is None:
        with create_session() as session:
            found = session.get(type(dag_run), dag_run.id)
            if found is not None:
                found.note = merged(found.note, text)
        return
    dag_run.note = merged(dag_run.note, text)


def merged(before: str | None, text: str) -> str:
    """Return the note with our part new, above what a person wrote."""
    ours, mark, theirs = (before or "").partition(MARK)
    theirs = theirs if mark else ours
    room = max(MAX_LENGTH // 2, MAX_LENGTH - len(MARK) - len(text))
    kept = f"\n{theirs.strip()}"[:room] if theirs.strip() else ""
    return text[: MAX_LENGTH - len(MARK) - len(kept)] + MARK + kept


def note(project: str, run: str) -> str:
    """Return the note for a run, from the ledger: how each of its steps ended at last, if that says something."""
    from orrery import attempts, budgets, platform
    from orrery.ledger import Ledger

    prefix = f"{project}/runs/{run}/"
    entries = Ledger(platform.load().ledger).find(project, "run", prefix=prefix)
    last: dict[tuple[str, str], dict[str, Any]] = {}
    tried: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        tried.setdefault((entry.payload["verb"], entry.payload["key"]), []).append(entry)
    for p in (entry.payload for entry in entries):
        last.pop((p["verb"], ""), None)  # refused before it was known on what; tried again since
        last[p["verb"], p["key"]] = p
    judged = [key for verb, key in last if verb == "monitor"]
    for key in judged[:-1]:  # an earlier partition that could not be judged is left out, and the run is green
        if _red(last["monitor", key]):
            del last["monitor", key]
    wrong = [f"{verb} {key}".strip() + f": {p.get('error', p['status'])}" for (verb, key), p in last.items() if _red(p)]
    well = [(verb, key, p) for (verb, key), p in last.items() if verb in TOLD and not _red(p)]
    well.sort(key=lambda told: TOLD.index(told[0]))
    again = {f"{verb} {key}": budgets.summary(attempts.of(found)) for (verb, key), found in tried.items() if key}
    lines = [*wrong, *(line for verb, key, p in well for line in _lines(verb, key, p))]
    return "\n".join([*lines, *(f"{step}: {text}" for step, text in again.items() if text)])


def _red(p: dict[str, Any]) -> bool:
    return bool(p["status"] != "done")


def _lines(verb: str, key: str, p: dict[str, Any]) -> list[str]:
    """Return a step that went well: its verdict, then its reasons. One reason of a request shares the line."""
    ended, reasons = p.get("verdict") or p.get("skipped") or "done", list(p.get("reasons") or ())[:12]
    if verb == "rollback" and "model_version" in p.get("facts", {}):
        ended = f"version {p['facts']['model_version']} is the champion again"
    if verb == "request":
        reasons = reasons or [p["skipped"]]
        return [f"{verb} {key}: {ended}, {reason}" for reason in reasons]
    return [f"{verb} {key}: {ended}", *(f"- {reason}" for reason in reasons)]
