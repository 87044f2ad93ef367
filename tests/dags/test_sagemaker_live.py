"""A SageMaker job under a whole Airflow: what becomes of it when a person or a crash ends the wait."""

from __future__ import annotations

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
from sagemaker_house import IMAGE, ROLE, SPEC, Player, sagemaker

sys.path.insert(0, str(ROOT / "tests" / "core"))

from core_house import DRIVE, House
from core_verbs import wait_for

__all__ = ["sagemaker"]
pytestmark = pytest.mark.slow
PLATFORM = f"""\
version: 1
environments:
  ml: {{image: "{IMAGE}"}}
compute:
  cpu-light: {{cpu: "1"}}
  cloud: {{spot: true, sagemaker: {{role: "{ROLE}", instance_type: ml.g5.xlarge, poll: 1s}}}}
"""
DAG_FILE = '''
"""airflow dag: the training of a project alone."""
from airflow.sdk import DAG
from orrery import budgets, platform
from orrery.orchestration import params, retry
from orrery.orchestration.sagemaker import SageMakerStepOperator
from orrery.spec import load_model

spec = load_model(platform.project_folder("delays"))
most = budgets.of("train", spec)
with DAG("delays.train", schedule=None, is_paused_upon_creation=False, params=params.form("train", spec)):
    SageMakerStepOperator(task_id="train", project="delays", verb="train", compute="cloud", retries=most.retries, retry_policy=retry.BudgetPolicy("delays", most))
'''


class Running:
    """The Airflow, and its processes by name."""

    def __init__(self, home: Path, live: Live, start: Callable[[str], subprocess.Popen[bytes]]) -> None:
        self.home, self.live, self._start = home, live, start
        self.processes = {name: start(name) for name in ("api-server", "scheduler", "dag-processor", "triggerer")}

    def crash(self, name: str) -> None:
        """Kill a process and all it started, and start it anew."""
        process = self.processes[name]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        self.processes[name] = self._start(name)


@contextmanager
def airflow(home: Path, store: str) -> Iterator[Running]:
    """Start it all below `home` and yield it once its Dag is known."""
    port = free_port()
    env = environment(home, port, "http://127.0.0.1:9") | {"ORRERY_STORE": store}
    with ExitStack() as stack:
        command = str(Path(sys.executable).parent / "airflow")
        done = subprocess.run([command, "db", "migrate"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

        def start(name: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((home / f"{name}.log").open("ab"))
            process = subprocess.Popen([command, name], env=env, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_end, process)
            return process

        live = Live(home, f"http://127.0.0.1:{port}", [])
        running = Running(home, live, start)
        until = time.monotonic() + 240
        while True:
            try:
                if [d["dag_id"] for d in live.call("eve", "GET", "dags").json()["dags"]] == ["delays.train"]:
                    break
            except (httpx.TransportError, KeyError, ValueError):
                pass
            assert time.monotonic() < until, live.log()
            time.sleep(1)
        yield running


def until(true: Callable[[], Any], what: str, timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def test_a_job_ends_with_its_task_and_outlives_a_triggerer(
    tmp_path: Path, s3_bucket: str, sagemaker: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path, f"{s3_bucket}/store")
    for folder in (house.folder, house.marks, tmp_path / "dags"):
        folder.mkdir(parents=True)
    (tmp_path / "projects").symlink_to(tmp_path / "include" / "projects")
    (house.folder / "spec.yaml").write_text(SPEC.format(marks=house.marks))
    (house.folder / "features.py").write_text("ANSWER = 42\n")
    (tmp_path / "platform.yaml").write_text(PLATFORM)
    (tmp_path / "dags" / "live.py").write_text(DAG_FILE)
    (tmp_path / "passwords.json").write_text('{"ada": "ada", "bob": "bob", "eve": "eve"}')
    clean = house.commit("validate", "clean", "2013-01")
    house.commit("materialize", "features", "2013-01", inputs={"clean": (clean.ref,)})
    with airflow(tmp_path, house.uri) as running:
        live = running.live
        run = live.trigger("delays.train", window="2013-01..2013-01")
        (first,) = sagemaker.wait_for(1, timeout=180)
        live.wait("delays.train", run, "train", "deferred")
        live.settled(run, "train", "deferred")
        # A person marks the waiting task as failed: the job is told to stop.
        # Twice: marked failed in the very moment in which its trigger starts, Airflow forgets to tell the trigger.
        until(lambda: sagemaker.calls.count("DescribeTrainingJob") > 1, "the triggerer looks")
        path = f"dags/delays.train/dagRuns/{run}/taskInstances/train"
        assert live.call("eve", "PATCH", path, json={"new_state": "failed"}).is_success
        until(lambda: sagemaker.jobs[first].stopped == 1, f"job {first} is stopped {live.log()}")
        sagemaker.end(first, "Stopped")
        # Cleared, it is another job; a triggerer that crashes is no reason to stop it, nor to start one more.
        live.clear("delays.train", run, "train")
        second = sagemaker.wait_for(2, timeout=180)[1]
        live.wait("delays.train", run, "train", "deferred")
        live.settled(run, "train", "deferred", times=2)
        running.crash("triggerer")
        asked = sagemaker.jobs[second].asked["AlgorithmSpecification"]
        (house.marks / "go").touch()
        argv = [sys.executable, str(DRIVE), *asked["ContainerEntrypoint"], *asked["ContainerArguments"]]
        assert subprocess.run(argv, check=False, timeout=120).returncode == 0
        wait_for(house.marks / "started")
        sagemaker.end(second, BillableTimeInSeconds=30, TrainingTimeInSeconds=90)
        live.wait("delays.train", run, "train", "success", timeout=240)
        assert len(sagemaker.jobs) == 2 and sagemaker.jobs[second].stopped == 0
        attempts = [e.payload for e in live.ledger.find("delays", "run")]
        # Nobody has seen the first one's end: the next attempt has put it on record.
        assert [(a["attempt"]["cause"], a["attempt"].get("sagemaker", {}).get("billable_s")) for a in attempts] == [
            ("lost", None), (None, 30),
        ]  # fmt: skip
        found = live.call("eve", "GET", f"dags/delays.train/dagRuns/{run}/taskInstances/train/links").json()
        assert found["extra_links"]["SageMaker job"].endswith(second), found
        assert f"job {second}" in live.task_log("delays.train", run, "train", number=2)
