"""The same step as a SageMaker training job: started by a worker, waited for in the triggerer, judged by its result."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orrery import attempts, platform
from orrery.catalogue import verb_of
from orrery.cloud import client, jobs
from orrery.cloud.jobs import Job, Seen
from orrery.contract import Result, StepConfig
from orrery.endings import Ending
from orrery.errors import TRY_AGAIN, USER, OrreryError, SpecError, TryAgain, UserError
from orrery.local import interpreter, step_environment
from orrery.orchestration.job_trigger import JobTrigger
from orrery.orchestration.links import ResultLink
from orrery.orchestration.operators import StepOperator, Told
from orrery.plan import Planner
from orrery.planner import BasePlanner, Plan, Request, attempt_folder
from orrery.runner import GoesOn, StepFailed, conclude, read_result
from orrery.spec import seconds

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger("orrery.sagemaker")
RUNS = ("train", "trial")
SUBMIT_S = 180.0
SAVING_S = 150.0  # SageMaker gives a job that is stopped two minutes
LOOK_S = 5.0
CONSOLE = "https://{region}.console.aws.amazon.com/sagemaker/home?region={region}#/jobs/{job}"


class SageMakerLink(ResultLink):
    """The job's page in AWS's console, with its log."""

    result_key = "SageMaker job"


class SageMakerStepOperator(StepOperator):
    """Trains as a SageMaker job. What is asked for, planned, skipped and recorded is `StepOperator`'s.

    The worker starts the job and leaves; the triggerer waits; a worker reads the result document. A job is found by
    its name, which follows from the attempt: it is never started twice, and one whose worker was lost before the wait
    began is taken up by the next attempt. Whoever ends the task ends the job.
    """

    def __init__(self, *, project: str, verb: str, compute: str = "", **kwargs: Any) -> None:
        if verb not in RUNS:
            raise SpecError(
                f"{verb} of {project} is on compute class {compute!r}: SageMaker runs {' and '.join(RUNS)}",
                hint="a class without `sagemaker` for the other steps",
            )
        super().__init__(project=project, verb=verb, compute=compute, **kwargs)
        self.operator_extra_links = (*self.operator_extra_links, SageMakerLink())
        self._ended: dict[str, Any] | None = None

    def job_ended(self, context: Context, event: dict[str, Any], run: str | None = None) -> dict[str, Any]:
        """Go on after the wait; returns and raises what `execute` does."""
        self._ended, self._run = event, run
        return self.execute(context)

    def _one(self, context: Context, planner: BasePlanner, request: Request) -> Result:
        if self._ended is not None:
            return self._conclude(context, planner, request, self._ended)
        try:
            return super()._one(context, planner, request)
        except JobStarted as e:
            self._push_job(context, e.job, e.region)
            # No timeout: SageMaker ends a job by max_run and max_wait, and the time in the triggerer is no worker's.
            self.defer(trigger=e.trigger(), method_name="job_ended", kwargs={"run": request.run}, timeout=None)
            raise AssertionError("deferred") from None

    def _make_launcher(self, context: Context, planner: BasePlanner) -> Any:
        assert isinstance(planner, Planner), "a class that is a SageMaker job trains models, and does nothing else"
        return JobLauncher(planner, self._told[-1].request)

    def _wait_for_end(self, planner: BasePlanner, request: Request, folder: str) -> Ending | None:
        """Wait for a job that was told to stop and is saving: the next attempt goes on from what it saves."""
        settings = planner.platform.compute_class(self.compute).sagemaker
        slot = jobs.slot(planner.store.uri, folder)
        until, number = time.monotonic() + SAVING_S, folder.rpartition("/")[2]
        while time.monotonic() < until:
            there = client.running(slot, settings.region if settings else None)
            if not any(s == "Stopping" and jobs.attempt_of(j, slot) == number for j, s in there.items()):
                break
            log.info("the job of attempt %s is being stopped: waiting for its end", number)
            time.sleep(LOOK_S)
        return None  # the job's own result, or its lack, is judged like any lost one's

    def _conclude(self, context: Context, planner: BasePlanner, request: Request, event: dict[str, Any]) -> Result:
        """Judge the job by what it left, and record the attempt."""
        store, folder, ran = planner.store, attempt_folder(request), event["folder"]
        attempt = attempts.read(store, folder)
        name = attempt.compute if attempt else request.compute
        compute, seen = planner.platform.compute_class(name), Seen.model_validate(event["seen"])
        config = _config(planner, folder)
        plan = Plan(config, verb_of(config), {}, compute=name)
        plan.told["sagemaker"] = told = jobs.told(event["job"], seen, compute, ran)
        log.info("%s", _sentence(event["job"], seen, told["saved"]))
        result = read_result(store, config if ran == folder else _config(planner, ran), seen.exit_code or 1)
        vanished = result.error is not None and result.error.kind == "StepVanished"
        if vanished or jobs.is_left_over(result, seen):
            result = jobs.without_result(event["job"], seen, compute)
        self._told.append(Told(request, plan, result))
        self._push_job(context, event["job"], event["region"])
        self._push_known(context, ran)
        if result.status == "done":
            with contextlib.suppress(OrreryError):
                store.remove(jobs.checkpoints(plan))
        self._push_links(context, result)
        return conclude(planner, request, plan, result, ran)

    def _push_job(self, context: Context, job: str, region: str | None) -> None:
        where = region or client.region()
        if where:
            context["ti"].xcom_push(key=SageMakerLink().xcom_key, value=CONSOLE.format(region=where, job=job))


class JobStarted(GoesOn):
    """A job runs; `folder` is the attempt's that it works in."""

    def __init__(self, job: str, folder: str, region: str | None, poll: float) -> None:
        super().__init__(job)
        self.job, self.folder, self.region, self.poll = job, folder, region, poll

    def trigger(self) -> JobTrigger:
        """Return what waits for it."""
        return JobTrigger(job=self.job, folder=self.folder, region=self.region, poll=self.poll)


