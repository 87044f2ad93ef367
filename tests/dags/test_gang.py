"""One training over two pods: what it is made of, and on the test cluster what an eviction of one of them comes to."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.api import Cluster
from cluster.objects import JOBS, PODS, SERVICES
from core_house import House, build, environment
from test_pods import Task, Waiting, trigger_of, wait

from orrery import checking
from orrery.cluster import gang, judge
from orrery.cluster.judge import Seen
from orrery.contract import Result, StepConfig
from orrery.errors import Interrupted, OrreryError, RequestError, SpecError
from orrery.orchestration import pod_trigger
from orrery.orchestration.pods import PodStepOperator
from orrery.spec import ModelSpec
from orrery.spec import load as spec_of
from orrery.store import File, Manifest, content_digest

ROOT = Path(__file__).resolve().parents[2]
VENVS = Path(os.environ.get("ORRERY_VENVS") or ROOT / ".venvs")
ML = VENVS / "ml" / "bin"
UNIT = "delays-train-0123456789ab-1"
POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": UNIT,
        "namespace": "orrery",
        "labels": {"orrery/unit": UNIT, "orrery/project": "delays", "dag_id": "delays.train"},
        "annotations": {"orrery/folder": "delays/runs/r/train/1"},
    },
    "spec": {
        "activeDeadlineSeconds": 600,
        "containers": [{"name": "base", "image": "orrery/ml:1", "env": [{"name": "TMPDIR", "value": "/tmp"}]}],
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 40,
    },
}


# -- documents -----------------------------------------------------------------------------------------


def variables(template: dict[str, Any]) -> dict[str, Any]:
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in template["spec"]["containers"][0]["env"]}


def test_an_indexed_job_and_its_service() -> None:
    given = copy.deepcopy(POD)
    job, service = gang.make("indexed-job").documents(given, UNIT, 3, "orrery", wait=900)
    assert given == POD  # it is another's
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["metadata"] == {
        "name": UNIT,
        "namespace": "orrery",
        **{k: POD["metadata"][k] for k in ("labels", "annotations")},
    }
    spec, template = job["spec"], job["spec"]["template"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"], spec["backoffLimit"]) == (
        3,
        3,
        "Indexed",
        0,
    )
    assert spec["podReplacementPolicy"] == "Failed" and "suspend" not in spec
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["FailJob", "FailJob"]
    # A pod's own deadline counts from its start, of which it may wait 900 s for the others, and is judged; the Job's
    # ends what nobody watches any more.
    assert template["spec"]["activeDeadlineSeconds"] == 600 + 900
    assert spec["activeDeadlineSeconds"] == 600 + 900 + 900 + 40
    assert template["metadata"]["labels"] == POD["metadata"]["labels"] and "name" not in template["metadata"]
    assert template["spec"]["restartPolicy"] == "Never" and template["spec"]["subdomain"] == UNIT
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert variables(template) == {
        "TMPDIR": "/tmp",
        "ORRERY_NODES": "3",
        "ORRERY_PATIENCE": "900",
        "ORRERY_NODE": index,
        "ORRERY_MASTER": f"{UNIT}-0.{UNIT}.orrery.svc:29500",
    }
    assert service["metadata"]["name"] == UNIT and service["spec"]["selector"] == {"orrery/unit": UNIT}
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert gang.collection(job) == "/apis/batch/v1/namespaces/orrery/jobs"
    assert gang.address(service) == f"/api/v1/namespaces/orrery/services/{UNIT}"
    made = {**job, "metadata": {**job["metadata"], "uid": "u-1"}}
    (owner,) = gang.owned(service, made)["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": UNIT, "uid": "u-1"}
    assert "ownerReferences" not in service["metadata"]


def test_a_pytorchjob() -> None:
    ranks = gang.make("pytorchjob")
    (job,) = ranks.documents(POD, UNIT, 3, "orrery", wait=900)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert gang.address(job) == f"/apis/kubeflow.org/v1/namespaces/orrery/pytorchjobs/{UNIT}"
    policy, specs = job["spec"]["runPolicy"], job["spec"]["pytorchReplicaSpecs"]
    assert (policy["cleanPodPolicy"], policy["backoffLimit"], policy["activeDeadlineSeconds"]) == ("Running", 0, 2440)
    assert {kind: (s["replicas"], s["restartPolicy"]) for kind, s in specs.items()} == {
        "Master": (1, "Never"), "Worker": (2, "Never")
    }  # fmt: skip
    for replica in specs.values():
        assert replica["template"]["spec"]["activeDeadlineSeconds"] == 1500
        assert replica["template"]["spec"]["containers"][0]["name"] == ranks.container == "pytorch"
        assert variables(replica["template"]) == {"TMPDIR": "/tmp", "ORRERY_NODES": "3", "ORRERY_PATIENCE": "900"}
        assert replica["template"]["metadata"]["labels"]["orrery/unit"] == UNIT


@pytest.mark.parametrize("kind", ["indexed-job", "pytorchjob"])
def test_a_name_that_makes_no_host_is_refused(kind: Any) -> None:
    ranks = gang.make(kind)
    with pytest.raises(OrreryError, match=f"of {ranks.longest} that"):
        ranks.documents(POD, "u" * (ranks.longest + 1), 2, "orrery")


def test_both_know_which_node_a_pod_is() -> None:
    index = {"batch.kubernetes.io/job-completion-index": "2"}
    assert gang.IndexedJob().node({"metadata": {"annotations": index}}) == 2
    for kind, number, node in (("master", "0", 0), ("worker", "0", 1), ("worker", "6", 7)):
        told = {"training.kubeflow.org/replica-type": kind, "training.kubeflow.org/replica-index": number}
        pod = {"metadata": {"name": f"{UNIT}-{kind}-{number}", "uid": "u", "labels": told}}
        assert gang.PyTorchJob().node(pod) == node
        seen = Seen(unit=UNIT, pods=8, container="pytorch")
        seen.update(pod, 0.0)
        assert [m.index for m in seen.members.values()] == [node]  # the judge counts alike


# -- on the test cluster -------------------------------------------------------------------------------

SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {column: late}
sources:
  flights: {uri: "${data}/flights/{partition}.parquet", partition: month}
gate: {auc: {min: 0.7}}
train: {window: 1, compute: pair, processes: 2, strategy: ddp, patience: 99, checkpoint: {every: 20, within: 20s}}
"""
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
  ml: {image: "orrery/ml:1"}
