"""One process of a torch training, started by torchrun: fit; rank 0 then calibrates, exports and writes.

Everything it needs is in its `Job`; the rows are files that the ranks map or read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog
import torch
import torch.distributed as dist

from orrery import log, parent
from orrery.errors import BUG, INTERRUPTED, OrreryError, RankLost, UserError
from orrery.registry.tracking import Live
from orrery.spec import Checkpoint, seconds
from orrery.store import Store
from orrery.training import Dataset, calibration, export, strategies, tensors, user_model
from orrery.training.checkpoints import Checkpoints
from orrery.training.control import STARTS, Control, Signals, Stop
from orrery.training.feed import on_device
from orrery.training.interval import Observed, Schedule
from orrery.training.network import Head, Inputs, Network
from orrery.training.place import Place, Span, backends
from orrery.training.prepare import Prepared
from orrery.training.progress import Reporter
from orrery.training.saving import ShardedSaver
from orrery.training.settings import Settings
from orrery.training.trainer import Hooks, Trainer
from orrery.training.trials import TRIED_ROWS, refuse_shape, refuse_unused

if TYPE_CHECKING:
    from orrery.registry.client import Run

Watch: TypeAlias = Callable[[int, dict[str, float]], bool]
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
CALIBRATED_ROWS = 2_000_000  # of the tune part, at most; two numbers are fitted on them
STOPPED = "stopped.json"
# How gloo, NCCL and torch's store say that they have lost the other side.
LOST = re.compile(r"gloo/|NCCL|TCPStore|Connection (closed|reset) by peer|Broken pipe")


@dataclass(frozen=True)
class Job:
    """What every process is told; paths are this machine's."""

    project_folder: Path
    project: str
    params: dict[str, Any]
    settings: Settings
    seed: int
    data: Prepared
    scratch: Path
    checkpoint: Checkpoint
    onnx: Path | None  # none: predictions of the tune part are all that is wanted
    weights: Path | None
    store: str
    checkpoints: str  # folder in the store
    predictions: Path | None = None  # float32 .npy of the tune part's, in its order
    attempt: str = ""  # folder in the store; empty: nobody is told how far it has come
    lanes: int = 1
    observed: Observed = field(default_factory=Observed)
    tracked: Run | None = None  # in MLflow
    # Asked on rank 0 after each epoch (its number from 0, its losses): True stops the training, without a model.
    watch: Watch | None = None
    span: Span | None = None  # none: all processes are on this node

    def beat(self, rank: int) -> Path:
        """Return the file by which a rank shows that it is alive."""
        return self.scratch / f"beat-{rank}"

    def error(self, rank: int) -> Path:
        """Return the file in which a rank tells its error: kind, message, hint."""
        return self.scratch / f"error-{rank}.json"

    @property
    def told(self) -> str:
        """The folder in the store in which ranks tell their errors to other nodes; rank 0's node tells them all."""
        return f"{self.attempt}/errors"


def main(job: Job) -> dict[str, Any]:
    """Do this process's part. Rank 0 returns what is known of the fit; a user's mistake comes back as `error`."""
    signals = Signals(seconds(job.checkpoint.within))
    signals.listen()
    parent.follow(os.getppid())  # a step that is killed must not leave its ranks training
    if not structlog.is_configured():
        log.configure()
    place = _place(job)
    try:
        device = _device(place)
        deterministic(device)
        if place.world > 1:
            job.beat(place.rank).write_text(f"{os.getpid()} {STARTS}")
            _meet(job, place, device)
        return _train(job, place, device, signals)
    except Stop:
        # What is returned is waited for until torchrun's agent has read it, which it does not when it is stopping.
        raise SystemExit(INTERRUPTED) from None
    except OrreryError as e:
        # Written and returned, not raised: torchrun would print a traceback. A mistake may come on one rank only, and
        # the others then end by losing it.
        return {"error": _tell(job, place, e)}
    except Exception as e:
        if job.span is not None:
            _tell(job, place, _seen_from_afar(e))
            if LOST.search(str(e)):
                job.beat(place.rank).unlink(missing_ok=True)
                os._exit(BUG)  # at once: a collective that has lost its peer may never let go
        raise
    finally:
        job.beat(place.rank).unlink(missing_ok=True)
        if place.world > 1:
            with contextlib.suppress(RuntimeError):  # of a process that is gone; the error that led here is told
                dist.destroy_process_group()


