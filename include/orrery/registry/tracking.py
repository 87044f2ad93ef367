"""One MLflow run per training attempt, and what it was made from. A training never fails for want of MLflow.

`begun` makes the run when the training starts and closes it when the training fails; `Live` sends the metrics of
each epoch while it goes on; `log_training` completes the run at the end. All three write the same points, so a
number that was sent twice, or never, makes no difference to what is there in the end.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orrery.errors import Interrupted, OrreryError, TryAgain, UserError
from orrery.lease import Lease
from orrery.registry import client, wandb_log
from orrery.registry.client import ADDRESS_TAG, Mlflow, Run
from orrery.step import Work
from orrery.store import Manifest

# The server's own limits per request and value (mlflow/utils/validation.py).
MAX_METRICS, MAX_PARAMS, MAX_PARAM, MAX_TAG = 1000, 100, 6000, 5000
ATTEMPT_TAG = "orrery.attempt"
# MLflow's own tag, by which it shows runs within a run; ours tell a search's run from those of its trials.
PARENT_TAG, STUDY_TAG, SEARCH_TAG = "mlflow.parentRunId", "orrery.study", "orrery.search"
# A training waits this long for one answer; registering later, with nothing else to do, waits longer.
ANSWER_S = 10.0
# While it goes on, or when it is told to stop, it waits for less: what is lost is sent at the end, or was not to be.
LIVE_S = 3.0


@dataclass(frozen=True)
class Search:
    """The run under which MLflow shows the trials of a search: found by its key, or made with this name."""

    key: str
    name: str


@contextmanager
def begun(work: Work, within: Search | None = None, name: str = "") -> Iterator[Run | None]:
    """Make the attempt's run, and close it as failed when the block raises. None without an MLflow that answers.

    A trial's run is nested `within` its search's.
    """
    run: Run | None = None
    try:
        server = client.from_environment(ANSWER_S)
        run = attempt_run(server, work, within, name) if server else None
    except (TryAgain, UserError) as e:  # Interrupted goes on up
        work.log.warning(f"the training is not in MLflow yet: {e.message}")
    try:
        yield run
    except BaseException as e:
        if run is not None:
            _close(run, "KILLED" if isinstance(e, Interrupted) else "FAILED")
        raise


def _close(run: Run, status: str) -> None:
    """Say how a run ended; whoever is told to stop has a few seconds for it."""
    try:
        server = client.from_environment(LIVE_S)
        if server is not None:
            server.call("POST", "runs/update", run_id=run.id, status=status, end_time=int(time.time() * 1000))
    except OrreryError:
        pass  # the error that led here is the one to tell


class Live:
    """Sends an epoch's metrics to MLflow from a thread of its own: the training neither waits for it nor fails by it.

    It may be made in one process and used in another (a training's rank 0); the thread starts with the first epoch.
    """

    def __init__(self, run: Run | None) -> None:
        self._run = run
        self._waiting: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def epoch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of an epoch, counted from 0."""
        if self._run is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, args=(self._run,), daemon=True)
            self._thread.start()
        self._waiting.put((step, dict(metrics)))

    def end(self) -> None:
        """Wait for what is on its way, but not for long."""
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join(LIVE_S)

    def _send(self, run: Run) -> None:
        items = [self._waiting.get()]
        while items[-1] is not None:
            while items[-1] is not None and not self._waiting.empty():  # quick epochs go together
                items.append(self._waiting.get())
            told = [item for item in items if item is not None]
            points = [_metric(k, v, step, run) for step, of in told for k, v in of.items() if math.isfinite(v)]
            try:
                server = client.from_environment(LIVE_S)
                if server is not None:
                    for chunk in _chunks(points, MAX_METRICS):
                        server.call("POST", "runs/log-batch", run_id=run.id, metrics=chunk)
            except OrreryError:
                return  # it is away: the end of the training sends all of them
            if items[-1] is not None:
                items = [self._waiting.get()]


def log_training(
    work: Work,
    params: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    metrics: Mapping[str, float],
    within: Search | None = None,
    name: str = "",
) -> str | None:
    """Log one training attempt; return its run's id, or None when there is no MLflow or it does not answer.

    `history` has one mapping per epoch. Called again for the same attempt it completes the same run. Where the
    platform has Weights & Biases, it is logged there too.
    """
    wandb_log.log(work, params, history, metrics, name, within.key if within else "")
    try:
        server = client.from_environment(ANSWER_S)
        return (
            None if server is None else _log(server, attempt_run(server, work, within, name), params, history, metrics)
        )
    except (TryAgain, UserError) as e:  # Interrupted goes on up
        work.log.warning(f"the training is not in MLflow: {e.message}")
        return None


