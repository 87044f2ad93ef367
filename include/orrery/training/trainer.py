"""The training loop: one process's part of a fit that comes out the same on every run, interrupted or not.

The order of the rows follows from (seed, epoch) alone; rank r of w takes rows r, r+w, ... of every global
batch and the gradients are averaged, so the number of processes changes rounding and dropout, nothing else. What a
checkpoint holds is the whole state between two steps: whoever goes on from it does what would have been done anyway.
"""

from __future__ import annotations

import base64
import contextlib
import math
import random
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from orrery import log
from orrery.errors import UserError
from orrery.training.batches import Batch, Part
from orrery.training.control import Control, Stop
from orrery.training.interval import MEASURED, Schedule
from orrery.training.network import Network
from orrery.training.place import Place
from orrery.training.prepare import Prepared
from orrery.training.saving import Saver
from orrery.training.settings import Settings
from orrery.training.strategies import Strategy

STEPS_KEPT = 4096  # of the newest steps' durations: enough for a median
NORM_EVERY = 50  # steps; a norm of all gradients costs as much as a tenth of a small network's step


@dataclass
class State:
    """Where a training is: between step `step` of `epoch` and the next. JSON, the same on every rank."""

    epoch: int = 1
    step: int = 0
    done: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = 0
    ended: bool = False
    stopped: bool = False


@dataclass
class Fitted:
    """How a fit went: one entry per epoch, and the epoch whose weights were kept. `stopped`: by the hook `watch`."""

    history: list[dict[str, float]]
    best_epoch: int
    stopped: bool = False


@dataclass
class Hooks:
    """Who is told of what, on rank 0.

    `tell` gets an epoch's number, from 0, its losses and what was measured; `watch` the number and the losses, and
    ends the training when it returns True.
    """

    tell: Callable[[int, dict[str, float]], None] = lambda epoch, entry: None
    watch: Callable[[int, dict[str, float]], bool] | None = None


class Clock:
    """Seconds of this attempt by what they were spent on, and the newest steps' own."""

    def __init__(self) -> None:
        self.began = time.time()
        self.seconds: dict[str, float] = {"step": 0.0, "evaluate": 0.0, "checkpoint": 0.0}
        self.steps: deque[float] = deque(maxlen=STEPS_KEPT)

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Count what happens inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - began

    def step(self, seconds: float) -> None:
        """Count one step."""
        self.seconds["step"] += seconds
        self.steps.append(seconds)

    @property
    def step_s(self) -> float:
        """Median seconds of a step; 0 before the first."""
        return median(self.steps) if self.steps else 0.0


