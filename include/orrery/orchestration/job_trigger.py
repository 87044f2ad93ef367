"""The wait for a SageMaker job, in Airflow's triggerer: no worker and no slot is taken while it trains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from orrery.cloud.client import watcher
from orrery.cloud.jobs import ENDED, Seen
from orrery.errors import OrreryError

LONGEST = 600.0  # s between two looks while SageMaker does not answer
KILL_TRIES = 3


class JobTrigger(BaseTrigger):
    """Fires when a job has ended, however: `{"job", "folder", "region", "seen"}`.

    It survives a triggerer that is restarted: another one looks at the same job. When somebody fails, clears or marks
    the waiting task, the job is stopped.
    """

    def __init__(self, *, job: str, folder: str, region: str | None, poll: float) -> None:
        super().__init__()
        self.job, self.folder, self.region, self.poll = job, folder, region, poll
        self._told: tuple[str, int] | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return all that another triggerer needs to go on."""
        names = ("job", "folder", "region", "poll")
        return f"{type(self).__module__}.{type(self).__qualname__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look, wait, look again. What keeps SageMaker from answering is logged, and the wait goes on."""
        failures = 0
        while True:
            try:
                async with watcher(self.region) as ask:
                    while (seen := await ask.describe(self.job)).status not in ENDED:
                        failures = 0
                        self._say(seen)
                        await asyncio.sleep(self.poll)
                break
            except OrreryError as e:
                failures += 1
                pause = min(self.poll * 2**failures, LONGEST)
                self.log.warning("%s; again in %.0f s", e.message, pause)
                await asyncio.sleep(pause)
        self._say(seen)
        event = {"job": self.job, "folder": self.folder, "region": self.region, "seen": seen.model_dump()}
        yield TriggerEvent(event)

    async def on_kill(self) -> None:
        """Stop the job; Airflow calls this for a person's act alone, not when the triggerer ends."""
        for left in reversed(range(KILL_TRIES)):
            try:
                async with watcher(self.region) as ask:
                    stopped = await ask.stop(self.job)
            except OrreryError as e:
                self.log.warning("%s; %d more tries", e.message, left)
                await asyncio.sleep(1.0)
            else:
                self.log.info("job %s %s", self.job, "is told to stop" if stopped else "has ended")
                return

    def _say(self, seen: Seen) -> None:
        """Log each change of the job's state."""
        if self._told == (now := (seen.secondary or seen.status, seen.interruptions)):
            return
        self._told = now
        times = f", interrupted {seen.interruptions} times so far" if seen.interruptions else ""
        self.log.info("job %s: %s%s%s", self.job, now[0], times, f" ({seen.reason})" if seen.reason else "")
