"""The local servers: Airflow (`airflow standalone`, LocalExecutor, SQLite), MLflow and, when it is asked for, a small
language model (`orrery.llm.server`), on loopback only.

`up` starts what is not running and waits until it is healthy, `down` ends every process of all and
`status` says how they are. All state is under `var/` of the home folder:

    var/airflow   AIRFLOW_HOME: database, task logs, passwords.json, secrets (folder 0700, files 0600)
    var/mlflow    MLflow's database and artifacts
    var/log       what the servers print; the run before this one is *.log.1
    var/run       who runs: pid and start time of each server

Nothing is lost when a launcher is killed at any moment: the servers carry a marker in their environment,
by which the next `up` or `down` finds them without their files.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orrery.airflow_api import AirflowApi
from orrery.errors import OrreryError, UserError
from orrery.servers import config, processes, settings
from orrery.servers.config import HOST, ServerName, airflow_environment
from orrery.servers.processes import Process
from orrery.uri import masked

__all__ = ["ServerStatus", "airflow_environment", "airflow_login", "down", "status", "statuses", "up"]

# What `up` starts; the language model comes with `up --llm` alone, and is ended and told of wherever it runs.
SERVERS: tuple[ServerName, ...] = ("airflow", "mlflow")
LLM: ServerName = "llm"
TITLES: Mapping[ServerName, str] = {"airflow": "Airflow", "mlflow": "MLflow", "llm": "the language model"}
# Seconds to become healthy: several times what two busy cores need.
PATIENCE: Mapping[ServerName, float] = {"airflow": 240.0, "mlflow": 180.0, "llm": 120.0}
# Seconds in which a server that was healthy may become so again.
RECOVERY_S = 60.0
COMPONENTS = ("metadatabase", "scheduler", "triggerer", "dag_processor")
COMMANDS: Mapping[ServerName, Callable[[Path], config.Command]] = {
    "airflow": config.airflow_command,
    "mlflow": config.mlflow_command,
    "llm": config.llm_command,
}
State = Literal["stopped", "starting", "unhealthy", "healthy", "elsewhere"]


@dataclass(frozen=True)
class Record:
    """What `var/run/<server>.json` holds about a server that was started."""

    pid: int
    start: int
    port: int
    was_healthy: bool = False

    @property
    def process(self) -> Process:
        """Return the server's first process."""
        return Process(self.pid, self.start)

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://{HOST}:{self.port}"


@dataclass(frozen=True)
class ServerStatus:
    """How one server is."""

    name: ServerName
    state: State
    url: str
    pid: int | None = None
    detail: str = ""


def up(home: Path | None = None, *, console: Console | None = None, llm: bool = False) -> None:
    """Start the servers that are not running, wait until they are healthy, and load airflow_settings.yaml.

    With `llm` a language model too. Raises `UserError` before anything starts when the settings are wrong, a port is
    taken or its environment is missing, and later when a server ends or does not become healthy in time.
    """
    processes.require()
    home = _home(home)
    console = console or Console()
    objects = settings.read(home)
    wanted = _wanted(console)
    if llm:
        config.llm_command(home)  # an environment that is missing is said before anything starts
        wanted = [*wanted, LLM]
    with _lock(home):
        records = {name: record for name in wanted if (record := _running(home, name, console))}
        _check_ports([name for name in wanted if name not in records])
        for name in wanted:
            if name in records:
                _say_running(name, records[name], console)
            else:
                records[name] = _start(home, name)
    _wait(home, records, console)
    with _login(home, records["airflow"]) as api:
        settings.load(objects, api)
    for name in wanted:
        _say(console, f"✓ {TITLES[name]} at {records[name].url}{'/v1' if name == LLM else ''}", style="green")
    _say_login(home, console)


def _say_login(home: Path, console: Console) -> None:
    _say(console, f"  sign in to Airflow as {config.ADMIN} with the password in {config.passwords_file(home)}")


def down(home: Path | None = None, *, console: Console | None = None) -> None:
    """End every process of all servers, also those that a killed launcher left; nothing to end is fine."""
    processes.require()
    home = _home(home)
    console = console or Console()
    with _lock(home):
        for name in SERVERS:
            count = _end(home, name)
            _say(console, f"{TITLES[name]}: {f'ended {count} processes' if count else 'was not running'}")
        if count := _end(home, LLM):
            _say(console, f"{TITLES[LLM]}: ended {count} processes")


def status(home: Path | None = None, *, console: Console | None = None) -> bool:
    """Print how the servers are; return whether all are healthy."""
    console = console or Console()
    table = Table("server", "state", "address", "pid", "", box=None, pad_edge=False)
    found = statuses(home)
    colours = {"healthy": "green", "elsewhere": "green", "starting": "yellow", "stopped": "dim", "unhealthy": "red"}
    for item in found:
        state = Text(item.state, style=colours[item.state])
        table.add_row(TITLES[item.name], state, item.url, str(item.pid or ""), Text(item.detail))
    console.print(table)
    if any(item.name == "airflow" and item.state == "healthy" for item in found):
        _say_login(_home(home), console)
    return all(item.state in ("healthy", "elsewhere") for item in found)


