"""`gate`: may this generation become the live one? A pure function of recorded numbers; light, no numpy.

It may when index and sources agree to the last chunk, when nDCG@10, recall@10 and MRR are not further below the
live generation's than `gate.worse` (both asked the same questions, in the same evaluation), and when every bound of
the spec holds. A number that is missing or not finite refuses. Equal is good enough: most nights little has changed.
The interval of a difference is told, not judged: with a hundred questions it is wide, and a generation that lost
documents must not pass because the loss might be chance.

Without labelled questions there is reconciliation alone: the verdict is `promote` and says that it is unproven. An
unproven generation never replaces a proven one: a questions file that vanished must not lower what is asked.

    verdict.json    verdict, proven, checks; without the values that are measured on a machine (p99_ms)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from orrery.contract import Result
from orrery.errors import UserError
from orrery.evaluation.gate import Check, apart, finite
from orrery.rag.contract import KnowledgeGateParams
from orrery.rag.spec import Floor, KnowledgeBaseSpec
from orrery.step import Work

# What may not be worse than the live generation's. Higher is better for each.
QUALITY = ("ndcg_at_10", "recall_at_10", "mrr")
WORDS = {"ndcg_at_10": "nDCG@10", "recall_at_10": "recall@10", "mrr": "MRR"}
# Measured on a machine at a moment, not computed from the inputs.
MEASURED = frozenset({"p99_ms"})
# A difference and the two figures that it was made of are computed apart, in float64.
CONTRADICTION = 1e-9
LABELS = "labels"
NAMED = 5


@dataclass(frozen=True)
class Rules:
    """What a project asks of its generations."""

    worse: float = 0.01
    bounds: Mapping[str, Floor] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: KnowledgeBaseSpec) -> Rules:
        """Return the rules that a spec declares."""
        return cls(spec.gate.worse, spec.gate.bounds)


@dataclass(frozen=True)
class Reconciled:
    """Index against sources: chunks expected and found, and how many are missing, extra, twice there, or orphans."""

    expected: int
    found: int
    missing: int
    extra: int
    duplicate: int
    orphan: int
    sound: bool


@dataclass(frozen=True)
class Live:
    """The live generation on the same questions; `unusable` says why it could not be asked."""

    proven: bool
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    unusable: str | None = None


@dataclass(frozen=True)
class Numbers:
    """What was recorded of one evaluation; `questions` counts the answerable ones, 0 when nothing was asked.

    `live` is None when there is none, or when the generation is the live one itself.
    """

    reconciled: Reconciled
    questions: int = 0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    live: Live | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """The verdict and every check behind it. `proven`: questions were asked, and it did not fail on them."""

    verdict: Literal["promote", "kept"]
    proven: bool
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> list[str]:
        """The sentences, what speaks against it first; right behind it, that labels are as old as what they quote."""
        return [c.reason for c in sorted(self.checks, key=lambda c: (c.passed, c.name != LABELS))]


def run(work: Work, params: KnowledgeGateParams) -> Result:
    """Decide by the evaluation's numbers."""
    evaluation = work.input("evaluation")
    report = json.loads(work.open_input(evaluation, "report.json").read_bytes())
    try:
        numbers = read(report, evaluation.result.get("metrics", {}))
    except (KeyError, TypeError) as e:
        raise UserError(
            f"report.json of the evaluation {evaluation.key} cannot be read ({e}): another version made it",
            hint="run evaluate again",
        ) from None
    decision = decide(Rules.of(work.knowledge), numbers)
    digested = [_without_measurement(c) if c.name.partition(":")[0] in MEASURED else c for c in decision.checks]
    told = {"verdict": decision.verdict, "proven": decision.proven, "checks": [asdict(c) for c in digested]}
    work.write_json("verdict.json", told)
    return Result(
        verdict=decision.verdict,
        reasons=decision.reasons,
        metrics={k: v for k, value in numbers.metrics.items() if (v := finite(value)) is not None},
        facts={"proven": decision.proven, "checks": [asdict(c) for c in decision.checks]},
    )


def read(report: Mapping[str, Any], measured: Mapping[str, float]) -> Numbers:
    """Return the numbers of an evaluation's report.json and of its result's `metrics` (the latency)."""
    known = report["reconciliation"]
    reconciled = Reconciled(
        expected=known["expected"],
        found=known["found"],
        missing=known["missing_count"],
        extra=known["extra_count"],
        duplicate=known["duplicate"],
        orphan=known["orphan"],
        sound=known["sound"],
    )
    live = report["live"]
    return Numbers(
        reconciled=reconciled,
        questions=report["questions"],
        metrics={**report["metrics"], **{name: measured.get(name) for name in MEASURED}},
        live=None if live is None else _live(live),
        lost=tuple(str(one["id"]) for one in report.get("lost", ())),
    )


def _live(told: Mapping[str, Any]) -> Live:
    differences: Mapping[str, Mapping[str, Any]] = told.get("differences") or {}
    return Live(
        proven=bool(told["proven"]),
        metrics=told.get("metrics") or {},
        intervals={name: (d["low"], d["high"]) for name, d in differences.items()},
        unusable=told.get("unusable"),
    )


