"""What the ledger keeps of each attempt, also of those whose worker nobody saw the end of."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_house import House, ended, go

from orrery import attempts, goodput, runner
from orrery.attempts import Attempt
from orrery.errors import Interrupted, TryAgain
from orrery.goodput import Progress
from orrery.ledger import Entry, Ledger
from orrery.plan import Plan
from orrery.runner import StepVanished

PRICED = "  cpu-light: {price_per_hour: 0.25, spot: true}\n"


def book() -> Ledger:
    return Ledger(os.environ["ORRERY_LEDGER"])


def told(number: int = 1, run: str = "run-1") -> dict[str, Any]:
    """Return what the ledger keeps of an attempt."""
    entry = book().get("delays", "run", f"delays/runs/{run}/probe-2013-01/{number}", "done")
    assert entry is not None
    return dict(entry.payload["attempt"])


def progressed(house: House, folder: str, **values: Any) -> Progress:
    made = Progress(**{"began": time.time() - 50, "now": time.time() - 10, "step_s": 0.5, "total": 100, **values})
    house.store.put(f"{folder}/{goodput.NAME}", made.model_dump_json().encode())
    return made


def test_an_attempt_tells_where_it_ran_how_long_and_how_far_it_came(house: House) -> None:
    file = house.home / "include" / "platform.yaml"
    file.write_text(file.read_text() + PRICED)

    def launch(plan: Plan) -> int:
        progressed(house, plan.config.folder, resumed=10, step=40, committed=30)
        plan.told["sagemaker"] = {"billable_s": 12}
        assert attempts.read(house.store, plan.config.folder) is not None  # there before anything is started
        return ended(house.fork(plan.config))

    before = time.time()
    go(house, launch)
    mine = Attempt.model_validate(told())
    assert (mine.number, mine.cause, mine.compute) == (1, None, "cpu-light")
    assert (mine.spot, mine.price_per_hour) == (True, 0.25)
    assert (mine.resumed, mine.committed) == (10, 30)
    assert mine.progress is not None and mine.progress.step == 40
    assert 0 < mine.wall_s < time.time() - before + 1
    assert abs(mine.ended.timestamp() - time.time()) < 60
    assert told()["sagemaker"] == {"billable_s": 12}


@pytest.mark.parametrize(
    ("mode", "kind", "cause", "budget"),
    [("again", TryAgain, "try_again", "code"), ("vanish", StepVanished, "lost", "losses"), ("stop", Interrupted, "interrupted", "interruptions")],
)  # fmt: skip
def test_a_failed_attempt_tells_the_cause_and_the_budget_it_used(
    house: House, mode: str, kind: type[Exception], cause: str, budget: str
) -> None:
    codes = {"vanish": 9, "stop": -signal.SIGTERM}
    with pytest.raises(kind):
        go(
            house,
            (lambda plan: codes[mode]) if mode in codes else (lambda plan: ended(house.fork(plan.config))),
            mode=mode if mode == "again" else "done",
        )
    assert (told()["cause"], Attempt.model_validate(told()).spent) == (cause, budget)


def test_a_loss_on_an_interruptible_machine_is_an_interruption_if_the_work_went_on() -> None:
    lost = Attempt(cause="lost", started="2026-01-01T00:00:00+00:00", spot=True, resumed=5, committed=9)
    assert lost.spent == "interruptions"
    assert lost.model_copy(update={"committed": 5}).spent == "losses"  # out of memory at each try, say
    assert lost.model_copy(update={"spot": False}).spent == "losses"


def lose(house: House, launch: Callable[[Plan], None] = lambda plan: None) -> None:
    """Carry an attempt in a worker that is killed once the step has done what it does: nobody records anything."""
    worker = os.fork()
    if worker == 0:

        def killed(plan: Plan) -> int:
            launch(plan)
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        try:
            go(house, killed)
        finally:
            os._exit(1)
    assert ended(worker) == -signal.SIGKILL


def test_an_attempt_whose_worker_was_lost_is_recorded_by_the_next_once(house: House) -> None:
    lose(house)
    folder = "delays/runs/run-1/probe-2013-01/1"
    came = progressed(house, folder, step=40, committed=30)
    assert book().find("delays", "run") == []
    waited: list[tuple[str, int]] = []
    for _ in range(2):
        (lost,) = runner.history(
            house.planner(), house.request(attempt=2), lambda f: waited.append((f, len(book().find("delays", "run"))))
        )
        assert (lost.number, lost.cause, lost.committed, lost.progress) == (1, "lost", 30, came)
    assert waited == [(folder, 0)]  # its step may still be saving: nothing is recorded before its end
    (entry,) = book().find("delays", "run")
    assert entry.payload["folder"] == folder and "worker of attempt 1 was lost" in entry.payload["error"]
    began = Attempt.model_validate_json(house.store.read(f"{folder}/{attempts.NAME}")).started
    assert lost.started == began and lost.wall_s == pytest.approx(max(came.now - _seconds(began), 0), abs=0.01)


def _seconds(moment: str) -> float:
    return Attempt(started=moment).ended.timestamp()


@pytest.mark.parametrize(("torn", "cause"), [(KeyboardInterrupt(), "interrupted"), (TimeoutError("after 2 h"), "bug")])
def test_a_launcher_that_is_torn_off_is_recorded_at_once(house: House, torn: BaseException, cause: str) -> None:
    """A timeout must use up the budget of bugs: as an interruption it could come twenty times."""

    def launch(plan: Plan) -> int:
        raise torn

    with pytest.raises(type(torn)):
        go(house, launch)
    assert told()["cause"] == cause


def test_a_lost_attempt_whose_step_still_told_its_end_is_believed(house: House) -> None:
    """The worker was killed while the step saved; the step ended in order after that."""

    def stops(plan: Plan) -> None:
        result = {"status": "interrupted", "seconds": {"total": 12.5}}
        result["error"] = {"kind": "Interrupted", "message": "x", "details": {"step": 9, "resumed": 2, "committed": 9}}
        house.store.put(f"{plan.config.folder}/result.json", json.dumps(result).encode())

    lose(house, stops)
    (lost,) = runner.history(house.planner(), house.request(attempt=2))
    assert (lost.cause, lost.resumed, lost.committed, lost.wall_s) == ("interrupted", 2, 9, 12.5)


def test_a_lost_attempt_that_had_committed_was_done(house: House) -> None:
    def commits(plan: Plan) -> None:
        assert ended(house.fork(plan.config)) == 0
        Path(house.store.full(f"{plan.config.folder}/result.json")).unlink()

    lose(house, commits)
    (lost,) = runner.history(house.planner(), house.request(attempt=2))
    assert lost.cause is None and lost.spent is None


def test_attempts_lost_before_a_clear_are_recorded_and_are_no_history_of_the_cleared_run(house: House) -> None:
    lose(house)
    again = dataclasses.replace(house.request(run="run-1--cleared-1", attempt=2), cleared=("run-1",))
    assert runner.history(house.planner(), again) == []
    assert told()["cause"] == "lost"


def test_entries_from_before_are_read_too() -> None:
    old = {"attempt": "p/runs/r/train-w/3", "verb": "train"}
    assert attempts.folder_of(old) == "p/runs/r/train-w/3"
    assert attempts.of([Entry(1, "t", "p", "run", "k", "done", "me", old)]) == []
