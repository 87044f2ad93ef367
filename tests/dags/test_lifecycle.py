"""The Dags of a project: what they consist of, when they run, and what a person may ask of them."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def bag(tmp_path_factory: pytest.TempPathFactory):
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(ROOT / "dags"))
    assert bag.import_errors == {}
    return bag


def test_each_project_has_its_three_dags(bag) -> None:
    assert {"flight_delay.ingest", "flight_delay.train", "flight_delay.score"} <= set(bag.dags)


def test_tasks_are_verbs_in_order_and_in_groups(bag) -> None:
    order = {
        name: [t.task_id for t in bag.dags[f"flight_delay.{name}"].topological_sort()]
        for name in ("ingest", "train", "score")
    }
    assert order == {
        "ingest": ["ingest", "validate", "materialize"],
        "train": ["materialize", "train", "evaluate", "gate", "register", "promote"],
        "score": ["score"],
    }
    groups = bag.dags["flight_delay.train"].task_group.children
    assert list(groups) == ["data", "fit", "release"]


def test_dags_are_chained_by_partitioned_assets(bag) -> None:
    def outlets(dag: str) -> dict[str, list[str]]:
        return {t.task_id: [o.uri for o in t.outlets] for t in bag.dags[dag].tasks if t.outlets}

    assert outlets("flight_delay.ingest") == {
        "validate": ["x-orrery://flight_delay/raw"],
        "materialize": ["x-orrery://flight_delay/features"],
    }
    assert outlets("flight_delay.train") == {
        "train": ["x-orrery://flight_delay/candidate"],
        "promote": ["x-orrery://flight_delay/champion"],
    }
    for name in ("train", "score"):
        timetable = bag.dags[f"flight_delay.{name}"].timetable
        assert timetable.asset_condition.uri == "x-orrery://flight_delay/features"
        assert type(timetable).__name__ == "PartitionedAssetTimetable"


def test_ingest_runs_for_the_partition_that_has_just_ended(bag) -> None:
    from airflow.serialization.serialized_objects import DagSerialization
    from pendulum import datetime

    dag = DagSerialization.from_dict(DagSerialization.to_dict(bag.dags["flight_delay.ingest"]))
    timetable = dag.timetable
    _, key = timetable._get_partition_info(datetime(2013, 4, 2, 6, tz="UTC"))
    assert key == "2013-03"


@pytest.mark.parametrize(
    ("grain", "tick", "key"),
    [
        ("hour", "2013-04-02T06:15", "2013-04-02T05"),
        ("day", "2013-04-01T06:00", "2013-03-31"),
        ("month", "2013-01-02T06:00", "2012-12"),
        ("year", "2013-01-02T06:00", "2012"),
    ],
)
def test_each_partition_size_has_a_schedule_of_its_own(grain: str, tick: str, key: str) -> None:
    import pendulum
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import DagSerialization

    from orrery.orchestration.timetables import ingest_schedule
    from orrery.spec import ModelSpec

    spec = ModelSpec.model_validate(
        {
            "version": 1,
            "kind": "model",
            "owner": "a",
            "task": "binary",
            "label": {"column": "late"},
            "sources": {"rows": {"uri": "file:///x/{partition}.csv", "partition": grain}},
        }
    )
    dag = DAG("probe", schedule=ingest_schedule(spec))
    timetable = DagSerialization.from_dict(DagSerialization.to_dict(dag)).timetable
    assert timetable._get_partition_info(pendulum.parse(tick))[1] == key


def test_three_months_make_a_quarter_and_nothing_less() -> None:
    from airflow.partition_mappers.base import RollupMapper
    from airflow.partition_mappers.temporal import StartOfQuarterMapper
    from airflow.partition_mappers.window import QuarterWindow

    mapper = RollupMapper(upstream_mapper=StartOfQuarterMapper(input_format="%Y-%m"), window=QuarterWindow())
    assert mapper.to_downstream("2013-02") == "2013-Q1"
    assert set(mapper.to_upstream("2013-Q1")) == {"2013-01", "2013-02", "2013-03"}


def test_every_task_has_owner_pool_timeout_and_retry_policy(bag) -> None:
    from orrery import platform
    from orrery.orchestration.retry import RETRIES
    from orrery.spec import load_model

    for dag in bag.dags.values():
        owner = load_model(platform.project_folder(dag.dag_id.partition(".")[0])).owner
        assert dag.doc_md and dag.doc_md.startswith("**If red at**")
        assert {"orrery", dag.dag_id.partition(".")[0], f"owner:{owner}"} <= set(dag.tags)
        assert dag.description
        for task in dag.tasks:
            assert task.owner == owner
            assert task.pool.startswith("orrery-")
            assert task.execution_timeout is not None
            assert task.retries == RETRIES
            assert task.retry_policy is not None


def test_pools_exist_in_the_settings(bag) -> None:
    import yaml

    settings = yaml.safe_load((ROOT / "airflow_settings.yaml").read_text())
    there = {p["pool_name"] for p in settings["airflow"]["pools"]}
    assert {t.pool for d in bag.dags.values() for t in d.tasks} <= there


def test_user_errors_are_never_retried_and_others_are() -> None:
    from airflow.sdk import RetryAction

    from orrery.errors import DataError, Interrupted, LeaseHeld, RequestError
    from orrery.orchestration.retry import policy
    from orrery.runner import StepVanished

    rules = policy()

    def action(error: Exception) -> object:
        return rules.evaluate(error, 1, 3).action

    assert action(DataError("x")) == action(RequestError("x")) == RetryAction.FAIL
    assert action(LeaseHeld("x")) == action(Interrupted("x")) == RetryAction.RETRY
    assert action(StepVanished("x")) == RetryAction.DEFAULT
    # The policy is stored with the Dag, so it must survive that.
    again = type(rules).deserialize(json.loads(json.dumps(rules.serialize())))
    assert again.evaluate(DataError("x"), 1, 3).action == RetryAction.FAIL


HOSTILE = [
    "../../etc/passwd",
    "2013-01; rm -rf /",
    "$(id)",
    "2013-1",
    "2013-01\n",
    "２０１３-01",
    "",
    " ",
    "2013-01..2013-03/..",
    "a" * 1000,
]


@pytest.mark.parametrize("value", [v for v in HOSTILE if v and v != "2013-01\n"])
def test_the_form_refuses_what_is_no_partition(bag, value: str) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    for dag, param in (("ingest", "partition"), ("score", "partition"), ("train", "window")):
        params = copy.deepcopy(bag.dags[f"flight_delay.{dag}"].params)
        with pytest.raises(ParamValidationError):
            params[param] = value


def test_the_form_takes_a_partition(bag) -> None:
    for dag, param, value in (("ingest", "partition", "2013-01"), ("train", "window", "2013-01..2013-03")):
        params = copy.deepcopy(bag.dags[f"flight_delay.{dag}"].params)
        params[param] = value
        assert params.validate()[param] == value


class Run:
    """What a Dag run looks like to a task."""

    def __init__(self, conf: dict | None = None, partition_key: str | None = None) -> None:
        self.conf, self.partition_key, self.triggering_user_name, self.run_type = conf, partition_key, "ada", "manual"


def read(conf: dict | None, partition_key: str | None = None, *, window: bool = False, **params: object):
    from orrery.orchestration.params import form, read
    from orrery.plan import Planner

    planner = Planner("flight_delay")
    values = {k: p.value for k, p in form("month", window=window).items()} | (conf or {}) | params
    return read({"dag_run": Run(conf, partition_key), "params": values}, planner, window=window)


def test_a_request_is_read_strictly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from orrery.errors import RequestError

    monkeypatch.setenv("ORRERY_STORE", f"file://{tmp_path}/store")
    assert read({"partition": "2013-02"}).partitions == ("2013-02",)
    assert read({}, "2013-02").partitions == ("2013-02",)
    assert read({}, "2013-Q1", window=True).partitions == ("2013-01", "2013-02", "2013-03")
    assert read({"window": "2013-01..2013-02"}, window=True).partitions == ("2013-01", "2013-02")
    assert read({"window": "2013-04"}, window=True).partitions == ("2013-02", "2013-03", "2013-04")
    assert read({"partition": "2013-02"}).actor == "ada"
    with pytest.raises(RequestError, match="unknown key 'partitoin'.*\n.*did you mean 'partition'"):
        read({"partitoin": "2013-02"})
    with pytest.raises(RequestError, match="names no partition"):
        read({})
    with pytest.raises(RequestError, match="give one"):
        read({"partition": "2013-02"}, "2013-03")
    for value in HOSTILE:
        with pytest.raises(RequestError):
            read({}, value or None)


RENDER = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
from orrery.orchestration.pods import PodStepOperator
task = bag.dags["flight_delay.train"].get_task("train")
assert isinstance(task, PodStepOperator), type(task)
# No cluster here: rendering asks the hook only whether it runs inside one.
task.hook.__dict__.update(api_client=None, _is_in_cluster=True)
from types import SimpleNamespace as Some
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from orrery.plan import Planner, safe_name
pods = []
# In the place of the cluster: what the launcher would have it run.
KubernetesPodOperator.execute = lambda self, context: pods.append(self.build_pod_request_obj())
run = safe_name("flight_delay.train--manual__2026-11-24T13:20:35.123456+00:00_with_a_long_tail")
config = Some(store="s3://b", folder="p/runs/r/1", run=run, attempt=2)
launch = task._make_launcher({}, Planner("flight_delay"))
assert launch(Some(config=config, environment={"MLFLOW_TRACKING_URI": "http://mlflow"})) == 0
assert not task.durable and not task.deferrable
pod = pods[0]
from kubernetes.client import ApiClient
print(json.dumps(ApiClient().sanitize_for_serialization(pod)))
"""


