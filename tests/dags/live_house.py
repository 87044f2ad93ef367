"""A whole Airflow of its own (API server, scheduler, Dag processor, triggerer) and a store with verdicts of the gate.

What no `dag.test()` shows: a question that waits for a person, who may answer it, and a deadline that is missed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "core"))
START_S = 240
USERS = {"ada": "user", "bob": "user", "eve": "admin"}
APPROVAL = {"toy": "human", "hurry_keep": "{within: 3s}", "hurry_promote": "{within: 3s, otherwise: promote}"}
SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {{column: late}}
sources:
  flights: {{uri: "${{data}}/flights/{{partition}}.parquet", partition: month}}
gate: {{auc: {{min: 0.7}}, approval: {approval}}}
approvers: [ada, bob]
alerts: {{late: 5s}}
"""
DAG_FILE = '''
"""airflow dag: the real approve task and the real deadline, between stand-ins for the heavy steps."""
import time
from datetime import timedelta
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, task
from orrery import platform
from orrery.orchestration import notify, params, retry
from orrery.orchestration.approval import approve_task
from orrery.plan import Planner, Request
from orrery.spec import load_model

for project in ("toy", "hurry_keep", "hurry_promote"):
    spec = load_model(platform.project_folder(project))
    common = {"schedule": None, "is_paused_upon_creation": False, "default_args": {"retries": 2, "retry_delay": timedelta(seconds=1), "retry_policy": retry.policy()}}

    @task
    def register(project, params=None, dag_run=None):
        keys = tuple(params["window"].split("..")[:1])
        return Planner(project).plan(Request(project, "register", keys, run="r", task="register")).config.key

    with DAG(f"{project}.train", params=params.form("train", spec), max_active_runs=8, **common) as train:
        gate = EmptyOperator(task_id="gate")
        approve = approve_task(project, spec)
        gate >> approve >> register(project) >> EmptyOperator(task_id="promote")
    globals()[f"{project}_train"] = train

    @task
    def score():
        time.sleep(30)

    with DAG(f"{project}.score", params=params.form("score", spec), deadline=notify.deadline(project, "score", spec), **common) as scores:
        score()
    globals()[f"{project}_score"] = scores
'''


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def webhook(status: int = 204) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve a webhook; yield its URL and the list of what it was told (headers under `_headers`)."""
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            told.append({**json.loads(body), "_headers": dict(self.headers.items()), "_path": self.path})
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Live:
    """The running Airflow, as the tests speak to it."""

    def __init__(self, home: Path, url: str, told: list[dict[str, Any]]) -> None:
        self.home, self.url, self.told = home, url, told
        self._tokens: dict[str, str] = {}

    def call(self, user: str, method: str, path: str, **kwargs: Any) -> httpx.Response:
        if user not in self._tokens:
            login = {"username": user, "password": user}
            told = httpx.post(f"{self.url}/auth/token", json=login, timeout=60, trust_env=False)
            self._tokens[user] = told.json()["access_token"]
        headers = {"authorization": f"Bearer {self._tokens[user]}"}
        for pause in (0.5, 1.0, 2.0):
            try:
                answer = self._once(method, path, headers, kwargs)
            except httpx.TimeoutException:  # a busy machine; only a question may be asked again
                if method != "GET":
                    raise
                continue
            if not answer.is_server_error:
                return answer
            time.sleep(pause)  # a busy SQLite answers 500, and nothing was done
        return self._once(method, path, headers, kwargs)

    def _once(self, method: str, path: str, headers: dict[str, str], kwargs: dict[str, Any]) -> httpx.Response:
        url = f"{self.url}/api/v2/{path}"
        return httpx.request(method, url, headers=headers, timeout=60, trust_env=False, **kwargs)

    def trigger(self, dag: str, **conf: Any) -> str:
        run = f"manual__{datetime.now(UTC).isoformat()}_{secrets.token_hex(4)}"
        body = {"dag_run_id": run, "logical_date": None, "conf": conf}
        answer = self.call("eve", "POST", f"dags/{dag}/dagRuns", json=body)
        assert answer.is_success or answer.status_code == 409, answer.text  # 409: made by the try that was answered 500
        return run

    def states(self, dag: str, run: str) -> dict[str, str | None]:
        items = self.call("eve", "GET", f"dags/{dag}/dagRuns/{run}/taskInstances").json()["task_instances"]
        return {t["task_id"]: t["state"] for t in items}

    def wait(self, dag: str, run: str, task: str, *states: str, timeout: float = 120) -> dict[str, str | None]:
        """Wait until a task is in one of the states; return the states of all."""
        end = time.monotonic() + timeout
        while (now := self.states(dag, run)).get(task) not in states:
            assert time.monotonic() < end, (now, self.log()[-6000:])
            time.sleep(0.5)
        return now

    def settled(self, run: str, task: str, state: str, times: int = 1, timeout: float = 120) -> None:
        """Wait until the scheduler, too, has seen a task's process end in that state (so many times).

        An answer given before that, in the first second, is lost by Airflow 3.3: the scheduler takes the resumed
        task for one that was killed, and its retry asks again. No person is as quick as a test.
        """
        end = time.monotonic() + timeout
        wanted = re.compile(rf"TaskInstance Finished: .*task_id={task}, run_id={re.escape(run)},.* state={state},")
        while len(wanted.findall((self.home / "scheduler.log").read_text())) < times:
            assert time.monotonic() < end, self.log()[-6000:]
            time.sleep(0.2)

    def ended(self, dag: str, run: str, timeout: float = 300) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while (now := self.call("eve", "GET", f"dags/{dag}/dagRuns/{run}").json())["state"] not in (
            "success",
            "failed",
        ):
            assert time.monotonic() < end, (now, self.states(dag, run))
            time.sleep(0.5)
        return dict(now)

    def questions(self, user: str, run: str) -> list[dict[str, Any]]:
        found = self.call(user, "GET", "dags/~/dagRuns/~/hitlDetails?limit=100").json()["hitl_details"]
        return [q for q in found if q["task_instance"]["dag_run_id"] == run]

    def answer(self, user: str, dag: str, run: str, choice: str, comment: str | None = None) -> httpx.Response:
        given = {"comment": comment} if comment is not None else {}
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/approve/-1/hitlDetails"
        return self.call(user, "PATCH", path, json={"chosen_options": [choice], "params_input": given})

    def clear(self, dag: str, run: str, *tasks: str) -> None:
        body = {
            "dry_run": False,
            "dag_run_id": run,
            "task_ids": list(tasks),
            "only_failed": False,
            "reset_dag_runs": True,
        }
        answer = self.call("eve", "POST", f"dags/{dag}/clearTaskInstances", json=body)
        assert answer.is_success, answer.text

    def task_log(self, dag: str, run: str, task: str, number: int = 1) -> str:
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/{task}/logs/{number}?full_content=true"
        return self.call("eve", "GET", path).text

    def log(self) -> str:
        return "\n".join(p.read_text()[-3000:] for p in sorted(self.home.glob("*.log")))

    @property
    def ledger(self) -> Any:
        from orrery.ledger import Ledger

        return Ledger(f"sqlite:///{self.home}/ledger.db")

    def verdict(
        self, project: str, window: str, verdict: str = "promote", *, reasons: tuple[str, ...] = ("auc 0.8",)
    ) -> Any:
        """Commit a candidate, its evaluation and the gate's verdict; return the verdict's manifest."""
        from core_house import House

        house = House(self.home, f"file://{self.home}/store", project)
        candidate = house.commit("train", "candidate", window, seed=str(reasons))
        measured = {
            "auc": 0.81,
            "champion_auc": 0.8,
            "baseline_auc": 0.7,
            "champion_delta": 0.01,
            "champion_low": 0.004,
        }
        evaluation = house.commit(
            "evaluate", "evaluation", window, inputs={"candidate": (candidate.ref,)}, metrics={**measured, "champion_high": 0.02}
        )  # fmt: skip
        return house.commit(
            "gate", "verdict", window, inputs={"evaluation": (evaluation.ref,)}, verdict=verdict, reasons=list(reasons)
        )


def environment(home: Path, port: int, hook: str) -> dict[str, str]:
    base = f"http://127.0.0.1:{port}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ORRERY_", "AIRFLOW_", "MLFLOW_"))}
    return clean | {
        "PYTHONWARNINGS": "ignore",
        "ORRERY_HOME": str(ROOT),
        "ORRERY_PLATFORM": str(home / "platform.yaml"),
        "ORRERY_PROJECTS": str(home / "projects"),
        "ORRERY_LEDGER": f"sqlite:///{home}/ledger.db",
        "ORRERY_STORE": f"file://{home}/store",
        "AIRFLOW_HOME": str(home / "airflow"),
        "AIRFLOW_CONN_HOOK": json.dumps({"conn_type": "http", "host": hook, "password": "s3cret"}),
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{base}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{n}:{role}" for n, role in USERS.items()),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "1",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": base,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__SECRET_KEY": "a" * 64,
        "AIRFLOW__API_AUTH__JWT_SECRET": "b" * 64,
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
        # The servers that the workers' logs would be fetched from listen on fixed ports otherwise.
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
        "NO_PROXY": "127.0.0.1,localhost",
    }


def _write(home: Path) -> None:
    for project, approval in APPROVAL.items():
        folder = home / "projects" / project
        folder.mkdir(parents=True)
        (folder / "spec.yaml").write_text(SPEC.format(approval=approval))
        (folder / "features.py").write_text("")
    platform = (ROOT / "include" / "platform.yaml").read_text()
    (home / "platform.yaml").write_text(platform + "\nalerts: {webhook: hook}\n")
    (home / "dags").mkdir()
    (home / "dags" / "live.py").write_text(DAG_FILE)
    (home / "passwords.json").write_text(json.dumps({name: name for name in USERS}))


@contextmanager
def airflow(home: Path) -> Iterator[Live]:
    """Start it all below `home` and yield it once its Dags are known; every process is ended."""
    _write(home)
    port = free_port()
    with ExitStack() as stack:
        hook, told = stack.enter_context(webhook())
        env = environment(home, port, hook)
        command = str(Path(sys.executable).parent / "airflow")
        done = subprocess.run([command, "db", "migrate"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for name in ("api-server", "scheduler", "dag-processor", "triggerer"):
            log = stack.enter_context((home / f"{name}.log").open("wb"))
            process = subprocess.Popen([command, name], env=env, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_end, process)
        live = Live(home, f"http://127.0.0.1:{port}", told)
        end = time.monotonic() + START_S
        while True:
            try:
                found = {d["dag_id"] for d in live.call("eve", "GET", "dags").json()["dags"]}
                if {f"{p}.{v}" for p in APPROVAL for v in ("train", "score")} <= found:
                    break
                broken = live.call("eve", "GET", "importErrors").json()["import_errors"]
            except (httpx.TransportError, KeyError, ValueError):
                broken = []
            assert not broken, broken[0]["stack_trace"]
            assert time.monotonic() < end, live.log()
            time.sleep(1)
        yield live


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with airflow(tmp_path_factory.mktemp("live")) as running:
        yield running


if __name__ == "__main__":  # to look at by hand: python live_house.py FOLDER
    with airflow(Path(sys.argv[1])) as by_hand:
        by_hand.verdict(
            "toy",
            "2013-01",
            reasons=("auc 0.81 ≥ 0.7", "better than the champion", "<b>x</b> [a](http://evil.example) `c` **d** | e"),
        )
        print(by_hand.url, by_hand.trigger("toy.train", window="2013-01..2013-01"), flush=True)
        time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 600)
