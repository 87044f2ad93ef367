"""Processes that read documents: each may be killed, for what it reads comes from outside.

A document that takes too long, too much memory or its process's life is `Unreadable`; the next one finds a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import TracebackType

from orrery.errors import OrreryError
from orrery.rag.reading import Bounds, Reading, Source, Unreadable
from orrery.rag.records import Section

# What Python needs to run; no address, key or token of the step: what is read here may be made to steal.
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "VIRTUAL_ENV")
STARTING_S = 120.0
BASE_MEMORY = 1 << 30


def memory_for(size: int) -> int:
    """Return the address space that reading documents of up to `size` bytes may take, in bytes."""
    return BASE_MEMORY + 20 * size


class Pool:
    """Up to `workers` processes, started when first needed, used again and again. For several threads."""

    def __init__(self, bounds: Bounds, *, seconds: float, memory: int, workers: int) -> None:
        self.seconds, self.memory, self.bounds = seconds, memory, bounds
        # Last in, first out: processes are started only when the others are busy.
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        for _ in range(workers):
            self._idle.put(None)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, source: Source) -> Reading:
        """Read a document in one of the processes. Raises `Unreadable`."""
        with self._worker() as (worker, used):
            try:
                return worker.read(source, self.seconds)
            except _Lost as e:
                if not (used and e.perhaps_full):
                    raise Unreadable(e.why) from None
        # What the documents before it have left in that process may have been the trouble.
        with self._worker(new=True) as (worker, _):
            try:
                return worker.read(source, self.seconds)
            except _Lost as e:
                raise Unreadable(e.why) from None

    def close(self) -> None:
        """End all processes; a document that is being read is `Unreadable`."""
        with self._lock:
            self._closed = True
            workers = list(self._all)
        for worker in workers:
            worker.kill()
        idle: list[_Worker | None] = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for one in idle:  # those that are lent are forgotten by who has them
            if one is not None:
                self._forget(one)
            self._idle.put(None)

    @contextlib.contextmanager
    def _worker(self, *, new: bool = False) -> Iterator[tuple[_Worker, bool]]:
        """Lend a process, and tell whether it has read before; one that was lost is not taken back."""
        idle = self._idle.get()
        used = idle is not None
        try:
            if idle is not None and (new or idle.ended):
                self._forget(idle)
                idle, used = None, False
            if idle is None:
                idle = self._begin()
            yield idle, used
        finally:
            if idle is not None and idle.ended:
                self._forget(idle)
                idle = None
            self._idle.put(idle)

    def _begin(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise Unreadable("the run has been stopped")
            worker = _Worker(self.bounds, self.memory)
            self._all.add(worker)
        try:
            worker.wait_until_ready()
        except BaseException:
            self._forget(worker)
            raise
        return worker

    def _forget(self, worker: _Worker) -> None:
        worker.end()
        with self._lock:
            self._all.discard(worker)


class _Lost(Exception):
    """A process is lost over a document. `perhaps_full`: a new one may succeed."""

    def __init__(self, why: str, *, perhaps_full: bool) -> None:
        super().__init__(why)
        self.why, self.perhaps_full = why, perhaps_full


class _Worker:
    """One process."""

    def __init__(self, bounds: Bounds, memory: int) -> None:
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        told = map(str, (memory, os.getpid(), bounds.pages, bounds.characters))
        # -P: what lies in the working folder is no module. -B: nothing is written.
        argv = [sys.executable, "-P", "-B", "-m", "orrery.rag.reading.worker", *told]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
        )
        self._memory = memory
        # A character is at most 12 bytes in the reply's JSON (\uXXXX twice), a section's frame and headings come to it.
        self._longest = 16 * bounds.characters + (64 << 20)
        self.ended = False

    def wait_until_ready(self) -> None:
        """Wait for the process to have started. Raises `OrreryError`: without readers nothing can be collected."""
        reply = self._exchange(b"", b"", STARTING_S)[0]
        if not reply:
            raise OrreryError(f"a process that reads documents did not start ({self._process.wait()})")

    def read(self, source: Source, seconds: float) -> Reading:
        """Have a document read. Raises `Unreadable`, and `_Lost` when the process did not survive it."""
        header = {"kind": source.kind, "charset": source.charset, "size": len(source.data)}
        line, late = self._exchange(json.dumps(header).encode() + b"\n", source.data, seconds)
        if late:
            raise _Lost(f"it took longer than {seconds:g} s to read", perhaps_full=False)
        try:
            told = json.loads(line)
        except ValueError:
            self.end()
            raise _Lost(f"reading it ended the process ({self._process.returncode})", perhaps_full=True) from None
        if told.get("memory"):
            self.end()
            raise _Lost(f"reading it takes more than {self._memory >> 20:,} MiB of memory", perhaps_full=True)
        if "why" in told:
            raise Unreadable(str(told["why"]), skip=bool(told["skip"]))
        sections = tuple(Section(tuple(heading), text, page) for heading, text, page in told["sections"])
        return Reading(told["title"], sections, tuple(told["notes"]))

    def _exchange(self, header: bytes, data: bytes, seconds: float) -> tuple[bytes, bool]:
        """Send, and return the reply's line, and whether the time was up: then the process is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(header)
            self._process.stdin.write(data)
            self._process.stdin.flush()
            line = self._process.stdout.readline(self._longest)
        except (OSError, ValueError):  # it is gone, or was killed
            line = b""
        finally:
            timer.cancel()
        return line, late.is_set()

    def kill(self) -> None:
        """Kill the process, if it is there; it holds nothing that could be lost. From any thread."""
        self.ended = True
        self._process.kill()

    def end(self) -> None:
        """Kill the process and close what led to it; from the thread that it is lent to."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
