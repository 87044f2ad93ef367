"""A knowledge base's reindex as pods, each a real process on the test cluster, beside the same on a laptop: same bytes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import TaskDeferred
from cluster.api import Cluster
from notes import CHAIN, DAY, PROJECT, ROOT, VENVS, Notes
from test_pods import wait

from orrery.catalogue import CATALOGUE
from orrery.orchestration import dags, pod_trigger

pytestmark = pytest.mark.slow
DATASETS = ("documents", "chunks", "vectors")
# The embedder's class has a GPU on a real cluster; here the class is the laptop's.
COMPUTE = {verb.name: verb.compute for verb in CATALOGUE["knowledge_base"].values()}


def context(verb: str) -> Any:
    """Return what Airflow gives a task, as far as ours look at it."""
    ti = SimpleNamespace(
        dag_id=f"{PROJECT}.reindex", task_id=verb, run_id="night", try_number=1, start_date=datetime.now(UTC),
        map_index=-1, xcom_push=lambda key, value: None, xcom_pull=lambda task_ids, **_: None,
    )  # fmt: skip
    dag_run = SimpleNamespace(
        dag_id=f"{PROJECT}.reindex", run_id="night", run_type="manual", clear_number=0, conf={}, partition_key=DAY,
        triggering_user_name="eve", run_after=datetime.now(UTC),
    )  # fmt: skip
    store = SimpleNamespace(set=lambda *_, **__: None, get=lambda *_, **__: None)
    return {
        "ti": ti, "dag_run": dag_run, "run_id": "night", "dag": SimpleNamespace(parent_dag=None), "outlet_events": {},
        "params": {}, "task_state_store": store,
    }  # fmt: skip


def carry(verb: str) -> None:
    """Carry one task as Airflow does: it defers, a trigger waits for its pod, another worker concludes."""
    operator, arguments = dags._task(PROJECT, verb, compute=COMPUTE[verb], kind="knowledge_base")
    given = context(verb)
    try:
        operator(**arguments).execute(given)
    except TaskDeferred as deferral:
        event = wait(deferral, 120)
        getattr(operator(**arguments), deferral.method_name)(given, event=event, **(deferral.kwargs or {}))


def test_in_pods_it_makes_what_a_laptop_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laptop = Notes(tmp_path / "laptop")
    laptop.run("reindex")

    pods = Notes(tmp_path / "pods", tmp_path / "laptop" / "tiny")
    platform, where = (ROOT / "include" / "platform.yaml").read_text(), "\nkubernetes:\n"
    assert where in platform
    (pods.home / "platform.yaml").write_text(platform.replace(where, f"{where}  connection: cluster\n"))
    env = pods.env | {"ORRERY_PROFILE": "kubernetes", "ORRERY_PLATFORM": str(pods.home / "platform.yaml")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pod_trigger, "SOONEST_S", 0.0)
    with Cluster(tmp_path / "cluster", venvs=VENVS) as cluster:
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", cluster.connection())
        for verb in CHAIN:
            carry(verb)
        assert cluster.requests["create pods"] == len(CHAIN)
        cluster.wait_for(lambda: not cluster.pods(), "an empty cluster")
    for dataset in DATASETS:
        assert pods.manifest(dataset).digest == laptop.manifest(dataset).digest, dataset
    points = [n.store.read(n.manifest("generation").uri("points.txt")) for n in (pods, laptop)]
    assert points[0] == points[1]
    assert pods.live["version"] == laptop.live["version"] == "1"
