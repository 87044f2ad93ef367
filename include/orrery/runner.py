"""One step from request to ledger: plan, skip or launch, read the result, record. The Dags and the command
line both come through here, so they cannot differ.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol

from pydantic import ValidationError

from orrery import attempts, bundle, goodput
from orrery.attempts import Attempt
from orrery.contract import STATUS_OF_CODE, Result, StepConfig, StepError
from orrery.endings import Ending, judged, without_result
from orrery.errors import TRY_AGAIN, Interrupted, OrreryError, TryAgain, UserError
from orrery.lease import Lease
from orrery.ledger import KEPT, Entry, Kind, Ledger, unfinished
from orrery.planner import BasePlanner, Plan, Request, attempt_folder, safe_name
from orrery.store import Store

# What changes the champion, and what the ledger calls it.
CHANGES: dict[str, Kind] = {"promote": "promotion", "rollback": "rollback"}
# What decides: its verdict is an entry of its own.
DECIDES = ("gate", "monitor")
# Of a result's facts the ledger keeps what its readers need; the rest is in the manifest.
TOLD_FACTS = ("model_version", "primary", "units")
WAITED = "waited_s"  # what a launcher tells of an attempt: seconds without a machine, which nobody paid for


class StepFailed(OrreryError):
    """A step ended with a bug, or vanished; another attempt may be worth it."""

    exit_code = 1


class StepVanished(StepFailed):
    """A step's process ended without a result: killed from outside, out of memory, or a crash in native code."""


class GoesOn(BaseException):
    """The step works on elsewhere, without this process. No error: whoever hears of its end calls `conclude`."""


class Launcher(Protocol):
    """Starts the process of a planned step, waits, and returns its exit code (negative: the signal), or its ending."""

    def __call__(self, plan: Plan) -> int | Ending: ...


def prepare(plan: Plan, store: Store) -> None:
    """Write the project's bundle and the attempt's config document, whole, before anything is started."""
    if plan.packed is not None:
        bundle.push(store, plan.packed)
    # The same attempt may have been started before (a worker that was lost): its end is not this one's.
    for name in ("result.json", goodput.NAME):
        store.remove(f"{plan.config.folder}/{name}")
    store.put(f"{plan.config.folder}/config.json", plan.config.model_dump_json(indent=1).encode())


def run(
    planner: BasePlanner, request: Request, launch: Launcher, started: Callable[[Plan], None] | None = None
) -> Result:
    """Carry one request to its end and record it. Raises the error that the result document tells.

    `started` is told of the plan just before the step is launched (operator links need it then).
    """
    if request.verb not in CHANGES:
        return _carry(planner, request, launch, started)
    # One change of the champion at a time, whoever asks: what the plan was checked against must still hold.
    folder = f"{request.project}/champion/lease"
    with Lease(planner.store, folder, safe_name(request.run), f"{request.task}-{request.attempt}"):
        return _carry(planner, request, launch, started)


def _carry(planner: BasePlanner, request: Request, launch: Launcher, started: Callable[[Plan], None] | None) -> Result:
    clock = time.monotonic()
    attempt = _begun(planner, request)
    plan = planner.plan(request)
    if plan.done is not None:
        _record(planner, request, plan, plan.done, attempts.ended(attempt, plan.done, None, time.monotonic() - clock))
        return plan.done
    attempt = attempt.model_copy(update={"address": plan.config.address or ""})
    intent = _intend(planner, request, plan) if request.verb in CHANGES else None
    attempts.write(planner.store, plan.config.folder, attempt)
    prepare(plan, planner.store)
    if started:
        started(plan)
    try:
        code = launch(plan)
    except GoesOn:
        raise
    except OrreryError as e:  # it was not even started
        refused = _refused(e)
        _record(planner, request, plan, refused, _ended(planner, plan, attempt, refused, clock))
        e.details.setdefault("config", f"{plan.config.folder}/config.json")  # it is on record: nobody else need do it
        raise
    except BaseException as e:  # a timeout, or a key pressed
        stopped = _stopped(e)
        _record(planner, request, plan, stopped, _ended(planner, plan, attempt, stopped, clock))
        raise
    result = read_result(planner.store, plan.config, code)
    if intent is not None and result.status == "done":
        _complete(planner, intent)
    _record(planner, request, plan, result, _ended(planner, plan, attempt, result, clock))
    raise_for(plan, result)
    return result


