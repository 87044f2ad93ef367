"""Who may commit an output: the holder of the highest numbered lease.

A lease is a file `lease/<n>.json` that is put only when absent, so its numbers are fencing tokens: an
attempt that finds a higher number than its own has been replaced and must not commit. The holder renews
its file; another run waits while it sees renewals. Only changes of the file are watched, never its clock,
so machines need not agree on the time. The manifest, put only when absent, closes what race is left.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from orrery.errors import Fenced, LeaseHeld, OrreryError
from orrery.store import Store

RENEW_S = 2.0
# A holder that has not renewed for this long is taken for dead: five missed renewals, since a step in
# native code may hold Python's lock for seconds.
DEAD_AFTER_S = 10.0


def _parsed(document: bytes) -> dict[str, Any]:
    """Return a lease's document; a damaged one has no owner, and ends when nobody renews it."""
    nobody = {"owner": "", "attempt": "an unknown attempt", "done": False}
    try:
        found = json.loads(document)
    except ValueError:
        return nobody
    return {**nobody, **found} if isinstance(found, dict) else nobody


class Lease:
    """The right to commit at one address, held for the length of a `with` block.

    `owner` names the run and task: a later attempt of the same owner takes over at once (the orchestrator
    starts it only after it has given the earlier one up). Another owner waits for up to `patience` seconds
    for the lease to end, then `LeaseHeld` (exit 75) tells who holds it.
    """

    def __init__(self, store: Store, folder: str, owner: str, attempt: str, *, patience: float = 60.0) -> None:
        self.store, self.folder, self.owner, self.attempt, self.patience = store, folder, owner, attempt, patience
        self.token = 0
        self._count = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self.acquire()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=RENEW_S)
        try:
            self._write(done=True)
        except OrreryError:
            pass  # an unreleased lease only costs the next one a wait

    def _tokens(self) -> list[int]:
        return [int(n[:-5]) for n in self.store.names(self.folder) if re.fullmatch(r"\d{6}\.json", n)]

    def _read(self, token: int) -> bytes:
        return self.store.read(f"{self.folder}/{token:06d}.json")

    def _document(self, *, done: bool = False) -> bytes:
        return json.dumps({"owner": self.owner, "attempt": self.attempt, "renewed": self._count, "done": done}).encode()

    def acquire(self, tick: Callable[[], None] | None = None) -> None:
        """Take the next token, waiting while another owner is alive. Raises `LeaseHeld`."""
        began = changed = time.monotonic()
        seen: bytes | None = None
        while True:
            top = max(self._tokens(), default=0)
            free = top == 0
            if top:
                now = self._read(top)
                holder = _parsed(now)
                if now != seen:
                    seen, changed = now, time.monotonic()
                free = holder["done"] or holder["owner"] == self.owner or time.monotonic() - changed > DEAD_AFTER_S
                if not free and time.monotonic() - began > self.patience:
                    raise LeaseHeld(
                        f"{holder['owner']} ({holder['attempt']}) is writing {self.folder}",
                        hint="it is tried again later",
                    )
            if free and self.store.put_if_absent(f"{self.folder}/{top + 1:06d}.json", self._document()):
                self.token = top + 1
                return
            if not free:
                time.sleep(0.5)
            if tick:
                tick()

    def _write(self, *, done: bool = False) -> None:
        self.store.put(f"{self.folder}/{self.token:06d}.json", self._document(done=done))

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            self._count += 1
            try:
                self._write()
            except (OrreryError, OSError):
                continue  # a store out of reach for a moment; the next renewal may succeed

    def check(self) -> None:
        """Raise `Fenced` when a newer attempt has taken over."""
        top = max(self._tokens(), default=0)
        if top > self.token:
            holder = _parsed(self._read(top))
            raise Fenced(
                f"attempt {holder['attempt']} has taken over {self.folder}",
                hint="the output of that attempt counts, this one ends here",
            )
