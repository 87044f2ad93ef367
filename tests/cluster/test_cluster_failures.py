"""Every way to lose a pod looks as it does on a cluster: conditions, reasons, exit codes, what stays and what goes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.api import Cluster
from cluster.objects import condition
from test_cluster_api import ended, log_of, pod, running, until

# Told to go it says so and ends as a step does; `{code}` is how.
STEP = """
import os, signal, sys, time
def told(*_):
    print("saved")
    sys.exit({code})
signal.signal(signal.SIGTERM, told)
open(os.environ["WORDS"], "w").write("last words")
print("begun")
time.sleep(60)
"""
WORDS = [{"name": "WORDS", "value": "/dev/termination-log"}]


class Pods:
    """Starts one, and remembers all that a watch tells of it."""

    def __init__(self, cluster: Cluster, core: Any) -> None:
        self.cluster, self.core = cluster, core
        self.seen: list[dict[str, Any]] = []
        cluster.do(lambda: cluster.objects.heard.append(self._hear))

    def _hear(self, change: Any) -> None:
        if change.kind.plural == "pods":
            self.seen.append({**change.object, "type": change.type})

    def start(self, code: int = 143, **spec: Any) -> None:
        self.core.create_namespaced_pod("orrery", pod("a", STEP.format(code=code), env=WORDS, **spec))
        running(self.cluster, "a")
        until(lambda: "begun" in log_of(self.core, "a"), "its first line")

    def gone(self) -> dict[str, Any]:
        """Return the last that was seen of it, once it is gone."""

        def deleted() -> dict[str, Any] | None:
            last = [p for p in self.seen if p["metadata"]["name"] == "a"][-1]
            return last if last["type"] == "DELETED" else None

        found: dict[str, Any] = until(deleted, "its end")
        assert self.cluster.pod("a") is None
        return found


@pytest.fixture
def pods(cluster: Cluster, core: Any) -> Pods:
    return Pods(cluster, core)


def state(found: dict[str, Any]) -> dict[str, Any]:
    (status,) = found["status"]["containerStatuses"]
    return dict(status["state"])


def disrupted(found: dict[str, Any]) -> str:
    return str((condition(found, "DisruptionTarget") or {}).get("reason", ""))


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (lambda nodes: nodes.drain("node-a"), "EvictionByEvictionAPI"),
        (lambda nodes: nodes.taint("node-a", "maintenance"), "DeletionByTaintManager"),
        (lambda nodes: nodes.preempt("a"), "PreemptionByScheduler"),
        (lambda nodes: nodes.delete("a"), ""),
    ],
    ids=["drain", "taint", "preemption", "delete"],
)
def test_who_is_told_to_go_saves_and_is_gone_with_its_end(pods: Pods, way: Any, reason: str) -> None:
    pods.start()
    way(pods.cluster.nodes)
    last = pods.gone()
    assert disrupted(last) == reason
    told = state(last)["terminated"]
    assert (told["exitCode"], told["reason"], told["message"]) == (143, "Error", "last words")
    assert last["status"]["phase"] == "Failed"
    alive = [p for p in pods.seen if p["metadata"].get("deletionTimestamp") and "running" in state(p)]
    assert alive and disrupted(alive[-1]) == reason  # a watch could see it before the end


def test_a_trainer_that_ends_with_zero_is_a_success_for_kubernetes(pods: Pods) -> None:
    pods.start(code=0)
    pods.cluster.nodes.drain()
    assert pods.gone()["status"]["phase"] == "Succeeded"


def test_one_without_a_handler_is_killed_when_its_grace_is_over(pods: Pods) -> None:
    pods.core.create_namespaced_pod("orrery", pod("a", "import time; time.sleep(60)", terminationGracePeriodSeconds=1))
    running(pods.cluster, "a")
    began = time.monotonic()
    pods.cluster.nodes.drain()
    assert state(pods.gone())["terminated"]["exitCode"] == 137
    assert time.monotonic() - began >= 0.9


def test_a_node_that_shuts_down_leaves_the_object(pods: Pods) -> None:
    pods.start()
    pods.cluster.nodes.shutdown()
    last = ended(pods.cluster, "a")
    assert (last["status"]["phase"], last["status"]["reason"]) == ("Failed", "Terminated")
    assert disrupted(last) == "TerminationByKubelet" and state(last)["terminated"]["exitCode"] == 143
    assert log_of(pods.core, "a").splitlines() == ["begun", "saved"]


def test_the_power_is_cut_and_the_node_removed(pods: Pods) -> None:
    pods.start()
    pods.cluster.nodes.power_off()
    last = pods.gone()
    assert disrupted(last) == "DeletionByPodGC" and "running" in state(last)


def test_the_power_is_cut_and_the_node_stays(pods: Pods) -> None:
    silent = [
        {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 3}
    ]
    pods.start(tolerations=silent, terminationGracePeriodSeconds=1)
    pods.cluster.nodes.power_off(deleted=False)
    not_ready = until(lambda: (p := pods.cluster.pod("a")) and condition(p, "Ready")["status"] == "False" and p)
    assert not not_ready["metadata"].get("deletionTimestamp") and "running" in state(not_ready)
    events = pods.core.list_namespaced_event("orrery", field_selector="involvedObject.name=a").items
    assert "NodeNotReady" in {e.reason for e in events}
    told = until(lambda: (p := pods.cluster.pod("a")) and p["metadata"].get("deletionTimestamp") and p)
    assert disrupted(told) == "DeletionByTaintManager"
    time.sleep(1.2)  # longer than its grace: nobody is there to end it
    assert pods.cluster.pod("a") and "running" in state(told)
    pods.core.delete_namespaced_pod("a", "orrery", grace_period_seconds=0)
    pods.gone()


def test_memory_and_pressure(pods: Pods) -> None:
    pods.start()
    pods.cluster.nodes.oom("a")
    told = state(ended(pods.cluster, "a"))["terminated"]
    assert (told["exitCode"], told["reason"], told["message"]) == (137, "OOMKilled", "last words")
    pods.core.delete_namespaced_pod("a", "orrery")
    pods.gone()
    pods.start()
    pods.cluster.nodes.pressure("a")
    last = ended(pods.cluster, "a")
    assert last["status"]["reason"] == "Evicted" and "low on resource: memory" in last["status"]["message"]
    assert disrupted(last) == "TerminationByKubelet"


def test_a_deadline_ends_it(pods: Pods) -> None:
    pods.start(activeDeadlineSeconds=5)
    last = ended(pods.cluster, "a")
    assert (last["status"]["reason"], state(last)["terminated"]["exitCode"]) == ("DeadlineExceeded", 143)


def waiting(pods: Pods) -> tuple[str, str]:
    found = pods.cluster.pod("a")
    assert found is not None
    for status in found["status"].get("containerStatuses") or []:
        if "waiting" in status["state"]:
            return status["state"]["waiting"]["reason"], status["state"]["waiting"].get("message", "")
    return "", ""


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        (
            {"image": "orrery/none:1", "imagePullPolicy": "Never"},
            "ErrImageNeverPull",
            "is not present with pull policy",
        ),
        ({"image": "orrery/none:1"}, "ImagePullBackOff", "not found"),
        ({"image": "Orrery/None:1"}, "InvalidImageName", "invalid reference format"),
        ({"envFrom": [{"secretRef": {"name": "keys"}}]}, "CreateContainerConfigError", 'secret "keys" not found'),
    ],
    ids=["never", "missing", "name", "secret"],
)
def test_what_keeps_a_container_from_starting(pods: Pods, spec: dict[str, Any], reason: str, words: str) -> None:
    pods.core.create_namespaced_pod("orrery", pod("a", **spec))
    until(lambda: waiting(pods)[0] == reason, reason)
    assert words in waiting(pods)[1]


def test_a_secret_that_comes_and_an_image_that_heals_let_it_start(pods: Pods) -> None:
    pods.cluster.nodes.break_image("orrery/airflow:1", "dial tcp: i/o timeout", 0.3)
    pods.core.create_namespaced_pod(
        "orrery", pod("a", "import os; print(os.environ['KEY'])", envFrom=[{"secretRef": {"name": "keys"}}])
    )
    until(lambda: waiting(pods)[0] == "CreateContainerConfigError")
    pods.core.create_namespaced_secret("orrery", {"metadata": {"name": "keys"}, "stringData": {"KEY": "value"}})
    ended(pods.cluster, "a")
    assert log_of(pods.core, "a") == "value\n"


def test_no_command_is_no_start(pods: Pods) -> None:
    pods.core.create_namespaced_pod("orrery", pod("a", command=["nonsense"]))
    told = state(ended(pods.cluster, "a"))["terminated"]
    assert (told["exitCode"], told["reason"]) == (128, "StartError")


def test_the_scheduler_says_why_and_places_when_it_can(pods: Pods) -> None:
    pods.cluster.nodes.add("node-b", gpu=1, taints=[{"key": "gpu", "value": "", "effect": "NoSchedule"}])
    pods.core.create_namespaced_pod("orrery", pod("a", resources={"limits": {"nvidia.com/gpu": "9"}}))
    found = until(lambda: (p := pods.cluster.pod("a")) and condition(p, "PodScheduled") and p)
    why = condition(found, "PodScheduled")
    assert why is not None and why["reason"] == "Unschedulable"
    assert why["message"].startswith(
        "0/2 nodes are available: 1 Insufficient nvidia.com/gpu, 1 node(s) had untolerated taint {gpu: }."
    )
    pods.cluster.nodes.add("node-c", gpu=16)
    assert ended(pods.cluster, "a")["spec"]["nodeName"] == "node-c"


def test_a_more_important_pod_takes_the_place(pods: Pods) -> None:
    pods.cluster.apply(
        {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "high"}, "value": 1000}
    )
    gpus = {"limits": {"nvidia.com/gpu": "8"}}
    pods.start(resources=gpus)
    pods.core.create_namespaced_pod("orrery", pod("b", resources=gpus, priorityClassName="high"))
    assert ended(pods.cluster, "b")["status"]["phase"] == "Succeeded"
    assert disrupted(pods.gone()) == "PreemptionByScheduler"


def test_nothing_of_a_container_outlives_it(pods: Pods, tmp_path: Path) -> None:
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
"""
    pods.core.create_namespaced_pod("orrery", pod("a", code))
    ended(pods.cluster, "a")
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    until(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z", "the child's end")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    import subprocess
    import sys

    script = Path(__file__).resolve().parent / "serve.py"
    process = subprocess.Popen(
        [sys.executable, str(script), "--state", str(tmp_path / "state"), "--pace", "0.01"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stdout.close()


def test_as_a_process_it_takes_orders_over_http(served: str, tmp_path: Path) -> None:
    import httpx
    from kubernetes import client, config

    with config.new_client_from_config(str(tmp_path / "state" / "kubeconfig.json")) as api:
        core = client.CoreV1Api(api)
        core.create_namespaced_pod("orrery", pod("a", STEP.format(code=143), env=WORDS))
        until(lambda: core.read_namespaced_pod("a", "orrery").status.phase == "Running")
        until(lambda: "begun" in log_of(core, "a"))
        with httpx.Client(base_url=served) as http:
            assert http.post("/_cluster/drain", json={"node": "node-a"}).status_code == 200
            until(lambda: not http.get("/_cluster/pods").json(), "its end")
            assert http.get("/_cluster/requests").json()["create pods"] == 1
            assert "drain" in http.post("/_cluster/explode", content=json.dumps({})).json()["message"]
