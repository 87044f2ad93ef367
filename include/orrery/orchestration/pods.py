"""The same step as a pod, or as several: created by a worker, waited for in the triggerer, judged by its result.

Image, resources and placement come from the compute class (`orrery.cluster.template`); argv, config and result
document are those of a laptop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from orrery import attempts, platform
from orrery.catalogue import CATALOGUE, verb_of
from orrery.cluster import answers, gang, names, template, units
from orrery.cluster.judge import Seen, readable
from orrery.cluster.units import Unit
from orrery.contract import Kind, Result, StepConfig
from orrery.endings import Ending
from orrery.errors import TryAgain, UserError
from orrery.orchestration import retry
from orrery.orchestration.operators import StepOperator, Told
from orrery.orchestration.pod_trigger import PodTrigger
from orrery.orchestration.reach import reaching
from orrery.plan import Planner
from orrery.planner import BasePlanner, Plan, Request, attempt_folder, grace
from orrery.platform import Compute
from orrery.runner import CHANGES, GoesOn, conclude, read_result
from orrery.spec import seconds

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger("orrery.step")
JSON = {"Accept": "application/json", "Content-Type": "application/json"}
ANSWER_S = 30.0
LOOK_S = 1.0  # between two looks at a lost attempt's pod that is saving its state
MARGIN_S = 10.0  # beside its grace, what a pod that was told to go may take
LATER_S = 3600.0
# An effect on the champion is waited for by its worker, within the task's own time.
BEFORE_TIMEOUT_S = 60.0


class PodStarted(GoesOn):
    """A unit works, or is to be created; the trigger waits for its end."""

    def __init__(self, trigger: PodTrigger) -> None:
        super().__init__(trigger.unit)
        self.trigger = trigger


class PodStepOperator(StepOperator, KubernetesPodOperator):
    """Runs one verb in a pod. What is asked for, planned, skipped and recorded is `StepOperator`'s.

    The worker creates the pod and leaves; the triggerer waits; a worker reads the result document. A pod's name
    follows from its attempt, so it is never started twice, and one whose worker was lost before the wait began is
    taken up by the next attempt. Whoever ends the task ends the pod.
    """

    name: Any

    def __init__(
        self,
        *,
        project: str,
        verb: str,
        compute: str,
        chain: tuple[str, ...] = (),
        kind: Kind = "model",
        **kwargs: Any,
    ) -> None:
        where = platform.load()
        chosen = where.compute_class(compute)
        template.check(where, chosen, compute, verb)
        pod: dict[str, Any] = {
            **template.for_cluster(where),
            **template.for_class(where, chosen, verb, CATALOGUE[kind][verb].environment),
            "name": f"{project}-{verb}".replace("_", "-"),
            "labels": {names.PROJECT: names.label(project), names.STEP: verb},
        }
        super().__init__(project=project, verb=verb, compute=compute, chain=chain, kind=kind, **pod, **kwargs)
        self._event: dict[str, Any] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Return a small summary of the result, like `StepOperator.execute`."""
        result = StepOperator.execute(self, context)
        # `do_xcom_push` would mean the pod operator's sidecar, so the summary is pushed by hand.
        context["ti"].xcom_push(key="return_value", value=result)
        return result

    def pod_ended(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on after a wait; returns and raises what `execute` does."""
        carried = event["carried"]
        self._over, self._groups = dict(carried["over"]), [tuple(group) for group in carried["groups"]]
        self._event, self._run = event, carried["run"]
        return self.execute(context)

    def _one(self, context: Context, planner: BasePlanner, request: Request) -> Result:
        event = self._event
        if event is not None and event["key"] == request.key:
            self._event = None
            return self._conclude(context, planner, request, event)
        try:
            return super()._one(context, planner, request)
        except PodStarted as e:
            self._push_known(context, e.trigger.folder)
            # By the event rather than by the deferral's own arguments, which `dag.test()` forgets.
            e.trigger.carried = {
                "run": request.run, "over": self._over, "groups": [list(group) for group in self._groups]
            }  # fmt: skip
            # No timeout: the pod has its own (`timeout` of the class), and waiting for a machine is bounded by `wait`.
            self.defer(trigger=e.trigger, method_name="pod_ended", timeout=None)
            raise AssertionError("deferred") from None

    def _make_launcher(self, context: Context, planner: BasePlanner) -> Any:
        return PodLauncher(self, context, planner, self._told[-1].request)

    def _wait_for_end(self, planner: BasePlanner, request: Request, folder: str) -> Ending | None:
        """Wait for a lost attempt's pod that was told to go and is saving; remove one that has ended, and say how."""
        compute = planner.platform.compute_class(_compute_of(planner, folder, self.compute))
        patience = grace(compute, planner.outlives(self.verb))
        cluster, until = Cluster(self, planner), time.monotonic() + patience + MARGIN_S
        # Who clears a task gives its run a new name.
        cleared = folder.rpartition("/")[0] != attempt_folder(request).rpartition("/")[0]
        while True:
            mine = [u for u in cluster.units([folder]) if u.folder == folder]
            for unit in mine:
                if unit.state == "live" and cleared:
                    # Who cleared the task has its pod ended; the triggerer may not have come to that yet.
                    cluster.delete(unit.address)
                    mine = [*(u for u in mine if u is not unit), replace(unit, state="ending")]
            ending = [u for u in mine if u.state == "ending"]
            if not ending or time.monotonic() > until:
                break
            log.info("%s of attempt %s is being stopped: waiting for its end", ending[0].name, ending[0].attempt)
            time.sleep(LOOK_S)
        ended = None
        for unit in mine:
            if unit.state == "dead":
                ended = cluster.ending(unit, patience)
                cluster.delete(unit.address)
        return ended

    def _conclude(self, context: Context, planner: BasePlanner, request: Request, event: dict[str, Any]) -> Result:
        """Judge the unit by what it left, and record the attempt."""
        store, folder, ran = planner.store, attempt_folder(request), event["folder"]
        config, ending = _config(planner, folder), Ending.model_validate(event["ending"])
        plan = Plan(config, verb_of(config), {}, compute=_compute_of(planner, folder, request.compute))
        result = read_result(store, config if ran == folder else _config(planner, ran), ending)
        plan.told["pod"] = _told(event, ending)
        self._say_end(context, event, ending, result)
        self._told.append(Told(request, plan, result))
        self._push_known(context, ran)
        self._push_links(context, result)
        try:
            return conclude(planner, request, plan, result, ran, float(event["waited_s"]))
        finally:
            # Last: what the pod could still tell is on record now.
            self._delete(planner, event, ending)

    def _say_end(self, context: Context, event: dict[str, Any], ending: Ending, result: Result) -> None:
        """Write what became of the pod into the task's log and, where it did not end by itself, its state store."""
        line = sentence(event, ending, result)
        log.log(logging.INFO if result.status == "done" else logging.WARNING, "%s", line)
        if ending.kind != "exited":
            retry.note(context, pod=line)

    def _delete(self, planner: BasePlanner, event: dict[str, Any], ending: Ending) -> None:
        if event["gone"]:
            return
        # A node that is silent never confirms a deletion: by force, or the pod's quota would stay taken.
        cluster, lost = Cluster(self, planner), ending.kind == "node_lost"
        cluster.delete(event["address"], force=lost)
        if lost and "/pods/" not in event["address"]:
            cluster.force_pods(event["unit"])

    def on_kill(self) -> None:
        """Delete the pod, if there is one by now."""
        if self._launcher is not None:
            self._launcher.stop()


class PodLauncher:
    """Creates a planned step's unit, or takes up the one that works already; raises `PodStarted`."""

    def __init__(self, operator: PodStepOperator, context: Context, planner: BasePlanner, request: Request) -> None:
        self.operator, self.context, self.planner, self.request = operator, context, planner, request
        self.cluster = Cluster(operator, planner)
        self._address = ""

    def __call__(self, plan: Plan) -> Ending:
        """Start it. An effect on the champion is waited for here, since its lease is held meanwhile."""
        self._check_sources()
        compute = self.planner.platform.compute_class(plan.compute)
        template.check(self.planner.platform, compute, plan.compute, plan.config.verb)
        # A first attempt has nothing to look for: that saves one request for each pod.
        there = self._there() if plan.config.attempt > 1 or self.request.cleared else []
        trigger = self._trigger(plan, compute, there)
        if self.request.verb in CHANGES:
            return self._here(plan, trigger)
        raise PodStarted(trigger)

    def stop(self) -> None:
        """Delete the unit, if it is there by now. The worker has a few seconds left."""
        if self._address:
            self.cluster.delete(self._address)

    def _trigger(self, plan: Plan, compute: Compute, there: list[Unit]) -> PodTrigger:
        for unit in there:
            if unit.state == "live" and unit.work == names.work(plan.config) and unit.folder:
                log.warning("%s, whose worker was lost, is still at this work: it is taken up", unit.name)
                if compute.pods > 1:
                    self.cluster.complete(self._documents(plan, compute, unit.name))
                return self._waits(plan, compute, unit.name, unit.address, unit.folder, unit.pods)
        # One that was told to go may be saving: the trigger waits for its end before it creates this one.
        after = [u.name for u in there if u.state != "dead"]
        for unit in there:
            if unit.state == "live":
                log.warning("%s of an earlier attempt is at other work now: it is stopped", unit.name)
            if unit.state != "ending":
                self.cluster.delete(unit.address)
        taken = {u.name for u in there}
        free = next(n for n in range(1, 1000) if names.unit(plan.config, n) not in taken)
        return self._create(plan, compute, names.unit(plan.config, free), after)

    def _create(self, plan: Plan, compute: Compute, unit: str, after: list[str]) -> PodTrigger:
        documents = self._documents(plan, compute, unit)
        self._address = gang.address(documents[0])
        new = self._waits(plan, compute, unit, self._address, plan.config.folder, compute.pods)
        if after:
            new.documents, new.after = documents, after
            return new
        refused = self.cluster.create(documents)
        if refused is None:
            log.info("%s is created, on class %s%s", unit, plan.compute, " (spot)" if compute.spot else "")
        elif refused.kind == "exists":
            # This attempt was started before, by a worker that was lost since.
            there = self._there()
            if all(u.name != unit for u in there):
                raise TryAgain(f"{refused.message}, and is not of this attempt")
            return self._trigger(plan, compute, there)
        elif refused.kind == "wait":
            log.warning("%s; it is asked for again, for %s at most", refused.message, compute.wait)
            new.documents = documents
        else:
            raise UserError(refused.message, hint=refused.hint)
        return new

    def _documents(self, plan: Plan, compute: Compute, unit: str) -> list[dict[str, Any]]:
        """Return what is to be created, in the API's own JSON."""
        where, operator = self.planner.platform, self.operator
        for name, value in template.for_attempt(where, compute, plan, unit).items():
            setattr(operator, name, value)
        pod = self.cluster.client.sanitize_for_serialization(operator.build_pod_request_obj(self.context))
        if compute.pods == 1:
            return [pod]
        ranks, wait = gang.make(where.kubernetes.ranks), float(seconds(compute.wait))
        return ranks.documents(pod, unit, compute.pods, where.kubernetes.namespace, wait=wait)

    def _waits(self, plan: Plan, compute: Compute, unit: str, address: str, folder: str, pods: int) -> PodTrigger:
        cluster, now = self.planner.platform.kubernetes, time.time()
        self._address = address
        container = gang.make(cluster.ranks).container if pods > 1 else None
        return PodTrigger(
            unit=unit,
            address=address,
            namespace=cluster.namespace,
            connection=cluster.connection,
            in_cluster=None if cluster.connection else True,
            key=plan.config.key,
            folder=folder,
            began=now,
            wait_until=now + seconds(compute.wait),
            grace=float(grace(compute, plan.outlive)),
            silent=float(seconds(cluster.silent_node)),
            blind=float(seconds(compute.timeout) + seconds(compute.wait)),
            pods=pods,
            container=container or template.CONTAINER,
        )

    def _here(self, plan: Plan, trigger: PodTrigger) -> Ending:
        """Wait in this worker; return how it ended."""
        limit = self.operator.execution_timeout
        if limit is not None:
            trigger.wait_until = min(
                trigger.wait_until, time.time() + max(limit.total_seconds() - BEFORE_TIMEOUT_S, BEFORE_TIMEOUT_S)
            )
        trigger.extras = self.operator.hook.conn_extras
        event = asyncio.run(trigger.wait())
        ending = Ending.model_validate(event["ending"])
        plan.told["pod"] = _told(event, ending)
        self.operator._delete(self.planner, event, ending)
        store, ran = self.planner.store, f"{trigger.folder}/result.json"
        if trigger.folder != plan.config.folder and store.exists(ran):
            store.put(f"{plan.config.folder}/result.json", store.read(ran))
        self.operator._say_end(self.context, event, ending, read_result(store, plan.config, ending))
        return ending

    def _there(self) -> list[Unit]:
        """Return the units of this run's task and key, of whatever attempt, the newest first."""
        runs = (self.request.run, *self.request.cleared)
        return self.cluster.units([attempt_folder(self.request, run) for run in runs])

    def _check_sources(self) -> None:
        if not isinstance(self.planner, Planner):
            return
        sources = self.planner.spec.sources.items()
        missing = [n for n, s in sources if s.connection and not self.planner.platform.kubernetes.secret]
        if self.request.verb == "ingest" and missing:
            raise UserError(
                f"source {missing[0]} needs a credential, and a pod is given none",
                hint=f"kubernetes.secret in platform.yaml, with the URL as ORRERY_SOURCE_{missing[0].upper()}",
            )


class Cluster:
    """What a worker asks of the cluster, as raw documents: to create, list and delete."""

    def __init__(self, operator: PodStepOperator, planner: BasePlanner) -> None:
        self._operator, self._planner = operator, planner

    @property
    def client(self) -> Any:
        """The connection's client. Raises `UserError` where Airflow has none of it."""
        with reaching(self._planner.platform.kubernetes.connection):
            return self._operator.hook.api_client

    def create(self, documents: list[dict[str, Any]]) -> answers.Answer | None:
        """Create a unit's objects; return what was refused, or None."""
        first, *others = documents
        try:
            made = self._ask("POST", gang.collection(first), first)
            for document in others:
                self._ask("POST", gang.collection(document), gang.owned(document, made))
        except (ApiException, HTTPError) as e:
            return _answer(e, first["metadata"]["name"])
        return None

    def complete(self, documents: list[dict[str, Any]]) -> None:
        """Create what a unit lacks whose worker was lost between its Job and its Service: the pods wait for that."""
        first, *others = documents
        try:
            made = self._ask("GET", gang.address(first))
        except (ApiException, HTTPError) as e:
            log.warning("%s", _answer(e, first["metadata"]["name"]).message)
            return
        for document in others:
            try:
                self._ask("POST", gang.collection(document), gang.owned(document, made))
            except (ApiException, HTTPError) as e:
                refused = _answer(e, document["metadata"]["name"])
                if refused.kind != "exists":
                    log.warning("%s", refused.message)

    def units(self, folders: Iterable[str]) -> list[Unit]:
        """Return what is there of the attempts at these folders' slots, the newest first."""
        chosen = names.selector(dict.fromkeys(names.slot(self._planner.store.uri, f) for f in folders))
        found = [document for kind in self._kinds() for document in self._list(kind, chosen)]
        return list(units.found(found).values())

    def ending(self, unit: Unit, grace: float) -> Ending | None:
        """Return how a unit has ended, by those of its pods that are there still."""
        cluster, now = self._planner.platform.kubernetes, time.time()
        container = gang.make(cluster.ranks).container if unit.pods > 1 else None
        seen = Seen(unit=unit.name, pods=unit.pods, container=container or template.CONTAINER)
        for pod in self._list("Pod", f"{names.UNIT}={unit.name}"):
            seen.update(pod, now)
        # As of later: whatever might have been waited for to be told has been told.
        return seen.ending(now + LATER_S, wait_until=now, grace=grace, silent=float(seconds(cluster.silent_node)))

    def delete(self, address: str, *, force: bool = False) -> None:
        """Delete an object and all that it owns; what cannot be deleted is said, and left to the housekeeping."""
        options = {**gang.DELETION, **({"gracePeriodSeconds": 0} if force else {})}
        try:
            self._ask("DELETE", address, options)
        except (ApiException, HTTPError) as e:
            refused = _answer(e, address)
            if refused.kind != "absent":
                log.warning("it cannot be deleted: %s", refused.message)

    def force_pods(self, unit: str) -> None:
        """Delete the pods of a Job by force: its own deletion gives them their grace, which a dead node never ends."""
        try:
            pods = self._list("Pod", f"{names.UNIT}={unit}")
        except (TryAgain, UserError) as e:
            log.warning("%s", e.message)
            return
        for pod in pods:
            self.delete(gang.address(pod), force=True)

    def _kinds(self) -> list[str]:
        """Return which objects a unit of this task may be."""
        # Whatever the class says by now: it may have had several pods when the Job was made.
        job = {"indexed-job": "Job", "pytorchjob": "PyTorchJob"}[self._planner.platform.kubernetes.ranks]
        return ["Pod", job] if self._planner.verbs[self._operator.verb].spreads else ["Pod"]

    def _list(self, kind: str, chosen: str) -> list[dict[str, Any]]:
        path = gang.PLACES[kind].format(self._planner.platform.kubernetes.namespace)
        try:
            found = self._ask("GET", path, query=[("labelSelector", chosen)])
        except (ApiException, HTTPError) as e:
            refused = _answer(e, f"the {kind}s of {path} cannot be listed")
            if refused.kind == "wait":
                raise TryAgain(refused.message) from None
            raise UserError(refused.message, hint=refused.hint) from None
        return [{**document, "kind": kind} for document in found.get("items") or ()]

    def _ask(
        self, method: str, path: str, body: object = None, query: list[tuple[str, str]] | None = None
    ) -> dict[str, Any]:
        answer = self.client.call_api(
            path,
            method,
            query_params=query or [],
            header_params=dict(JSON),
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=ANSWER_S,
        )
        return dict(json.loads(answer.data or b"{}"))


def sentence(event: dict[str, Any], ending: Ending, result: Result) -> str:
    """Return in one line what became of a unit: pod, node, end, exit code, memory, how long it waited."""
    where = f" on node {event['node']}" if event["node"] else ""
    how = "done" if result.status == "done" else ending.kind.replace("_", " ")
    by = f" by {ending.by}" if ending.by else ""
    parts = [f"pod {event['pod'] or event['unit']}{where}: {how}{by if how != 'done' else ''}"]
    if ending.code is not None:
        parts.append(f"exit code {ending.code}")
    if event.get("memory_peak"):
        limit = f" of {readable(event['memory_limit'])}" if event.get("memory_limit") else ""
        parts.append(f"at most {readable(event['memory_peak'])}{limit} in use")
    parts.append(f"{event['waited_s']:.0f} s until it ran" if event["node"] else f"{event['waited_s']:.0f} s waited")
    return ", ".join(parts)


def _told(event: dict[str, Any], ending: Ending) -> dict[str, Any]:
    """Return what the ledger keeps of the pod."""
    told = {
        "unit": event["unit"],
        "pod": event["pod"],
        "node": event["node"],
        "ended": ending.kind,
        "by": ending.by,
        "exit_code": ending.code,
        "waited_s": event["waited_s"],
        "memory_peak": event.get("memory_peak"),
        "ran": event["folder"],
    }
    return {k: v for k, v in told.items() if v is not None}


def _answer(error: ApiException | HTTPError, what: str) -> answers.Answer:
    if isinstance(error, ApiException):
        return answers.read(error.status or 0, error.body, what)
    return answers.read(0, f"{type(error).__name__}: {error}", what)


def _config(planner: BasePlanner, folder: str) -> StepConfig:
    return StepConfig.model_validate_json(planner.store.read(f"{folder}/config.json"))


def _compute_of(planner: BasePlanner, folder: str, otherwise: str) -> str:
    """Return the compute class that an attempt was started on."""
    attempt = attempts.read(planner.store, folder)
    return attempt.compute if attempt and attempt.compute else otherwise
