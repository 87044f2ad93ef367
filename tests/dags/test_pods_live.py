"""A pod under a whole Airflow: what becomes of it when a worker or a triggerer is killed, or a person ends the wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster.api import Cluster
from cluster.objects import is_over
from live_house import ROOT, Live, _end, environment, free_port

sys.path.insert(0, str(ROOT / "tests" / "core"))

import core_house
from core_house import House
from core_verbs import wait_for

pytestmark = pytest.mark.slow
KEY = "2013-01"
WINDOW = f"{KEY}..{KEY}"
PROJECTS = ("worker", "triggerer", "cleared", "marked")
SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {{column: late}}
sources:
  flights: {{uri: "${{data}}/flights/{{partition}}.parquet", partition: month}}
gate: {{auc: {{min: 0.7}}}}
train: {{window: 1, compute: spot, params: {{marks: "{marks}", save_s: {save_s}}}}}
"""
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
compute:
  cpu-light: {cpu: "1"}
  spot: {spot: true, grace: 20s}
kubernetes: {connection: cluster}
"""
DAG_FILE = f'''
"""airflow dag: the trainings of some projects alone, with the real task and a stand-in for the trainer."""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests" / "core")!r})
import core_verbs
core_verbs.register()
from airflow.sdk import DAG
from orrery import budgets, platform
from orrery.orchestration import dags, params
from orrery.spec import load_model

budgets.INTERRUPTED_S = 1.0


def told(project):
    def tell(context):
        core_verbs.mark(Path(os.environ["ORRERY_HOME"]) / "marks" / project, "worker", str(os.getpid()))
    return tell


for project in {PROJECTS!r}:
    spec = load_model(platform.project_folder(project))
    with DAG(f"{{project}}.train", schedule=None, is_paused_upon_creation=False, params=params.form("train", spec)) as dag:
        dags.step(project, "train", most=budgets.of("train", spec), compute="spot", pool="default_pool", pre_execute=told(project))
    globals()[project] = dag
'''


class Running:
    """The Airflow, its processes by name, and the cluster; and how many pods of a project ever ran at once."""

    def __init__(
        self, home: Path, live: Live, cluster: Cluster, start: Callable[[str], subprocess.Popen[bytes]]
    ) -> None:
        self.home, self.live, self.cluster, self._start = home, live, cluster, start
        self.processes = {name: start(name) for name in ("api-server", "scheduler", "dag-processor", "triggerer")}
        self.most: Counter[str] = Counter()
        cluster.do(lambda: cluster.objects.heard.append(self._count))

    def _count(self, change: Any) -> None:
        if change.kind.plural == "pods":
            alive = Counter(
                p["metadata"]["labels"]["orrery/project"]
                for p in self.cluster.objects.list(change.kind, match=lambda p: not is_over(p))
            )
            self.most |= alive

    def crash(self, name: str) -> None:
        """Kill a process and all it started, and start it anew."""
        process = self.processes[name]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        self.processes[name] = self._start(name)


class Training:
    """One project's training, as a test follows it."""

    def __init__(self, running: Running, project: str) -> None:
        self.running, self.live, self.cluster = running, running.live, running.cluster
        self.project, self.dag = project, f"{project}.train"
        self.house = House(running.home, f"file://{running.home}/store", project)
        self.marks = running.home / "marks" / project
        self.created: list[str] = []
        self.cluster.do(lambda: self.cluster.objects.heard.append(self._hear))
        self.run = self.live.trigger(self.dag, window=WINDOW)

    def _hear(self, change: Any) -> None:
        if (change.kind.plural, change.type) != ("pods", "ADDED"):
            return
        if change.object["metadata"]["labels"]["orrery/project"] == self.project:
            self.created.append(change.object["metadata"]["name"])

    def pods(self) -> list[dict[str, Any]]:
        return self.cluster.pods(f"orrery/project={self.project}")

    def started(self) -> int:
        """Wait until a pod takes steps and has a checkpoint; return the step that it went on from."""
        resumed = int(wait_for(self.marks / "started", 240))
        (self.marks / "started").unlink()
        (pod,) = self.pods()
        progress = f"{pod['metadata']['annotations']['orrery/folder']}/progress.json"

        def saved() -> bool:
            there = self.house.store.exists(progress)
            return there and json.loads(self.house.store.read(progress))["committed"] > resumed

        until(saved, "a checkpoint")
        return resumed

    def deferred(self, times: int = 1) -> None:
        self.live.wait(self.dag, self.run, "train", "deferred", timeout=240)
        self.live.settled(self.run, "train", "deferred", times=times, timeout=240)

    def attempts(self) -> list[dict[str, Any]]:
        return [e.payload["attempt"] for e in self.live.ledger.find(self.project, "run")]

    def finish(self) -> None:
        """Let it end, and see that there is one result, no pod is left, and that there were never two at once."""
        (self.marks / "go").touch()
        self.live.wait(self.dag, self.run, "train", "success", "failed", timeout=240)
        assert self.live.states(self.dag, self.run)["train"] == "success", self.log(1) + self.log(2)
        until(lambda: not self.pods(), "an empty cluster")
        assert len(self.house.manifests("train")) == 1
        assert [e.payload["status"] for e in self.live.ledger.find(self.project, "run")].count("done") == 1
        assert self.running.most[self.project] == 1

    def log(self, attempt: int = 1) -> str:
        return self.live.task_log(self.dag, self.run, "train", attempt)


