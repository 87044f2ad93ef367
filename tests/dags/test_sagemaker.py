"""A training as a SageMaker job, from the task to the ledger, over HTTP against moto and a player of jobs.

The container is played as well: the job's own entry point and arguments are run on this machine with the variables
that the job was given, and no others but AWS's. What that leaves out: tests/sagemaker_house.py says it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

import core_verbs
from airflow.sdk.exceptions import TaskDeferred
from core_house import DRIVE, House, build, environment
from sagemaker_house import IMAGE, ROLE, SPEC, Player, sagemaker

from orrery.contract import VERBS
from orrery.errors import Interrupted, SpecError, TryAgain, UserError
from orrery.ledger import Ledger
from orrery.orchestration.job_trigger import JobTrigger
from orrery.orchestration.sagemaker import SageMakerStepOperator
from orrery.runner import StepVanished

__all__ = ["sagemaker"]
PLATFORM = f"""\
version: 1
environments:
  airflow: {{image: "{IMAGE}"}}
compute:
  cpu-light: {{cpu: "1"}}
  cpu-small: {{cpu: "1"}}
  cloud:
    spot: true
    price_per_hour: 0.5
    sagemaker: {{role: "{ROLE}", instance_type: ml.g5.xlarge, max_run: 2h, max_wait: 6h, poll: 1s}}
"""
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Task:
    """The task as Airflow carries it: `attempt()` is a worker, `wait()` the triggerer."""

    def __init__(self, house: House, player: Player) -> None:
        self.house, self.player, self.number = house, player, 0
        self.xcom: dict[str, Any] = {}
        self.operator: Any = None
        self.cleared = 0
        self.carried: dict[str, Any] = {}

    def context(self) -> Any:
        ti = SimpleNamespace(
            task_id="train", try_number=self.number, start_date=datetime.now(UTC), map_index=-1,
            xcom_push=lambda key, value: self.xcom.__setitem__(key, value), xcom_pull=lambda **_: None,
        )  # fmt: skip
        run = SimpleNamespace(
            dag_id="delays.train", run_id="r", run_type="manual", clear_number=self.cleared, conf={}, partition_key=None,
            triggering_user_name="eve",
        )  # fmt: skip
        return {"ti": ti, "dag_run": run, "params": {"window": "2013-01..2013-01"}, "task_state_store": {}}

    def attempt(self) -> JobTrigger:
        """Start the next attempt; return what waits for it."""
        self.number += 1
        self.operator = SageMakerStepOperator(task_id="train", project="delays", verb="train", compute="cloud")
        with pytest.raises(TaskDeferred) as deferred:
            self.operator.execute(self.context())
        assert (deferred.value.method_name, deferred.value.timeout) == ("job_ended", None)
        self.carried = dict(deferred.value.kwargs)
        path, kwargs = deferred.value.trigger.serialize()
        assert path == "orrery.orchestration.job_trigger.JobTrigger"
        return JobTrigger(**json.loads(json.dumps(kwargs)))

    def wait(self, trigger: JobTrigger) -> dict[str, Any]:
        async def first() -> Any:
            return await asyncio.wait_for(anext(trigger.run()), 30)

        return dict(json.loads(json.dumps(asyncio.run(first()).payload)))

    def go_on(self, event: dict[str, Any]) -> dict[str, Any]:
        """Another worker goes on after the wait."""
        operator = SageMakerStepOperator(task_id="train", project="delays", verb="train", compute="cloud")
        return dict(operator.job_ended(self.context(), event, **self.carried))

    def container(self, name: str) -> subprocess.Popen[str]:
        """Start what a job's container runs, on what it is given."""
        asked = self.player.jobs[name].asked
        algorithm = asked["AlgorithmSpecification"]
        argv = [*algorithm["ContainerEntrypoint"], *algorithm["ContainerArguments"]]
        aws = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        env = {"PATH": os.environ["PATH"], **aws, **asked["Environment"]}
        return subprocess.Popen([sys.executable, str(DRIVE), *argv], env=env, text=True)

    def train(self, name: str) -> None:
        """Let a job's container do its work to the end."""
        process = self.container(name)
        core_verbs.wait_for(self.house.marks / "started")
        time.sleep(0.2)  # some steps
        (self.house.marks / "go").touch()
        assert process.wait(120) == 0

    def entries(self) -> list[dict[str, Any]]:
        """Return the attempts on record."""
        found = Ledger(os.environ["ORRERY_LEDGER"]).find("delays", "run")
        return [e.payload for e in found if e.payload["verb"] == "train"]


