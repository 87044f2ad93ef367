"""The tasks called `request`: they ask for a training, or take up what was asked. No process is started for them.

All that starts a training by itself comes through here, and all of it is on record first (`orrery.requests`). A
crash between the record and the event is mended by the retry: what this run asked and nobody took up is said again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowSkipException

from orrery import partitions, requests
from orrery.contract import Result
from orrery.errors import OrreryError
from orrery.orchestration import params
from orrery.orchestration.operators import record_refusal, unstarted
from orrery.orchestration.origin import by_person, on_record
from orrery.partitions import window_name
from orrery.plan import Planner
from orrery.requests import Source, TrainingRequest
from orrery.runner import record_unstarted
from orrery.spec import ModelSpec

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger("orrery.requests")


class InOrder(set[str]):
    """A set that is walked in order: Airflow announces a task's partitions as its set of them comes."""

    def __iter__(self) -> Iterator[str]:
        """Walk the texts sorted: keys of one size sort by time."""
        return iter(sorted(set(super().__iter__())))


class RequestOperator(BaseOperator):
    """What the tasks called `request` share: the strict reading, and a word in the ledger on how they ended."""

    ui_color = "#f3eef7"

    def __init__(self, *, project: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.project = project

    def execute(self, context: Context) -> dict[str, Any]:
        """Do it, and return what was asked or taken up. Raises `RequestError` (64) for a malformed run."""
        try:
            planner = Planner(self.project)
            asked = params.read(context, planner)
            return self.carry(context, planner, asked)
        except OrreryError as e:
            log.error("%s", e)
            record_refusal(context, self.project, "request", e)
            raise e.with_traceback(None) from None

    def carry(self, context: Context, planner: Planner, asked: params.Asked) -> dict[str, Any]:
        """Ask, or take up."""
        raise NotImplementedError

    def end(self, context: Context, planner: Planner, verdict: str, served: Iterable[TrainingRequest]) -> None:
        """Write down how the task ended, window by window: the note on the run is made of it."""
        told: dict[str, list[str]] = {}
        for request in served:
            log.info("%s %s: %s", verdict, request.window, request.told)
            told.setdefault(request.window, []).append(request.told)
        for window, reasons in told.items():
            result = Result(verdict=verdict, reasons=reasons)
            record_unstarted(planner.ledger, unstarted(context, self.project, "request"), window, result)

    def skip(self, context: Context, planner: Planner, key: str, why: str) -> NoReturn:
        """End as skipped, the reason on record: what comes after is skipped with it and nothing is announced."""
        result = Result(verdict="skipped", skipped=why)
        record_unstarted(planner.ledger, unstarted(context, self.project, "request"), key, result)
        raise AirflowSkipException(why)


class AskOperator(RequestOperator):
    """Asks for trainings: of the windows that a calendar has due, of the monitor's verdict, or of a person."""

    def carry(self, context: Context, planner: Planner, asked: params.Asked) -> dict[str, Any]:
        """Record what is asked, then announce it. Skipped with the reason when nothing is to be asked."""
        if asked.dry_run:
            raise AirflowSkipException("dry run: nothing was asked for")
        last = asked.partitions[-1]
        if params.verb_of(context["dag_run"]) == "monitor":
            key, (found, why) = last, self._monitored(context, planner, last)
        elif by_person(context["dag_run"]):
            key = window_name(asked.partitions)
            found, why = self._person(context, planner)
        elif by_features(planner.spec) and (later := _monitor_will_ask(planner, last)):
            key, found, why = last, [], later
        else:
            key, (found, why) = last, self._calendar(context, planner, last, f"the features of {last} have landed")
        if not found:
            self.skip(context, planner, key, why)
        self.end(context, planner, "asked", found)
        for outlet in self.outlets:
            context["outlet_events"][outlet].partition_keys = InOrder(r.window for r in found)
        return {"asked": sorted({r.window for r in found}), "requests": [r.key for r in found]}

    def _person(self, context: Context, planner: Planner) -> tuple[list[TrainingRequest], str]:
        mine = on_record(context, planner)
        assert mine is not None  # a dry run has ended before
        if not mine.open:
            return [], f"run {mine.taken_by} has taken it up"
        moment = context["dag_run"].run_after
        other = None if mine.force else requests.begun_since(_of(planner, mine.window), moment, "")
        if other is not None and requests.close(planner.ledger, mine, str(other.taken_by)):
            return [], f"run {other.taken_by} serves it: it began after this was asked"
        return [mine], ""

    def _monitored(self, context: Context, planner: Planner, partition: str) -> tuple[list[TrainingRequest], str]:
        """Ask for what the verdict wants, and for what the calendar has due now that the partition's labels are in."""
        found, why = self._drift(context, planner, partition)
        if not by_features(planner.spec):
            return found, why
        due, later = self._calendar(context, planner, partition, f"the labels of {partition} are in")
        return [*found, *due], f"{why}; {later}"

    def _drift(self, context: Context, planner: Planner, partition: str) -> tuple[list[TrainingRequest], str]:
        told, run = context["ti"].xcom_pull(task_ids="monitor") or {}, params.first_name(context["dag_run"])
        if told.get("verdict") != "retrain":
            return [], f"the monitor's verdict is {told.get('verdict')}"
        if "drift" not in planner.spec.retrain.on:
            return [], "the verdict is retrain, but `drift` is not in the spec's retrain.on"
        due = requests.window_of(planner.spec, partition, planner.store.keys(self.project, "features"))
        if not due.windows:
            return [], due.why
        mine = requests.submit(
            planner.ledger,
            self.project,
            window=due.windows[0],
            source="drift",
            by=context["dag_run"].dag_id,
            why=next(iter(told.get("reasons") or ()), "the monitor's verdict is retrain"),
            id=partition,
            asked_by=run,
            evidence={"health": told.get("output")},
        )
        if not mine.open:
            return [], f"run {mine.taken_by} has taken it up"
        return ([mine], "") if mine.asked_by == run else ([], f"run {mine.asked_by} has asked for it")

    def _calendar(self, context: Context, planner: Planner, key: str, why: str) -> tuple[list[TrainingRequest], str]:
        spec, book = planner.spec, planner.ledger
        dag_run, there = context["dag_run"], planner.store.keys(self.project, "features")
        known, run = requests.find(book, self.project), params.first_name(dag_run)
        source: Source = "quarterly" if "quarterly" in spec.retrain.on else "each"
        by = str(dag_run.dag_id)
        if not by_features(spec):
            source, why = "cron", f"cron {spec.retrain.cron}"
            due = requests.once(spec, requests.window_of(spec, partitions.shift(key, spec.grain, -1), there), known)
        else:
            if _sensed(context):
                source, by = "sensor", f"{self.project}.watch"
            trained = [e.payload["window"] for e in book.find(self.project, "promotion", phase="done")]
            due = requests.due(spec, key, there, known, trained)
        new = [
            requests.submit(book, self.project, window=window, source=source, by=by, why=why, id="once", asked_by=run)
            for window in due.windows
        ]
        return sorted([*requests.lost(known, run), *new], key=lambda r: r.window), due.why


class TakeUpOperator(RequestOperator):
    """Takes up what was asked for a training's window; a person who triggers the training asks by that."""

    def carry(self, context: Context, planner: Planner, asked: params.Asked) -> dict[str, Any]:
        """Return what this training serves. Skipped, and all after it, when there is nothing (any more) to serve."""
        dag_run, window = context["dag_run"], window_name(asked.partitions)
        run, book = params.first_name(dag_run), planner.ledger
        if asked.dry_run:
            log.info("dry run: would take up the requests for %s", window)
            return {"window": window, "requests": []}
        if by_person(dag_run):
            mine = on_record(context, planner)
            assert mine is not None  # a dry run has returned before
            window = mine.window
            known = _of(planner, window)
            other = requests.begun_since(known, dag_run.run_after, run) if mine.open and not mine.force else None
            if other is not None and requests.close(book, mine, str(other.taken_by)):
                self.skip(context, planner, window, f"run {other.taken_by} serves it: it began after this was asked")
        elif not any(r.open or r.taken_by == run for r in _of(planner, window)):
            self._by_hand(context, planner, window)
        served = requests.take(book, self.project, window, run)
        if not served:
            other = next((r for r in reversed(_of(planner, window)) if not r.open), None)
            why = f"run {other.taken_by} has taken up what was asked" if other else "nothing was asked for it"
            self.skip(context, planner, window, why)
        self.end(context, planner, "taken up", served)
        return {"window": window, "requests": [r.key for r in served]}

    def _by_hand(self, context: Context, planner: Planner, window: str) -> None:
        """Record a request that somebody posted as an event on the asset; the event of a task asks nothing new."""
        events = [e for found in context["triggering_asset_events"].values() for e in found]
        posted = next((e for e in events if e.source_task_id is None), None)
        if posted is None:
            return
        requests.submit(
            planner.ledger,
            self.project,
            window=window,
            source="rest",
            by="airflow (asset event)",
            why=str((posted.extra or {}).get("reason", "")),
            id=params.first_name(context["dag_run"]),
            asked_by=params.first_name(context["dag_run"]),
        )


def _of(planner: Planner, window: str) -> list[TrainingRequest]:
    return requests.find(planner.ledger, planner.project, window)


def _sensed(context: Context) -> bool:
    """Tell whether the features came because the watch Dag found data (`operators.SENSED`)."""
    events = [e for found in context["triggering_asset_events"].values() for e in found]
    return any((e.extra or {}).get("source") == "sensor" for e in events)


def by_features(spec: ModelSpec) -> bool:
    """Tell whether the spec's calendar goes by what has landed, rather than by a cron or not at all."""
    return "each" in spec.retrain.on or "quarterly" in spec.retrain.on


def _monitor_will_ask(planner: Planner, key: str) -> str:
    """Return why the calendar waits for the monitor, or nothing when it asks now.

    Where there is a champion, a partition is scored and judged before it is trained on: a model that has seen it
    would be judged too well, and its labels may not be known yet. A champion that came after the features may have
    missed its scoring; then nobody else would ask.
    """
    champion, features = planner.champion(), planner.store.latest(planner.project, "features", key)
    if champion is None or features is None or features.created <= champion.since:
        return ""
    return f"there is a champion: {planner.project}.monitor asks when the labels of {key} are in"
