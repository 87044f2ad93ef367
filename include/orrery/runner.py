"""One step from request to ledger: plan, skip or launch, read the result, record. The Dags and the command
line both come through here, so they cannot differ.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orrery import platform
from orrery.contract import Result, StepConfig
from orrery.errors import Interrupted, OrreryError, TryAgain, UserError
from orrery.plan import Plan, Planner, Request
from orrery.store import Store

# What a step may not see: the orchestrator's own secrets and addresses.
WITHHELD_PREFIXES = ("AIRFLOW_", "_AIRFLOW", "ORRERY_LEDGER", "ORRERY_AIRFLOW", "ORRERY_SERVER")
WITHHELD = frozenset({"PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"})
GRACE_S = 4.0  # below the 5 s after which Airflow's supervisor kills the worker


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
    """Return a step's environment: the caller's, less the orchestrator's secrets."""
    own = {k: v for k, v in os.environ.items() if k not in WITHHELD and not k.startswith(WITHHELD_PREFIXES)}
    return {**own, "PYTHONUNBUFFERED": "1", "ORRERY_PARENT": str(os.getpid()), **extra}


@dataclass
class LocalProcess:
    """Runs a step in its environment's Python, in a session of its own, its output line by line to `on_line`.

    The step is told to stop (SIGTERM, then SIGKILL) when `stop()` is called, and by the kernel when this process dies.
    """

    on_line: Callable[[str], None] | None = None
    logs: str = "json"
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def __call__(self, plan: Plan) -> int:
        config = plan.config
        argv = [str(interpreter(plan.verb.environment)), "-m", "orrery", "step"]
        argv += ["--config", f"{config.store}/{config.folder}/config.json"]
        argv += ["--result", f"{config.store}/{config.folder}/result.json"]
        env = step_environment({**plan.environment, "ORRERY_LOG": self.logs if self.on_line else "text"})
        piped = subprocess.PIPE if self.on_line else None
        self._process = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=piped, stderr=subprocess.STDOUT if piped else None,
            text=True, errors="replace", start_new_session=True, cwd=platform.home(),
        )  # fmt: skip
        try:
            if self.on_line and self._process.stdout:
                for line in self._process.stdout:
                    self.on_line(line.rstrip("\n"))
            return self._process.wait()
        finally:
            self.stop()

    def stop(self, grace: float = GRACE_S) -> None:
        """End the step and all it started. Safe to call at any time, from any thread."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        _signal_session(process.pid, signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            _signal_session(process.pid, signal.SIGKILL)
            process.wait()


def _signal_session(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def follow_parent() -> None:
    """Ask the kernel to end this process when its parent dies (a step called from `LocalProcess`)."""
    parent = os.environ.pop("ORRERY_PARENT", "")
    if not parent or sys.platform != "linux":
        return
    import ctypes

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def prepare(plan: Plan, store: Store) -> None:
    """Write the attempt's config document, whole, before anything is started."""
    store.put(f"{plan.config.folder}/config.json", plan.config.model_dump_json(indent=1).encode())


def run(planner: Planner, request: Request, launch: Launcher, started: Callable[[Plan], None] | None = None) -> Result:
    """Carry one request to its end and record it. Raises the error that the result document tells.

    `started` is told of the plan just before the step is launched (operator links need it then).
    """
    effect = request.verb in ("promote", "rollback")
    plan = planner.plan(request)
    if plan.done is not None:
        _record(planner, request, plan, plan.done)
        return plan.done
    if effect:
        _intend(planner, request, plan)
    prepare(plan, planner.store)
    if started:
        started(plan)
    code = launch(plan)
    result = read_result(planner.store, plan.config, code)
    if effect and result.status == "done":
        _complete(planner, request, plan)
    _record(planner, request, plan, result)
    raise_for(plan, result)
    return result


def read_result(store: Store, config: StepConfig, code: int) -> Result:
    """Return what an attempt left. A process that vanished is judged by the store: committed means done."""
    try:
        return Result.model_validate_json(store.read(f"{config.folder}/result.json"))
    except FileNotFoundError:
        pass
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
    if result.status == "done" or result.error is None:
        return
    kinds: dict[str, type[OrreryError]] = {"user": UserError, "try_again": TryAgain, "interrupted": Interrupted}
    kind = kinds.get(result.status, StepVanished if result.error.kind == "StepVanished" else StepFailed)
    details: dict[str, object] = {
        **result.error.details,
        "links": result.links,
        "config": f"{plan.config.folder}/config.json",
    }
    raise kind(result.error.message, hint=result.error.hint, details=details)


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


def _intend(planner: Planner, request: Request, plan: Plan) -> None:
    payload = _promotion(planner, request, plan)
    planner.ledger.record(request.project, _kind(request), plan.config.run, "intent", request.actor, payload)


def _complete(planner: Planner, request: Request, plan: Plan) -> None:
    """Record that the effect is done, with what was intended: after a crash `previous` reads as the new version."""
    kind = _kind(request)
    intent = planner.ledger.get(request.project, kind, plan.config.run, "intent")
    assert intent is not None
    planner.ledger.record(request.project, kind, plan.config.run, "done", intent.actor, intent.payload)


def _kind(request: Request) -> Any:
    return {"promote": "promotion", "rollback": "rollback"}[request.verb]


def _record(planner: Planner, request: Request, plan: Plan, result: Result) -> None:
    """Append the attempt (and a gate's decision) to the ledger, once."""
    payload = json.loads(
        result.model_dump_json(include={"status", "verdict", "skipped", "seconds", "output", "digest", "metrics"})
    )
    payload |= {"verb": request.verb, "key": request.key, "attempt": plan.config.folder, "reasons": result.reasons}
    if result.error:
        payload["error"] = result.error.message
    if request.verb == "register" and "model_version" in result.facts:
        payload |= {"version": result.facts["model_version"], "model": plan.config.inputs["candidate"][0].path}
    planner.ledger.record(request.project, "run", plan.config.folder, "done", request.actor, payload)
    if request.verb == "gate" and result.status == "done":
        planner.ledger.record(
            request.project, "decision", f"{plan.config.run}/{request.key}", "done", request.actor, payload
        )


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


def threads(cpu: str) -> int:
    """Return how many threads a compute class's `cpu` stands for, at least one."""
    cores = float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
    return max(1, min(int(cores), os.cpu_count() or 1))


__all__ = [
    "LocalProcess",
    "StepFailed",
    "StepVanished",
    "follow_parent",
    "interpreter",
    "relay",
    "run",
    "step_environment",
    "threads",
    "venvs",
]