def until(true: Callable[[], Any], what: str, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@contextmanager
def airflow(home: Path, cluster: Cluster, house: House) -> Iterator[Running]:
    """Start it all below `home` and yield it once its Dags are known."""
    port = free_port()
    own = {
        "ORRERY_HOME": str(home),
        "ORRERY_PROFILE": "kubernetes",
        "AIRFLOW_CONN_CLUSTER": cluster.connection(),
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "2",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
    }
    env = environment(home, port, "http://127.0.0.1:9") | own
    with ExitStack() as stack:
        command = str(Path(sys.executable).parent / "airflow")
        done = subprocess.run([command, "db", "migrate"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

        def start(name: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((home / f"{name}.log").open("ab"))
            process = subprocess.Popen([command, name], env=env, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_end, process)
            return process

        live, wanted = Live(home, f"http://127.0.0.1:{port}", []), {f"{p}.train" for p in PROJECTS}
        running = Running(home, live, cluster, start)

        def known() -> bool:
            try:
                return wanted <= {d["dag_id"] for d in live.call("eve", "GET", "dags").json()["dags"]}
            except (httpx.TransportError, KeyError, ValueError):
                return False

        until(known, "the Dags are not there", 300)
        yield running


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("pods") / "home"
    house = core_house.build(home)
    (home / "projects").symlink_to(home / "include" / "projects")
    for project in PROJECTS:
        mine = House(home, house.uri, project)
        mine.folder.mkdir()
        (house.marks / project).mkdir()
        save_s = 6.0 if project == "cleared" else 0.0
        (mine.folder / "spec.yaml").write_text(SPEC.format(save_s=save_s, marks=house.marks / project))
        (mine.folder / "features.py").write_text("ANSWER = 42\n")
        clean = mine.commit("validate", "clean", KEY)
        mine.commit("materialize", "features", KEY, inputs={"clean": (clean.ref,)})
    (home / "include" / "platform.yaml").write_text(PLATFORM)
    (home / "platform.yaml").write_text(PLATFORM)
    (home / "passwords.json").write_text('{"ada": "ada", "bob": "bob", "eve": "eve"}')
    (home / "dags" / "live.py").write_text(DAG_FILE)
    with Cluster(home.parent / "cluster", venvs=home / "venvs") as cluster, airflow(home, cluster, house) as airflow_:
        yield airflow_


def test_a_worker_that_is_killed_before_the_wait_leaves_a_pod_that_is_taken_up(running: Running) -> None:
    """The pod is created and runs, and the worker that asked for it dies before it hears of that."""
    with running.cluster.hold("create pods"):
        training = Training(running, "worker")
        assert training.started() == 0
        os.kill(int(wait_for(training.marks / "worker")), signal.SIGKILL)
    training.live.wait(training.dag, training.run, "train", "deferred", timeout=240)
    training.live.settled(training.run, "train", "deferred", timeout=240)
    training.finish()
    assert len(training.created) == 1
    lost, taken = training.attempts()
    assert (lost["cause"], taken["cause"]) == ("lost", None)
    assert taken["number"] > lost["number"]
    assert taken["pod"]["unit"] == training.created[0] and taken["pod"]["ran"].endswith(f"/{lost['number']}")
    assert "whose worker was lost, is still at this work: it is taken up" in training.log(taken["number"])


def test_a_triggerer_that_is_killed_is_followed_by_another_which_goes_on_waiting(running: Running) -> None:
    training = Training(running, "triggerer")
    assert training.started() == 0
    training.deferred()
    running.crash("triggerer")
    training.finish()
    assert len(training.created) == 1
    (attempt,) = training.attempts()
    assert attempt["cause"] is None and attempt["pod"]["ended"] == "exited"


def test_a_clear_while_it_waits_ends_the_pod_and_the_next_goes_on_when_that_is_gone(running: Running) -> None:
    training = Training(running, "cleared")
    assert training.started() == 0
    training.deferred()
    until(lambda: "runs on node" in training.log(1), "the triggerer watches")
    running.live.clear(training.dag, training.run, "train")
    assert training.started() > 0  # on what the first one has saved when it was told to go
    training.deferred(times=2)
    training.finish()
    assert len(training.created) == 2
    first, second = training.attempts()
    assert (first["cause"], second["cause"]) == ("interrupted", None)


def test_a_task_marked_failed_while_it_waits_ends_its_pod(running: Running) -> None:
    training = Training(running, "marked")
    assert training.started() == 0
    training.deferred()
    until(lambda: "runs on node" in training.log(1), "the triggerer watches")
    path = f"dags/{training.dag}/dagRuns/{training.run}/taskInstances/train"
    assert running.live.call("eve", "PATCH", path, json={"new_state": "failed"}).is_success
    until(lambda: not training.pods(), "its pod is gone")
    assert running.live.ended(training.dag, training.run)["state"] == "failed"
    assert training.house.manifests("train") == []
    # A person thinks again: the training goes on from what it has saved.
    running.live.clear(training.dag, training.run, "train")
    assert training.started() > 0
    training.deferred(times=2)
    training.finish()
    assert len(training.created) == 2
