"""The house operators: one step each, local (a virtual environment) or on Kubernetes (an image)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowSkipException

from orrery import budgets, champions, partitions, platform, requests, twin
from orrery.attempts import Attempt
from orrery.contract import STATUS_OF_CODE, Kind, Result, StepError
from orrery.costs import TRAINS, refuse_over_budget
from orrery.endings import Ending
from orrery.errors import BudgetSpent, OrreryError, RequestError, UserError
from orrery.faults import Fault
from orrery.ledger import Ledger
from orrery.local import LocalProcess, relay, wait_for_end
from orrery.log import shown
from orrery.orchestration import links, params, retry, waiting
from orrery.placement import placement
from orrery.plan import AFTER_SAVING_S, Planner
from orrery.planner import BasePlanner, Plan, Request, safe_name
from orrery.planners import planner_of
from orrery.rag.planning import LIVE
from orrery.runner import history, record_skip, record_unstarted, recorded, run

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger("orrery.step")
# Verdicts of a step that ended well and made nothing: the gate had kept the champion, there is none to score with.
NOTHING_MADE = frozenset({"kept", "skipped"})
LEFT_OUT = "left out"
# What the UI calls a trial among its like: with its result as soon as there is one.
TRIAL_NAME = "{{ trial | default('trial ' ~ task.number) }}"
# What an event of features says beside the partition when the watch Dag found the data.
SENSED = {"source": "sensor"}


@dataclass
class Told:
    """One step as far as it has come; the lineage of the task is made of these when it has ended."""

    request: Request
    plan: Plan | None = None
    result: Result | None = None


class StepOperator(BaseOperator):
    """Runs one verb of a project. The Dag's request says on what; everything else is the project's.

    A verb on partitions inside a Dag on windows (`materialize` before `train`) is carried through the
    window in order; what is unchanged is skipped before any process is started. `monitor` carries the partitions
    before its own first, as far as they have scores and no health yet: its verdict looks back at them, and events
    of partitions whose labels are known may come in any order. `number` is that of a search's trial.
    """

    ui_color = "#e8eef7"

    def __init__(
        self,
        *,
        project: str,
        verb: str,
        compute: str = "",
        chain: tuple[str, ...] = (),
        number: int | None = None,
        kind: Kind = "model",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.number, self.kind = number, kind
        self.project, self.verb, self.compute, self.chain = project, verb, compute, chain
        self.operator_extra_links = tuple(link() for link in links.of(kind, verb))
        self._launcher: Any = None
        self._told: list[Told] = []
        # What this attempt is asked for, and the keys that it is through with, and how; an operator that defers carries
        # both over the wait: found anew, earlier partitions would be others by then.
        self._groups: list[tuple[str, ...]] = []
        self._over: dict[str, str] = {}
        # What the run was called when this attempt began to wait: who clears another of its tasks gives it a new name.
        self._run: str | None = None
        self._faults: tuple[Fault, ...] = ()  # that are rehearsed; on a cluster none
        self._partial = False  # whether sources of documents may have shrunk

    def execute(self, context: Context) -> dict[str, Any]:
        """Return a small summary of the result. Raises the typed error of the step (see `retry`)."""
        try:
            return self._execute(context)
        except OrreryError as e:
            log.error("%s", e)
            if "config" not in e.details:
                record_refusal(context, self.project, self.verb, e)
            if e.details.get("links"):
                self._push_links(context, Result(links=dict(e.details["links"])))  # type: ignore[call-overload]
            # The frames that lead here say nothing to the reader of the log; the message above says it all.
            raise e.with_traceback(None) from None

    def _execute(self, context: Context) -> dict[str, Any]:
        planner = planner_of(self.project)
        asked = params.read(context, planner)
        self._faults, self._partial = asked.faults, asked.partial
        wanted = self._requests(context, planner, asked)
        if asked.dry_run:
            self._say_plan(planner, wanted)
            raise AirflowSkipException("dry run: nothing was done")
        result = self._all(context, planner, wanted)
        made_nothing = self.verb != "gate" and result.verdict in NOTHING_MADE
        # Most nights change nothing: nobody is told of a generation that has been live for weeks.
        still_live = self.kind == "knowledge_base" and self.verb == "promote" and bool(result.skipped)
        if made_nothing or still_live:
            # Green and told apart: a task that succeeds would announce its outlets, a champion that is none.
            raise AirflowSkipException(f"{self.verb}: {result.skipped}")
        if self.number is not None:
            context["trial"] = trial_name(self.number, result)
        self._emit(context, wanted)
        return summary(result, len(wanted))

    def _all(self, context: Context, planner: BasePlanner, wanted: list[Request]) -> Result:
        """Carry the requests in order; return the last one's result."""
        *before, last = wanted
        for request in before:
            if (over := self._over.get(request.key)) is not None:  # before a wait, in another process of this attempt
                if over == LEFT_OUT:
                    wanted.remove(request)
                continue
            try:
                self._one(context, planner, request)
                self._over[request.key] = "done"
            except UserError as e:
                if self.verb != "monitor":
                    raise
                # What is wrong with an earlier partition is that one's run to tell; it has no say in this verdict.
                log.warning("%s %s is left out: %s", self.verb, request.key, e.message)
                wanted.remove(request)  # nothing is announced of it
                self._over[request.key] = LEFT_OUT
        return self._one(context, planner, last)

    def _requests(self, context: Context, planner: BasePlanner, asked: params.Asked) -> list[Request]:
        ti, dag_run = context["ti"], context["dag_run"]
        if self.verb == "rollback":
            return [self._rollback(context, planner, asked)]
        run = self._run or params.run_name(dag_run)
        actor, reason, force, keys = asked.actor, asked.reason, asked.force, asked.partitions
        if params.verb_of(dag_run) == "train":
            served = requests.of_run(planner.ledger, self.project, params.first_name(dag_run))
            # Who asked and why is what the ledger tells of a promotion; an asset's event says neither.
            actor = ", ".join(dict.fromkeys(r.by for r in served)) or actor
            reason = "; ".join(dict.fromkeys(r.why for r in served if r.why))[:500] or reason
            force = force or any(r.force for r in served)
            # What was taken up, for the whole run: one partition may mean a longer window by now.
            keys = partitions.window(served[0].window, planner.grain) if served else keys
        whole = planner.verbs[self.verb].scope == "window"
        groups: list[tuple[str, ...]] = [keys] if whole else [(key,) for key in keys]
        if self.verb == "monitor" and not self._groups and isinstance(planner, Planner):
            groups = [*((key,) for key in waiting.behind(planner, keys[0])), *groups]
        self._groups = groups = self._groups or groups
        return [
            Request(
                project=self.project,
                verb=self.verb,
                partitions=group,
                run=run,
                task=params.task_name(ti),
                attempt=ti.try_number,
                actor=actor,
                reason=reason,
                force=force and (self.verb != "monitor" or group == keys),
                options=self._options(context),
                compute=self.compute,
                kind=planner.kind,
                cleared=tuple(name for name in params.cleared_names(dag_run) if name != run),
            )
            for group in groups
        ]

    def _rollback(self, context: Context, planner: BasePlanner, asked: params.Asked) -> Request:
        """Return what is rolled back to. A run that has done so has nothing left to do, however often it is cleared."""
        run = params.first_name(context["dag_run"])
        if champions.rolled_back(planner, run) is not None:
            raise AirflowSkipException("this run has rolled back already: trigger a new one to go further back")
        attempt = context["ti"].try_number
        return champions.rollback_request(
            planner, asked.version, run=run, attempt=attempt, actor=asked.actor, reason=asked.reason
        )

    def _options(self, context: Context) -> Mapping[str, Any]:
        if self.verb == "trial":
            return {"number": self.number}
        if self.verb == "collect":
            return {"partial": self._partial}
        if self.verb == "evaluate" and self.kind == "knowledge_base":
            return {LIVE: params.verb_of(context["dag_run"]) == "evaluate"}
        if self.verb != "promote" or self.kind != "model":
            return {}
        registered = context["ti"].xcom_pull(task_ids="register") or {}
        return {"version": registered.get("facts", {}).get("model_version", "none")}

    def _one(self, context: Context, planner: BasePlanner, request: Request) -> Result:
        self._push_known(context)
        request = self._next_attempt(context, planner, request)
        told = Told(request)
        self._told.append(told)
        if self.verb == "score" and planner.champion() is None:
            log.info("%s has no champion yet: there is nothing to score %s with", self.project, request.key)
            told.result = record_skip(planner, request, "no champion yet")
            return told.result

        def started(plan: Plan) -> None:
            told.plan = plan
            self._push_known(context, plan.config.folder)

        self._launcher = self._make_launcher(context, planner)
        result = told.result = run(planner, request, self._launcher, started)
        if result.skipped:
            log.info("%s %s: skipped, %s", self.verb, request.key, result.skipped)
        self._push_links(context, result)
        return result

    def _next_attempt(self, context: Context, planner: BasePlanner, request: Request) -> Request:
        """Return the request as this attempt makes it, after a look at those before: whether, where and since when.

        Raises `BudgetSpent`: a worker that is killed asks no retry policy, so the limits are looked at here too.
        """
        most = planner.budgets(self.verb)
        before = history(planner, request, lambda folder: self._wait_for_end(planner, request, folder))
        task = recorded(planner.ledger, request.project, request.run, request.task)
        if over := most.over(task):
            raise BudgetSpent(
                f"{request.verb} {request.key}: {over}", hint="see why, then clear the task: it counts anew"
            )
        if line := budgets.sentence(request.attempt, most, before):
            log.info(line)
        request = replace(request, queued_s=_waited(context, before))
        if self.verb == "train" and isinstance(planner, Planner):
            place = placement(before, planner.spec.train, planner.platform.compute, datetime.now(UTC))
            if place.reason:
                log.warning("this attempt runs on %s: %s", place.compute, place.reason)
            request = replace(request, compute=place.compute, placed=place.reason)
        if self.verb in TRAINS and isinstance(planner, Planner):
            price = planner.platform.compute_class(planner.compute_of(request)).price_per_hour
            refuse_over_budget(planner.ledger, request.project, safe_name(request.run), planner.spec, price)
        if before:
            said = {"goes-on": budgets.goes_on(before), "compute": f"{request.compute} {request.placed}".strip()}
            retry.show(context, most, task, **{name: text for name, text in said.items() if text})
        return request

    def _make_launcher(self, context: Context, planner: BasePlanner) -> Any:
        local = LocalProcess(on_line=lambda line: relay(line, emit))
        process = twin.launcher(local, self._faults, planner.platform, log.warning)
        secrets = self._source_secrets(planner)

        def launch(plan: Plan) -> int | Ending:
            plan.environment.update(secrets)
            return process(plan)

        launch.stop = process.stop  # type: ignore[attr-defined]
        return launch

    def _wait_for_end(self, planner: BasePlanner, request: Request, folder: str) -> Ending | None:
        """Wait for the step of an earlier attempt whose worker is gone; return how its machine ended it, if known."""
        wait_for_end(planner.store, folder, planner.outlives(self.verb) + AFTER_SAVING_S)
        return None

    def _source_secrets(self, planner: BasePlanner) -> dict[str, str]:
        """Return the URLs of SQL sources, from Airflow's connections, for the ingest step's environment alone."""
        if self.verb != "ingest" or not isinstance(planner, Planner):
            return {}
        found = {n: s.connection for n, s in planner.spec.sources.items() if s.connection}
        return {f"ORRERY_SOURCE_{n.upper()}": self._url(n, c) for n, c in found.items()}

    def _url(self, source: str, connection: str) -> str:
        from airflow.sdk import BaseHook
        from airflow.sdk.exceptions import AirflowNotFoundException

        try:
            return str(BaseHook.get_connection(connection).get_uri())
        except AirflowNotFoundException:
            raise UserError(
                f"source {source} of {self.project} reads connection {connection!r}, which Airflow does not have",
                hint="add it in Airflow (Admin, Connections) or in airflow_settings.yaml",
            ) from None

    def _push_links(self, context: Context, result: Result) -> None:
        for key, url in links.urls(result, context["dag_run"].dag_id).items():
            context["ti"].xcom_push(key=key, value=url)

    def _push_known(self, context: Context, attempt: str | None = None) -> None:
        """Give the buttons their URLs before there is anything: at the end they would be of no use to who watches."""
        run_ = context["dag_run"]
        for key, url in links.expected(self.kind, self.verb, run_.dag_id, run_.run_id, attempt).items():
            context["ti"].xcom_push(key=key, value=url)

    def _emit(self, context: Context, wanted: list[Request]) -> None:
        """Say which partitions the outlets' events are about, and whether the watch Dag found them."""
        for outlet in self.outlets:
            context["outlet_events"][outlet].add_partitions([r.partitions[-1] for r in wanted])
            if _sensed(context["dag_run"]):
                context["outlet_events"][outlet].extra.update(SENSED)

    def _say_plan(self, planner: BasePlanner, wanted: list[Request]) -> None:
        for verb in (self.verb, *self.chain):
            log.info("dry run: would run %s of %s (%s)", verb, self.project, planner.verbs[verb].environment)
        for request in wanted:
            try:
                plan = planner.plan(request)
            except RequestError as e:
                log.info("dry run: %s %s: %s", request.verb, request.key, e)
                continue
            state = f"skipped, {plan.done.skipped}" if plan.done else "would be done"
            log.info("dry run: %s %s: %s", request.verb, request.key, state)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """Return what OpenLineage is told of the task, also when it failed; asked only where lineage is configured."""
        from orrery.orchestration import lineage

        return lineage.of_task(self.project, self.verb, self._told)

    def on_kill(self) -> None:
        """Stop the step's process and all it started."""
        if self._launcher is not None:
            self._launcher.stop()


