"""`trial`: one point of a search. Ask for its parameters once, train with them, commit how that went.

Killed, it is taken up again with the parameters that it had asked for. Its first duty is the study's: what other
trials have committed and not told (killed in between, or the storage was away) is told before this one asks.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orrery.contract import Result, TrainParams, TrialParams
from orrery.data.tables import LABEL, LABEL_TIME, PREDICTION_TIME
from orrery.errors import DataError, OrreryError, RequestError, SpecError, UserError
from orrery.evaluation import metrics
from orrery.registry import tracking
from orrery.spec import METRICS, PRIMARY
from orrery.step import Work
from orrery.training import Dataset, dataset, labels, signature, train, user_model
from orrery.training.prepare import Prepared, prepared
from orrery.training.split import EPOCH, Bounds, micros
from orrery.training.user_model import UserModel
from orrery.tuning.outcome import CHAMPION, DEFAULTS, NAME, PREDICTIONS, TRUTH, Outcome
from orrery.tuning.space import Space, space
from orrery.tuning.study import Asked, Study, Where

if TYPE_CHECKING:
    from orrery.registry.client import Run


@dataclass(frozen=True)
class Tried:
    """What a training with the trial's parameters left: the loss of each epoch, and the predictions if it ended."""

    history: list[dict[str, float]]
    predictions: npt.NDArray[np.float32] | None


@dataclass
class Pruning:
    """Tells the study each epoch's loss from the training's first process, and asks whether it is worth going on.

    Made in one process and used in another: the study is opened there. A study that cannot be reached stops nothing.
    """

    where: Where
    space: Space
    trial: int
    _study: Study | None = field(default=None, init=False)
    _away: bool = field(default=False, init=False)

    def __call__(self, epoch: int, losses: dict[str, float]) -> bool:
        if self._away:
            return False
        try:
            self._study = self._study or Study(self.where, self.space)
            return self._study.report(self.trial, epoch, losses["tune_loss"])
        except OrreryError as e:
            from orrery import log

            log.get().warning(f"the trial is not compared with the others any more: {e.message}")
            self._away = True
            return False


def run(work: Work, params: TrialParams) -> Result:
    """Train with one point of the search. Raises `SpecError` for model.py, `DataError` for the data.

    Parameters that cannot be trained with (the loss is not a number) are a failed trial and no error, but for
    the defaults.
    """
    model = user_model.load(work.project_folder, work.config.project)
    searched = space(model.params, work.spec.train.params)
    where = where_of(work, params)
    study = Study(where, searched)
    _reconcile(work, params, study)
    asked = study.ask(params.number, _given(work, params, searched), _terms(work).seed)
    how = "goes on with what it had asked for" if asked.again else "begins"
    work.log.info(f"trial {params.number} {how}", **asked.params)
    pruning = Pruning(where, searched, asked.id) if where.prune and params.number != DEFAULTS else None
    parent = tracking.Search(params.study, f"tune {work.config.key}")
    with tracking.begun(work, within=parent, name=f"trial {params.number}") as tracked:
        outcome = _outcome(work, params, model, asked, pruning, tracked)
        told = {**asked.params, "trial": params.number}
        history = [{"tune_loss": loss} for loss in outcome.epochs]
        found = {} if outcome.value is None else {outcome.metric: outcome.value}
        tracking.log_training(work, told, history, found, within=parent, name=f"trial {params.number}")
    try:
        study.tell(outcome)  # whatever else is running may go by it at once
    except OrreryError as e:
        work.log.warning(f"the study will be told later: {e.message}")
    work.write_json(NAME, outcome.model_dump(mode="json"))
    return _result(params, outcome)


def where_of(work: Work, params: TrialParams) -> Where:
    """Return which study it is, and where."""
    higher = METRICS[PRIMARY[work.spec.task]]
    return Where(params.storage, work.config.project, params.study, higher, _terms(work).prune)


def _terms(work: Work) -> Any:
    if work.spec.tune is None:
        raise SpecError("spec.yaml has no `tune`", hint="add `tune: {trials: 20}`")
    return work.spec.tune


def _given(work: Work, params: TrialParams, searched: Space) -> dict[str, Any] | None:
    """Return the parameters of a trial that is no draw: the defaults, and what the champion was trained with."""
    if params.number == DEFAULTS:
        return searched.defaults
    if params.number != CHAMPION or not work.inputs("champion"):
        return None
    champion = work.input("champion")
    if "params.json" not in champion.files:
        return None
    found = searched.within(work.store.read_json(champion.uri("params.json")))
    if found == searched.defaults:
        work.log.info("the champion was trained with the defaults: this trial is drawn like the others")
        return None
    return found


def _reconcile(work: Work, params: TrialParams, study: Study) -> None:
    """Tell the study what is committed and not told: of trials that it takes for running; of all, when it is new."""
    known = study.trials()
    unsure = [n for n, trial in known.items() if not trial.state.is_finished()] if known else range(len(params.trials))
    for number in unsure:
        if number == params.number or number >= len(params.trials):
            continue
        path = f"{work.config.project}/trial/{params.trials[number]}/manifest.json"
        manifest = work.store.manifest(path)
        if manifest is not None:
            outcome = Outcome.model_validate(work.store.read_json(manifest.uri(NAME)))
            if study.tell(outcome):
                work.log.info(f"the study is told of trial {number}, which is committed", state=outcome.state)