class JobLauncher:
    """Starts a planned step as a job, or takes up the one that runs already; raises `JobStarted`."""

    def __init__(self, planner: Planner, request: Request) -> None:
        self.planner, self.request = planner, request
        self._job: tuple[str, str | None] | None = None

    def __call__(self, plan: Plan) -> int:
        config, compute = plan.config, self.planner.platform.compute_class(plan.compute)
        self._check_fallback()
        job = jobs.document(plan, self.planner.platform, compute, jobs.name(config.store, config.folder))
        settings = compute.sagemaker
        assert settings is not None
        poll = float(seconds(settings.poll))
        there, region = self._there(settings.region), settings.region
        for name, status in there.items():
            if status == "InProgress" and (folder := self._same_work(name, plan)):
                log.warning("job %s, whose worker was lost, is still at this work: it is taken up", name)
                self._job = (name, region)
                raise JobStarted(name, folder, region, poll)
        for name, status in there.items():
            if status == "InProgress":
                log.warning("job %s of an earlier attempt is at other work now: it is stopped", name)
                client.stop(name, region)
        again = next(n for n in range(1, 1000) if jobs.name(config.store, config.folder, n) not in there)
        job = job.model_copy(update={"name": jobs.name(config.store, config.folder, again)})
        self._job = (job.name, region)
        new = submit(job)
        log.info("job %s %s, on %s%s", job.name, "started" if new else "was started before", job.instance_type,
                 " (spot)" if job.spot else "")  # fmt: skip
        raise JobStarted(job.name, config.folder, region, poll)

    def _check_fallback(self) -> None:
        """Raise `SpecError` at the first attempt for a fallback that the last one could not take."""
        fallback = self.planner.spec.train.spot.fallback
        if fallback and self.planner.platform.compute_class(fallback).sagemaker is None:
            raise SpecError(
                f"{self.planner.project}: train.spot.fallback is {fallback!r}, which is no SageMaker job as "
                f"{self.planner.spec.train.compute!r} is",
                hint="a class with `sagemaker` and without `spot`",
            )

    def stop(self) -> None:
        """End the job, if there is one by now. The worker has a few seconds left."""
        if self._job is not None:
            name, region = self._job
            log.info("job %s %s", name, "is told to stop" if client.stop(name, region, soon=True) else "has ended")

    def _there(self, region: str | None) -> dict[str, str]:
        """Return name and status of all jobs that were started for this run's task."""
        folders = (attempt_folder(self.request, run) for run in (self.request.run, *self.request.cleared))
        slots = dict.fromkeys(jobs.slot(self.planner.store.uri, folder) for folder in folders)
        return {name: status for slot in slots for name, status in client.running(slot, region).items()}

    def _same_work(self, job: str, plan: Plan) -> str | None:
        """Return the folder that a job works in, if what it makes is what the plan wants."""
        for run in (self.request.run, *self.request.cleared):
            folder = attempt_folder(self.request, run)
            attempt = jobs.attempt_of(job, jobs.slot(self.planner.store.uri, folder))
            if attempt is None:
                continue
            ran = f"{folder.rpartition('/')[0]}/{attempt}"
            with contextlib.suppress(FileNotFoundError, ValueError):
                same = _config(self.planner, ran).address == plan.config.address
                return ran if same and plan.config.address else None
        return None


def submit(job: Job, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> bool:
    """Start a job by SageMaker's SDK, in its environment `cloud`; False when it had been started before."""
    argv = [str(interpreter("cloud")), "-m", "orrery.cloud.submit"]
    try:
        done = run(
            argv, input=job.model_dump_json(), capture_output=True, text=True, errors="replace", timeout=SUBMIT_S,
            check=False, env=step_environment({}), cwd=platform.home(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TryAgain(f"SageMaker has not taken job {job.name} within {SUBMIT_S:.0f} s") from None
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise StepFailed(f"job {job.name} was not started: {done.stderr.strip()[-2000:]}") from None
    if error := told.get("error"):
        kinds: dict[int, type[OrreryError]] = {USER: UserError, TRY_AGAIN: TryAgain}
        raise kinds.get(done.returncode, StepFailed)(error["message"], hint=error.get("hint", ""))
    return bool(told["new"])


def _config(planner: BasePlanner, folder: str) -> StepConfig:
    return StepConfig.model_validate_json(planner.store.read(f"{folder}/config.json"))


def _sentence(job: str, seen: Seen, saved: float | None) -> str:
    parts = [f"job {job} {seen.status.lower()}"]
    if seen.training_s is not None:
        parts.append(f"ran {seen.training_s} s, {seen.billable_s} s of them paid for")
    if saved:
        parts.append(f"spot saved {saved:.0%}")
    if seen.interruptions:
        parts.append(f"interrupted {seen.interruptions} times, {seen.interrupted_s:.0f} s until it ran again")
    return "; ".join(parts)