def trial_name(number: int, result: Result) -> str:
    """Return what the UI calls a trial that has ended: `trial 7 · AUC .741`, `trial 8 · pruned`."""
    metric = str(result.facts.get("primary", ""))
    if metric not in result.metrics:
        return f"trial {number} · {result.verdict or 'done'}"
    shown_as = metric.upper() if "_" not in metric else metric
    return f"trial {number} · {shown_as} {f'{result.metrics[metric]:.3f}'.removeprefix('0')}"


def _waited(context: Context, before: Sequence[Attempt]) -> float:
    """Return the seconds since the attempt before ended, or since Airflow started the task."""
    since = before[-1].ended if before else context["ti"].start_date
    return (datetime.now(UTC) - since).total_seconds() if since else 0.0


def _sensed(dag_run: Any) -> bool:
    """Tell whether the watch Dag started this run, for data that it found."""
    # Only its task makes a run of this type with that name; a person's run is a manual one, whatever its name.
    from orrery.orchestration.watching import PREFIX

    return params.value(dag_run.run_type) == "operator_triggered" and dag_run.run_id.startswith(PREFIX)


def unstarted(context: Context, project: str, verb: str) -> Request:
    """Return what the ledger is told of a task that starts no process."""
    run, ti = context["dag_run"], context["ti"]
    return Request(
        project, verb, (), params.run_name(run), params.task_name(ti), ti.try_number, actor=params.actor(run)
    )


