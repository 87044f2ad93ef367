"""The training loop: one process's part of a data-parallel fit that comes out the same on every run.

The order of the rows follows from (seed, epoch) alone; rank r of w takes rows r, r+w, ... of every global
batch and the gradients are averaged, so the number of processes changes rounding and dropout, nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from orrery import log
from orrery.errors import SpecError, UserError
from orrery.training import Dataset, user_model
from orrery.training.network import Network
from orrery.training.settings import Settings

Tell = Callable[[int, dict[str, float]], None]
# Asked by rank 0 after each epoch (its number from 0, its losses): True stops the training, without a model.
Watch = Callable[[int, dict[str, float]], bool]
PATIENCE = 3  # epochs without a better loss on the tune part
TRIED_ROWS = 32  # of one trial step: enough for a batch norm
CHUNK = 8192  # rows of one forward pass where no gradient is needed


@dataclass(frozen=True)
class Place:
    """Which process this is, of how many."""

    rank: int = 0
    world: int = 1


@dataclass
class Fitted:
    """How a fit went: one entry per epoch, and the epoch whose weights were kept."""

    history: list[dict[str, float]]
    best_epoch: int
    stopped: bool = False  # by the watch: there is no model to export


class Trainer:
    """Fits `network.module` on the fit part; the tune part says when to stop."""

    def __init__(self, network: Network, task: str, settings: Settings, seed: int, place: Place) -> None:
        self.network, self.task, self.settings, self.seed, self.place = network, task, settings, seed, place
        self.replica = _replicate(network.module, place)
        # fused: one kernel for all parameters, a third of the step's time for small networks on a CPU.
        self.optimizer = torch.optim.AdamW(
            self.replica.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    def fit(
        self, fit: Dataset, tune: Dataset, tell: Tell = lambda step, entry: None, watch: Watch | None = None
    ) -> Fitted:
        """Train until the epochs are over or patience is out; the network is left with its best weights.

        `tell` is given each epoch's number, from 0, and its losses; `watch` may stop the training after each.
        """
        steps = self.settings.epochs * len(self._starts(fit.rows))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        history: list[dict[str, float]] = []
        best, best_epoch, kept = float("inf"), 0, _copy(self.network.module)
        with self._progress() as tick:
            for epoch in range(1, self.settings.epochs + 1):
                began = time.monotonic()
                entry = {"fit_loss": self._epoch(fit, epoch, schedule), "tune_loss": self.loss(tune)}
                self._refuse_broken(entry, epoch)
                tell(len(history), entry)
                history.append(entry)
                if entry["tune_loss"] < best:
                    best, best_epoch, kept = entry["tune_loss"], epoch, _copy(self.network.module)
                self._say(epoch, entry, time.monotonic() - began, epoch == best_epoch)
                tick()
                if self._stops(watch, epoch - 1, entry):
                    return Fitted(history, best_epoch, stopped=True)
                if epoch - best_epoch >= PATIENCE:
                    break
        self.network.module.load_state_dict(kept)
        return Fitted(history, best_epoch)

    def _stops(self, watch: Watch | None, step: int, entry: dict[str, float]) -> bool:
        """Ask the watch on rank 0; all ranks get its answer."""
        if watch is None:
            return False
        stop = self.place.rank == 0 and watch(step, entry)
        return self._sum(torch.tensor(float(stop))) > 0

    def _starts(self, rows: int) -> range:
        """Return where the global batches begin. A last, smaller one is left out: the next order uses its rows."""
        size = self._batch(rows)
        return range(0, rows - size + 1, size)

    def _batch(self, rows: int) -> int:
        return min(self.settings.batch_size, rows - rows % self.place.world)

    def _batches(self, rows: int, epoch: int) -> Iterator[npt.NDArray[np.int64]]:
        order = np.random.default_rng((self.seed, epoch)).permutation(rows)
        for start in self._starts(rows):
            yield order[start : start + self._batch(rows)][self.place.rank :: self.place.world]

    def _epoch(self, data: Dataset, epoch: int, schedule: torch.optim.lr_scheduler.LRScheduler) -> float:
        self.replica.train()
        total, batches = torch.zeros((), dtype=torch.float64), 0
        for rows in self._batches(data.rows, epoch):
            numeric, categorical, label = _tensors(data, rows)
            loss = self._losses(self.replica(self.network.inputs(numeric), categorical), label).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            schedule.step()
            total += loss.detach()
            batches += 1
        return self._sum(total) / (batches * self.place.world)

    def loss(self, data: Dataset) -> float:
        """Return the mean loss over a part; every rank computes its share and is given the same number."""
        rows = np.arange(self.place.rank, data.rows, self.place.world)
        total = torch.zeros((), dtype=torch.float64)
        for _, label, output in self._outputs(data, rows):
            total += self._losses(output, label).sum(dtype=torch.float64)
        return self._sum(total) / data.rows

    def outputs(self, data: Dataset) -> npt.NDArray[np.float32]:
        """Return the user's module's outputs for a whole part."""
        parts = [output.numpy() for _, _, output in self._outputs(data, np.arange(data.rows))]
        return np.concatenate(parts)

    def _outputs(
        self, data: Dataset, rows: npt.NDArray[np.int64]
    ) -> Iterator[tuple[npt.NDArray[np.int64], Tensor, Tensor]]:
        self.network.eval()
        with torch.inference_mode():
            for start in range(0, len(rows), CHUNK):
                chunk = rows[start : start + CHUNK]
                numeric, categorical, label = _tensors(data, chunk)
                yield chunk, label, self.network.output(numeric, categorical)

    def _losses(self, output: Tensor, label: Tensor) -> Tensor:
        """Return one loss per row."""
        if self.task == "binary":
            return nn.functional.binary_cross_entropy_with_logits(output, label, reduction="none")
        if self.task == "multiclass":
            return nn.functional.cross_entropy(output, label, reduction="none")
        return (output - label) ** 2

    def _sum(self, value: Tensor) -> float:
        """Return the sum over all ranks: the same number on each, so that all decide alike."""
        if self.place.world > 1:
            dist.all_reduce(value)
        return float(value)

    def _progress(self) -> contextlib.AbstractContextManager[log.Tick]:
        if self.place.rank == 0:
            return log.progress("epochs", self.settings.epochs)
        return contextlib.nullcontext(lambda n=1.0: None)

    def _refuse_broken(self, entry: dict[str, float], epoch: int) -> None:
        if not all(np.isfinite(v) for v in entry.values()):
            raise UserError(
                f"the loss is not a number in epoch {epoch} ({entry})",
                hint=f"lower learning_rate (now {self.settings.learning_rate:g}) or look at model.py's forward",
            )

    def _say(self, epoch: int, entry: dict[str, float], seconds: float, best: bool) -> None:
        if self.place.rank == 0:
            shown = {k: round(v, 5) for k, v in entry.items()}
            log.get().info(f"epoch {epoch}", **shown, seconds=round(seconds, 2), best=best)


def refuse_shape(network: Network, task: str, classes: int, data: Dataset) -> None:
    """Try the user's module on two rows. Raises `SpecError` when it fails or its output has another shape."""
    numeric, categorical, _ = _tensors(data, np.arange(min(2, data.rows)))
    network.eval()
    with torch.inference_mode(), user_model.told("the module's forward", only_theirs=True):
        try:
            output = network.output(numeric, categorical)
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as e:
            shapes = f"numeric {list(network.inputs(numeric).shape)}, categorical {list(categorical.shape)}"
            raise SpecError(f"model.py: the module's forward fails on {shapes}: {type(e).__name__}: {e}") from e
    wanted = [len(numeric), classes] if task == "multiclass" else [len(numeric)]
    if not isinstance(output, Tensor) or list(output.shape) != wanted or output.dtype != torch.float32:
        got = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        form = "[B, classes]" if task == "multiclass" else "[B]"
        raise SpecError(f"model.py: the module returned {got} for {len(numeric)} rows; wanted torch.float32 {wanted}",
                        hint=f"{task}: forward(numeric, categorical) returns {form}")  # fmt: skip


