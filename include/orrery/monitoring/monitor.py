"""`monitor`: what the champion did on a partition once its labels are in, against its promise; and what follows.

    health.json     the verdict with its reasons, performance (whole and by slice), counts, drift, and what the verdicts
                    of later partitions need to know of this one (`seen`)

People look at health.html (evidence): the metric by partition with the promise, slices, features that moved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from orrery import partitions
from orrery.contract import LOOK_BACK, MonitorParams, Result
from orrery.errors import UserError
from orrery.evaluation import reference
from orrery.evaluation.exported import read_schema
from orrery.monitoring import drift, figures, joined, performance, verdict
from orrery.monitoring.drift import DriftReport
from orrery.monitoring.joined import Joined
from orrery.monitoring.performance import Performance, Slice
from orrery.monitoring.verdict import Policy, Seen, Sure, Verdict
from orrery.spec import PRIMARY
from orrery.step import Work
from orrery.store import Manifest

FILE = "health.json"
FEATURES = "features.parquet"
# A binary model whose mean prediction is off by this much of all rows is told of.
BIAS = 0.05
# Slices told in words; all of them are in health.json.
SLICES_TOLD = 3


@dataclass(frozen=True)
class Health:
    """Everything that was found out about a partition."""

    partition: str
    version: str
    performance: Performance
    rows: Joined
    drift: DriftReport | None
    quarantine: Mapping[str, float]
    """Share of each source's rows that validate set aside."""
    now: Seen
    verdict: Verdict


def run(work: Work, params: MonitorParams) -> Result:
    """Measure and decide. Raises `DataError` for labels or features that the model's task cannot have."""
    schema = read_schema(work.open_input(work.input("model"), "schema.json"), f"the model of {work.config.key}")
    if schema.task != work.spec.task:
        raise UserError(
            f"the model that scored {work.config.key} was trained for {schema.task}, spec.yaml says {work.spec.task}",
            hint="train again, then score again",
        )
    policy = Policy.of(work.spec, PRIMARY[work.spec.task])
    columns = [*schema.vocabularies, *([work.spec.disparity.by] if work.spec.disparity else [])]
    version, rows = _read(work, columns)
    measured = performance.measure(
        work.spec.task, rows.table, schema.classes, _promise(work), list(dict.fromkeys(columns))
    )
    moved = _drift(work, rows.predictions)
    now = _seen(work.config.key, version, measured, rows, moved)
    before = _history(work)
    decided = verdict.decide(policy, before, now)
    health = Health(work.config.key, version, measured, rows, moved, _quarantine(work), now, decided)
    reasons = [*decided.reasons, *_notes(work, policy, health)]
    work.write_json(FILE, _document(work, policy, health, before, reasons))
    page = figures.page(work.config.project, work.spec.label.column, policy, health, before, reasons)
    return Result(
        verdict=decided.word,
        reasons=reasons,
        metrics=_metrics(work, health),
        facts=_facts(policy, health),
        links={"Health": work.evidence("health.html", page)},
    )


# -- what is read ------------------------------------------------------------------------------------


def _read(work: Work, columns: Sequence[str]) -> tuple[str, Joined]:
    """Return the version that scored, and its scores beside the labels."""
    scores, features = work.input("scores"), work.input("features")
    told = json.loads(work.open_input(scores, "report.json").read_bytes())
    parts = [work.open_input(scores, n) for n in sorted(scores.files) if n.startswith("part-")]
    rows = joined.read(parts, work.open_input(features, FEATURES), columns, work.config.sample)
    return str(told["model_version"]), rows


def _promise(work: Work) -> Mapping[str, Any] | None:
    """Return what the model promised when it was a candidate; None when its evaluation says nothing of it.

    Raises `UserError` for the evaluation of another model: a champion must not be held to a challenger's promise.
    """
    evaluation, model = work.input("evaluation"), work.input("model")
    if [r.path for r in evaluation.inputs.get("candidate", ())] != [model.path]:
        raise UserError(f"the evaluation {evaluation.path} is not that of the model that scored, {model.path}")
    report = json.loads(work.open_input(evaluation, "report.json").read_bytes())
    told: Mapping[str, Any] | None = (report.get("promise") or {}).get("candidate")
    return told


