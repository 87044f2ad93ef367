"""torchrun from inside the step: its agent starts the workers as children of this process.

torchrun's command line would be one more Python that imports torch (2-3 s) only to start others. Its agent is
the same when called here, and on Linux the workers are forked from this process, which has imported torch
already because model.py does: no process imports it twice. torch computes nothing here before the fork (threads
of its own would not survive it).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from orrery import errors
from orrery.contract import Node
from orrery.errors import INTERRUPTED, Interrupted, OrreryError, RankLost
from orrery.goodput import Progress
from orrery.spec import seconds
from orrery.step import end_for_certain
from orrery.store import Store
from orrery.training import meeting, worker
from orrery.training.meeting import Meeting
from orrery.training.place import Span
from orrery.training.watch import Watch

LOST = "the next attempt goes on from the newest checkpoint"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


# What the ranks have, beside the time for a save, to end after SIGTERM.
SPARE_S = 2


# What the end of another node may take to show, once its ranks are lost.
SHOWS_S = 2.0


def run(job: worker.Job, processes: int, scratch: Path, node: Node | None = None) -> dict[str, Any]:
    """Train with that many processes, this node's share of them, and return what rank 0 found out (elsewhere: nothing).

    Each node has an agent of its own that starts its processes; all ranks then meet at node 0 (see `meeting`).
    Raises the error that the workers tell; `Interrupted`, whose details say how far the training came, when it was
    told to stop, on whichever node; `RankLost` when a process died or had hung; `TryAgain` when a node does not come.
    """
    with meeting.joined(node or Node(), job.attempt) as (others, ground):
        if others is None or ground is None:
            return _run(_Launch(job, 0, processes, None), scratch, "lo")
        here = processes // others.node.of
        first = here * others.node.number
        job = replace(job, span=Span(first, here, processes, ground.host, ground.port))
        return _run(_Launch(job, first, here, others), scratch, ground.interface)


@dataclass(frozen=True)
class _Launch:
    """One node's ranks: `here` of them from `first` on; `others`: the other nodes."""

    job: worker.Job
    first: int
    here: int
    others: Meeting | None

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.here)

    def gone(self, within: float = 0.0) -> str:
        """Return a sentence about a node that is lost, or nothing."""
        return self.others.gone(within) if self.others else ""

    def parted(self) -> None:
        """Say to the other nodes that this one has ended as they will."""
        if self.others:
            self.others.done()


def _run(launch: _Launch, scratch: Path, interface: str) -> dict[str, Any]:
    job = launch.job
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=launch.here, run_id="orrery", role="train", max_restarts=0,
        # A fixed address, not --standalone: after a crash that one stumbles over keys of the run before.
        rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{_free_port()}", rdzv_configs={"rank": 0, "timeout": 60},
        local_addr="127.0.0.1", start_method="fork" if sys.platform == "linux" else "spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch / "torchrun")),
        # After SIGTERM the ranks save; torchrun's agent kills who has not ended by then.
        shutdown_timeout=int(seconds(job.checkpoint.within)) + SPARE_S,
    )  # fmt: skip
    (scratch / "torchrun").mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    if job.settings.strategy.startswith("zero") and not torch.cuda.is_available():
        from orrery.training import zero

        zero.imported(cuda=False)  # 7 s, once for all ranks
    for rank in launch.ranks:
        job.error(rank).unlink(missing_ok=True)
    (job.scratch / worker.STOPPED).unlink(missing_ok=True)
    watch = Watch([job.beat(rank) for rank in launch.ranks], first=launch.first, gone=launch.gone)
    try:
        with _handlers_restored(), _environment(interface), watch, _no_garbage():
            returned: dict[int, dict[str, Any]] = elastic_launch(config, worker.main)(job)
    except SignalException as e:
        # Told twice (by its worker, then by the kernel because that one died), the agent does not wait for its ranks.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_for_certain()
        watch.wait(seconds(job.checkpoint.within) + SPARE_S)
        raise _interrupted(launch, signal.Signals(e.sigval).name) from None
    except ChildFailedError as e:
        raise _failure(launch, e, watch.said) from None
    report = returned[0]  # by the agent's own count
    if "error" in report and (told := _told(launch)) is not None:
        raise told
    launch.parted()
    return report


