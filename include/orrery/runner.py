"""One step from request to ledger: plan, skip or launch, read the result, record. The Dags and the command
line both come through here, so they cannot differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from orrery import bundle, platform
from orrery.contract import Result, StepConfig
from orrery.errors import Interrupted, OrreryError, TryAgain, UserError
from orrery.lease import Lease
from orrery.ledger import Entry, Kind, Ledger, unfinished
from orrery.plan import Plan, Planner, Request, safe_name
from orrery.store import Store, trouble

# What a step may not see: the orchestrator's own secrets and addresses.
WITHHELD_PREFIXES = ("AIRFLOW_", "_AIRFLOW")
# Of our own variables a step sees these; the others are addresses and credentials of the orchestrator.
# ORRERY_SERVER marks what a server started, so that `orrery down` finds a step that outlived its worker.
SHOWN = frozenset({"ORRERY_CACHE", "ORRERY_LOG", "ORRERY_SERVER", "ORRERY_TEST_MARK"})
WITHHELD = frozenset({"PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"})
# What changes the champion, and what the ledger calls it.
CHANGES: dict[str, Kind] = {"promote": "promotion", "rollback": "rollback"}
GRACE_S = 4.0  # below the 5 s after which Airflow's supervisor kills the worker
LONGEST_TMP = 50  # characters of var/tmp's path; see _scratch
LEFTOVER_S = 1.0  # what a step that has ended left running may take to end by itself


class StepFailed(OrreryError):
    """A step ended with a bug, or vanished; another attempt may be worth it."""

    exit_code = 1


class StepVanished(StepFailed):
    """A step's process ended without a result: killed from outside, out of memory, or a crash in native code."""


class Launcher(Protocol):
    """Starts the process of a planned step, waits, and returns its exit code (negative: the signal)."""

    def __call__(self, plan: Plan) -> int: ...


def venvs() -> Path:
    """Return the folder of the environments: `ORRERY_VENVS`, or .venvs/."""
    return Path(os.environ.get("ORRERY_VENVS") or platform.home() / ".venvs")


def interpreter(environment: str) -> Path:
    """Return an environment's Python. Raises `UserError` when it has not been made."""
    python = venvs() / environment / "bin" / "python"
    if not python.exists():
        raise UserError(
            f"environment {environment!r} is not there ({python})", hint=f"python3.11 docker/venv.py {environment}"
        )
    return python


def step_environment(extra: dict[str, str]) -> dict[str, str]:
    """Return a step's environment: the caller's, less the orchestrator's secrets and the sources'."""
    own = {k: v for k, v in os.environ.items() if k not in WITHHELD and not k.startswith(WITHHELD_PREFIXES)}
    own = {k: v for k, v in own.items() if not k.startswith("ORRERY_") or k in SHOWN}
    return {**own, "PYTHONUNBUFFERED": "1", "ORRERY_PARENT": str(os.getpid()), **extra}


def _source_secrets(config: StepConfig) -> dict[str, str]:
    """Return the variables of the SQL sources that this very step reads, as far as they are set here."""
    names = [s.get("secret_env") for s in config.params.get("sources", {}).values()]
    return {n: os.environ[n] for n in names if n and n in os.environ}


@dataclass
class LocalProcess:
    """Runs a step in its environment's Python, in a session of its own, its output line by line to `on_line`.

    The step is told to stop (SIGTERM, then SIGKILL) when `stop()` is called, and by the kernel when this process
    dies. What it leaves running when it ends, however it ends, is ended too.
    """

    on_line: Callable[[str], None] | None = None
    logs: str = "json"
    _process: subprocess.Popen[str] | None = field(default=None, init=False)
    _watch: threading.Thread | None = field(default=None, init=False)

    def __call__(self, plan: Plan) -> int:
        config = plan.config
        argv = [str(interpreter(plan.verb.environment)), "-m", "orrery", "step"]
        argv += ["--config", f"{config.store}/{config.folder}/config.json"]
        argv += ["--result", f"{config.store}/{config.folder}/result.json"]
        logs = self.logs if self.on_line else "text"
        with _scratch() as folder:
            places = {"TMPDIR": str(folder), "ORRERY_CACHE": str(_cache())}
            env = step_environment({**_source_secrets(config), **plan.environment, **places, "ORRERY_LOG": logs})
            return self._run(argv, env)

    def _run(self, argv: list[str], env: dict[str, str]) -> int:
        piped = subprocess.PIPE if self.on_line else None
        self._process = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=piped, stderr=subprocess.STDOUT if piped else None,
            text=True, errors="replace", start_new_session=True, cwd=platform.home(),
        )  # fmt: skip
        self._watch = threading.Thread(target=_end_leftovers, args=(self._process.pid,), name="step", daemon=True)
        self._watch.start()
        try:
            if self.on_line and self._process.stdout:
                for line in self._process.stdout:
                    self.on_line(line.rstrip("\n"))
            self._watch.join()
            return self._process.wait()
        finally:
            self.stop()
            if self._process.stdout:
                self._process.stdout.close()

    def stop(self, grace: float = GRACE_S) -> None:
        """End the step and all it started. Safe to call at any time, from any thread."""
        process, watch = self._process, self._watch
        if process is None or watch is None or process.returncode is not None:
            return
        if watch.is_alive():
            _signal_session(process.pid, signal.SIGTERM)
            watch.join(grace)
        if watch.is_alive():
            _signal_session(process.pid, signal.SIGKILL)
            watch.join()
        process.wait()


