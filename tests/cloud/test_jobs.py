"""A job's document, its name, and what is made of what SageMaker says of it: pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError
from sagemaker_house import IMAGE, ROLE

from orrery.cloud import jobs
from orrery.cloud.jobs import Job, Seen
from orrery.contract import VERBS, Result, StepConfig
from orrery.errors import SpecError, UserError
from orrery.plan import Plan
from orrery.platform import Compute, Platform, SageMaker

FOLDER = "flight_delay/runs/flight_delay.train--manual/train-2013-01..2013-03/2"
STORE = "s3://bucket/orrery"


def settings(**changed: Any) -> SageMaker:
    return SageMaker.model_validate({"role": ROLE, "instance_type": "ml.m5.large", **changed})


def compute(spot: bool = True, **changed: Any) -> Compute:
    return Compute(spot=spot, sagemaker=settings(**changed))


def platform(image: str = IMAGE) -> Platform:
    classes = {"cloud": compute()}
    return Platform.model_validate({"version": 1, "environments": {"ml": {"image": image}}, "compute": classes})


def plan(environment: dict[str, str] | None = None, store: str = STORE, folder: str = FOLDER, **params: Any) -> Plan:
    config = StepConfig(
        project="flight_delay", verb="train", key="2013-01..2013-03", partitions=("2013-01",), params=params, store=store,
        bundle="b", address="a" * 32, run="manual & odd", task="train", attempt=2, folder=folder,
    )  # fmt: skip
    return Plan(config, VERBS["train"], environment or {}, compute="cloud")


def document(of: Plan, where: Compute | None = None, image: str = IMAGE) -> Job:
    return jobs.document(of, platform(image), where or compute(), "x-1")


def test_the_argv_is_that_of_a_laptop_and_of_a_pod() -> None:
    folder = f"{STORE}/{FOLDER}"
    argv = ("orrery", "step", "--config", f"{folder}/config.json", "--result", f"{folder}/result.json")
    assert document(plan()).argv == argv


def test_spot_waits_twice_its_running_unless_told_and_on_demand_does_not_wait() -> None:
    assert (document(plan()).max_run_s, document(plan()).max_wait_s) == (86400, 2 * 86400)
    assert document(plan(), compute(max_run="1h", max_wait="90m")).max_wait_s == 5400
    on_demand = document(plan(), compute(spot=False, max_wait="48h"))
    assert (on_demand.spot, on_demand.max_wait_s) == (False, None)


def test_all_attempts_at_one_output_share_the_checkpoint_folder() -> None:
    shared = f"{STORE}/flight_delay/train/{'a' * 32}/opt-ml-checkpoints"
    assert document(plan()).checkpoints == shared
    assert document(plan(folder=FOLDER[:-1] + "3")).checkpoints == shared


def test_an_address_goes_along_but_not_one_of_this_machine() -> None:
    assert document(plan({"MLFLOW_TRACKING_URI": "http://mlflow.internal:5000"})).environment == {
        "ORRERY_LOG": "json", "MLFLOW_TRACKING_URI": "http://mlflow.internal:5000",
    }  # fmt: skip
    for here in ("http://127.0.0.1:5500", "http://localhost:5500", "http://[::1]:5500"):
        assert document(plan({"MLFLOW_TRACKING_URI": here})).environment == {"ORRERY_LOG": "json"}


@pytest.mark.parametrize(
    "environment",
    [
        {"MLFLOW_TRACKING_URI": "https://orrery:s3cret@mlflow"},
        {"MLFLOW_TRACKING_URI": "https://mlflow/?token=s3cret"},
        {"ORRERY_SOURCE_FLIGHTS": "s3cret"},
    ],
)
def test_no_secret_goes_along(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(environment))) as raised:
        document(plan(environment))
    assert "s3cret" not in str(raised.value)


def test_tags_hold_what_aws_allows() -> None:
    tags = document(plan()).tags
    assert tags == {
        "orrery:project": "flight_delay", "orrery:step": "train", "orrery:run": "manual _ odd", "orrery:attempt": "2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("of", "where", "image", "text"),
    [
        (plan(store="file:///var/store"), None, IMAGE, "cannot reach it"),
        (plan(), Compute(), IMAGE, "'cloud' is no SageMaker job"),
        (plan(), None, "orrery/ml:1", "compute.cloud.image"),
        (plan(folder=FOLDER.replace("manual", "m" * 200)), None, IMAGE, "more than the 256 characters"),
        (plan(storage="/srv/tuning"), None, IMAGE, "ORRERY_TUNING"),
        (plan({"MLFLOW_TRACKING_URI": "http://" + "m" * 600}), None, IMAGE, "longer than the 512"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(of: Plan, where: Compute | None, image: str, text: str) -> None:
    with pytest.raises((UserError, SpecError)) as raised:
        document(of, where, image)
    assert text in str(raised.value) and raised.value.hint + raised.value.message


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"role": "orrery"}, "role"),
        ({"instance_type": "m5.large"}, "instance_type"),
        ({"instance_count": 2}, "instance_count"),
        ({"max_run": "2h", "max_wait": "1h"}, "`max_wait` 1h is below `max_run` 2h"),
        ({"subnets": ("s",)}, "come together"),
        ({"region": "here"}, "region"),
    ],
)
def test_the_class_is_checked_when_it_is_read(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        settings(**changed)


# -- names ------------------------------------------------------------------------------------------


def test_a_name_follows_from_the_attempt_and_tells_it_back() -> None:
    name = jobs.name(STORE, FOLDER)
    slot = jobs.slot(STORE, FOLDER)
    assert name == f"flight-delay-{slot}-2" and jobs.name(STORE, FOLDER) == name
    assert jobs.attempt_of(name, slot) == "2" == jobs.attempt_of(jobs.name(STORE, FOLDER, 3), slot)
    assert jobs.attempt_of(name, "0" * 12) is None


def test_names_are_apart_by_store_run_and_task_and_fit() -> None:
    other = FOLDER.replace("manual", "manual2")
    assert len({jobs.slot(STORE, FOLDER), jobs.slot("s3://b", FOLDER), jobs.slot(STORE, other)}) == 3
    long = jobs.name(STORE, FOLDER.replace("flight_delay", "a_" * 31, 1).replace("/2", "/9999"), 999)
    assert len(long) <= 63
    assert document(plan()).model_copy(update={"name": long}).model_dump()["name"] == long
    Job.model_validate({**document(plan()).model_dump(), "name": long})


# -- what a description says --------------------------------------------------------------------------


def described(*states: tuple[str, float], **more: Any) -> Seen:
    """Return a job whose secondary states began at these seconds."""
    times = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=s) for _, s in states]
    told = [
        {"Status": status, "StartTime": began, **({"EndTime": end} if end else {})}
        for (status, _), began, end in zip(states, times, [*times, None][1:], strict=True)
    ]
    return jobs.seen({"TrainingJobStatus": "InProgress", "SecondaryStatusTransitions": told, **more})


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([("Starting", 0), ("Training", 60), ("Completed", 90)], (0, 0.0)),
        ([("Training", 0), ("Interrupted", 10), ("Starting", 20), ("Training", 70)], (1, 60.0)),
        ([("Training", 0), ("Interrupted", 10), ("Starting", 20), ("Interrupted", 40), ("Training", 100)], (2, 90.0)),
        ([("Training", 0), ("Interrupted", 10), ("Training", 30), ("Interrupted", 50), ("Stopped", 80)], (2, 50.0)),
        ([("Training", 0), ("Interrupted", 10), ("Starting", 25)], (1, 15.0)),
        ([("Training", 0), ("Interrupted", 10)], (1, 0.0)),
        ([], (0, 0.0)),
    ],
)
def test_interruptions_last_until_the_training_runs_again(states: list[Any], expected: tuple[int, float]) -> None:
    found = described(*states)
    assert (found.interruptions, found.interrupted_s) == expected


def test_what_is_saved_is_the_share_of_the_running_that_is_not_paid_for() -> None:
    def saved(**more: Any) -> Any:
        return jobs.told("j", described(**more), compute(), FOLDER)["saved"]

    assert saved(BillableTimeInSeconds=300, TrainingTimeInSeconds=1000) == 0.7
    assert saved(BillableTimeInSeconds=0, TrainingTimeInSeconds=1000) == 1.0
    assert saved() is None and saved(BillableTimeInSeconds=0, TrainingTimeInSeconds=0) is None


def test_a_result_of_an_earlier_spot_machine_is_not_taken_for_the_last_ones() -> None:
    stopped, done = Result(status="interrupted"), Result()
    killed = Seen(status="Failed", reason="AlgorithmError: ExecuteUserScriptError: , exit code: 137")
    assert jobs.is_left_over(stopped, killed) and not jobs.is_left_over(done, killed)
    assert not jobs.is_left_over(stopped, Seen(status="Failed", reason="AlgorithmError: , exit code: 143"))
    assert not jobs.is_left_over(stopped, Seen(status="Stopped"))


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        (Seen(status="Stopped", secondary="MaxRuntimeExceeded"), "interrupted"),
        (Seen(status="Stopped", secondary="Stopped"), "interrupted"),
        (Seen(status="Failed", reason="InternalServerError: try again"), "try_again"),
        (Seen(status="Failed", reason="CapacityError: none"), "try_again"),
        (Seen(status="Failed", reason="ClientError: no such image"), "user"),
        (Seen(status="Failed", reason="AlgorithmError: exit code: 1"), "bug"),
        (Seen(status="Failed"), "bug"),
        (Seen(status="Missing"), "bug"),
        (Seen(status="Completed"), "bug"),
    ],
)
def test_an_end_without_a_result_has_a_status_and_a_hint(seen: Seen, status: str) -> None:
    found = jobs.without_result("job-1", seen, compute())
    assert found.status == status and found.error is not None
    assert "job-1" in found.error.message and found.error.hint
