"""When a project's Dags run. Time is the partition key: logical dates choose nothing."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import CronPartitionTimetable, PartitionedAssetTimetable

from orrery import partitions
from orrery.orchestration.assets import asset
from orrery.partitions import FORMATS
from orrery.spec import ModelSpec


def ingest_schedule(spec: ModelSpec) -> CronPartitionTimetable:
    """Return the cron of ingest: each run's key is the partition that ended before it. Backfillable by partition."""
    return CronPartitionTimetable(spec.cron, timezone="UTC", run_offset=-1, key_format=FORMATS[spec.grain])


def request_schedule(project: str, spec: ModelSpec) -> Any:
    """Return what asks for a training by itself: features that landed, a cron, or nothing.

    A cron's key is the partition of its tick, whatever its rhythm (a week's before it may lie in the same month);
    the task takes the partition that ended before that.
    """
    if spec.retrain.cron:
        return CronPartitionTimetable(spec.retrain.cron, timezone="UTC", run_offset=0, key_format=FORMATS[spec.grain])
    return after(project, "features") if {"each", "quarterly"} & set(spec.retrain.on) else None


def after(project: str, dataset: str) -> PartitionedAssetTimetable:
    """Return the schedule of a Dag that follows a dataset: one run for each event's key, first come, first served."""
    return PartitionedAssetTimetable(assets=asset(project, dataset))


def end_date(spec: ModelSpec) -> datetime | None:
    """Return when the last partition's tick is past and the next one's has not come, or None where data go on.

    A tick comes after its partition has ended and before the next one has, so the end of that next one lies between.
    """
    if spec.ends is None:
        return None
    following = partitions.shift(spec.ends, spec.grain, 1)
    return partitions.bounds(following, spec.grain)[1] - timedelta(seconds=1)
