"""The Dags of a project: what they consist of, when they run, and what a person may ask of them."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
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


def ours(bag) -> dict:
    """Return the project's Dags: the housekeeping's is the whole house's, and has tests of its own."""
    return {name: dag for name, dag in bag.dags.items() if name.startswith("flight_delay.")}


def test_each_project_has_its_dags(bag) -> None:
    from orrery.orchestration.assets import DAGS, KNOWLEDGE_DAGS

    assert {f"flight_delay.{name}" for name in DAGS} == set(ours(bag))
    handbook = {f"handbook.{name}" for name in KNOWLEDGE_DAGS}
    assert set(bag.dags) - set(ours(bag)) == {"orrery.housekeeping", *handbook}


def test_a_knowledge_base_is_reindexed_each_night_step_by_step(bag) -> None:
    dag = bag.dags["handbook.reindex"]
    chain = ["collect", "chunk", "embed", "index", "evaluate", "gate", "promote"]
    assert [task.task_id for task in dag.topological_sort()] == chain
    assert all(
        task.downstream_task_ids == {after} for task, after in zip(dag.topological_sort(), chain[1:], strict=False)
    )
    assert not dag.catchup and dag.max_active_runs == 1
    assert {task.kind for task in dag.tasks} == {"knowledge_base"}
    assert set(dag.params) == {"reason", "force", "partial", "dry_run", "faults"}
    assert {o.uri for o in dag.get_task("promote").outlets} == {"x-orrery://handbook/live"}


def test_a_project_that_does_not_watch_its_sources_has_one_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orrery.orchestration import lifecycle

    shutil.copytree(ROOT / "include" / "projects" / "flight_delay", tmp_path / "flight_delay")
    spec = tmp_path / "flight_delay" / "spec.yaml"
    spec.write_text(re.sub("(?m)^watch:.*$", "", spec.read_text()))
    monkeypatch.setenv("ORRERY_PROJECTS", str(tmp_path))
    assert "watch" not in lifecycle("flight_delay", "a runbook")


def test_tasks_are_verbs_in_order_and_in_groups(bag) -> None:
    order = {name.partition(".")[2]: [t.task_id for t in dag.topological_sort()] for name, dag in ours(bag).items()}
    train = ["request", "materialize", "train", "evaluate", "gate", "register", "promote"]
    assert order == {
        "ingest": ["ingest", "validate", "materialize"],
        "request": ["request"],
        "train": train,
        "tune": ["materialize", "trial", "tune"],
        "score": ["score"],
        "labels": ["labels"],
        "monitor": order["monitor"],
        "rollback": ["rollback"],
        "watch": ["watch", "ingest"],
    }
    groups = bag.dags["flight_delay.train"].task_group.children
    assert list(groups) == ["request", "data", "fit", "release"]
    # Beside each other: neither waits for the other.
    monitor = bag.dags["flight_delay.monitor"].get_task("monitor")
    assert monitor.downstream_task_ids == {"request", "report"}


def test_dags_are_chained_by_partitioned_assets(bag) -> None:
    def outlets(dag: str) -> dict[str, list[str]]:
        return {t.task_id: [o.uri for o in t.outlets] for t in bag.dags[f"flight_delay.{dag}"].tasks if t.outlets}

    at = "x-orrery://flight_delay"
    assert outlets("ingest") == {"validate": [f"{at}/raw"], "materialize": [f"{at}/features"]}
    assert outlets("request") == {"request": [f"{at}/request"]}
    assert outlets("train") == {"train": [f"{at}/candidate"], "promote": [f"{at}/champion"]}
    assert outlets("score") == {"score": [f"{at}/scores"]}
    assert outlets("labels") == {"labels": [f"{at}/labels"]}
    assert outlets("monitor") == {"monitor": [f"{at}/health"], "request": [f"{at}/request"]}
    assert outlets("rollback") == {"rollback": [f"{at}/champion"]}
    follows = {"request": "features", "train": "request", "score": "features", "labels": "scores", "monitor": "labels"}
    for name, dataset in follows.items():
        timetable = bag.dags[f"flight_delay.{name}"].timetable
        assert timetable.asset_condition.uri == f"{at}/{dataset}"
        assert type(timetable).__name__ == "PartitionedAssetTimetable"


def test_what_must_come_in_order_runs_one_at_a_time_and_waits_do_not(bag) -> None:
    at_once = {name.partition(".")[2]: dag.max_active_runs for name, dag in ours(bag).items()}
    assert at_once.pop("labels") >= 168  # an hourly project whose labels take a week
    assert set(at_once.values()) == {1}


