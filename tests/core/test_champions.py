"""A rollback that is tried again, or cleared, goes back once."""

from __future__ import annotations

import pytest
from core_house import House

from orrery import runner
from orrery.champions import rollback_request, rolled_back
from orrery.errors import RequestError, UserError
from orrery.local import LocalProcess
from orrery.plan import Planner


@pytest.fixture
def planner(house: House) -> Planner:
    """Three champions, one after the other."""
    planner = house.planner()
    for version in ("1", "2", "3"):
        model = house.verdict(f"2013-0{version}..2013-0{version}", version=version)
        payload = {"version": version, "model": model.path}
        planner.ledger.record("delays", "promotion", f"run-{version}", "done", "me", payload)
    return planner


def go(planner: Planner, to: str | None = None, run: str = "delays.rollback--manual__1", attempt: int = 1) -> None:
    request = rollback_request(planner, to, run=run, attempt=attempt, actor="ada", reason="it drifts")
    runner.run(planner, request, LocalProcess(on_line=lambda line: None))


def champion(planner: Planner) -> str:
    now = planner.champion()
    assert now is not None
    return now.version


def test_a_run_that_has_rolled_back_is_known_and_another_goes_further(planner: Planner) -> None:
    run = "delays.rollback--manual__1"
    assert rolled_back(planner, run) is None
    go(planner, run=run)
    assert champion(planner) == "2" and rolled_back(planner, run) is not None
    assert rolled_back(planner, "delays.rollback--manual__2") is None
    go(planner, run="delays.rollback--manual__2")
    assert champion(planner) == "1"


def test_a_run_is_known_by_its_attempt_when_it_finished_what_another_had_begun(planner: Planner) -> None:
    model = planner.ledger.versions("delays")["2"]
    begun = {"from": "3", "version": "2", "model": model, "reason": "", "window": "w", "evidence": {}}
    planner.ledger.record("delays", "rollback", "another", "intent", "eve", begun)
    go(planner)
    assert planner.ledger.get("delays", "rollback", "another", "done") is not None
    assert planner.ledger.get("delays", "rollback", "delays.rollback--manual__1", "done") is None
    assert rolled_back(planner, "delays.rollback--manual__1") is not None


def test_a_failed_try_is_no_rollback(planner: Planner, house: House) -> None:
    house.store.put("crash-after-effect", b"")
    with pytest.raises(runner.StepFailed):
        go(planner)
    assert rolled_back(planner, "delays.rollback--manual__1") is None
    house.store.remove("crash-after-effect")
    go(planner, attempt=2)
    assert champion(planner) == "2"


def test_what_cannot_be_gone_back_to_is_refused(planner: Planner, house: House) -> None:
    with pytest.raises(RequestError, match="version 3 is the champion of delays already"):
        go(planner, "3")
    with pytest.raises(RequestError, match="cannot roll back to version '../x'"):
        go(planner, "../x")
    house.store.remove(planner.ledger.versions("delays")["2"])
    with pytest.raises(UserError, match="is gone from"):
        go(planner, "2")
