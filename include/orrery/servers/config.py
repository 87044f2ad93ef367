"""How the local servers are configured: ports, folders, secrets, and the environment of each."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import sys
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orrery.databases import with_driver
from orrery.errors import UserError
from orrery.servers.processes import MARKER

ServerName = Literal["airflow", "mlflow", "llm"]
HOST = "127.0.0.1"
ADMIN = "admin"
PORTS: dict[ServerName, tuple[str, int]] = {
    "airflow": ("ORRERY_AIRFLOW_PORT", 8080),
    "mlflow": ("ORRERY_MLFLOW_PORT", 5500),
    "llm": ("ORRERY_LLM_PORT", 8090),
}


@dataclass(frozen=True)
class Command:
    """What to start, and with which environment."""

    argv: tuple[str, ...]
    environment: dict[str, str]


def port(server: ServerName) -> int:
    """Return a server's port from its variable. Raises `UserError` for one that cannot be."""
    variable, default = PORTS[server]
    return _integer(variable, default, low=1, high=65535)


def url(server: ServerName) -> str:
    """Return a server's address."""
    return f"http://{HOST}:{port(server)}"


def marker(home: Path, server: ServerName) -> str:
    """Return the value by which the processes of one home's server are known."""
    digest = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16]
    return f"{digest}:{server}"


def passwords_file(home: Path) -> Path:
    """Return the file with the password of Airflow's user `admin` (JSON, mode 0600)."""
    return home / "var" / "airflow" / "passwords.json"


def admin_password(home: Path) -> str:
    """Return the password of Airflow's user `admin`, made on first use."""
    file = passwords_file(home)
    _write_once(file, json.dumps({ADMIN: secrets.token_urlsafe(18)}) + "\n")
    try:
        password = json.loads(file.read_text())[ADMIN]
    except (OSError, ValueError, KeyError, TypeError):
        password = None
    if not isinstance(password, str) or not password:
        raise UserError(f'{file}: expected {{"{ADMIN}": "<password>"}}', hint="delete it: a new one is made")
    return password


def airflow_environment(home: Path) -> dict[str, str]:
    """Return the variables that configure Airflow in `home`; makes its folder and its secrets when missing.

    For the servers, for `airflow ...` commands and for `dag.test()` alike. Where a setting is only a
    matter of taste, an `AIRFLOW__*` variable of yours wins.
    """
    home = home.resolve()
    state = home / "var" / "airflow"
    admin_password(home)
    logs = state / "logs"
    base = url("airflow")
    fixed = {
        "AIRFLOW_HOME": str(state),
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(home / "plugins"),
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": str(_integer("ORRERY_PARALLELISM", 4, low=1, high=256)),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{ADMIN}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords_file(home)),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{base}/execution/",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": os.environ.get("ORRERY_AIRFLOW_DB") or f"sqlite:///{state}/airflow.db",
        "AIRFLOW__API__BASE_URL": base,
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(port("airflow")),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_SERVER_HOST": HOST,
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(logs),
        "AIRFLOW__LOGGING__DAG_PROCESSOR_CHILD_PROCESS_LOG_DIRECTORY": str(logs / "dag_processor"),
        "ORRERY_HOME": str(home),
    }
    fixed |= _lineage(home)
    # Read from files when needed, so that no task or step finds them in its environment.
    fernet = urlsafe_b64encode(secrets.token_bytes(32)).decode()
    for setting, value in (
        ("CORE__FERNET_KEY", fernet),
        ("API__SECRET_KEY", secrets.token_urlsafe(48)),
        ("API_AUTH__JWT_SECRET", secrets.token_urlsafe(48)),
    ):
        file = state / "secrets" / setting.lower()
        _write_once(file, value)
        fixed[f"AIRFLOW__{setting}_CMD"] = f"cat {shlex.quote(str(file))}"
    taste = {
        "AIRFLOW__API__INSTANCE_NAME": "Orrery",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        # A Dag of a project is there to run; one that must wait says is_paused_upon_creation itself.
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "60",
        # The default, the full name by DNS, changes with a laptop's network, and a task that then
        # finds another name than it started with is taken for a stranger.
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "socket.gethostname",
        "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "5",
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "15",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "30",
        "AIRFLOW__DAG_PROCESSOR__PRINT_STATS_INTERVAL": "600",
        # Two busy cores miss a heartbeat now and then: not every pause is a death.
        "AIRFLOW__DAG_PROCESSOR__HEALTH_CHECK_THRESHOLD": "60",
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "60",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "60",
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "30",
        # A killed worker is noticed after two minutes instead of five.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "120",
        # A step whose scheduler died waits for this look: by default five minutes.
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "60",
        "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
        "AIRFLOW__LOGGING__UVICORN_LOGGING_LEVEL": "WARNING",
        # Task logs are read from the folder; without a log server each look at a running task would
        # leave a stack trace. Requests are not news either.
        "AIRFLOW__LOGGING__NAMESPACE_LEVELS": "airflow.utils.log.file_task_handler=CRITICAL http.access=WARNING",
    }
    return fixed | {name: os.environ.get(name, value) for name, value in taste.items()}


