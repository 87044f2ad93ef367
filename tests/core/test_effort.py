"""Where the time of attempts went: the parts add up, a step counts once, a killed attempt is judged by what it left."""

from __future__ import annotations

import random

import pytest
from cost_house import STARTUP, T0, attempt, progress

from orrery.attempts import Attempt
from orrery.effort import Parts, kept, parts, wall


def whole(attempts: list[Attempt]) -> list[Parts]:
    """Return the parts of each attempt of a training; they add up to its wall time."""
    found = [parts(a, count) for a, count in zip(attempts, kept(attempts), strict=True)]
    for a, part in zip(attempts, found, strict=True):
        assert part.wall == pytest.approx(wall(a))
        assert min(part.told().values()) >= 0
    return found


def test_a_training_that_nobody_disturbs() -> None:
    one = attempt(cause=None, steps=(0, 100, 100))
    one = one.model_copy(update={"wall_s": one.wall_s + 12})  # export, tidying up
    assert whole([one]) == [Parts(useful=100, startup=STARTUP, evaluating=5, checkpointing=2, other=12, queued=10)]


def test_steps_slower_than_the_median_are_no_useful_time() -> None:
    told = progress(T0, 0, 100, 100, step_s=0.75)
    one = attempt(cause=None, progress=told, steps=(0, 100, 100))
    [found] = whole([one])
    assert (found.useful, found.other) == (75, 25)
    fast = attempt(cause=None, progress=progress(T0, 0, 100, 100, step_s=1.5), steps=(0, 100, 100))
    assert whole([fast])[0].useful == 100  # a median above the mean takes no more than there was


def test_a_killed_attempt_lost_what_came_after_its_last_save_and_its_last_sign_of_life() -> None:
    first = attempt(cause="lost", steps=(0, 100, 90))
    first = first.model_copy(update={"wall_s": first.wall_s + 4})
    second = attempt(T0 + 500, cause=None, steps=(90, 200, 200))
    assert kept([first, second]) == [90, 110]
    a, b = whole([first, second])
    assert (a.useful, a.lost, a.other, a.startup) == (90, 10 + 4, 0, STARTUP)
    assert (b.useful, b.lost) == (110, 0)


def test_an_attempt_that_saved_before_it_went_lost_nothing() -> None:
    first = attempt(steps=(0, 100, 100))
    first = first.model_copy(update={"wall_s": first.wall_s + 1})
    a, _ = whole([first, attempt(T0 + 500, cause=None, steps=(100, 200, 200))])
    assert (a.useful, a.lost, a.other) == (100, 0, 1)


def test_a_resume_from_an_older_step_loses_what_is_done_again() -> None:
    attempts = [
        attempt(steps=(0, 100, 100)),
        attempt(T0 + 500, steps=(60, 150, 140)),  # the checkpoint at 100 was damaged
        attempt(T0 + 900, cause=None, steps=(140, 200, 200)),
    ]
    assert kept(attempts) == [60, 80, 60]
    assert [p.lost for p in whole(attempts)] == [40, 10, 0]


def test_one_that_went_on_from_an_older_step_and_came_to_nothing_costs_the_others_nothing() -> None:
    attempts = [
        attempt(steps=(0, 100, 100)),
        attempt(T0 + 500, steps=(60, 80, 60)),  # could not read the newest for a moment
        attempt(T0 + 900, cause=None, steps=(100, 200, 200)),
    ]
    assert kept(attempts) == [100, 0, 100]


def test_a_save_that_became_whole_after_the_last_sign_of_life_counts() -> None:
    attempts = [attempt(cause="lost", steps=(0, 100, 50)), attempt(T0 + 500, cause=None, steps=(100, 120, 120))]
    assert kept(attempts) == [100, 20]
    later = [attempt(cause="lost", steps=(0, 100, 50)), attempt(T0 + 500, cause=None, steps=(103, 120, 120))]
    assert kept(later) == [103, 17]
    assert whole(later)[0].lost == 0


def test_two_that_did_the_same_steps_count_once() -> None:
    twins = [attempt(steps=(0, 100, 100)), attempt(T0 + 1, steps=(0, 80, 80))]
    assert kept(twins) == [100, 0]
    assert kept([*twins, attempt(T0 + 500, cause=None, steps=(100, 110, 110))]) == [100, 0, 10]


def test_early_stopping_loses_no_step() -> None:
    [found] = whole([attempt(cause=None, steps=(0, 40, 35))])  # of 1,000: patience ended it
    assert (found.useful, found.lost) == (40, 0)


def test_a_training_that_is_not_done_is_worth_its_newest_save() -> None:
    attempts = [attempt(steps=(0, 100, 90)), attempt(T0 + 500, cause="bug", steps=(90, 130, 120))]
    assert kept(attempts) == [90, 30]
    assert kept([attempt(steps=(0, 50, 0))]) == [0]
    assert kept([]) == []


def test_without_progress_an_attempt_is_judged_as_a_whole() -> None:
    early, fit = attempt(cause="interrupted", steps=None), attempt(T0 + 100, cause=None, steps=None)
    assert whole([early, fit]) == [Parts(lost=STARTUP, queued=10), Parts(useful=STARTUP, queued=10)]


def test_clocks_that_disagree_change_no_sum() -> None:
    behind = attempt(cause=None, steps=(0, 100, 100), progress=progress(T0 - 3600, 0, 100, 100))
    ahead = attempt(cause=None, steps=(0, 100, 100), progress=progress(T0 + 3600, 0, 100, 100))
    assert whole([behind])[0].startup == 0
    assert whole([ahead])[0].startup == STARTUP  # all there is beside the training itself
    short = attempt(cause="lost", steps=(0, 100, 90), wall_s=0.0)  # nobody saw its end
    assert wall(short) == 107


def test_parts_add_up_whatever_happened() -> None:
    random.seed(4)
    for _ in range(200):
        attempts, at, safe = [], T0, 0
        for _ in range(random.randint(1, 6)):
            resumed = random.choice([safe, max(0, safe - random.randint(0, 30))])
            step = resumed + random.randint(0, 100)
            safe = random.randint(resumed, step)
            told = progress(at, resumed, step, safe, step_s=random.uniform(0, 2))
            attempts.append(
                attempt(at, steps=(resumed, step, safe), progress=told, wall_s=random.uniform(0, 300), cause="lost")
            )
            at += 1000
        if random.random() < 0.5:
            attempts[-1] = attempts[-1].model_copy(update={"cause": None})
        whole(attempts)
        counts = kept(attempts)
        end = attempts[-1].progress.step if attempts[-1].cause is None else max(a.committed for a in attempts)  # type: ignore[union-attr]
        first = next((a.progress.resumed for a, n in zip(attempts, counts, strict=True) if n), end)  # type: ignore[union-attr]
        assert sum(counts) == end - first  # every step once, without a gap