@pytest.fixture(autouse=True)
def _verbs() -> Iterator[None]:
    before = dict(VERBS)
    core_verbs.register()
    yield
    VERBS.clear()
    VERBS.update(before)


@pytest.fixture
def task(tmp_path: Path, s3_bucket: str, sagemaker: Player, monkeypatch: pytest.MonkeyPatch) -> Task:
    home = tmp_path / "home"
    house = build(home, SPEC.format(marks=home / "marks"))
    house = House(house.home, f"{s3_bucket}/store")
    (home / "include" / "platform.yaml").write_text(PLATFORM)
    (home / "venvs" / "cloud").symlink_to(Path(sys.prefix).parent / "cloud")
    for name in ("ORRERY_PROFILE", "ORRERY_STAGE", "ORRERY_MLFLOW"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(house).items():
        monkeypatch.setenv(name, value)
    clean = house.commit("validate", "clean", "2013-01")
    house.commit("materialize", "features", "2013-01", inputs={"clean": (clean.ref,)})
    return Task(house, sagemaker)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start jobs by one plain call, where the process with SageMaker's SDK (4 s) is not what a test is about."""
    import botocore.session

    from orrery.orchestration import sagemaker as ours

    def create(job: Any) -> bool:
        client = botocore.session.get_session().create_client("sagemaker")
        client.create_training_job(
            TrainingJobName=job.name, RoleArn=job.role, OutputDataConfig={"S3OutputPath": job.output},
            AlgorithmSpecification={
                "TrainingImage": job.image, "TrainingInputMode": "File", "ContainerEntrypoint": [job.argv[0]],
                "ContainerArguments": list(job.argv[1:]),
            },
            ResourceConfig={"InstanceType": job.instance_type, "InstanceCount": 1, "VolumeSizeInGB": 1},
            StoppingCondition={"MaxRuntimeInSeconds": job.max_run_s}, Environment=job.environment,
        )  # fmt: skip
        client.close()
        return True

    monkeypatch.setattr(ours, "submit", create)


def transitions(*states: tuple[str, int]) -> list[dict[str, Any]]:
    """Return secondary states with the second at which each began; each ends where the next begins."""
    times = [(NOW + timedelta(seconds=s)).timestamp() for _, s in states]
    ends = [*times[1:], times[-1] + 5]
    return [
        {"Status": status, "StartTime": began, "EndTime": end, "StatusMessage": ""}
        for (status, _), began, end in zip(states, times, ends, strict=True)
    ]


def test_a_training_is_a_spot_job_and_its_money_is_in_the_ledger(task: Task, sagemaker: Player) -> None:
    trigger = task.attempt()
    name = sagemaker.only()
    assert trigger.job == name
    assert task.xcom["link_sagemaker_job"].endswith(f"region=us-east-1#/jobs/{name}")
    asked = sagemaker.jobs[name].asked
    assert asked["EnableManagedSpotTraining"] and asked["StoppingCondition"]["MaxWaitTimeInSeconds"] == 6 * 3600
    assert asked["Environment"] == {"ORRERY_LOG": "json"}
    task.train(name)
    task.cleared = 1  # another task of the run: Airflow counts a clear for the whole run
    sagemaker.end(
        name, BillableTimeInSeconds=900, TrainingTimeInSeconds=3600,
        SecondaryStatusTransitions=transitions(
            ("Starting", 0), ("Training", 60), ("Interrupted", 600), ("Starting", 660), ("Training", 900), ("Completed", 4000)
        ),
    )  # fmt: skip
    summary = task.go_on(task.wait(trigger))
    assert summary["output"] == task.house.manifests("train")[0].path
    (entry,) = task.entries()
    told = entry["attempt"]["sagemaker"]
    assert told == {
        "job": name, "status": "Completed", "secondary": "Completed", "instance_type": "ml.g5.xlarge",
        "instance_count": 1, "billable_s": 900, "training_s": 3600, "saved": 0.75, "interruptions": 1,
        "interrupted_s": 300.0, "ran": "delays/runs/delays.train--r/train-2013-01..2013-01/1",
    }  # fmt: skip
    assert (entry["status"], entry["attempt"]["cause"], entry["attempt"]["compute"]) == ("done", None, "cloud")
    assert entry["attempt"]["progress"] is not None


def test_a_worker_that_is_lost_after_the_start_leaves_a_job_that_is_taken_up(task: Task, sagemaker: Player) -> None:
    task.attempt()  # and nobody ever hears of the wait: the worker was killed before it had begun
    name = sagemaker.only()
    trigger = task.attempt()
    assert sagemaker.only() == name == trigger.job and sagemaker.jobs[name].stopped == 0
    task.train(name)
    sagemaker.end(name)
    task.go_on(task.wait(trigger))
    lost, taken = task.entries()
    assert (lost["attempt"]["cause"], taken["attempt"]["cause"]) == ("lost", None)
    assert taken["attempt"]["sagemaker"]["ran"] == lost["folder"] != taken["folder"]


def test_a_lost_job_at_other_work_is_stopped(task: Task, sagemaker: Player, quick: None) -> None:
    task.attempt()
    old = sagemaker.only()
    (task.house.folder / "features.py").write_text("ANSWER = 43\n")
    trigger = task.attempt()
    assert trigger.job != old and len(sagemaker.jobs) == 2
    assert sagemaker.jobs[old].stopped == 1 and sagemaker.jobs[trigger.job].status == "InProgress"


def test_a_run_that_was_made_anew_is_not_given_the_end_of_its_namesake(
    task: Task, sagemaker: Player, quick: None
) -> None:
    task.attempt()
    sagemaker.end(sagemaker.only(), "Failed", FailureReason="AlgorithmError: exit code: 1")
    task.number = 0
    trigger = task.attempt()
    assert trigger.job.endswith("-1-2") and len(sagemaker.jobs) == 2


def test_who_ends_the_task_ends_the_job(task: Task, sagemaker: Player, quick: None) -> None:
    trigger = task.attempt()
    name = sagemaker.only()
    asyncio.run(trigger.on_kill())
    assert (sagemaker.jobs[name].stopped, sagemaker.jobs[name].status) == (1, "Stopping")
    asyncio.run(trigger.on_kill())  # once more does no harm
    sagemaker.jobs[name].status = "InProgress"
    task.operator.on_kill()  # in the worker, between start and wait
    assert sagemaker.jobs[name].stopped >= 2


def test_a_job_that_is_stopped_saves_and_the_next_goes_on(task: Task, sagemaker: Player, quick: None) -> None:
    trigger = task.attempt()
    name = sagemaker.only()
    process = task.container(name)
    core_verbs.wait_for(task.house.marks / "started")
    process.terminate()
    assert process.wait(60) == 143
    sagemaker.end(name, "Stopped", "MaxWaitTimeExceeded", BillableTimeInSeconds=10, TrainingTimeInSeconds=10)
    with pytest.raises(Interrupted):
        task.go_on(task.wait(trigger))
    (entry,) = task.entries()
    assert entry["attempt"]["cause"] == "interrupted" and entry["attempt"]["committed"] > 0
    (task.house.marks / "started").unlink()
    trigger = task.attempt()
    task.train(trigger.job)
    assert int((task.house.marks / "started").read_text()) == entry["attempt"]["committed"]


def test_the_next_attempt_waits_for_a_job_that_is_saving(
    task: Task, sagemaker: Player, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orrery.orchestration import sagemaker as ours

    monkeypatch.setattr(ours, "LOOK_S", 0.05)
    first = task.attempt()
    asyncio.run(first.on_kill())
    ending = threading.Timer(3.0, sagemaker.end, (first.job, "Stopped"))
    ending.start()
    second = task.attempt()
    assert sagemaker.jobs[first.job].status == "Stopped" and second.job != first.job
    ending.join()


def test_a_job_that_loses_its_spot_machine_goes_on_in_the_same_attempt(
    task: Task, sagemaker: Player, quick: None
) -> None:
    trigger = task.attempt()
    process = task.container(trigger.job)
    core_verbs.wait_for(task.house.marks / "started")
    process.terminate()
    assert process.wait(60) == 143
    # SageMaker starts the same container on another machine: nobody here hears of it before the end.
    (task.house.marks / "started").unlink()
    task.train(trigger.job)
    assert int((task.house.marks / "started").read_text()) > 0
    sagemaker.end(trigger.job)
    assert task.go_on(task.wait(trigger))["output"]
    (entry,) = task.entries()
    assert (entry["status"], entry["attempt"]["cause"]) == ("done", None)
    assert entry["attempt"]["progress"]["resumed"] > 0


@pytest.mark.parametrize(
    ("status", "secondary", "reason", "kind", "text"),
    [
        ("Failed", "Failed", "CapacityError: no ml.g5.xlarge", TryAgain, "CapacityError"),
        ("Failed", "Failed", "ClientError: cannot pull the image", UserError, "cannot pull"),
        ("Failed", "Failed", "AlgorithmError: , exit code: 137", StepVanished, "exit code: 137"),
        ("Stopped", "MaxWaitTimeExceeded", "", Interrupted, "max_wait of the compute class is 6h"),
        ("Completed", "Completed", "", StepVanished, "may its role write the store"),
    ],
)
def test_a_job_without_a_result_is_judged_by_how_it_ended(
    task: Task,
    sagemaker: Player,
    quick: None,
    status: str,
    secondary: str,
    reason: str,
    kind: type[Exception],
    text: str,
) -> None:
    trigger = task.attempt()
    sagemaker.end(trigger.job, status, secondary, **({"FailureReason": reason} if reason else {}))
    with pytest.raises(kind, match=trigger.job) as raised:
        task.go_on(task.wait(trigger))
    assert text in str(raised.value)
    assert len(task.entries()) == 1


def test_what_sagemaker_refuses_is_told_and_on_record(task: Task, sagemaker: Player) -> None:
    sagemaker.refuse = ("AccessDeniedException", "no iam:PassRole")
    task.number = 1
    operator = SageMakerStepOperator(task_id="train", project="delays", verb="train", compute="cloud")
    with pytest.raises(UserError, match="no iam:PassRole"):
        operator.execute(task.context())
    assert task.entries()[0]["status"] == "user"


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("ORRERY_MLFLOW", "https://orrery:s3cret@mlflow.example.org", "MLFLOW_TRACKING_URI holds a password"),
        ("ORRERY_STORE", "file:///tmp/store", "a SageMaker job cannot reach it"),
    ],
)
def test_what_a_job_may_not_be_given_is_refused_before_anything_is_asked(
    task: Task, sagemaker: Player, variable: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task.number = 1
    if variable == "ORRERY_STORE":
        value = f"file://{tmp_path}/other"
        house = House(task.house.home, value)
        clean = house.commit("validate", "clean", "2013-01")
        house.commit("materialize", "features", "2013-01", inputs={"clean": (clean.ref,)})
    monkeypatch.setenv(variable, value)
    operator = SageMakerStepOperator(task_id="train", project="delays", verb="train", compute="cloud")
    with pytest.raises(UserError, match=text) as raised:
        operator.execute(task.context())
    assert "s3cret" not in str(raised.value)
    assert sagemaker.calls == []


def test_a_fallback_that_could_not_be_taken_is_told_at_once(task: Task, sagemaker: Player) -> None:
    spec = task.house.folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("compute: cloud,", "compute: cloud, spot: {fallback: cpu-small},"))
    task.number = 1
    operator = SageMakerStepOperator(task_id="train", project="delays", verb="train", compute="cloud")
    with pytest.raises(SpecError, match="fallback is 'cpu-small'"):
        operator.execute(task.context())
    assert sagemaker.calls == []


