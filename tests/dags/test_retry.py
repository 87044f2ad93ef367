"""The retry policy of steps: by the kind of failure and by what the ledger has counted."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

from core_house import build, environment

from orrery.attempts import Attempt
from orrery.budgets import Budgets
from orrery.errors import BudgetSpent, DataError, Interrupted, OrreryError, TryAgain, UserError
from orrery.ledger import Ledger
from orrery.orchestration import retry
from orrery.orchestration.operators import StepOperator
from orrery.runner import StepFailed, StepVanished

MOST = Budgets(code=1, interruptions=2, losses=1)
RUN = "toy.train--r"


class Store(dict[str, Any]):
    """Stands in for the task's state store."""

    def set(self, key: str, value: Any) -> None:
        self[key] = value


@pytest.fixture
def book(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    url = f"sqlite:///{tmp_path}/ledger.db"
    monkeypatch.setenv("ORRERY_LEDGER", url)
    return Ledger(url)


def context(cleared: int = 0, mapped: int = -1) -> Any:
    run = SimpleNamespace(dag_id="toy.train", run_id="r", clear_number=cleared)
    ti = SimpleNamespace(task_id="train", map_index=mapped)
    return {"dag_run": run, "ti": ti, "task_state_store": Store()}


def record(book: Ledger, *causes: str, run: str = RUN, task: str = "train", key: str = "w") -> None:
    for cause in causes:
        number = len(book.find("toy")) + 1
        folder = f"toy/runs/{run}/{task}-{key}/{number}"
        attempt = Attempt(number=number, cause=cause, started="2026-01-01T00:00:00+00:00")  # type: ignore[arg-type]
        payload = {"verb": task, "key": key, "folder": folder, "attempt": attempt.model_dump(mode="json")}
        book.record("toy", "run", folder, "done", "t", payload)


def decide(error: BaseException, told: Any = None) -> tuple[str, float | None, str | None]:
    found = retry.BudgetPolicy("toy", MOST).evaluate(error, 1, 9, context() if told is None else told)
    return found.action.value, found.retry_delay.total_seconds() if found.retry_delay else None, found.reason


@pytest.mark.parametrize("error", [UserError("x"), DataError("x"), BudgetSpent("x")])
def test_what_someone_must_act_on_is_never_tried_again(book: Ledger, error: OrreryError) -> None:
    assert decide(error) == ("fail", None, "64: someone must act, see the message")


def test_each_kind_has_its_own_wait_and_its_own_end(book: Ledger) -> None:
    record(book, "interrupted")
    action, wait, reason = decide(Interrupted("x"))
    assert (action, wait, reason) == ("retry", 30, "interrupted 1 of 2 times; the next attempt comes in 30 s")
    record(book, "bug")
    action, wait, _ = decide(StepFailed("x"))
    assert action == "retry" and wait is not None and 20 <= wait <= 40
    record(book, "interrupted")
    assert decide(Interrupted("x"))[0] == "retry"
    record(book, "lost")
    assert decide(StepVanished("x"))[:2] == ("retry", 30)
    record(book, "interrupted")
    assert decide(Interrupted("x")) == ("fail", None, "interrupted 3 times, 2 are tried again")


def test_bugs_end_it_however_few_interruptions_there_were(book: Ledger) -> None:
    record(book, "bug", "try_again")
    assert decide(TryAgain("x")) == ("fail", None, "failed 2 times, 1 are tried again")


def test_counts_are_of_this_task_and_of_this_clear(book: Ledger) -> None:
    record(book, "lost", "lost", run="toy.train--r2")
    record(book, "lost", "lost", task="train.7")
    record(book, "lost", "lost", task="evaluate")
    assert decide(StepVanished("x"))[0] == "retry"
    assert decide(StepVanished("x"), context(mapped=7))[0] == "fail"
    record(book, "lost", "lost", key="v")  # the same task on another partition
    assert decide(StepVanished("x"))[0] == "fail"
    assert decide(StepVanished("x"), context(cleared=1))[0] == "retry"
    record(book, "lost", "lost", run="toy.train--r--cleared-1")
    assert decide(StepVanished("x"), context(cleared=1))[0] == "fail"


def test_a_failure_that_no_step_told_is_a_bug_and_a_ledger_out_of_reach_stops_nothing(
    book: Ledger, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    assert retry.kind(TimeoutError()) == "code"
    monkeypatch.setenv("ORRERY_LEDGER", f"sqlite:///{tmp_path}")  # a folder
    action, wait, _ = decide(TryAgain("x"))
    assert action == "retry" and wait is not None
    assert retry.BudgetPolicy("toy", MOST).evaluate(Interrupted("x"), 1, 9).action.value == "retry"


def test_airflow_shows_the_counts_by_clear(book: Ledger) -> None:
    record(book, "interrupted", "lost", run="toy.train--r--cleared-1")
    told = context(cleared=1)
    decide(Interrupted("x"), told)
    assert told["task_state_store"] == {
        "clear-1.interruptions": "1 of 2", "clear-1.losses": "1 of 1", "clear-1.code": "0 of 1",
    }  # fmt: skip


def test_the_verdict_tab_tells_what_was_used_while_it_goes_on_and_what_it_came_to(book: Ledger) -> None:
    from orrery.orchestration.web.verdict import Run, Task, read

    record(book, "interrupted", "lost", "interrupted")
    going = Run("toy", "toy.train", "r", RUN, "running", tasks=(Task("train", "running", 4),))
    (step,) = read(book, going)["steps"]
    assert step["tried"] == "interrupted 2 of 20 times, lost 1 of 5 times"
    ended = Run("toy", "toy.train", "r", RUN, "failed", tasks=(Task("train", "failed", 3),))
    (step,) = read(book, ended)["steps"]
    assert step["tried"] == "3 attempts: interrupted 2 times, lost 1 time"


def test_a_killed_worker_asks_no_policy_so_the_next_attempt_looks_at_the_budget_itself(
    book: Ledger, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build(tmp_path / "home")
    for name, value in {**environment(house), "ORRERY_LEDGER": book.url}.items():
        monkeypatch.setenv(name, value)
    step = StepOperator(task_id="validate", project="delays", verb="validate")
    request = house.request("validate", "2013-01", run="delays.ingest--r", attempt=9)
    told = {
        "ti": SimpleNamespace(start_date=None),
        "dag_run": SimpleNamespace(clear_number=0),
        "task_state_store": Store(),
    }

    def lose(number: int) -> None:
        folder = f"delays/runs/delays.ingest--r/validate-2013-01/{number}"
        attempt = Attempt(number=number, cause="lost", started="2026-01-01T00:00:00+00:00").model_dump(mode="json")
        book.record("delays", "run", folder, "done", "t", {"folder": folder, "attempt": attempt})

    for number in range(1, 6):
        lose(number)
    assert step._next_attempt(told, house.planner(), request).key == "2013-01"  # type: ignore[arg-type]
    assert told["task_state_store"]["clear-0.losses"] == "5 of 5"
    lose(6)
    with pytest.raises(BudgetSpent, match="validate 2013-01: lost 6 times, 5 are tried again"):
        step._next_attempt(told, house.planner(), request)  # type: ignore[arg-type]
