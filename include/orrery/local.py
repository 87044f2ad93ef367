"""Runs a step on this machine: its environment's Python, a session of its own, and an end to all it started."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
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
from typing import Any

from orrery import platform
from orrery.contract import StepConfig
from orrery.errors import UserError
from orrery.plan import Plan
from orrery.store import Store, trouble

log = logging.getLogger("orrery.local")

# What a step may not see: the orchestrator's own secrets and addresses.
WITHHELD_PREFIXES = ("AIRFLOW_", "_AIRFLOW", "OPENLINEAGE")
# Of our own variables a step sees these; the others are addresses and credentials of the orchestrator.
# ORRERY_SERVER marks what a server started, so that `orrery down` finds a step that outlived its worker.
SHOWN = frozenset({"ORRERY_CACHE", "ORRERY_LOG", "ORRERY_SERVER", "ORRERY_TEST_MARK"})
WITHHELD = frozenset({"PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"})
GRACE_S = 4.0  # below the 5 s after which Airflow's supervisor kills the worker
LONGEST_TMP = 50  # characters of var/tmp's path; see _scratch
LEFTOVER_S = 1.0  # what a step that has ended left running may take to end by itself
PROCESS = "process.json"  # in the attempt's folder: which process of which machine does it
OURS = ".step"  # the same in the step's temporary folder, which must stay as long as the step does


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

    A step that saves its state has the plan's `outlive` seconds for it. Airflow kills who called `stop` after five, and
    the step, in a session of its own, goes on; it sees the number as ORRERY_OUTLIVE and must end itself by then. The
    attempt after it waits for that (`wait_for_end`).
    """

    on_line: Callable[[str], None] | None = None
    logs: str = "json"
    _outlive: float = field(default=0.0, init=False)
    _told: float | None = field(default=None, init=False)
    _process: subprocess.Popen[str] | None = field(default=None, init=False)
    _watch: threading.Thread | None = field(default=None, init=False)

    def __call__(self, plan: Plan) -> int:
        config, self._outlive = plan.config, plan.outlive
        argv = [str(interpreter(plan.verb.environment)), "-m", "orrery", "step"]
        argv += ["--config", f"{config.store}/{config.folder}/config.json"]
        argv += ["--result", f"{config.store}/{config.folder}/result.json"]
        logs = self.logs if self.on_line else "text"
        with _scratch() as folder:
            own = {"TMPDIR": str(folder), "ORRERY_CACHE": str(_cache()), "ORRERY_LOG": logs}
            if self._outlive:
                own["ORRERY_OUTLIVE"] = str(self._outlive)
            env = step_environment({**_source_secrets(config), **plan.environment, **own})

            def started(pid: int) -> None:
                process = json.dumps(_identity(pid)).encode()
                (folder / OURS).write_bytes(process)
                Store(config.store).put(f"{config.folder}/{PROCESS}", process)

            return self._run(argv, env, started)

    def _run(self, argv: list[str], env: dict[str, str], started: Callable[[int], None]) -> int:
        self._told = None
        piped = subprocess.PIPE if self.on_line else None
        self._process = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=piped, stderr=subprocess.STDOUT if piped else None,
            text=True, errors="replace", start_new_session=True, cwd=platform.home(),
        )  # fmt: skip
        self._watch = threading.Thread(target=_end_leftovers, args=(self._process.pid,), name="step", daemon=True)
        self._watch.start()
        try:
            started(self._process.pid)
            if self.on_line and self._process.stdout:
                for line in self._process.stdout:
                    self.on_line(line.rstrip("\n"))
            self._watch.join()
            return self._process.wait()
        finally:
            self._stop(max(GRACE_S, self._outlive))
            if self._process.stdout:
                self._process.stdout.close()

    @property
    def pid(self) -> int | None:
        """The step's process number, while it runs. Its session has the same."""
        process, watch = self._process, self._watch
        return process.pid if process is not None and watch is not None and watch.is_alive() else None

    def tell(self) -> None:
        """Tell the step alone to stop, as a kubelet does: what it has started is the step's to tell."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the step and all it started, at once."""
        if (pid := self.pid) is not None:
            _signal_session(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the step and all it started, or leave it to save. Safe at any time, from any thread."""
        self._stop(GRACE_S)

    def _stop(self, patience: float) -> None:
        process, watch = self._process, self._watch
        if process is None or watch is None or process.returncode is not None:
            return
        if watch.is_alive():
            if self._told is None:
                self._told = time.monotonic()
                _signal_session(process.pid, signal.SIGTERM)
            watch.join(max(self._told + patience - time.monotonic(), 0.0))
            if watch.is_alive() and patience < self._outlive:
                return
        if watch.is_alive():
            _signal_session(process.pid, signal.SIGKILL)
            watch.join()
        process.wait()


def wait_for_end(store: Store, folder: str, patience: float) -> None:
    """Wait until the process of an earlier attempt on this machine has ended; kill it when that takes too long.

    Its worker is gone, so it has been told to stop, and may be saving. Two attempts must not train side by side.
    """
    try:
        found = json.loads(store.read(f"{folder}/{PROCESS}"))
    except (FileNotFoundError, ValueError):
        return
    if not _is_alive(found):
        return
    log.info("%s is still saving: this attempt waits for its end, at most %.0f s", folder, patience)
    _signal_session(found["pid"], signal.SIGTERM)  # again, in case that nobody could tell it
    deadline = time.monotonic() + patience
    while _is_alive(found):
        if time.monotonic() > deadline:
            log.warning("%s did not end within %.0f s and is killed", folder, patience)
            _signal_session(found["pid"], signal.SIGKILL)
            return
        time.sleep(0.05)
    _signal_session(found["pid"], signal.SIGKILL)  # what it left running


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
            if machine == _machine() and not _runs(number) and not _in_use(left):
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


def _identity(pid: int) -> dict[str, Any]:
    """Return what tells a process from every other of any machine: numbers are used again."""
    return {"machine": _machine(), "pid": pid, "born": _born(pid)}


def _born(pid: int) -> str:
    """Return when a process began, in ticks since this boot; empty where /proc does not tell (macOS)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _is_alive(process: dict[str, Any]) -> bool:
    """Tell whether a process that `_identity` described runs here still; a zombie does not."""
    if not isinstance(process, dict) or process.get("machine") != _machine() or not isinstance(process.get("pid"), int):
        return False
    pid = process["pid"]
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
    except OSError:
        pass
    return _runs(str(pid)) and _born(pid) == process.get("born")


def _in_use(folder: Path) -> bool:
    """Tell whether a step's temporary folder is used still: the step may outlive its worker."""
    try:
        return _is_alive(json.loads((folder / OURS).read_bytes()))
    except (OSError, ValueError):
        return False


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


def relay(line: str, emit: Callable[[int, str, dict[str, Any]], None]) -> None:
    """Hand one line of a step's JSON log to `emit(level, event, fields)`; other lines go on as they are."""
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