def _place(job: Job) -> Place:
    """Return which process this is. On several nodes torchrun counts this node's alone, and is corrected here."""
    if job.span is None:
        return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    place = job.span.place(int(os.environ["RANK"]))
    known = {"RANK": place.rank, "WORLD_SIZE": place.world, "MASTER_ADDR": job.span.host, "MASTER_PORT": job.span.port}
    os.environ.update({name: str(value) for name, value in known.items()})  # DeepSpeed asks for them
    return place


def _meet(job: Job, place: Place, device: torch.device) -> None:
    """Form the process group of all ranks."""
    backend = backends(device)
    if job.span is None:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        return
    store = dist.TCPStore(
        job.span.host, job.span.port, is_master=place.rank == 0, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False
    )
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=COLLECTIVE_TIMEOUT)


def _tell(job: Job, place: Place, error: OrreryError) -> list[str]:
    """Write down what ended this rank: for its own node, and before it goes for the others, which will only lose it."""
    told = [type(error).__name__, error.message, error.hint]
    job.error(place.rank).write_text(json.dumps(told))
    if job.span is not None and job.attempt and not isinstance(error, RankLost):
        with contextlib.suppress(OrreryError, OSError):  # then node 0 knows no more than that it has lost a rank
            Store(job.store).put(f"{job.told}/{place.rank}.json", json.dumps(told).encode())
    return told


def _seen_from_afar(error: Exception) -> OrreryError:
    """Return what an error means to the other nodes: a lost peer is not this rank's doing."""
    said = f"{type(error).__name__}: {str(error)[:2000]}"
    if LOST.search(said):
        return RankLost(f"a process of another node was lost ({said.splitlines()[0]})")
    return OrreryError(said)


