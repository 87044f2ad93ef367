"""`labels`: waits, off any worker, until the labels of a partition are known, and says so."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from orrery import partitions
from orrery.orchestration import params
from orrery.plan import Planner
from orrery.spec import ModelSpec, seconds

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger("orrery.labels")


def known_from(spec: ModelSpec, partition: str) -> datetime:
    """Return when the last labels of a partition are known: its end, and the declared delay after it (UTC)."""
    return partitions.bounds(partition, spec.grain)[1] + timedelta(seconds=seconds(spec.label.delay))


def behind(planner: Planner, partition: str, back: int = 6) -> list[str]:
    """Return the partitions up to `back` before this one that have scores, known labels, and no health of these scores.

    The monitor looks back at six (`Planner`); in key order.
    """
    store, project = planner.store, planner.project
    there, now = set(store.keys(project, "scores")), datetime.now(UTC)
    found = []
    for i in range(back, 0, -1):
        key = partitions.shift(partition, planner.spec.grain, -i)
        if key not in there or known_from(planner.spec, key) > now:
            continue
        scores, health = store.latest(project, "scores", key), store.latest_manifest(project, "health", key)
        used = health.inputs.get("scores", ()) if health else ()
        if scores is not None and [r.digest for r in used] != [scores.digest]:
            found.append(key)
    return found


class LabelsOperator(BaseOperator):
    """Ends once the labels of the run's partition are known. Of a partition long past it does not wait at all.

    The clock tells when to look, never at what: that is the partition.
    """

    ui_color = "#e8eef7"

    def __init__(self, *, project: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.project = project

    def execute(self, context: Context) -> str:
        """Return the partition. Raises `RequestError` (64) for a run that names none."""
        planner = Planner(self.project)
        partition = params.read(context, planner).partitions[0]
        moment = known_from(planner.spec, partition)
        if moment > datetime.now(UTC):
            log.info("the labels of %s are known from %s on: waiting", partition, moment.isoformat())
            from airflow.providers.standard.triggers.temporal import DateTimeTrigger

            self.defer(trigger=DateTimeTrigger(moment=moment), method_name="known")
        return self.known(context)

    def known(self, context: Context, event: Any = None) -> str:
        """Say which partition has its labels (also where Airflow goes on after the wait)."""
        asked = params.read(context, Planner(self.project))
        partition = asked.partitions[0]
        log.info("the labels of %s are known", partition)
        for outlet in self.outlets:
            context["outlet_events"][outlet].add_partitions(partition)
        return partition
