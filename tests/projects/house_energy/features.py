"""What is known about a house when an hour begins. The table comes joined already, so there is nothing to look up."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orrery.features import rows

# The meter reports an hour's total two hours after the hour began.
REPORTED_AFTER_US = 2 * 3600 * 1_000_000
UTC_MICROSECONDS = pa.timestamp("us", tz="UTC")


@rows
def readings(raw: pa.Table) -> pa.Table:
    """One row per house and hour. label: kWh drawn in that hour, null when the meter did not report."""
    start = _instant(raw["hour_start"])
    hour = pc.hour(start).to_numpy()
    known = pc.cast(pc.add(pc.cast(start, pa.int64()), REPORTED_AFTER_US), UTC_MICROSECONDS)
    return pa.table(
        {
            "key": raw["reading_id"].cast(pa.string()),
            "prediction_time": start,
            "label": raw["energy_kwh"].cast(pa.float64()),
            "label_time": known,
            "heating": raw["heating"].cast(pa.string()),
            "floor_area": raw["floor_area"].cast(pa.float64()),
            "residents": raw["residents"].cast(pa.float64()),
            "outdoor_c": raw["outdoor_c"].cast(pa.float64()),
            # The day's course as a point on a circle: 23 o'clock is next to 0 o'clock.
            "hour_sin": pa.array(np.sin(hour * np.pi / 12)),
            "hour_cos": pa.array(np.cos(hour * np.pi / 12)),
            "weekend": pc.greater_equal(pc.day_of_week(start), 5),
            "drawn_24h_ago": raw["drawn_24h_ago"].cast(pa.float64()),
            "_house": raw["house"].cast(pa.string()),
        }
    )


def _instant(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return UTC instants, whether the column is a timestamp already or ISO text."""
    return column.cast(UTC_MICROSECONDS)
