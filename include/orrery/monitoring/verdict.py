"""Must the model be trained again? A pure function of recorded numbers; light, no numpy.

`retrain` when a loss against the promise is large enough to matter (`effect`), surer than chance, and there for
`persistence` partitions in a row under one model version. `watch` when something of that is there already. Else `none`.

- A loss counts when it is at least `effect`. The losses of the last `persistence` partitions are pooled, and what they
  surely are (the lower end of the 95 % interval) must be above zero. The promise is one number for all of them, so its
  error does not shrink by waiting: a promise measured on few rows is doubted for as long as the model is in use.
- Where fewer than `labelled` of the rows have a label, performance says nothing. Then predictions that have moved (PSI
  beyond its noise of at least `PREDICTION_PSI`, by more than chance) count in its place. Where labels are there,
  performance is the better witness: in a world that moves, the predictions of a good model move as well.
- Features that have moved never count, however many: raw weather moves every month, and a model that keeps its promise
  on it needs no training. One whose values went missing is for a person: a new training would learn the gap.
- After `retrain` it is quiet for `cooldown` partitions: the request is on its way, or the gate has refused.
- A number that is missing or not finite is not known: it never counts. Ties count: a loss of exactly `effect` is one.
  Another model version, or a partition without a verdict of its own, ends a row.

The thresholds, and how often this cries wolf, are measured: README.md beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orrery.evaluation.quantiles import student_quantile
from orrery.spec import ModelSpec

Word = Literal["none", "watch", "retrain"]

# How sure a loss must be, one-sided: the lower end of the two-sided 95 % interval that people see.
SURE = 0.975
# Siddiqi, Credit Risk Scorecards (2006), ch. 6: above 0.25 the population has changed; the usual alarm is at 0.2.
PREDICTION_PSI = 0.2
PREDICTION_P = 0.01
# A feature that lost this share of its rows' values has no source any more; less is told, and moves no verdict.
LOST = 0.5
# A loss that matters, where the spec does not say, in the metric's unit; rmse: a share of the promise.
EFFECT = {"binary": 0.0125, "multiclass": 0.0125, "regression": 0.05}
# At most so many names in a sentence.
NAMES = 3


@dataclass(frozen=True)
class Policy:
    """What a project asks of the verdict; `relative`: `effect` is a share of the promised value."""

    metric: str
    effect: float
    relative: bool
    persistence: int
    cooldown: int
    labelled: float

    @classmethod
    def of(cls, spec: ModelSpec, metric: str) -> Policy:
        """Return the policy that a spec declares."""
        monitor = spec.monitor
        effect = EFFECT[spec.task] if monitor.effect is None else monitor.effect
        relative = spec.task == "regression"
        return cls(metric, effect, relative, monitor.persistence, monitor.cooldown, monitor.labelled)


@dataclass(frozen=True)
class Sure:
    """A metric's value with its standard error and the error's degrees of freedom."""

    value: float
    se: float
    freedom: float


@dataclass(frozen=True)
class Seen:
    """What was recorded of one partition. `loss`: promised less observed, positive is worse, whatever the metric.

    `labelled`: share of the scored rows. `prediction_psi`: less what sampling alone makes, with its p-value. `lost`:
    features whose values went missing (`LOST`). `verdict`: of the earlier partitions.
    """

    key: str
    version: str
    loss: float | None = None
    observed: Sure | None = None
    promised: Sure | None = None
    labelled: float | None = None
    prediction_psi: float | None = None
    prediction_p: float | None = None
    moved: Sequence[str] = ()
    lost: Sequence[str] = ()
    verdict: Word = "none"


@dataclass(frozen=True)
class Loss:
    """A loss, and what it surely is at least."""

    value: float
    least: float


@dataclass(frozen=True)
class Verdict:
    """The word, and sentences for whoever is on call: what decided comes first."""

    word: Word
    reasons: tuple[str, ...]


def decide(policy: Policy, history: Sequence[Seen | None], now: Seen) -> Verdict:
    """Return the verdict on `now`; `history[i]` is the partition i + 1 before it, None where it has no verdict."""
    row = _row(policy, history, now)
    asked = next((s for s in history[: policy.cooldown] if s is not None and s.verdict == "retrain"), None)
    word, reason = _decided(policy, row, now, asked)
    return Verdict(word, (reason, *_beside(policy, now)))


def known(policy: Policy, seen: Seen) -> bool:
    """Tell whether performance says something: labels enough, and a loss with both errors."""
    numbers = (seen.loss, seen.labelled, *_numbers(seen.observed), *_numbers(seen.promised))
    finite = all(n is not None and math.isfinite(n) for n in numbers)
    return finite and seen.labelled is not None and seen.labelled >= policy.labelled


def needed(policy: Policy, seen: Seen) -> float:
    """Return the smallest loss that matters, in the metric's unit."""
    return policy.effect * abs(seen.promised.value) if policy.relative and seen.promised else policy.effect


def pooled(row: Sequence[Seen]) -> Loss:
    """Return the mean loss of partitions of known performance under one promise, and what it is at least.

    The promise's error counts once, the partitions' are independent of each other.
    """
    parts = [Sure(0.0, s.observed.se / len(row), s.observed.freedom) for s in row if s.observed is not None]
    parts += [row[0].promised] if row[0].promised is not None else []
    value = sum(s.loss or 0.0 for s in row) / len(row)
    return Loss(value, value - reach(parts, SURE))