compute:
  pair: {cpu: "1", memory: 2Gi, pods: 2, spot: true, wait: 120s, timeout: 10m}
kubernetes:
  connection: cluster
"""
# A step takes its time as long as a file is there: a test decides in the middle of which training it is.
MODEL = """
import os, time
import torch
from pydantic import BaseModel
from torch import nn

class Params(BaseModel):
    epochs: int = 4
    batch_size: int = 128
    dropout: float = 0.2

class Net(nn.Module):
    def __init__(self, schema, params):
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(n, 4) for n in schema.categorical.values())
        wide = schema.numeric_width + 4 * len(schema.categorical)
        self.layers = nn.Sequential(nn.Linear(wide, 32), nn.ReLU(), nn.Dropout(params.dropout), nn.Linear(32, 1))

    def forward(self, numeric, categorical):
        if os.path.exists(os.environ.get("SLOW", "")):
            time.sleep(0.1)
        parts = [embed(categorical[:, i]) for i, embed in enumerate(self.embed)]
        return self.layers(torch.cat([numeric, *parts], dim=1)).squeeze(1)

def build(schema, params):
    return Net(schema, params)
"""
FEATURES = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from training_bench import trips
from orrery.data.tables import write_parquet
write_parquet(trips(3000), Path(sys.argv[2]))
"""


