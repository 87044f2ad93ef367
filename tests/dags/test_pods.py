"""A step as a pod, from the task to the ledger, over HTTP against the test cluster: its kubelet runs real processes.

`Task` carries the task as Airflow does: `attempt()` is a worker, `wait()` the triggerer, `go_on()` another worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "core"))
sys.path.insert(0, str(TESTS))

import core_verbs
from airflow.sdk.exceptions import TaskDeferred
from cluster.api import Cluster
from core_house import House, build, environment

from orrery.contract import VERBS
from orrery.ledger import Ledger
from orrery.orchestration import pod_trigger
from orrery.orchestration.pod_trigger import PodTrigger
from orrery.orchestration.pods import PodStepOperator

SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {{column: late}}
sources:
  flights: {{uri: "${{data}}/flights/{{partition}}.parquet", partition: month}}
gate: {{auc: {{min: 0.7}}}}
train: {{window: 1, compute: cpu-small, params: {{marks: "{marks}"}}, checkpoint: {{within: 2s}}}}
"""
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
compute:
  cpu-light: {cpu: "1", memory: 1Gi}
  cpu-small: {cpu: "1", memory: 2Gi, spot: true, grace: 5s, wait: 60s, timeout: 10m}
kubernetes:
  connection: cluster
  silent_node: 2s
"""


class Task:
    """One task of a run as Airflow carries it."""

    def __init__(self, house: House, cluster: Cluster, verb: str = "train") -> None:
        self.house, self.cluster, self.verb, self.number = house, cluster, verb, 0
        self.xcom: dict[str, Any] = {}
        self.state: dict[str, str] = {}
        self.params: dict[str, Any] = {}
        self.run = SimpleNamespace(
            dag_id=f"delays.{verb}", run_id="r", run_type="manual", clear_number=0, conf={}, partition_key=None,
            triggering_user_name="eve",
        )  # fmt: skip

    def context(self) -> Any:
        ti = SimpleNamespace(
            dag_id=self.run.dag_id, task_id=self.verb, try_number=self.number, start_date=datetime.now(UTC),
            map_index=-1, xcom_push=lambda key, value: self.xcom.__setitem__(key, value), xcom_pull=lambda **_: None,
        )  # fmt: skip
        store = SimpleNamespace(set=lambda key, value: self.state.__setitem__(key, value))
        return {
            "ti": ti, "dag_run": self.run, "run_id": "r", "dag": SimpleNamespace(parent_dag=None),
            "params": self.params or {"window": "2013-01..2013-01"}, "task_state_store": store,
        }  # fmt: skip

    def operator(self) -> PodStepOperator:
        return PodStepOperator(task_id=self.verb, project="delays", verb=self.verb, compute="cpu-small")

    def attempt(self) -> TaskDeferred:
        """Start the next attempt; return the deferral."""
        self.number += 1
        with pytest.raises(TaskDeferred) as deferred:
            self.operator().execute(self.context())
        assert (deferred.value.method_name, deferred.value.timeout) == ("pod_ended", None)
        return deferred.value

    def go_on(self, deferral: TaskDeferred, event: dict[str, Any]) -> dict[str, Any]:
        """Another worker goes on after the wait."""
        kwargs = json.loads(json.dumps(deferral.kwargs))
        return dict(self.operator().pod_ended(self.context(), event=event, **kwargs))

    def entries(self) -> list[dict[str, Any]]:
        """Return the attempts on record."""
        found = Ledger(os.environ["ORRERY_LEDGER"]).find("delays", "run")
        return [e.payload for e in found if e.payload["verb"] == self.verb]

    def unit(self) -> str:
        """Return the name of the only pod."""
        (pod,) = self.cluster.pods()
        return str(pod["metadata"]["name"])


def trigger_of(deferral: TaskDeferred) -> PodTrigger:
    """Return the trigger as the triggerer makes it anew."""
    path, kwargs = deferral.trigger.serialize()
    assert path == "orrery.orchestration.pod_trigger.PodTrigger"
    return PodTrigger(**json.loads(json.dumps(kwargs)))


def wait(deferral: TaskDeferred, timeout: float = 60) -> dict[str, Any]:
    """Be the triggerer until the trigger fires; return its event."""

    async def first() -> Any:
        async with asyncio.timeout(timeout):
            return await anext(trigger_of(deferral).run())

    return dict(json.loads(json.dumps(asyncio.run(first()).payload)))


class Waiting:
    """The triggerer in a thread of its own, while a test does something to the pod."""

    def __init__(self, deferral: TaskDeferred) -> None:
        self.trigger = trigger_of(deferral)
        self.event: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        async def first() -> None:
            self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
            self._ready.set()
            self.event = dict((await anext(self.trigger.run())).payload)

        try:
            asyncio.run(first())
        except BaseException as e:
            self._error = e

    def end(self) -> dict[str, Any]:
        """Return the event."""
        self._thread.join(60)
        assert self.event is not None, self._error
        return dict(json.loads(json.dumps(self.event)))

    def kill(self) -> None:
        """End the triggerer without a word."""
        self.loop.call_soon_threadsafe(self.task.cancel)
        self._thread.join(30)
        assert isinstance(self._error, asyncio.CancelledError)


@pytest.fixture(autouse=True)
def _verbs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(VERBS)
    core_verbs.register()
    # What it is for is a scheduler, of which there is none here.
    monkeypatch.setattr(pod_trigger, "SOONEST_S", 0.0)
    yield
    VERBS.clear()
    VERBS.update(before)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    home = tmp_path / "home"
    house = build(home, SPEC.format(marks=home / "marks"))
    (home / "include" / "platform.yaml").write_text(PLATFORM)
    for name in ("ORRERY_PROFILE", "ORRERY_STAGE", "ORRERY_MLFLOW"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(house).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ORRERY_PROFILE", "kubernetes")
    clean = house.commit("validate", "clean", "2013-01")
    house.commit("materialize", "features", "2013-01", inputs={"clean": (clean.ref,)})
    return house


@pytest.fixture
def cluster(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    given = {"PATH": os.environ["PATH"], "ORRERY_HOME": str(house.home)}
    with Cluster(tmp_path / "cluster", pace=0.01, venvs=house.home / "venvs", environment=given) as served:
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", served.connection())
        yield served


@pytest.fixture
def task(house: House, cluster: Cluster) -> Task:
    return Task(house, cluster)


def started(house: House) -> str:
    """Wait until a training has begun; return the step that it went on from."""
    found = core_verbs.wait_for(house.marks / "started")
    (house.marks / "started").unlink()
    return found


def go(house: House) -> None:
    (house.marks / "go").touch()


def test_a_training_is_a_pod_and_its_end_is_on_record(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    deferral = task.attempt()
    waiting = Waiting(deferral)
    started(task.house)
    time.sleep(0.2)  # some steps
    unit = task.unit()
    go(task.house)
    summary = task.go_on(deferral, waiting.end())
    assert summary["output"] == task.house.manifests("train")[0].path
    assert task.xcom["return_value"] == summary
    (entry,) = task.entries()
    assert entry["status"] == "done" and entry["attempt"]["cause"] is None
    told = entry["attempt"]["pod"]
    assert (told["unit"], told["pod"], told["node"], told["ended"], told["exit_code"]) == (
        unit,
        unit,
        "node-a",
        "exited",
        0,
    )
    assert task.cluster.pods() == []
    assert f"pod {unit} runs on node node-a" in caplog.text
    assert sum(task.cluster.requests.values()) == 5, task.cluster.requests  # create, list, watch, log, delete
