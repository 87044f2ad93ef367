"""`decide` on its own: a pure function of numbers. Whole steps are in test_evaluate.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orrery.rag.gate import (
    MEASURED,
    QUALITY,
    Decision,
    Live,
    Numbers,
    Reconciled,
    Rules,
    _without_measurement,
    decide,
    read,
)
from orrery.rag.spec import FIGURES, Floor

GOOD = {
    "ndcg_at_10": 0.8,
    "recall_at_10": 0.9,
    "mrr": 0.75,
    "abstained": 0.9,
    "wrongly_abstained": 0.05,
    "p99_ms": 20.0,
}
WHOLE = Reconciled(expected=100, found=100, missing=0, extra=0, duplicate=0, orphan=0, sound=True)
NUMBER = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1) | st.none()


def live(**changes: Any) -> Live:
    metrics = {name: changes.pop(name, GOOD[name]) for name in QUALITY}
    intervals = dict.fromkeys(QUALITY, (-0.02, 0.02))
    return replace(Live(True, metrics, intervals), **changes)


def numbers(**changes: Any) -> Numbers:
    return replace(Numbers(WHOLE, questions=120, metrics=GOOD), **changes)


def failed(decision: Decision) -> list[str]:
    return [c.name for c in decision.checks if not c.passed]


def test_a_good_first_generation_is_promoted_and_every_reason_says_why() -> None:
    decision = decide(Rules(bounds={"ndcg_at_10": Floor(min=0.6), "p99_ms": Floor(max=50)}), numbers())
    assert (decision.verdict, decision.proven) == ("promote", True)
    assert decision.reasons == [
        "index and sources agree: 100 chunks",
        "100 chunks",
        "nDCG@10 0.8000; there is no other live generation to compare with",
        "recall@10 0.9000; there is no other live generation to compare with",
        "MRR 0.7500; there is no other live generation to compare with",
        "ndcg_at_10 0.8 ≥ 0.6",
        "p99_ms 20 ≤ 50",
    ]


def test_equal_is_good_enough_and_worse_by_no_more_than_agreed() -> None:
    assert decide(Rules(worse=0), numbers(live=live())).verdict == "promote"
    assert decide(Rules(worse=0.01), numbers(live=live(mrr=0.76))).verdict == "promote"
    assert decide(Rules(worse=0.01), numbers(live=live(mrr=0.7601))).verdict == "kept"


def test_a_worse_generation_is_kept_and_the_interval_is_told() -> None:
    decision = decide(Rules(), numbers(live=live(ndcg_at_10=0.85)))
    assert decision.verdict == "kept"
    assert not decision.proven
    assert decision.reasons[0] == (
        "nDCG@10 0.8000, -0.0500 to the live generation's (95 % interval -0.0200 … +0.0200): "
        "that is worse by more than 0.01"
    )


@pytest.mark.parametrize("what", ["missing", "extra", "duplicate", "orphan"])
def test_one_chunk_that_differs_keeps_the_generation(what: str) -> None:
    decision = decide(Rules(), numbers(reconciled=replace(WHOLE, **{what: 1, "sound": False})))
    assert failed(decision) == ["reconciled"]
    assert f"index and sources differ: 1 {what} of 100 chunks" in decision.reasons


def test_a_reconciliation_that_contradicts_itself_is_not_believed() -> None:
    assert failed(decide(Rules(), numbers(reconciled=replace(WHOLE, missing=1)))) == ["reconciled"]
    assert failed(decide(Rules(), numbers(reconciled=replace(WHOLE, found=99)))) == ["reconciled"]
    assert failed(decide(Rules(), numbers(reconciled=replace(WHOLE, sound=False)))) == ["reconciled"]


def test_an_empty_generation_is_kept() -> None:
    assert "not_empty" in failed(decide(Rules(), numbers(reconciled=replace(WHOLE, expected=0, found=0))))
    nothing = numbers(reconciled=replace(WHOLE, expected=0, found=0), questions=0, metrics={})
    assert decide(Rules(), nothing).verdict == "kept"


def test_without_questions_it_is_promoted_unproven() -> None:
    decision = decide(Rules(), numbers(questions=0, metrics={}))
    assert (decision.verdict, decision.proven) == ("promote", False)
    assert "unproven: no questions" in decision.reasons
    unproven = Live(proven=False)
    assert decide(Rules(), numbers(questions=0, metrics={}, live=unproven)).verdict == "promote"


def test_an_unproven_generation_never_replaces_a_proven_one() -> None:
    decision = decide(Rules(), numbers(questions=0, metrics={}, live=live()))
    assert failed(decision) == ["proven"]
    gone = live(unusable="it is damaged")
    assert decide(Rules(), numbers(questions=0, metrics={}, live=gone)).verdict == "kept"


def test_a_bound_that_nothing_was_measured_for_is_not_kept() -> None:
    decision = decide(Rules(bounds={"abstained": Floor(min=0.8)}), numbers(questions=0, metrics={}))
    assert failed(decision) == ["abstained:min"]
    assert decision.reasons[0] == "abstained was not measured: no questions"
    without = {k: v for k, v in GOOD.items() if k != "abstained"}
    assert failed(decide(Rules(bounds={"abstained": Floor(min=0.8)}), numbers(metrics=without))) == ["abstained:min"]


def test_a_live_generation_that_cannot_be_asked_holds_nothing_back() -> None:
    decision = decide(Rules(), numbers(live=Live(True, unusable="its archive is gone")))
    assert decision.verdict == "promote"
    assert any("holds nothing back: its archive is gone" in reason for reason in decision.reasons)


def test_bounds_hold_at_the_bound_itself() -> None:
    edge = {"wrongly_abstained": Floor(max=0.05), "abstained": Floor(min=0.9)}
    assert decide(Rules(bounds=edge), numbers()).verdict == "promote"
    nearly = {**GOOD, "wrongly_abstained": math.nextafter(0.05, 1)}
    decision = decide(Rules(bounds=edge), numbers(metrics=nearly))
    assert decision.reasons[0] == "wrongly_abstained 0.05000000000000001 is above 0.05"


def test_what_is_measured_stays_out_of_what_is_digested() -> None:
    bound = Rules(bounds={"p99_ms": Floor(max=50)})
    told = [
        [
            _without_measurement(c)
            for c in decide(bound, numbers(metrics={**GOOD, "p99_ms": ms})).checks
            if c.name[:-4] in MEASURED
        ]
        for ms in (20.0, 21.0)
    ]
    assert told[0] == told[1]
    assert told[0][0].reason == "p99_ms keeps its bound 50"


@given(st.sampled_from(QUALITY), st.sampled_from([math.nan, math.inf, -math.inf, None, -0.1, 1.1]), st.booleans())
def test_a_figure_that_is_no_share_never_promotes(figure: str, value: float | None, of_live: bool) -> None:
    given_ = numbers(live=live(**{figure: value})) if of_live else numbers(metrics={**GOOD, figure: value}, live=live())
    assert decide(Rules(worse=1), given_).verdict == "kept"


@given(
    metrics=st.dictionaries(st.sampled_from(FIGURES), NUMBER),
    others=st.none() | st.dictionaries(st.sampled_from(QUALITY), NUMBER),
    worse=st.floats(0, 1),
    floor=st.floats(0, 1),
    questions=st.integers(0, 3),
    wrong=st.tuples(*[st.integers(0, 1)] * 4),
    proven=st.booleans(),
)
def test_promotion_implies_all_that_it_promises(
    metrics: dict[str, float | None],
    others: dict[str, float | None] | None,
    worse: float,
    floor: float,
    questions: int,
    wrong: tuple[int, int, int, int],
    proven: bool,
) -> None:
    given_ = Numbers(
        Reconciled(10, 10, *wrong, sound=not any(wrong)),
        questions,
        metrics,
        None if others is None else Live(proven, others),
    )
    decision = decide(Rules(worse, {"recall_at_10": Floor(min=floor)}), given_)
    assert len(decision.reasons) == len(decision.checks)
    if decision.verdict == "kept":
        assert failed(decision)
        assert not decision.proven
        return
    assert not any(wrong)
    assert metrics["recall_at_10"] is not None
    assert metrics["recall_at_10"] >= floor
    assert decision.proven == (questions > 0)
    if questions:
        for figure in QUALITY:
            own, other = metrics[figure], None if others is None else others[figure]
            assert own is not None
            assert 0 <= own <= 1
            assert others is None or (other is not None and own >= other - worse - 1e-8)
    else:
        assert not (others is not None and proven)


def test_a_report_is_read_with_its_latency() -> None:
    reconciliation = {
        "expected": 3, "found": 3, "missing": [], "extra": [], "missing_count": 0, "extra_count": 0,
        "duplicate": 0, "orphan": 0, "sound": True,
    }  # fmt: skip
    difference = {"delta": 0.0, "low": -0.1, "high": 0.1}
    told = {"proven": True, "metrics": {"mrr": 0.5}, "differences": {"mrr": difference}, "unusable": None}
    report = {
        "reconciliation": reconciliation,
        "questions": 2,
        "metrics": {"mrr": 0.5},
        "live": told,
        "lost": [{"id": "q7", "why": "gone"}],
    }
    found = read(report, {"p99_ms": 12.0, "ndcg_at_10": 0.1})
    assert found.metrics == {"mrr": 0.5, "p99_ms": 12.0}
    assert found.live == Live(True, {"mrr": 0.5}, {"mrr": (-0.1, 0.1)})
    assert found.lost == ("q7",)
    with pytest.raises(KeyError):
        read({"questions": 2}, {})


def test_a_live_generation_that_cannot_be_asked_is_held_by_what_was_measured_of_it() -> None:
    measured = Live(True, {"ndcg_at_10": 0.9, "recall_at_10": 0.9, "mrr": 0.9}, unusable="its archive is gone")
    decision = decide(Rules(), numbers(metrics={"ndcg_at_10": 0.5, "recall_at_10": 0.9, "mrr": 0.9}, live=measured))
    assert decision.verdict == "kept"
    assert any("cannot be asked now (its archive is gone)" in reason for reason in decision.reasons)


def test_labels_that_quote_what_is_gone_are_named_right_behind_what_they_may_have_caused() -> None:
    found = numbers(live=live(ndcg_at_10=0.99), lost=tuple(f"q{n}" for n in range(7)))
    decision = decide(Rules(), found)
    assert decision.verdict == "kept"
    against = [c for c in decision.checks if not c.passed]
    assert decision.reasons[len(against)] == (
        "7 of 120 questions quote what no source says any more and count as missed: relabel q0, q1, q2, q3, q4 and 2 more"
    )
    good = decide(Rules(), numbers(lost=("q7",)))
    assert good.verdict == "promote" and good.reasons[0].endswith("relabel q7")