def statuses(home: Path | None = None) -> list[ServerStatus]:
    """Return how each server is, without changing anything."""
    processes.require()
    home = _home(home)
    found = []
    for name in (*SERVERS, LLM):
        record = _read(home, name)
        if record is None or not record.process.alive():
            strays = len(processes.family(config.marker(home, name)))
            left = (
                f"left behind: {strays} processes; `orrery up{' --llm' if name == LLM else ''}` replaces them, "
                "`orrery down` ends all servers"
            )
            detail = left if strays else ""
            if name == LLM and record is None and not strays:
                continue  # nobody asked for it
            elsewhere = masked(os.environ["ORRERY_MLFLOW"]) if name == "mlflow" and _mlflow_elsewhere() else None
            found.append(ServerStatus(name, "elsewhere" if elsewhere else "stopped", elsewhere or "", detail=detail))
            continue
        problem = _problem(name, record)
        state: State = "healthy" if problem is None else "unhealthy" if record.was_healthy else "starting"
        found.append(ServerStatus(name, state, record.url, record.pid, problem or ""))
    return found


def airflow_login(home: Path | None = None) -> tuple[str, str, str]:
    """Return address, user and password of the local Airflow."""
    home = _home(home)
    record = _read(home, "airflow")
    return record.url if record else config.url("airflow"), config.ADMIN, config.admin_password(home)


# starting


def _start(home: Path, name: ServerName) -> Record:
    """Start one server in a session of its own, and note who it is."""
    command = COMMANDS[name](home)
    log = _log(home, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.1"))
    with log.open("wb") as output:
        server = subprocess.Popen(
            command.argv,
            env=command.environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server.returncode = 0  # it is on its own from here; Popen would warn that nobody waits for it
    process = processes.identify(server.pid)
    # Ended already? A number that nobody has says so to all who ask; the log says why.
    record = Record(server.pid, process.start if process else -1, config.port(name))
    _write(home, name, record)
    return record


def _wait(home: Path, records: Mapping[ServerName, Record], console: Console) -> None:
    """Wait until all are healthy, saying so on the way. Raises `UserError` for one that ends or takes too long."""
    began = time.monotonic()
    spoken = began
    waiting = dict.fromkeys(records, "starting")
    quiet = not console.is_terminal
    with nullcontext() if quiet else console.status("") as line:
        while waiting:
            for name in list(waiting):
                took = time.monotonic() - began
                problem = _problem(name, records[name])
                if problem is None:
                    del waiting[name]
                    _write(home, name, Record(**{**asdict(records[name]), "was_healthy": True}))
                    if took > 2:
                        _say(console, f"{TITLES[name]} is healthy after {took:.0f} s")
                    continue
                waiting[name] = problem
                if not _alive(records[name]):
                    what = f"{TITLES[name]} ended while it was starting"
                    _fail(home, name, what, "once the cause is mended, run `orrery up` again")
                if took > PATIENCE[name]:
                    what = f"{TITLES[name]} is not healthy after {took:.0f} s ({problem})"
                    _fail(home, name, what, "`orrery up` waits on, `orrery down` ends it")
            if waiting:
                now = time.monotonic()
                text = ", ".join(f"{TITLES[name]} ({problem})" for name, problem in waiting.items())
                if line is not None:
                    line.update(f"{now - began:.0f} s  waiting for {text}")
                elif now - spoken >= 10:
                    spoken = now
                    _say(console, f"{now - began:.0f} s  waiting for {text}")
                time.sleep(0.5)


def _problem(name: ServerName, record: Record) -> str | None:
    """Return what keeps a server from being healthy; nothing when it is."""
    try:
        if name != "airflow":
            answer = httpx.get(f"{record.url}/health", timeout=5, trust_env=False)
            return None if answer.status_code == httpx.codes.OK else f"answers {answer.status_code}"
        answer = httpx.get(f"{record.url}/api/v2/monitor/health", timeout=10, trust_env=False)
        health = answer.json()
        sick = [part.replace("_", " ") for part in COMPONENTS if (health.get(part) or {}).get("status") != "healthy"]
        if sick:
            return f"no sign of life from {', '.join(sick)}"
        # What tasks talk to builds itself at the first request, for ten seconds and more, and holds up
        # the whole server meanwhile: better now than at the first task.
        answer = httpx.get(f"{record.url}/execution/health", timeout=10, trust_env=False)
        return None if answer.status_code == httpx.codes.OK else f"its task API answers {answer.status_code}"
    except httpx.TimeoutException:
        return "is busy"
    except httpx.TransportError:
        return "does not answer"
    except (ValueError, AttributeError):
        return f"answers {answer.status_code}, not as {TITLES[name]} does"


def _alive(record: Record) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(record.pid, os.WNOHANG)  # our own child would stay a zombie
    return record.process.alive()


def _fail(home: Path, name: ServerName, what: str, hint: str) -> None:
    log = _log(home, name)
    try:
        lines = log.read_text(errors="replace").splitlines()[-20:]
    except OSError:
        lines = []
    last = "\n".join(f"  {line[:300]}" for line in lines) or "  (it printed nothing)"
    raise UserError(f"{what}; the last lines of {log}:\n{last}", hint=hint)


def _check_ports(names: list[ServerName]) -> None:
    """Raise `UserError` for a port that two servers share or that someone else has."""
    ports: dict[ServerName, int] = {}
    for name in dict.fromkeys((*SERVERS, *names)):
        ports[name] = config.port(name)
        same = next((other for other in ports if other != name and ports[other] == ports[name]), None)
        if names and same:
            variables = f"{config.PORTS[same][0]} and {config.PORTS[name][0]}"
            who = "both servers" if LLM not in (same, name) else f"{TITLES[same]} and {TITLES[name]} both"
            raise UserError(f"{who} have port {ports[name]}", hint=f"set {variables} to two different ports")
    for name in names:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, ports[name]))
            except OSError as e:
                if e.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                holder = processes.port_holder(ports[name])
                who = f"process {holder.pid} ({holder.command()[:120]})" if holder else "another user's process"
                raise UserError(
                    f"port {ports[name]}, which {TITLES[name]} needs, is taken by {who}",
                    hint=f"end it, or set {config.PORTS[name][0]} to a free port",
                ) from None


