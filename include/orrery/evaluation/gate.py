"""`gate`: may this candidate replace the champion? A pure function of recorded numbers; light, no numpy.

A candidate is promoted when every check passes: each bound of the spec, the disparity, better than the
baseline and better than the champion by more than chance (the 95 % interval of the paired bootstrap lies
above zero) on rows that the champion has not seen, and nothing that looks like a leaked label. A number that
is missing or not finite refuses; so does a tie. A refusal is a good end: the verdict is `kept` and the step
is done.

What the leak alarm sees: a holdout that is predicted too well, or one feature that does nearly all the work.
What no number of this evaluation can show: a leak into the holdout that is weak, spread over many features,
or that exists in production as well as here; rows of one cause on both sides of the split; labels that were
recorded wrongly. For those there are the point-in-time join, the split by time, and the monitoring of the
live model. A project that truly is that easy says so: `gate: {auc: {max: 1}}` replaces the alarm.

    verdict.json    verdict and checks; the latency's value is left out of it, since it is measured and differs
                    from run to run, and the verdict's digest must not. Value and reason are in the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from orrery.contract import GateParams, Result
from orrery.errors import UserError
from orrery.spec import METRICS, PRIMARY, Bound, Disparity, ModelSpec
from orrery.step import Work

# Above these a holdout is predicted better than the world allows, until the project says otherwise.
TOO_GOOD: dict[str, tuple[str, float]] = {
    "binary": ("auc", 0.99),
    "multiclass": ("accuracy", 0.995),
    "regression": ("r2", 0.999),
}
# One feature that alone covers this share of the way from chance to perfect, and `SINGLE_SHARE` of what the model
# knows beyond chance, is suspected. AUC: 0.8 of the way from 0.5 is 0.9. In our flights the departure delay, the
# classic leak, has an AUC of 0.92 alone; no honest feature passes 0.7.
SINGLE: dict[str, float] = {"auc": 0.8, "accuracy": 0.8, "r2": 0.95}
SINGLE_SHARE = 0.9
# The same window landed again moves the holdout's start by a few rows; beyond this share, the champion's numbers on
# these rows are those of rows that it was fitted on, or of its past.
SEEN = 0.01
# Measured on a machine at a moment, not computed from the rows.
MEASURED = frozenset({"p50_ms", "p99_ms"})
# A difference and the two metrics that it was made of are computed apart, in float64: relative to their size.
CONTRADICTION = 1e-9


@dataclass(frozen=True)
class Rules:
    """What a project asks of its candidates."""

    task: Literal["binary", "multiclass", "regression"]
    bounds: Mapping[str, Bound]
    disparity: Disparity | None = None

    @classmethod
    def of(cls, spec: ModelSpec) -> Rules:
        """Return the rules that a spec declares."""
        return cls(spec.task, spec.bounds, spec.disparity)


@dataclass(frozen=True)
class Versus:
    """Candidate against another model on the primary metric; `delta` and its 95 % interval: positive is better."""

    candidate: float | None
    other: float | None
    delta: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Numbers:
    """What was recorded of one evaluation. `champion` is the window it was trained on, None when there is none.

    `units` is what the bootstrap drew, as words: "14 days", "2,000 rows". `champion_seen` is the share of the rows
    that are earlier than `champion_fitted_until`.
    """

    metrics: Mapping[str, float | None]
    baseline: Versus | None
    units: str
    champion: str | None = None
    versus_champion: Versus | None = None
    champion_unusable: str | None = None
    champion_fitted_until: str = ""
    champion_seen: float = 0.0
    disparity: float | None = None
    best_feature: str | None = None
    best_feature_value: float | None = None
    best_feature_chance: float | None = None


@dataclass(frozen=True)
class Check:
    """One reason for or against; `reason` is a sentence with the numbers."""

    name: str
    value: float | None
    bound: float | None
    passed: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The verdict and every check behind it."""

    verdict: Literal["promote", "kept"]
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> list[str]:
        """The sentences, what speaks against it first."""
        return [c.reason for c in sorted(self.checks, key=lambda c: c.passed)]


