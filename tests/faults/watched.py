"""A real Airflow, part by part, with the watch Dag of a tiny project: parts can be killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from orrery.airflow_api import AirflowApi
from orrery.errors import TryAgain

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "tiny"
PARTS = ("api-server", "scheduler", "dag-processor", "triggerer")
SPEC = """\
version: 1
kind: model
owner: tests
task: binary
label: {column: late}
sources:
  rows: {uri: "${data}/rows/{partition}.csv", partition: month}
  near: {uri: "${data}/near/{partition}.csv", partition: month}
watch: 1s
"""
# The ingest Dag is a stand-in that writes down what it was asked for: what is tested is who asks, when and how often.
DAGS = """\
'''Airflow Dags of the tiny project: red means that a test found something.'''

import os
from pathlib import Path

from airflow.sdk import DAG, Param, task

from orrery import platform
from orrery.orchestration.watching import watch_dag
from orrery.spec import load_model

spec = load_model(platform.project_folder("tiny"))
watch_dag("tiny", spec, __doc__)

fields = {"partition": Param(None, type=["null", "string"]), "reason": Param("", type="string")}

with DAG("tiny.ingest", schedule=None, max_active_runs=1, params=fields) as dag:

    @task(retries=9, retry_delay=1)
    def ingest(dag_run=None, params=None):
        folder = Path(os.environ["TINY_ASKED"])
        folder.mkdir(exist_ok=True)
        number = len(list(folder.iterdir()))
        # A try that was killed may have written already: the run counts once.
        if not list(folder.glob(f"*@{dag_run.run_id}")):
            (folder / f"{number:04d}@{params['partition']}@{dag_run.run_id}").touch()

    ingest()
"""


class Watched:
    """Airflow's parts as processes in sessions of their own, in a folder of their own, on a free port."""

    def __init__(self, home: Path) -> None:
        self.home, self.asked, self.data = home, home / "asked", home / "data"
        for folder in ("dags", "plugins", "include", "projects/tiny", "data"):
            (home / folder).mkdir(parents=True)
        (home / "include" / "platform.yaml").write_bytes((ROOT / "include" / "platform.yaml").read_bytes())
        (home / "projects" / "tiny" / "spec.yaml").write_text(SPEC)
        (home / "dags" / "tiny.py").write_text(DAGS)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = int(s.getsockname()[1])
        mine = {
            "ORRERY_HOME": str(home),
            "ORRERY_PROJECTS": str(home / "projects"),
            "ORRERY_DATA": f"file://{self.data}",
            "ORRERY_AIRFLOW_PORT": str(self.port),
            "TINY_ASKED": str(self.asked),
            # So that a dead part is missed after seconds, not minutes.
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
            "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "3",
            "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",
            "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3",
        }
        code = "import json; from pathlib import Path; from orrery.servers import airflow_environment as e; print(json.dumps(e(Path('.'))))"
        made = subprocess.run(
            [sys.executable, "-c", code], cwd=home, env=os.environ | mine, capture_output=True, text=True, check=True
        )
        self.env = os.environ | json.loads(made.stdout) | mine
        password = json.loads(Path(self.env["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"]).read_text())["admin"]
        self.api = AirflowApi(f"http://127.0.0.1:{self.port}", "admin", password)
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        self.airflow("db", "migrate")
        self.airflow("pools", "set", "orrery-light", "4", "as in airflow_settings.yaml")

    def airflow(self, *args: str) -> None:
        done = subprocess.run(
            [self._binary(), *args], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        assert done.returncode == 0, done.stdout.decode()[-4000:]

    @staticmethod
    def _binary() -> str:
        return str(Path(sys.executable).with_name("airflow"))

    def start(self, *names: str) -> None:
        for name in names:
            with (self.home / f"{name}.log").open("ab") as log:
                self.parts[name] = subprocess.Popen(
                    [self._binary(), name], env=self.env, stdout=log, stderr=log, cwd=self.home, start_new_session=True
                )

    def kill(self, *names: str) -> None:
        """End parts at once, with all that they started: kill -9, nobody can tidy up."""
        for name in names:
            process = self.parts.pop(name)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()

    def close(self) -> None:
        self.kill(*self.parts)
        self.api.close()

    def until(self, true: Callable[[], bool], what: str, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for name, process in self.parts.items():
                log = self.home / f"{name}.log"
                assert process.poll() is None, f"{name} ended:\n{log.read_text()[-3000:]}"
            try:
                if true():
                    return
            except (TryAgain, httpx.HTTPError):
                pass  # not up yet
            time.sleep(0.3)
        logs = "\n".join(f"--- {f.name}\n{f.read_text()[-2000:]}" for f in sorted(self.home.glob("*.log")))
        raise AssertionError(f"not within {timeout:.0f} s: {what}\n{self.told()}\n{logs}")

    def land(self, *keys: str, text: str = "a\n1\n") -> None:
        for source in ("rows", "near"):
            (self.data / source).mkdir(exist_ok=True)
            for key in keys:
                (self.data / source / f"{key}.csv").write_text(text)

    def told(self) -> list[str]:
        """Return the partitions that were ingested, in order."""
        return [file.name.split("@")[1] for file in sorted(self.asked.glob("*"))]

    def waits(self) -> bool:
        """Tell whether the watch Dag waits in the triggerer."""
        dag = f"{PROJECT}.watch"
        runs = self.api.runs(dag) if dag in self.api.dag_ids() else []
        return bool(runs) and any(task.state == "deferred" for task in self.api.tasks(runs[0]))
