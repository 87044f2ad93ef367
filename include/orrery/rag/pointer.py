"""`<project>/live.json`: what services follow. `promote` and `rollback` put it whole; here is where it lies. Light."""

from __future__ import annotations

from typing import Any

from orrery.store import Store


def path(project: str) -> str:
    """Return the pointer's path in the store."""
    return f"{project}/live.json"


def read(store: Store, project: str) -> dict[str, Any]:
    """Return the pointer as it is now; empty when there is none, or none that can be read."""
    try:
        now = store.read_json(path(project))
    except (FileNotFoundError, ValueError):
        return {}
    return now if isinstance(now, dict) else {}
