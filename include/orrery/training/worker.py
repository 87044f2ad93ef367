"""One process of a torch training, started by torchrun: fit; rank 0 then calibrates, exports and writes.

Everything it needs is in its `Job`; the arrays are .npy files that the ranks map into memory.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
import torch
import torch.distributed as dist

from orrery import log
from orrery.errors import OrreryError
from orrery.registry.tracking import Live
from orrery.training import Dataset, calibration, export, tensors, user_model
from orrery.training.dataset import moments
from orrery.training.network import Head, Inputs, Network
from orrery.training.schema import Schema
from orrery.training.settings import Settings
from orrery.training.trainer import Fitted, Place, Trainer, Watch, refuse_shape, refuse_unused

if TYPE_CHECKING:
    from orrery.registry.client import Run

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Job:
    """What every process is told; paths are this machine's."""

    project_folder: Path
    project: str
    schema: Schema
    params: dict[str, Any]
    settings: Settings
    seed: int
    arrays: Path
    onnx: Path
    weights: Path
    tracked: Run | None = None  # in MLflow
    watch: Watch | None = None  # of rank 0; what it stops has no model (the report says `stopped`)


def save(job: Job, part: str, data: Dataset) -> None:
    """Write a part for the processes to map."""
    job.arrays.mkdir(parents=True, exist_ok=True)
    for name in ("numeric", "categorical", "label"):
        np.save(job.arrays / f"{part}-{name}.npy", getattr(data, name))


def _load(job: Job, part: str) -> Dataset:
    numeric, categorical, label = (
        np.load(job.arrays / f"{part}-{name}.npy", mmap_mode="r") for name in ("numeric", "categorical", "label")
    )
    return Dataset(numeric, categorical, label, job.schema)


def main(job: Job) -> dict[str, Any]:
    """Do this process's part. Rank 0 returns what is known of the fit; a user's mistake comes back as `error`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not structlog.is_configured():
        log.configure()
    place = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    deterministic()
    if place.world > 1:
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        return _train(job, place)
    except OrreryError as e:
        # Returned, not raised: a user's mistake is the same on all ranks, and torchrun would print a traceback.
        return {"error": [type(e).__name__, e.message, e.hint]}
    finally:
        if place.world > 1:
            dist.destroy_process_group()


def deterministic() -> None:
    """One thread per process and deterministic kernels: weights do not depend on how many cores there are."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def _train(job: Job, place: Place) -> dict[str, Any]:
    schema, fit, tune = job.schema, _load(job, "fit"), _load(job, "tune")
    scale, shift = 1.0, 0.0
    if schema.task == "regression":
        shift, scale = float(np.mean(fit.label, dtype=np.float64)), float(np.std(fit.label, dtype=np.float64)) or 1.0
        fit, tune = _standard(fit, shift, scale), _standard(tune, shift, scale)
    network = _build(job, fit)
    refuse_shape(network, schema.task, len(schema.classes), fit)
    refuse_unused(network, fit, place.world)
    torch.manual_seed(job.seed + place.rank)  # equal weights on all ranks, but each its own dropout
    trainer = Trainer(network, schema.task, job.settings, job.seed, place)
    live = Live(job.tracked if place.rank == 0 else None)
    with user_model.told("training", only_theirs=True):
        fitted = trainer.fit(fit, tune, live.epoch, job.watch)
    live.end()
    if place.rank != 0:
        return {}
    if fitted.stopped:
        return {"history": fitted.history, "best_epoch": fitted.best_epoch, "stopped": True}
    if schema.task != "regression":
        scale, shift = _calibrate(trainer, tune)
    network.head = Head(schema.task, scale, shift)
    return _write(job, network, fitted, tune)


def _build(job: Job, fit: Dataset) -> Network:
    model = user_model.load(job.project_folder, job.project)
    torch.manual_seed(job.seed)
    module = user_model.module(model, job.schema, user_model.values(model, job.params))
    return Network(job.schema, Inputs(job.schema, *moments(fit.numeric)), module, Head(job.schema.task))


def _standard(data: Dataset, shift: float, scale: float) -> Dataset:
    label = ((data.label.astype(np.float64) - shift) / scale).astype(np.float32)
    return Dataset(data.numeric, data.categorical, label, data.schema)


def _calibrate(trainer: Trainer, tune: Dataset) -> tuple[float, float]:
    """Return scale and shift of the logits."""
    logits = trainer.outputs(tune)
    if tune.schema.task == "binary":
        return calibration.platt(logits, tune.label)
    return calibration.temperature(logits, tune.label), 0.0


def _write(job: Job, network: Network, fitted: Fitted, tune: Dataset) -> dict[str, Any]:
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    job.weights.write_bytes(tensors.to_safetensors(state))
    job.onnx.write_bytes(export.to_onnx(network, tune))
    head = {"scale": float(network.head.scale), "shift": float(network.head.shift)}
    return {
        "history": fitted.history,
        "best_epoch": fitted.best_epoch,
        "weights_digest": tensors.digest(state),
        "head": head,
    }
