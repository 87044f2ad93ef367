"""The housekeeping's Dag: its form and its tasks; which pods go, against a cluster that speaks the real protocol."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from airflow.sdk.exceptions import AirflowSkipException
from cluster.api import Cluster
from core_house import House, build, environment

from orrery.cluster import gang, names
from orrery.contract import StepConfig
from orrery.errors import RequestError, TryAgain, UserError
from orrery.housekeeping import units
from orrery.ledger import Ledger
from orrery.orchestration import housekeeping
from orrery.plan import safe_name

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
compute:
  cpu-light: {cpu: "1", memory: 1Gi}
  cpu-small: {cpu: "1", memory: 1Gi}
kubernetes: {connection: cluster}
"""
HOUR = 3600.0


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    made = build(tmp_path / "home")
    (made.home / "include" / "platform.yaml").write_text(PLATFORM)
    for name in ("ORRERY_PROFILE", "ORRERY_STAGE", "ORRERY_MLFLOW", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(made).items():
        monkeypatch.setenv(name, value)
    return made


def context(
    states: Mapping[str, Any] | None = None, conf: dict[str, Any] | None = None, *, dag: str = housekeeping.DAG_ID
) -> Any:
    """Return a task's context: what Airflow says of other runs is `states`, by Dag."""
    run = SimpleNamespace(
        dag_id=dag, run_id="scheduled__1", clear_number=0, conf=conf or {}, run_type="scheduled",
        triggering_user_name=None,
    )  # fmt: skip

    def get_task_states(*, dag_id: str, task_ids: list[str]) -> Any:
        if states is None or dag_id not in states:
            raise RuntimeError("no answer")
        return states[dag_id]

    ti = SimpleNamespace(try_number=1, get_task_states=get_task_states)
    return {"ti": ti, "dag_run": run, "params": {"dry_run": False, "project": None, "share": None, **(conf or {})}}


# -- the Dag -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "hours", "form"),
    [
        ("orrery.housekeeping", "store", 24, {"dry_run": False, "project": None, "share": None}),
        ("orrery.orphans", "pods", 1, {"dry_run": False, "project": None}),
    ],
)
def test_each_dag_is_thin_owned_and_runs_from_now_on(
    name: str, task: str, hours: int, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.dag_processing.dagbag import DagBag
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow.timetables.base import TimeRestriction

    monkeypatch.setenv("ORRERY_PROFILE", "kubernetes")
    bag = DagBag(str(ROOT / "dags" / "housekeeping.py"))
    assert bag.import_errors == {} and set(bag.dags) == {"orrery.housekeeping", "orrery.orphans"}
    dag = bag.dags[name]
    assert dag.doc_md.startswith("**If red at**") and {"orrery", "owner:platform"} == set(dag.tags)
    assert (dag.catchup, dag.max_active_runs) == (False, 1)
    (only,) = dag.tasks
    assert (only.task_id, only.owner, only.pool) == (task, "platform", "orrery-light")
    assert only.retry_policy is not None and only.execution_timeout is not None
    assert dag.params.dump() == form
    stored = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    first = stored.next_dagrun_info(last_automated_run_info=None)
    assert first is not None and first.run_after.timestamp() > time.time(), "nothing runs when it is first seen"
    second = stored.timetable.next_dagrun_info(
        last_automated_data_interval=first.data_interval, restriction=TimeRestriction(None, None, False)
    )
    assert second is not None and (second.run_after - first.run_after).total_seconds() == hours * HOUR


def test_under_the_local_profile_there_is_no_dag_of_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.dag_processing.dagbag import DagBag

    monkeypatch.delenv("ORRERY_PROFILE", raising=False)
    assert set(DagBag(str(ROOT / "dags" / "housekeeping.py")).dags) == {"orrery.housekeeping"}


@pytest.mark.parametrize(
    "conf", [{"share": 0}, {"share": 1.5}, {"project": "../x"}, {"dry_run": "yes"}, {"project": 3}]
)
def test_the_form_refuses_what_cannot_be(house: House, conf: dict[str, Any]) -> None:
    from airflow.sdk.definitions.param import ParamsDict
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError):
        ParamsDict(
            {**housekeeping.form(), **{k: housekeeping.form()[k].resolve(v) for k, v in conf.items()}}
        ).validate()


