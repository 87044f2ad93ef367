"""The note on a run: what came of it, so that the list of runs can be read without opening any.

Airflow's scheduler calls the listener; a note that cannot be written is logged and never fails a run.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from airflow.listeners import hookimpl

from orrery.orchestration.params import run_name

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

log = logging.getLogger("orrery.notes")
MAX_LENGTH = 900


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
        try:
            project, _, verb = dag_run.dag_id.partition(".")
            if verb not in ("ingest", "train", "score") or dag_run.note:
                return
            text = note(project, run_name(dag_run))
            if text:
                dag_run.note = text[:MAX_LENGTH]
        except Exception:
            log.exception("the note of run %s could not be written", dag_run.run_id)


def note(project: str, run: str) -> str:
    """Return the note for a run, from the ledger: its last steps that say something."""
    from orrery import platform
    from orrery.ledger import Ledger

    prefix = f"{project}/runs/{run}/"
    entries = Ledger(platform.load().ledger).find(project, "run", prefix=prefix)
    lines = []
    for entry in entries:
        p = entry.payload
        if p["status"] != "done":
            lines.append(f"{p['verb']} {p['key']}: {p.get('error', p['status'])}")
        elif p["verb"] in ("ingest", "gate", "promote", "score"):
            lines.append(f"{p['verb']} {p['key']}: {p.get('verdict') or p.get('skipped') or 'done'}")
            lines.extend(f"- {reason}" for reason in p.get("reasons", ())[:12])
    return "\n".join(lines)
