"""When alerts are looked for, and how they go out: Airflow's callbacks on tasks, and deadlines on runs.

Every occasion does the same: read the project's ledger, see what holds (`orrery.alerts`), write down what is new
or has ended, send what has not gone out. A channel that fails is left alone until the next occasion. Nothing here
can fail a task or a run: Airflow has recorded how the task ended before it calls back, and all errors end in the log.

A task's callbacks run in its worker. A deadline's callback runs in the triggerer (`AsyncCallback`), which every
executor has; `SyncCallback` runs in the executor, and of Airflow 3.3's only the local one can. Airflow forgets a
run's deadline once the run has succeeded, so a partition whose features are there and that nobody scores is
seen by the ledger's clock at the project's next occasion.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.notifier import BaseNotifier
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference

from orrery import alerts, partitions, platform
from orrery.alerts import Alert, Missed, Told
from orrery.ledger import Ledger
from orrery.rag import alerts as knowledge
from orrery.spec import KnowledgeBaseSpec, ModelSpec, load, seconds

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger("orrery.alerts")
# Tasks after which a rule may hold, or hold no more.
OCCASIONS = frozenset(
    {
        *("validate", "materialize", "gate", "approve", "promote", "rollback", "score", "monitor", "request"),
        *("collect", "index"),
    }
)
DEADLINES = ("ingest", "score", "reindex")
# At most so many go out at one occasion; the rest waits for the next.
MOST = 20


class OrreryNotifier(BaseNotifier):
    """Tells a project's owner what holds. `missed`: this is the deadline of a Dag (`DEADLINES`)."""

    def __init__(self, project: str, missed: str | None = None, context: Context | None = None) -> None:
        super().__init__(context=context)
        self.project, self.missed = project, missed

    def notify(self, context: Context) -> None:
        """Look and tell; every error ends here, in the log."""
        try:
            occasion(self.project, missed=_missed(self.missed, context))
        except Exception as e:
            log.error("alerts of %s could not be looked at (%s)", self.project, type(e).__name__, exc_info=True)

    async def async_notify(self, context: Context) -> None:
        """Do the same beside the triggerer's event loop, which must not wait for a server."""
        await asyncio.to_thread(self.notify, context)


def task_callbacks(project: str, task: str) -> dict[str, Any]:
    """Return the callbacks of a task, for its operator; none where no rule could change."""
    if task not in OCCASIONS:
        return {}
    tell = OrreryNotifier(project)
    return {"on_success_callback": tell, "on_failure_callback": tell, "on_skipped_callback": tell}


def deadline(project: str, verb: str, spec: ModelSpec | KnowledgeBaseSpec) -> DeadlineAlert | None:
    """Return the deadline of a Dag's runs, from when they are queued; None where nobody waits for them."""
    if verb not in DEADLINES:
        return None
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(seconds=seconds(spec.alerts.late)),
        callback=AsyncCallback(OrreryNotifier, kwargs={"project": project, "missed": verb}),
        name=f"{project} {verb} late"[:250],
    )


def occasion(project: str, *, missed: Missed | None = None) -> list[Told]:
    """Record what holds now for a project, and send what has not gone out; return what is open."""
    from orrery.orchestration import channels

    now = datetime.now(UTC)
    book = Ledger(platform.load().ledger)
    known = alerts.told_of(book.find(project, "alert"))
    found = states(project, book, now, missed)
    open_ = alerts.settle(book, project, found, channels.channels(), known)
    for told in open_:
        if told.key not in {t.key for t in known}:
            a = told.alert
            log.warning("alert %s: %s (owner: %s; %s)", told.key, a.reason, a.owner, a.runbook)
    until = time.monotonic() + channels.BUDGET
    for name in channels.channels():
        _send(book, project, name, open_, until)
    return open_


def states(project: str, book: Ledger, now: datetime, missed: Missed | None = None) -> list[Alert]:
    """Return what holds now, by the project's spec and ledger."""
    spec = load(platform.project_folder(project))
    if missed is not None:
        partitions.parse(missed.partition, spec.grain)
    if isinstance(spec, KnowledgeBaseSpec):
        return knowledge.holding(project, spec, book.find(project, *alerts.KINDS), now, pages=_pages(), missed=missed)
    return alerts.holding(project, spec, book.find(project, *alerts.KINDS), now, pages=_pages(), missed=missed)


def _send(book: Ledger, project: str, channel: str, open_: list[Told], until: float) -> None:
    """Send what a channel has not been told, until it fails or the time (monotonic seconds) is over."""
    from orrery.orchestration import channels

    send, count = None, 0
    for told in open_:
        left = until - time.monotonic()
        key = alerts.claim(book, project, told, channel, datetime.now(UTC)) if count < MOST and left > 1 else None
        if key is None:
            continue
        count += 1
        send = send or channels.open_channel(channel)
        error = channels.within(left, lambda send=send, told=told: send(told))  # type: ignore[misc]
        alerts.sent(book, project, key, channel, error)
        if error is not None:
            log.warning(
                "alert %s is not told by %s: %s; it is tried again at the next occasion", told.key, channel, error
            )
            return
        log.info("alert %s told by %s", told.key, channel)


def _pages() -> str:
    """Return Airflow's base URL, for links."""
    from airflow.sdk.configuration import conf

    return str(conf.get("api", "base_url", fallback="") or "")


def _missed(verb: str | None, context: Mapping[str, Any]) -> Missed | None:
    """Return the deadline that a run has missed, from what the scheduler tells a callback about the run."""
    if verb not in DEADLINES:
        return None
    run = context["dag_run"]
    partition = run.get("partition_key") or (run.get("conf") or {}).get("partition")
    if verb == "reindex":  # of a run by hand the day it was asked for
        partition = partition or str(run.get("run_after") or run.get("queued_at") or "")[:10] or None
    if not isinstance(partition, str) or not run.get("queued_at"):
        log.warning(
            "run %s of %s missed its deadline, and names no partition", run.get("dag_run_id"), run.get("dag_id")
        )
        return None
    return Missed(verb, partition, str(run["queued_at"]))  # type: ignore[arg-type]  # one of DEADLINES