def reach(parts: Sequence[Sure], share: float) -> float:
    """Return Student's quantile times the error of a sum of independent parts (freedom: Welch, Biometrika 34, 1947)."""
    variance = sum(p.se**2 for p in parts)
    weights = sum(p.se**4 / p.freedom for p in parts)
    if not weights:
        return 0.0
    return float(student_quantile(share, max(1.0, variance**2 / weights)) * variance**0.5)


# -- the rule ----------------------------------------------------------------------------------------


def _row(policy: Policy, history: Sequence[Seen | None], now: Seen) -> list[Seen]:
    """Return the partitions in a row, newest first, that show something under the present version."""
    row: list[Seen] = []
    for seen in (now, *history):
        if seen is None or seen.version != now.version or not (_worse(policy, seen) or _adrift(policy, seen)):
            break
        row.append(seen)
    return row


def _worse(policy: Policy, seen: Seen) -> bool:
    return known(policy, seen) and seen.loss is not None and seen.loss >= needed(policy, seen)


def _adrift(policy: Policy, seen: Seen) -> bool:
    """Without labels enough, predictions that moved stand in for performance."""
    return not known(policy, seen) and _moved(seen)


def _moved(seen: Seen) -> bool:  # a comparison with NaN is false
    psi, p = seen.prediction_psi, seen.prediction_p
    return psi is not None and p is not None and psi >= PREDICTION_PSI and p <= PREDICTION_P


def _decided(policy: Policy, row: list[Seen], now: Seen, asked: Seen | None) -> tuple[Word, str]:
    window = row[: policy.persistence]
    losses = [s for s in window if known(policy, s)]
    sure = not losses or pooled(losses).least > 0
    if row and sure and len(row) >= policy.persistence:
        said = _persists(policy, window, losses)
        if asked is None:
            return "retrain", f"retrain: {said}"
        return "watch", f"{said}; the verdict on {asked.key} was retrain already, so this does not ask again yet"
    if row and (sure or (known(policy, now) and pooled([now]).least > 0)):
        said = _shows(policy, now)
        if len(row) >= policy.persistence:
            return "watch", f"{said}; over {len(losses)} partitions it is within chance"
        left = policy.persistence - len(row)
        return "watch", f"{said}; {left} more partition{'s' if left > 1 else ''} like this and it asks for a training"
    if now.lost:
        return "watch", f"{names(now.lost)}: the values went missing; look at the source, a training would not mend it"
    return "none", _kept(policy, now)


# -- words -------------------------------------------------------------------------------------------


def _persists(policy: Policy, window: list[Seen], losses: list[Seen]) -> str:
    keys = f"{window[-1].key} to {window[0].key}" if len(window) > 1 else window[0].key
    if not losses:
        return f"{_drifting(window[0])}, in {keys}"
    loss, promised = pooled(losses), losses[0].promised
    assert promised is not None
    return (
        f"{policy.metric} is {loss.value:.4f} worse than the {promised.value:.4f} promised over {keys}, "
        f"surely {loss.least:.4f} (from {needed(policy, losses[0]):.4f} on it matters)"
    )


def _shows(policy: Policy, now: Seen) -> str:
    return _figures(policy, now) if known(policy, now) else _drifting(now)


def _drifting(seen: Seen) -> str:
    return f"predictions have moved (PSI {seen.prediction_psi:.2f}), and the labels to check them by are missing"


def _kept(policy: Policy, now: Seen) -> str:
    if known(policy, now):
        return f"{_figures(policy, now)}{': within chance' if _worse(policy, now) else ''}"
    if now.promised is None:
        return f"no verdict on {policy.metric}: the model came without a promise (its evaluation holds none)"
    if now.labelled is not None and now.labelled < policy.labelled:
        return f"no verdict on {policy.metric}: labels are missing"
    return f"no verdict on {policy.metric}: it is not defined on these rows (one class only, or too few)"


def _figures(policy: Policy, now: Seen) -> str:
    observed, promised, loss = now.observed, now.promised, now.loss or 0.0
    assert observed is not None and promised is not None
    far = f"{abs(loss):.4f} {'worse' if loss > 0 else 'better'}" if loss else "the same"
    return (
        f"{policy.metric} {observed.value:.4f} against {promised.value:.4f} promised: {far} "
        f"(from {needed(policy, now):.4f} worse on it matters)"
    )


def _beside(policy: Policy, now: Seen) -> list[str]:
    """Return what is worth knowing and decides nothing."""
    out = []
    if now.labelled is not None and now.labelled < policy.labelled and now.promised is not None:
        out.append(f"{1 - now.labelled:.1%} of the scored rows have no label; at most {1 - policy.labelled:.0%} may")
    if _moved(now) and known(policy, now):
        out.append(
            f"predictions have moved (PSI {now.prediction_psi:.2f}): performance is what counts while labels are there"
        )
    if now.moved:
        out.append(f"features that have moved: {names(now.moved)}; by itself no reason to train again")
    return out


def names(given: Sequence[str]) -> str:
    """Return the first few names of a list, as words."""
    more = len(given) - NAMES
    return ", ".join(given[:NAMES]) + (f" and {more} more" if more > 0 else "")


def _numbers(sure: Sure | None) -> tuple[float | None, ...]:
    return (None,) if sure is None else (sure.value, sure.se, sure.freedom)
