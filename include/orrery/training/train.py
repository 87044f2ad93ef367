"""`train`: the window's features -> a candidate: model.onnx, the baseline beside it, and how both came about.

model.py's `build` (torch) is trained here, on 1..N processes; its `fit` (any library) trains itself.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from orrery.contract import Result, TrainParams, refuse_uneven
from orrery.errors import DataError, SpecError, TryAgain, UserError
from orrery.step import Work
from orrery.training import Dataset, baseline, settings, signature, user_model
from orrery.training.interval import Observed
from orrery.training.prepare import Prepared, prepared
from orrery.training.user_model import UserModel

if TYPE_CHECKING:
    from orrery.registry.client import Run
    from orrery.training.worker import Watch


@dataclass(frozen=True)
class Trained:
    """What both ways of training leave, beside the files."""

    params: dict[str, Any]
    history: list[dict[str, float]]
    metrics: dict[str, float]
    facts: dict[str, Any]


def run(work: Work, params: TrainParams) -> Result:
    """Train on the config's window. Raises `SpecError` for model.py, `DataError` for data that cannot be trained on."""
    if not work.node.leads:
        return _along(work, params)
    from orrery.registry import tracking

    with tracking.begun(work) as tracked:
        return _train(work, params, tracked)


def _along(work: Work, params: TrainParams) -> Result:
    """Train along with node 0, which keeps the model and tells of it: from the same data, prepared here as well."""
    model = user_model.load(work.project_folder, work.config.project)
    _refuse_nodes(work, model)
    chosen = user_model.values(model, {**_tuned(work, model), **params.overrides})
    with_workers(work, params, chosen, prepared(work, lanes(work, params.processes)), None)
    return Result(facts={"node": work.node.number})


def _refuse_nodes(work: Work, model: UserModel) -> None:
    """Raise `SpecError` for a model that trains itself: it would do so on each node anew."""
    if model.kind == "fit" and work.node.of > 1:
        raise SpecError(
            f"model.py's fit trains in one process, and the compute class has pods: {work.node.of}",
            hint="a compute class with one pod, or `build` instead of `fit`",
        )


def _train(work: Work, params: TrainParams, tracked: Run | None) -> Result:
    model = user_model.load(work.project_folder, work.config.project)
    _refuse_nodes(work, model)
    chosen = user_model.values(model, {**_tuned(work, model), **params.overrides})
    found = prepared(work, lanes(work, params.processes))
    work.log.info("training", model=model.kind, **found.rows, features=len(found.schema.columns))
    facts = _baseline(work, found)
    if model.kind == "build":
        trained = _with_torch(work, params, chosen, found, tracked)
    else:
        trained = _with_library(work, model, chosen, found)
    work.write("schema.json", (found.schema.model_dump_json() + "\n").encode())
    work.write_json("params.json", trained.params)
    work.write_json("split.json", found.bounds)
    return _result(work, params, found, model, trained, facts)


def _baseline(work: Work, found: Prepared) -> dict[str, Any]:
    """Fit the straight line and hold it to the signature; return what the result tells of it."""
    rows = found.sample("fit")
    line = baseline.fit(rows)
    work.write("baseline.onnx", line)
    signature.predict(line, found.sample("tune"), "the baseline")
    if not found.streamed:
        return {}
    work.log.info("the baseline is fitted on row groups spread over the fit part", rows=rows.rows, of=found.fit_rows)
    return {"baseline_rows": rows.rows}


def _tuned(work: Work, model: UserModel) -> dict[str, Any]:
    """Return the parameters that the newest search has found, as far as model.py still has them."""
    found: dict[str, Any] = {}
    for manifest in work.inputs("tuned"):
        found = json.loads(work.open_input(manifest, "params.json").read_bytes())
        work.log.info("parameters by the search on", window=manifest.key, **found)
    for name in sorted(found.keys() - model.params.model_fields.keys()):
        work.log.warning(f"the search found {name}={found.pop(name)!r}, but model.py's Params has no {name} any more")
    return found


def _with_torch(work: Work, params: TrainParams, chosen: BaseModel, found: Prepared, tracked: Run | None) -> Trained:
    """Fit `build`'s module; its workers write model.onnx and weights.safetensors."""
    files = work.path("model.onnx"), work.path("weights.safetensors")
    numbers, report = with_workers(work, params, chosen, found, tracked, files=files)
    history, best = report["history"], report["best_epoch"]
    metrics = {**history[best - 1], "epochs": float(len(history))}
    facts = {k: report[k] for k in ("weights_digest", "best_epoch", "head", "steps", "device")}
    return Trained({**numbers, **chosen.model_dump(mode="json")}, history, metrics, facts)


