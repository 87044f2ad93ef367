"""When a training saves: counted, timed, or where saving and repeating cost least together."""

from __future__ import annotations

import math

import pytest

from orrery.spec import Checkpoint
from orrery.training.interval import FIRST_COST_S, Observed, Schedule, mean_between, optimum, overhead


@pytest.mark.parametrize("cost", [0.01, 0.2, 5.0, 60.0])
@pytest.mark.parametrize("between", [300.0, 900.0, 3600.0])
def test_no_other_interval_costs_less(cost: float, between: float) -> None:
    """Checked against a simulation's expectation: Daly's own model of time to finish, minimised by brute force."""

    def per_useful_second(every: float) -> float:  # Daly's eq. 20 without restart: M (e^((T+d)/M) - 1) / T
        return between * math.expm1((every + cost) / between) / every

    best = min((every / 100 for every in range(1, int(between * 100), 7)), key=per_useful_second)
    assert optimum(cost, between) == pytest.approx(best, rel=0.03, abs=0.2)
    assert per_useful_second(optimum(cost, between)) <= per_useful_second(best) * 1.0002


def test_young_is_the_limit_of_cheap_saves() -> None:
    assert optimum(1e-4, 900) == pytest.approx(math.sqrt(2 * 1e-4 * 900), rel=1e-3)


def test_a_save_dearer_than_two_interruptions_is_made_once_per_interruption() -> None:
    assert optimum(1800.0, 900.0) == 900.0
    assert optimum(5000.0, 900.0) == 900.0


def test_what_is_lost_is_saving_and_half_an_interval() -> None:
    assert overhead(1.0, 1000.0, 99.0) == pytest.approx(1 / 100 + 100 / 2000)


def test_what_is_expected_counts_as_one_interruption() -> None:
    assert mean_between(900.0, Observed()) == 900.0
    assert mean_between(900.0, Observed(interruptions=9, seconds=9 * 60.0)) == pytest.approx(144.0)
    assert mean_between(900.0, Observed(interruptions=0, seconds=36_000.0)) == 36_900.0


def test_steps_are_counted_from_the_last_save() -> None:
    schedule = Schedule(Checkpoint(every=10), now=0.0, step=7)
    assert not schedule.due(16, 1e9)
    assert schedule.due(17, 0.0)
    schedule.saved(17, 0.0, cost=0.5)
    assert not schedule.due(26, 1e9) and schedule.due(27, 0.0)
    assert schedule.sentence() == "a checkpoint every 10 steps"


def test_seconds_are_measured_from_the_last_save_and_a_step_is_never_saved_twice() -> None:
    schedule = Schedule(Checkpoint(every="2m"), now=100.0, step=5)
    assert not schedule.due(6, 219.0)
    assert schedule.due(6, 220.0)
    assert not schedule.due(5, 1e9)
    schedule.saved(6, 220.5, cost=0.5)
    assert not schedule.due(7, 340.0) and schedule.due(7, 340.5)


def test_auto_follows_the_measured_cost_and_one_slow_save_does_not_move_it() -> None:
    schedule = Schedule(Checkpoint(interruptions="15m"), now=0.0)
    assert schedule.interval == optimum(FIRST_COST_S, 900.0)
    for step in range(1, 6):
        schedule.saved(step, float(step), cost=2.0)
    assert schedule.interval == optimum(2.0, 900.0)
    schedule.saved(6, 6.0, cost=100.0)
    assert schedule.interval == optimum(2.0, 900.0)
    assert not schedule.due(7, 6.0 + optimum(2.0, 900.0) - 0.1)
    assert schedule.due(7, 6.0 + optimum(2.0, 900.0) + 0.1)


def test_the_sentence_names_the_numbers_behind_it() -> None:
    schedule = Schedule(Checkpoint(), now=0.0, observed=Observed(interruptions=3, seconds=2700.0))
    schedule.saved(1, 1.0, cost=0.5)
    assert schedule.sentence() == (
        "a checkpoint every 29.7 s: a save costs 0.5 s (measured), an interruption is expected every 15 min "
        "(3 seen in 45 min); saving and repeating then cost 3.3 % together (Young, Daly)"
    )
    assert "0.1 s (assumed)" in Schedule(Checkpoint(), now=0.0).sentence()
