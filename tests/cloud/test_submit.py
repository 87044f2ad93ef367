"""The process that starts a job, over HTTP against moto, which checks the request's shape and trains nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sagemaker_house import IMAGE, ROLE, Player

from orrery.cloud import client
from orrery.cloud.jobs import Job
from orrery.cloud.submit import submit
from orrery.errors import TryAgain, UserError

# The SDK's own: it imports what it calls deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
JOB = Job(
    name="delays-0123456789ab-1",
    role=ROLE,
    image=IMAGE,
    argv=("orrery", "step", "--config", "s3://b/c.json", "--result", "s3://b/r.json"),
    instance_type="ml.m5.large",
    spot=True,
    max_run_s=3600,
    max_wait_s=7200,
    output="s3://b/out",
    checkpoints="s3://b/opt-ml-checkpoints",
    environment={"ORRERY_LOG": "json"},
    tags={"orrery:project": "delays"},
)


def start(job: Job | str) -> tuple[int, dict[str, Any]]:
    """Run the process; return exit code and what it told."""
    text = job if isinstance(job, str) else job.model_dump_json()
    argv = [sys.executable, "-m", "orrery.cloud.submit"]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=120, check=False)
    assert len(done.stdout.splitlines()) == 1, done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_spot_job_is_what_the_document_says(sagemaker: Player) -> None:
    assert start(JOB) == (0, {"job": JOB.name, "new": True})
    asked = sagemaker.jobs[JOB.name].asked
    assert asked["EnableManagedSpotTraining"] is True
    assert asked["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 7200}
    assert asked["CheckpointConfig"]["S3Uri"] == "s3://b/opt-ml-checkpoints"
    assert asked["RoleArn"] == ROLE
    algorithm = asked["AlgorithmSpecification"]
    assert algorithm["TrainingImage"] == IMAGE
    assert algorithm["ContainerEntrypoint"] == ["orrery"]
    assert algorithm["ContainerArguments"] == list(JOB.argv[1:])
    resources = asked["ResourceConfig"]
    assert (resources["InstanceType"], resources["InstanceCount"]) == ("ml.m5.large", 1)
    assert asked["OutputDataConfig"]["S3OutputPath"] == "s3://b/out"
    # Nothing but what the document holds: no code is uploaded, no hyperparameters, no channels.
    assert asked["Environment"] == {"ORRERY_LOG": "json"}
    assert asked["Tags"] == [{"Key": "orrery:project", "Value": "delays"}]
    assert not asked.get("HyperParameters") and not asked.get("InputDataConfig")


def test_on_demand_and_inside_a_vpc(sagemaker: Player) -> None:
    job = JOB.model_copy(
        update={"spot": False, "max_wait_s": None, "subnets": ("subnet-1",), "security_groups": ("sg-1",)}
    )
    assert submit(job)
    asked = sagemaker.jobs[job.name].asked
    assert asked["EnableManagedSpotTraining"] is False
    assert asked["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600}
    assert asked["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}


def test_the_same_name_starts_one_job(sagemaker: Player) -> None:
    assert submit(JOB)
    assert start(JOB) == (0, {"job": JOB.name, "new": False})
    assert len(sagemaker.jobs) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("ResourceLimitExceeded", TryAgain),
        ("ThrottlingException", TryAgain),
        ("AccessDeniedException", UserError),
        ("ValidationException", UserError),
    ],
)
def test_a_refusal_keeps_its_kind(
    sagemaker: Player, code: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    sagemaker.refuse = (code, "because of a test")
    with pytest.raises(kind, match=f"{JOB.name}: {code}: because of a test"):
        submit(JOB)


def test_an_answer_that_nobody_can_read_is_worth_another_try() -> None:
    from botocore.parsers import ResponseParserError

    with pytest.raises(TryAgain, match="it cannot be asked: ResponseParserError"), client.trouble("it cannot be asked"):
        raise ResponseParserError("<html>502 Bad Gateway</html>")


def test_what_is_no_job_is_a_bug_and_says_so(sagemaker: Player) -> None:
    code, told = start('{"name": "x"}')
    assert (code, list(told)) == (1, ["error"])


def test_nobody_there_is_worth_another_try(sagemaker: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert start(JOB)[0] == 75  # the process's exit code is the error's
    with pytest.raises(TryAgain, match=JOB.name):
        client.describe(JOB.name)


def test_jobs_are_described_listed_and_stopped(sagemaker: Player) -> None:
    submit(JOB)
    assert client.describe(JOB.name).status == "InProgress"
    assert client.describe("delays-0123456789ab-2").status == "Missing"
    assert client.running("0123456789ab") == {JOB.name: "InProgress"}
    assert client.running("ba9876543210") == {}
    assert client.stop(JOB.name)
    assert client.describe(JOB.name).status == "Stopping"
    sagemaker.end(JOB.name, "Stopped")
    assert not client.stop(JOB.name)


def test_without_a_region_it_says_what_to_set(
    sagemaker: Player, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="region"):
        client.describe(JOB.name)
    assert client.describe(JOB.name, "eu-west-1").status == "Missing"
    assert "AWS_REGION" not in os.environ
