"""Many questions to one model: a bounded number at a time, each asked again while the server is away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orrery import log
from orrery.llm.client import Message, Model, ModelAway, PromptRefused

FIRST_S, MOST_S = 0.5, 30.0


@dataclass(frozen=True)
class Asking:
    """How many are asked: `parallel` at a time, each within `timeout` seconds.

    A server that is away is asked again until it has given no answer to anybody for `patience` seconds.
    """

    parallel: int = 8
    max_tokens: int = 256
    timeout: float = 60.0
    patience: float = 600.0


async def ask_all(
    model: Model, prompts: Sequence[Sequence[Message]], how: Asking, on_answer: Callable[[], None] | None = None
) -> list[str | PromptRefused]:
    """Return the answers in the prompts' order; a prompt that the server refuses has its refusal in its place.

    Raises `ModelAway` when patience is at its end, and `UserError` for a wrong key, model or address; then what is
    being answered is given up.
    """
    answers: list[str | PromptRefused | None] = [None] * len(prompts)
    waiting = iter(range(len(prompts)))
    state = _State(time.monotonic())

    async def work() -> None:
        for i in waiting:
            answers[i] = await _ask(model, prompts[i], how, state)
            if on_answer:
                on_answer()

    workers = [asyncio.create_task(work()) for _ in range(min(how.parallel, len(prompts)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [answer for answer in answers if answer is not None]


@dataclass
class _State:
    """When the server last answered anybody."""

    answered: float


async def _ask(model: Model, prompt: Sequence[Message], how: Asking, state: _State) -> str | PromptRefused:
    attempt = 0
    while True:
        try:
            answer: str | PromptRefused = await model.complete(prompt, max_tokens=how.max_tokens, timeout=how.timeout)
        except PromptRefused as e:
            answer = e
        except ModelAway as e:
            silent = time.monotonic() - state.answered
            pause = e.retry_after if e.retry_after is not None else min(FIRST_S * 2**attempt, MOST_S)
            if silent + pause > how.patience:
                raise
            attempt += 1
            log.get().warning("asked again", why=e.message, after=round(pause, 1))
            # Not all at the same moment: that is what a busy server suffers from.
            await asyncio.sleep(pause * random.uniform(1.0, 1.3))  # noqa: S311
            continue
        state.answered = time.monotonic()
        return answer