def conclude(
    planner: BasePlanner, request: Request, plan: Plan, result: Result, ran: str, waited_s: float = 0.0
) -> Result:
    """Record the end of an attempt whose launcher raised `GoesOn`; `ran` is the folder that the step worked in.

    `waited_s`: how long no machine was there for it, which nobody paid for. Raises the error that the result tells.
    """
    attempt = attempts.read(planner.store, plan.config.folder) or _begun(planner, request)
    attempt = attempts.placed_after(attempt, waited_s)
    wall_s = time.time() - datetime.fromisoformat(attempt.started).timestamp()
    progress = attempts.progress_of(planner.store, ran)
    _record(planner, request, plan, result, attempts.ended(attempt, result, progress, wall_s, plan.told))
    raise_for(plan, result)
    return result


def _begun(planner: BasePlanner, request: Request) -> Attempt:
    name = planner.compute_of(request)
    compute = planner.platform.compute.get(name)
    return attempts.begun(request.attempt, name, compute, request.queued_s, request.placed)


def _ended(planner: BasePlanner, plan: Plan, attempt: Attempt, result: Result, clock: float) -> Attempt:
    progress = attempts.progress_of(planner.store, plan.config.folder)
    waited_s = float(plan.told.pop(WAITED, 0.0))
    wall_s = time.monotonic() - clock - waited_s
    return attempts.ended(attempts.placed_after(attempt, waited_s), result, progress, wall_s, plan.told)


def _refused(error: OrreryError) -> Result:
    """Return how an attempt ended that no process was started for: on record, it is not taken for a lost one."""
    told = StepError(kind=type(error).__name__, message=error.message, hint=error.hint)
    return Result(status=STATUS_OF_CODE.get(error.exit_code, "bug"), error=told)


def _stopped(error: BaseException) -> Result:
    """Return how an attempt ended whose launcher was torn off: by its timeout, or from the keyboard."""
    told = StepError(kind=type(error).__name__, message=f"stopped: {type(error).__name__} {error}".rstrip())
    return Result(status="interrupted" if isinstance(error, KeyboardInterrupt) else "bug", error=told)


def read_result(store: Store, config: StepConfig, end: int | Ending) -> Result:
    """Return what an attempt left. A process that vanished is judged by the store: committed means done."""
    try:
        result = Result.model_validate_json(store.read(f"{config.folder}/result.json"))
        return result if isinstance(end, int) else judged(result, end)
    except FileNotFoundError:
        pass
    except ValidationError:
        raise StepFailed(
            f"{store.uri}/{config.folder}/result.json is not a result document of this version",
            hint="the step's image and the orchestrator must hold the same version of orrery",
        ) from None
    if config.address:
        found = store.manifest(f"{config.project}/{config.verb}/{config.address}/manifest.json")
        if found is not None and found.attempt == config.folder:
            result = Result.model_validate(found.result)
            result.output, result.digest = found.path, found.digest
            result.reasons.append("the process vanished after it had committed")
            return result
    if isinstance(end, Ending):
        return without_result(end, config)
    code = end
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    hint = "often out of memory: look at the machine's log" if code == -9 else "see its log above"
    error = {"kind": "StepVanished", "message": f"{config.verb} {config.key} left no result ({how})", "hint": hint}
    # 75: it could not reach the store, and so could not write that down either.
    status = "interrupted" if code in (143, -15) else "try_again" if code == TRY_AGAIN else "bug"
    return Result.model_validate({"status": status, "error": error})


