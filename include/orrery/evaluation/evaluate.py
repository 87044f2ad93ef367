"""`evaluate`: candidate, baseline and champion on the same later rows, and how sure the differences are.

    report.json           every number that follows from the rows and the models, for people, the gate and the monitor
                          (`promise`)
    predictions.parquet   key, label and each model's prediction per holdout row
    reference.json        bins and counts of the window's features and of the candidate's predictions, for drift

Latency is measured, not computed, and differs from run to run: it goes into the result (`metrics`), which the
content digest does not cover. Decides nothing; see `gate`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orrery.contract import EvaluateParams, Result
from orrery.data import tables
from orrery.errors import DataError, UserError
from orrery.evaluation import bootstrap, certainty, exported, holdout, leaks, metrics, reference, slices
from orrery.evaluation.bootstrap import Difference
from orrery.evaluation.exported import Exported
from orrery.evaluation.holdout import Holdout
from orrery.evaluation.metrics import Array
from orrery.spec import METRICS, PRIMARY
from orrery.step import Work
from orrery.store import Manifest

Predictions = dict[str, Array]


def run(work: Work, params: EvaluateParams) -> Result:
    """Measure the candidate. Raises `DataError` when it cannot be: no rows, no numbers, a column that is gone."""
    training = work.input("candidate")
    candidate, baseline, start = _open_candidate(work, training)
    with _timed(work, "rows"):
        table = holdout.read([work.open_input(m, "features.parquet") for m in work.inputs("features")], start,
                             work.config.sample)  # fmt: skip
    with work.progress("scoring", 3.0 * table.num_rows, "rows") as tick, _timed(work, "scoring"):
        predictions = {"candidate": candidate.predict(table, tick), "baseline": baseline.predict(table, tick)}
        classes = candidate.schema.classes
        champion = work.inputs("champion")
        unusable = ""
        if champion:
            unusable, values, classes = _champion(work, champion[0], table, candidate)
            if values is not None:
                predictions["champion"] = values
    rows = holdout.labelled(table, work.spec.task, classes)
    measured = {n: _aligned(p, candidate, len(rows.classes)) for n, p in predictions.items()}
    report = _report(work, params, rows, measured, candidate, start)
    report["champion"] = _told(work, champion[0], unusable, rows) if champion else None
    work.write_json("report.json", report)
    tables.write_parquet(_predictions_table(rows, predictions), work.path("predictions.parquet"))
    with _timed(work, "reference"):
        _keep_reference(work, candidate, predictions["candidate"])
    result = Result(metrics=_flat(report), reasons=_undefined(report))
    result.metrics |= _measurements(work, training, candidate, table)
    result.facts = {"rows": len(rows.y), "primary": report["primary"]}
    with _timed(work, "figures"):
        result.links = _figures(work, rows, measured, report)
    return result


def _open_candidate(work: Work, training: Manifest) -> tuple[Exported, Exported, str]:
    """Return candidate, baseline and where the holdout starts."""
    candidate = exported.load(work.open_input, training, "candidate")
    if candidate.schema.task != work.spec.task:
        raise UserError(
            f"the candidate was trained for {candidate.schema.task}, spec.yaml says {work.spec.task}",
            hint=f"train {work.config.key} again",
        )
    baseline = exported.load(work.open_input, training, "baseline", "baseline.onnx")
    return candidate, baseline, _holdout_start(work, training)


def _holdout_start(work: Work, training: Manifest) -> str:
    """Return where a training's holdout starts: all that it was fitted and tuned on is earlier."""
    return str(json.loads(work.open_input(training, "split.json").read_bytes())["holdout_start"])