def test_an_unknown_key_is_refused(house: House) -> None:
    with pytest.raises(RequestError, match="unknown key 'dryrun'"):
        housekeeping.StoreOperator(task_id="store").execute(context(conf={"dryrun": True}))
    with pytest.raises(RequestError, match="unknown key 'share'"):
        housekeeping.PodsOperator(task_id="pods").execute(context(conf={"share": 1}, dag=housekeeping.ORPHANS))


def test_the_store_is_kept_and_a_dry_run_changes_nothing(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    house.commit("materialize", "features", "2013-01")
    stray = Path(house.store.root) / "delays" / ".x.0123456789ab"
    stray.write_bytes(b"1")
    os.utime(stray, (time.time() - 72 * HOUR,) * 2)
    task = housekeeping.StoreOperator(task_id="store")
    told = task.execute(context(conf={"dry_run": True}))
    assert told["planned"]["temporary"]["units"] == 1 and told["removed"] == {} and stray.exists()
    told = task.execute(context())
    assert told["removed"]["temporary"] == {"units": 1, "objects": 1, "bytes": 1} and not stray.exists()
    assert "never given its name" in caplog.text
    assert house.store.names("_housekeeping/reports") == ["orrery.housekeeping--scheduled__1.json"]


def test_a_refusal_is_a_64_with_the_way_out(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orrery.housekeeping.sweep.refusals", lambda *_: ["delays: 90 of 100 outputs would go"])
    with pytest.raises(UserError, match="nothing was removed: delays: 90 of 100") as said:
        housekeeping.StoreOperator(task_id="store").execute(context())
    assert "share" in said.value.hint


def test_under_the_local_profile_there_are_no_pods(house: House) -> None:
    with pytest.raises(AirflowSkipException, match="no pods"):
        housekeeping.PodsOperator(task_id="pods").execute(context())


# -- which pods ----------------------------------------------------------------------------------------


def config(house: House, run: str = "r", verb: str = "train", attempt: int = 1, clear: int = 0) -> StepConfig:
    name = safe_name(f"delays.train--{run}" + (f"--cleared-{clear}" if clear else ""))
    folder = f"delays/runs/{name}/{safe_name(f'{verb}-2013-01')}/{attempt}"
    return StepConfig(
        project="delays", verb=verb, key="2013-01", partitions=("2013-01",), store=house.uri, bundle="b", run=name,
        task=verb, attempt=attempt, folder=folder,
    )  # fmt: skip


def pod(of: StepConfig, **more: Any) -> dict[str, Any]:
    unit = names.unit(of)
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": unit, "namespace": "orrery", "labels": names.labels(of, unit), "annotations": names.notes(of),
            **more,
        },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "base", "image": "orrery/airflow:1", "command": ["orrery"]}],
        },
    }  # fmt: skip


