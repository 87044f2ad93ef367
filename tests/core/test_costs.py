"""What trainings cost, from the ledger: which attempts belong together, money, saved by spot, the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from core_house import SPEC, House, go
from cost_house import T0, attempt, record

from orrery import costs, effort, platform
from orrery.errors import UserError
from orrery.ledger import Ledger
from orrery.platform import Compute, Platform
from orrery.spec import ModelSpec, load_model

RATES = {"gpu": 14.4, "big": 7.2}  # 0.4 and 0.2 per hundred seconds


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


def found(book: Ledger) -> list[costs.Training]:
    return costs.trainings(costs.read(book.find("p", "run")))


def one(book: Ledger) -> costs.Account:
    [training] = found(book)
    return training.account(RATES)


def interrupted_twice(book: Ledger) -> None:
    record(book, attempt(steps=(0, 100, 90)), 1)
    record(book, attempt(T0 + 500, cause="lost", steps=(90, 200, 200)), 2)
    record(book, attempt(T0 + 900, cause=None, steps=(200, 300, 300)), 3)


def test_an_interrupted_training_adds_up_to_its_attempts(book: Ledger) -> None:
    interrupted_twice(book)
    account = one(book)
    assert (account.attempts, account.interrupted, account.kept, account.done) == (3, 2, 300, 310)
    assert account.causes == {"interrupted": 1, "lost": 1}
    assert account.parts == effort.Parts(300, 90, 15, 6, 10, 0, 30)
    assert account.parts.wall == 421
    assert account.goodput == pytest.approx(300 / 421)
    assert account.cost == pytest.approx(421 * 3.6 / 3600)


def test_saved_by_spot_pays_for_lost_work_and_restarts(book: Ledger) -> None:
    interrupted_twice(book)
    # On demand: one start-up, the useful steps, evaluating as far as its steps were kept.
    account, hours = one(book), (30 + 300 + 5 * 0.9 + 5 + 5) / 3600
    assert account.on_demand == pytest.approx(hours * 14.4)
    assert account.saved == pytest.approx(hours * 14.4 - 421 * 3.6 / 3600)
    [training] = found(book)
    dear = training.account({"gpu": 3.6})
    assert dear.saved is not None and dear.saved < 0  # no cheaper than on demand: what was lost is a loss
    assert training.account({}).saved is None


def test_attempts_on_the_fallback_class_are_at_their_own_price(book: Ledger) -> None:
    record(book, attempt(steps=(0, 100, 100)), 1)
    record(book, attempt(T0 + 500, cause=None, steps=(100, 200, 200), compute="big", spot=False, price_per_hour=7.2), 2)
    account = one(book)
    assert account.classes == ("gpu", "big")
    assert account.cost == pytest.approx(137 * 3.6 / 3600 + 137 * 7.2 / 3600)
    assert account.on_demand == pytest.approx((105 * 14.4 + 105 * 7.2 + 30 * 14.4) / 3600)


def test_without_spot_nothing_is_saved_by_it(book: Ledger) -> None:
    record(book, attempt(cause=None, steps=(0, 100, 100), spot=False), 1)
    assert one(book).saved is None


def test_a_class_without_a_price_is_never_free(book: Ledger) -> None:
    record(book, attempt(steps=(0, 100, 100), price_per_hour=0.0), 1)
    assert (one(book).cost, one(book).unpriced, one(book).saved) == (None, 1, None)
    record(book, attempt(T0 + 500, cause=None, steps=(100, 200, 200)), 2)
    assert one(book).cost == pytest.approx(137 * 3.6 / 3600)
    assert (one(book).unpriced, one(book).saved) == (1, None)


def test_runs_that_share_a_fingerprint_share_a_training(book: Ledger) -> None:
    record(book, attempt(steps=(0, 100, 90), address="a1"), 1, run="r1")
    record(book, attempt(T0 + 300, cause="bug", steps=None), 2, run="r2")  # its address: what its run came to
    record(book, attempt(T0 + 500, cause=None, steps=(90, 200, 200)), 3, run="r2")
    [training] = found(book)
    assert training.kept == (90, 0, 110) and training.finished and training.address == "a1"
    assert {s.run for s in training.spent} == {"r1", "r2"}


def test_after_a_training_is_done_another_one_begins(book: Ledger) -> None:
    record(book, attempt(cause=None, steps=(0, 100, 100)), 1)
    record(book, attempt(T0 + 500, cause=None, steps=(0, 100, 100)), 1, run="again")
    record(book, attempt(T0 + 900, steps=(0, 50, 50), address="a1"), 1, run="third")
    first, second, third = found(book)
    assert (first.kept, second.kept, third.kept) == ((100,), (100,), (50,))
    assert not third.finished
    assert costs.of_model(found(book), "p/train/a1/manifest.json") == first
    assert costs.of_model(found(book), "p/train/a2/manifest.json") is None
    assert costs.of_model(found(book), "") is None


def test_other_trainings_and_what_is_none_stay_apart(book: Ledger) -> None:
    interrupted_twice(book)
    record(book, attempt(cause=None, steps=None), 1, verb="evaluate")
    record(book, attempt(T0 + 5, cause=None, steps=(0, 10, 10)), 1, run="r7", address="a7")
    record(book, attempt(T0 + 9, cause=None, steps=None, wall_s=0.0), 1, run="r8", skipped="unchanged")
    assert book.record("p", "run", "p/runs/old/train-x/1", "done", "t", {"verb": "train", "attempt": "p/runs/old/…"})
    assert sorted(t.address for t in found(book)) == ["a1", "a7"]
    assert [s.verb for s in costs.of_run(book, "p", "r1")] == ["train", "evaluate", "train", "train"]
    assert len(costs.of_run(book, "p", "r1", "train")) == 3


def test_a_fit_of_a_library_costs_money_and_has_no_goodput(book: Ledger) -> None:
    record(book, attempt(cause=None, steps=None, spot=False), 1)
    assert (one(book).goodput, one(book).parts.useful) == (None, 30)
    assert one(book).cost == pytest.approx(30 * 3.6 / 3600)


def test_managed_spot_is_paid_by_what_is_billed(book: Ledger) -> None:
    record(book, attempt(cause=None, steps=(0, 100, 100), sagemaker={"billable_s": 50}), 1)
    [training] = found(book)
    account = training.account({"gpu": 3.6})  # spot's discount is in the seconds, not in the price
    assert account.cost == pytest.approx(50 * 3.6 / 3600)
    assert account.saved == pytest.approx((30 + 100 + 5 - 50) * 3.6 / 3600)


def test_what_is_told_is_json(book: Ledger) -> None:
    interrupted_twice(book)
    told = one(book).told()
    assert told["seconds"]["wall"] == 421 and told["steps"] == {"kept": 300, "done": 310}
    assert sum(v for k, v in told["seconds"].items() if k not in ("wall", "queued")) == told["seconds"]["wall"]


def test_the_runner_puts_the_address_of_every_attempt_on_record(house: House) -> None:
    with pytest.raises(UserError):
        go(house, mode="user")
    go(house, attempt=2, mode="done")
    failed, done = costs.read(Ledger(f"sqlite:///{house.home}/ledger.db").find(house.project, "run"))
    assert (failed.attempt.cause, done.attempt.cause) == ("user", None)
    assert failed.address == done.address and len(done.address) == 32


# -- what an hour costs on demand -----------------------------------------------------------------------


def test_the_price_on_demand_is_the_class_own_or_the_fallback_s(house: House) -> None:
    classes: dict[str, Any] = {
        "spot": {"spot": True, "price_per_hour": 1.0},
        "twin": {"spot": True, "price_per_hour": 1.0, "on_demand_price_per_hour": 3.0},
        "firm": {"price_per_hour": 2.0},
        "free": {},
    }
    managed = {"role": "arn:aws:iam::123456789012:role/r", "instance_type": "ml.g5.xlarge"}
    cloud = Compute.model_validate({"spot": True, "price_per_hour": 1.4, "sagemaker": managed})
    there = Platform.model_validate({"version": 1, "environments": {}, "compute": classes})
    assert costs.rates(there, None) == {"twin": 3.0, "firm": 2.0}
    assert costs.rates(there, "firm") == {"spot": 2.0, "twin": 3.0, "firm": 2.0}
    assert costs.rates(there, "free") == costs.rates(there, "gone") == {"twin": 3.0, "firm": 2.0}
    there.compute["cloud"] = cloud  # its price is on demand already
    assert costs.rates(there, "firm")["cloud"] == 1.4
    assert costs.rates(platform.load(), None) == {}


# -- the budget -----------------------------------------------------------------------------------------


def with_budget(house: House, budget: float | None) -> ModelSpec:
    (house.folder / "spec.yaml").write_text(SPEC + (f"train: {{budget: {budget}}}\n" if budget else ""))
    return load_model(house.folder)


def test_a_spent_budget_refuses_the_next_attempt_and_says_what_to_do(house: House, book: Ledger) -> None:
    interrupted_twice(book)  # 0.421
    record(book, attempt(cause=None, steps=None, wall_s=9000.0), 1, verb="evaluate")  # not of the training
    for enough in (None, 0.43):
        costs.refuse_over_budget(book, "p", "r1", with_budget(house, enough), 3.6)
    costs.refuse_over_budget(book, "p", "r2", with_budget(house, 0.4), 3.6)  # another run
    with pytest.raises(UserError) as e:
        costs.refuse_over_budget(book, "p", "r1", with_budget(house, 0.4), 3.6)
    assert "3 attempts (2 interrupted) have cost 0.421 of train.budget 0.4" in e.value.message
    assert "clear the task" in e.value.hint and "from step 300" in e.value.hint
    assert e.value.exit_code == 64


def test_a_budget_needs_a_price(house: House, book: Ledger) -> None:
    spec = with_budget(house, 5)
    costs.refuse_over_budget(book, "p", "r1", spec)
    with pytest.raises(UserError, match="has no price"):
        costs.refuse_over_budget(book, "p", "r1", spec, 0.0)
    record(book, attempt(price_per_hour=0.0), 1)
    with pytest.raises(UserError, match="compute class 'gpu' has no price"):
        costs.refuse_over_budget(book, "p", "r1", spec, 3.6)
