"""Starts a training job by SageMaker's SDK: `python -m orrery.cloud.submit < job.json`, in the environment `cloud`.

One line of JSON on standard output: `{"job": NAME, "new": true}`; `new` is false when a job of this name was there
already. Or `{"error": {"message": …, "hint": …}}`, with exit code 64 (someone must act), 75 (try again) or 1.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import ValidationError

from orrery.cloud.client import refusal, trouble
from orrery.cloud.jobs import Job
from orrery.errors import OrreryError, UserError


def request(job: Job, session: Any) -> dict[str, Any]:
    """Return the arguments of `TrainingJob.create` for a job, made by SageMaker's ModelTrainer."""
    from sagemaker.core.shapes import Tag
    from sagemaker.core.training import configs
    from sagemaker.train.model_trainer import ModelTrainer

    vpc = configs.Networking(subnets=list(job.subnets), security_group_ids=list(job.security_groups))
    trainer = ModelTrainer(
        sagemaker_session=session,
        role=job.role,
        base_job_name=job.name,
        training_image=job.image,
        compute=configs.Compute(
            instance_type=job.instance_type,
            instance_count=job.instance_count,
            volume_size_in_gb=job.volume_gb,
            enable_managed_spot_training=job.spot,
        ),
        stopping_condition=configs.StoppingCondition(
            max_runtime_in_seconds=job.max_run_s, max_wait_time_in_seconds=job.max_wait_s
        ),
        output_data_config=configs.OutputDataConfig(s3_output_path=job.output),
        checkpoint_config=configs.CheckpointConfig(s3_uri=job.checkpoints),
        environment=dict(job.environment),
        tags=[Tag(key=k, value=v) for k, v in job.tags.items()],
        networking=vpc if job.subnets else None,
    )
    # ModelTrainer.train() would add a moment to the name, wrap a command in scripts that it uploads, and report its
    # use to AWS. Ours is an image that has its program, and the name is what keeps a job from being started twice.
    made: dict[str, Any] = trainer._create_training_job_args()
    made["training_job_name"] = job.name
    made["algorithm_specification"].container_entrypoint = [job.argv[0]]
    made["algorithm_specification"].container_arguments = list(job.argv[1:])
    return made


def submit(job: Job) -> bool:
    """Start a job; False when one of this name was there already. Raises `UserError` and `TryAgain`."""
    import boto3
    from botocore.exceptions import ClientError
    from sagemaker.core.helper.iam_role_resolver import RoleValidationError
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.resources import TrainingJob

    with trouble(f"the SageMaker job {job.name} cannot be started"):
        session = Session(boto_session=boto3.Session(region_name=job.region))
        try:
            arguments = request(job, session)
        except (RoleValidationError, ValueError) as e:
            raise UserError(f"the SageMaker job {job.name} cannot be started: {e}") from None
        try:
            TrainingJob.create(session=session.boto_session, region=job.region, **arguments)
        except ClientError as e:
            if e.response["Error"]["Code"] == "ResourceInUse":
                return False
            raise refusal(f"SageMaker refuses the job {job.name}", e) from None
    return True


def main() -> int:
    """Read the job from standard input; see the module."""
    try:
        job = Job.model_validate_json(sys.stdin.buffer.read())
        told: dict[str, Any] = {"new": submit(job), "job": job.name}
        code = 0
    except ValidationError as e:
        told, code = {"error": {"message": f"this is no job: {e.errors()[0]['loc']}: {e.errors()[0]['msg']}"}}, 1
    except OrreryError as e:
        told, code = {"error": {"message": e.message, "hint": e.hint}}, e.exit_code
    sys.stdout.write(json.dumps(told) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
