"""Where an attempt's time went, and which of its steps the model is made of. Pure and light.

An attempt's wall time (from its start by the orchestrator to its end, in seconds) is the sum of six parts:

useful         steps that the model is made of x the attempt's median seconds of a step
start-up       from its start to the first step it could take: process, imports, data, state
checkpointing  the training stood still for a save
evaluating     passes over the tune part
lost           steps done and not kept x the median, and what came after a killed attempt's last sign of life
other          the rest: steps slower than the median, export, tidying up

`queued` comes before the wall time, is not part of it, and costs nothing. goodput = useful / wall.

Which steps the model is made of is found backwards: a finished training is at its last step, any other one at the
newest step that is known to be committed; of the attempt that came there the steps since it was resumed count; it was
resumed from a step that an attempt before it had committed; and so on. So a step counts once: what came after the last
save before an interruption was lost, also when it was committed but a later attempt went on from an older step (the
checkpoint was damaged), or when two attempts did the same steps. Of a killed attempt the last `progress.json` is all
that is known; a save that became whole after it is recognised by the attempt that goes on from there. Early stopping
loses nothing: the steps after the best epoch are how it was found to be the best.

An attempt that tells no progress (a library's own `fit`, or one that ended before its first step) is useful as a
whole when it is done, and lost as a whole when it is not; where no attempt tells any, there is no goodput. A managed
spot job that changes machines is one attempt and tells of its last machine alone: what was before is its start-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime

from orrery.attempts import Attempt


@dataclass(frozen=True)
class Parts:
    """Seconds. All but `queued` add up to the wall time."""

    useful: float = 0.0
    startup: float = 0.0
    evaluating: float = 0.0
    checkpointing: float = 0.0
    lost: float = 0.0
    other: float = 0.0
    queued: float = 0.0

    @property
    def wall(self) -> float:
        """What was paid for."""
        return float(sum(getattr(self, f.name) for f in fields(self)) - self.queued)

    def __add__(self, more: Parts) -> Parts:
        return Parts(**{f.name: getattr(self, f.name) + getattr(more, f.name) for f in fields(self)})

    def told(self) -> dict[str, float]:
        """Return all parts and the wall time by name."""
        return {**{f.name: round(getattr(self, f.name), 3) for f in fields(self)}, "wall": round(self.wall, 3)}


def wall(attempt: Attempt) -> float:
    """Return an attempt's wall time in seconds: at least as long as its own progress says that it trained."""
    return max(attempt.wall_s, _inside(attempt), 0.0)


def steps(attempt: Attempt) -> int:
    """Return how many optimiser steps an attempt is known to have taken."""
    progress = attempt.progress
    return max(_reached(attempt) - progress.resumed, 0) if progress else 0


def committed(attempt: Attempt) -> int:
    """Return the newest step of an attempt that is known to be safe; a finished model holds all of them."""
    progress = attempt.progress
    if progress is None:
        return 0
    return _reached(attempt) if attempt.cause is None else max(progress.committed, attempt.committed)


def kept(attempts: Sequence[Attempt]) -> list[int]:
    """Return how many steps of each attempt the model is made of; the attempts of one training, oldest first."""
    out = [0] * len(attempts)
    if not attempts:
        return out
    finished = attempts[-1].cause is None
    needed = max(committed(a) for a in (attempts[-1:] if finished else attempts))
    limit, before = (_reached if finished else committed), len(attempts)
    resumed = [a.progress.resumed if a.progress else None for a in attempts]
    while needed > 0:
        able = [(i, r) for i, r in enumerate(resumed[:before]) if r is not None and r < needed]
        if not able:
            break  # the attempts that came there are not on record
        # Nobody is known to have come so far when the last save became whole after the last sign of life.
        before, start = ([(i, r) for i, r in able if limit(attempts[i]) >= needed] or able)[-1]
        out[before], needed, limit = needed - start, start, _reached
    return out


def parts(attempt: Attempt, count: int) -> Parts:
    """Return where an attempt's time went; `count` of its steps are `kept`.

    Each part takes at most what is left, so that they add up although two clocks and a median were asked.
    """
    progress, whole, queued = attempt.progress, wall(attempt), max(attempt.queued_s, 0.0)
    done = attempt.cause is None
    if progress is None:
        return Parts(useful=whole, queued=queued) if done else Parts(lost=whole, queued=queued)
    inside = _inside(attempt)
    startup = min(max(progress.began - datetime.fromisoformat(attempt.started).timestamp(), 0.0), whole - inside)
    tail = whole - inside - startup
    wanted = {
        "checkpointing": progress.seconds.get("checkpoint", 0.0),
        "evaluating": progress.seconds.get("evaluate", 0.0),
        "useful": count * progress.step_s,
        "lost": (steps(attempt) - count) * progress.step_s,
    }
    taken, left = {}, inside
    for name, seconds in wanted.items():
        taken[name] = min(max(seconds, 0.0), left)
        left -= taken[name]
    if not done and progress.committed < progress.step:
        taken["lost"] += tail  # it was killed: it went on for a moment, and nothing came of that
        tail = 0.0
    return Parts(**taken, startup=startup, other=left + tail, queued=queued)


def _inside(attempt: Attempt) -> float:
    """Return the seconds from the first step that it could take to its last sign of life, by its own clock."""
    return max(attempt.progress.now - attempt.progress.began, 0.0) if attempt.progress else 0.0


def _reached(attempt: Attempt) -> int:
    """Return the last step that an attempt is known to have taken."""
    return max(attempt.progress.step, attempt.committed) if attempt.progress else 0