def test_ingest_runs_for_the_partition_that_has_just_ended(bag) -> None:
    from airflow.serialization.serialized_objects import DagSerialization
    from pendulum import datetime

    dag = DagSerialization.from_dict(DagSerialization.to_dict(bag.dags["flight_delay.ingest"]))
    timetable = dag.timetable
    _, key = timetable._get_partition_info(datetime(2013, 4, 2, 6, tz="UTC"))
    assert key == "2013-03"


def spec_of(grain: str, **more: object):
    from orrery.spec import ModelSpec

    source = {"uri": "file:///x/{partition}.csv", "partition": grain}
    values = {"version": 1, "kind": "model", "owner": "a", "task": "binary", "label": {"column": "late"}}
    return ModelSpec.model_validate({**values, "sources": {"rows": source}, **more})


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

    dag = DAG("probe", schedule=ingest_schedule(spec_of(grain)))
    timetable = DagSerialization.from_dict(DagSerialization.to_dict(dag)).timetable
    assert timetable._get_partition_info(pendulum.parse(tick))[1] == key


@pytest.mark.parametrize(
    ("retrain", "kind"),
    [
        ({"on": ["each"]}, "PartitionedAssetTimetable"),
        ({"on": ["drift", "quarterly"]}, "PartitionedAssetTimetable"),
        ({"on": ["drift"], "cron": "0 7 * * mon"}, "CronPartitionTimetable"),
        ({"on": ["drift"]}, None),
    ],
)
def test_the_spec_says_what_asks_for_a_training_by_itself(retrain: dict, kind: str | None) -> None:
    from orrery.orchestration.timetables import request_schedule

    schedule = request_schedule("p", spec_of("month", retrain=retrain))
    assert (type(schedule).__name__ if schedule is not None else None) == kind


def test_nothing_is_scheduled_after_the_last_partition_and_backfills_still_are(bag) -> None:
    """By the scheduler's own logic, after a backfilled run, today: years after the data ended."""
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow.timetables.base import DagRunInfo
    from pendulum import datetime

    def stored(dag):
        return DagSerialization.from_dict(DagSerialization.to_dict(dag))

    tick = datetime(2013, 4, 1, 6, tz="UTC")
    before = DagRunInfo(run_after=tick, data_interval=None, partition_date=tick, partition_key="2013-04")
    ended = stored(bag.dags["flight_delay.ingest"])
    assert ended.next_dagrun_info(last_automated_run_info=before) is None
    assert ended.next_dagrun_info(last_automated_run_info=None) is None
    keys = [i.partition_key for i in ended.iter_dagrun_infos_between(datetime(2013, 10, 1), datetime(2013, 12, 31))]
    assert keys == ["2013-10", "2013-11", "2013-12"]
    # What it was before: the newest past month, for which no data will ever land.
    endless = stored(bag.dags["flight_delay.ingest"])
    endless.end_date = None
    endless.__dict__.pop("_time_restriction", None)
    for task in endless.tasks:
        task.end_date = None
    following = endless.next_dagrun_info(last_automated_run_info=before)
    assert following is not None and following.partition_key > "2026"