def _champion(
    work: Work, training: Manifest, table: pa.Table, candidate: Exported
) -> tuple[str, Array | None, tuple[str, ...]]:
    """Return why the champion cannot be compared (or nothing), its predictions, and the classes both know.

    A champion that cannot score today's features is no reason to keep it: it could not serve them either.
    """
    try:
        champion = exported.load(work.open_input, training, f"champion of {training.key}")
        if champion.schema.task != work.spec.task:
            raise DataError(f"the champion of {training.key} was trained for {champion.schema.task}")
        values = champion.predict(table)
        _holdout_start(work, training)  # that it can be told what the champion has seen
    except UserError as e:  # its file is gone or cannot be loaded, or the features are others now
        work.log.warning(f"the champion cannot be compared: {e.message}")
        return e.message, None, candidate.schema.classes
    if work.spec.task != "multiclass":
        return "", values, ()
    known = (*candidate.schema.classes, *(c for c in champion.schema.classes if c not in candidate.schema.classes))
    return "", _reordered(values, champion.schema.classes, known), known


def _told(work: Work, training: Manifest, unusable: str, rows: Holdout) -> dict[str, Any]:
    """Return what the report says of the champion; `seen`: the share of these rows before its training's end."""
    if unusable:
        return {"window": training.key, "unusable": unusable}
    end = _holdout_start(work, training)
    return {
        "window": training.key,
        "unusable": None,
        "fitted_until": end,
        "seen": holdout.share_before(rows.table, end),
    }


def _reordered(values: Array, own: tuple[str, ...], known: tuple[str, ...]) -> Array:
    """Return probabilities [N, C] in the order of `known`; 0 for a class the model does not know."""
    out = np.zeros((len(values), len(known)))
    out[:, [known.index(c) for c in own]] = values
    return out


def _aligned(values: Array, candidate: Exported, classes: int) -> Array:
    """Return predictions with one column per class; the candidate's classes come first, so only zeros are added."""
    if candidate.schema.task != "multiclass" or values.shape[1] == classes:
        return values
    return np.pad(values, ((0, 0), (0, classes - values.shape[1])))


def _report(
    work: Work, params: EvaluateParams, rows: Holdout, predictions: Predictions, candidate: Exported, start: str
) -> dict[str, Any]:
    task = work.spec.task
    primary = PRIMARY[task]
    numbers = {n: metrics.all_metrics(task, rows.y, p) for n, p in predictions.items()}
    units = bootstrap.units(holdout.moments(rows.table))
    with _timed(work, "bootstrap"):
        compared = _compare(work, params, rows, predictions, units)
    times = pc.min_max(rows.table[tables.PREDICTION_TIME]).as_py()
    return {
        "task": task,
        "primary": primary,
        "rows": {
            "count": len(rows.y),
            "holdout_start": start,
            "first": times["min"].isoformat(),
            "last": times["max"].isoformat(),
            "sample": work.config.sample,
            "mean_label": None if task == "multiclass" else float(rows.mean_label.mean()),
            "classes": list(rows.classes),
        },
        "metrics": {n: {k: _finite(v) for k, v in values.items()} for n, values in numbers.items()},
        "comparisons": {n: {k: _finite(v) for k, v in asdict(d).items()} for n, d in compared.items()},
        "bootstrap": {"by": units.by, "units": units.count},
        "promise": {
            name: _promise(work, rows, predictions[name], candidate, units)
            for name in ("candidate", "champion")
            if name in predictions
        },
        "slices": _slices(rows, predictions["candidate"], candidate, primary),
        "disparity": _disparity(work, rows, predictions["candidate"]),
        "best_single_feature": leaks.best_single_feature(rows, candidate.schema, task),
    }


def _compare(
    work: Work, params: EvaluateParams, rows: Holdout, predictions: Predictions, units: bootstrap.Units
) -> dict[str, Difference]:
    task = work.spec.task
    statistics = {n: bootstrap.primary_statistic(task, rows.y, p) for n, p in predictions.items()}
    candidate = statistics.pop("candidate")
    with work.progress("bootstrap", params.draws, "draws") as tick:
        return bootstrap.differences(
            candidate,
            statistics,
            len(rows.y),
            higher_is_better=METRICS[PRIMARY[task]],
            draws=params.draws,
            seed=params.seed,
            by=units,
            on_draws=tick,
        )