def log_search(work: Work, search: Search, params: Mapping[str, Any], metrics: Mapping[str, float]) -> str | None:
    """Complete a search's run with what came of it; return its id, or None as `log_training` does."""
    try:
        server = client.from_environment(ANSWER_S)
        return None if server is None else _log(server, _search_run(server, work, search), params, [], metrics)
    except (TryAgain, UserError) as e:
        work.log.warning(f"the search is not in MLflow: {e.message}")
        return None


def _log(
    server: Mlflow,
    run: Run,
    params: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    metrics: Mapping[str, float],
) -> str:
    # All at the run's start: logging again adds no second point.
    points = [_metric(k, v, step, run) for step, epoch in enumerate(history) for k, v in epoch.items()]
    points += [_metric(k, v, len(history), run) for k, v in metrics.items()]
    told = [{"key": k, "value": _text(v)[:MAX_PARAM]} for k, v in params.items()]
    for chunk in _chunks(told, MAX_PARAMS):
        server.call("POST", "runs/log-batch", run_id=run.id, params=chunk)
    for chunk in _chunks([p for p in points if math.isfinite(p["value"])], MAX_METRICS):
        server.call("POST", "runs/log-batch", run_id=run.id, metrics=chunk)
    server.call("POST", "runs/update", run_id=run.id, status="FINISHED", end_time=int(time.time() * 1000))
    return run.id


def attempt_run(server: Mlflow, work: Work, within: Search | None = None, name: str = "") -> Run:
    """Return the run of this attempt, made when it is not there."""
    config = work.config
    experiment = server.experiment(config.project)
    found = server.find_run(experiment, ATTEMPT_TAG, config.folder)
    if found is not None:
        return found
    tags = lineage(work.config.project, config.key, config.fingerprint, config.bundle, work.inputs("features"))
    tags |= {"orrery.run": config.run, ATTEMPT_TAG: config.folder, ADDRESS_TAG: work.address}
    if within is not None:
        tags |= {PARENT_TAG: _search_run(server, work, within).id, SEARCH_TAG: within.key}
    return server.create_run(experiment, (name or f"{config.key} {config.run}")[:250], tags, int(time.time() * 1000))


def _search_run(server: Mlflow, work: Work, search: Search) -> Run:
    """Return the run of a whole search, made when it is not there. Trials that begin at once find the same one."""
    experiment = server.experiment(work.config.project)

    def oldest() -> Run | None:
        return server.find_run(experiment, STUDY_TAG, search.key)

    found = oldest()
    if found is not None:
        return found
    tags = lineage(work.config.project, work.config.key, {}, work.config.bundle, work.inputs("features"))
    attempt = work.config.folder
    # One trial at a time, by a lease: MLflow would take two runs of one search.
    with Lease(work.store, f"{work.config.project}/tune/at-{search.key}/lease", attempt, attempt):
        now = int(time.time() * 1000)
        return oldest() or server.create_run(experiment, search.name[:250], tags | {STUDY_TAG: search.key}, now)


def lineage(
    project: str, window: str, fingerprint: Mapping[str, str], bundle: str, data: Iterable[Manifest]
) -> dict[str, str]:
    """Return the tags that say what a model was made from: code, environment, project folder, data."""
    return {
        "orrery.project": project,
        "orrery.window": window,
        "orrery.code": fingerprint.get("code", ""),
        "orrery.environment": fingerprint.get("environment", ""),
        "orrery.bundle": bundle,
        "orrery.data": _data(list(data)),
    }


def _data(manifests: list[Manifest]) -> str:
    """Return the data's manifests as JSON; of too many, the first ones and how many there are."""
    entries = [{"key": m.key, "path": m.path, "digest": m.digest} for m in manifests]
    kept = entries
    while len(text := json.dumps({"count": len(entries), "manifests": kept})) > MAX_TAG:
        kept = kept[: len(kept) // 2]
    return text


def url(run_id: str) -> str:
    """Return the page of a run. Raises `TryAgain` when MLflow cannot be reached."""
    server = client.needed()
    return server.run_page(server.run(run_id))


def _metric(key: str, value: float, step: int, run: Run) -> dict[str, Any]:
    return {"key": key, "value": float(value), "step": step, "timestamp": run.started}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _chunks(items: list[dict[str, Any]], size: int) -> Iterable[list[dict[str, Any]]]:
    return (items[i : i + size] for i in range(0, len(items), size))