class Trainer:
    """Fits the network's module on the fit part; the tune part says when to stop."""

    def __init__(
        self,
        network: Network,
        data: Prepared,
        settings: Settings,
        place: Place,
        strategy: Strategy,
        saver: Saver,
        schedule: Callable[[int], Schedule],
        control: Control,
        device: torch.device,
        hooks: Hooks | None = None,
    ) -> None:
        self.task, self.settings, self.place = data.schema.task, settings, place
        self._target = data.label_mean, data.label_std
        self.strategy, self.saver, self.control = strategy, saver, control
        self._make_schedule = schedule
        self.device, self.hooks = device, hooks or Hooks()
        self.inputs = network.inputs.to(device)
        self.state, self.clock, self.resumed = State(), Clock(), 0
        self.total, self.started = 0, False
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._kept: dict[str, Any] = {}
        self.saves = 0
        self._norm, self._epoch_began, self._rows = 0.0, 0.0, 0

    # -- the loop ----------------------------------------------------------------------------------

    def fit(self, fit: Part, tune: Part) -> Fitted:
        """Train until the epochs are over or patience is out, from the newest checkpoint when there is one.

        The parts yield their rows on this trainer's device (see `feed.on_device`).
        Raises `Stop` when the processes were told to; then the state is saved, as far as there was time.
        """
        self.total = self.settings.epochs * fit.steps
        self._restore()
        self.schedule = self._make_schedule(self.resumed)
        self._tell_schedule()
        self.clock, self.started = Clock(), True
        try:
            with self._progress() as tick:
                tick(self.state.epoch - 1)
                while not self.state.ended:
                    self._epoch(fit)
                    self._judge(tune)
                    tick()
            with self.clock.of("checkpoint"), self.control.away():
                self._save()
                self.saver.wait()
        except Stop:
            self._stop()
            raise
        return Fitted(self.state.history, self.state.best_epoch, self.state.stopped)

    def weights(self) -> dict[str, Tensor]:
        """Return the best epoch's weights, whole, on rank 0. Collective."""
        return self.strategy.whole(self._kept)

    def _epoch(self, fit: Part) -> None:
        self.strategy.replica.train()
        self._epoch_began, self._rows = time.perf_counter(), 0
        last = time.perf_counter()
        for batch in fit.batches(self.state.epoch, self.state.step):
            self._step(batch)
            now = time.perf_counter()
            self.clock.step(now - last)
            if self.control.tick(self.schedule.due(self.state.done, time.monotonic())):
                with self.clock.of("checkpoint"), self.control.away():
                    self._save()
            last = time.perf_counter()

    def _step(self, batch: Batch) -> None:
        """One optimiser step on this process's share of a global batch, in passes of `microbatch` rows."""
        rows, size = batch.rows, self.settings.microbatch or batch.rows
        self._learning_rate()
        for start in range(0, rows, size):
            few = Batch(*(t[start : start + size] for t in batch)) if size < rows else batch
            last = start + size >= rows
            self.strategy.prepare(last=last)
            loss = self._losses(self._forward(few), few.label).sum() / rows
            self.strategy.backward(loss, last=last)
            self._loss += loss.detach()
        norm = self.strategy.step(norm=self.state.done % NORM_EVERY == 0)
        if norm is not None and self.state.done % NORM_EVERY == 0:
            self._norm = float(norm)
        self.state.step += 1
        self.state.done += 1
        self._rows += rows * self.place.world

    def _learning_rate(self) -> None:
        """Set the cosine schedule's rate of this step (Loshchilov and Hutter 2017), a function of the step alone."""
        rate = 0.5 * self.settings.learning_rate * (1 + math.cos(math.pi * self.state.done / max(1, self.total)))
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = rate

    def _judge(self, tune: Part) -> None:
        """End an epoch: measure it, keep its weights when they are the best so far, and see whether to go on."""
        state, seconds = self.state, time.perf_counter() - self._epoch_began
        with self.clock.of("evaluate"):
            entry = {
                "fit_loss": self._sum(self._loss) / (max(1, state.step) * self.place.world),
                "tune_loss": self.loss(tune),
            }
            self._refuse_broken(entry, state.epoch)
            state.history.append(entry)
            if state.best is None or entry["tune_loss"] < state.best:
                state.best, state.best_epoch, self._kept = entry["tune_loss"], state.epoch, self.strategy.copy()
            state.stopped = self._watched(entry)
        measured = {
            "rows_per_s": self._rows / max(seconds, 1e-9),
            "gradient_norm": self._norm,
            "learning_rate": float(self.strategy.optimizer.param_groups[0]["lr"]),
            **self._use(),
        }
        if self.place.rank == 0:
            self.hooks.tell(state.epoch - 1, {**entry, **measured})
        self._say(state.epoch, entry, measured, seconds)
        out_of_patience = state.epoch - state.best_epoch >= self.settings.patience
        state.ended = state.stopped or out_of_patience or state.epoch >= self.settings.epochs
        state.epoch, state.step = state.epoch + 1, 0
        self._loss.zero_()

    def _watched(self, entry: dict[str, float]) -> bool:
        """Ask rank 0's hook whether to stop; all ranks hear the same."""
        if self.hooks.watch is None:
            return False
        stop = torch.zeros((), dtype=torch.float64)
        if self.place.rank == 0:
            stop += float(self.hooks.watch(self.state.epoch - 1, entry))
        return self._sum(stop) > 0

    # -- forward -----------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> Tensor:
        with self._autocast():
            output: Tensor = self.strategy.replica(self.inputs(batch.numeric), batch.categorical)
        return output.float()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.precision == "bf16":
            bf16: contextlib.AbstractContextManager[Any] = torch.autocast(self.device.type, dtype=torch.bfloat16)
            return bf16
        return contextlib.nullcontext()

    def loss(self, part: Part) -> float:
        """Return the mean loss over a part; every rank computes its share and is given the same number."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.strategy.replica.eval()
        self.control.anew()
        with torch.no_grad():
            for few in part.chunks():
                total += self._losses(self._forward(few), few.label).sum(dtype=torch.float64)
                self.control.tick(False)
        self.control.anew()  # steps take longer than chunks: by the chunks' pace a SIGTERM would not be heard for long
        return self._sum(total) / part.rows

    def _losses(self, output: Tensor, label: Tensor) -> Tensor:
        """Return one loss per row."""
        if self.task == "binary":
            return nn.functional.binary_cross_entropy_with_logits(output, label, reduction="none")
        if self.task == "multiclass":
            return nn.functional.cross_entropy(output, label, reduction="none")
        shift, scale = self._target  # of a regression: the network learns the standardised label
        return (output - (label - shift) / scale) ** 2

    def _sum(self, value: Tensor) -> float:
        """Return the sum over all ranks: the same number on each, so that all decide alike."""
        if self.place.world > 1:
            value = value.clone().to(self.device)
            dist.all_reduce(value)
        return float(value)

    # -- state -------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Begin a checkpoint of the moment."""
        # The mean over the ranks is for those who go on with other processes; each rank's own sum is exact.
        shared = {**asdict(self.state), "loss": self._sum(self._loss) / self.place.world}
        self.saver.begin(self.state.done, self._tensors(), shared, self._own())
        self.schedule.saved(self.state.done, time.monotonic(), self.saver.cost())
        self.saves += 1
        if self.saves == MEASURED:
            self._tell_schedule()

    def _tensors(self) -> dict[str, Any]:
        return {**self.strategy.tensors(), "best": self._kept}

    def _stop(self) -> None:
        """Save what was done since the last commit; the processes are at the same step (see `control`)."""
        began = time.perf_counter()
        with self.clock.of("checkpoint"), self.control.away():
            self.saver.wait()  # first: the ranks learn of a commit at different moments, and must decide alike
            if self.state.done > max(self.saver.committed(), self.resumed):
                self._save()
                self.saver.wait()
        if self.place.rank == 0:
            log.get().info(
                "told to stop: saved",
                step=self.state.done,
                of=self.total,
                seconds=round(time.perf_counter() - began, 2),
            )

    def _restore(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        self._kept = self.strategy.copy()
        tensors = self._tensors()
        found = self.saver.load(tensors)
        self.saver.expect(tensors)
        if found is None:
            self.strategy.forget()
            return
        self.strategy.restore(tensors)
        self._kept = tensors["best"]
        loss = found.shared.pop("loss")
        self.state = State(**found.shared)
        self.resumed = self.state.done
        if found.own is not None:
            loss = found.own["loss"]
            restore_random(found.own["random"])
        self._loss = torch.tensor(loss, dtype=torch.float64, device=self.device)
        if self.place.rank == 0:
            log.get().info(
                f"goes on from step {self.state.done:,} of {self.total:,}",
                epoch=self.state.epoch,
                checkpoint=found.path,
            )

    def _own(self) -> dict[str, Any]:
        """Return what is this rank's alone."""
        return {"loss": float(self._loss), "random": random_state()}

    # -- words -------------------------------------------------------------------------------------

    def _progress(self) -> contextlib.AbstractContextManager[log.Tick]:
        if self.place.rank == 0:
            return log.progress("epochs", self.settings.epochs)
        return contextlib.nullcontext(lambda n=1.0: None)

    def _tell_schedule(self) -> None:
        if self.place.rank == 0:
            log.get().info(self.schedule.sentence())

    def _refuse_broken(self, entry: dict[str, float], epoch: int) -> None:
        if not all(np.isfinite(v) for v in entry.values()):
            raise UserError(
                f"the loss is not a number in epoch {epoch} ({entry})",
                hint=f"lower learning_rate (now {self.settings.learning_rate:g}) or look at model.py's forward",
            )

    def _use(self) -> dict[str, float]:
        """Return how much memory this process's device had in use at most, in MiB."""
        if self.device.type == "cuda":
            return {"gpu_memory_mb": torch.cuda.max_memory_allocated(self.device) / 2**20}
        return {"memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}

    def _say(self, epoch: int, entry: dict[str, float], measured: dict[str, float], seconds: float) -> None:
        if self.place.rank == 0:
            shown = {k: round(v, 5) for k, v in entry.items()}
            best = epoch == self.state.best_epoch
            speed = round(measured["rows_per_s"])
            log.get().info(f"epoch {epoch}", **shown, rows_per_s=speed, seconds=round(seconds, 2), best=best)


def random_state() -> dict[str, Any]:
    """Return the state of every generator that a model's code may draw from, as JSON."""
    name, keys, at, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": _text(torch.get_rng_state().numpy()),
        "cuda": _text(torch.cuda.get_rng_state().numpy()) if torch.cuda.is_initialized() else None,
        "numpy": [name, _text(np.asarray(keys, np.uint32)), int(at), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def restore_random(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned (after a round trip through JSON)."""
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], np.uint8)))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, _array(keys, np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _text(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: Any) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
