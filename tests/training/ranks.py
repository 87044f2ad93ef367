"""Real processes of one gloo group, forked from the test as torchrun's agent forks the workers."""

from __future__ import annotations

import multiprocessing as mp
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orrery.training.place import Place

Work = Callable[[Place], Any]
PATIENCE_S = 60


def run(work: Work, world: int, folder: Path, *, answers: int | None = None, timeout: float = PATIENCE_S) -> list[Any]:
    """Return what `work(place)` returned on each rank; for a process that was killed, the signal as a negative number.

    Of the first `answers` ranks only, where others may never end: these are killed then. Raises `AssertionError` with the traceback of a rank that failed, or when one takes longer than `timeout` seconds.
    """
    context = mp.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    started = []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(work, Place(rank, world), meeting, there))
        process.start()
        there.close()
        started.append((process, here))
    deadline = time.monotonic() + timeout
    try:
        return [_answer(process, here, deadline) for process, here in started[:answers]]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def _answer(process: Any, here: multiprocessing.connection.Connection, deadline: float) -> Any:
    assert here.poll(max(0.0, deadline - time.monotonic())), f"process {process.pid} took too long"
    try:
        kind, value = pickle.loads(here.recv_bytes())
    except EOFError:
        process.join()
        return process.exitcode
    assert kind == "returned", value
    return value


def _main(work: Work, place: Place, meeting: Path, there: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if place.world > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=place.rank, world_size=place.world)
        there.send_bytes(pickle.dumps(("returned", work(place))))  # tensors by value: the sender goes
    except BaseException:
        there.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
    finally:
        there.close()
        os._exit(0)
