"""Attempts made up by hand, as the orchestrator puts them on record: a second per step, half a minute to start."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from orrery.attempts import Attempt
from orrery.goodput import Progress
from orrery.ledger import Ledger

T0 = 1_700_000_000.0
STARTUP = 30.0


def progress(at: float, resumed: int, step: int, committed: int, **more: Any) -> Progress:
    """Return the last sign of life of an attempt that began at `at`: a second per step, 2 s of saves, 5 s of looks."""
    began = at + STARTUP
    seconds = {"step": float(step - resumed), "checkpoint": 2.0, "evaluate": 5.0}
    now = began + sum(seconds.values())
    values = {"began": began, "now": now, "total": 1000, "step_s": 1.0, "seconds": seconds, **more}
    return Progress(resumed=resumed, step=step, committed=committed, **values)


def attempt(
    at: float = T0, *, cause: str | None = "interrupted", steps: tuple[int, int, int] | None = (0, 100, 90), **more: Any
) -> Attempt:
    """Return an attempt that was started at `at`. `steps`: resumed from, reached, committed; None: no progress."""
    told = progress(at, *steps) if steps else None
    wall = told.now - at if told else STARTUP
    values = {
        "cause": cause, "compute": "gpu", "spot": True, "price_per_hour": 3.6, "wall_s": wall, "queued_s": 10.0,
        "resumed": steps[0] if steps else 0, "committed": steps[2] if steps else 0, "progress": told,
    }  # fmt: skip
    return Attempt.model_validate({"started": iso(at), **values, **more})


def iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def record(
    book: Ledger, told: Attempt, number: int, *, run: str = "r1", address: str = "a1", verb: str = "train", **more: Any
) -> None:
    """Write an attempt into the ledger as the runner does; a done one has an output at `address`."""
    key = more.pop("key", "2013-01..2013-03")
    folder = f"p/runs/{run}/{verb}-{key}/{number}"
    payload = {
        "verb": verb, "key": key, "folder": folder, "status": "done" if told.cause is None else told.cause,
        "output": f"p/{verb}/{address}/manifest.json" if told.cause is None else None,
        "attempt": told.model_dump(mode="json"), **more,
    }  # fmt: skip
    assert book.record("p", "run", folder, "done", "t", payload)