def _lineage(home: Path) -> dict[str, str]:
    """Return where OpenLineage events go: a file, one JSON a line, unless OpenLineage's own settings say otherwise.

    `OPENLINEAGE_URL` (and `OPENLINEAGE_API_KEY`) names a server. One that is silent costs a task a second at
    its start and one after its end, not the ten of the client's defaults, and what it misses is lost: it fails none.
    """
    taste = {
        "AIRFLOW__OPENLINEAGE__NAMESPACE": os.environ.get("OPENLINEAGE_NAMESPACE") or "orrery",
        "AIRFLOW__OPENLINEAGE__EXECUTION_TIMEOUT": "3",
        # The default forks the task's process for each event, with its open connection to the supervisor.
        "AIRFLOW__OPENLINEAGE__EXECUTE_IN_THREAD": "True",
    }
    theirs = ("AIRFLOW__OPENLINEAGE__CONFIG", "OPENLINEAGE_CONFIG", "OPENLINEAGE__TRANSPORT", "OPENLINEAGE_DISABLED")
    if not any(name.startswith(theirs) for name in os.environ):
        taste["AIRFLOW__OPENLINEAGE__TRANSPORT"] = json.dumps(_transport(home))
    return {name: os.environ.get(name, value) for name, value in taste.items()}


def _transport(home: Path) -> dict[str, object]:
    server = os.environ.get("OPENLINEAGE_URL")
    if not server:
        folder = home / "var" / "lineage"
        folder.mkdir(parents=True, exist_ok=True)
        return {"type": "file", "log_file_path": str(folder / "events.jsonl"), "append": True}
    http: dict[str, object] = {"type": "http", "url": server, "timeout": 1, "retry": {"total": 0}}
    if endpoint := os.environ.get("OPENLINEAGE_ENDPOINT"):
        http["endpoint"] = endpoint
    if key := os.environ.get("OPENLINEAGE_API_KEY"):
        http["auth"] = {"type": "api_key", "api_key": key}
    return http


def airflow_command(home: Path) -> Command:
    """Return how `airflow standalone` is started."""
    home = home.resolve()
    airflow = program(home, "airflow", "airflow")
    environment = _environment(home, "airflow") | airflow_environment(home)
    environment["PATH"] = os.pathsep.join([str(_shim(home, airflow)), str(airflow.parent), os.environ.get("PATH", "")])
    return Command((str(airflow), "standalone"), environment)