def run(work: Work, params: GateParams) -> Result:
    """Decide by the evaluation's numbers."""
    evaluation = work.input("evaluation")
    report = json.loads(work.open_input(evaluation, "report.json").read_bytes())
    try:
        numbers = read(report, evaluation.result.get("metrics", {}))
    except KeyError as e:
        raise UserError(
            f"report.json of the evaluation {evaluation.key} has no {e}: another version made it",
            hint="run evaluate again",
        ) from None
    decision = decide(Rules.of(work.spec), numbers)
    digested = [_without_measurement(c) if c.name.partition(":")[0] in MEASURED else c for c in decision.checks]
    work.write_json("verdict.json", {"verdict": decision.verdict, "checks": [asdict(c) for c in digested]})
    shown = {k: v for k, v in numbers.metrics.items() if finite(v) is not None}
    return Result(
        verdict=decision.verdict,
        reasons=decision.reasons,
        metrics={k: float(v) for k, v in shown.items() if v is not None},
        facts={"checks": [asdict(c) for c in decision.checks]},
    )


def read(report: Mapping[str, Any], measured: Mapping[str, float]) -> Numbers:
    """Return the numbers of an evaluation's report.json and of its result's `metrics` (latency, size)."""
    primary = report["primary"]
    own = report["metrics"]["candidate"]

    def versus(name: str) -> Versus | None:
        if name not in report["comparisons"]:
            return None
        d = report["comparisons"][name]
        other = report["metrics"][name][primary]
        return Versus(own[primary], other, d["delta"], d["low"], d["high"])

    best, champion = report.get("best_single_feature"), report.get("champion")
    return Numbers(
        metrics={**own, **{k: measured.get(k) for k in (*sorted(MEASURED), "size_mb")}},
        baseline=versus("baseline"),
        units=f"{report['bootstrap']['units']:,} {report['bootstrap']['by']}s",
        champion=champion["window"] if champion else None,
        versus_champion=versus("champion"),
        champion_unusable=champion["unusable"] if champion else None,
        champion_fitted_until=champion.get("fitted_until", "") if champion else "",
        champion_seen=champion.get("seen", 0.0) if champion else 0.0,
        disparity=report["disparity"]["difference"] if report.get("disparity") else None,
        best_feature=best["name"] if best else None,
        best_feature_value=best["value"] if best else None,
        best_feature_chance=best["chance"] if best else None,
    )


def decide(rules: Rules, numbers: Numbers) -> Decision:
    """Return the verdict: `promote` only when every check passes."""
    checks: list[Check] = []
    for metric, bound in rules.bounds.items():
        checks += _bounds(rules, metric, bound, numbers.metrics.get(metric))
    if rules.disparity is not None:
        checks.append(_disparity(rules.disparity, numbers.disparity))
    checks.append(_better(rules, "baseline", "the baseline", numbers.baseline, numbers.units))
    checks.append(_champion(rules, numbers))
    checks += _seen(numbers)
    checks += _leak(rules, numbers)
    return Decision("promote" if all(c.passed for c in checks) else "kept", tuple(checks))


def _bounds(rules: Rules, metric: str, bound: Bound, value: float | None) -> list[Check]:
    known = finite(value)
    sides = (("min", bound.min, "≥", "below"), ("max", bound.max, "≤", "above"))
    checks = []
    for side, limit, holds, breaks in sides:
        if limit is None:
            continue
        name = f"{metric}:{side}"
        if known is None:
            checks.append(Check(name, None, limit, False, _missing(rules, metric, value)))
            continue
        passed = known >= limit if side == "min" else known <= limit
        shown = apart(known, limit)
        checks.append(
            Check(name, known, limit, passed, f"{metric} {shown} {holds if passed else 'is ' + breaks} {limit:g}")
        )
    return checks


def _missing(rules: Rules, metric: str, value: float | None) -> str:
    if value is not None:
        return f"{metric} is {value}, which satisfies no bound"
    return f"{metric} was not measured (task {rules.task}; or it is not defined on the holdout's rows)"


def _disparity(rule: Disparity, value: float | None) -> Check:
    known = finite(value)
    if known is None:
        why = f"disparity by {rule.by} was not measured: fewer than two groups of {rule.min_rows:,} rows in the holdout"
        return Check("disparity", None, rule.max, False, why)
    passed = known <= rule.max
    words = "≤" if passed else "is above"
    return Check(
        "disparity", known, rule.max, passed, f"disparity by {rule.by} {apart(known, rule.max)} {words} {rule.max:g}"
    )


def _champion(rules: Rules, numbers: Numbers) -> Check:
    name = "better_than_champion"
    if numbers.champion is None:
        return Check(name, None, 0.0, True, "no champion yet")
    if numbers.champion_unusable:
        why = f"the champion of {numbers.champion} cannot score these rows, so it holds nothing back"
        return Check(name, None, 0.0, True, f"{why}: {numbers.champion_unusable}")
    return _better(rules, "champion", f"the champion of {numbers.champion}", numbers.versus_champion, numbers.units)


