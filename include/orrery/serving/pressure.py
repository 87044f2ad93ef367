"""How much the service takes on: places with a bounded queue, a breaker for a model that is down, a rate per person.

All of it lives on the event loop's thread, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


class Full(Exception):
    """All places are taken and the queue is full, or the wait was too long: come back in `after` seconds."""

    def __init__(self, what: str, after: int = 1) -> None:
        super().__init__(what)
        self.what, self.after = what, after


class Gate:
    """`places` at work and at most `queue` waiting for `wait` seconds; whoever comes beyond is refused at once."""

    def __init__(self, what: str, places: int, queue: int, wait: float) -> None:
        self.what, self.places, self.queue, self.wait = what, places, queue, wait
        self.busy = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Take a place. Raises `Full`."""
        if self.busy < self.places and not self._waiting:
            self.busy += 1
            return
        if len(self._waiting) >= self.queue:
            raise Full(f"too many questions wait for {self.what}")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self.wait):
                await turn
        except BaseException as e:
            if turn.done() and not turn.cancelled():
                self.leave()  # the place came at the very moment of giving up
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if isinstance(e, TimeoutError):
                raise Full(f"the wait for {self.what} was longer than {self.wait:g} s", after=2) from None
            raise

    def leave(self) -> None:
        """Give the place back: to who waits longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.busy -= 1

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place. Raises `Full`."""
        await self.enter()
        try:
            yield
        finally:
            self.leave()


class Threads:
    """Blocking work behind a gate. A thread cannot be stopped: its place is free when it has ended, and not before."""

    def __init__(self, gate: Gate, name: str) -> None:
        self.gate = gate
        self._pool = ThreadPoolExecutor(gate.places, thread_name_prefix=name)

    async def run(self, work: Callable[[], T], *, timeout: float, ended: Callable[[], None] = lambda: None) -> T:
        """Return what `work` returns. `ended` is called on the loop once the thread has ended, or never began.

        Raises `Full`, and `TimeoutError` when it takes longer than `timeout` seconds (it then goes on unseen).
        """
        loop = asyncio.get_running_loop()
        try:
            await self.gate.enter()
        except BaseException:
            ended()
            raise

        def over() -> None:
            self.gate.leave()
            ended()

        try:
            running = loop.run_in_executor(self._pool, work)
        except BaseException:
            over()
            raise
        running.add_done_callback(lambda _: over())
        async with asyncio.timeout(timeout):
            return await asyncio.shield(running)

    def close(self) -> None:
        """Let the threads end; none is waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Breaker:
    """Spares each question the timeout of a model that is down: after some failures in a row it is left alone.

    After `rest` seconds one question tries; when that fails too, the rest doubles, up to `most`.
    """

    def __init__(self, failures: int, rest: float, most: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures, self._rest, self._most, self._clock = failures, rest, most, clock
        self._row, self._pause, self._until, self._trying = 0, rest, 0.0, False

    @property
    def open(self) -> bool:
        """Whether the model is being left alone."""
        return self._row >= self._failures

    def allows(self) -> bool:
        """Tell whether the model may be asked now; then `worked`, `failed` or `undecided` must follow."""
        if not self.open:
            return True
        if self._trying or self._clock() < self._until:
            return False
        self._trying = True
        return True

    def worked(self) -> None:
        """Note an answer."""
        self._row, self._pause, self._trying = 0, self._rest, False

    def failed(self, after: float | None = None) -> None:
        """Note that none came. `after`: the seconds that it asked to be left alone for."""
        if self._trying:
            self._pause = min(self._pause * 2, self._most)
        self._row, self._trying = self._row + 1, False
        self._until = self._clock() + max(self._pause, min(after or 0.0, self._most))

    def undecided(self) -> None:
        """Note that the asker went away first: the next one may try."""
        self._trying = False


class Rate:
    """At most `per_minute` of something per name, in bursts of as many."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic, names: int = 10_000) -> None:
        self._full, self._clock, self._names = float(per_minute), clock, names
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> int:
        """Return 0 when it may be, else the seconds to wait."""
        now = self._clock()
        left, since = self._left.pop(name, (self._full, now))
        left = min(self._full, left + (now - since) * self._full / 60)
        allowed = left >= 1
        self._left[name] = (left - 1 if allowed else left, now)
        while len(self._left) > self._names:
            self._left.popitem(last=False)
        return 0 if allowed else max(1, round((1 - left) * 60 / self._full))
