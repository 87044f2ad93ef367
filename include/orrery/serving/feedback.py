"""Thumbs: candidates for labelling, in the store as `<project>/feedback/<day>/<query id>-<n>.jsonl`, one line each.

An answer is kept in memory for an hour so that a thumb can refer to it. Its question is written down only then.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from orrery.rag.answers.texts import clean
from orrery.serving.contract import Answer, Feedback
from orrery.serving.tokens import Caller
from orrery.store import Store

NOTICE = (
    "A thumb stores the question, the answer, which passages were shown, your comment and your token's name, for those "
    "who look after this knowledge base. Without a thumb no question is stored."
)
# Whoever changes their mind is heard, a few times; the last entry counts.
TIMES = 5
LONGEST_ANSWER = 4_000


@dataclass(frozen=True)
class Given:
    """An answer that was given, as far as a thumb needs it."""

    at: float
    caller: str
    groups: tuple[str, ...]
    question: str
    answer: str
    passages: tuple[str, ...]
    abstained: bool
    degraded: bool
    generation: str
    model: str


class Recent:
    """The last answers by query id, bounded in number and age. On the event loop's thread only."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._given: OrderedDict[str, Given] = OrderedDict()

    def __len__(self) -> int:
        return len(self._given)

    def add(self, question: str, answer: Answer, caller: Caller) -> None:
        """Remember an answer."""
        self._given[answer.query_id] = Given(
            at=self._clock(),
            caller=caller.name,
            groups=tuple(sorted(caller.groups)),
            question=question,
            answer=answer.answer[:LONGEST_ANSWER],
            passages=tuple(s.id for s in answer.sources),
            abstained=answer.abstained,
            degraded=answer.degraded is not None,
            generation=answer.generation,
            model=answer.model,
        )
        while self._given and (len(self._given) > self._most or self._expired(next(iter(self._given.values())))):
            self._given.popitem(last=False)

    def get(self, query_id: str, caller: Caller) -> Given | None:
        """Return an answer that was given to this caller."""
        found = self._given.get(query_id)
        if found is None or found.caller != caller.name or self._expired(found):
            return None
        return found

    def _expired(self, given: Given) -> bool:
        return self._clock() - given.at > self._seconds


def note(store: Store, project: str, feedback: Feedback, given: Given) -> bool:
    """Write a thumb down; False when this answer had its share of them. Blocks. Raises `OrreryError`."""
    now = datetime.now(UTC)
    entry = {
        "query_id": feedback.query_id,
        "thumb": feedback.thumb,
        "comment": clean(feedback.comment),
        "at": now.isoformat(timespec="seconds"),
        "who": given.caller,
        "groups": list(given.groups),
        "question": clean(given.question),
        "answer": given.answer,
        "passages": list(given.passages),
        "abstained": given.abstained,
        "degraded": given.degraded,
        "generation": given.generation,
        "model": given.model,
    }
    data = (json.dumps(entry, ensure_ascii=False, sort_keys=True) + "\n").encode()
    folder = f"{project}/feedback/{now:%Y-%m-%d}"
    return any(store.put_if_absent(f"{folder}/{feedback.query_id}-{n}.jsonl", data) for n in range(1, TIMES + 1))