def record_refusal(context: Context, project: str, verb: str, error: OrreryError) -> None:
    """Write into the ledger why no attempt was even started: the note on the run is made of it."""
    told = StepError(kind=type(error).__name__, message=error.message)
    result = Result(status=STATUS_OF_CODE.get(error.exit_code, "bug"), error=told)
    try:
        record_unstarted(Ledger(platform.load().ledger), unstarted(context, project, verb), "", result)
    except OrreryError as e:
        log.warning("the refusal is not in the ledger: %s", e)


def emit(level: int, event: str, fields: dict[str, Any]) -> None:
    """Write one event of a step's log into the task's."""
    rest = " ".join(f"{k}={shown(v)}" for k, v in fields.items() if k != "exception")
    log.log(level, "%s%s", event, f"  {rest}" if rest else "")
    if fields.get("exception"):
        log.log(level, "%s", fields["exception"])


def summary(result: Result, count: int) -> dict[str, Any]:
    """Return what goes into XCom: small JSON, no data."""
    return {
        "verdict": result.verdict,
        "skipped": result.skipped,
        "output": result.output,
        "digest": result.digest,
        "metrics": result.metrics,
        "facts": {k: v for k, v in result.facts.items() if k == "model_version"},
        "reasons": result.reasons[:20],
        "seconds": result.seconds,
        "steps": count,
    }
