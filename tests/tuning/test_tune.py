"""The decision: the best trial's parameters only where it is surely better than the defaults, and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuning_house import LINE_MODEL, Search, search

from orrery.contract import Result
from orrery.tuning import figures, tune
from orrery.tuning.outcome import Outcome
from orrery.tuning.space import space


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Search:
    done = search(tmp_path_factory.mktemp("tune"), LINE_MODEL, rows=900)
    for number in range(8):
        done.try_(number)
    return done


@pytest.fixture(scope="module")
def decided(made: Search) -> Result:
    return made.decide(range(8), "all")


def file(made: Search, result: Result, name: str) -> Any:
    manifest = made.store.manifest(str(result.output))
    assert manifest is not None
    return json.loads(made.store.read(manifest.uri(name)))


def test_the_best_trial_s_parameters_are_published_with_the_reason(made: Search, decided: Result) -> None:
    best = max((made.outcome(n) for n in range(8)), key=lambda o: o.value or 0)
    assert decided.verdict == "tuned" and decided.facts["trial"] == best.number
    assert file(made, decided, "params.json") == best.params
    assert [t["number"] for t in file(made, decided, "trials.json")] == list(range(8))
    assert f"trial {best.number} " in decided.reasons[0] and "95 % interval" in decided.reasons[0]
    assert decided.metrics["auc"] == best.value
    key = f"{made.refs[0].key}..{made.refs[-1].key}"
    newest = made.store.latest_manifest(made.project, "tuned", key)
    assert newest is not None and newest.digest == decided.digest


def test_the_same_trials_are_decided_alike(made: Search, decided: Result) -> None:
    again = made.decide(range(8), "again")
    assert again.digest == decided.digest and again.reasons == decided.reasons


def test_a_trial_that_is_not_surely_better_leaves_the_defaults(tmp_path: Path) -> None:
    """Only `width` is free, which changes nothing: whatever is best is so by a hair."""
    model = LINE_MODEL.replace("0.002 * self.params.weight", "0.002 + 1e-5 * self.params.width * (n > 0)")
    made = search(tmp_path, model, rows=600)
    spec = tmp_path / "project" / "spec.yaml"
    spec.write_text(spec.read_text() + "train: {params: {kind: good, weight: 0.5}}\n")
    made.pack()
    for number in range(5):
        made.try_(number)
    result = made.decide(range(5))
    assert result.verdict == "defaults"
    assert file(made, result, "params.json") == {}
    assert any("not surely better" in r or "no trial of 5 was better" in r for r in result.reasons)


def test_a_failed_and_a_pruned_trial_are_no_candidates() -> None:
    def trial(number: int, state: Any, value: float | None) -> Outcome:
        return Outcome(number=number, state=state, params={}, metric="rmse", value=value)

    trials = [trial(0, "complete", 2.0), trial(1, "failed", None), trial(2, "pruned", None), trial(3, "complete", 2.0)]
    assert tune.best_of(trials, higher_is_better=False).number == 0  # of equals the first
    assert tune.best_of([*trials, trial(4, "complete", 1.9)], higher_is_better=False).number == 4
    assert tune.best_of([*trials, trial(4, "complete", 1.9)], higher_is_better=True).number == 0


def test_the_parameter_that_matters_weighs_most(made: Search) -> None:
    from orrery.training import user_model

    params = user_model.load(made.root / "project", made.project).params
    weights = tune.importances(space(params, {}), [made.outcome(n) for n in range(8)])
    assert set(weights) == {"weight", "kind", "width"} and sum(weights.values()) == pytest.approx(1)
    assert tune.importances(space(params, {}), [made.outcome(0)]) == {}


def test_the_page_shows_every_trial_runs_nothing_and_escapes(made: Search, decided: Result) -> None:
    text = made.store.read(decided.links["Tuning"]).decode()
    assert text.count("<tr") == 9 and "<polyline" in text and "<rect" in text and "<script" not in text
    trials = [
        Outcome(number=0, state="complete", params={"<b>": "<i>"}, metric="auc", value=0.5),
        Outcome(number=1, state="failed", params={"<b>": 1.0}, metric="auc", why='"><script>'),
    ]
    odd = figures.page("<x>", ["<script>alert(1)</script>"], trials, trials[0], {}).decode()
    assert "<script" not in odd and "<b>" not in odd and "<i>" not in odd and "<x>" not in odd
    assert "nan" not in odd.lower().replace("rowspan", "")


def test_a_training_takes_the_tuned_parameters_below_the_spec_s(made: Search, decided: Result) -> None:
    manifest = made.store.manifest(str(decided.output))
    assert manifest is not None
    found = file(made, decided, "params.json")
    inputs = {"features": tuple(made.refs), "tuned": (manifest.ref,)}
    plain = made._execute(made.config("tuned", inputs=inputs))
    assert file(made, plain, "params.json") == {**found, "fixed": 3}
    over = made._execute(made.config("over", inputs=inputs, overrides={"width": 1, "fixed": 7}))
    assert file(made, over, "params.json") == {**found, "width": 1, "fixed": 7}


def test_a_tuned_parameter_that_model_py_has_lost_is_left_out(made: Search, decided: Result) -> None:
    manifest = made.store.manifest(str(decided.output))
    assert manifest is not None
    model = made.root / "project" / "model.py"
    before = model.read_text()
    model.write_text(before.replace("    width: int", "    breadth: int"))
    made.pack()
    try:
        done = made._execute(made.config("lost", inputs={"features": tuple(made.refs), "tuned": (manifest.ref,)}))
    finally:
        model.write_text(before)
        made.pack()
    assert set(file(made, done, "params.json")) == {"weight", "kind", "breadth", "fixed"}
    assert np.isfinite(done.metrics["tune_loss"])