def _wanted(console: Console) -> list[ServerName]:
    if not _mlflow_elsewhere():
        return list(SERVERS)
    _say(console, f"MLflow is at {masked(os.environ['ORRERY_MLFLOW'])} (ORRERY_MLFLOW): none is started here")
    return ["airflow"]


def _mlflow_elsewhere() -> bool:
    """Whether ORRERY_MLFLOW names a server other than the one that would be started here."""
    given = os.environ.get("ORRERY_MLFLOW", "").rstrip("/")
    return bool(given) and given not in (config.url("mlflow"), config.url("mlflow").replace(HOST, "localhost"))


def _say_running(name: ServerName, record: Record, console: Console) -> None:
    text = f"{TITLES[name]} {'already runs' if record.was_healthy else 'is already starting'} at {record.url}"
    if record.port != config.port(name):
        text += f", not at port {config.port(name)} ({config.PORTS[name][0]}): `orrery down` first to move it"
    _say(console, text)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


# who runs


def _running(home: Path, name: ServerName, console: Console) -> Record | None:
    """Return the server when it runs and is of use; end what is left of it otherwise."""
    record = _read(home, name)
    if record is not None and record.process.alive():
        problem = _lasting_problem(name, record, console) if record.was_healthy else None
        if problem is None:
            return record
        _say(console, f"{TITLES[name]} is ended, with what it runs, and started again: {problem}", style="yellow")
    _end(home, name)
    return None


def _lasting_problem(name: ServerName, record: Record, console: Console) -> str | None:
    """Return what is wrong with a server that was healthy once; nothing when it comes back in time.

    Its running tasks end with it, and a busy machine can keep it silent for a while: so it is given long, and
    told of.
    """
    began, spoken = time.monotonic(), False
    while (problem := _problem(name, record)) is not None and record.process.alive():
        waited = time.monotonic() - began
        if waited > RECOVERY_S:
            return f"for {waited:.0f} s it {problem}"
        if not spoken:
            _say(console, f"{TITLES[name]} {problem}: waiting up to {RECOVERY_S:.0f} s for it")
            spoken = True
        time.sleep(min(2.0, RECOVERY_S / 4))
    return problem


def _end(home: Path, name: ServerName) -> int:
    """End all processes of one server; return how many there were."""
    record = _read(home, name)
    leader = record.process if record else None
    marker = config.marker(home, name)

    def left() -> list[Process]:
        if record is not None:
            _alive(record)
        return processes.family(marker, leader)

    count = processes.end(left)
    _record_file(home, name).unlink(missing_ok=True)
    return count


def _record_file(home: Path, name: ServerName) -> Path:
    return home / "var" / "run" / f"{name}.json"


def _read(home: Path, name: ServerName) -> Record | None:
    """Return what is noted about a server. A note that cannot be read is none: the marker finds the processes."""
    try:
        return Record(**json.loads(_record_file(home, name).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(home: Path, name: ServerName, record: Record) -> None:
    file = _record_file(home, name)
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.write_text(json.dumps(asdict(record)) + "\n")
    new.replace(file)


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """Let one launcher at a time start or end servers; the system frees the lock of one that is killed."""
    folder = home / "var" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        deadline = time.monotonic() + 120
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    what = f"another `orrery up` or `orrery down` has held {file.name} for two minutes"
                    raise OrreryError(what) from None
                time.sleep(0.2)
        yield


def _login(home: Path, record: Record) -> AirflowApi:
    return AirflowApi(record.url, config.ADMIN, config.admin_password(home))


def _log(home: Path, name: ServerName) -> Path:
    return home / "var" / "log" / f"{name}.log"


def _home(home: Path | None) -> Path:
    if home is None:
        from orrery import platform  # only here: a broken platform.yaml must not keep `orrery down` from work

        home = platform.home()
    return home.resolve()
