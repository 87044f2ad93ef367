"""How often a step is tried again, by cause: a pure count over the attempts on record."""

from __future__ import annotations

from typing import Any

import pytest

from orrery import budgets
from orrery.attempts import Attempt
from orrery.budgets import Budgets
from orrery.goodput import Progress
from orrery.spec import ModelSpec


def made(cause: str | None, **more: Any) -> Attempt:
    return Attempt.model_validate({"cause": cause, "started": "2026-01-01T00:00:00+00:00", **more})


def history(*causes: str | None) -> list[Attempt]:
    return [made(cause) for cause in causes]


def spec(spot: dict[str, Any]) -> ModelSpec:
    source = {"uri": "x/{partition}", "partition": "month"}
    return ModelSpec.model_validate(
        {"version": 1, "kind": "model", "owner": "ops", "task": "binary", "label": {"column": "y"},
         "sources": {"rows": source}, "train": {"spot": spot}}
    )  # fmt: skip


def test_each_cause_has_its_own_limit_and_airflow_is_told_the_sum() -> None:
    most = Budgets(code=1, interruptions=3, losses=2)
    assert most.retries == 6
    assert most.over(history("interrupted", "bug", "interrupted", "lost", "interrupted", "lost")) is None
    assert most.over(history(*["interrupted"] * 4)) == "interrupted 4 times, 3 are tried again"
    assert most.over(history("interrupted", "bug", "try_again")) == "failed 2 times, 1 are tried again"
    assert most.over(history(*["lost"] * 3)) == "lost 3 times, 2 are tried again"
    assert most.over(history(None, None, None)) is None


def test_the_spec_says_how_many_interruptions_a_training_bears() -> None:
    assert budgets.of("train", spec({"max_interruptions": 7})).interruptions == 7
    assert budgets.of("train", spec({"max_interruptions": 7, "fallback": "cpu-large"})).interruptions == 7 + 5
    assert budgets.of("score", spec({"max_interruptions": 7})) == Budgets()


def test_waits_double_by_the_count_of_their_own_kind() -> None:
    assert budgets.delay("interruptions", history("interrupted"), "x") == 30
    assert budgets.delay("losses", history("lost"), "x") == 30
    # Interruptions before do not make the wait after a bug longer.
    assert 20 <= budgets.delay("code", history(*["interrupted"] * 9, "bug"), "x") <= 40
    waits = [budgets.delay("code", history(*["bug"] * n), "x") for n in (1, 2, 3, 4, 5)]
    assert all(20 * 2**i <= wait <= 40 * 2**i for i, wait in enumerate(waits))
    assert budgets.delay("code", history(*["bug"] * 60), "x") == 600
    assert len({budgets.delay("code", history("bug"), f"run-{i}") for i in range(50)}) > 10


def test_an_attempt_says_what_was_used_and_where_it_goes_on() -> None:
    def came(step: int, committed: int, resumed: int = 0) -> Progress:
        return Progress(began=0, now=1, step=step, committed=committed, resumed=resumed, total=50_000, step_s=0.5)

    attempts = [
        made("interrupted", committed=5_000, progress=came(5_000, 5_000)),
        made("lost", resumed=5_000, committed=12_345, progress=came(12_400, 12_345, 5_000)),
        made("lost", resumed=12_345, progress=came(12_350, 0, 12_345)),  # killed before its first checkpoint
    ]
    said = budgets.sentence(4, Budgets(), attempts)
    assert said == (
        "attempt 4: interrupted 1 of 20 times, lost 2 of 5 times, "
        "goes on from step 12,345 of 50,000 (30 s of work lost so far)"
    )
    assert budgets.sentence(1, Budgets(), []) == ""
    assert "begins again with step 1" in budgets.sentence(2, Budgets(), [made("lost", progress=came(9, 0))])


@pytest.mark.parametrize(("cause", "budget"), [("user", "code"), ("bug", "code"), ("try_again", "code"), (None, None)])
def test_every_cause_is_of_some_budget(cause: str | None, budget: str | None) -> None:
    assert made(cause).spent == budget
