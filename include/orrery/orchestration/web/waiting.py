"""Whether an attempt can still leave what a person looks for."""

from __future__ import annotations

from orrery import platform
from orrery.ledger import Ledger
from orrery.store import Store


def ended(project: str, attempt: str) -> str | None:
    """Return why nothing more will come of an attempt, or None while it may still be at work.

    `attempt` is its folder in the store, checked by the caller to be one of the project.
    """
    entry = Ledger(platform.load().ledger).get(project, "run", attempt, "done")
    if entry is not None:
        return str(entry.payload.get("error") or "the step has ended without it")
    store = Store(platform.load().store)
    folder, _, number = attempt.rpartition("/")
    if not store.exists(f"{attempt}/config.json"):
        return "there is no such attempt"
    later = [int(name) for name in store.names(folder) if name.isdecimal() and int(name) > int(number)]
    return f"attempt {max(later)} has taken over" if later else None
