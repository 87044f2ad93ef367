"""What `monitor` is given: its scores' model with that model's own promise, labels of now, and what came before."""

import os

import pytest
from core_house import House

from orrery import attempts, runner
from orrery.contract import Result
from orrery.errors import RequestError
from orrery.ledger import Ledger
from orrery.store import Manifest


@pytest.fixture
def book(house: House) -> Ledger:
    return Ledger(os.environ["ORRERY_LEDGER"])


def landed(house: House, key: str, text: str = "") -> Manifest:
    raw = house.commit("ingest", "raw", key, text=text)
    clean = house.commit("validate", "clean", key, inputs={"raw": (raw.ref,)}, text=text)
    return house.commit("materialize", "features", key, inputs={"clean": (clean.ref,)}, text=text)


def promoted(house: House, book: Ledger, version: str, window: str) -> tuple[Manifest, Manifest]:
    """Promote a window's candidate; return it and the evaluation it was promoted on."""
    model = house.verdict(window, version=version)
    evaluation = next(m for m in house.manifests("evaluate") if m.key == window)
    payload = {"version": version, "model": model.path, "evidence": {"evaluation": evaluation.path}}
    book.record("delays", "promotion", f"run-{version}", "done", "me", payload)
    return model, evaluation


def scored(house: House, key: str, model: Manifest) -> Manifest:
    return house.commit("score", "scores", key, inputs={"model": (model.ref,)})


def test_the_promise_is_that_of_the_model_that_scored(house: House, book: Ledger) -> None:
    """A champion that came since has a promise of its own."""
    old, promise = promoted(house, book, "1", "2012-10..2012-12")
    features, scores = landed(house, "2013-01"), scored(house, "2013-01", old)
    promoted(house, book, "2", "2012-11..2013-01")
    features = landed(house, "2013-01", "labels came")
    inputs = house.planner().plan(house.request("monitor", "2013-01")).config.inputs
    assert inputs["model"] == (old.ref,) and inputs["evaluation"] == (promise.ref,)
    assert inputs["scores"] == (scores.ref,) and inputs["features"] == (features.ref,)
    assert [r.key for r in inputs["clean"]] == ["2013-01"] and inputs["history"] == ()


def test_a_model_that_was_rolled_back_to_keeps_its_promise(house: House, book: Ledger) -> None:
    old, promise = promoted(house, book, "1", "2012-10..2012-12")
    promoted(house, book, "2", "2012-11..2013-01")
    book.record("delays", "rollback", "run-9", "done", "me", {"version": "1", "model": old.path, "evidence": {}})
    landed(house, "2013-02")
    scored(house, "2013-02", old)
    assert house.planner().plan(house.request("monitor", "2013-02")).config.inputs["evaluation"] == (promise.ref,)


def test_six_partitions_before_it_as_far_as_they_are_there(house: House, book: Ledger) -> None:
    model, _ = promoted(house, book, "1", "2012-01..2012-03")
    for month in (5, 6, 7, 9, 10, 11, 12):
        house.commit("monitor", "health", f"2012-{month:02d}", number=month)
    landed(house, "2013-01")
    scored(house, "2013-01", model)
    inputs = house.planner().plan(house.request("monitor", "2013-01")).config.inputs
    assert [r.key for r in inputs["history"]] == ["2012-07", "2012-09", "2012-10", "2012-11", "2012-12"]


def test_what_is_missing_is_told_with_what_to_do(house: House, book: Ledger) -> None:
    model, evaluation = promoted(house, book, "1", "2012-10..2012-12")
    landed(house, "2013-01")
    ask = house.request("monitor", "2013-01")
    with pytest.raises(RequestError, match=r"no scores for 2013-01(.|\n)*run score"):
        house.planner().plan(ask)
    scored(house, "2013-01", model)
    house.planner().plan(ask)
    house.commit("ingest", "raw", "2013-01", text="landed again")
    with pytest.raises(RequestError, match="clean of 2013-01 was made from raw data that landed again"):
        house.planner().plan(ask)
    landed(house, "2013-01", "and brought up")
    house.planner().plan(ask)
    house.store.remove(evaluation.path)
    with pytest.raises(RequestError, match=r"promoted on an evaluation that cannot be found: .* is gone"):
        house.planner().plan(ask)


def test_a_model_that_nobody_promoted_has_no_promise(house: House) -> None:
    landed(house, "2013-01")
    scored(house, "2013-01", house.commit("train", "candidate", "2012-10..2012-12"))
    with pytest.raises(RequestError, match="the ledger knows of none"):
        house.planner().plan(house.request("monitor", "2013-01"))


def test_a_verdict_is_a_decision_of_the_ledger_and_another_one_of_the_same_run_too(house: House, book: Ledger) -> None:
    model, _ = promoted(house, book, "1", "2012-10..2012-12")
    landed(house, "2013-01")
    scored(house, "2013-01", model)
    planner, ask = house.planner(), house.request("monitor", "2013-01", run="r", actor="eve")
    plan = planner.plan(ask)
    facts = {"model_version": "1", "primary": "auc", "units": "30 days", "policy": {}}
    first = Result(verdict="watch", digest="d1", reasons=["auc 0.71"], metrics={"loss": 0.03}, facts=facts)
    for result in (first, first, first.model_copy(update={"verdict": "none", "digest": "d2"})):
        runner._record(planner, ask, plan, result, attempts.begun(1, "cpu-light", None))
    found = book.find("delays", "decision")
    assert [(e.key, e.payload["verdict"]) for e in found] == [("r/2013-01", "watch"), ("r/2013-01/d2", "none")]
    payload = found[0].payload
    assert (payload["verb"], payload["key"], payload["reasons"]) == ("monitor", "2013-01", ["auc 0.71"])
    assert payload["metrics"] == {"loss": 0.03}
    assert payload["facts"] == {"model_version": "1", "primary": "auc", "units": "30 days"}
