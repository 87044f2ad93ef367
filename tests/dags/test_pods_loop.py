"""A project's whole loop as pods, each a real process on the test cluster, beside the same loop on a laptop: same bytes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import TaskDeferred
from cluster.api import Cluster
from loop import DAYS, NEXT, PROJECT, ROOT, VENVS, Loop, registered
from mlflow_house import mlflow_server
from test_pods import wait

from orrery.contract import VERBS
from orrery.orchestration import dags, pod_trigger
from orrery.plan import Planner

pytestmark = pytest.mark.slow
DATASETS = ("raw", "clean", "features", "candidate", "evaluation", "verdict", "scores")


@dataclass(frozen=True)
class Story:
    """What a project goes through: the partitions of its first training, and one more that is scored."""

    project: str
    projects: Path
    keys: tuple[str, ...]
    scored: str

    @property
    def window(self) -> str:
        return f"{self.keys[0]}..{self.keys[-1]}"


SMALL = Story(PROJECT, ROOT / "tests" / "projects", DAYS, NEXT)
WHOLE = Story("flight_delay", ROOT / "include" / "projects", ("2013-01", "2013-02", "2013-03"), "2013-04")
# The flights take four times as long: ORRERY_TEST_WHOLE_LOOP=1 adds them.
STORIES = [SMALL, *([WHOLE] if os.environ.get("ORRERY_TEST_WHOLE_LOOP") else [])]
INGEST = ("ingest", "validate", "materialize")


def land(loop: Loop, story: Story) -> None:
    """Bring the flights to where a loop's data are; the small project's are there."""
    if story is not WHOLE:
        return
    env = {**loop.env, "PYTHONPATH": str(VENVS / "upstream")}
    argv = [str(VENVS / "ml" / "bin" / "python"), str(ROOT / "include" / "demo" / "land.py")]
    argv += ["--out", loop.env["ORRERY_DATA"], "--months", *story.keys, story.scored]
    subprocess.run(argv, env=env, check=True, capture_output=True)


class InPods(Loop):
    """The loop's tasks, carried as Airflow carries them."""

    def __init__(self, home: Path, mlflow: str, story: Story, patch: pytest.MonkeyPatch) -> None:
        super().__init__(home, mlflow, story.project, story.projects)
        platform = (ROOT / "include" / "platform.yaml").read_text()
        where = "\nkubernetes:\n"
        assert where in platform
        (home / "platform.yaml").write_text(platform.replace(where, f"{where}  connection: cluster\n"))
        self.env |= {"ORRERY_PROFILE": "kubernetes", "ORRERY_PLATFORM": str(home / "platform.yaml")}
        for name, value in self.env.items():
            patch.setenv(name, value)
        self.xcom: dict[str, Any] = {}

    def task(self, dag: str, verb: str, key: str) -> dict[str, Any]:
        """Carry one task to its end; return its summary."""
        compute = Planner(self.project).spec.train.compute if verb == "train" else VERBS[verb].compute
        operator, arguments = dags._task(self.project, verb, compute=compute)
        context = self.context(dag, verb, key)
        try:
            summary = operator(**arguments).execute(context)
        except TaskDeferred as deferral:
            event = wait(deferral, 300)
            summary = getattr(operator(**arguments), deferral.method_name)(
                context, event=event, **(deferral.kwargs or {})
            )
        self.xcom[verb] = summary
        return dict(summary)

    def context(self, dag: str, verb: str, key: str) -> Any:
        run = f"{dag}-{key}"
        ti = SimpleNamespace(
            dag_id=f"{self.project}.{dag}", task_id=verb, run_id=run, try_number=1, start_date=datetime.now(UTC),
            map_index=-1, xcom_push=lambda key, value: None, xcom_pull=lambda task_ids, **_: self.xcom.get(task_ids),
        )  # fmt: skip
        dag_run = SimpleNamespace(
            dag_id=f"{self.project}.{dag}", run_id=run, run_type="manual", clear_number=0, conf={}, partition_key=None,
            triggering_user_name="eve",
        )  # fmt: skip
        store = SimpleNamespace(set=lambda *_, **__: None, get=lambda *_, **__: None)
        return {
            "ti": ti, "dag_run": dag_run, "run_id": run, "dag": SimpleNamespace(parent_dag=None), "outlet_events": {},
            "params": {"window" if ".." in key else "partition": key}, "task_state_store": store,
        }  # fmt: skip


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[tuple[Path, Path, str, str]]:
    """Two homes, each with an MLflow of its own."""
    here, there = tmp_path / "laptop", tmp_path / "pods"
    with mlflow_server(here / "mlflow") as mine, mlflow_server(there / "mlflow") as theirs:
        yield here, there, mine, theirs


@pytest.mark.parametrize("story", STORIES, ids=lambda s: s.project)
def test_the_loop_in_pods_makes_what_a_laptop_makes(
    story: Story, homes: tuple[Path, Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, mine, theirs = homes
    laptop = Loop(here, mine, story.project, story.projects)
    land(laptop, story)
    for verb in INGEST:
        laptop.run(verb, story.window)
    for verb in ("train", "evaluate", "gate"):
        laptop.run(verb, story.window)
    laptop.run("promote", story.window, "--version", registered(laptop.run("register", story.window)))
    for verb in (*INGEST, "score"):
        laptop.run(verb, story.scored)

    monkeypatch.setattr(pod_trigger, "SOONEST_S", 0.0)
    pods = InPods(there, theirs, story, monkeypatch)
    land(pods, story)
    with Cluster(there / "cluster", venvs=VENVS) as cluster:
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", cluster.connection())
        for key in story.keys:
            for verb in INGEST:
                pods.task("ingest", verb, key)
        for verb in ("train", "evaluate", "gate", "register", "promote"):
            pods.task("train", verb, story.window)
        for verb in INGEST:
            pods.task("ingest", verb, story.scored)
        pods.task("score", "score", story.scored)
        assert cluster.requests["create pods"] == 3 * (len(story.keys) + 1) + 6
        cluster.wait_for(lambda: not cluster.pods(), "an empty cluster")
    made, wanted = digests(pods), digests(laptop)
    assert made == wanted and len(made) == 3 * (len(story.keys) + 1) + 4
    (champion,) = [e.payload["version"] for e in pods.ledger.find(story.project, "promotion") if e.phase == "done"]
    assert champion == "1"


def digests(loop: Loop) -> dict[str, str]:
    """Return the digest of every output that is published."""
    found = {}
    for dataset in DATASETS:
        for key in loop.store.keys(loop.project, dataset):
            found[f"{dataset} {key}"] = loop.manifest(dataset, key).digest
    return found
