"""Partition keys and windows: time as text, the one thing that chooses data.

A key is `2013` (year), `2013-03` (month), `2013-03-14` (day) or `2013-03-14T05` (hour), in UTC. A window
is `first..last`, both included. Logical dates and clocks choose nothing.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Literal

from orrery.errors import RequestError

Grain = Literal["hour", "day", "month", "year"]
FORMATS: dict[str, str] = {"hour": "%Y-%m-%dT%H", "day": "%Y-%m-%d", "month": "%Y-%m", "year": "%Y"}
PATTERNS: dict[str, str] = {
    "hour": "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}",
    "day": "[0-9]{4}-[0-9]{2}-[0-9]{2}",
    "month": "[0-9]{4}-[0-9]{2}",
    "year": "[0-9]{4}",
}
EXAMPLES: dict[str, str] = {"hour": "2013-03-14T05", "day": "2013-03-14", "month": "2013-03", "year": "2013"}
MAX_WINDOW = 20_000


def parse(key: str, grain: Grain) -> datetime:
    """Return the start of partition `key` in UTC. Raises `RequestError` for anything but a key of that size."""
    if isinstance(key, str) and re.fullmatch(PATTERNS[grain], key, flags=re.ASCII):
        try:
            return datetime.strptime(key, FORMATS[grain]).replace(tzinfo=UTC)
        except ValueError:
            pass
    raise RequestError(f"partition {str(key)[:80]!r} is not a {grain}", hint=f"give a key such as {EXAMPLES[grain]}")


def key_of(moment: datetime, grain: Grain) -> str:
    """Return the key of the partition that contains `moment` (UTC)."""
    # isoformat pads the year to four digits, which strftime leaves to the platform.
    return moment.isoformat()[: len(EXAMPLES[grain])]


def shift(key: str, grain: Grain, by: int) -> str:
    """Return the key `by` partitions later (earlier when negative). Raises `RequestError` outside the years 1-9999."""
    start = parse(key, grain)
    try:
        if grain in ("month", "year"):
            months = start.year * 12 + start.month - 1 + by * (12 if grain == "year" else 1)
            return key_of(start.replace(year=months // 12, month=months % 12 + 1), grain)
        return key_of(start + (timedelta(hours=by) if grain == "hour" else timedelta(days=by)), grain)
    except (ValueError, OverflowError):
        raise RequestError(f"there is no {grain} {by:+d} from {key}: years go from 1 to 9999") from None


def bounds(key: str, grain: Grain) -> tuple[datetime, datetime]:
    """Return the partition's start (included) and end (excluded) in UTC."""
    return parse(key, grain), parse(shift(key, grain, 1), grain)


def window(text: str, grain: Grain) -> tuple[str, ...]:
    """Return the keys of `first..last` (or of a single key), in order."""
    first, dots, last = text.partition("..")
    last = last if dots else first
    begin, end = parse(first, grain), parse(last, grain)
    if begin > end:
        raise RequestError(f"window {text!r} ends before it begins", hint=f"write {last}..{first}")
    keys = [first]
    while keys[-1] != last:
        keys.append(shift(keys[-1], grain, 1))
        if len(keys) > MAX_WINDOW:
            raise RequestError(f"window {text!r} has more than {MAX_WINDOW:,} partitions")
    return tuple(keys)


def window_name(keys: tuple[str, ...]) -> str:
    """Return the text of a window, `first..last`."""
    return f"{keys[0]}..{keys[-1]}"


def window_ending(last: str, grain: Grain, length: int) -> tuple[str, ...]:
    """Return the `length` keys that end with `last`."""
    return tuple(shift(last, grain, i - length + 1) for i in range(length))