class Stage:
    """A cluster whose containers run until they are told, a ledger, and what Airflow would say."""

    def __init__(self, house: House, folder: Path) -> None:
        self.house, self.over = house, set[str]()
        self.cluster = Cluster(folder, pace=0.01, play=self._play)

    async def _play(self, document: dict[str, Any], say: Any) -> int:
        while document["metadata"]["name"] not in self.over:
            await asyncio.sleep(0.01)
        return 0

    def start(self, *configs: StepConfig) -> None:
        """Have their pods run."""
        for one in configs:
            self.create(pod(one))
        for one in configs:
            name = names.unit(one)
            self.cluster.wait_for(lambda name=name: self.phase(name) == "Running", f"{name} running")

    def create(self, document: dict[str, Any]) -> None:
        """Create an object as the operator does."""
        data, path = json.dumps(document).encode(), gang.collection(document)
        asked = urllib.request.Request(self.cluster.url + path, data, {"Content-Type": "application/json"})
        urllib.request.urlopen(asked, timeout=30).close()

    def end(self, of: StepConfig) -> None:
        self.over.add(names.unit(of))
        self.cluster.wait_for_end(names.unit(of))

    def phase(self, name: str) -> str:
        found = self.cluster.pod(name)
        return str(found["status"].get("phase")) if found else "gone"

    def record(self, of: StepConfig) -> None:
        told = {"verb": of.verb, "key": of.key, "folder": of.folder, "status": "done"}
        Ledger(os.environ["ORRERY_LEDGER"]).record("delays", "run", of.folder, "done", "t", told)

    def there(self) -> set[str]:
        """Return the pods that are not on their way out."""
        return {p["metadata"]["name"] for p in self.cluster.pods() if not p["metadata"].get("deletionTimestamp")}

    def keep(self, states: Mapping[str, Any] | None = None, conf: dict[str, Any] | None = None) -> dict[str, Any]:
        return housekeeping.PodsOperator(task_id="pods").execute(context(states, conf, dag=housekeeping.ORPHANS))


