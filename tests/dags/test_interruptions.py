"""A training that is interrupted, under a whole Airflow: who kills what, what is counted, and where it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_house import ROOT, Live, _end, environment, free_port

sys.path.insert(0, str(ROOT / "tests" / "core"))

import core_house
from core_house import DRIVE, House
from core_verbs import wait_for

from orrery import budgets, local

pytestmark = pytest.mark.slow
SAVE_S = 120.0  # at most: it ends when `Training.saved` says so, and nothing here depends on how busy a machine is
KEY = "2013-01"
WINDOW = f"{KEY}..{KEY}"
SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {{column: late}}
sources:
  flights: {{uri: "${{data}}/flights/{{partition}}.parquet", partition: month}}
gate: {{auc: {{min: 0.7}}}}
train: {{window: 1, compute: spot, spot: {spot}, params: {{marks: "{marks}", save_s: {save_s}}}}}
"""
# Project -> how it bears interruptions, and how long it saves.
PROJECTS = {"shot": ("{}", 0), "stopped": ("{}", SAVE_S), "cleared": ("{}", SAVE_S)} | {
    "poor": ("{max_interruptions: 1}", 0),
    "rich": ("{max_interruptions: 1, fallback: firm}", 0),
    "lost": ("{}", 0),
}
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
  ml: {image: "orrery/ml:1"}
compute:
  cpu-light: {cpu: "1"}
  spot: {spot: true, price_per_hour: 0.3}
  firm: {price_per_hour: 0.9}
"""
DAG_FILE = f'''
"""airflow dag: the trainings of some projects alone, with the real task and a stand-in for the trainer."""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "core")!r})
import core_verbs
core_verbs.register()
from airflow.sdk import DAG
from orrery import budgets, platform
from orrery.orchestration import dags, params
from orrery.spec import load_model

budgets.INTERRUPTED_S = 1.0
for project in {tuple(PROJECTS)}:
    spec = load_model(platform.project_folder(project))
    with DAG(f"{{project}}.train", schedule=None, is_paused_upon_creation=False, params=params.form("train", spec)) as dag:
        dags.step(project, "train", most=budgets.of("train", spec), compute="spot", pool="default_pool")
    globals()[project] = dag
'''


class Training:
    """One project's training, as a test follows it."""

    def __init__(self, live: Live, project: str) -> None:
        self.live, self.project, self.dag = live, project, f"{project}.train"
        self.house = House(live.home, f"file://{live.home}/store", project)
        self.marks = live.home / "marks" / project
        self.run = live.trigger(self.dag, window=WINDOW)

    def started(self, attempt: int) -> int:
        """Wait until an attempt takes steps, and has a checkpoint; return the step that it went on from."""
        resumed = int(wait_for(self.marks / "started", 180))
        (self.marks / "started").unlink()
        until(lambda: (self.progress(attempt) or {}).get("committed", 0) > resumed, f"a checkpoint of {attempt}")
        return resumed

    def folder(self, attempt: int, cleared: int = 0) -> str:
        from orrery.plan import safe_name

        run = f"{self.dag}--{self.run}" + (f"--cleared-{cleared}" if cleared else "")
        return f"{self.project}/runs/{safe_name(run)}/train-{WINDOW}/{attempt}"

    def progress(self, attempt: int) -> dict[str, Any] | None:
        return self._document(attempt, "progress.json")

    def step(self, attempt: int) -> int:
        """Return the process number of the step."""
        found = self._document(attempt, local.PROCESS)
        assert found is not None
        return int(found["pid"])

    def _document(self, attempt: int, name: str) -> dict[str, Any] | None:
        for cleared in range(3):
            try:
                return dict(json.loads(self.house.store.read(f"{self.folder(attempt, cleared)}/{name}")))
            except FileNotFoundError:
                continue
        return None

    def attempts(self) -> list[dict[str, Any]]:
        return [e.payload["attempt"] for e in self.live.ledger.find(self.project, "run")]

    def saved(self, attempt: int) -> None:
        """Wait until an attempt waits for the one before, which saves; then end the saving."""
        waits = "is still saving: this attempt waits for its end"
        until(lambda: waits in self.log(attempt), "an attempt that waits")
        (self.marks / "saved").touch()

    def finish(self) -> None:
        (self.marks / "go").touch()
        self.live.wait(self.dag, self.run, "train", "success", "failed", timeout=180)
        assert self.live.states(self.dag, self.run)["train"] == "success", self.log()

    def log(self, attempt: int = 1) -> str:
        return self.live.task_log(self.dag, self.run, "train", attempt)

    def state_store(self) -> dict[str, Any]:
        path = f"dags/{self.dag}/dagRuns/{self.run}/taskInstances/train/state-store"
        found = self.live.call("eve", "GET", path).json()
        return {item["key"]: item["value"] for item in next(v for v in found.values() if isinstance(v, list))}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true: Callable[[], Any], what: str, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@contextmanager
