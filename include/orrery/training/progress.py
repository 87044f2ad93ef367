"""Tells the attempt's folder how far a training has come, from a thread of its own: the loop does not wait for it."""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from orrery.errors import OrreryError
from orrery.goodput import NAME, OFTEN, Progress
from orrery.store import Store

if TYPE_CHECKING:
    from orrery.training.trainer import Trainer

LOOK_S = 0.5
WRITE_S = 5.0


class Reporter:
    """Writes `progress.json` after each commit, and every few seconds. Without a folder it writes nothing."""

    def __init__(self, store: Store, folder: str, trainer: Trainer) -> None:
        self._store, self._folder, self._trainer = store, folder, trainer
        self._end = threading.Event()
        often = os.environ.get(OFTEN)
        self._look_s, self._write_s = (float(often), 0.0) if often else (LOOK_S, WRITE_S)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Reporter:
        if self._folder:
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._thread is not None:
            self._end.set()
            self._thread.join(LOOK_S + WRITE_S)

    def progress(self) -> Progress:
        """Return how far it has come by now."""
        t = self._trainer
        committed = max(t.saver.committed(), t.resumed)
        return Progress(
            began=t.clock.began,
            now=time.time(),
            resumed=t.resumed,
            step=t.state.done,
            committed=committed,
            total=t.total,
            step_s=t.clock.step_s,
            seconds=dict(t.clock.seconds),
        )

    def _run(self) -> None:
        written, committed = 0.0, -1
        while True:
            ended = self._end.wait(self._look_s)
            if self._trainer.started:
                now = self.progress()
                if ended or now.committed != committed or now.now - written >= self._write_s:
                    written, committed = now.now, now.committed
                    self._write(now)
            if ended:
                return

    def _write(self, progress: Progress) -> None:
        try:
            self._store.put(f"{self._folder}/{NAME}", progress.model_dump_json().encode())
        except (OrreryError, OSError):
            return  # a store that is away for a moment; what is lost is one look
