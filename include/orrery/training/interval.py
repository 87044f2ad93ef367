"""When to save: every so many steps or seconds, or the interval at which saving and repeating cost least together.

J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (1974) 530; J. T. Daly, A higher
order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer Systems 22 (2006) 303.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from orrery.spec import Checkpoint, seconds

FIRST_COST_S = 0.1  # assumed until a save has been measured
MEASURED = 5  # the newest saves whose median is the cost


@dataclass(frozen=True)
class Observed:
    """How often this project's trainings have been interrupted, in how many seconds of training."""

    interruptions: int = 0
    seconds: float = 0.0


def optimum(cost: float, between: float) -> float:
    """Return Daly's interval between the ends of two saves, in seconds.

    `cost` is what a save takes from the training, `between` the mean time between interruptions, both in seconds.
    Daly's eq. 37: Young's sqrt(2 cost between) with two correcting terms, less the save itself; `between` when a save
    costs more than twice of that.
    """
    if cost >= 2 * between:
        return between
    ratio = cost / (2 * between)
    return math.sqrt(2 * cost * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def overhead(cost: float, between: float, every: float) -> float:
    """Return the share of time lost to saving and to repeating what was not saved (half an interval each time)."""
    return cost / (every + cost) + (every + cost) / (2 * between)


def mean_between(expected: float, observed: Observed) -> float:
    """Return the mean time between interruptions, in seconds: the expectation counts as one that was seen."""
    return (expected + observed.seconds) / (1 + observed.interruptions)


class Schedule:
    """Says when the next save is due. Moments are seconds of any clock that does not jump.

    Ranks do not see the same clock: one of them asks, and tells the others.
    """

    def __init__(self, checkpoint: Checkpoint, now: float, step: int = 0, observed: Observed = Observed()) -> None:
        self.every = checkpoint.every
        self.between = mean_between(seconds(checkpoint.interruptions), observed)
        self.observed = observed
        self._costs: deque[float] = deque(maxlen=MEASURED)
        self._step, self._at = step, now

    @property
    def cost(self) -> float:
        """What a save takes from the training, in seconds: measured, or assumed before the first."""
        return statistics.median(self._costs) if self._costs else FIRST_COST_S

    @property
    def interval(self) -> float:
        """Seconds from one save to the next; infinite where steps are counted."""
        if isinstance(self.every, int):
            return math.inf
        return optimum(self.cost, self.between) if self.every == "auto" else float(seconds(self.every))

    def due(self, step: int, now: float) -> bool:
        """Tell whether to save after `step` steps. Never twice at the same step."""
        if step <= self._step:
            return False
        return step - self._step >= self.every if isinstance(self.every, int) else now - self._at >= self.interval

    def saved(self, step: int, now: float, cost: float) -> None:
        """Record a save: at which step, when the training went on, and what the save took from it in seconds."""
        self._step, self._at = step, now
        self._costs.append(max(cost, 1e-6))

    def sentence(self) -> str:
        """Say when saves happen, and why then, for the log."""
        if isinstance(self.every, int):
            return f"a checkpoint every {self.every:,} steps"
        if self.every != "auto":
            return f"a checkpoint every {self.every}"
        how = "measured" if self._costs else "assumed"
        watched = self.observed.seconds
        seen = f" ({self.observed.interruptions:,} seen in {_time(watched)})" if watched else ""
        return (
            f"a checkpoint every {_time(self.interval)}: a save costs {_time(self.cost)} ({how}), an interruption is "
            f"expected every {_time(self.between)}{seen}; saving and repeating then cost "
            f"{100 * overhead(self.cost, self.between, self.interval):.1f} % together (Young, Daly)"
        )


def _time(s: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if s >= 2 * size:
            return f"{s / size:.3g} {unit}"
    return f"{s:.3g} s" if s >= 0.1 else f"{1000 * s:.2g} ms"
