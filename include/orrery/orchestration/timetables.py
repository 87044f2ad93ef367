"""When a project's Dags run. Time is the partition key: logical dates choose nothing."""

from __future__ import annotations

from typing import Any

from airflow.sdk import (
    CronPartitionTimetable,
    PartitionedAssetTimetable,
    QuarterWindow,
    RollupMapper,
    StartOfQuarterMapper,
)

from orrery.orchestration.assets import asset
from orrery.partitions import FORMATS
from orrery.spec import ModelSpec


def ingest_schedule(spec: ModelSpec) -> CronPartitionTimetable:
    """Return the cron of ingest: each run's key is the partition that ended before it. Backfillable by partition."""
    return CronPartitionTimetable(spec.cron, timezone="UTC", run_offset=-1, key_format=FORMATS[spec.grain])


def train_schedule(project: str, spec: ModelSpec) -> Any:
    """Return what starts a training by itself: three months of features that make up a quarter, or nothing."""
    if "quarterly" not in spec.retrain.on:
        return None
    quarter = RollupMapper(upstream_mapper=StartOfQuarterMapper(input_format=FORMATS["month"]), window=QuarterWindow())
    features = asset(project, "features")
    return PartitionedAssetTimetable(assets=features, partition_mapper_config={features: quarter})


def score_schedule(project: str) -> PartitionedAssetTimetable:
    """Return what starts scoring: one run for each partition of features, never coalesced."""
    return PartitionedAssetTimetable(assets=asset(project, "features"))
