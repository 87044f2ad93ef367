"""What house_energy knows, and what houses with the same heating have drawn since, as far as it was reported."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orrery.features import rows, view

REPORTED_AFTER_US = 2 * 3600 * 1_000_000
UTC_MICROSECONDS = pa.timestamp("us", tz="UTC")


@rows
def readings(raw: pa.Table) -> pa.Table:
    """One row per house and hour. label: kWh drawn in that hour, null when the meter did not report."""
    start = raw["hour_start"].cast(UTC_MICROSECONDS)
    hour = pc.hour(start).to_numpy()
    return pa.table(
        {
            "key": raw["reading_id"].cast(pa.string()),
            "prediction_time": start,
            "label": raw["energy_kwh"].cast(pa.float64()),
            "label_time": _reported(start),
            "heating": raw["heating"].cast(pa.string()),
            "floor_area": raw["floor_area"].cast(pa.float64()),
            "residents": raw["residents"].cast(pa.float64()),
            "outdoor_c": raw["outdoor_c"].cast(pa.float64()),
            "evening": pa.array(np.exp(-((hour - 19.0) ** 2) / 8)),
            "morning": pa.array(np.exp(-((hour - 7.0) ** 2) / 4)),
            "drawn_24h_ago": raw["drawn_24h_ago"].cast(pa.float64()),
        }
    )


@view(on=["heating"], ttl="1d", source="readings")
def alike(raw: pa.Table) -> pa.Table:
    """The mean draw of one hour, by heating."""
    means = raw.group_by(["heating", "hour_start"], use_threads=False).aggregate([("energy_kwh", "mean")])
    start = means["hour_start"].cast(UTC_MICROSECONDS)
    return pa.table(
        {
            "heating": means["heating"].cast(pa.string()),
            "event_time": start,
            "available_time": _reported(start),
            "drawn": means["energy_kwh_mean"].cast(pa.float64()),
        }
    )


def _reported(start: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return when an hour's total is known: two hours after the hour began."""
    return pc.cast(pc.add(pc.cast(start, pa.int64()), REPORTED_AFTER_US), UTC_MICROSECONDS)
