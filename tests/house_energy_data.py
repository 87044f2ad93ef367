"""Meter readings for the second project in tests/projects: seeded, day by day, with gaps as real meters have them."""

from __future__ import annotations

import csv
import math
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

HOUSES, MOST_HOUSES = 40, 1000
FIELDS = (
    "reading_id", "house", "hour_start", "heating", "floor_area", "residents", "outdoor_c", "drawn_24h_ago",
    "energy_kwh",
)  # fmt: skip
HEATING = ("heat_pump", "gas", "district")
FIRST = datetime(2025, 1, 6, tzinfo=UTC)


def land(folder: Path, days: int, first: datetime = FIRST, houses: int = HOUSES) -> list[str]:
    """Write `<folder>/<day>.csv` for each day and return the days' keys, such as 2025-01-06."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = [(first + timedelta(days=d)).strftime("%Y-%m-%d") for d in range(days)]
    for d, key in enumerate(keys):
        with (folder / f"{key}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            for hour in range(24):
                writer.writerows(_row(house, first + timedelta(days=d, hours=hour)) for house in range(houses))
    return keys


def _row(house: int, start: datetime) -> list[object]:
    kind, area, residents = _house(house)
    chance = _draws(1, start)[start.hour, house]
    forecast = "" if chance < 0.02 else round(_outdoor(start) + chance - 0.5, 1)
    reported = "" if chance > 0.99 else round(_drawn(house, start), 3)
    day_before = round(_drawn(house, start - timedelta(days=1)), 3)
    name = f"h{house:03d}"
    return [
        f"{name}-{start:%Y%m%dT%H}", name, start.strftime("%Y-%m-%dT%H:%M:%SZ"), kind, area, residents, forecast,
        day_before, reported,
    ]  # fmt: skip


def _draws(purpose: int, start: datetime) -> npt.NDArray[np.float64]:
    """Return uniform numbers [hour, house] of one day: the same for a day whichever days are asked for."""
    return _draws_of_day(purpose, start.toordinal())


@lru_cache(maxsize=16)
def _draws_of_day(purpose: int, day: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng((purpose, day)).random((24, MOST_HOUSES))


@lru_cache(maxsize=MOST_HOUSES)
def _house(house: int) -> tuple[str, float, int]:
    rng = np.random.default_rng((7, house))
    return HEATING[house % 3], round(float(rng.uniform(45, 220)), 1), int(rng.integers(1, 6))


def _outdoor(start: datetime) -> float:
    """Degrees Celsius: a cold winter that warms slowly, colder at night, and weather that moves from day to day."""
    day = (start - FIRST).total_seconds() / 86400
    return 1 + 0.05 * day + 4 * math.sin(day * 0.9) + 3 * math.sin((start.hour - 9) * math.pi / 12)


def _drawn(house: int, start: datetime) -> float:
    """kWh in one hour: standby, people who are at home and awake, and heating against the cold."""
    kind, area, residents = _house(house)
    awake = math.exp(-((start.hour - 19) ** 2) / 8) + 0.6 * math.exp(-((start.hour - 7) ** 2) / 4)
    at_home = 1.3 if start.weekday() >= 5 else 1.0
    heating = {"heat_pump": 0.0011, "gas": 0.00008, "district": 0.00004}[kind] * area * max(0.0, 18 - _outdoor(start))
    habit = 0.4 * (_draws(2, start)[start.hour, house] - 0.5)
    return float(max(0.02, 0.0012 * area + 0.35 * residents * awake * at_home + heating + habit))
