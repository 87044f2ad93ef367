"""`tune`: the best trial's parameters where it is surely better than the defaults; else the defaults.

Both were trained on the same rows and are compared on the same rows, the window's tune part, by the paired bootstrap
that the gate uses. The best of many trials has also been lucky on these rows; so the last word is the gate's, on a
holdout that no search has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.contract import Result, TuneParams
from orrery.errors import OrreryError
from orrery.evaluation import bootstrap
from orrery.evaluation.bootstrap import Difference
from orrery.registry import tracking
from orrery.spec import METRICS, PRIMARY
from orrery.step import Work
from orrery.store import Manifest
from orrery.training import user_model
from orrery.tuning import figures
from orrery.tuning.outcome import DEFAULTS, KEPT, NAME, PREDICTIONS, TRUTH, TUNED, Outcome
from orrery.tuning.space import Space, space

PAGE = "tuning.html"


@dataclass(frozen=True)
class Decision:
    """What is decided: the trial whose parameters count, and why. `difference` is that to the defaults."""

    chosen: Outcome
    verdict: str
    reasons: list[str]
    difference: Difference | None = None


def run(work: Work, params: TuneParams) -> Result:
    """Decide a search whose trials are all there, and publish the parameters that trainings take from now on."""
    trials = [Outcome.model_validate(work.store.read_json(m.uri(NAME))) for m in work.inputs("trials")]
    _told(work, params, trials)
    decision = decide(work, params, trials)
    work.write_json("params.json", decision.chosen.params if decision.verdict == TUNED else {})
    work.write_json("trials.json", [trial.model_dump(mode="json") for trial in trials])
    searched = _space(work)
    weights = importances(searched, trials)
    title = f"{work.config.project} {work.config.key}: {decision.verdict}"
    page = work.evidence(PAGE, figures.page(title, decision.reasons, trials, decision.chosen, weights))
    result = Result(
        verdict=decision.verdict,
        reasons=decision.reasons,
        metrics=_metrics(trials, decision),
        facts={"primary": trials[DEFAULTS].metric, "trial": decision.chosen.number, "params": decision.chosen.params},
        links={"Tuning": page},
    )
    search = tracking.Search(params.study, f"tune {work.config.key}")
    told = {"verdict": decision.verdict, "trial": decision.chosen.number, **decision.chosen.params}
    if run_id := tracking.log_search(work, search, told, result.metrics):
        try:
            result.links["MLflow run"] = tracking.url(run_id)
        except OrreryError as e:
            work.log.warning(f"the search is in MLflow as {run_id}, its page is not known: {e.message}")
    return result


def decide(work: Work, params: TuneParams, trials: list[Outcome]) -> Decision:
    """Return whose parameters count: the best trial's, when the whole 95 % interval is on its side."""
    defaults, metric = trials[DEFAULTS], PRIMARY[work.spec.task]
    best = best_of(trials, METRICS[metric])
    if best.number == DEFAULTS:
        return Decision(defaults, KEPT, [f"no trial of {len(trials)} was better than the defaults: {_said(defaults)}"])
    manifests = work.inputs("trials")
    y, moments = (_array(work, manifests[DEFAULTS], name) for name in TRUTH)
    units = bootstrap.units(moments)
    task = work.spec.task

    def statistic(number: int) -> bootstrap.Statistic:
        return bootstrap.primary_statistic(task, y, _array(work, manifests[number], PREDICTIONS).astype(np.float64))

    with work.progress("bootstrap", params.draws, "draws") as tick:
        found = bootstrap.differences(
            statistic(best.number), {"defaults": statistic(DEFAULTS)}, len(y),
            higher_is_better=METRICS[metric], draws=params.draws, seed=params.seed, by=units, on_draws=tick,
        )["defaults"]  # fmt: skip
    sure = bool(found.low > 0)  # NaN is no reason to change anything
    interval = f"95 % interval {found.low:+.4f} to {found.high:+.4f}, {units.count:,} {units.by}s of the tune part"
    word = "surely better" if sure else "not surely better"
    reasons = [
        f"trial {best.number} ({_said(best)}) is {word} than the defaults ({_said(defaults)}) by "
        f"{found.delta:.4f} {metric} ({interval})",
        "trainings of this window and later ones take its parameters, below train.params of spec.yaml"
        if sure
        else "the defaults stay: a search among many finds one that was lucky on these rows",
    ]
    return Decision(best if sure else defaults, TUNED if sure else KEPT, reasons, found)


def best_of(trials: list[Outcome], higher_is_better: bool) -> Outcome:
    """Return the best complete trial; of equals the first."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    sign = 1.0 if higher_is_better else -1.0
    return max(complete, key=lambda trial: (sign * (trial.value or 0.0), -trial.number))


def importances(searched: Space, trials: list[Outcome]) -> dict[str, float]:
    """Return each parameter's share in how far trials differ (PED-ANOVA, Watanabe et al. 2023), largest first.

    Nothing where there are too few complete trials, or they are all alike.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    complete = [t for t in trials if t.state == "complete" and t.value is not None]
    if len(complete) < figures.FEWEST or len({t.value for t in complete}) < 2:
        return {}
    study = optuna.create_study(direction="maximize" if METRICS[complete[0].metric] else "minimize")
    kinds = searched.distributions()
    for trial in complete:
        point = {n: v for n, v in searched.to_optuna(trial.params).items() if n in kinds}
        study.add_trial(optuna.trial.create_trial(params=point, distributions=kinds, value=trial.value))
    try:
        found = optuna.importance.get_param_importances(study)
    except (ValueError, RuntimeError):  # it says so of searches in which nothing made a difference
        return {}
    return {name: float(share) for name, share in found.items() if np.isfinite(share)}


def _space(work: Work) -> Space:
    model = user_model.load(work.project_folder, work.config.project)
    return space(model.params, work.spec.train.params)


def _told(work: Work, params: TuneParams, trials: list[Outcome]) -> None:
    """Bring the study to what is committed, for whoever looks at it. It decides nothing."""
    from orrery.tuning.study import Study, Where

    higher = METRICS[PRIMARY[work.spec.task]]
    try:
        study = Study(Where(params.storage, work.config.project, params.study, higher), _space(work))
        late = [trial.number for trial in trials if study.tell(trial)]
    except OrreryError as e:
        work.log.warning(f"the study does not know all trials: {e.message}")
        return
    if late:
        work.log.info("the study is told of committed trials", trials=late)


def _array(work: Work, manifest: Manifest, name: str) -> npt.NDArray[Any]:
    return np.asarray(np.load(work.open_input(manifest, name), allow_pickle=False))


def _metrics(trials: list[Outcome], decision: Decision) -> dict[str, float]:
    metric, count = trials[DEFAULTS].metric, len(trials)
    found = {metric: decision.chosen.value or 0.0, f"defaults_{metric}": trials[DEFAULTS].value or 0.0}
    if decision.difference is not None:
        found |= {"better_by": decision.difference.delta, "better_by_low": decision.difference.low}
    states = {state: float(sum(t.state == state for t in trials)) for state in ("pruned", "failed")}
    return {**found, "trials": float(count), **states}


def _said(trial: Outcome) -> str:
    return f"{trial.metric} {trial.value:.4f}"