def raise_for(plan: Plan, result: Result) -> None:
    """Raise the error that a result tells, if any."""
    if result.status == "done":
        return
    if result.error is None:
        raise StepFailed(f"{plan.config.verb} {plan.config.key} ended as {result.status} and does not say why")
    kinds: dict[str, type[OrreryError]] = {"user": UserError, "try_again": TryAgain, "interrupted": Interrupted}
    kind = kinds.get(result.status, StepVanished if result.error.kind in attempts.VANISHED else StepFailed)
    details: dict[str, object] = {
        **result.error.details,
        "links": result.links,
        "config": f"{plan.config.folder}/config.json",
    }
    raise kind(
        result.error.message, hint="\n  → ".join(filter(None, (result.error.hint, _repeat(plan)))), details=details
    )


def _repeat(plan: Plan) -> str:
    """Return how an attempt is repeated as it was; an effect is not repeated but run again."""
    return "" if plan.verb.effect else f"to repeat it: orrery reproduce {plan.config.project} {plan.config.folder}"


def _promotion(planner: BasePlanner, request: Request, plan: Plan) -> dict[str, Any]:
    """Return what is recorded of a promotion or rollback: from, to, why, evidence."""
    params, inputs = plan.config.params, plan.config.inputs
    model = (inputs.get("candidate") or inputs["model"])[0].path
    evidence = {n: inputs[n][0].path for n in ("evaluation", "verdict") if n in inputs}
    return {
        "from": params["previous"],
        "version": params["version"],
        "model": model,
        "reason": request.reason,
        "window": request.key,
        "evidence": evidence,
    }


def _intend(planner: BasePlanner, request: Request, plan: Plan) -> Entry:
    """Record what is about to be done; return the entry to complete.

    The same change intended by a run that did not finish it is taken over: a cleared run and a repeat at the
    command line have names of their own, and an intent that nobody can complete would stay open for ever.
    """
    payload, kind = _promotion(planner, request, plan), _kind(request)
    for entry in reversed(unfinished(planner.ledger.find(request.project, "promotion", "rollback"))):
        same = all(entry.payload[field] == payload[field] for field in ("version", "model"))
        if entry.kind == kind and same:
            return entry
    key = plan.config.run
    if planner.ledger.get(request.project, kind, key, "intent") is not None:
        # A run of this name has changed the champion before (its run was deleted since): this is another change.
        key = f"{key}-{os.urandom(4).hex()}"
    planner.ledger.record(request.project, kind, key, "intent", request.actor, payload)
    found = planner.ledger.get(request.project, kind, key, "intent")
    assert found is not None
    return found


def _complete(planner: BasePlanner, intent: Entry) -> None:
    """Record that the effect is done, with what was intended: after a crash `previous` reads as the new version."""
    planner.ledger.record(intent.project, intent.kind, intent.key, "done", intent.actor, intent.payload)


def _kind(request: Request) -> Kind:
    return CHANGES[request.verb]


def _record(planner: BasePlanner, request: Request, plan: Plan, result: Result, attempt: Attempt) -> None:
    """Append the attempt (and what a gate or a monitor decided) to the ledger, once."""
    payload = _payload(request.verb, request.key, plan.config.folder, result, attempt)
    if request.verb == "register" and "model_version" in result.facts:
        payload |= {"version": result.facts["model_version"], "model": plan.config.inputs["candidate"][0].path}
    planner.ledger.record(request.project, "run", plan.config.folder, "done", request.actor, payload)
    if request.verb in DECIDES and result.status == "done":
        _decided(planner, request, f"{plan.config.run}/{request.key}", payload)


def _decided(planner: BasePlanner, request: Request, key: str, payload: dict[str, Any]) -> None:
    """Record a decision; a run that was cleared and came to another one keeps both."""
    book = planner.ledger
    if not book.record(request.project, "decision", key, "done", request.actor, payload):
        before = book.get(request.project, "decision", key, "done")
        if before is not None and before.payload.get("digest") != payload["digest"]:
            again = f"{key}/{str(payload['digest'])[:12]}"
            book.record(request.project, "decision", again, "done", request.actor, payload)


