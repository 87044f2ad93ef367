"""A trial as a step: asked once, committed once, killed and gone on with; what others committed is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tuning_house import LINE_MODEL, TORCH_MODEL, Search, line_until, search

from orrery.contract import Result
from orrery.errors import SpecError
from orrery.evaluation import metrics
from orrery.store import Ref
from orrery.training import user_model
from orrery.tuning.outcome import Outcome
from orrery.tuning.space import space
from orrery.tuning.study import Study, Where


def study(made: Search) -> Study:
    params = user_model.load(made.root / "project", made.project).params
    return Study(Where(made.storage, made.project, made.key, maximize=True), space(params, {}))


def test_a_trial_leaves_its_parameters_its_value_and_its_predictions(tmp_path: Path) -> None:
    made = search(tmp_path, LINE_MODEL, rows=600)
    result = made.try_(0)
    label, moment = made.truth()
    outcome = made.outcome(0)
    assert outcome.params == {"weight": 0.0, "kind": "good", "width": 2} and outcome.state == "complete"
    assert outcome.value == pytest.approx(metrics.auc(label, made.array(0).astype(float)))
    assert result.metrics["auc"] == outcome.value and result.facts["primary"] == "auc"
    assert len(moment) == len(label) == len(made.array(0)) and (np.diff(moment) >= 0).all()
    made.try_(1)
    assert set(made.manifest(1).files) == {"trial.json", "predictions.npy"}


def test_the_second_trial_is_the_champion_s_unless_those_are_the_defaults(tmp_path: Path) -> None:
    made = search(tmp_path, LINE_MODEL, rows=600)
    champion = made.train("champ", overrides={"weight": 0.25, "width": 100, "fixed": 9})
    ref: Ref = made._ref(champion.result)
    inputs = {"features": tuple(made.refs), "champion": (ref,)}
    made.try_(1, inputs=inputs)
    # A width of 100 is outside of what is searched now: the default stands there.
    assert made.outcome(1).params == {"weight": 0.25, "kind": "good", "width": 2}
    same = search(tmp_path / "same", LINE_MODEL, rows=600)
    inputs = {"features": tuple(same.refs), "champion": (same._ref(same.train("champ").result),)}
    same.try_(1, inputs=inputs)
    assert same.outcome(1).params != {"weight": 0.0, "kind": "good", "width": 2}


def test_what_the_spec_fixes_is_trained_with_and_not_searched(tmp_path: Path) -> None:
    made = search(tmp_path, LINE_MODEL, rows=600)
    spec = tmp_path / "project" / "spec.yaml"
    spec.write_text(spec.read_text() + "train: {params: {kind: bad}}\n")
    made.pack()
    made.try_(0)
    assert made.outcome(0).params == {"weight": 0.0, "width": 2}
    label, _ = made.truth()
    assert np.corrcoef(made.array(0), label)[0, 1] <= 0.05  # turned round: the holiday counts against


def test_parameters_that_cannot_be_trained_with_are_a_failed_trial_but_not_the_defaults(tmp_path: Path) -> None:
    made = search(tmp_path, LINE_MODEL.replace("params.weight > 0.95", "params.weight > 0"), rows=600)
    result = made.try_(2)
    assert result.verdict == "failed" and "too heavy" in made.outcome(2).why
    assert set(made.manifest(2).files) == {"trial.json"}
    wrong = search(tmp_path / "wrong", LINE_MODEL.replace("params.weight > 0.95", "True"), rows=600)
    with pytest.raises(SpecError, match="too heavy"):
        wrong.try_(0)
    assert wrong.manifest(0) is None


def test_twenty_trials_killed_twice_are_twenty_results_with_what_each_had_asked_for(tmp_path: Path) -> None:
    made = search(tmp_path, LINE_MODEL, rows=600)
    hold = tmp_path / "hold"
    killed, wait = {4, 11}, []
    for number in range(20):
        if number in killed:
            hold.touch()
            victim = made.start(made.trial(number), HOLD_FIT=str(hold))
            try:
                line_until(victim, f"trial {number} begins")
                asked = study(made).trials()[number].params
                time.sleep(0.3)
            finally:
                os.killpg(victim.pid, signal.SIGKILL)
                victim.communicate()
            hold.unlink()
            assert made.manifest(number) is None
            began = time.monotonic()
            made.try_(number, attempt=2)
            wait.append(time.monotonic() - began)
            assert study(made).trials()[number].params == study(made).space.to_optuna(made.outcome(number).params)
            assert study(made).trials()[number].params == asked
        else:
            made.try_(number)
    found = [made.outcome(number) for number in range(20)]
    assert [o.number for o in found] == list(range(20))
    optuna_s = [t for t in study(made)._study.get_trials() if "orrery" in t.user_attrs]
    assert len(optuna_s) == 20 and all(t.state.is_finished() for t in optuna_s)
    assert max(wait) < 25, wait  # the lease of a dead attempt is taken over at once, and so is the study's lock


def test_an_attempt_after_the_commit_does_nothing_again(tmp_path: Path) -> None:
    made = search(tmp_path, LINE_MODEL, rows=600)
    first = made.try_(3)
    shutil.rmtree(tmp_path / f"scratch-{made.addresses[3]}")
    again = made.try_(3, attempt=2)
    assert again.skipped and again.digest == first.digest


def test_a_trial_that_was_committed_and_not_told_is_told_by_the_next_one(tmp_path: Path) -> None:
    made = search(tmp_path, LINE_MODEL, rows=600)
    for number in range(3):
        made.try_(number)
    # As if trial 1 had been killed between its commit and the study: the journal ends before that line.
    journal = tmp_path / "tuning" / made.project / f"{made.key}.journal"
    lines = journal.read_text().splitlines(keepends=True)
    states = [i for i, line in enumerate(lines) if json.loads(line)["op_code"] == 6]
    journal.write_text("".join(line for i, line in enumerate(lines) if i != states[1]))
    assert not study(made).trials()[1].state.is_finished()
    made.try_(3)
    assert study(made).trials()[1].value == made.outcome(1).value


def test_a_study_that_is_lost_is_made_again_from_what_is_committed(tmp_path: Path) -> None:
    made = search(tmp_path, LINE_MODEL, rows=600)
    for number in range(4):
        made.try_(number)
    shutil.rmtree(tmp_path / "tuning")
    made.try_(4)
    found = study(made).trials()
    assert set(found) == set(range(5))
    assert found[2].value == made.outcome(2).value


@pytest.mark.parametrize("processes", [1, 2])
def test_a_hopeless_torch_trial_is_stopped_between_two_epochs(tmp_path: Path, processes: int) -> None:
    made = search(tmp_path, TORCH_MODEL.replace("epochs: int = 4", "epochs: int = 30"), rows=600)
    spec = tmp_path / "project" / "spec.yaml"
    spec.write_text(spec.read_text() + f"train: {{processes: {processes}}}\n")
    made.pack()
    others = study(made)
    for number in range(10, 15):  # five that did far better
        params = others.ask(number, None, 0).params
        others.tell(
            Outcome(number=number, state="complete", params=params, metric="auc", value=0.9, epochs=(0.01,) * 9)
        )
    result: Result = made.try_(2)
    assert result.verdict == "pruned"
    outcome = made.outcome(2)
    assert len(outcome.epochs) == 2 and outcome.value is None
    assert set(made.manifest(2).files) == {"trial.json"}
    assert study(made).trials()[2].state.name == "PRUNED"


def test_the_defaults_are_never_stopped(tmp_path: Path) -> None:
    made = search(tmp_path, TORCH_MODEL.replace("epochs: int = 4", "epochs: int = 3"), rows=600)
    others = study(made)
    for number in range(10, 15):
        params = others.ask(number, None, 0).params
        others.tell(
            Outcome(number=number, state="complete", params=params, metric="auc", value=0.9, epochs=(0.01,) * 9)
        )
    made.try_(0)
    assert made.outcome(0).state == "complete" and len(made.outcome(0).epochs) == 3


def test_one_at_a_time_a_search_repeats_itself(tmp_path: Path) -> None:
    outcomes = []
    for folder in ("one", "two"):
        made = search(tmp_path / folder, LINE_MODEL, rows=600)
        for number in range(12):
            made.try_(number)
        outcomes.append([made.outcome(number) for number in range(12)])
    assert outcomes[0] == outcomes[1]
