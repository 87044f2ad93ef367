"""What the training loop itself takes from a model's Params, by name; everything else is the model's own."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pydantic import BaseModel

from orrery.errors import SpecError


@dataclass(frozen=True)
class Settings:
    """Numbers of the loop; a field of the same name in model.py's Params replaces the default.

    `batch_size` is the global batch: the rows of one optimiser step, over all processes.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    epochs: int = 10
    batch_size: int = 1024


def from_params(params: BaseModel, processes: int) -> Settings:
    """Return the loop's numbers. Raises `SpecError` for one that cannot be, or a batch that the ranks cannot share."""
    given = {f.name: getattr(params, f.name) for f in fields(Settings) if f.name in type(params).model_fields}
    settings = Settings(**given)
    for name in ("epochs", "batch_size"):
        value = getattr(settings, name)
        if not isinstance(value, int) or value < 1:
            raise SpecError(f"train.params.{name} is {value!r}; it must be a whole number from 1")
    if not 0 < settings.learning_rate < float("inf") or not 0 <= settings.weight_decay < float("inf"):
        raise SpecError(
            f"train.params: learning_rate {settings.learning_rate} must be above 0, "
            f"weight_decay {settings.weight_decay} at least 0"
        )
    if settings.batch_size % processes:
        below, above = settings.batch_size // processes * processes, -(-settings.batch_size // processes) * processes
        raise SpecError(
            f"batch_size {settings.batch_size} (global) = processes {processes} x "
            f"{settings.batch_size / processes:.2f} rows: every process needs the same whole number of rows",
            hint=f"train.params.batch_size: {below or above} or {above}, or other train.processes",
        )
    return settings
