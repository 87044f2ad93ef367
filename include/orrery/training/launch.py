"""torchrun from inside the step: its agent starts the workers as children of this process.

torchrun's command line would be one more Python that imports torch (2-3 s) only to start others. Its agent is
the same when called here, and on Linux the workers are forked from this process, which has imported torch
already because model.py does: no process imports it twice. torch computes nothing here before the fork (threads
of its own would not survive it).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from orrery import errors
from orrery.errors import Interrupted, OrreryError
from orrery.training import worker

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def run(job: worker.Job, processes: int, scratch: Path) -> dict[str, Any]:
    """Train with that many processes and return what rank 0 found out. Raises the error that the workers tell."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="orrery", role="train", max_restarts=0,
        # A fixed address, not --standalone: after a crash that one stumbles over keys of the run before.
        rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{_free_port()}", rdzv_configs={"rank": 0, "timeout": 60},
        local_addr="127.0.0.1", start_method="fork" if sys.platform == "linux" else "spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch / "torchrun")), shutdown_timeout=3,
    )  # fmt: skip
    (scratch / "torchrun").mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    try:
        with _handlers_restored(), _environment():
            returned: dict[int, dict[str, Any]] = elastic_launch(config, worker.main)(job)
    except SignalException as e:
        raise Interrupted(f"{signal.Signals(e.sigval).name}: told to stop while training") from None
    except ChildFailedError as e:
        raise _failure(e) from None
    report = returned[0]
    if "error" in report:
        kind, message, hint = report["error"]
        raise getattr(errors, kind, OrreryError)(message, hint=hint)
    return report


def _failure(error: ChildFailedError) -> OrreryError:
    rank, failure = error.get_first_failure()
    how = (
        f"signal {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    )
    text = failure.message if isinstance(failure.message, str) else str(failure.message)
    if failure.exitcode in (-signal.SIGTERM, -signal.SIGINT):
        return Interrupted(f"training process {rank} was told to stop ({how})")
    hint = "often out of memory: give it a larger compute class" if failure.exitcode == -signal.SIGKILL else ""
    return OrreryError(f"training process {rank} ended with {how}: {text[:2000]}", hint=hint)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


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
def _environment() -> Iterator[None]:
    """Set what the workers inherit: one thread each, and gloo on the loopback (all of them are on this machine)."""
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if sys.platform == "linux":
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
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