def _payload(verb: str, key: str, folder: str, result: Result, attempt: Attempt) -> dict[str, Any]:
    """Return what the ledger keeps of an attempt."""
    told = {"status", "verdict", "skipped", "seconds", "output", "digest", "metrics", "reasons", "links"}
    payload: dict[str, Any] = json.loads(result.model_dump_json(include=told))
    payload["facts"] = {name: result.facts[name] for name in TOLD_FACTS if name in result.facts}
    payload |= {"verb": verb, "key": key, "folder": folder, "attempt": attempt.model_dump(mode="json")}
    if result.error:
        payload["error"] = result.error.message
    return payload


def record_skip(planner: BasePlanner, request: Request, why: str) -> Result:
    """Record that there was nothing to do, and return that as the result."""
    result = Result(verdict="skipped", skipped=why, reasons=[why])
    record_unstarted(planner.ledger, request, request.key, result)
    return result


def history(
    planner: BasePlanner, request: Request, wait: Callable[[str], Ending | None] | None = None
) -> list[Attempt]:
    """Return the earlier attempts of this request in this run, oldest first.

    Those whose orchestrator died before it could record them (also before the run was cleared) are put on record, once
    `wait` has come back, which is given their folder (their step may still be saving) and returns how the machine ended
    them, where that is still to be seen.
    """
    for run in (*request.cleared, request.run):
        folder = attempt_folder(request, run).rpartition("/")[0]
        numbers = sorted(int(n) for n in planner.store.names(folder) if n.isdecimal())
        for lost in (f"{folder}/{n}" for n in numbers if n < request.attempt):
            if planner.ledger.get(request.project, "run", lost, "done") is None:
                _record_lost(planner, request, lost, wait(lost) if wait else None)
    return recorded(planner.ledger, request.project, request.run, request.task, request.key)


def recorded(ledger: Ledger, project: str, run: str, task: str, key: str | None = None) -> list[Attempt]:
    """Return the attempts of a run's task on record, oldest first (`key`: on that partition or window alone)."""
    slots = f"{project}/runs/{safe_name(run)}/"
    mine = slots + (f"{safe_name(f'{task}-{key}')}/" if key is not None else f"{task}-")
    found = ledger.find(project, "run", prefix=mine[:KEPT])  # a longer key is kept shortened
    return attempts.of(e for e in found if attempts.folder_of(e.payload).startswith(mine))


def _record_lost(planner: BasePlanner, request: Request, folder: str, ending: Ending | None) -> None:
    """Record an attempt that nobody saw the end of, from what it has left in its folder and on its machine."""
    store = planner.store
    attempt, progress = attempts.read(store, folder), attempts.progress_of(store, folder)
    if attempt is None:
        return  # it had not begun
    try:
        result = read_result(
            store, StepConfig.model_validate_json(store.read(f"{folder}/config.json")), ending or -signal.SIGKILL
        )
    except (FileNotFoundError, ValidationError, StepFailed):
        result = Result(status="bug", error=StepError(kind="StepVanished", message="it left no result"))
    if attempts.cause(result) == "lost" and result.error is not None and ending is None:
        result.error.message = f"the worker of attempt {attempt.number} was lost, and its step left no result"
    ended = attempts.ended(attempt, result, progress, attempts.lost_wall(attempt, result, progress))
    payload = _payload(request.verb, request.key, folder, result, ended)
    planner.ledger.record(request.project, "run", folder, "done", request.actor, payload)


def record_unstarted(book: Ledger, request: Request, key: str, result: Result) -> None:
    """Record an attempt that ended before any process was started: nothing to do, or refused."""
    folder = f"{request.project}/runs/{safe_name(request.run)}/{safe_name(f'{request.task}-{key}')}/{request.attempt}"
    attempt = attempts.ended(
        attempts.begun(request.attempt, request.compute, None, request.queued_s), result, None, 0.0
    )
    payload = _payload(request.verb, key, folder, result, attempt)
    book.record(request.project, "run", f"{folder}-unstarted", "done", request.actor, payload)
