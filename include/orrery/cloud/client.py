"""Asks SageMaker how jobs are, and stops them: for a worker, and for the triggerer (asynchronous). Light.

Region, credentials and endpoint are those of the process's AWS environment, as the store's are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

from orrery.cloud.jobs import Seen, seen
from orrery.errors import OrreryError, TryAgain, UserError

# Answers that someone must act on; all other refusals pass, or are a bug of ours.
REFUSED = frozenset(
    {
        "AccessDeniedException",
        "AccessDenied",
        "UnrecognizedClientException",
        "InvalidClientTokenId",
        "ValidationException",
    }
)
SHORT_S = 2.0  # how long an answer may take when the worker is being ended


def describe(job: str, region: str | None = None) -> Seen:
    """Return a job as it is now; `Missing` when there is none of this name."""
    with trouble(f"the SageMaker job {job} cannot be looked at"), _client(region) as client:
        return _described(lambda: client.describe_training_job(TrainingJobName=job))


def running(part: str, region: str | None = None) -> dict[str, str]:
    """Return name and status of all jobs whose name contains `part`, newest first."""
    with trouble("SageMaker's jobs cannot be listed"), _client(region) as client:
        pages = client.get_paginator("list_training_jobs")
        found = pages.paginate(NameContains=part, SortBy="CreationTime", SortOrder="Descending")
        jobs = (j for page in found for j in page["TrainingJobSummaries"])
        return {j["TrainingJobName"]: j["TrainingJobStatus"] for j in jobs}


def stop(job: str, region: str | None = None, *, soon: bool = False) -> bool:
    """Ask for a job's end: SIGTERM, then two minutes to save. False when it has ended. `soon`: do not wait long."""
    with trouble(f"the SageMaker job {job} cannot be stopped"), _client(region, soon=soon) as client:
        return _stopped(lambda: client.stop_training_job(TrainingJobName=job))


class Watcher:
    """The same questions from an event loop, on one connection."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def describe(self, job: str) -> Seen:
        """Return a job as it is now; `Missing` when there is none of this name."""
        with trouble(f"the SageMaker job {job} cannot be looked at"):
            try:
                return seen(await self._client.describe_training_job(TrainingJobName=job))
            except Exception as e:
                if _is_missing(e):
                    return Seen(status="Missing")
                raise

    async def stop(self, job: str) -> bool:
        """Ask for a job's end; False when it has ended before."""
        with trouble(f"the SageMaker job {job} cannot be stopped"):
            try:
                await self._client.stop_training_job(TrainingJobName=job)
            except Exception as e:
                if _code(e) != "ValidationException":
                    raise
                return False
            return True


@contextlib.asynccontextmanager
async def watcher(region: str | None = None) -> AsyncIterator[Watcher]:
    """Open a connection for an event loop."""
    from aiobotocore.session import get_session

    session = get_session()
    # What SageMaker's API is like is a large file: it is not parsed on the loop.
    await asyncio.to_thread(session.get_component("data_loader").load_service_model, "sagemaker", "service-2")
    with trouble("SageMaker cannot be asked"):
        made = session.create_client("sagemaker", region_name=region)
        client = await made.__aenter__()
    try:
        yield Watcher(client)
    finally:
        await client.close()


def region() -> str | None:
    """Return the region of the process's AWS environment."""
    import botocore.session

    found = botocore.session.get_session().get_config_variable("region")
    return str(found) if found else None


@contextlib.contextmanager
def _client(region: str | None, *, soon: bool = False) -> Iterator[Any]:
    import botocore.config
    import botocore.session

    quick = {"connect_timeout": SHORT_S, "read_timeout": SHORT_S, "retries": {"total_max_attempts": 1}}
    config = botocore.config.Config(**(quick if soon else {}))
    client = botocore.session.get_session().create_client("sagemaker", region_name=region, config=config)
    try:
        yield client
    finally:
        client.close()


def _described(ask: Any) -> Seen:
    try:
        return seen(ask())
    except Exception as e:
        if _is_missing(e):
            return Seen(status="Missing")
        raise


def _stopped(ask: Any) -> bool:
    try:
        ask()
    except Exception as e:
        # The only thing to be wrong with a name that we made is that the job has ended, or never was.
        if _code(e) != "ValidationException":
            raise
        return False
    return True


def _is_missing(error: Exception) -> bool:
    return _code(error) in ("ValidationException", "ValidationError", "ResourceNotFound")


def _code(error: BaseException) -> str:
    """Return the code of an answer of AWS that refuses, or an empty string."""
    return str((getattr(error, "response", None) or {}).get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def trouble(what: str) -> Iterator[None]:
    """Tell what AWS's library raises as one of our errors: 64 for what someone must act on, 75 for the rest."""
    import botocore.exceptions
    import botocore.parsers

    try:
        yield
    except botocore.exceptions.ClientError as e:
        raise refusal(what, e) from None
    except (botocore.exceptions.NoRegionError, botocore.exceptions.NoCredentialsError) as e:
        hint = "AWS_DEFAULT_REGION, or sagemaker.region of the compute class; credentials as for an s3:// store"
        raise UserError(f"{what}: {e}", hint=hint) from None
    except (botocore.exceptions.BotoCoreError, botocore.parsers.ResponseParserError, OSError) as e:
        raise TryAgain(f"{what}: {type(e).__name__}: {e}") from None


def refusal(what: str, error: Exception) -> OrreryError:
    """Return an answer that refuses as one of our errors."""
    code, text = _code(error), str((getattr(error, "response", None) or {}).get("Error", {}).get("Message", error))
    message = f"{what}: {code}: {text}"
    if code == "ResourceLimitExceeded":
        # Another job's end may free the quota; one that is zero stays so, and the last attempt says it.
        return TryAgain(message, hint="if the quota is too small for even one such machine: AWS's Service Quotas")
    if code in REFUSED:
        return UserError(message, hint="see the policies of Airflow's AWS identity and of the compute class's role")
    return TryAgain(message)