def _seen(numbers: Numbers) -> list[Check]:
    """Refuse a comparison on rows that are no future to the champion; a champion that cannot score has none."""
    if numbers.champion is None or numbers.champion_unusable:
        return []
    share, passed = numbers.champion_seen, numbers.champion_seen <= SEEN
    what = f"{share:.0%} of these rows are from before {numbers.champion_fitted_until}, where its training ended"
    why = f"the champion of {numbers.champion} has seen these rows or comes after them: {what}; ask for a later window"
    reason = f"these rows are later than what the champion of {numbers.champion} was fitted on"
    return [Check("champion_apart", share, SEEN, passed, reason if passed else why)]


def _better(rules: Rules, name: str, words: str, versus: Versus | None, units: str) -> Check:
    """Better by more than chance: the interval's lower end is above zero. Equal is not better."""
    name, primary = f"better_than_{name}", PRIMARY[rules.task]
    known = [finite(v) for v in asdict(versus).values()] if versus else [None]
    if versus is None or any(v is None for v in known):
        return Check(name, None, 0.0, False, f"not compared with {words}: {primary} or its interval is missing")
    candidate, other, delta, low, high = (float(v) for v in known if v is not None)
    gain = (candidate - other) * (1 if METRICS[primary] else -1)
    if not low <= high or abs(delta - gain) > CONTRADICTION * max(1.0, abs(candidate), abs(other)):
        why = f"{primary} {candidate:g} and {other:g} of {words}, difference {delta:+g} from {low:+g} to {high:+g}"
        return Check(name, low, 0.0, False, f"the numbers contradict each other: {why}")
    passed = low > 0 and gain > 0
    interval = f"{primary} better by {delta:+.4f}, 95 % interval over {units} {low:+.4f} … {high:+.4f}"
    return Check(name, low, 0.0, passed, f"{'' if passed else 'not '}better than {words}: {interval}")


def _leak(rules: Rules, numbers: Numbers) -> list[Check]:
    """Too good to be true, as a whole or by one feature; a bound of the project's own replaces both limits."""
    metric, limit = TOO_GOOD[rules.task]
    own = rules.bounds[metric].max if metric in rules.bounds else None
    limit = limit if own is None else own
    value = finite(numbers.metrics.get(metric))
    advice = f"a feature may hold the label; if it is true, set gate.{metric}.max"
    if value is None:
        return [Check("leak", None, limit, False, f"{metric} is missing: a leak cannot be ruled out")]
    passed = value <= limit
    reason = f"{metric} {apart(value, limit)} is believable (≤ {limit:g})"
    if not passed:
        reason = f"too good to be true: {metric} {apart(value, limit)} is above {limit:g}; {advice}"
    checks = [Check("leak", value, limit, passed, reason)]
    if numbers.best_feature is not None:
        checks.append(_single(metric, value, own or 0.0, numbers, advice))
    return checks


def _single(metric: str, value: float, own: float, numbers: Numbers, advice: str) -> Check:
    name, alone, chance = "leak_by_one_feature", finite(numbers.best_feature_value), finite(numbers.best_feature_chance)
    if alone is None or chance is None:
        return Check(name, None, None, False, f"{numbers.best_feature} alone: {metric} is missing")
    limit = max(own, chance + SINGLE[metric] * (1 - chance))
    nearly_all = alone - chance >= SINGLE_SHARE * (value - chance)
    passed = not (alone > limit and nearly_all)
    said = f"{numbers.best_feature} alone reaches {metric} {apart(alone, limit)}"
    return Check(name, alone, limit, passed, said if passed else f"{said} of the model's {value:.4g}: {advice}")


def _without_measurement(check: Check) -> Check:
    state = "keeps" if check.passed else "breaks"
    return replace(check, value=None, reason=f"{check.name.partition(':')[0]} {state} its bound {check.bound:g}")


def finite(value: float | None) -> float | None:
    """Return `value` when it is a finite number, else None."""
    return value if value is not None and math.isfinite(value) else None


def apart(value: float, bound: float) -> str:
    """Return `value` with as many digits as it takes to see on which side of `bound` it lies (at least three)."""
    for digits in range(3, 17):
        text = f"{value:.{digits}g}"
        if value == bound or ((float(text) < bound) == (value < bound) and float(text) != bound):
            return text
    return repr(value)
