"""A study that several processes share: each trial asks once, what was killed is found again, what was lost is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from pydantic import BaseModel

from orrery.errors import TryAgain, UserError
from orrery.training import tunable
from orrery.tuning.outcome import Outcome
from orrery.tuning.space import Space, space
from orrery.tuning.study import Study, Where

KEY = "0" * 32


class Params(BaseModel):
    """Two numbers and a choice."""

    dim: int = tunable(8, low=1, high=64, log=True)
    rate: float = tunable(0.1, low=0.001, high=1.0, log=True)
    kind: str = tunable("a", choices=["a", "b"])


SPACE: Space = space(Params, {})


@pytest.fixture(params=["journal", "database"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Where:
    storage = str(tmp_path) if request.param == "journal" else f"sqlite:///{tmp_path}/optuna.db"
    return Where(storage, "p", KEY, maximize=True)


def complete(number: int, params: dict, value: float, *losses: float) -> Outcome:
    return Outcome(number=number, state="complete", params=params, metric="auc", value=value, epochs=losses)


def test_a_trial_asks_once_whoever_opens_the_study(where: Where) -> None:
    first = Study(where, SPACE).ask(3, None, seed=0)
    again = Study(where, SPACE).ask(3, None, seed=99)
    assert not first.again and again.again
    assert (again.id, again.params) == (first.id, first.params)
    assert Study(where, SPACE).ask(0, SPACE.defaults, 0).params == SPACE.defaults
    assert set(Study(where, SPACE).trials()) == {0, 3}


def test_trials_that_are_drawn_at_random_differ_and_the_seed_decides_them(tmp_path: Path) -> None:
    def drawn(folder: str, seed: int) -> list[dict]:
        study = Study(Where(str(tmp_path / folder), "p", KEY, maximize=True), SPACE)
        return [study.ask(number, None, seed).params for number in range(4)]

    first = drawn("a", 0)
    assert len({p["rate"] for p in first}) == 4
    assert drawn("b", 0) == first
    assert drawn("c", 1) != first


def test_the_sampler_learns_from_what_is_told(where: Where) -> None:
    study = Study(where, SPACE)
    for number in range(30):
        asked = study.ask(number, None, seed=0)
        study.tell(complete(number, asked.params, 1 - abs(asked.params["rate"] - 0.01)))
    late = [trial.params["rate"] for number, trial in study.trials().items() if number >= 20]
    assert sum(rate < 0.1 for rate in late) >= 8  # two thirds of them by chance would be 6.7


@pytest.mark.parametrize("maximize", [True, False])
def test_a_trial_above_the_median_of_the_others_is_stopped(tmp_path: Path, maximize: bool) -> None:
    study = Study(Where(str(tmp_path), "p", KEY, maximize), SPACE)
    for number in range(5):
        params = study.ask(number, None, 0).params
        study.tell(complete(number, params, 0.7, 0.6, 0.5, 0.4))
    bad, good = study.ask(5, None, 0).id, study.ask(6, None, 0).id
    assert [study.report(bad, epoch, 0.9) for epoch in range(2)] == [False, True]
    assert not any(study.report(good, epoch, 0.3) for epoch in range(3))


def test_a_trial_that_begins_again_is_judged_only_where_it_had_come_to(tmp_path: Path) -> None:
    where = Where(str(tmp_path), "p", KEY, maximize=True)
    study = Study(where, SPACE)
    bad = study.ask(5, None, 0).id
    assert not any(study.report(bad, epoch, 0.9) for epoch in range(3))  # nobody to compare with
    for number in range(5):
        study.tell(complete(number, study.ask(number, None, 0).params, 0.7, 0.6, 0.5, 0.4))
    again = Study(where, SPACE)
    assert [again.report(bad, epoch, 0.9) for epoch in range(3)] == [False, False, True]


def test_without_pruning_nothing_is_stopped(tmp_path: Path) -> None:
    study = Study(Where(str(tmp_path), "p", KEY, maximize=True, prune=False), SPACE)
    for number in range(5):
        study.tell(complete(number, study.ask(number, None, 0).params, 0.7, 0.6, 0.5))
    bad = study.ask(5, None, 0).id
    assert not any(study.report(bad, epoch, 9.0) for epoch in range(2))


def test_what_is_told_twice_counts_once_and_a_lost_study_is_filled_again(where: Where, tmp_path: Path) -> None:
    study = Study(where, SPACE)
    params = study.ask(2, None, 0).params
    assert study.tell(complete(2, params, 0.7, 0.5)) is True
    assert study.tell(complete(2, params, 0.7, 0.5)) is False
    other = Study(Where(str(tmp_path / "elsewhere"), "p", KEY, maximize=True), SPACE)
    pruned = Outcome(number=4, state="pruned", params=params, metric="auc", epochs=(0.9, 0.8), why="x")
    failed = Outcome(number=5, state="failed", params=params, metric="auc", why="x")
    assert [other.tell(o) for o in (complete(2, params, 0.7, 0.5), pruned, failed)] == [True] * 3
    found = other.trials()
    assert found[2].value == 0.7 and found[2].params == study.trials()[2].params
    assert found[4].state.name == "PRUNED" and found[4].intermediate_values == {0: -0.9, 1: -0.8}
    assert found[5].state.name == "FAIL"


HOLD = """
import sys, time
from orrery.tuning.study import KernelLock
lock = KernelLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_process_killed_with_the_lock_holds_nobody_up(tmp_path: Path) -> None:
    where = Where(str(tmp_path), "p", KEY, maximize=True)
    Study(where, SPACE)
    lock = tmp_path / "p" / f"{KEY}.journal.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    began = time.monotonic()
    Study(where, SPACE).ask(0, None, 0)
    assert time.monotonic() - began < 25  # with Optuna's own lock: 30 s


def test_a_line_that_was_half_written_is_cut_off(tmp_path: Path) -> None:
    where = Where(str(tmp_path), "p", KEY, maximize=True)
    params = Study(where, SPACE).ask(0, None, 0).params
    with (tmp_path / "p" / f"{KEY}.journal").open("ab") as f:
        f.write(b'{"op_code": 4, "trial')
    assert Study(where, SPACE).ask(0, None, 0).params == params
    Study(where, SPACE).ask(1, None, 0)
    assert set(Study(where, SPACE).trials()) == {0, 1}


def test_a_database_that_is_away_is_tried_again_and_a_wrong_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNING_PASSWORD", "hunter2")
    away = Where("postgresql://orrery:$TUNING_PASSWORD@127.0.0.1:9/optuna", "p", KEY, maximize=True)
    with pytest.raises(TryAgain, match="cannot be reached") as e:
        Study(away, SPACE)
    assert "hunter2" not in str(e.value)
    with pytest.raises(UserError, match="cannot be used"):
        Study(Where("sqlite:////proc/none/optuna.db", "p", KEY, maximize=True), SPACE)


def test_optuna_itself_can_open_the_study(tmp_path: Path) -> None:
    """Its dashboard reads the journal, for instance."""
    Study(Where(str(tmp_path), "p", KEY, maximize=True), SPACE).ask(0, SPACE.defaults, 0)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "p" / f"{KEY}.journal"))
    study = optuna.load_study(study_name=f"p/{KEY}", storage=optuna.storages.JournalStorage(backend))
    assert study.trials[0].params == {"dim": 8, "rate": 0.1, "kind": '"a"'}