@pytest.mark.parametrize("grain", ["hour", "day", "month", "year"])
def test_the_last_partition_itself_is_still_scheduled(grain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's logic, its clock set to just after the last partition's tick, then to after the next one's."""
    import pendulum
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow.timetables.base import DagRunInfo

    from orrery.orchestration.timetables import end_date, ingest_schedule

    last, tick, later = {
        "hour": ("2013-12-31T23", "2014-01-01T00:16", "2014-01-01T01:16"),
        "day": ("2013-12-31", "2014-01-01T06:01", "2014-01-02T06:01"),
        "month": ("2013-12", "2014-01-02T06:01", "2014-02-02T06:01"),
        "year": ("2013", "2014-01-02T06:01", "2015-01-02T06:01"),
    }[grain]
    spec = spec_of(grain, ends=last)
    dag = DAG("probe", schedule=ingest_schedule(spec), catchup=False, end_date=end_date(spec))
    dag = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    first = pendulum.datetime(2010, 1, 1)
    before = DagRunInfo(run_after=first, data_interval=None, partition_date=first, partition_key="x")
    monkeypatch.setattr("airflow.timetables.trigger.utcnow", lambda: pendulum.parse(tick))
    found = dag.next_dagrun_info(last_automated_run_info=before)
    assert found is not None and found.partition_key == last
    monkeypatch.setattr("airflow.timetables.trigger.utcnow", lambda: pendulum.parse(later))
    assert dag.next_dagrun_info(last_automated_run_info=before) is None


def test_every_task_has_owner_pool_timeout_and_retry_policy(bag) -> None:
    from orrery import budgets, platform
    from orrery.orchestration.operators import StepOperator
    from orrery.orchestration.retry import RETRIES
    from orrery.spec import load_model

    for dag in ours(bag).values():
        spec = load_model(platform.project_folder(dag.dag_id.partition(".")[0]))
        owner = spec.owner
        assert dag.doc_md and dag.doc_md.startswith("**If red at**")
        assert {"orrery", dag.dag_id.partition(".")[0], f"owner:{owner}"} <= set(dag.tags)
        assert dag.description
        for task in dag.tasks:
            assert task.owner == owner
            assert task.pool.startswith("orrery-")
            assert task.execution_timeout is not None
            step = isinstance(task, StepOperator) or task.is_mapped
            assert task.retries == (budgets.of(task.task_id, spec).retries if step else RETRIES)
            assert task.retry_policy is not None


@pytest.mark.parametrize(
    ("fallback", "said"),
    [
        ("cpu-lrage", "did you mean 'cpu-large'"),
        ("cloud", "'cloud' is a SageMaker class, train.compute 'cpu-small' is not"),
    ],
)
def test_a_fallback_that_the_task_could_not_run_on_is_told_when_the_dag_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: str, said: str
) -> None:
    from orrery import platform
    from orrery.errors import SpecError
    from orrery.orchestration import dags
    from orrery.spec import load_model

    file = tmp_path / "platform.yaml"
    cloud = '  cloud: {sagemaker: {role: "arn:aws:iam::123456789012:role/x", instance_type: ml.m5.xlarge}}\n'
    text = (ROOT / "include" / "platform.yaml").read_text()
    file.write_text(text.replace("compute:\n", f"compute:\n{cloud}", 1))
    monkeypatch.setenv("ORRERY_PLATFORM", str(file))
    spec = load_model(platform.project_folder("flight_delay"))
    train = spec.train.model_copy(update={"spot": spec.train.spot.model_copy(update={"fallback": fallback})})
    with pytest.raises(SpecError, match=said):
        dags._check_fallback(spec.model_copy(update={"train": train}))


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

    forms = {"ingest": "partition", "score": "partition", "labels": "partition", "monitor": "partition"}
    for dag, param in {**forms, "train": "window", "request": "window", "rollback": "version"}.items():
        params = copy.deepcopy(bag.dags[f"flight_delay.{dag}"].params)
        with pytest.raises(ParamValidationError):
            params[param] = value


def test_the_form_takes_a_partition(bag) -> None:
    for dag, param, value in (
        ("ingest", "partition", "2013-01"),
        ("train", "window", "2013-01..2013-03"),
        ("request", "window", "2013-03"),
        ("rollback", "version", "12"),
    ):
        params = copy.deepcopy(bag.dags[f"flight_delay.{dag}"].params)
        params[param] = value
        assert params.validate()[param] == value


class Run:
    """What a Dag run looks like to a task."""

    def __init__(self, dag: str, conf: dict | None = None, partition_key: str | None = None) -> None:
        self.dag_id, self.conf, self.partition_key = f"flight_delay.{dag}", conf, partition_key
        self.triggering_user_name, self.run_type = "ada", "manual"


def read(conf: dict | None, partition_key: str | None = None, *, dag: str = "ingest"):
    from orrery.orchestration.params import form, read
    from orrery.plan import Planner

    planner = Planner("flight_delay")
    values = {k: p.value for k, p in form(dag, planner.spec).items()} | (conf or {})
    return read({"dag_run": Run(dag, conf, partition_key), "params": values}, planner)


def test_a_request_is_read_strictly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from orrery.errors import RequestError

    monkeypatch.setenv("ORRERY_STORE", f"file://{tmp_path}/store")
    assert read({"partition": "2013-02"}).partitions == ("2013-02",)
    assert read({}, "2013-02").partitions == ("2013-02",)
    assert read({}, "2013-01..2013-03", dag="train").partitions == ("2013-01", "2013-02", "2013-03")
    assert read({"window": "2013-01..2013-02"}, dag="train").partitions == ("2013-01", "2013-02")
    assert read({"window": "2013-04"}, dag="request").partitions == ("2013-02", "2013-03", "2013-04")
    assert read({"partition": "2013-02"}).actor == "ada"
    assert read({"version": "3", "reason": "why"}, dag="rollback").version == "3"
    with pytest.raises(RequestError, match="unknown key 'partitoin'.*\n.*did you mean 'partition'"):
        read({"partitoin": "2013-02"})
    with pytest.raises(RequestError, match="names no partition"):
        read({})
    with pytest.raises(RequestError, match="give one"):
        read({"partition": "2013-02"}, "2013-03")


