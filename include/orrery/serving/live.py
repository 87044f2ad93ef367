"""The generation that answers: follows `<project>/live.json`, opens the next one beside the present one, swaps.

A question holds the generation that it began with until it ends, so none fails at a switch and none mixes two; the old
one is closed when its last question has ended. What cannot be opened is refused: the present one stays.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from orrery import log
from orrery.errors import OrreryError, TryAgain, UserError
from orrery.rag.pointer import path
from orrery.serving.knowledge import Asking, Knowledge, Opener
from orrery.serving.settings import Settings
from orrery.store import Store


class Pointer(BaseModel):
    """`<project>/live.json`: what promote and rollback put there."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    version: str
    generation: str
    digest: str
    evaluation: str | None = None
    at: str = ""
    proven: bool = False


class Watched(Protocol):
    """What hears of switches (the metrics)."""

    def switched(self, serving: Serving) -> None:
        """Another generation answers from now on."""

    def refused_generation(self) -> None:
        """A generation could not be opened."""


class Opened:
    """One open generation and how many hold it; the last one closes it. On the event loop's thread only."""

    def __init__(self, knowledge: Knowledge, folder: Path, close: Callable[[Opened], None]) -> None:
        self.knowledge, self.folder, self._close = knowledge, folder, close
        self.holders = 1

    def hold(self) -> None:
        """Keep it open until `release`."""
        assert self.holders > 0, "it is closed"
        self.holders += 1

    def release(self) -> None:
        """Let it go."""
        self.holders -= 1
        if self.holders == 0:
            self._close(self)


@dataclass(frozen=True)
class Serving:
    """What answers at one moment: a generation, the pointer that named it, and how it is asked."""

    pointer: Pointer
    opened: Opened
    asking: Asking

    @property
    def knowledge(self) -> Knowledge:
        """The open generation."""
        return self.opened.knowledge

    @property
    def name(self) -> str:
        """How an answer names its generation: its address."""
        parts = self.pointer.generation.split("/")
        return parts[2] if len(parts) == 4 else self.pointer.generation