def test_the_wait_outlasts_a_sagemaker_that_does_not_answer(
    task: Task, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = task.attempt()
    task.player.end(waiting.job)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", "http://127.0.0.1:9")
    again = JobTrigger(job=waiting.job, folder=waiting.folder, region=None, poll=0.05)

    async def down_then_up() -> Any:
        first = asyncio.ensure_future(anext(again.run()))
        await asyncio.sleep(0.5)
        assert not first.done()
        os.environ["AWS_ENDPOINT_URL_SAGEMAKER"] = task.player.url
        return await asyncio.wait_for(first, 30)

    assert asyncio.run(down_then_up()).payload["seen"]["status"] == "Completed"


def test_other_steps_do_not_run_there() -> None:
    with pytest.raises(SpecError, match="SageMaker runs train and trial"):
        SageMakerStepOperator(task_id="gate", project="delays", verb="gate", compute="cloud")


def test_the_dag_takes_the_operator_by_the_class(task: Task) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    from orrery.orchestration import lifecycle

    dag = lifecycle("delays", "")["train"]
    kinds = {t.task_id: type(t).__name__ for t in dag.tasks}
    assert kinds["train"] == "SageMakerStepOperator" and kinds["evaluate"] == "StepOperator"
    read = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    assert "SageMaker job" in [link.name for link in read.task_dict["train"].operator_extra_links]
