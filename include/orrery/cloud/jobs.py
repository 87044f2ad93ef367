"""A step as a SageMaker training job: its document, its name, and what a description of it says. Pure and light."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from orrery.contract import Result, Status, StepError
from orrery.errors import SpecError, UserError
from orrery.plan import Plan
from orrery.platform import Compute, Platform
from orrery.spec import seconds
from orrery.uri import has_secret

# What CreateTrainingJob takes: characters of one container argument, of a variable's value, of a tag's value.
LONGEST_ARGUMENT = 256
LONGEST_VARIABLE = 512
LONGEST_TAG = 256
ENDED = frozenset({"Completed", "Failed", "Stopped", "Missing"})
RUNNING = frozenset({"InProgress", "Stopping"})
# A registry of the account's own; SageMaker pulls from no other by its role alone.
ECR = re.compile(r"^[0-9]{12}\.dkr\.ecr\.[a-z0-9-]+\.amazonaws\.com(\.cn)?/")
# SageMaker begins a failure's reason with its kind. What it is about, and whether waiting helps:
KINDS: dict[str, tuple[Status, str]] = {
    "CapacityError": ("try_again", "no such machine was free; another instance_type or region may have one"),
    "InternalServerError": ("try_again", "a failure on SageMaker's side"),
    "ClientError": ("user", "often the role: it must pull the image, and read and write the store"),
}


class Job(BaseModel):
    """All that a training job is made of: what `submit` reads. No secret: whoever may describe the job, reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$")
    region: str | None = None
    role: str
    image: str
    argv: tuple[str, ...] = Field(min_length=1)
    instance_type: str
    instance_count: int = 1
    volume_gb: int = 30
    spot: bool = False
    max_run_s: int
    max_wait_s: int | None = None
    output: str = Field(description="Where SageMaker puts archives of its own; we read none of them.")
    checkpoints: str = Field(description="What /opt/ml/checkpoints is kept as, while spot machines come and go.")
    environment: dict[str, str] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()


class Seen(BaseModel):
    """A job as it was described last. Seconds are of one machine."""

    model_config = ConfigDict(extra="forbid")
    status: Literal["InProgress", "Completed", "Failed", "Stopping", "Stopped", "Missing"]
    secondary: str = ""
    reason: str = ""
    billable_s: int | None = None
    training_s: int | None = None
    interruptions: int = 0
    interrupted_s: float = Field(0.0, description="From each interruption until the training ran again, or was over.")

    @property
    def exit_code(self) -> int | None:
        """The container's exit code, where SageMaker tells it."""
        found = re.search(r"exit code:? (\d{1,3})\b", self.reason, flags=re.IGNORECASE)
        return int(found[1]) if found else {"Completed": 0, "Stopped": 143}.get(self.status)


def slot(store: str, folder: str) -> str:
    """Return what the names of all jobs of one run's task have in common, and no other's; `folder`: an attempt's."""
    return hashlib.sha256(f"{store}/{folder.rpartition('/')[0]}".encode()).hexdigest()[:12]


def name(store: str, folder: str, again: int = 1) -> str:
    """Return the name of an attempt's job: the same for the same attempt, so that it cannot be started twice.

    SageMaker never gives a name free. `again` tells apart the jobs of a run that was deleted and made anew.
    """
    project, attempt = folder.split("/", maxsplit=1)[0], folder.rpartition("/")[2]
    plain = re.sub(r"[^a-zA-Z0-9]+", "-", project).strip("-")[:30].strip("-")
    return f"{plain}-{slot(store, folder)}-{attempt}" + (f"-{again}" if again > 1 else "")


def attempt_of(job: str, slot_: str) -> str | None:
    """Return which attempt of the slot a job was started for."""
    found = re.search(rf"-{slot_}-(\d+)(-\d+)?$", job)
    return found[1] if found else None