def refuse_unused(network: Network, data: Dataset, processes: int) -> None:
    """Try one backward pass in training mode, on a copy. Raises `SpecError` when it fails, or reaches no parameter.

    One parameter without a gradient is harmless to one process; several wait for each other's gradients of it.
    """
    numeric, categorical, _ = _tensors(data, np.arange(min(TRIED_ROWS, data.rows)))
    with user_model.told("a training step of the module"):
        module = copy.deepcopy(network.module).train()
        output = module(network.inputs(numeric), categorical)
        if output.requires_grad:
            output.sum().backward()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    unused = [name for name, p in trainable.items() if p.grad is None]
    if unused and (processes > 1 or len(unused) == len(trainable)):
        few = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise SpecError(
            f"model.py: forward does not use {few}: no gradient reaches it, with {processes} processes",
            hint="use it in forward, leave it out, or set requires_grad_(False)",
        )


def _replicate(module: nn.Module, place: Place) -> nn.Module:
    """Return what is trained: the module itself, or its data-parallel replica (gradients averaged over gloo)."""
    if place.world == 1:
        return module
    return nn.parallel.DistributedDataParallel(module)


def _tensors(data: Dataset, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    arrays = (data.numeric[rows], data.categorical[rows], data.label[rows])
    numeric, categorical, label = (torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    return numeric, categorical, label


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}