@pytest.mark.parametrize("dag", ["ingest", "request", "train", "tune", "score", "labels", "monitor", "rollback"])
def test_every_dag_refuses_hostile_values_and_unknown_keys(
    dag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orrery.errors import RequestError

    monkeypatch.setenv("ORRERY_STORE", f"file://{tmp_path}/store")
    for value in HOSTILE if dag != "rollback" else ():
        with pytest.raises(RequestError):
            read({}, value or None, dag=dag)
    for key in ("$(id)", "Partition", "version" if dag != "rollback" else "window"):
        with pytest.raises(RequestError, match="unknown key"):
            read({key: "x"}, dag=dag)


RENDER = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
from orrery.orchestration.pods import PodStepOperator
task = bag.dags["flight_delay.train"].get_task("train")
assert isinstance(task, PodStepOperator), type(task)
# No cluster here: rendering asks the hook only whether it runs inside one, and how a pod is written as JSON.
from kubernetes.client import ApiClient
task.hook.__dict__.update(api_client=ApiClient(), _is_in_cluster=True)
from orrery.cluster import names
from orrery.contract import VERBS, StepConfig
from orrery.orchestration.pods import PodLauncher
from orrery.plan import Plan, Planner, Request, safe_name
run = safe_name("flight_delay.train--manual__2026-11-24T13:20:35.123456+00:00_with_a_long_tail")
config = StepConfig(
    project="flight_delay", verb="train", key="2013-01..2013-03", partitions=("2013-01",), store="s3://b", bundle="d",
    address="a" * 32, run=run, task="train", attempt=2, folder="p/runs/r/2",
)
request = Request("flight_delay", "train", ("2013-01",), run, "train", 2)
launcher = PodLauncher(task, {}, Planner("flight_delay"), request)
pods = []
for compute in ("cpu-small", "cpu-large"):
    plan = Plan(config, VERBS["train"], {"MLFLOW_TRACKING_URI": "http://mlflow"}, compute=compute, outlive=28.0)
    pods += launcher._documents(plan, launcher.planner.platform.compute_class(compute), names.unit(config))
print(json.dumps(pods))
"""


TAINT = "{key: spot, operator: Exists, effect: NoExecute, tolerationSeconds: 60}"
GPU = f"gpu: 1, node_selector: {{pool: a}}, tolerations: [{TAINT}]"


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
    pod, fallback = json.loads(done.stdout.splitlines()[-1])
    container = pod["spec"]["containers"][0]
    assert container["image"] == "orrery/ml:0.1.0"
    assert container["command"] == ["orrery"]
    folder = "s3://b/p/runs/r/2"
    assert container["args"] == ["step", "--config", f"{folder}/config.json", "--result", f"{folder}/result.json"]
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow" and environment["ORRERY_LOG"] == "json"
    # Disk and memory are bounded, the processor is not.
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "6Gi", "ephemeral-storage": "10Gi"},
        "limits": {"memory": "6Gi", "ephemeral-storage": "10Gi", "nvidia.com/gpu": "1"},
    }
    labels = pod["metadata"]["labels"]
    assert labels["orrery/unit"] == pod["metadata"]["name"]
    assert pod["metadata"]["name"].startswith("flight-delay-train-") and pod["metadata"]["name"].endswith("-2")
    assert (labels["orrery/project"], labels["orrery/step"], labels["orrery/attempt"]) == ("flight_delay", "train", "2")
    assert labels["orrery/partition"] == "2013-01..2013-03"
    assert pod["metadata"]["annotations"]["orrery/folder"] == "p/runs/r/2"
    # What a cluster accepts as a label's value (a default run id holds +00:00).
    assert all(re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", v) for v in labels.values()), labels
    assert pod["spec"]["nodeSelector"] == {"pool": "a"}
    assert {"key": "spot", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60} in pod["spec"][
        "tolerations"
    ]
    assert pod["spec"]["serviceAccountName"] == "orrery-step"
    assert pod["spec"]["restartPolicy"] == "Never"
    # The step may take 28 s to save, and is given a little more; the class's timeout is the pod's own.
    assert pod["spec"]["terminationGracePeriodSeconds"] == 31 and pod["spec"]["activeDeadlineSeconds"] == 7200
    assert environment["ORRERY_OUTLIVE"] == "28"
    assert pod["spec"]["automountServiceAccountToken"] is False and pod["spec"]["enableServiceLinks"] is False
    assert len(pod["spec"]["containers"]) == 1  # no XCom sidecar
    # An attempt that is placed elsewhere has nothing of the class before.
    assert fallback["spec"]["containers"][0]["resources"] == {
        "requests": {"cpu": "8", "memory": "32Gi", "ephemeral-storage": "10Gi"},
        "limits": {"memory": "32Gi", "ephemeral-storage": "10Gi"},
    }
    assert not fallback["spec"].get("nodeSelector")
    assert all(t["key"].startswith("node.kubernetes.io/") for t in fallback["spec"]["tolerations"])