def document(plan: Plan, where: Platform, compute: Compute, job: str) -> Job:
    """Return the job of a planned step. Raises `UserError` for what SageMaker cannot run."""
    settings, config = compute.sagemaker, plan.config
    if settings is None:
        raise SpecError(
            f"compute class {plan.compute!r} is no SageMaker job, as the class of the task is",
            hint="`fallback` of a SageMaker class is another SageMaker class, without `spot`",
        )
    if not config.store.startswith("s3://"):
        raise UserError(
            f"the store is {config.store}: a SageMaker job cannot reach it", hint="ORRERY_STORE=s3://bucket/prefix"
        )
    if str(config.params.get("storage", "")).startswith("/"):
        raise UserError(
            "the search's study is a file of this machine: a SageMaker job cannot reach it",
            hint="ORRERY_TUNING=postgresql://…, or another class at spec.tune.compute",
        )
    max_run = seconds(settings.max_run)
    return Job(
        name=job,
        region=settings.region,
        role=settings.role,
        image=_image(plan, where, compute),
        argv=_argv(plan),
        instance_type=settings.instance_type,
        instance_count=settings.instance_count,
        volume_gb=settings.volume_gb,
        spot=compute.spot,
        max_run_s=max_run,
        max_wait_s=(seconds(settings.max_wait) if settings.max_wait else 2 * max_run) if compute.spot else None,
        output=f"{config.store}/{config.folder}/sagemaker",
        checkpoints=f"{config.store}/{checkpoints(plan)}",
        environment=environment(plan),
        tags=_tags(plan),
        subnets=settings.subnets,
        security_groups=settings.security_groups,
    )


def checkpoints(plan: Plan) -> str:
    """Return the store path of /opt/ml/checkpoints: one for all attempts at the same output."""
    return f"{plan.config.project}/{plan.config.verb}/{plan.config.address or plan.config.folder}/opt-ml-checkpoints"


def environment(plan: Plan) -> dict[str, str]:
    """Return a job's variables. Raises `UserError` for a secret: the job's description shows them to its readers.

    An address of this machine is left out, since it is another one there.
    """
    found = {"ORRERY_LOG": "json"}
    for variable, value in plan.environment.items():
        if variable.startswith("ORRERY_SOURCE_") or has_secret(value):
            raise UserError(
                f"{variable} holds a password, and a job's environment is read by whoever may describe the job",
                hint="give an address without one: a job proves who it is by its role and its network",
            )
        if len(value) > LONGEST_VARIABLE:
            raise UserError(f"{variable} is longer than the {LONGEST_VARIABLE} characters that a job takes")
        if not _is_here(value):
            found[variable] = value
    return found


def _is_here(address: str) -> bool:
    host = urlsplit(address).hostname or "" if "://" in address else ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _image(plan: Plan, where: Platform, compute: Compute) -> str:
    image = compute.image or where.environments[plan.verb.environment].image
    if not ECR.match(image):
        raise SpecError(
            f"SageMaker cannot pull image {image!r}: it is not in Amazon ECR",
            hint=f"push it, then name it in platform.yaml: compute.{plan.compute}.image "
            "(123456789012.dkr.ecr.REGION.amazonaws.com/orrery/ml:TAG)",
        )
    return image


def _argv(plan: Plan) -> tuple[str, ...]:
    """Return the container's entry point and arguments, those of a laptop and of a pod."""
    folder = f"{plan.config.store}/{plan.config.folder}"
    argv = ("orrery", "step", "--config", f"{folder}/config.json", "--result", f"{folder}/result.json")
    if len(max(argv, key=len)) > LONGEST_ARGUMENT:
        raise UserError(
            f"{folder}/config.json has more than the {LONGEST_ARGUMENT} characters that a job's argument may have",
            hint="a store with a shorter prefix, or a run with a shorter name",
        )
    return argv


def _tags(plan: Plan) -> dict[str, str]:
    config = plan.config
    values = {"project": config.project, "step": config.verb, "run": config.run, "attempt": str(config.attempt)}
    return {f"orrery:{k}": re.sub(r"[^\w .:/=+@-]", "_", v)[:LONGEST_TAG] for k, v in values.items()}


