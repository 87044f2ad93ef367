from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from orrery.serving.pressure import Breaker, Full, Gate, Rate, Threads


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_gate_lets_few_in_queues_some_and_refuses_the_rest_at_once() -> None:
    async def scene() -> None:
        gate = Gate("it", places=2, queue=1, wait=5)
        await gate.enter()
        await gate.enter()
        waiting = asyncio.create_task(gate.enter())
        await asyncio.sleep(0)
        assert (gate.busy, gate.waiting) == (2, 1)
        with pytest.raises(Full):
            await gate.enter()
        gate.leave()
        await waiting
        assert (gate.busy, gate.waiting) == (2, 0)
        gate.leave()
        gate.leave()
        assert (gate.busy, gate.waiting) == (0, 0)

    run(scene())


def test_whoever_gives_up_or_waits_too_long_leaves_no_place_taken() -> None:
    async def scene() -> None:
        gate = Gate("it", places=1, queue=5, wait=0.01)
        await gate.enter()
        with pytest.raises(Full):
            await gate.enter()
        gate.wait = 5
        first, second = asyncio.create_task(gate.enter()), asyncio.create_task(gate.enter())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        gate.leave()
        await second
        # One that is cancelled in the very moment in which it gets its place passes it on.
        third, fourth = asyncio.create_task(gate.enter()), asyncio.create_task(gate.enter())
        await asyncio.sleep(0)
        gate.leave()
        third.cancel()
        await fourth
        gate.leave()
        assert (gate.busy, gate.waiting) == (0, 0)

    run(scene())


def test_a_place_is_free_when_its_thread_has_ended_not_when_nobody_waits() -> None:
    async def scene() -> None:
        gate = Gate("it", places=1, queue=0, wait=1)
        threads, go, ended = Threads(gate, "t"), threading.Event(), list[int]()
        with pytest.raises(TimeoutError):
            await threads.run(go.wait, timeout=0.02, ended=lambda: ended.append(1))
        assert (gate.busy, ended) == (1, [])
        with pytest.raises(Full):
            await threads.run(go.wait, timeout=1, ended=lambda: ended.append(2))
        assert ended == [2]
        go.set()
        while gate.busy:
            await asyncio.sleep(0.001)
        assert ended == [2, 1]
        assert await threads.run(lambda: 7, timeout=1) == 7
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0, timeout=1)
        await asyncio.sleep(0)
        assert gate.busy == 0
        threads.close()

    run(scene())


def test_a_breaker_leaves_a_dead_model_alone_and_lets_one_try() -> None:
    clock = Clock()
    breaker = Breaker(failures=2, rest=10, most=25, clock=clock)
    breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert not breaker.allows()
    clock.now = 10
    assert breaker.allows()
    assert not breaker.allows()  # one at a time
    breaker.failed()
    clock.now = 29.9
    assert not breaker.allows()
    clock.now = 30
    assert breaker.allows()
    breaker.undecided()
    assert breaker.allows()
    breaker.failed()
    clock.now = 54
    assert not breaker.allows()  # the rest has grown, up to its bound
    clock.now = 55
    assert breaker.allows()
    breaker.worked()
    assert breaker.allows()
    assert not breaker.open


def test_a_rate_fills_up_again_and_forgets_names() -> None:
    clock = Clock()
    rate = Rate(per_minute=2, clock=clock, names=2)
    assert [rate.take("a"), rate.take("a"), rate.take("a")] == [0, 0, 30]
    assert rate.take("b") == 0
    clock.now = 30
    assert [rate.take("a"), rate.take("a")] == [0, 30]
    for name in "bcd":
        rate.take(name)
    assert len(rate._left) == 2
