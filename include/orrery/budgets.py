"""How often a step may fail, by cause: a pure count over the attempts on record, so a restart forgets nothing. Light.

One number of retries cannot tell a bug (five tries are plenty) from an interruption (twenty are a normal day on
interruptible machines), and a worker that was killed has no say at all: so Airflow is given the sum, and each cause
has its own limit here. A cleared run is a run of its own, with budgets of its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orrery.attempts import Attempt, Budget
from orrery.goodput import Progress
from orrery.spec import ModelSpec

CODE = 5  # bugs, and what is down outside (75): ten to twenty minutes of waiting in all, then a person is asked
LOSSES = 5  # workers and processes that vanished
INTERRUPTIONS = 20
ON_FALLBACK = 5  # more interruptions, on the class that was to have none
INTERRUPTED_S = 30.0  # what a machine that goes away needs to be gone
FIRST_S, LONGEST_S = 20.0, 600.0  # of the waits that double
SAID: dict[Budget, tuple[str, str]] = {
    "interruptions": ("interrupted", "times"),
    "losses": ("lost", "times"),
    "code": ("failed", "times"),
}


@dataclass(frozen=True)
class Budgets:
    """How many failures of each kind are tried again; one more, and the task fails."""

    code: int = CODE
    interruptions: int = INTERRUPTIONS
    losses: int = LOSSES

    @property
    def retries(self) -> int:
        """What Airflow is told: it counts all causes as one."""
        return self.code + self.interruptions + self.losses

    def allowed(self, budget: Budget) -> int:
        """Return how many failures of one kind are tried again."""
        return int(getattr(self, budget))

    def over(self, history: Sequence[Attempt]) -> str | None:
        """Return a sentence about the budget that is used up, or None while another attempt is worth it."""
        used = spent(history)
        for budget, (word, times) in SAID.items():
            if used[budget] > self.allowed(budget):
                return f"{word} {used[budget]} {times}, {self.allowed(budget)} are tried again"
        return None

    def told(self, history: Sequence[Attempt]) -> str:
        """Return what was used so far: `interrupted 3 of 20 times, lost 1 of 5`."""
        used = spent(history)
        parts = [(word, used[b], self.allowed(b)) for b, (word, _) in SAID.items() if used[b]]
        return ", ".join(f"{word} {n} of {most} times" for word, n, most in parts)


def of(verb: str, spec: ModelSpec) -> Budgets:
    """Return a step's budgets: of a training the spec says how many interruptions it bears."""
    if verb != "train":
        return Budgets()
    spot = spec.train.spot
    # With a fallback the limit moves the training there, where a few more do not end it.
    return Budgets(interruptions=spot.max_interruptions + (ON_FALLBACK if spot.fallback else 0))


def spent(history: Sequence[Attempt]) -> Counter[Budget]:
    """Return how many failures of each kind there were."""
    return Counter(kind for attempt in history if (kind := attempt.spent) is not None)


def delay(last: Budget, history: Sequence[Attempt], name: str) -> float:
    """Return the seconds before the next attempt; `name` spreads the waits of tasks that failed together.

    A bug and what is down wait between one and two times 20, 40, 80 … s, by their own count: a training that was
    interrupted ten times and then meets a bug starts with the short wait.
    """
    if last != "code":
        return INTERRUPTED_S
    times = max(spent(history)["code"], 1)
    spread = 1 + hashlib.sha256(f"{name}/{times}".encode()).digest()[0] / 255
    return float(min(FIRST_S * 2 ** min(times - 1, 16) * spread, LONGEST_S))


def goes_on(history: Sequence[Attempt]) -> str:
    """Return where a training's next attempt goes on and what those before have lost; empty: nothing to say."""
    came = [a.progress for a in history if a.progress is not None]
    if not came:
        return ""
    total = max(p.total for p in came)
    step = max(a.committed for a in history)
    lost = sum(map(_lost, came))
    where = f"goes on from step {step:,} of {total:,}" if step else f"begins again with step 1 of {total:,}"
    return f"{where} ({lost:,.0f} s of work lost so far)"


def summary(history: Sequence[Attempt]) -> str:
    """Return what a step's attempts came to, for who reads of it afterwards; empty when the first one did it."""
    used = spent(history)
    if not used:
        return ""
    parts = [f"{word} {used[b]} {'time' if used[b] == 1 else 'times'}" for b, (word, _) in SAID.items() if used[b]]
    last = max(history, key=lambda a: a.number)
    lost = sum(_lost(a.progress) for a in history if a.progress)
    parts += [f"{lost:,.0f} s of work lost"] if lost else []
    rehearsed = sum(bool(a.injected) for a in history)
    parts += [f"{rehearsed} of them a rehearsal"] if rehearsed else []
    moved = f"; on {last.compute}: {last.placed}" if last.placed else ""
    return f"{last.number} attempts: {', '.join(parts)}{moved}"


def _lost(came: Progress) -> float:
    """Return the seconds of work of one attempt that no checkpoint holds."""
    return max(came.step - max(came.committed, came.resumed), 0) * came.step_s


def sentence(number: int, budgets: Budgets, history: Sequence[Attempt]) -> str:
    """Return the line that an attempt begins its log with; empty for a first one."""
    parts = ", ".join(part for part in (budgets.told(history), goes_on(history)) if part)
    return f"attempt {number}: {parts}" if parts else ""
