"""What one attempt of a step took, where it ran and how far it came: part of its end in the ledger. Light.

The orchestrator writes `attempt.json` beside the config before anything is started. An attempt whose orchestrator
dies is recorded by the next one, from that document and from what the step itself has left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orrery import goodput
from orrery.contract import Result
from orrery.goodput import Progress
from orrery.ledger import Entry, Ledger
from orrery.platform import Compute
from orrery.store import Store

NAME = "attempt.json"
Cause = Literal["user", "try_again", "interrupted", "lost", "bug"]
Budget = Literal["code", "interruptions", "losses"]
# What a result calls a process that is gone: the step's own, or one of a training's ranks.
VANISHED = ("StepVanished", "RankLost")
OBSERVED = 200  # entries; old trainings say little of today's machines
T = TypeVar("T", bound=BaseModel)


class Attempt(BaseModel):
    """One attempt, as the ledger keeps it under `attempt`. Beside these fields stands what its launcher told of it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    number: int = Field(1, description="Airflow's try number; 1 at the command line.")
    cause: Cause | None = Field(
        None,
        description="Why it ended without a result that counts. `lost`: its worker or its process vanished.",
    )
    compute: str = Field("", description="Compute class of platform.yaml.")
    placed: str = Field("", description="Why it ran on another class than the spec's.")
    spot: bool = False
    price_per_hour: float = 0.0
    address: str = Field("", description="Where its output is committed: attempts of all runs with one go on together.")
    started: str = Field(description="When the orchestrator began with it, ISO 8601 in UTC.")
    wall_s: float = Field(0.0, description="From `started` to its end; of a lost one, to its last sign of life.")
    queued_s: float = Field(
        0.0, description="From the end of the attempt before it (of the first: from when Airflow started the task)."
    )
    resumed: int = Field(0, description="The optimiser step it went on from.")
    committed: int = Field(0, description="The optimiser step that its last checkpoint, or the finished model, holds.")
    progress: Progress | None = None
    injected: tuple[str, ...] = Field(
        (), description="The faults of a rehearsal that it was given (`ORRERY_FAULTS`); none: what befell it was real."
    )

    @property
    def ended(self) -> datetime:
        """When it ended."""
        return datetime.fromtimestamp(datetime.fromisoformat(self.started).timestamp() + self.wall_s, UTC)

    @property
    def spent(self) -> Budget | None:
        """Which budget it used up. A loss on an interruptible machine is an interruption, if the work went on."""
        if self.cause is None:
            return None
        if self.cause == "interrupted" or (self.cause == "lost" and self.spot and self.committed > self.resumed):
            return "interruptions"
        return "losses" if self.cause == "lost" else "code"


def begun(number: int, name: str, compute: Compute | None, queued_s: float = 0.0, placed: str = "") -> Attempt:
    """Return an attempt that begins now, on the compute class `name`."""
    return Attempt(
        number=number,
        compute=name,
        placed=placed,
        spot=compute.spot if compute else False,
        price_per_hour=compute.price_per_hour if compute else 0.0,
        started=datetime.now(UTC).isoformat(timespec="milliseconds"),
        queued_s=round(max(queued_s, 0.0), 3),
    )


def placed_after(attempt: Attempt, waited_s: float) -> Attempt:
    """Return the attempt with the time that it waited for a machine counted as queued: no machine was paid for then."""
    if waited_s <= 0:
        return attempt
    started = datetime.fromisoformat(attempt.started) + timedelta(seconds=waited_s)
    told = {"started": started.isoformat(timespec="milliseconds"), "queued_s": round(attempt.queued_s + waited_s, 3)}
    return attempt.model_copy(update=told)


def ended(
    attempt: Attempt, result: Result, progress: Progress | None, wall_s: float, told: Mapping[str, Any] | None = None
) -> Attempt:
    """Return the attempt with its end: what the result says, and how far the training came."""
    details = result.error.details if result.error else {}
    values = {
        "cause": cause(result),
        "wall_s": round(wall_s, 3),
        "resumed": _step(details, "resumed", progress.resumed if progress else 0),
        "committed": _step(details, "committed", progress.committed if progress else 0),
        "progress": progress.model_dump() if progress else None,
    }
    return Attempt.model_validate({**attempt.model_dump(), **(told or {}), **values})


def cause(result: Result) -> Cause | None:
    """Return why an attempt ended without a result that counts, or None. A process that vanished is `lost`."""
    if result.status == "done":
        return None
    if result.status == "bug" and result.error is not None and result.error.kind in VANISHED:
        return "lost"
    return result.status


def lost_wall(attempt: Attempt, result: Result | None, progress: Progress | None) -> float:
    """Return for how many seconds a lost attempt is known to have lived: its own result says so, or its progress."""
    if result is not None and "total" in result.seconds:
        return result.seconds["total"]
    began = datetime.fromisoformat(attempt.started).timestamp()
    return max(progress.now - began, 0.0) if progress else 0.0


def of(entries: Iterable[Entry]) -> list[Attempt]:
    """Return the attempts that ledger entries of kind `run` tell of, oldest first; those from before are left out."""
    found = (e.payload.get("attempt") for e in entries)
    return [Attempt.model_validate(told) for told in found if isinstance(told, dict)]


def observed(ledger: Ledger, project: str, compute: str) -> dict[str, Any]:
    """Return how often the project's newest trainings on a compute class were interrupted, and how long they ran."""
    newest = of(ledger.recent(project, "run", phase="done", verb="train", limit=OBSERVED))
    # A rehearsal says nothing of how often these machines are taken away.
    there = [a for a in newest if a.compute == compute and a.progress is not None and not a.injected]
    interrupted = sum(a.spent == "interruptions" for a in there)
    return {"interruptions": interrupted, "observed_s": round(sum(a.wall_s for a in there), 1)}


def folder_of(payload: Mapping[str, Any]) -> str:
    """Return the folder in the store of an attempt on record."""
    told = payload.get("attempt")
    return str(payload.get("folder") or (told if isinstance(told, str) else ""))  # before: `attempt` was the folder


def write(store: Store, folder: str, attempt: Attempt) -> None:
    """Write the attempt's document, before it starts anything."""
    store.put(f"{folder}/{NAME}", attempt.model_dump_json(indent=1).encode())


def read(store: Store, folder: str) -> Attempt | None:
    """Return an attempt's document, or None when there is none that can be read."""
    return _read(store, f"{folder}/{NAME}", Attempt)


def progress_of(store: Store, folder: str) -> Progress | None:
    """Return how far an attempt's training came, or None."""
    return _read(store, f"{folder}/{goodput.NAME}", Progress)


def _read(store: Store, path: str, model: type[T]) -> T | None:
    try:
        return model.model_validate_json(store.read(path))
    except (FileNotFoundError, ValidationError):
        return None


def _step(details: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = details.get(name)
    return value if isinstance(value, int) else otherwise