def _drift(work: Work, predictions: pa.ChunkedArray) -> DriftReport | None:
    """Return how features and predictions moved; None when the evaluation kept no reference to compare with."""
    evaluation = work.input("evaluation")
    if reference.FILE not in evaluation.files:
        return None
    known = reference.read(work.open_input(evaluation, reference.FILE))
    features = [work.open_input(work.input("features"), FEATURES)]
    return drift.compare(known, features, predictions, share=work.config.sample)


def _quarantine(work: Work) -> dict[str, float]:
    """Return each source's share in quarantine, by what validate counted; the rows' source first."""
    counted = work.input("clean").result.get("metrics", {})
    out = {}
    for source in work.spec.sources:
        away, kept = (float(counted.get(f"{name}_{source}", 0.0)) for name in ("quarantined", "rows"))
        if away + kept:
            out[source] = away / (away + kept)
    return out


def _history(work: Work) -> list[Seen | None]:
    """Return the partitions before this one, nearest first; None where one has no health."""
    there = {m.key: m for m in work.inputs("history")}
    keys = [partitions.shift(work.config.key, work.spec.grain, -back) for back in range(1, LOOK_BACK + 1)]
    return [_read_seen(work, there[key]) if key in there else None for key in keys]


def _read_seen(work: Work, health: Manifest) -> Seen:
    told = json.loads(work.open_input(health, FILE).read_bytes())["seen"]
    sure = {n: Sure(**told[n]) if told[n] is not None else None for n in ("observed", "promised")}
    return Seen(**{**told, **sure})


def _seen(key: str, version: str, measured: Performance, rows: Joined, moved: DriftReport | None) -> Seen:
    observed = measured.observed
    predictions = moved.prediction if moved else None
    lost = [d.name for d in moved.features if d.missing - d.missing_reference >= verdict.LOST] if moved else []
    return Seen(
        key=key,
        version=version,
        loss=measured.loss.value if measured.loss else None,
        observed=Sure(observed.value, observed.se, observed.freedom) if observed else None,
        promised=measured.promised,
        labelled=rows.share_labelled,
        prediction_psi=_finite(predictions.excess) if predictions else None,
        prediction_p=_finite(predictions.p) if predictions else None,
        moved=tuple(moved.drifted) if moved else (),
        lost=tuple(lost),
    )


# -- what is told ------------------------------------------------------------------------------------


def _notes(work: Work, policy: Policy, health: Health) -> list[str]:
    """Return sentences beside the verdict: what a person may have to look at."""
    rows, out = health.rows, []
    for source, share in sorted(health.quarantine.items()):
        if share > work.spec.alerts.quarantine:
            out.append(f"{share:.1%} of {source} are in quarantine; at most {work.spec.alerts.quarantine:.1%} should")
    out += _bias_told(work, health.performance)
    out += _slices_told(policy, health)
    if stale := [n for n in (health.drift.stale if health.drift else []) if n not in health.now.lost]:
        out.append(f"values are missing more often than in training: {verdict.names(stale)}")
    if health.drift is None:
        out.append("drift was not computed: the model's evaluation kept no reference (made by an earlier version)")
    if rows.unpredicted:
        out.append(f"{rows.unpredicted:,} of {rows.scored:,} rows have no prediction")
    if rows.gone or rows.unscored:
        out.append(f"landed again since scoring: {rows.gone:,} scored rows are gone, {rows.unscored:,} were not scored")
    return out


def _bias_told(work: Work, measured: Performance) -> list[str]:
    """Say that probabilities are off as a whole: the ranking may hold, but a threshold means another thing."""
    bias = measured.bias
    if (
        work.spec.task != "binary"
        or bias is None
        or abs(bias.value) < BIAS
        or bias.interval[0] <= 0 <= bias.interval[1]
    ):
        return []
    said = (
        f"{measured.mean_prediction:.1%} {work.spec.label.column} predicted on average, {measured.mean_label:.1%} came"
    )
    return [f"{said}: probabilities are off, whatever the ranking is worth"]


