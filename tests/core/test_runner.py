"""From request to ledger: how a step ended, and effects that are repaired."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from core_house import House, ended, go

from orrery import runner
from orrery.contract import Result, StepError
from orrery.errors import Interrupted, RequestError, TryAgain, UserError
from orrery.ledger import Ledger, unfinished
from orrery.plan import Plan, Request
from orrery.runner import StepFailed, StepVanished


def book() -> Ledger:
    return Ledger(os.environ["ORRERY_LEDGER"])


def forked(house: House) -> runner.Launcher:
    """Launch in a fork: as a process of its own, without the imports."""
    return lambda plan: ended(house.fork(plan.config))


# -- results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("user", UserError, "the column is not there"),
        ("again", TryAgain, "the server is down"),
        ("bug", StepFailed, "division by zero"),
        ("vanish", StepVanished, r"left no result \(exit code 9\)"),
    ],
)
def test_how_a_step_ended_is_raised_and_recorded(house: House, mode: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as e:
        go(house, forked(house), mode=mode) if mode != "vanish" else go(house, vanishing(house))
    assert type(e.value) is kind
    assert e.value.details["config"] == "delays/runs/run-1/probe-2013-01/1/config.json"  # type: ignore[attr-defined]
    assert e.value.hint.endswith("to repeat it: orrery reproduce delays delays/runs/run-1/probe-2013-01/1")  # type: ignore[attr-defined]
    (entry,) = book().find("delays", "run")
    assert entry.actor == "eve"
    assert entry.payload["folder"] == "delays/runs/run-1/probe-2013-01/1"
    assert entry.payload["status"] in ("user", "try_again", "bug")


def vanishing(house: House) -> runner.Launcher:
    return lambda plan: 9


def test_a_vanished_process_is_judged_by_the_store(house: House) -> None:
    def committed_then_killed(plan: Plan) -> int:
        assert house.tell(plan.config)[0] == 0
        Path(house.store.full(f"{plan.config.folder}/result.json")).unlink()
        return -signal.SIGKILL

    result = go(house, committed_then_killed)
    assert result.status == "done"
    assert result.metrics == {"value": 1.0}
    assert "the process vanished after it had committed" in result.reasons
    # Committed by another attempt is not this one's doing.
    other = house.config(9)
    assert runner.read_result(house.store, other, -signal.SIGKILL).status == "bug"


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        (-9, "bug", "killed by SIGKILL"),
        (-15, "interrupted", "SIGTERM"),
        (143, "interrupted", "143"),
        (0, "bug", "exit code 0"),
    ],
)
def test_no_result_no_commit(house: House, code: int, status: str, text: str) -> None:
    result = runner.read_result(house.store, house.config(), code)
    assert (result.status, result.output) == (status, None)
    assert result.error is not None and text in result.error.message


def test_a_result_of_another_version_is_told(house: House) -> None:
    config = house.config()
    house.store.put(f"{config.folder}/result.json", b'{"version": 1, "colour": "red"}')
    with pytest.raises(StepFailed, match=r"result\.json is not a result document"):
        runner.read_result(house.store, config, 0)


def test_what_is_not_done_is_never_passed_over(house: House) -> None:
    plan = house.planner().plan(house.request())
    for status in ("bug", "user", "try_again", "interrupted"):
        with pytest.raises(StepFailed, match=f"ended as {status} and does not say why"):
            runner.raise_for(plan, Result(status=status))
    with pytest.raises(Interrupted, match="told"):
        runner.raise_for(plan, Result(status="interrupted", error=StepError(kind="Interrupted", message="told")))
    runner.raise_for(plan, Result())


def test_a_skip_is_recorded_and_starts_nothing(house: House) -> None:
    go(house, forked(house))

    def never(plan: Plan) -> int:
        raise AssertionError("a process was started")

    result = go(house, never, attempt=2)
    assert result.skipped is not None
    assert len(book().find("delays", "run")) == 2


# -- effects -----------------------------------------------------------------------------------------


def promotion(house: House, version: str = "1", run: str = "run-1", attempt: int = 1, key: str = "2013-01") -> Request:
    options = {"version": version}
    return house.request("promote", key, run=run, attempt=attempt, options=options, actor="eve", reason="better")


def phases() -> list[tuple[str, str]]:
    return [(e.phase, e.payload["version"]) for e in book().find("delays", "promotion")]


def test_a_promotion_is_intended_driven_and_done(house: House) -> None:
    candidate = house.verdict("2013-01..2013-01")
    runner.run(house.planner(), promotion(house), forked(house))
    assert phases() == [("intent", "1"), ("done", "1")]
    assert house.store.read("alias") == b"1"
    champion = book().champion("delays")
    assert champion is not None
    assert (champion.version, champion.model, champion.actor, champion.reason) == ("1", candidate.path, "eve", "better")
    evidence = book().find("delays", "promotion")[-1].payload["evidence"]
    assert set(evidence) == {"evaluation", "verdict"}
    # The same run once more changes nothing; another run promotes from what is there now.
    assert "is the champion since" in str(
        runner.run(house.planner(), promotion(house, attempt=2), forked(house)).skipped
    )
    assert phases() == [("intent", "1"), ("done", "1")]
    house.verdict("2013-02..2013-02", version="2", champion=candidate)
    runner.run(house.planner(), promotion(house, "2", "run-2", key="2013-02"), forked(house))
    assert [e.payload["from"] for e in book().find("delays", "promotion")] == [None, None, "1", "1"]


@pytest.mark.parametrize("where", ["before the effect", "after the effect", "before done"])
def test_a_crash_in_a_promotion_is_repaired_by_the_next_attempt(
    house: House, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.verdict("2013-01..2013-01")
    if where == "before the effect":
        with pytest.raises(StepVanished):
            runner.run(house.planner(), promotion(house), lambda plan: -9)
    elif where == "after the effect":
        house.store.put("crash-after-effect", b"")
        with pytest.raises(StepVanished):
            runner.run(house.planner(), promotion(house), forked(house))
        Path(house.store.full("crash-after-effect")).unlink()
        assert house.store.read("alias") == b"1"
    else:
        with monkeypatch.context() as m:
            m.setattr(runner, "_complete", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                runner.run(house.planner(), promotion(house), forked(house))
        assert house.store.read("alias") == b"1"
    assert phases() == [("intent", "1")]
    assert book().champion("delays") is None
    # Whoever clears the task finishes what was intended, in the words of the one who intended it.
    again = dataclasses.replace(promotion(house, attempt=2), actor="bob", reason="cleared")
    runner.run(house.planner(), again, forked(house))
    assert phases() == [("intent", "1"), ("done", "1")]
    intent, done = book().find("delays", "promotion")
    assert (done.actor, done.payload) == ("eve", intent.payload)
    assert house.store.read("alias") == b"1"


@pytest.mark.parametrize("effect", ["before the effect", "after the effect"])
def test_a_run_of_another_name_finishes_what_was_intended(house: House, effect: str) -> None:
    """A cleared run and a repeat at the command line have a name of their own: the intent must not stay open."""
    house.verdict("2013-01..2013-01")
    if effect == "after the effect":
        house.store.put("crash-after-effect", b"")
    with pytest.raises(StepVanished):
        runner.run(house.planner(), promotion(house), forked(house) if "after" in effect else lambda plan: -9)
    house.store.remove("crash-after-effect")
    assert len(unfinished(book().find("delays"))) == 1
    runner.run(house.planner(), promotion(house, run="run-1--cleared-1"), forked(house))
    intent, done = book().find("delays", "promotion")
    assert (intent.phase, done.phase, done.key) == ("intent", "done", intent.key)
    assert unfinished(book().find("delays")) == []


def test_only_the_same_change_is_taken_over(house: House) -> None:
    house.verdict("2013-01..2013-01")
    with pytest.raises(StepVanished):
        runner.run(house.planner(), promotion(house), lambda plan: -9)
    house.verdict("2013-02..2013-02", version="2")
    runner.run(house.planner(), promotion(house, "2", "run-2", key="2013-02"), forked(house))
    assert phases() == [("intent", "1"), ("intent", "2"), ("done", "2")]
    assert unfinished(book().find("delays")) == []  # overtaken: nobody will finish it, and nobody should


def test_a_run_whose_name_was_used_before_records_its_own_change(house: House) -> None:
    """REST may name a run as one that was deleted: its promotion is another one all the same."""
    first = house.verdict("2013-01..2013-01")
    runner.run(house.planner(), promotion(house), forked(house))
    house.verdict("2013-02..2013-02", version="2", champion=first)
    runner.run(house.planner(), promotion(house, "2", "run-1", key="2013-02"), forked(house))
    assert phases() == [("intent", "1"), ("done", "1"), ("intent", "2"), ("done", "2")]
    champion = book().champion("delays")
    assert champion is not None and champion.version == "2"


def test_a_rollback_holds_for_the_champion_it_was_chosen_from(house: House) -> None:
    models = {v: house.verdict(f"2013-0{v}..2013-0{v}") for v in ("1", "2", "3")}
    for version in ("1", "2"):
        payload = {"version": version, "model": models[version].path}
        book().record("delays", "promotion", f"run-{version}", "done", "me", payload)
    options = {"version": "1", "model": models["1"].path, "previous": "2"}
    request = house.request("rollback", "2013-01", options=options)
    book().record("delays", "promotion", "run-3", "done", "me", {"version": "3", "model": models["3"].path})
    with pytest.raises(RequestError, match="the champion is version 3 now, not version 2"):
        runner.run(house.planner(), request, forked(house))
    assert book().find("delays", "rollback") == []


def test_a_result_from_before_is_not_believed(house: House) -> None:
    """The same attempt is started again after its worker was lost, and vanishes."""
    plan = house.planner().plan(house.request())
    house.store.put(f"{plan.config.folder}/result.json", Result().model_dump_json().encode())
    with pytest.raises(StepVanished):
        go(house, vanishing(house))


def test_a_crash_after_done_keeps_what_was_recorded(house: House) -> None:
    first = house.verdict("2013-01..2013-01")
    runner.run(house.planner(), promotion(house, "1", "run-0"), forked(house))
    house.verdict("2013-02..2013-02", version="2", champion=first)
    runner.run(house.planner(), promotion(house, "2", "run-1", key="2013-02"), forked(house))
    runner.run(house.planner(), promotion(house, "2", "run-1", attempt=2, key="2013-02"), forked(house))
    last = book().find("delays", "promotion", phase="done")[-1]
    assert (last.payload["from"], last.payload["version"]) == ("1", "2")


def test_a_candidate_measured_against_another_champion_is_not_promoted(house: House) -> None:
    """Otherwise a model that beat the champion of yesterday replaces a better one that came since."""
    first = house.verdict("2013-01..2013-01")
    runner.run(house.planner(), promotion(house, "1", "run-0"), forked(house))
    house.verdict("2013-02..2013-02", version="2", champion=first)
    house.verdict("2013-03..2013-03", version="3", champion=first)
    runner.run(house.planner(), promotion(house, "2", "run-1", key="2013-02"), forked(house))
    with pytest.raises(RequestError, match=r"was not compared with the present champion \(version 2\)"):
        runner.run(house.planner(), promotion(house, "3", "run-2", key="2013-03"), forked(house))
    assert [e.payload["version"] for e in book().find("delays", "promotion", phase="intent")] == ["1", "2"]
    assert house.store.read("alias") == b"2"


def test_a_version_that_is_another_candidate_is_not_promoted(house: House) -> None:
    house.verdict("2013-01..2013-01")
    with pytest.raises(RequestError, match="version '7' is not the candidate of 2013-01.*\n.*its version is 1"):
        runner.run(house.planner(), promotion(house, "7"), forked(house))
    assert phases() == []