def _interrupted(launch: _Launch, name: str) -> Interrupted:
    """Return the error of a training that was told to stop: how far it came, and what is saved of it."""
    try:
        found = Progress.model_validate_json((launch.job.scratch / worker.STOPPED).read_bytes())
    except (OSError, ValidationError):
        return Interrupted(f"{name}: told to stop before the training had begun, or too late to save")
    launch.parted()  # its ranks have agreed with all others to stop
    saved = f"saved up to step {found.committed:,}" if found.committed else "nothing was saved"
    text = f"{name}: told to stop at step {found.step:,} of {found.total:,}; {saved}"
    return Interrupted(text, hint="the next attempt goes on from there", details=found.model_dump(mode="json"))


def _failure(launch: _Launch, error: ChildFailedError, said: str) -> OrreryError:
    """Return why a training failed: what a rank told before the others lost it, or that one was killed."""
    told = _told(launch)
    if said:
        return told or RankLost(said, hint=LOST)
    number, failure = next(iter(error.failures.items()))
    rank, code = launch.first + number, failure.exitcode
    if -code in (signal.SIGTERM, signal.SIGINT) or code == INTERRUPTED:
        # Where another node was told first, who runs the machines tells this one as well, and it is at its end already.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return _interrupted(launch, "SIGTERM" if launch.others is None else "SIGTERM on one of the nodes")
    # The agent names the first that it finds dead, which may be one that only lost its peer. Who was killed outright
    # has left its beat.
    left = [r for r in launch.ranks if launch.job.beat(r).exists()]
    if code == -signal.SIGABRT and not left and launch.others and told:
        return told  # so NCCL ends a rank that has lost its peer
    if code < 0 or left:
        killed = rank if code < 0 else left[0]
        how = signal.Signals(-code).name if code < 0 else signal.SIGKILL.name
        oom = "; often out of memory: give it a larger compute class" if how == "SIGKILL" else ""
        return RankLost(f"training process {killed} ended with signal {how}", hint=LOST + oom)
    if isinstance(told, RankLost):
        return RankLost(launch.gone(SHOWS_S) or told.message, hint=LOST)
    text = failure.message if isinstance(failure.message, str) else str(failure.message)
    return told or OrreryError(f"training process {rank} ended with exit code {code}: {text[:2000]}")


def _told(launch: _Launch) -> OrreryError | None:
    """Return the error that was told first, or None. That a peer was lost counts only where nobody says why."""
    files = [path for rank in launch.ranks if (path := launch.job.error(rank)).exists()]
    told = [_error(path.read_bytes()) for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)]
    causes = [error for error in told if not isinstance(error, RankLost)] or _told_elsewhere(launch) or told
    return causes[0] if causes else None


def _told_elsewhere(launch: _Launch) -> list[OrreryError]:
    """Return the errors that the ranks of other nodes have told, before their end was noticed here."""
    if launch.others is None or not launch.job.attempt:
        return []
    store = Store(launch.job.store)
    with suppress(OrreryError, OSError):
        names = sorted(store.names(launch.job.told))
        return [_error(store.read(f"{launch.job.told}/{name}")) for name in names]
    return []


def _error(document: bytes) -> OrreryError:
    kind, message, hint = json.loads(document)
    found: OrreryError = getattr(errors, kind, OrreryError)(message, hint=hint)
    return found


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Leave the ranks, which are forked from here, nothing to collect.

    What an earlier launch of this process left in cycles (its store's daemon) joins a thread of its own when it goes.
    In a forked process there is none, and the rank would wait for it for ever.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """Put back the signal handlers that the agent replaces with its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment(interface: str) -> Iterator[None]:
    """Set what the workers inherit: one thread each, and by which interface they reach each other.

    That is the loopback where all of them are on this machine; between machines what the pod is told by its own
    environment comes first.
    """
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # cuBLAS is deterministic with a workspace of its own (docs.nvidia.com/cuda/cublas, Results reproducibility).
    wanted["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if sys.platform == "linux" and interface:
        names = ("GLOO_SOCKET_IFNAME",) if interface == "lo" else ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        wanted |= {name: interface for name in names if interface == "lo" or name not in os.environ}
    before = {name: os.environ.get(name) for name in (*wanted, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    os.environ.update(wanted)
    try:
        yield
    finally:  # name by name: another thread may be reading the environment
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