def airflow(home: Path) -> Iterator[Live]:
    """Start it all below `home` and yield it once its Dags are known."""
    port, house = free_port(), core_house.build(home)
    (home / "projects").symlink_to(home / "include" / "projects")
    for project, (spot, save_s) in PROJECTS.items():
        mine = House(home, house.uri, project)
        mine.folder.mkdir()
        (house.marks / project).mkdir()
        (mine.folder / "spec.yaml").write_text(SPEC.format(spot=spot, save_s=save_s, marks=house.marks / project))
        (mine.folder / "features.py").write_text("ANSWER = 42\n")
        clean = mine.commit("validate", "clean", KEY)
        mine.commit("materialize", "features", KEY, inputs={"clean": (clean.ref,)})
    (home / "include" / "platform.yaml").write_text(PLATFORM)
    (home / "platform.yaml").write_text(PLATFORM)
    (home / "passwords.json").write_text('{"ada": "ada", "bob": "bob", "eve": "eve"}')
    (home / "dags" / "live.py").write_text(DAG_FILE)
    own = {
        "ORRERY_VENVS": str(home / "venvs"),
        "ORRERY_HOME": str(home),
        "AIRFLOW__CORE__PARALLELISM": "8",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
    }
    env = environment(home, port, "http://127.0.0.1:9") | own
    with ExitStack() as stack:
        command = str(Path(sys.executable).parent / "airflow")
        done = subprocess.run([command, "db", "migrate"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for name in ("api-server", "scheduler", "dag-processor"):
            log = stack.enter_context((home / f"{name}.log").open("wb"))
            process = subprocess.Popen([command, name], env=env, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_end, process)
        live, wanted = Live(home, f"http://127.0.0.1:{port}", []), {f"{p}.train" for p in PROJECTS}

        def known() -> bool:
            try:
                return wanted <= {d["dag_id"] for d in live.call("eve", "GET", "dags").json()["dags"]}
            except (httpx.TransportError, KeyError, ValueError):
                return False

        until(known, "the Dags are not there", 240)
        yield live


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    assert DRIVE.exists()
    with airflow(tmp_path_factory.mktemp("interruptions")) as live:
        yield live


def test_a_worker_that_is_killed_costs_what_came_after_the_last_checkpoint(running: Live) -> None:
    """First the task's process alone: its step is told by the kernel, and saves. Then the step with it: a power cut."""
    training = Training(running, "shot")
    assert training.started(1) == 0
    os.kill(parent(training.step(1)), signal.SIGKILL)
    resumed = training.started(2)
    (first,) = training.attempts()
    assert (first["cause"], first["committed"]) == ("interrupted", resumed)  # by the step's own document
    step = training.step(2)
    os.kill(step, signal.SIGSTOP)  # else it may save between the two: the kernel tells it of its parent's end
    os.kill(parent(step), signal.SIGKILL)
    os.kill(step, signal.SIGKILL)
    again = training.started(3)
    _, second = training.attempts()
    assert second["cause"] == "lost" and second["resumed"] == resumed
    # Killed between a save and the word of it, one more save is there than it has told.
    assert resumed < second["committed"] <= again <= second["committed"] + 10
    assert second["committed"] <= second["progress"]["step"]
    found = running.call("eve", "GET", f"dags/shot.train/dagRuns/{training.run}/taskInstances/train/links").json()
    assert found["extra_links"]["Attempts"].endswith("/plugin/orrery-verdict")  # while it runs
    training.finish()
    assert [(a["number"], a["cause"], a["spot"]) for a in training.attempts()] == [
        (1, "interrupted", True), (2, "lost", True), (3, None, True),
    ]  # fmt: skip
    assert f"attempt 3: interrupted 2 of 20 times, goes on from step {again:,} of 100,000" in training.log(3)
    told = training.state_store()
    assert told["clear-0.interruptions"] == "2 of 20" and told["clear-0.losses"] == "0 of 5"
    assert told["clear-0.goes-on"].startswith(f"goes on from step {again:,}")
    assert f"train {WINDOW}: 3 attempts: interrupted 2 times" in running.ended("shot.train", training.run)["note"]


def test_the_executors_worker_is_killed_and_airflow_counts_alone(running: Live) -> None:
    """The supervisor is gone, so no policy is asked; the task's process lives on until it hears nothing any more."""
    training = Training(running, "lost")
    training.started(1)
    task = parent(training.step(1))
    os.kill(parent(task), signal.SIGKILL)
    os.kill(task, signal.SIGKILL)
    resumed = training.started(2)
    (first,) = training.attempts()
    assert (first["cause"], first["committed"]) == ("interrupted", resumed)
    training.finish()


def test_a_task_marked_failed_saves_for_longer_than_airflow_waits_and_goes_on_when_cleared(running: Live) -> None:
    training = Training(running, "stopped")
    training.started(1)
    path = f"dags/stopped.train/dagRuns/{training.run}/taskInstances/train"
    task = parent(training.step(1))
    assert running.call("eve", "PATCH", path, json={"new_state": "failed"}).is_success
    until(lambda: not alive(task), "the worker is killed")
    assert alive(training.step(1))  # and its step is saving
    running.clear("stopped.train", training.run, "train")
    training.saved(2)
    resumed = training.started(2)
    (first,) = training.attempts()
    assert (first["number"], first["cause"], first["committed"]) == (1, "interrupted", resumed)
    assert first["wall_s"] > 5  # the seconds after which Airflow kills a worker that was told to stop
    training.finish()
    assert [a["cause"] for a in training.attempts()] == ["interrupted", None]
    # The cleared run is a run of its own: it has budgets of its own, and nothing is used of them.
    assert training.state_store() == {}


def test_a_running_task_that_is_cleared_goes_on_from_where_it_was(running: Live) -> None:
    training = Training(running, "cleared")
    training.started(1)
    running.clear("cleared.train", training.run, "train")
    training.saved(2)
    resumed = training.started(2)
    (first,) = training.attempts()
    assert (first["cause"], first["committed"]) == ("interrupted", resumed)
    ended = first["progress"]["now"]
    second = training.progress(2)
    assert second is not None and second["began"] >= ended  # never two at a time
    training.finish()


def stop(training: Training, attempt: int) -> None:
    """SIGTERM to the worker, as a machine that is shut down sends it."""
    training.started(attempt)
    os.kill(parent(training.step(attempt)), signal.SIGTERM)


def test_without_a_fallback_one_interruption_too_many_ends_it(running: Live) -> None:
    training = Training(running, "poor")
    for attempt in (1, 2):
        stop(training, attempt)
    ended = running.ended("poor.train", training.run)
    assert ended["state"] == "failed"
    assert "no further attempt: interrupted 2 times, 1 are tried again" in training.log(2)
    assert f"train {WINDOW}: 2 attempts: interrupted 2 times" in ended["note"]


def test_with_a_fallback_the_training_moves_there_and_says_so(running: Live) -> None:
    training = Training(running, "rich")
    stop(training, 1)
    training.started(2)
    training.finish()
    said = "interrupted 1 times, 1 are borne on spot"
    first, second = training.attempts()
    assert (first["compute"], first["price_per_hour"]) == ("spot", 0.3)
    assert (second["compute"], second["price_per_hour"], second["placed"]) == ("firm", 0.9, said)
    assert f"this attempt runs on firm: {said}" in training.log(2)
    assert f"on firm: {said}" in running.ended("rich.train", training.run)["note"]
    assert training.state_store()["clear-0.compute"] == f"firm {said}"
    assert budgets.INTERRUPTED_S == 30