def mlflow_command(home: Path) -> Command:
    """Return how `mlflow server` is started: one worker, artifacts through the server, no job runners."""
    home = home.resolve()
    state = home / "var" / "mlflow"
    state.mkdir(parents=True, exist_ok=True)
    argv = (
        *(
            str(program(home, "ml", "mlflow")),
            "server",
            "--host",
            HOST,
            "--port",
            str(port("mlflow")),
            "--workers",
            "1",
        ),
        *("--serve-artifacts", "--artifacts-destination", str(state / "artifacts")),
    )
    environment = _environment(home, "mlflow") | {
        # By variable, not by argument: a database's URL may hold a password, and `ps` shows arguments.
        "MLFLOW_BACKEND_STORE_URI": with_driver(os.environ.get("ORRERY_MLFLOW_DB") or f"sqlite:///{state}/mlflow.db"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_ALLOWED_HOSTS": os.environ.get(
            "MLFLOW_SERVER_ALLOWED_HOSTS", "localhost,localhost:*,127.0.0.1,127.0.0.1:*"
        ),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return Command(argv, environment)


def llm_command(home: Path) -> Command:
    """Return how the language model is started. Raises `UserError` when its environment was not made."""
    home = home.resolve()
    python = program(home, "llm", "python")
    if python.parent.parent.name != "llm" and importlib.util.find_spec("xllamacpp") is None:  # another one's Python
        raise UserError(
            f"the language model's environment is not made: there is no {venvs(home) / 'llm'}",
            hint="make environments, or just this one: python3.11 docker/venv.py llm",
        )
    return Command((str(python), "-m", "orrery.llm.server", "--port", str(port("llm"))), _environment(home, "llm"))


def venvs(home: Path) -> Path:
    """Return the folder of the virtual environments."""
    return Path(os.environ.get("ORRERY_VENVS") or home / ".venvs")


def program(home: Path, environment: str, name: str) -> Path:
    """Return a program of one environment: its virtual environment, the running one, or PATH (in an image)."""
    folder = venvs(home)
    for file in (folder / environment / "bin" / name, Path(sys.executable).parent / name, shutil.which(name)):
        if file is not None and os.access(file, os.X_OK):
            return Path(file).absolute()
    raise UserError(
        f"{folder / environment / 'bin' / name}: there is no such program",
        hint=f"make the environment: python3.11 docker/venv.py {environment}",
    )


def _environment(home: Path, server: ServerName) -> dict[str, str]:
    loopback = f"{HOST},localhost"
    proxy_exceptions = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    exceptions = f"{proxy_exceptions},{loopback}" if proxy_exceptions else loopback
    return dict(os.environ) | {
        MARKER: marker(home, server),
        "SPT_NOENV": "1",  # setproctitle would write the process title over the marker in /proc/PID/environ
        "PYTHONUNBUFFERED": "1",  # the last words of a server that dies must be in its log
        "no_proxy": exceptions,
        "NO_PROXY": exceptions,
        "DO_NOT_TRACK": "true",
    }


def _shim(home: Path, airflow: Path) -> Path:
    """Write the `airflow` that standalone finds on PATH, and return its folder.

    Standalone's scheduler and triggerer each open a log server on all interfaces, with no setting
    for the host. On one machine the logs are read from their folder: both go without.
    """
    folder = home / "var" / "run" / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".airflow.{os.getpid()}"
    new.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f'  scheduler|triggerer) exec {shlex.quote(str(airflow))} "$@" --skip-serve-logs ;;\n'
        f'  *) exec {shlex.quote(str(airflow))} "$@" ;;\n'
        "esac\n"
    )
    new.chmod(0o755)
    new.replace(folder / "airflow")
    return folder


def _write_once(file: Path, text: str) -> None:
    """Write a private file unless it is there; it has mode 0600 from its first byte on, and is never half-written."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.parent.chmod(0o700)
    new = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as stream:
            stream.write(text)
        os.link(new, file)
    except FileExistsError:
        pass  # another process was first; its secret counts
    finally:
        new.unlink()


def _integer(variable: str, default: int, *, low: int, high: int) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"{variable} is {text!r}", hint=f"a whole number from {low} to {high} is allowed")
    return int(text)
