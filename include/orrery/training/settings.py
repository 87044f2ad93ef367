"""What the training loop itself is told: numbers of the model's Params by name, and the spec's `train`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pydantic import BaseModel

from orrery.errors import SpecError
from orrery.spec import Train


@dataclass(frozen=True)
class Numbers:
    """Numbers of the loop; a field of the same name in model.py's Params replaces the default.

    `batch_size` is the global batch: the rows of one optimiser step, over all processes.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    epochs: int = 10
    batch_size: int = 1024


@dataclass(frozen=True)
class Settings(Numbers):
    """The loop's numbers, and how the spec wants it run (see `orrery.spec.Train`)."""

    strategy: str = "single"
    precision: str = "fp32"
    microbatch: int | None = None
    clip: float | None = None
    compile: bool = False
    patience: int = 3

    @property
    def numbers(self) -> dict[str, float | int]:
        """Only those that model.py's Params may hold."""
        return {f.name: getattr(self, f.name) for f in fields(Numbers)}


def from_params(params: BaseModel, processes: int, train: Train | None = None) -> Settings:
    """Return the loop's settings. Raises `SpecError` for one that cannot be, or a batch that the ranks cannot share."""
    given = {f.name: getattr(params, f.name) for f in fields(Numbers) if f.name in type(params).model_fields}
    train = train or Train()
    strategy = train.strategy
    if strategy == "auto":
        strategy = "ddp" if processes > 1 else "single"
    if strategy == "single" and processes > 1:
        raise SpecError(
            f"train.strategy: `single` has one process, {processes} were asked for", hint="ddp, fsdp, zero1 … or auto"
        )
    settings = Settings(
        **given,
        strategy=strategy,
        precision=train.precision,
        microbatch=train.microbatch,
        clip=train.clip,
        compile=train.compile,
        patience=train.patience,
    )
    _refuse_numbers(settings)
    refuse_batch(settings, processes)
    return settings


def _refuse_numbers(settings: Settings) -> None:
    for name in ("epochs", "batch_size"):
        value = getattr(settings, name)
        if not isinstance(value, int) or value < 1:
            raise SpecError(f"train.params.{name} is {value!r}; it must be a whole number from 1")
    if not 0 < settings.learning_rate < float("inf") or not 0 <= settings.weight_decay < float("inf"):
        raise SpecError(
            f"train.params: learning_rate {settings.learning_rate} must be above 0, "
            f"weight_decay {settings.weight_decay} at least 0"
        )


def refuse_batch(settings: Settings, processes: int) -> None:
    """Raise `SpecError`, with every factor, when the global batch is no product of processes, passes and rows.

    batch_size (global) = processes x passes (of one step) x microbatch (rows of a pass).
    """
    batch, micro = settings.batch_size, settings.microbatch
    if batch % processes:
        below, above = batch // processes * processes, -(-batch // processes) * processes
        raise SpecError(
            f"batch_size {batch} (global) = processes {processes} x {batch / processes:.2f} rows: every process needs "
            "the same whole number of rows",
            hint=f"train.params.batch_size: {below or above} or {above}, or other train.processes",
        )
    share = batch // processes
    if micro is not None and micro < share and share % micro:
        fits = [m for m in range(1, share + 1) if share % m == 0]
        near = sorted(sorted(fits, key=lambda m: abs(m - micro))[:2])
        raise SpecError(
            f"batch_size {batch} (global) = processes {processes} x passes {share / micro:.2f} x microbatch {micro}: "
            "a step needs a whole number of passes",
            hint=f"train.microbatch: {' or '.join(map(str, near))}, or another train.params.batch_size",
        )
