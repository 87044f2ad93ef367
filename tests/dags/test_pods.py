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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import core_verbs
from airflow.sdk.exceptions import TaskDeferred
from cluster.api import Cluster
from core_house import House, build, environment

from orrery.contract import VERBS
from orrery.errors import Interrupted, TryAgain, UserError
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
        assert not deferral.kwargs  # `dag.test()` forgets them
        return dict(self.operator().pod_ended(self.context(), event=event))

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


def test_an_evicted_training_is_an_interruption_and_goes_on(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    deferral = task.attempt()
    waiting = Waiting(deferral)
    assert started(task.house) == "0"
    wait_for_checkpoint(task.house)
    unit = task.unit()
    task.cluster.nodes.evict(unit)
    with pytest.raises(Interrupted, match="saved at step"):
        task.go_on(deferral, waiting.end())
    (entry,) = task.entries()
    told = entry["attempt"]["pod"]
    assert (entry["attempt"]["cause"], told["ended"], told["by"]) == (
        "interrupted",
        "interrupted",
        "EvictionByEvictionAPI",
    )
    assert told["exit_code"] == 143 and entry["attempt"]["committed"] > 0
    assert f"pod {unit} is told to go: EvictionByEvictionAPI" in caplog.text
    assert "interrupted by EvictionByEvictionAPI" in task.state["clear-0.pod"]
    assert task.cluster.pods() == []
    second = task.attempt()
    waiting = Waiting(second)
    assert int(started(task.house)) == entry["attempt"]["committed"]
    assert task.unit() == f"{unit[:-1]}2"
    go(task.house)
    task.go_on(second, waiting.end())
    assert [e["status"] for e in task.entries()] == ["interrupted", "done"]


def wait_for_checkpoint(house: House) -> None:
    deadline = time.monotonic() + 30
    while not list((house.home / "store").rglob("checkpoints/step")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pod_whose_worker_was_lost_before_the_wait_is_taken_up(task: Task) -> None:
    task.attempt()  # and nobody ever hears of the wait: the worker was killed before it had begun
    unit = task.unit()
    deferral = task.attempt()
    trigger = trigger_of(deferral)
    assert task.unit() == unit == trigger.unit and trigger.folder.endswith("/1")
    waiting = Waiting(deferral)
    started(task.house)
    go(task.house)
    summary = task.go_on(deferral, waiting.end())
    assert summary["output"] == task.house.manifests("train")[0].path
    first, second = task.entries()
    assert (first["attempt"]["cause"], second["status"]) == ("lost", "done")
    assert second["attempt"]["pod"]["ran"].endswith("/1") and task.cluster.pods() == []


def test_an_attempt_that_is_started_twice_has_one_pod(task: Task) -> None:
    task.attempt()
    unit = task.unit()
    task.number = 0  # the same attempt once more: the answer to its creation was lost with the worker
    deferral = task.attempt()
    assert task.unit() == unit == trigger_of(deferral).unit
    waiting = Waiting(deferral)
    started(task.house)
    go(task.house)
    task.go_on(deferral, waiting.end())
    assert [e["status"] for e in task.entries()] == ["done"]


def test_another_task_of_the_run_that_is_cleared_meanwhile_changes_nothing(task: Task) -> None:
    deferral = task.attempt()
    waiting = Waiting(deferral)
    started(task.house)
    task.run.clear_number = 1  # Airflow counts a clear for the whole run
    go(task.house)
    summary = task.go_on(deferral, waiting.end())
    assert summary["output"] == task.house.manifests("train")[0].path
    assert [e["status"] for e in task.entries()] == ["done"] and task.cluster.pods() == []


def test_a_worker_that_is_lost_while_it_judges_leaves_the_pod_to_tell(task: Task) -> None:
    deferral = task.attempt()
    waiting = Waiting(deferral)
    started(task.house)
    task.cluster.nodes.oom(task.unit())
    waiting.end()  # and the worker that goes on is killed before it has put anything on record
    task.attempt()
    (first,) = task.entries()
    assert (first["attempt"]["cause"], first["attempt"]["number"]) == ("bug", 1)
    assert "memory" in first["error"] and len(task.cluster.pods()) == 1


@pytest.mark.parametrize(("code", "kind"), [(403, "config"), (503, "gone")])
def test_a_cluster_that_stays_out_of_sight_is_given_up(
    task: Task, code: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_trigger, "REFUSED_S", 0.5)
    for pause in ("LOOK_S", "TROUBLE_S"):
        monkeypatch.setattr(pod_trigger, pause, 0.1)
    deferral = task.attempt()
    deferral.trigger.blind = 1.5
    waiting = Waiting(deferral)
    started(task.house)
    task.cluster.answer(code, "(list|watch) pods", times=10**6)
    task.cluster.cut()
    ending = waiting.end()["ending"]
    assert (ending["kind"], ending["by"]) == (kind, "OutOfSight") and "out of sight for" in ending["message"]


def test_a_triggerer_that_is_killed_leaves_the_pod_to_another(task: Task) -> None:
    deferral = task.attempt()
    waiting = Waiting(deferral)
    started(task.house)
    unit = task.unit()
    waiting.kill()
    assert task.unit() == unit
    waiting = Waiting(deferral)
    go(task.house)
    task.go_on(deferral, waiting.end())
    assert len(task.house.manifests("train")) == 1 and task.cluster.pods() == []


def test_a_person_who_ends_the_wait_ends_the_pod_and_the_next_attempt_waits_for_it(task: Task) -> None:
    spec = task.house.folder / "spec.yaml"
    spec.write_text(spec.read_text().replace('"}', '", save_s: 1.0}'))
    deferral = task.attempt()
    waiting = Waiting(deferral)
    started(task.house)
    wait_for_checkpoint(task.house)
    first = task.unit()
    waiting.kill()
    asyncio.run(trigger_of(deferral).on_kill())
    told = task.cluster.pod(first)
    assert told is None or told["metadata"].get("deletionTimestamp")  # a slow look finds it gone already
    second = task.attempt()  # comes back when the first has saved and is gone
    assert task.cluster.pod(first) is None
    (entry,) = task.entries()
    assert entry["attempt"]["cause"] == "interrupted"
    waiting = Waiting(second)
    assert int(started(task.house)) == entry["attempt"]["committed"] > 0
    go(task.house)
    task.go_on(second, waiting.end())


def test_a_live_pod_at_other_work_is_stopped_before_another_begins(task: Task) -> None:
    task.attempt()
    started(task.house)
    first = task.unit()
    (task.house.folder / "features.py").write_text("ANSWER = 43\n")
    deferral = task.attempt()
    assert trigger_of(deferral).after == [first] and len(task.cluster.pods()) <= 1
    most = []
    waiting = Waiting(deferral)
    while not (task.house.marks / "started").exists():
        most.append(len(task.cluster.pods()))
        time.sleep(0.01)
    assert max(most) == 1
    assert task.unit() == f"{first[:-1]}2"
    go(task.house)
    task.go_on(deferral, waiting.end())
    assert [e["status"] for e in task.entries()] == ["bug", "done"]


def test_a_quota_is_waited_for_in_the_triggerer(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    task.cluster.nodes.quota({"pods": "0"})
    deferral = task.attempt()
    assert task.cluster.pods() == [] and trigger_of(deferral).documents
    waiting = Waiting(deferral)
    task.cluster.nodes.no_quota()
    started(task.house)
    go(task.house)
    task.go_on(deferral, waiting.end())
    assert "exceeded quota" in caplog.text
    (entry,) = task.entries()
    assert entry["status"] == "done" and task.cluster.pods() == []


@pytest.fixture
def impatient(house: House) -> None:
    file = house.home / "include" / "platform.yaml"
    file.write_text(file.read_text().replace("wait: 60s", "wait: 1s"))


def test_a_quota_that_stays_is_an_attempt_without_a_place(task: Task, impatient: None) -> None:
    task.cluster.nodes.quota({"pods": "0"})
    began = time.monotonic()
    deferral = task.attempt()
    with pytest.raises(TryAgain, match="exceeded quota"):
        task.go_on(deferral, wait(deferral))
    took = time.monotonic() - began
    (entry,) = task.entries()
    attempt = entry["attempt"]
    assert attempt["pod"]["ended"] == "unplaced" and attempt["queued_s"] >= 0.9
    assert attempt["wall_s"] + attempt["queued_s"] <= took + 0.1, "the wait is told as work, too"


def test_no_node_for_it_is_a_wait_with_the_schedulers_words(
    task: Task, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    task.cluster.nodes.cordon()
    deferral = task.attempt()
    with pytest.raises(TryAgain, match="unschedulable"):
        task.go_on(deferral, wait(deferral))
    assert "waits: 0/1 nodes are available" in caplog.text
    assert task.cluster.pods() == []


def test_a_silent_node_is_given_up_and_its_pod_removed_by_force(task: Task) -> None:
    deferral = task.attempt()
    waiting = Waiting(deferral)
    started(task.house)
    task.cluster.nodes.power_off(deleted=False)
    with pytest.raises(Interrupted):
        task.go_on(deferral, waiting.end())
    (entry,) = task.entries()
    assert entry["attempt"]["pod"]["ended"] == "node_lost" and task.cluster.pods() == []


def test_a_cluster_that_is_out_of_reach_for_a_moment_costs_no_attempt(task: Task) -> None:
    task.cluster.answer(503, "create pods")
    deferral = task.attempt()
    assert trigger_of(deferral).documents
    waiting = Waiting(deferral)
    started(task.house)
    go(task.house)
    task.go_on(deferral, waiting.end())
    assert [e["status"] for e in task.entries()] == ["done"]


def test_what_the_cluster_refuses_for_good_is_told_and_on_record_once(task: Task) -> None:
    words = 'pods "x" is forbidden: violates PodSecurity "restricted:v1.32": unrestricted capabilities'
    task.cluster.answer(403, "create pods", message=words, reason="Forbidden")
    task.number = 1
    with pytest.raises(UserError, match="violates PodSecurity"):
        task.operator().execute(task.context())
    (entry,) = task.entries()
    assert entry["status"] == "user" and entry["attempt"]["cause"] == "user"


def test_an_effect_on_the_champion_is_waited_for_by_its_worker(
    house: House, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = house.verdict("2013-01..2013-01")
    promote = Task(house, cluster, "promote")
    promote.run.dag_id, promote.number = "delays.train", 1
    monkeypatch.setattr(PodStepOperator, "_options", lambda self, context: {"version": "1"})
    promote.operator().execute(promote.context())
    ledger = Ledger(os.environ["ORRERY_LEDGER"])
    champion = ledger.champion("delays")
    assert champion is not None and champion.model == candidate.path
    (entry,) = promote.entries()
    assert entry["attempt"]["pod"]["node"] == "node-a" and cluster.pods() == []


def test_each_partition_of_a_task_is_a_pod_of_its_own(
    house: House, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Task(house, cluster, "probe")
    probe.params = {"window": "2013-01..2013-03"}
    probe.run.dag_id = "delays.train"
    units = []
    deferral = probe.attempt()
    for _ in range(2):
        units.append(probe.unit())
        event = wait(deferral)
        with pytest.raises(TaskDeferred) as deferred:
            probe.go_on(deferral, event)
        deferral = deferred.value
    assert trigger_of(deferral).carried["over"] == {"2013-01": "done", "2013-02": "done"}
    units.append(probe.unit())
    summary = probe.go_on(deferral, wait(deferral))
    assert summary["steps"] == 3 and len(set(units)) == 3
    assert sorted(e["key"] for e in probe.entries()) == ["2013-01", "2013-02", "2013-03"]
    assert cluster.pods() == []


def test_an_outage_of_the_api_judges_nobody(task: Task) -> None:
    deferral = task.attempt()
    waiting = Waiting(deferral)
    started(task.house)
    waiting.kill()
    trigger_of(deferral).wait_until = time.time()  # the time for a machine is over: it has one
    task.cluster.outage(2.0)
    waiting = Waiting(deferral)
    go(task.house)
    task.go_on(deferral, waiting.end())
    assert [e["status"] for e in task.entries()] == ["done"]


def test_a_connection_that_is_not_there_is_told(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW_CONN_CLUSTER")
    task.number = 1
    with pytest.raises(UserError, match=r"connection 'cluster'.*\n.*kubernetes.connection"):
        task.operator().execute(task.context())
