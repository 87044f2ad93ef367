"""`decide` on its own: a pure function of numbers. The planted models are in test_release.py."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orrery.evaluation.gate import Check, Decision, Numbers, Rules, Versus, decide
from orrery.spec import METRICS, Bound, Disparity

GOOD = {"auc": 0.74, "accuracy": 0.8, "log_loss": 0.4, "p99_ms": 1.0}
NUMBER = st.floats(allow_nan=True, allow_infinity=True) | st.none()


def better(candidate: float = 0.74, other: float = 0.70, low: float = 0.01, high: float = 0.07) -> Versus:
    return Versus(candidate, other, candidate - other, low, high)


def numbers(**changes: object) -> Numbers:
    return replace(Numbers(metrics=GOOD, baseline=better(), units="14 days"), **changes)


def rules(**bounds: Bound) -> Rules:
    return Rules("binary", bounds)


def check(decision: Decision, name: str) -> Check:
    return next(c for c in decision.checks if c.name == name)


def test_a_good_first_candidate_is_promoted_and_every_reason_says_why() -> None:
    decision = decide(rules(auc=Bound(min=0.72), p99_ms=Bound(max=5)), numbers())
    assert decision.verdict == "promote"
    assert decision.reasons == [
        "auc 0.74 ≥ 0.72",
        "p99_ms 1 ≤ 5",
        "better than the baseline: auc better by +0.0400, 95 % interval over 14 days +0.0100 … +0.0700",
        "no champion yet",
        "auc 0.74 is believable (≤ 0.99)",
    ]


def test_what_speaks_against_it_comes_first() -> None:
    decision = decide(rules(p99_ms=Bound(max=5), auc=Bound(min=0.75)), numbers())
    assert decision.verdict == "kept"
    assert decision.reasons[0] == "auc 0.74 is below 0.75"


@pytest.mark.parametrize("low", [0.0, -0.0011, -1e-12])
def test_not_better_than_the_champion_by_more_than_chance_is_kept(low: float) -> None:
    versus = Versus(0.7404, 0.74, 0.0004, low, 0.0019)
    decision = decide(rules(), numbers(champion="2013-01..2013-03", versus_champion=versus))
    assert decision.verdict == "kept"
    assert decision.reasons[0].startswith("not better than the champion of 2013-01..2013-03: auc better by +0.0004")


def test_an_exact_tie_with_the_champion_keeps_it() -> None:
    tie = Versus(0.74, 0.74, 0.0, 0.0, 0.0)
    assert decide(rules(), numbers(champion="w", versus_champion=tie)).verdict == "kept"


def test_candidate_and_champion_swapped_contradict_their_difference() -> None:
    swapped = Versus(candidate=0.70, other=0.74, delta=0.04, low=0.01, high=0.07)
    decision = decide(rules(), numbers(champion="w", versus_champion=swapped))
    assert decision.verdict == "kept"
    assert "contradict" in check(decision, "better_than_champion").reason


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e12])
def test_a_contradiction_is_relative_to_the_size_of_the_numbers(scale: float) -> None:
    """An rmse in the millions has rounding errors of its own size; a real contradiction is one at any size."""
    candidate, other = 1.1 * scale, 1.3 * scale
    rounded = Versus(candidate, other, (other - candidate) * (1 + 1e-10), 0.1 * scale, 0.3 * scale)
    own = {"rmse": candidate, "mae": 1.0, "r2": 0.5}
    assert decide(Rules("regression", {}), Numbers(own, rounded, "14 days")).verdict == "promote"
    wrong = replace(rounded, delta=0.21 * scale)
    decision = decide(Rules("regression", {}), Numbers(own, wrong, "14 days"))
    assert "contradict" in check(decision, "better_than_baseline").reason


def test_lower_is_better_for_the_primary_of_a_regression() -> None:
    own = {"rmse": 1.0, "mae": 0.8, "r2": 0.5}
    lower = Versus(1.0, 1.2, 0.2, 0.1, 0.3)
    assert decide(Rules("regression", {}), Numbers(own, lower, "14 days")).verdict == "promote"
    higher = Versus(1.2, 1.0, 0.2, 0.1, 0.3)  # called better although its error is larger
    assert decide(Rules("regression", {}), Numbers(own, higher, "14 days")).verdict == "kept"


def test_a_champion_that_cannot_score_holds_nothing_back_and_it_is_said() -> None:
    decision = decide(rules(), numbers(champion="w", champion_unusable="the features lack a"))
    assert decision.verdict == "promote"
    assert "the features lack a" in check(decision, "better_than_champion").reason


def test_a_champion_without_comparison_refuses() -> None:
    assert decide(rules(), numbers(champion="w", versus_champion=None)).verdict == "kept"


def test_no_baseline_refuses() -> None:
    assert decide(rules(), numbers(baseline=None)).verdict == "kept"


@pytest.mark.parametrize(("value", "verdict"), [(0.1, "promote"), (0.11, "kept"), (None, "kept"), (math.nan, "kept")])
def test_disparity(value: float | None, verdict: str) -> None:
    rule = Rules("binary", {}, Disparity(by="carrier", max=0.1))
    assert decide(rule, numbers(disparity=value)).verdict == verdict


def test_a_holdout_that_is_predicted_too_well_is_refused_until_the_project_says_otherwise() -> None:
    suspect = numbers(metrics={"auc": 0.995}, baseline=better(0.995, 0.9, 0.05, 0.1))
    refused = decide(rules(), suspect)
    assert refused.verdict == "kept"
    assert "set gate.auc.max" in refused.reasons[0]
    assert decide(rules(auc=Bound(max=1)), suspect).verdict == "promote"


def test_one_feature_that_does_all_the_work_is_refused() -> None:
    leaked = numbers(metrics={"auc": 0.94}, baseline=better(0.94, 0.9, 0.01, 0.07), best_feature="dep_delay")
    leaked = replace(leaked, best_feature_chance=0.5)
    assert decide(rules(), replace(leaked, best_feature_value=0.92)).verdict == "kept"
    assert decide(rules(), replace(leaked, best_feature_value=0.75)).verdict == "promote"
    assert decide(rules(), replace(leaked, best_feature_value=None)).verdict == "kept"
    assert decide(rules(auc=Bound(max=1)), replace(leaked, best_feature_value=0.92)).verdict == "promote"


@pytest.mark.parametrize(
    ("chance", "alone", "whole", "verdict"),
    [
        (0.4, 0.9, 0.92, "kept"),  # 83 % of the way from chance, and nearly all that the model knows
        (0.4, 0.8, 0.82, "promote"),  # a strong feature, not an impossible one
        (0.4, 0.9, 0.99, "promote"),  # the model knows more than it
        (0.96, 0.96, 0.961, "promote"),  # a common class is no feature's doing
    ],
)
def test_one_feature_of_a_multiclass_is_judged_by_its_way_from_the_commonest_class(
    chance: float, alone: float, whole: float, verdict: str
) -> None:
    own = {"accuracy": whole, "log_loss": 0.3}
    given = Numbers(own, Versus(0.3, 0.5, 0.2, 0.1, 0.3), "14 days", best_feature="code", best_feature_value=alone,
                    best_feature_chance=chance)  # fmt: skip
    decision = decide(Rules("multiclass", {}), given)
    assert decision.verdict == verdict
    assert check(decision, "leak_by_one_feature").reason.startswith(f"code alone reaches accuracy {alone:g}")


def test_a_bound_just_missed_is_shown_with_the_digits_that_tell() -> None:
    decision = decide(rules(auc=Bound(min=0.72)), numbers(metrics={"auc": 0.71996}))
    assert decision.reasons[0] == "auc 0.71996 is below 0.72"


@given(st.sampled_from(sorted(METRICS)), NUMBER, st.floats(-10, 10), st.booleans())
def test_a_bound_passes_exactly_when_a_finite_number_keeps_it(
    metric: str, value: float | None, limit: float, floor: bool
) -> None:
    bound = Bound(min=limit) if floor else Bound(max=limit)
    decision = decide(rules(**{metric: bound}), numbers(metrics={**GOOD, metric: value}))
    found = check(decision, f"{metric}:{'min' if floor else 'max'}")
    holds = value is not None and math.isfinite(value) and (value >= limit if floor else value <= limit)
    assert found.passed == holds
    assert decision.verdict == "kept" or holds
    assert found.reason


@given(NUMBER, NUMBER, NUMBER, NUMBER, NUMBER)
def test_no_promotion_without_five_finite_numbers_that_agree(a, b, delta, low, high) -> None:  # type: ignore[no-untyped-def]
    decision = decide(rules(), numbers(champion="w", versus_champion=Versus(a, b, delta, low, high)))
    finite = all(v is not None and math.isfinite(v) for v in (a, b, delta, low, high))
    if decision.verdict == "promote":
        assert finite
        assert a > b
        assert 0 < low <= high
    assert all(c.value is None or math.isfinite(c.value) for c in decision.checks)


@given(st.floats(0.5, 0.9), st.floats(-0.2, 0.2), st.floats(0, 0.1))
def test_a_candidate_and_its_champion_never_both_beat_each_other(other: float, delta: float, width: float) -> None:
    there = Versus(other + delta, other, delta, delta - width, delta + width)
    back = Versus(other, other + delta, -delta, -delta - width, -delta + width)
    verdicts = [decide(rules(), numbers(champion="w", versus_champion=v)).verdict for v in (there, back)]
    assert verdicts != ["promote", "promote"]
    assert (verdicts[0] == "promote") == (delta - width > 0 and other + delta > other)