def _slices_told(policy: Policy, health: Health) -> list[str]:
    """Return the slices that are surely, and by enough to matter, worse than promised; the worst first."""
    bad = [(s.loss.value, s) for s in health.performance.slices if s.loss is not None and s.loss.low > 0]
    bad = [(v, s) for v, s in bad if v >= verdict.needed(policy, health.now)]
    bad.sort(key=lambda pair: (-pair[0], pair[1].column, pair[1].value))
    return [
        f"{policy.metric} of {s.column} {s.value} ({s.observed.rows:,} rows) is {s.observed.value:.4f}, "
        f"{v:.4f} worse than promised"
        for v, s in bad[:SLICES_TOLD]
    ]


def _metrics(work: Work, health: Health) -> dict[str, float]:
    """Return the figures by name (see the ledger); what is not known is left out."""
    measured, now, moved = health.performance, health.now, health.drift
    out: dict[str, float | None] = {
        "rows": float(health.rows.scored),
        "labelled": health.rows.share_labelled,
        "quarantine": health.quarantine.get(work.spec.rows_source),
    }
    if measured.observed:
        low, high = measured.observed.interval
        out |= {"observed": measured.observed.value, "observed_low": low, "observed_high": high}
    if measured.promised:
        far = verdict.reach([measured.promised], 0.975)
        value = measured.promised.value
        out |= {"promised": value, "promised_low": value - far, "promised_high": value + far}
    if measured.loss:
        out |= {"loss": measured.loss.value, "loss_low": measured.loss.low, "loss_high": measured.loss.high}
    if moved:
        out |= {"prediction_psi": _finite(moved.prediction.psi), "prediction_js": _finite(moved.prediction.js)}
        out |= {"features_drifted": float(len(now.moved)), "features_stale": float(len(moved.stale))}
        out["worst_feature_psi"] = _finite(moved.worst.psi) if moved.worst else None
    return {name: value for name, value in out.items() if value is not None}


def _facts(policy: Policy, health: Health) -> dict[str, Any]:
    observed = health.performance.observed
    return {
        "model_version": health.version,
        "primary": policy.metric,
        "units": observed.units if observed else None,
        "policy": asdict(policy),
        "worst_feature": health.drift.worst.name if health.drift and health.drift.worst else None,
    }


def _document(
    work: Work, policy: Policy, health: Health, before: Sequence[Seen | None], reasons: Sequence[str]
) -> dict[str, Any]:
    measured, rows = health.performance, health.rows
    return {
        "partition": health.partition,
        "model_version": health.version,
        "verdict": health.verdict.word,
        "reasons": list(reasons),
        "policy": asdict(policy),
        "history": [s.key for s in before if s is not None],
        "performance": {
            "metric": measured.metric,
            "rows": measured.rows,
            "observed": measured.observed.told(measured.metric) if measured.observed else None,
            "promised": asdict(measured.promised) if measured.promised else None,
            "loss": asdict(measured.loss) if measured.loss else None,
            "metrics": {k: _finite(v) for k, v in measured.others.items()},
            "mean_label": measured.mean_label,
            "mean_prediction": measured.mean_prediction,
            "bias": measured.bias.told("bias") if measured.bias else None,
            "slices": [_slice(measured.metric, s) for s in measured.slices],
        },
        "rows": {n: getattr(rows, n) for n in ("scored", "labelled", "gone", "unscored", "unpredicted")},
        "quarantine": dict(health.quarantine),
        "drift": health.drift.to_dict() if health.drift else None,
        "sample": work.config.sample,
        "seen": asdict(replace(health.now, verdict=health.verdict.word)),
    }


def _slice(metric: str, one: Slice) -> dict[str, Any]:
    told = {"column": one.column, "of": one.value, **one.observed.told(metric)}
    return told | {"loss": asdict(one.loss) if one.loss else None}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