def _device(place: Place) -> torch.device:
    """Return what this process computes on. Raises `UserError` where GPUs are paid for and torch sees too few."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.beside <= gpus:
        device = torch.device("cuda", place.local)
        torch.cuda.set_device(device)
        return device
    if int(os.environ.get("ORRERY_GPUS") or 0) > 0:
        if gpus == 0:
            raise UserError(
                "the compute class has a GPU, and torch sees none: the training would run on the CPU at a GPU's price",
                hint=f"torch {torch.__version__} was built for {_built_for()}; `image` of the class in platform.yaml: "
                "one whose torch has CUDA (make images FLAGS=--gpu, tagged …-gpu), and a node with the vendor's driver",
            )
        raise UserError(
            f"{place.beside} processes on a machine on which torch sees {gpus} GPU{'s' if gpus > 1 else ''}: "
            "each process needs one of its own",
            hint=f"train.processes: {gpus} in spec.yaml, or a compute class with {place.beside} GPUs",
        )
    if gpus and place.local == 0:
        log.get().warning(f"{place.beside} processes and {gpus} GPU: trains on the CPU; train.processes {gpus} uses it")
    return torch.device("cpu")


def _built_for() -> str:
    cuda, rocm = torch.version.cuda, torch.version.hip
    return f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPUs alone"


def deterministic(device: torch.device) -> None:
    """One thread per process and deterministic kernels: weights do not depend on how many cores there are."""
    torch.set_num_threads(1)
    # A GPU has operations without a deterministic kernel; there it is said, not refused.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    # That would also write over all new memory: gigabytes at each step where DeepSpeed makes its buckets.
    torch.utils.deterministic.fill_uninitialized_memory = False


def _train(job: Job, place: Place, device: torch.device, signals: Signals) -> dict[str, Any]:
    data, settings = job.data, job.settings
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if place.rank == 0:
        log.get().info("the training begins", device=name, processes=place.world, strategy=settings.strategy)
    network = _build(job)
    head = data.head("fit", TRIED_ROWS)
    refuse_shape(network, data.schema.task, len(data.schema.classes), head)
    refuse_unused(network, head, place.world)
    torch.manual_seed(job.seed + place.rank)  # equal weights on all ranks, but each its own dropout
    strategy = strategies.make(network.module, settings, place, device)
    live = Live(job.tracked if place.rank == 0 else None)
    parts = [
        on_device(data.part(name, job.seed, settings.batch_size, place, job.lanes), device) for name in ("fit", "tune")
    ]
    with contextlib.ExitStack() as stack:
        control = Control(place, signals, job.beat(place.rank))
        store = Store(job.store)
        kept = Checkpoints(store, job.checkpoints, job.checkpoint.keep)
        saver = ShardedSaver(kept, place, job.scratch)
        stack.callback(saver.close)
        trainer = Trainer(
            network, data, settings, place, strategy, saver, _schedule(job), control, device,
            Hooks(live.epoch, job.watch),
        )  # fmt: skip
        reporter = stack.enter_context(Reporter(store, job.attempt if place.rank == 0 else "", trainer))
        try:
            with user_model.told("training", only_theirs=True):
                fitted = trainer.fit(*parts)
        except Stop:
            if place.local == 0:  # one on each node
                (job.scratch / STOPPED).write_text(json.dumps(reporter.progress().model_dump(mode="json")))
            raise
        finally:
            live.end()
        with control.away():
            weights = trainer.weights()
    signals.leave()
    job.beat(place.rank).unlink(missing_ok=True)  # what comes now is this process's own, and may take its time
    if place.rank != 0:
        return {}
    report = {
        "history": fitted.history,
        "best_epoch": fitted.best_epoch,
        "stopped": fitted.stopped,
        "resumed": trainer.resumed,
        "steps": trainer.state.done,
        "device": name,
    }
    return report if fitted.stopped else {**report, **_written(job, weights)}


def _schedule(job: Job) -> Callable[[int], Schedule]:
    """Return what makes the schedule of saves once it is known at which step the training begins."""
    return lambda step: Schedule(job.checkpoint, time.monotonic(), step, job.observed)


def _build(job: Job) -> Network:
    model = user_model.load(job.project_folder, job.project)
    schema = job.data.schema
    torch.manual_seed(job.seed)
    module = user_model.module(model, schema, user_model.values(model, job.params))
    return Network(schema, Inputs(schema, job.data.mean, job.data.std), module, Head(schema.task))


def _written(job: Job, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Calibrate the fitted network on the tune part, write it, and return what is known of it."""
    network, data = _build(job), job.data  # anew: what was trained may be in parts, or on a GPU
    network.module.load_state_dict(weights)
    scale, shift = data.label_std, data.label_mean
    if data.schema.task != "regression":
        scale, shift = _calibrated(network, job)
    network.head = Head(data.schema.task, scale, shift)
    if job.predictions is not None:
        np.save(job.predictions, predicted(network, data))
    if job.onnx is None or job.weights is None:
        return {}
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    job.weights.write_bytes(tensors.to_safetensors(state))
    job.onnx.write_bytes(export.to_onnx(network, data.head("tune", export.CHECK_ROWS)))
    head = {"scale": float(network.head.scale), "shift": float(network.head.shift)}
    return {"weights_digest": tensors.digest(state), "head": head}


def _calibrated(network: Network, job: Job) -> tuple[float, float]:
    """Return scale and shift of the logits."""
    tune: Dataset = job.data.head("tune", CALIBRATED_ROWS)
    logits = outputs(network, tune)
    if tune.schema.task == "binary":
        return calibration.platt(logits, tune.label)
    return calibration.temperature(logits, tune.label), 0.0


def predicted(network: Network, data: Prepared) -> npt.NDArray[np.float32]:
    """Return the prediction of every row of the tune part, in its order."""
    network.eval()
    found = []
    with torch.inference_mode():
        for rows in data.part("tune", 0, 1, Place()).whole():
            given = [
                t
                for t, has in ((rows.numeric, network.has_numeric), (rows.categorical, network.has_categorical))
                if has
            ]
            found.append(network(*given).numpy())
    return np.concatenate(found)


def outputs(network: Network, data: Dataset) -> npt.NDArray[np.float32]:
    """Return the user's module's outputs for all rows."""
    from orrery.training.batches import InMemory

    network.eval()
    with torch.inference_mode():
        chunks = InMemory(data, 0, 1, Place()).whole()
        return np.concatenate([network.output(c.numeric, c.categorical).numpy() for c in chunks])