class Gang(Task):
    """The training of two pods."""

    def operator(self) -> PodStepOperator:
        return PodStepOperator(task_id="train", project="delays", verb="train", compute="pair")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    if not (ML / "orrery").exists():
        pytest.skip("the ml environment has not been made")
    home = tmp_path / "home"
    house = build(home, SPEC)
    (house.folder / "model.py").write_text(MODEL)
    (home / "include" / "platform.yaml").write_text(PLATFORM)
    for name in ("ORRERY_PROFILE", "ORRERY_STAGE"):
        monkeypatch.delenv(name, raising=False)
    # Nobody listens there: a training goes on without MLflow.
    for name, value in {**environment(house), "ORRERY_MLFLOW": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ORRERY_PROFILE", "kubernetes")
    monkeypatch.setattr(pod_trigger, "SOONEST_S", 0.0)  # what it is for is a scheduler, of which there is none here
    return house


@pytest.fixture
def landed(house: House) -> House:
    """With features that can be trained on."""
    table = house.home / "features.parquet"
    python, bench = str(ML / "python"), str(ROOT / "tests" / "training")
    subprocess.run([python, "-c", FEATURES, bench, str(table)], check=True)
    clean = house.commit("validate", "clean", "2013-01")
    folder = "delays/materialize/2013-01"
    done = house.store.upload(table, f"{folder}/a1/features.parquet")
    files = {"features.parquet": File(path="a1/features.parquet", size=done.size, sha256=done.sha256)}
    manifest = Manifest(
        project="delays", verb="materialize", key="2013-01", address="2013-01", digest=content_digest(files),
        files=files, inputs={"clean": (clean.ref,)},
    )  # fmt: skip
    house.store.put(manifest.path, manifest.model_dump_json().encode())
    house.store.publish("delays", "features", "2013-01", manifest, "2013-02-01T00:00:00.000+00:00")
    return house


@pytest.fixture
def cluster(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    given = {"PATH": os.environ["PATH"], "SLOW": str(house.marks / "slow")}
    with Cluster(tmp_path / "cluster", pace=0.01, venvs=VENVS, environment=given) as served:
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", served.connection())
        yield served


def objects(cluster: Cluster) -> list[str]:
    """What there is of any unit: kinds and names."""
    found = cluster.do(lambda: [o for kind in (JOBS, SERVICES, PODS) for o in cluster.objects.list(kind)])
    return [f"{o['kind']} {o['metadata']['name']}" for o in found]


def second_of(cluster: Cluster) -> str:
    """The pod that does not lead."""
    (found,) = (p["metadata"]["name"] for p in cluster.pods() if gang.IndexedJob().node(p) == 1)
    return str(found)


@contextlib.contextmanager
def alone(house: House, folder: str, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Train the same by two processes of one machine, beside the test and in a store of its own; yields the digest."""
    shutil.copytree(house.home / "store", tmp_path / "alone")
    config = StepConfig.model_validate_json(house.store.read(f"{folder}/config.json"))
    there = tmp_path / "alone" / folder
    (there / "config.json").write_text(
        config.model_copy(update={"store": f"file://{tmp_path}/alone"}).model_dump_json()
    )
    argv = [str(ML / "orrery"), "step", *(f"--{name}=file://{there}/{name}.json" for name in ("config", "result"))]

    def digest() -> str:
        assert step.wait(120) == 0, log.read_text()
        return str(Result.model_validate_json((there / "result.json").read_text()).digest)

    log = tmp_path / "alone.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(argv, stdout=out, stderr=out, env={"PATH": os.environ["PATH"]}) as step,
    ):
        try:
            yield digest
        finally:
            step.kill()


@pytest.mark.slow
def test_a_pod_that_is_taken_away_is_one_interruption_and_the_next_attempt_goes_on(
    landed: House, cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    house, slow = landed, landed.marks / "slow"
    slow.touch()
    task = Gang(house, cluster)
    deferral = task.attempt()
    unit = trigger_of(deferral).unit
    with alone(house, trigger_of(deferral).folder, tmp_path) as wanted:
        waiting = Waiting(deferral)
        saved = house.home / "store" / "delays" / "train"
        cluster.wait_for(lambda: list(saved.glob("*/checkpoints/*.json")), "a checkpoint", 120)
        assert {f"Job {unit}", f"Service {unit}"} < set(objects(cluster)) and len(cluster.pods()) == 2
        cluster.nodes.evict(second_of(cluster))
        with pytest.raises(Interrupted, match="SIGTERM on one of the nodes: told to stop at step"):
            task.go_on(deferral, waiting.end())
        (entry,) = task.entries()
        told = entry["attempt"]["pod"]
        assert (entry["attempt"]["cause"], told["ended"], told["by"]) == (
            "interrupted", "interrupted", "EvictionByEvictionAPI"
        )  # fmt: skip
        came = f"goes on from step {entry['attempt']['committed']}"
        assert "node 1: SIGTERM: told to stop at step" in caplog.text
        cluster.wait_for(lambda: not objects(cluster), "everything of the unit to go")

        deferral = task.attempt()
        waiting = Waiting(deferral)
        # The operator says so when it starts the attempt, and the training when it has.
        cluster.wait_for(lambda: caplog.text.count(came) == 2, "the second attempt's training", 120)
        cluster.nodes.pressure(second_of(cluster))  # killed without a word: its peer knows of a lost node only
        with pytest.raises(Interrupted):
            task.go_on(deferral, waiting.end())
        entry = task.entries()[-1]
        assert (entry["attempt"]["cause"], entry["attempt"]["pod"]["by"]) == ("interrupted", "TerminationByKubelet")
        cluster.wait_for(lambda: not objects(cluster), "everything of the unit to go")

        slow.unlink()
        deferral = task.attempt()
        summary = task.go_on(deferral, wait(deferral, 240))
        assert "attempt 3: interrupted 2 of 20 times, goes on from step" in caplog.text
        assert [e["status"] for e in task.entries()] == ["interrupted", "interrupted", "done"]
        (manifest,) = house.manifests("train")
        assert (summary["output"], manifest.digest) == (manifest.path, wanted())
        cluster.wait_for(lambda: not objects(cluster), "everything of the unit to go")


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_whose_machine_dies_is_an_interruption_though_its_peer_ends_first(
    landed: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: int
) -> None:
    """The peer is told by its own keep-alive, ends, and has the Job end; the cluster misses the node later."""
    monkeypatch.setattr(judge, "MARGIN_S", 0.5)
    (landed.home / "include" / "platform.yaml").write_text(PLATFORM.replace("spot: true", "grace: 2s"))
    lost = threading.Event()

    async def play(pod: dict[str, Any], say: Callable[[str], None]) -> int:
        say("at work")
        while not lost.is_set():
            await asyncio.sleep(0.02)
        return 1

    # The cluster misses a node after 40 s: here 1 s.
    with Cluster(tmp_path / "cluster", pace=0.025, play=play) as cluster:
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", cluster.connection())
        cluster.nodes.remove("node-a")
        for name in ("node-a", "node-b"):
            cluster.nodes.add(name, pods=1)
        task = Gang(landed, cluster)
        deferral = task.attempt()
        waiting, unit = Waiting(deferral), trigger_of(deferral).unit
        cluster.wait_for(lambda: [p["status"]["phase"] for p in cluster.pods()] == ["Running"] * 2, "both pods")
        (node,) = (p["spec"]["nodeName"] for p in cluster.pods() if gang.IndexedJob().node(p) == dead)
        cluster.nodes.power_off(node, deleted=False)
        lost.set()
        with pytest.raises(Interrupted, match=f"pod {unit}-{dead}-.* on node {node}: "):
            task.go_on(deferral, waiting.end())
        (entry,) = task.entries()
        told = entry["attempt"]["pod"]
        assert (entry["attempt"]["cause"], told["ended"], told["by"]) == ("interrupted", "node_lost", "NodeNotReady")
        # Nobody on the dead node confirms that its pod has ended: by force, or the next attempt waits for it.
        cluster.wait_for(lambda: not objects(cluster), "everything of the unit to go")


def test_a_job_whose_worker_was_lost_before_its_service_is_given_one(landed: House, cluster: Cluster) -> None:
    task = Gang(landed, cluster)
    unit = trigger_of(task.attempt()).unit
    cluster.do(lambda: cluster.objects.remove(SERVICES, cluster.objects.get(SERVICES, "orrery", unit)))
    assert f"Service {unit}" not in objects(cluster)
    assert trigger_of(task.attempt()).unit == unit
    assert {f"Job {unit}", f"Service {unit}"} < set(objects(cluster))


def test_what_cannot_be_spread_is_refused_before_anything_is_made(landed: House, cluster: Cluster) -> None:
    spec = landed.folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("processes: 2", "processes: 3"))
    task = Gang(landed, cluster)
    task.number = 1
    with pytest.raises(RequestError, match=r"train\.processes 3 .* compute class 'pair' \(2\)"):
        task.operator().execute(task.context())
    declared = spec_of(landed.folder)
    assert isinstance(declared, ModelSpec)
    with pytest.raises(SpecError, match=r"spec\.yaml:9: train\.processes 3 .* 'pair' \(2\)"):
        checking.inspect("delays", declared)
    spec.write_text(spec.read_text().replace("processes: 3", "processes: 2") + "tune: {trials: 5}\n")
    declared = spec_of(landed.folder)
    assert isinstance(declared, ModelSpec)
    with pytest.raises(SpecError, match=r"spec\.yaml:10: tune\.compute: 'pair' has 2 pods, and a trial runs in one"):
        checking.inspect("delays", declared)
    with pytest.raises(SpecError, match="'pair' has 2 pods: evaluate runs in one"):
        PodStepOperator(task_id="evaluate", project="delays", verb="evaluate", compute="pair")
    assert not objects(cluster)