def _cache() -> Path:
    """Return the folder of what steps keep for each other: `ORRERY_CACHE`, or var/cache."""
    return Path(os.environ.get("ORRERY_CACHE") or platform.home() / "var" / "cache")


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Make a step's own temporary folder; remove it when the step has ended, however: killed, it cannot itself.

    It lies under var/tmp, with all other state; where that makes a long path, in the system's, since the
    sockets that libraries put there may have 107 characters. Its name begins with this machine and the number
    of this process, so that the next one here removes what a killed one left.
    """
    home = platform.home() / "var" / "tmp"
    with trouble(str(home)):
        home.mkdir(parents=True, exist_ok=True)
        for left in home.iterdir():
            machine, number, *_ = f"{left.name}--".split("-")
            if machine == _machine() and not _runs(number):
                shutil.rmtree(left, ignore_errors=True)
        parent = home if len(str(home)) <= LONGEST_TMP else None
        folder = tempfile.mkdtemp(prefix=f"{_machine()}-{os.getpid()}-" if parent else "orrery-", dir=parent)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _machine() -> str:
    """Return a short name of this machine or container: process numbers of another mean nothing here."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _runs(pid: str) -> bool:
    """Tell whether a process is there; what is no number says nothing, and is taken for one that is."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def _end_leftovers(pid: int) -> None:
    """Wait until the step has ended, then end what it started: it would hold the log open, or work on unseen.

    The step is not reaped here, so that its number stays its own for as long as it is used.
    """
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return
    deadline = time.monotonic() + LEFTOVER_S
    while _others(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_session(pid, signal.SIGKILL)


def _others(group: int) -> bool:
    """Tell whether a process group has a living process beside its leader (Linux; elsewhere: perhaps)."""
    try:
        numbers = [p.name for p in Path("/proc").iterdir() if p.name.isdigit() and int(p.name) != group]
    except OSError:
        return True
    for number in numbers:
        try:
            with open(f"/proc/{number}/stat") as f:
                state, _, its_group = f.read().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def _signal_session(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # nobody there; on macOS also: only a zombie
        return


def prepare(plan: Plan, store: Store) -> None:
    """Write the project's bundle and the attempt's config document, whole, before anything is started."""
    if plan.packed is not None:
        bundle.push(store, plan.packed)
    # The same attempt may have been started before (a worker that was lost): its result is not this one's.
    store.remove(f"{plan.config.folder}/result.json")
    store.put(f"{plan.config.folder}/config.json", plan.config.model_dump_json(indent=1).encode())


def run(planner: Planner, request: Request, launch: Launcher, started: Callable[[Plan], None] | None = None) -> Result:
    """Carry one request to its end and record it. Raises the error that the result document tells.

    `started` is told of the plan just before the step is launched (operator links need it then).
    """
    if request.verb not in CHANGES:
        return _carry(planner, request, launch, started)
    # One change of the champion at a time, whoever asks: what the plan was checked against must still hold.
    folder = f"{request.project}/champion/lease"
    with Lease(planner.store, folder, safe_name(request.run), f"{request.task}-{request.attempt}"):
        return _carry(planner, request, launch, started)


def _carry(planner: Planner, request: Request, launch: Launcher, started: Callable[[Plan], None] | None) -> Result:
    plan = planner.plan(request)
    if plan.done is not None:
        _record(planner, request, plan, plan.done)
        return plan.done
    intent = _intend(planner, request, plan) if request.verb in CHANGES else None
    prepare(plan, planner.store)
    if started:
        started(plan)
    code = launch(plan)
    result = read_result(planner.store, plan.config, code)
    if intent is not None and result.status == "done":
        _complete(planner, intent)
    _record(planner, request, plan, result)
    raise_for(plan, result)
    return result


def read_result(store: Store, config: StepConfig, code: int) -> Result:
    """Return what an attempt left. A process that vanished is judged by the store: committed means done."""
    try:
        return Result.model_validate_json(store.read(f"{config.folder}/result.json"))
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
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    hint = "often out of memory: look at the machine's log" if code == -9 else "see its log above"
    error = {"kind": "StepVanished", "message": f"{config.verb} {config.key} left no result ({how})", "hint": hint}
    return Result.model_validate({"status": "interrupted" if code in (143, -15) else "bug", "error": error})


def raise_for(plan: Plan, result: Result) -> None:
    """Raise the error that a result tells, if any."""
    if result.status == "done":
        return
    if result.error is None:
        raise StepFailed(f"{plan.config.verb} {plan.config.key} ended as {result.status} and does not say why")
    kinds: dict[str, type[OrreryError]] = {"user": UserError, "try_again": TryAgain, "interrupted": Interrupted}
    kind = kinds.get(result.status, StepVanished if result.error.kind == "StepVanished" else StepFailed)
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


def _promotion(planner: Planner, request: Request, plan: Plan) -> dict[str, Any]:
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


def _intend(planner: Planner, request: Request, plan: Plan) -> Entry:
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


def _complete(planner: Planner, intent: Entry) -> None:
    """Record that the effect is done, with what was intended: after a crash `previous` reads as the new version."""
    planner.ledger.record(intent.project, intent.kind, intent.key, "done", intent.actor, intent.payload)


def _kind(request: Request) -> Kind:
    return CHANGES[request.verb]


def _record(planner: Planner, request: Request, plan: Plan, result: Result) -> None:
    """Append the attempt (and a gate's decision) to the ledger, once."""
    payload = _payload(request.verb, request.key, plan.config.folder, result)
    if request.verb == "register" and "model_version" in result.facts:
        payload |= {"version": result.facts["model_version"], "model": plan.config.inputs["candidate"][0].path}
    planner.ledger.record(request.project, "run", plan.config.folder, "done", request.actor, payload)
    if request.verb == "gate" and result.status == "done":
        planner.ledger.record(
            request.project, "decision", f"{plan.config.run}/{request.key}", "done", request.actor, payload
        )


def _payload(verb: str, key: str, attempt: str, result: Result) -> dict[str, Any]:
    """Return what the ledger keeps of an attempt."""
    told = {"status", "verdict", "skipped", "seconds", "output", "digest", "metrics", "reasons"}
    payload: dict[str, Any] = json.loads(result.model_dump_json(include=told))
    payload |= {"verb": verb, "key": key, "attempt": attempt}
    if result.error:
        payload["error"] = result.error.message
    return payload


def record_skip(planner: Planner, request: Request, why: str) -> Result:
    """Record that there was nothing to do, and return that as the result."""
    result = Result(verdict="skipped", skipped=why, reasons=[why])
    record_unstarted(planner.ledger, request, request.key, result)
    return result


def record_unstarted(book: Ledger, request: Request, key: str, result: Result) -> None:
    """Record an attempt that ended before any process was started: nothing to do, or refused."""
    attempt = f"{request.project}/runs/{safe_name(request.run)}/{safe_name(f'{request.task}-{key}')}/{request.attempt}"
    payload = _payload(request.verb, key, attempt, result)
    book.record(request.project, "run", f"{attempt}-unstarted", "done", request.actor, payload)


def relay(line: str, emit: Callable[[int, str, dict[str, Any]], None]) -> None:
    """Hand one line of a step's JSON log to `emit(level, event, fields)`; other lines go on as they are."""
    import logging

    if line.startswith("{"):
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if isinstance(fields, dict) and "event" in fields:
            level = getattr(logging, str(fields.pop("level", "info")).upper(), logging.INFO)
            fields.pop("timestamp", None)
            emit(level, str(fields.pop("event")), fields)
            return
    emit(logging.INFO, line, {})


__all__ = [
    "LocalProcess",
    "StepFailed",
    "StepVanished",
    "interpreter",
    "relay",
    "run",
    "step_environment",
    "venvs",
]