def seen(description: Mapping[str, Any]) -> Seen:
    """Return what DescribeTrainingJob's answer says."""
    count, lost = _interrupted(description.get("SecondaryStatusTransitions") or [])
    return Seen(
        status=description["TrainingJobStatus"],
        secondary=description.get("SecondaryStatus", ""),
        reason=description.get("FailureReason", "")[:1000],
        billable_s=description.get("BillableTimeInSeconds"),
        training_s=description.get("TrainingTimeInSeconds"),
        interruptions=count,
        interrupted_s=lost,
    )


def _interrupted(transitions: list[Mapping[str, Any]]) -> tuple[int, float]:
    """Return how often spot machines were taken away, and for how many seconds in all no training ran for it."""
    since, count, lost = None, 0, 0.0
    for each in sorted(transitions, key=lambda t: t["StartTime"]):
        if each["Status"] == "Interrupted":
            count += 1
            since = since or each["StartTime"]
        elif since is not None and each["Status"] in ("Training", "Completed", "Failed", "Stopped"):
            lost, since = lost + (each["StartTime"] - since).total_seconds(), None
    if since is not None:
        ends = [t["EndTime"] for t in transitions if t.get("EndTime")]
        lost += max((max(ends) - since).total_seconds(), 0.0) if ends else 0.0
    return count, round(lost, 1)


def told(job: str, seen_: Seen, compute: Compute, ran: str) -> dict[str, Any]:
    """Return what the ledger keeps of the job. `saved`: the share of its running that spot made free."""
    settings = compute.sagemaker
    billable, training = seen_.billable_s, seen_.training_s
    return {
        "job": job,
        "status": seen_.status,
        "secondary": seen_.secondary,
        "instance_type": settings.instance_type if settings else "",
        "instance_count": settings.instance_count if settings else 1,
        "billable_s": billable,
        "training_s": training,
        "saved": round(1 - billable / training, 4) if billable is not None and training else None,
        "interruptions": seen_.interruptions,
        "interrupted_s": seen_.interrupted_s,
        "ran": ran,
    }


def is_left_over(result: Result, seen_: Seen) -> bool:
    """Tell whether a result is that of an earlier spot machine of the job: it ended otherwise on the last one."""
    died = seen_.status == "Failed" and seen_.exit_code not in (None, 143)
    return result.status == "interrupted" and died


def without_result(job: str, seen_: Seen, compute: Compute) -> Result:
    """Return how a step ended that left no result document, by what became of its job."""
    how = f"job {job} {seen_.status.lower()}" + (f" ({seen_.secondary})" if seen_.secondary != seen_.status else "")
    settings = compute.sagemaker
    if seen_.status == "Stopped":
        limits = {"MaxWaitTimeExceeded": "max_wait", "MaxRuntimeExceeded": "max_run"}
        if field := limits.get(seen_.secondary):
            value = getattr(settings, field, None) or "twice max_run"
            return _ended("interrupted", "Interrupted", how, f"{field} of the compute class is {value}")
        return _ended("interrupted", "Interrupted", how, "somebody stopped it")
    if seen_.status == "Failed":
        kind = seen_.reason.partition(":")[0].strip()
        status, hint = KINDS.get(kind, ("bug", "its log is in CloudWatch; exit code 137 is often a lack of memory"))
        names: dict[Status, str] = {"user": "UserError", "try_again": "TryAgain"}
        return _ended(status, names.get(status, "StepVanished"), f"{how}: {seen_.reason}", hint)
    hint = "may its role write the store?" if seen_.status == "Completed" else "somebody removed it"
    return _ended("bug", "StepVanished", f"{how}, and left no result", hint)


def _ended(status: Status, kind: str, message: str, hint: str) -> Result:
    return Result(status=status, error=StepError(kind=kind, message=message, hint=hint))