def with_workers(
    work: Work,
    params: TrainParams,
    chosen: BaseModel,
    data: Prepared,
    tracked: Run | None,
    *,
    files: tuple[Path, Path] | None = None,
    predictions: Path | None = None,
    watch: Watch | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit `build`'s module with torchrun's workers; return the loop's numbers, and a report.

    `files`: where the model as ONNX and its weights go; `predictions`: where those of the tune part go (a trial of a
    search wants no more). What the watch has stopped has neither, and a report with `stopped`.
    Raises `Interrupted` when it is told to stop; the next attempt goes on from the checkpoint.
    """
    from orrery.training import launch, worker

    wanted = work.spec.train
    refuse_uneven(params.processes, work.node.of)
    numbers = settings.from_params(chosen, params.processes, wanted)
    if data.fit_rows < params.processes:
        raise DataError(f"{data.fit_rows} rows to fit on, for {params.processes} processes", hint="see train.processes")
    checkpoints = f"{work.config.project}/{work.config.verb}/{work.address}/checkpoints"
    job = worker.Job(
        project_folder=work.project_folder, project=work.config.project, params=chosen.model_dump(mode="json"),
        settings=numbers, seed=params.seed, data=data, scratch=work.scratch, checkpoint=wanted.checkpoint,
        onnx=files[0] if files else None, weights=files[1] if files else None, predictions=predictions,
        store=work.store.uri, checkpoints=checkpoints, attempt=work.config.folder, tracked=tracked, watch=watch,
        lanes=lanes(work, params.processes), observed=Observed(params.interruptions, params.observed_s),
    )  # fmt: skip
    report = launch.run(job, params.processes, work.scratch, work.node)
    work.afterwards(lambda: work.store.remove(checkpoints))
    return numbers.numbers, report


def lanes(work: Work, processes: int) -> int:
    """Return into how many lanes a large window's rows are dealt: a training may go on with fewer processes."""
    return max(work.spec.train.processes, processes)


def _with_library(work: Work, model: UserModel, chosen: BaseModel, found: Prepared) -> Trained:
    """Let `fit` train, take the ONNX graph that its model writes, and hold it to the signature.

    It is given all rows, of a window too large for memory in arrays mapped from files; its losses are a sample's then.
    """
    data = signature.graph_bytes(user_model.fitted(model, found.dataset("fit"), found.dataset("tune"), chosen))
    fit, tune = found.sample("fit"), found.sample("tune")
    losses = {
        "fit_loss": _loss(signature.predict(data, fit, "model.py's to_onnx()"), fit, fit),
        "tune_loss": _loss(signature.predict(data, tune, "model.py's to_onnx()"), tune, fit),
    }
    work.write("model.onnx", data)
    facts = {"weights_digest": hashlib.sha256(data).hexdigest()}
    return Trained(chosen.model_dump(mode="json"), [], losses, facts)


def _loss(prediction: npt.NDArray[np.float32], data: Dataset, fit: Dataset) -> float:
    """Return the mean loss: cross-entropy, or the squared error in units of the fit part's variance."""
    p, label = prediction.astype(np.float64), data.label
    if data.schema.task == "regression":
        return float(((p - label) ** 2).mean() / (np.var(fit.label, dtype=np.float64) or 1.0))
    if data.schema.task == "multiclass":
        of_truth = p[np.arange(len(p)), label.astype(np.int64)]
    else:
        of_truth = np.where(label > 0, p, 1 - p)
    return float(-np.log(np.maximum(of_truth, 1e-7)).mean())


def _result(
    work: Work, params: TrainParams, found: Prepared, model: UserModel, trained: Trained, told: dict[str, Any]
) -> Result:
    rows, schema = found.rows, found.schema
    metrics = {**trained.metrics, "rows": float(rows["fit"] + rows["tune"])}
    facts = {
        "kind": model.kind,
        **trained.facts,
        "rows": rows,
        **told,
        "split": found.bounds,
        "features": {"numeric": len(schema.numeric), "categorical": len(schema.categorical)},
    }
    result = Result(metrics=metrics, facts=facts)
    if trained.history and trained.facts.get("best_epoch") == len(trained.history):
        result.reasons.append(f"the last of {len(trained.history)} epochs was the best: more of them may do better")
    if page := _tracked(work, {**trained.params, "seed": params.seed, "processes": params.processes}, trained, metrics):
        result.links["MLflow run"] = page
    return result


def _tracked(work: Work, told: dict[str, Any], trained: Trained, metrics: dict[str, float]) -> str | None:
    """Log the training to MLflow and return its page; an MLflow that is away costs a warning, not the training."""
    from orrery.registry import tracking

    run_id = tracking.log_training(work, told, trained.history, metrics)
    if run_id is None:
        return None
    try:
        return tracking.url(run_id)
    except (TryAgain, UserError) as e:
        work.log.warning(f"the training is in MLflow as {run_id}, its page is not known: {e.message}")
        return None
