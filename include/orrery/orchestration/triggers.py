"""The wait for data, in Airflow's triggerer: no worker and no slot is taken while nothing lands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from airflow.sdk.execution_time.context import AssetStateStoreAccessor
from airflow.triggers.base import BaseTrigger, TriggerEvent

from orrery import landing
from orrery.errors import OrreryError
from orrery.landing import Landed, Look
from orrery.partitions import Grain

# One handing-over: the rest follows in the next run of the Dag. (A run's XCom stays small.)
MOST = 200
# A wait ends without news after this long (s), and the next run of the Dag waits on: with the spec of then.
RENEW = 3600.0
LONGEST = 600.0  # s between two looks at sources that cannot be read
SLOW = 120.0  # s after which the log says that a look takes long


class Watermark:
    """Which landing of each partition was handed over: at the asset `<project>/landed` of Airflow.

    It outlives runs, Clear and restarts. One value holds the partitions of a month (or of a year, by size),
    so that it stays below the 64 kB which Airflow advises: 744 hours take 22 kB.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._chunks: dict[str, dict[str, str]] = {}

    @classmethod
    def of(cls, asset: str) -> Watermark:
        """Return the watermark at an asset, wherever Airflow's supervisor is at hand."""
        return cls(AssetStateStoreAccessor(name=asset))

    def get(self, key: str) -> str | None:
        """Return the fingerprint of the landing that was handed over, or None."""
        return self._chunk(key).get(key)

    def set(self, key: str, fingerprint: str) -> None:
        """Remember a landing as handed over."""
        self._chunk(key)[key] = fingerprint
        self._store.set(self._name(key), self._chunk(key))

    def _chunk(self, key: str) -> dict[str, str]:
        name = self._name(key)
        if name not in self._chunks:
            self._chunks[name] = dict(self._store.get(name) or {})
        return self._chunks[name]

    @staticmethod
    def _name(key: str) -> str:
        return f"landed-{key[:7]}"


class LandingTrigger(BaseTrigger):
    """Fires with the partitions that have landed since, in key order, each seen unchanged by two looks.

    The event is `{"landed": [[key, fingerprint, written at], …]}`, empty after `renew` seconds without news.
    Errors of the sources are logged, and the wait goes on, with growing pauses.
    """

    def __init__(
        self, *, asset: str, uris: Mapping[str, str], grain: Grain, last: str | None, every: float, renew: float = RENEW
    ) -> None:
        super().__init__()
        self.asset, self.uris, self.grain, self.last = asset, dict(uris), grain, last
        self.every, self.renew = every, renew

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return all that another triggerer needs to go on; what was handed over is read from Airflow."""
        names = ("asset", "uris", "grain", "last", "every", "renew")
        return f"{type(self).__module__}.{type(self).__qualname__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look, wait, look again; see the class."""
        until = time.monotonic() + self.renew
        mark = Watermark.of(self.asset)
        before: dict[str, Landed] = {}
        told, failures = "", 0
        while True:
            pause = self.every
            try:
                seen, new = await self._in_thread(mark)
            except Exception as e:
                failures += 1
                pause = min(self.every * 2**failures, max(LONGEST, self.every))
                what = e.message if isinstance(e, OrreryError) else f"{type(e).__name__}: {e}"
                self.log.warning("the sources cannot be looked at (%s); again in %.0f s", what, pause)
            else:
                failures = 0
                if (text := said(seen)) != told:
                    told = text
                    self.log.info("%s", told)
                ready = [key for key, there in new.items() if before.get(key) == there][:MOST]
                if ready:
                    yield TriggerEvent({"landed": [[key, new[key].fingerprint, new[key].at] for key in ready]})
                    return
                before = new
            if time.monotonic() > until:
                yield TriggerEvent({"landed": []})
                return
            await asyncio.sleep(pause)

    async def _in_thread(self, mark: Watermark) -> tuple[Look, dict[str, Landed]]:
        """Look without holding up the triggerer's other waits; one look at a time, however long it takes."""
        task = asyncio.create_task(asyncio.to_thread(self._look, mark))
        while not (await asyncio.wait({task}, timeout=SLOW))[0]:
            self.log.warning("the sources have not answered for %.0f s", SLOW)
        return task.result()

    def _look(self, mark: Watermark) -> tuple[Look, dict[str, Landed]]:
        """Return what is there, and what of it was not handed over yet."""
        seen = landing.look(self.uris, self.grain, self.last)
        return seen, {key: there for key, there in seen.landed.items() if mark.get(key) != there.fingerprint}


def said(seen: Look) -> str:
    """Return one look as a sentence for the log."""
    parts = [f"{len(seen.landed)} partitions have landed"]
    if seen.incomplete:
        parts.append(f"{seen.incomplete} lack a source")
    if seen.ignored:
        parts.append(f"{seen.ignored} names there are no partition and are left alone")
    if seen.absent:
        parts.append(f"nothing is there yet of {', '.join(seen.absent)}")
    return "; ".join(parts)