GPU = "gpu: 1, node_selector: {pool: a}, tolerations: [{key: spot, operator: Exists, tolerationSeconds: 60}]"


def test_the_kubernetes_profile_renders_pods_from_the_compute_class(tmp_path: Path) -> None:
    platform = (
        (ROOT / "include" / "platform.yaml")
        .read_text()
        .replace('cpu-small: {cpu: "2"', f'cpu-small: {{{GPU}, cpu: "2"')
    )
    assert GPU in platform
    (tmp_path / "platform.yaml").write_text(platform)
    env = {
        **os.environ,
        "ORRERY_PROFILE": "kubernetes",
        "ORRERY_PLATFORM": str(tmp_path / "platform.yaml"),
        "AIRFLOW_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RENDER, str(ROOT / "dags")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pod = json.loads(done.stdout.splitlines()[-1])
    container = pod["spec"]["containers"][0]
    assert container["image"] == "orrery/ml:0.1.0"
    assert container["command"] == ["orrery"]
    folder = "s3://b/p/runs/r/1"
    assert container["args"] == ["step", "--config", f"{folder}/config.json", "--result", f"{folder}/result.json"]
    assert {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow"} in container["env"]
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "6Gi"},
        "limits": {"memory": "6Gi", "nvidia.com/gpu": "1"},
    }
    assert pod["metadata"]["labels"]["orrery/project"] == "flight_delay"
    assert pod["metadata"]["labels"]["orrery/step"] == "train"
    assert pod["metadata"]["labels"]["orrery/attempt"] == "2"
    # What a cluster accepts as a label's value (a default run id holds +00:00).
    values = pod["metadata"]["labels"].values()
    assert all(re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", v) for v in values), values
    assert pod["spec"]["nodeSelector"] == {"pool": "a"}
    assert pod["spec"]["tolerations"] == [{"key": "spot", "operator": "Exists", "tolerationSeconds": 60}]
    assert pod["spec"]["serviceAccountName"] == "orrery-step"
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"].get("automountServiceAccountToken") is False
    assert len(pod["spec"]["containers"]) == 1  # no XCom sidecar
