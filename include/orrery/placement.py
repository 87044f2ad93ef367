"""On which compute class the next attempt of a training runs: a pure function of the attempts before. Light.

Interruptible machines are cheap as long as the work still fits in before the deadline. At each start this asks: if
the coming attempt were interrupted too and added nothing, could `fallback` still finish in time? If not, the attempt
goes to `fallback` now. An attempt that is not interrupted takes the same time on either, so no more is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from orrery.attempts import Attempt
from orrery.budgets import INTERRUPTED_S, spent
from orrery.errors import UserError
from orrery.platform import Compute
from orrery.spec import Train, seconds

START_S = 60.0  # from an attempt's start to its first step, until one has shown it
MARGIN = 1.5  # the next interruption may cost this much more than the worst so far


@dataclass(frozen=True)
class Placement:
    """The compute class of an attempt, and why it is another one than the spec's (empty: it is that one)."""

    compute: str
    reason: str = ""


@dataclass(frozen=True)
class Outlook:
    """What is left of a training: seconds of work, of an attempt's start, and what an interruption costs."""

    remaining_s: float
    start_s: float
    interruption_s: float


def placement(history: Sequence[Attempt], train: Train, classes: Mapping[str, Compute], now: datetime) -> Placement:
    """Return where the next attempt runs. Raises `UserError` when a limit is reached and there is no `fallback`."""
    spot, used = train.spot, spent(history)["interruptions"]
    if any(a.cause is None for a in history):
        return Placement(train.compute)  # it is done: there is nothing to place
    if spot.fallback and used >= max(spot.max_interruptions, 1):
        return Placement(
            spot.fallback, f"interrupted {used} times, {spot.max_interruptions} are borne on {train.compute}"
        )
    if spot.deadline is None or not history or not _interruptible(train.compute, classes):
        return Placement(train.compute)
    until = _began(history) + timedelta(seconds=seconds(spot.deadline))
    left = (until - now).total_seconds()
    seen = outlook(history)
    if seen is None:
        return _unknown(train, left, until)
    need = seen.start_s + seen.remaining_s
    if spot.fallback is None:
        if left < need:
            raise UserError(
                f"the training cannot be there by {until:%Y-%m-%d %H:%M} UTC: {_minutes(left)} are left, "
                f"the work takes {_minutes(need)} more",
                hint="give spec.train.spot a later deadline, or a fallback (an on-demand compute class)",
            )
        return Placement(train.compute)
    if left >= need + MARGIN * seen.interruption_s:
        return Placement(train.compute)
    late = f"; it will be {_minutes(need - left)} late all the same" if left < need else ""
    return Placement(
        spot.fallback,
        f"{_minutes(left)} are left until {until:%Y-%m-%d %H:%M} UTC and the work takes {_minutes(need)}: one more "
        f"interruption of {train.compute} ({_minutes(seen.interruption_s)}) could not be made up for{late}",
    )


def outlook(history: Sequence[Attempt]) -> Outlook | None:
    """Return what is left, by what the attempts have shown; None when none came to its first step."""
    shown = [(a, a.progress) for a in history if a.progress is not None and a.progress.step_s > 0 and a.progress.total]
    if not shown:
        return None
    last = shown[-1][1]
    # Evaluations and checkpoints take time beside the steps.
    stepping = last.seconds.get("step", 0.0)
    beside = max((last.now - last.began) / stepping, 1.0) if stepping > 0 else 1.0
    todo = max(last.total - max(a.committed for a in history), 0)
    starts = [p.began - datetime.fromisoformat(a.started).timestamp() + a.queued_s for a, p in shown]
    start_s = max([s for s in starts if s > 0], default=START_S)
    lost = max(max(p.step - max(p.committed, p.resumed), 0) * p.step_s for _, p in shown)
    return Outlook(todo * last.step_s * min(beside, 3.0), start_s, start_s + INTERRUPTED_S + lost)


def _unknown(train: Train, left: float, until: datetime) -> Placement:
    """Place a training of which no attempt has shown how long it takes: half of the deadline may go by like that."""
    if train.spot.fallback is None or train.spot.deadline is None or left > seconds(train.spot.deadline) / 2:
        return Placement(train.compute)
    return Placement(
        train.spot.fallback,
        f"{_minutes(left)} are left until {until:%Y-%m-%d %H:%M} UTC, and no attempt on {train.compute} "
        "came to its first step",
    )


def _interruptible(name: str, classes: Mapping[str, Compute]) -> bool:
    return name in classes and classes[name].spot


def _began(history: Sequence[Attempt]) -> datetime:
    return min(datetime.fromisoformat(a.started) for a in history)


def _minutes(s: float) -> str:
    """Return a time as people say it."""
    if abs(s) < 120:
        return f"{s:.0f} s"
    return f"{s / 60:.0f} min" if abs(s) < 7200 else f"{s / 3600:.1f} h"
