"""Where the next attempt of a training runs: a pure function of the attempts before, the spec and the clock."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orrery.attempts import Attempt
from orrery.errors import UserError
from orrery.goodput import Progress
from orrery.placement import outlook, placement
from orrery.platform import Compute
from orrery.spec import Train

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
CLASSES = {"gpu-spot": Compute(spot=True, price_per_hour=1), "gpu-firm": Compute(price_per_hour=3), "cpu": Compute()}
STEPS, STEP_S, START_S, WAIT_S = 3600, 1.0, 60.0, 30.0


def train(**spot: Any) -> Train:
    return Train.model_validate({"compute": "gpu-spot", "spot": spot})


def attempt(
    began: float, *, cause: str | None = "interrupted", resumed: int = 0, step: int = 0, committed: int = 0, **more: Any
) -> Attempt:
    """Return an attempt that began so many seconds after the first; without a step it has shown nothing."""
    at = BEGAN + timedelta(seconds=began)
    first = at.timestamp() + START_S
    shown = Progress(
        began=first, now=first + (step - resumed) * STEP_S, resumed=resumed, step=step, committed=committed, total=STEPS,
        step_s=STEP_S, seconds={"step": (step - resumed) * STEP_S},
    )  # fmt: skip
    values = {"cause": cause, "compute": "gpu-spot", "spot": True, "resumed": resumed, "committed": committed, **more}
    return Attempt.model_validate(
        {**values, "started": at.isoformat(), "wall_s": START_S + (step - resumed) * STEP_S, "progress": shown if step else None}
    )  # fmt: skip


def at(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def test_a_first_attempt_and_one_with_time_left_stay_where_the_spec_says() -> None:
    wants = train(deadline="3h", fallback="gpu-firm")
    assert placement([], wants, CLASSES, at(0)).compute == "gpu-spot"
    place = placement([attempt(0, step=1000, committed=900)], wants, CLASSES, at(1100))
    assert (place.compute, place.reason) == ("gpu-spot", "")


def test_what_is_left_is_reckoned_from_what_was_seen() -> None:
    seen = outlook([attempt(0, step=1000, committed=900)])
    assert seen is not None
    assert (seen.remaining_s, seen.start_s) == (2700, 60)
    assert seen.interruption_s == 60 + 30 + 100  # another start, the wait, and as much work lost as at worst so far
    assert outlook([attempt(0)]) is None


def test_the_fallback_is_taken_while_it_can_still_make_the_deadline() -> None:
    wants = train(deadline="75m", fallback="gpu-firm")  # 4500 s for 3600 s of work
    history = [attempt(0, step=1000, committed=900)]
    # 2760 s of work are left and an interruption costs 190 s: up to 4500 - 2760 - 1.5 × 190 = 1455 s.
    assert placement(history, wants, CLASSES, at(1450)).compute == "gpu-spot"
    place = placement(history, wants, CLASSES, at(1460))
    assert place.compute == "gpu-firm"
    assert "51 min are left until 2026-01-01 01:15 UTC and the work takes 46 min" in place.reason
    assert "could not be made up for" in place.reason and "late" not in place.reason
    assert "late all the same" in placement(history, wants, CLASSES, at(2000)).reason


def test_interruptions_beyond_the_limit_move_the_training() -> None:
    wants = train(max_interruptions=2, fallback="gpu-firm")
    history = [attempt(0, step=100, committed=90)]
    assert placement(history, wants, CLASSES, at(200)).compute == "gpu-spot"
    # A lost one on an interruptible machine that had gone on is an interruption too; a bug is not.
    history += [attempt(300, cause="bug", resumed=90, step=100)]
    assert placement(history, wants, CLASSES, at(500)).compute == "gpu-spot"
    history += [attempt(600, cause="lost", resumed=90, step=300, committed=280)]
    place = placement(history, wants, CLASSES, at(900))
    assert (place.compute, place.reason) == ("gpu-firm", "interrupted 2 times, 2 are borne on gpu-spot")


def test_without_a_fallback_a_deadline_that_cannot_be_met_fails_and_says_so() -> None:
    wants = train(deadline="75m")
    history = [attempt(0, step=1000, committed=900)]
    assert placement(history, wants, CLASSES, at(1700)).compute == "gpu-spot"  # tight, and possible
    with pytest.raises(UserError, match=r"cannot be there by 2026-01-01 01:15 UTC: 45 min are left.*46 min more") as e:
        placement(history, wants, CLASSES, at(1800))
    assert "a later deadline, or a fallback" in e.value.hint


def test_attempts_that_never_began_may_use_half_of_the_deadline() -> None:
    wants = train(deadline="2h", fallback="gpu-firm")
    assert placement([attempt(0)], wants, CLASSES, at(3500)).compute == "gpu-spot"
    place = placement([attempt(0)], wants, CLASSES, at(3700))
    assert place.compute == "gpu-firm" and "no attempt on gpu-spot came to its first step" in place.reason
    assert placement([attempt(0)], train(deadline="2h"), CLASSES, at(3700)).compute == "gpu-spot"


def test_a_deadline_moves_nothing_that_is_not_interruptible_or_is_done() -> None:
    wants = Train.model_validate({"compute": "cpu", "spot": {"deadline": "75m", "fallback": "gpu-firm"}})
    assert placement([attempt(0, step=10)], wants, CLASSES, at(9000)).compute == "cpu"
    done = attempt(0, cause=None, step=STEPS, committed=STEPS)
    assert placement([done], train(deadline="75m"), CLASSES, at(9000)).compute == "gpu-spot"


@pytest.mark.parametrize("seed", range(40))
def test_no_deadline_is_missed_that_the_fallback_alone_would_make(seed: int) -> None:
    """Interruptions come at random, each loses up to 5 min of work: the switch to the fallback comes early enough."""
    draw = random.Random(seed)
    deadline = 1.4 * STEPS * STEP_S
    wants = train(deadline=f"{int(deadline)}s", fallback="gpu-firm", max_interruptions=1000)
    now, history, done = 0.0, list[Attempt](), 0
    while done < STEPS:
        place = placement(history, wants, CLASSES, at(now))
        left = STEPS - done
        lives = draw.expovariate(1 / 900) if place.compute == "gpu-spot" else float("inf")
        if lives >= START_S + left * STEP_S:
            now += START_S + left * STEP_S
            break
        stepped = max(int((lives - START_S) / STEP_S), 0)
        saved = stepped // 300 * 300  # a checkpoint each 300 steps; the rest is lost
        history.append(attempt(now, resumed=done, step=done + stepped, committed=done + saved))
        done += saved
        now += lives + WAIT_S
    assert now <= deadline