def _outcome(
    work: Work, params: TrialParams, model: UserModel, asked: Asked, pruning: Pruning | None, tracked: Run | None
) -> Outcome:
    metric = PRIMARY[work.spec.task]
    data = prepared(work, work.spec.train.processes)
    tune = data.dataset("tune")
    known = {"number": params.number, "params": asked.params, "metric": metric}
    try:
        tried = _tried(work, model, {**asked.params, **work.spec.train.params}, data, tune, pruning, tracked)
    except UserError as e:
        if params.number == DEFAULTS or isinstance(e, DataError | RequestError):
            raise
        work.log.warning(f"trial {params.number} cannot be trained: {e.message}")
        return Outcome(**known, state="failed", why=e.message[:500])
    epochs = tuple(float(epoch["tune_loss"]) for epoch in tried.history)
    if tried.predictions is None:
        why = f"worse than the median of the others after epoch {len(epochs)}"
        return Outcome(**known, state="pruned", epochs=epochs, why=why)
    value = metrics.all_metrics(work.spec.task, tune.label, tried.predictions.astype(np.float64))[metric]
    if not np.isfinite(value) and params.number == DEFAULTS:
        raise DataError(f"{metric} is not a number on the tune part", hint="has it only one class? see split.tune")
    if not np.isfinite(value):
        return Outcome(**known, state="failed", epochs=epochs, why=f"{metric} is not a number on the tune part")
    work.write(PREDICTIONS, _npy(tried.predictions))
    if params.number == DEFAULTS:
        _write_truth(work, data, tune)
    return Outcome(**known, state="complete", value=float(value), epochs=epochs)


def _tried(
    work: Work,
    model: UserModel,
    overrides: dict[str, Any],
    data: Prepared,
    tune: Dataset,
    pruning: Pruning | None,
    tracked: Run | None,
) -> Tried:
    """Train once, as `train` does, and predict on the tune part. The model itself is not kept."""
    chosen, wanted = user_model.values(model, overrides), work.spec.train
    if model.kind == "fit":
        graph = signature.graph_bytes(user_model.fitted(model, data.dataset("fit"), tune, chosen))
        return Tried([], signature.predict(graph, tune, "model.py's to_onnx()"))
    told = TrainParams(processes=wanted.processes, seed=wanted.seed)
    made = work.scratch / "predictions.npy"
    _, report = train.with_workers(work, told, chosen, data, tracked, predictions=made, watch=pruning)
    return Tried(report["history"], None if report["stopped"] else np.load(made))


def _write_truth(work: Work, data: Prepared, tune: Dataset) -> None:
    """Keep what all trials are measured on, once: labels and prediction times of the tune part."""
    moments = _moments(work, data, tune)
    if moments is None:
        work.log.warning("the tune part is not in the order of its times: the bootstrap will draw rows, not days")
        moments = np.zeros(tune.rows, dtype=np.int64)
    work.write(TRUTH[0], _npy(np.asarray(tune.label)))
    work.write(TRUTH[1], _npy(moments))


def _moments(work: Work, data: Prepared, tune: Dataset) -> npt.NDArray[np.int64] | None:
    """Return `prediction_time` [N] of the tune part in microseconds; None where it has another order than the files."""
    starts = (datetime.fromisoformat(data.bounds[name]) for name in ("tune_start", "holdout_start"))
    bounds = Bounds(*((start - EPOCH) // timedelta(microseconds=1) for start in starts))
    times, truth = [], []
    for piece in dataset.Window(work).pieces((PREDICTION_TIME, LABEL, LABEL_TIME)):
        known = piece.filter(labels.is_known(piece[LABEL]))
        kept = known.filter(pa.array(bounds.masks(known)["tune"]))
        label = labels.encode(kept, tune.schema.task, tune.schema.classes)
        there = label >= 0 if tune.schema.task == "multiclass" else np.ones(len(label), dtype=np.bool_)
        times.append(micros(kept, PREDICTION_TIME)[there])
        truth.append(label[there])
    same = np.array_equal(np.concatenate(truth), tune.label)
    return np.concatenate(times) if same else None


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _result(params: TrialParams, outcome: Outcome) -> Result:
    facts = {"study": params.study, "trial": outcome.number, "state": outcome.state, "params": outcome.params}
    found = {} if outcome.value is None else {outcome.metric: outcome.value}
    metrics_ = {**found, **({"epochs": float(len(outcome.epochs))} if outcome.epochs else {})}
    reasons = [f"{outcome.named}: {outcome.state}, {outcome.why}"] if outcome.why else []
    verdict = None if outcome.state == "complete" else outcome.state
    return Result(verdict=verdict, metrics=metrics_, facts={**facts, "primary": outcome.metric}, reasons=reasons)
