"""A bounded number of prompts to a language model, from a step that may end without its word."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from orrery.errors import RequestError, TryAgain, UserError
from orrery.llm.client import Message, Model
from orrery.platform import LanguageModel

AT_ONCE, FAILURES = 4, 3


@dataclass(frozen=True)
class Said:
    """What a model said to each prompt, None where it said nothing; and what befell it last, if anything did."""

    texts: tuple[str | None, ...]
    trouble: str | None = None


def ask(
    endpoint: LanguageModel, prompts: Sequence[Sequence[Message]], max_tokens: int, timeout: float | None = None
) -> Said:
    """Ask, a few at a time; after `FAILURES` in a row no more. Raises nothing that a model's server can cause."""
    try:
        return asyncio.run(_ask(endpoint, prompts, max_tokens, timeout))
    except (TryAgain, UserError) as e:  # no key, no server: nobody could be asked
        return Said((None,) * len(prompts), e.message)


async def _ask(
    endpoint: LanguageModel, prompts: Sequence[Sequence[Message]], max_tokens: int, timeout: float | None
) -> Said:
    model, gate = Model(endpoint), asyncio.Semaphore(AT_ONCE)
    failures = 0
    trouble: str | None = None

    async def one(prompt: Sequence[Message]) -> str | None:
        nonlocal failures, trouble
        async with gate:
            if failures >= FAILURES:
                return None
            try:
                said = await model.complete(prompt, max_tokens=max_tokens, timeout=timeout)
            except RequestError as e:  # this prompt alone: others are answered
                trouble = e.message
                return None
            except (TryAgain, UserError) as e:
                failures, trouble = failures + 1, e.message
                return None
            failures = 0
            return said

    try:
        texts = await asyncio.gather(*[one(prompt) for prompt in prompts])
    finally:
        await model.close()
    return Said(tuple(texts), trouble)
