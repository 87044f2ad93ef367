"""The real trainer in pods: its machine is taken away in the middle, and the next pod comes to the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.api import Cluster
from core_house import ROOT, House, environment
from test_pods import Task, Waiting, wait

from orrery.errors import Interrupted
from orrery.orchestration import pod_trigger
from orrery.orchestration.pods import PodStepOperator
from orrery.store import File, Manifest, content_digest

pytestmark = pytest.mark.slow
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
KEY = "2013-01"
SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {column: late}
sources:
  trips: {uri: "${data}/{partition}.parquet", partition: month}
gate: {auc: {min: 0.7}}
train: {window: 1, compute: spot, processes: RANKS, patience: 1000, checkpoint: {every: 10, within: 15s}}
"""
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
  ml: {image: "orrery/ml:1"}
compute:
  cpu-light: {cpu: "1"}
  spot: {cpu: "1", spot: true, grace: 20s, pods: PODS}
kubernetes: {connection: cluster, silent_node: 1s}
"""
# It waits at each step until it may go on: so it is interrupted in its middle on a fast machine too.
MODEL = """
import os, time
import torch
from pydantic import BaseModel
from torch import nn

class Params(BaseModel):
    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 0.01

class Net(nn.Module):
    def __init__(self, schema, params):
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(n, 4) for n in schema.categorical.values())
        wide = schema.numeric_width + 4 * len(schema.categorical)
        self.layers = nn.Sequential(nn.Linear(wide, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, numeric, categorical):
        if self.training and not os.path.exists(os.environ.get("ORRERY_TEST_MARK", "")):
            time.sleep(0.1)
        parts = [embed(categorical[:, i]) for i, embed in enumerate(self.embed)]
        return self.layers(torch.cat([numeric, *parts], dim=1)).squeeze(1)

def build(schema, params):
    return Net(schema, params)
"""
MAKE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from orrery.data.tables import write_parquet
from training_bench import trips
write_parquet(trips(1500), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A month of features, made where pyarrow is."""
    path = tmp_path_factory.mktemp("features") / "features.parquet"
    argv = [str(VENVS / "ml" / "bin" / "python"), "-c", MAKE, str(ROOT / "tests" / "training"), str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


class Trainings:
    """Houses with that month, each with a cluster of its own."""

    def __init__(self, root: Path, table: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.table, self.patch = root, table, patch
        self.clusters: list[Cluster] = []

    def task(self, name: str, ranks: int = 1, pods: int = 1) -> Task:
        home = self.root / name
        house = House(home, f"file://{home}/store")
        for folder in (house.folder, house.marks):
            folder.mkdir(parents=True)
        (house.folder / "spec.yaml").write_text(SPEC.replace("RANKS", str(ranks)))
        (house.folder / "model.py").write_text(MODEL)
        (home / "include" / "platform.yaml").write_text(PLATFORM.replace("PODS", str(pods)))
        (home / "docker").symlink_to(ROOT / "docker")
        for variable, value in {**environment(house), "ORRERY_VENVS": str(VENVS)}.items():
            self.patch.setenv(variable, value)
        self._features(house)
        given = {"ORRERY_TEST_MARK": str(house.marks / "go"), "OMP_NUM_THREADS": "1"}
        cluster = Cluster(home / "cluster", venvs=VENVS, pace=0.01, environment=given)
        cluster.start()
        self.clusters.append(cluster)
        self.patch.setenv("AIRFLOW_CONN_CLUSTER", cluster.connection())
        return Spot(house, cluster)

    def _features(self, house: House) -> None:
        clean = house.commit("validate", "clean", KEY)
        base = "delays/materialize/f"
        done: File = house.store.upload(self.table, f"{base}/a/features.parquet")
        files = {"features.parquet": File(path="a/features.parquet", size=done.size, sha256=done.sha256)}
        manifest = Manifest(
            project="delays", verb="materialize", key=KEY, address="f", digest=content_digest(files), files=files,
            inputs={"clean": (clean.ref,)}, created="2013-01-01T00:00:00.000+00:00",
        )  # fmt: skip
        assert house.store.put_if_absent(manifest.path, manifest.model_dump_json().encode())
        house.store.publish("delays", "features", KEY, manifest, manifest.created)


class Spot(Task):
    """The training of one house."""

    def operator(self) -> PodStepOperator:
        return PodStepOperator(task_id="train", project="delays", verb="train", compute="spot")

    def saved(self) -> None:
        """Wait for a checkpoint of the newest attempt's own."""

        def committed() -> bool:
            for folder in {str(p["metadata"]["annotations"]["orrery/folder"]) for p in self.cluster.pods()}:
                if self.house.store.exists(f"{folder}/progress.json"):
                    came = json.loads(self.house.store.read(f"{folder}/progress.json"))
                    return bool(came["committed"] > came["resumed"])
            return False

        self.cluster.wait_for(committed, "a checkpoint", 120)

    def finish(self) -> dict[str, Any]:
        (self.house.marks / "go").touch()
        deferral = self.attempt()
        return self.go_on(deferral, wait(deferral, 180))


@pytest.fixture
def trainings(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainings]:
    monkeypatch.setattr(pod_trigger, "SOONEST_S", 0.0)
    monkeypatch.setattr(pod_trigger, "LOG_S", 0.5)
    for name in ("ORRERY_STAGE", "ORRERY_MLFLOW", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ORRERY_PROFILE", "kubernetes")
    monkeypatch.setenv("ORRERY_MLFLOW", "http://127.0.0.1:9")  # nobody there: it is not what this is about
    made = Trainings(tmp_path, table, monkeypatch)
    yield made
    for cluster in made.clusters:
        cluster.stop()


def test_a_drain_and_a_power_cut_cost_no_byte_of_the_result(trainings: Trainings) -> None:
    task = trainings.task("lost")
    for lose, by in (
        (task.cluster.nodes.drain, "EvictionByEvictionAPI"),
        (task.cluster.nodes.power_off, "DeletionByPodGC"),
    ):
        deferral = task.attempt()
        waiting = Waiting(deferral)
        task.saved()
        lose("node-a" if by.startswith("E") else "node-b")
        task.cluster.nodes.add("node-b" if by.startswith("E") else "node-c")
        with pytest.raises(Interrupted):
            task.go_on(deferral, waiting.end())
        (*_, told) = task.entries()
        assert (told["attempt"]["cause"], told["attempt"]["pod"]["by"]) == ("interrupted", by)
    done = task.finish()
    first, second, last = (e["attempt"] for e in task.entries())
    # A save may become whole after the last sign of life of a machine that loses its power.
    assert 0 < first["committed"] == second["resumed"] < second["committed"] <= last["resumed"]
    whole = trainings.task("whole").finish()
    assert done["digest"] == whole["digest"] is not None
    assert done["metrics"] == whole["metrics"]
    task.cluster.wait_for(lambda: not task.cluster.pods(), "an empty cluster")


def test_a_rank_of_a_training_over_two_pods_is_evicted_and_all_go_on_together(trainings: Trainings) -> None:
    task = trainings.task("two", ranks=2, pods=2)
    deferral = task.attempt()
    waiting = Waiting(deferral)
    task.saved()
    task.cluster.nodes.evict(labels="batch.kubernetes.io/job-completion-index=1")
    with pytest.raises(Interrupted):
        task.go_on(deferral, waiting.end())
    (first,) = task.entries()
    assert first["attempt"]["pod"]["by"] == "EvictionByEvictionAPI" and first["attempt"]["committed"] > 0
    task.cluster.wait_for(lambda: not task.cluster.pods(), "an empty cluster")
    done = task.finish()
    assert [e["attempt"]["cause"] for e in task.entries()] == ["interrupted", None]
    whole = trainings.task("two-whole", ranks=2, pods=2).finish()
    assert done["digest"] == whole["digest"] is not None