@pytest.fixture
def stage(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setenv("ORRERY_PROFILE", "kubernetes")
    made = Stage(house, tmp_path / "cluster")
    with made.cluster:
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", made.cluster.connection())
        # The pods of a test are as old as it: the sweep looks from two hours ahead.
        monkeypatch.setattr("orrery.orchestration.housekeeping.time.time", lambda: time_() + 2 * HOUR)
        yield made


time_ = time.time


def test_what_nobody_will_ask_for_again_goes(stage: Stage) -> None:
    ended, live, gone, later = (config(stage.house, run) for run in ("ended", "live", "gone", "later"))
    stage.start(ended, live, gone, later)
    stage.record(ended)
    stage.end(ended)
    stage.record(later)  # lost, and on record; the attempt after it may be about to take its pod up
    states = {"delays.train": {"live": {"train": "deferred"}, "later": {"train": "up_for_retry"}}}
    told = stage.keep(states)
    assert stage.there() == {names.unit(live), names.unit(later)}
    assert told == {"units": 4, "others": 0, "orphans": 2, "removed": {"delays": 2}}
    (entry,) = Ledger(os.environ["ORRERY_LEDGER"]).find("delays", "housekeeping")
    assert entry.payload["removed"]["unit"]["units"] == 2
    stage.cluster.wait_for(lambda: len(stage.cluster.pods()) == 2, "the end of the two orphans")
    told = stage.keep({"delays.train": {"live": {"train": "failed"}, "later": {"train": "success"}}})
    stage.cluster.wait_for(lambda: not stage.there(), "the end of both")
    assert told["orphans"] == 2


def test_what_is_not_sure_stays(stage: Stage) -> None:
    cleared, mapped, unknown = (
        config(stage.house, "c", clear=2),
        config(stage.house, "m", "trial"),
        config(stage.house, "u"),
    )
    stage.start(cleared, mapped)
    states = {"delays.train": {"c": {"train": None}, "m": {"trial_0": "success", "trial_1": "running"}}}
    assert stage.keep(states)["orphans"] == 0, "a cleared task runs again; one trial of several runs"
    assert stage.keep(None)["orphans"] == 0, "Airflow did not answer"
    foreign = pod(unknown)
    foreign["metadata"]["labels"], foreign["metadata"]["annotations"] = {"app": "postgres"}, {}
    stage.create(foreign)
    nameless = pod(config(stage.house, "n"))
    nameless["metadata"]["annotations"] = {}
    stage.create(nameless)
    assert stage.keep({"delays.train": {}})["orphans"] == 2, "both of ours, whose runs are gone: no other's"
    assert stage.there() == {foreign["metadata"]["name"], nameless["metadata"]["name"]}


def test_a_young_pod_stays(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.start(config(stage.house, "young"))
    monkeypatch.setattr("orrery.orchestration.housekeeping.time.time", time_)
    assert stage.keep({"delays.train": {}})["orphans"] == 0


def test_a_dry_run_names_them_and_leaves_them(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    one = config(stage.house, "gone")
    stage.start(one)
    told = stage.keep({"delays.train": {}}, conf={"dry_run": True})
    assert (told["orphans"], told["removed"]) == (1, {}) and stage.there() == {names.unit(one)}
    assert f"would go: {names.unit(one)}: its run is not there any more" in caplog.text


def test_a_job_goes_with_all_that_it_owns(stage: Stage) -> None:
    one = config(stage.house, "gang")
    job, service = gang.IndexedJob().documents(pod(one), names.unit(one), 2, "orrery")
    stage.create(job)
    stage.cluster.wait_for(lambda: len(stage.there()) == 2, "two pods")
    assert service["kind"] == "Service"
    assert stage.keep({"delays.train": {"gang": {"train": "running"}}})["orphans"] == 0
    told = stage.keep({"delays.train": {"gang": {"train": "failed"}}})
    assert told == {"units": 1, "others": 0, "orphans": 1, "removed": {"delays": 1}}
    stage.cluster.wait_for(lambda: not stage.there(), "the pods' end")


def test_a_pod_made_anew_under_the_same_name_stays(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    one = config(stage.house, "again")
    stage.start(one)
    before = housekeeping.Cluster.remove

    def meanwhile(self: housekeeping.Cluster, unit: units.Unit) -> bool:
        thing = unit.things[0]
        unit.things[0] = units.Thing(thing.kind, thing.name, thing.address, "another-uid", thing.created, thing.owned)
        return before(self, unit)

    monkeypatch.setattr(housekeeping.Cluster, "remove", meanwhile)
    stage.keep({"delays.train": {}})
    assert stage.there() == {names.unit(one)}


@pytest.mark.parametrize(("code", "error"), [(403, UserError), (503, TryAgain)])
def test_a_cluster_that_says_no_is_told(stage: Stage, code: int, error: type[Exception]) -> None:
    stage.cluster.answer(code, "pods", times=10, message="no")
    with pytest.raises(error, match="cannot be listed"):
        stage.keep({})


def test_a_list_comes_in_pages(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "PAGE", 2)
    stage.start(*(config(stage.house, f"r{i}") for i in range(5)))
    assert stage.keep({"delays.train": {}}) == {"units": 5, "others": 0, "orphans": 5, "removed": {"delays": 5}}


def test_another_houses_pods_in_the_namespace_stay(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """Staging and prod may share one: the other's runs are none that our Airflow knows of."""
    caplog.set_level("INFO")
    mine = config(stage.house, "gone")
    theirs = [
        config(stage.house, "live").model_copy(update={"store": "s3://staging/orrery"}),
        config(stage.house, "gone", "validate").model_copy(update={"store": "s3://staging/orrery"}),
    ]
    stage.start(mine, *theirs)
    stage.record(theirs[1])  # alike in both ledgers, and its pod is over
    stage.end(theirs[1])
    told = stage.keep({"delays.train": {}})
    assert told == {"units": 1, "others": 2, "orphans": 1, "removed": {"delays": 1}}
    assert stage.there() == {names.unit(one) for one in theirs}
    assert "2 units are of no attempt in this store" in caplog.text


@pytest.mark.parametrize(
    ("connection", "by"), [("connection: nowhere", "connection 'nowhere'"), ("", "Airflow's own service account")]
)
def test_a_cluster_without_a_way_to_it_is_the_users_to_mend(
    house: House, monkeypatch: pytest.MonkeyPatch, connection: str, by: str
) -> None:
    monkeypatch.setenv("ORRERY_PROFILE", "kubernetes")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    (house.home / "include" / "platform.yaml").write_text(PLATFORM.replace("connection: cluster", connection))
    with pytest.raises(UserError, match=f"cannot be reached by {by}") as said:
        housekeeping.PodsOperator(task_id="pods").execute(context(dag=housekeeping.ORPHANS))
    assert "kubernetes.connection in platform.yaml" in said.value.hint
