"""What the project's spec says now of who may read what: it counts at once, whichever generation answers.

A generation keeps the groups with which its documents were collected. A source that is closed in the spec must be
closed for readers before the next reindex, while a gate holds that back, and after a rollback, too. So both must
hold: the groups of the passage, and those of its source in the spec as it is now.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from orrery import log, spec
from orrery.errors import OrreryError
from orrery.rag.spec import KnowledgeBaseSpec

LOOK_EVERY_S = 1.0
FILE = "spec.yaml"
BROKEN = f"the project's {FILE} cannot be read: who may read what stays as it said before"


class Declared:
    """The spec in force, read again when its file changes; one that is broken by then leaves that before in force.

    Any thread may ask. Without a folder it stays as it is.
    """

    def __init__(
        self, first: KnowledgeBaseSpec, folder: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.spec = first
        self.problem: str | None = None
        self._folder, self._clock, self._lock = folder, clock, threading.Lock()
        self._stamp: tuple[int, ...] | None = None
        self._looked = clock()

    @classmethod
    def read(cls, folder: Path, clock: Callable[[], float] = time.monotonic) -> Declared:
        """Read a project's spec. Raises `SpecError` when it is broken, or no knowledge base's."""
        stamp = _stamp(folder / FILE)  # looked at before it is read: a change between the two is seen next time
        made = cls(spec.load_knowledge(folder), folder, clock)
        made._stamp = stamp
        return made

    def sources(self, groups: frozenset[str]) -> frozenset[str]:
        """Return the sources that these groups may read now."""
        self.look()
        return frozenset(name for name, source in self.spec.sources.items() if groups & set(source.groups))

    def look(self) -> None:
        """Read the spec again when its file has changed; its state is asked at most once a second. Never raises."""
        if self._folder is None:
            return
        with self._lock:
            now = self._clock()
            if now - self._looked < LOOK_EVERY_S:
                return
            self._looked = now
            stamp = _stamp(self._folder / FILE)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self.spec, self.problem = spec.load_knowledge(self._folder), None
            except (OrreryError, OSError) as e:
                # Health is for everybody, so it does not repeat what is wrong; the log does.
                self.problem = BROKEN
                log.get().error(BROKEN, why=getattr(e, "message", type(e).__name__))
                return
        log.get().info("the spec has changed", sources=len(self.spec.sources))


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        told = file.stat()
    except OSError:
        return None
    return told.st_mtime_ns, told.st_size, told.st_ino
