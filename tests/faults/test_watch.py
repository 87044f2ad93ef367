"""Twelve months land at once while Airflow's parts are killed: twelve ingests, in key order, none lost, none doubled.

A real Airflow with the real watch Dag, sensor and triggerer; its ingest is a stand-in that notes what it is asked for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from watched import PARTS, PROJECT, Watched

pytestmark = [pytest.mark.faults, pytest.mark.slow]
MONTHS = [f"2013-{m:02d}" for m in range(1, 13)]
INGEST = f"{PROJECT}.ingest"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    made = Watched(tmp_path_factory.mktemp("watch"))
    try:
        yield made
    finally:
        made.close()


def ended(house: Watched, count: int) -> bool:
    runs = house.api.runs(INGEST)
    assert not [run for run in runs if run.done and not run.ok], house.api.failures(runs[0])
    return len([run for run in runs if run.ok]) >= count


def test_twelve_months_land_at_once_under_kills(house: Watched) -> None:
    house.start(*PARTS)
    house.until(house.waits, "the watch Dag waits")
    house.land(*MONTHS)
    rng = random.Random(13)
    for victim in ("triggerer", "scheduler"):
        time.sleep(rng.uniform(0, 5))
        house.kill(victim)
        house.start(victim)
    house.until(lambda: ended(house, len(MONTHS)), "twelve ingests", 420)
    assert house.told() == MONTHS
    runs = house.api.runs(INGEST)
    assert len(runs) == len(MONTHS) == len({run.run_id for run in runs})
    assert {run.conf["partition"] for run in runs} == {*MONTHS}
    assert all(run.run_id.startswith(f"watch__{run.conf['partition']}__") for run in runs)
    assert all(run.conf["reason"].startswith("landed at 20") for run in runs)


def test_what_lands_while_airflow_is_down_is_found_and_nothing_else_again(house: Watched) -> None:
    house.until(house.waits, "the watch Dag waits again")
    house.kill(*PARTS)
    house.land("2013-05", text="a\n5\n5\n")
    house.land("2014-01")
    house.start(*PARTS)
    house.until(lambda: ended(house, 14), "two more ingests", 420)
    house.until(house.waits, "the watch Dag waits again")
    assert house.told() == [*MONTHS, "2013-05", "2014-01"]


def test_a_wait_is_in_nobody_s_way_and_a_paused_one_goes_on(house: Watched) -> None:
    house.api.pause(f"{PROJECT}.watch")
    house.land("2014-02")
    by_hand = house.api.trigger(INGEST, {"partition": "2013-01", "reason": "by hand"})
    assert house.api.wait(by_hand, timeout=240, every=0.5).ok
    assert house.told()[14:] == ["2013-01"]
    house.api.pause(f"{PROJECT}.watch", paused=False)
    house.until(lambda: ended(house, 16), "the month that landed meanwhile", 240)
    assert house.told()[14:] == ["2013-01", "2014-02"]