def _promise(work: Work, rows: Holdout, p: Array, candidate: Exported, units: bootstrap.Units) -> dict[str, Any] | None:
    """Return what a model promises on the primary metric, and how surely: monitoring holds it to that."""
    task = work.spec.task
    whole = certainty.of_primary(task, rows.y, p, units)
    if whole is None:
        return None
    by_slice = {}
    for name in candidate.schema.vocabularies:
        found = certainty.of_slices(task, *holdout.groups(rows.table, name), rows.y, p, units)
        by_slice[name] = {value: one.told(PRIMARY[task]) for value, one in found.items()}
    return {**whole.told(PRIMARY[task]), "slices": by_slice}


def _slices(rows: Holdout, p: Array, candidate: Exported, primary: str) -> dict[str, list[dict[str, Any]]]:
    task, out = candidate.schema.task, {}
    for name in candidate.schema.vocabularies:
        values, place = holdout.groups(rows.table, name)
        if found := slices.of_column(values, place, rows.y, p, task, primary):
            out[name] = found
    return out


def _disparity(work: Work, rows: Holdout, p: Array) -> dict[str, Any] | None:
    wanted = work.spec.disparity
    if wanted is None:
        return None
    values, place = holdout.groups(rows.table, wanted.by)
    return {"by": wanted.by, **slices.disparity(values, place, rows.y, p, work.spec.task, wanted)}


def _predictions_table(rows: Holdout, predictions: Predictions) -> pa.Table:
    """One row per holdout row; predictions as the graphs made them (the champion's classes in the known order)."""
    table = rows.table.select([tables.KEY, tables.LABEL])
    for name in ("candidate", "baseline", "champion"):
        if name in predictions:
            table = table.append_column(name, _arrow(predictions[name]))
    return table.combine_chunks()


def _arrow(values: Array) -> pa.Array:
    flat = pa.array(values.astype(np.float32).ravel())
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _keep_reference(work: Work, candidate: Exported, predictions: Array) -> None:
    files = [work.open_input(m, "features.parquet") for m in work.inputs("features")]
    made = reference.make(files, candidate.schema, predictions, work.config.key, work.config.sample)
    work.write_json(reference.FILE, made.to_dict())


def _measurements(work: Work, training: Manifest, candidate: Exported, table: pa.Table) -> dict[str, float]:
    with _timed(work, "latency"):
        latency = candidate.latency(table)
    return {
        "p50_ms": round(latency.p50_ms, 4),
        "p99_ms": round(latency.p99_ms, 4),
        "size_mb": round(training.files["model.onnx"].size / 1e6, 4),
    }


def _flat(report: dict[str, Any]) -> dict[str, float]:
    """Return the report's metrics and differences under flat names: auc, baseline_auc, champion_delta …"""
    out: dict[str, float] = {}
    for model, values in report["metrics"].items():
        prefix = "" if model == "candidate" else f"{model}_"
        out |= {f"{prefix}{k}": v for k, v in values.items() if v is not None}
    for model, values in report["comparisons"].items():
        out |= {f"{model}_{k}": values[k] for k in ("delta", "low", "high") if values[k] is not None}
    return out


def _undefined(report: dict[str, Any]) -> list[str]:
    names = [k for k, v in report["metrics"]["candidate"].items() if v is None]
    if not names:
        return []
    why = "the labels are all the same" if report["rows"]["mean_label"] is not None else "of these labels"
    return [f"not defined on the {report['rows']['count']:,} holdout rows ({why}): {', '.join(names)}"]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _figures(work: Work, rows: Holdout, predictions: Predictions, report: dict[str, Any]) -> dict[str, str]:
    from orrery.evaluation import figures  # matplotlib takes longer to import than all the rest to run

    title = f"{work.config.project} {work.config.key}"
    drawn = figures.draw(title, work.spec.label.column, rows.y, predictions, report)
    links = {name: work.evidence(f"{name.lower().replace(' ', '_')}.png", data) for name, data in drawn.items()}
    return {"Curves": work.evidence("curves.html", figures.page(title, drawn)), **links} if links else {}


@contextmanager
def _timed(work: Work, what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    work.log.info(f"evaluate: {what}", seconds=round(time.monotonic() - began, 2))