def decide(rules: Rules, numbers: Numbers) -> Decision:
    """Return the verdict: `promote` only when every check passes."""
    checks = [_whole(numbers.reconciled), _something(numbers.reconciled)]
    if numbers.questions > 0:
        checks += [_not_worse(figure, rules.worse, numbers) for figure in QUALITY]
    else:
        checks.append(_unproven(numbers.live))
    for figure, bound in rules.bounds.items():
        checks += _bounds(figure, bound, numbers)
    if numbers.lost:
        count, named = len(numbers.lost), ", ".join(numbers.lost[:NAMED])
        more = f" and {count - NAMED:,} more" if count > NAMED else ""
        told = (
            f"{count} of {numbers.questions} questions quote what no source says any more and count as missed: "
            f"relabel {named}{more}"
        )
        checks.append(Check(LABELS, float(count), None, True, told))
    good = all(c.passed for c in checks)
    return Decision("promote" if good else "kept", good and numbers.questions > 0, tuple(checks))


def _whole(r: Reconciled) -> Check:
    wrong = {"missing": r.missing, "extra": r.extra, "duplicate": r.duplicate, "orphan": r.orphan}
    told = ", ".join(f"{count:,} {what}" for what, count in wrong.items() if count)
    off = float(sum(wrong.values()))
    if told:
        return Check("reconciled", off, 0.0, False, f"index and sources differ: {told} of {r.expected:,} chunks")
    if not r.sound or r.expected != r.found:
        why = f"index and sources differ: {r.found:,} chunks are there, {r.expected:,} were expected"
        return Check("reconciled", abs(float(r.found - r.expected)), 0.0, False, why)
    return Check("reconciled", 0.0, 0.0, True, f"index and sources agree: {r.expected:,} chunks")


def _something(r: Reconciled) -> Check:
    held = r.found > 0
    return Check("not_empty", float(r.found), 1.0, held, f"{r.found:,} chunks" if held else "the generation is empty")


def _unproven(live: Live | None) -> Check:
    if live is not None and live.proven:
        why = "unproven: no questions were asked, and what is live has been proven; give the questions back"
        return Check("proven", None, None, False, why)
    return Check("proven", None, None, True, "unproven: no questions")


def _not_worse(figure: str, worse: float, numbers: Numbers) -> Check:
    name, words, live = f"not_worse:{figure}", WORDS[figure], numbers.live
    own = _share(numbers.metrics.get(figure))
    if own is None:
        given = numbers.metrics.get(figure)
        why = f"{words} was not measured" if given is None else f"{words} is {given}, which is not good enough"
        return Check(name, None, None, False, why)
    if live is None:
        return Check(name, own, None, True, f"{words} {own:.4f}; there is no other live generation to compare with")
    if live.unusable is not None and _share(live.metrics.get(figure)) is None:
        why = f"{words} {own:.4f}; the live generation cannot be asked, so it holds nothing back: {live.unusable}"
        return Check(name, own, None, True, why)
    other = _share(live.metrics.get(figure))
    if other is None:
        return Check(name, None, -worse, False, f"{words} {own:.4f} was not compared with the live generation's")
    low, high = (finite(v) for v in live.intervals.get(figure, (None, None)))
    delta = own - other
    # Two figures of a hundred questions are sums of fractions: what is equal on paper may differ in the last digit.
    passed = delta >= -worse - CONTRADICTION
    interval = "no interval" if low is None or high is None else f"95 % interval {low:+.4f} … {high:+.4f}"
    told = f"{words} {own:.4f}, {delta:+.4f} to the live generation's ({interval})"
    if live.unusable is not None:
        told = f"{words} {own:.4f}, {delta:+.4f} to what was measured when the live generation went live, "
        told += f"which cannot be asked now ({live.unusable})"
    verdict = "" if passed else f": that is worse by more than {worse:g}"
    return Check(name, delta, -worse, passed, f"{told}{verdict}")


def _share(value: float | None) -> float | None:
    """Return a number between 0 and 1, which each of these figures is; else None."""
    return value if value is not None and 0 <= value <= 1 else None


def _bounds(figure: str, bound: Floor, numbers: Numbers) -> list[Check]:
    value = numbers.metrics.get(figure)
    known = finite(value)
    checks = []
    for side, limit in (("min", bound.min), ("max", bound.max)):
        if limit is None:
            continue
        name = f"{figure}:{side}"
        if known is None:
            checks.append(Check(name, None, limit, False, _missing(figure, value, numbers.questions)))
            continue
        passed = known >= limit if side == "min" else known <= limit
        words = ("≥" if side == "min" else "≤") if passed else ("is below" if side == "min" else "is above")
        checks.append(Check(name, known, limit, passed, f"{figure} {apart(known, limit)} {words} {limit:g}"))
    return checks


def _missing(figure: str, value: float | None, questions: int) -> str:
    if value is not None:
        return f"{figure} is {value}, which satisfies no bound"
    why = "no questions" if questions == 0 else "it needs answerable and unanswerable questions, some of each"
    return f"{figure} was not measured: {why}"


def _without_measurement(check: Check) -> Check:
    state = "keeps" if check.passed else "breaks"
    return replace(check, value=None, reason=f"{check.name.partition(':')[0]} {state} its bound {check.bound:g}")