class Live:
    """Follows the pointer. `acquire` and `current` are for the event loop's thread."""

    def __init__(self, store: Store, project: str, opener: Opener, settings: Settings, scratch: Path) -> None:
        self.store, self.project, self._opener, self._settings, self._scratch = (
            store,
            project,
            opener,
            settings,
            scratch,
        )
        self.current: Serving | None = None
        self.refusal: str | None = None
        self.outage: str | None = None
        self.watchers: list[Watched] = []
        self._seen: bytes | None = None
        self._again, self._pause = 0.0, settings.retry
        # One thread looks and opens, another closes: neither ever takes one from the questions.
        self._opening = ThreadPoolExecutor(1, thread_name_prefix="opening")
        self._closing = ThreadPoolExecutor(1, thread_name_prefix="closing")

    @property
    def problems(self) -> list[str]:
        """What is wrong now, in sentences that may be shown to anybody."""
        asked = self.current.asking.problems if self.current else ()
        return [*(p for p in (self.outage, self.refusal) if p), *asked]

    def acquire(self) -> Serving | None:
        """Return what answers now, held until its `opened.release()`; None when nothing is open yet."""
        if self.current is not None:
            self.current.opened.hold()
        return self.current

    async def follow(self) -> None:
        """Look, and look again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._settings.poll)

    async def look(self) -> None:
        """Look once at the pointer, and switch when it has changed. Never raises."""
        try:
            data = await self._off_loop(lambda: self.store.read(path(self.project)))
        except FileNotFoundError:
            self.outage = None if self.current else f"nothing of {self.project} is live yet"
            return
        except (OrreryError, OSError, TimeoutError) as e:
            self._say_outage(e)
            return
        if self.outage:
            log.get().info("the store answers", project=self.project)
        self.outage = None
        if data == self._seen and (self.refusal is None or time.monotonic() < self._again):
            return
        if data != self._seen:
            self._pause = self._settings.retry
        self._seen = data
        try:
            await self._switch(data)
        except Exception as e:
            self._refuse(e)
        else:
            self.refusal, self._pause = None, self._settings.retry

    def _say_outage(self, error: Exception) -> None:
        if self.outage is None or self.outage.startswith("nothing"):
            log.get().warning("the store does not answer", why=_why(error), project=self.project)
        self.outage = "the store does not answer: what is live may have changed since"

    def _refuse(self, error: Exception) -> None:
        self._again = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, self._settings.retry_most)
        if self.refusal is None:
            log.get().error("the new generation cannot be opened", why=_why(error), project=self.project)
        kept = "the one before answers" if self.current else "nothing answers"
        self.refusal = f"the live generation cannot be opened, {kept}"
        for watcher in self.watchers:
            watcher.refused_generation()

    async def _switch(self, data: bytes) -> None:
        """Open what the pointer names, and make it what answers. Raises whatever is wrong with it."""
        pointer = _pointer(data, self.project)
        now = self.current
        same = now is not None and (now.pointer.generation, now.pointer.digest) == (pointer.generation, pointer.digest)
        if same and now is not None:
            opened = now.opened
            asking = await self._off_loop(partial(self._asking, pointer, opened))
            opened.hold()
        else:
            opened, asking = await self._open(pointer)
        serving = Serving(pointer, opened, asking)
        self.current = serving
        if now is not None:
            now.opened.release()
        log.get().info(
            "live", project=self.project, version=pointer.version, generation=serving.name, proven=pointer.proven
        )
        for watcher in self.watchers:
            watcher.switched(serving)

    def _asking(self, pointer: Pointer, opened: Opened) -> Asking:
        """Return how an open generation is asked from now on, tried once."""
        asking = self._opener.asking(self.store, pointer.evaluation, opened.folder)
        opened.knowledge.probe(asking)
        return asking

    async def _open(self, pointer: Pointer) -> tuple[Opened, Asking]:
        folder = Path(tempfile.mkdtemp(prefix="generation-", dir=self._scratch))

        def work() -> tuple[Knowledge, Asking]:
            asking = self._opener.asking(self.store, pointer.evaluation, folder)
            knowledge = self._opener.open(self.store, pointer.generation, pointer.digest, folder)
            try:
                knowledge.probe(asking)
            except BaseException:
                knowledge.close()
                raise
            return knowledge, asking

        running = asyncio.get_running_loop().run_in_executor(self._opening, work)
        try:
            knowledge, asking = await asyncio.shield(running)
        except asyncio.CancelledError:
            # The service stops: what the thread still opens ends with the process.
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Opened(knowledge, folder, self._retire), asking

    def _retire(self, opened: Opened) -> None:
        def work() -> None:
            try:
                opened.knowledge.close()
            except Exception as e:  # it answers nobody any more
                log.get().warning("a generation did not close in order", why=_why(e))
            shutil.rmtree(opened.folder, ignore_errors=True)

        self._closing.submit(work)

    async def _off_loop(self, work: Callable[[], Any]) -> Any:
        running = asyncio.get_running_loop().run_in_executor(self._opening, work)
        async with asyncio.timeout(self._settings.store_timeout):
            return await asyncio.shield(running)

    async def close(self) -> None:
        """Let go of what is open. Questions have ended by then."""
        if self.current is not None:
            self.current.opened.release()
            self.current = None
        self._opening.shutdown(wait=False, cancel_futures=True)
        await asyncio.get_running_loop().run_in_executor(None, self._closing.shutdown)


def _pointer(data: bytes, project: str) -> Pointer:
    try:
        found = json.loads(data)
        if isinstance(found, dict) and isinstance(found.get("version"), int):
            found["version"] = str(found["version"])
        return Pointer.model_validate(found)
    except (ValueError, RecursionError, ValidationError):
        raise UserError(
            f"{project}/live.json is not what promote writes", hint=f"promote again, or orrery rollback {project}"
        ) from None


def _why(error: BaseException) -> str:
    """Return what is wrong, for the log: of our own errors the message, of others the kind as well."""
    if isinstance(error, (UserError, TryAgain)):
        return error.message
    return f"{type(error).__name__}: {error}"[:500]
