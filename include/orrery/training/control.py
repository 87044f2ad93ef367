"""How the processes of a training come to one mind: now and then, not at every step, and always at the same one.

SIGTERM reaches them at different moments, and their clocks differ. If one saved after step 700 and another after 701,
there would be no checkpoint. So every rank tells the others, in one small all-reduce each `EVERY_S` seconds or so,
whether it was told to stop and whether a save is due; the answer is the same on all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orrery.errors import INTERRUPTED
from orrery.training.place import Place

EVERY_S = 0.1
BEAT_S = 1.0
AWAY = "away"  # what a beat says of a rank that may be busy for long, with its store
STARTS = "starts"  # of one that has not met the others yet


class Stop(BaseException):
    """All ranks have agreed to stop. No `Exception`: a broad `except` in a model's code must not swallow it."""


class Signals:
    """SIGTERM as a flag that the loop looks at; and a certain end when the loop does not."""

    def __init__(self, within: float) -> None:
        self.within, self.told = within, False

    def listen(self) -> None:
        """From now on SIGTERM asks the loop to stop; after `within` seconds the process ends, whatever it does."""
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: object) -> None:
        if not self.told:
            self.told = True
            timer = threading.Timer(self.within, os._exit, (INTERRUPTED,))
            timer.daemon = True
            timer.start()

    @staticmethod
    def leave() -> None:
        """From now on SIGTERM ends the process at once: all that is to be kept is committed."""
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(INTERRUPTED))


class Control:
    """One rank's side of the agreement. `tick` is called after every step and every chunk, on all ranks alike."""

    def __init__(self, place: Place, signals: Signals, beat: Path | None = None) -> None:
        self.place, self.signals, self._beat = place, signals, beat
        # A group of its own, on the CPU: no collective of the training can be in its way, nor wait for the GPU.
        self._group: Any = dist.new_group(backend="gloo") if place.world > 1 else None
        self._every, self._count = 1, 0
        self._began = self._beaten = time.monotonic()
        self._write(str(os.getpid()))

    def tick(self, want_save: bool) -> bool:
        """Return whether to save now: what any rank wants, all do. Raises `Stop` when any was told to stop.

        `want_save` may be computed from this rank's own clock.
        """
        self._count += 1
        if self.place.world == 1:
            self._alive()
            if self.signals.told:
                raise Stop
            return want_save
        self._alive()
        if self._count < self._every:
            return False
        now = time.monotonic()
        per_tick = (now - self._began) / self._count
        told = torch.tensor([float(self.signals.told), float(want_save), per_tick], dtype=torch.float64)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        self._every = max(1, min(1000, int(EVERY_S / max(float(told[2]), 1e-9))))
        self._count, self._began = 0, time.monotonic()
        if told[0] > 0:
            raise Stop
        return bool(told[1] > 0)

    def anew(self) -> None:
        """Ask the others at the next tick: from here on a tick takes another time. On all ranks alike."""
        self._every, self._count, self._began = 1, 0, time.monotonic()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Say that nothing will be heard from this rank for a while, and that this is as it should be."""
        self._write(f"{os.getpid()} {AWAY}")
        try:
            yield
        finally:
            self._write(str(os.getpid()))

    def _alive(self) -> None:
        """Leave a sign of life, now and then."""
        now = time.monotonic()
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            self._write(str(os.getpid()))

    def _write(self, text: str) -> None:
        if self._beat is not None:
            self._beat.write_text(text)
