"""`register`: the candidate becomes a version of the project's model in MLflow, and the alias `challenger`.

The desired state is "the training at this address has a version": found by its tag, the version is returned
as it is. Files first, then the version with its tags in one call, then the alias; killed anywhere, another
attempt finishes.
"""

from __future__ import annotations

import time

from orrery.contract import RegisterParams, Result
from orrery.errors import RequestError, UserError
from orrery.registry import client, package, tracking
from orrery.registry.client import ADDRESS_TAG, Mlflow, Run, Version
from orrery.step import Work
from orrery.store import Manifest

MAX_TAG = 1000


def run(work: Work, params: RegisterParams) -> Result:
    """Register the candidate. Raises `TryAgain` when MLflow cannot be reached."""
    server, project = client.needed(), work.config.project
    training = approved(work)
    found = server.versions(project, training.address)
    if found:
        version, reason = found[0], f"version {found[0].number} is this candidate already"
    else:
        version = _create(work, server, training, params)
        reason = f"version {version.number} of {project}"
    _challenge(work, server, version)
    return Result(
        reasons=[reason],
        facts={"model_version": str(version.number)},
        links={"MLflow model": server.version_page(project, version.number)},
    )


def _create(work: Work, server: Mlflow, training: Manifest, params: RegisterParams) -> Version:
    project = work.config.project
    server.ensure_model(project, work.spec.description or f"{work.spec.label.column}, by {work.spec.owner}")
    origin = _training_run(work, server, training)
    source = _upload(work, server, training, origin)
    made = server.create_version(
        project, source, origin.id, _tags(work, training, params), f"trained on {training.key}"
    )
    # Two attempts at once may both get here: the lower number stands, for both of them.
    first = server.versions(project, training.address)[0]
    if first.number != made.number:
        server.delete_version(project, made.number)
    return first


def _training_run(work: Work, server: Mlflow, training: Manifest) -> Run:
    """Return the run that the training logged, or a new one when it had no MLflow."""
    experiment = server.experiment(work.config.project)
    found = server.find_run(experiment, ADDRESS_TAG, training.address)
    if found is not None:
        return found
    data = [m for ref in training.inputs.get("features", ()) if (m := work.store.manifest(ref.path)) is not None]
    bundle = training.fingerprint.get("project", "")
    tags = tracking.lineage(work.config.project, training.key, training.fingerprint, bundle, data)
    tags |= {"orrery.run": training.run, tracking.ATTEMPT_TAG: training.attempt, ADDRESS_TAG: training.address}
    made = server.create_run(experiment, f"{training.key} (registered)", tags, int(time.time() * 1000))
    server.call("POST", "runs/update", run_id=made.id, status="FINISHED", end_time=int(time.time() * 1000))
    return made


def _upload(work: Work, server: Mlflow, training: Manifest, origin: Run) -> str:
    """Put the model's folder below the run and return its URI. The same bytes each time."""
    evaluation = work.input("evaluation")
    files = package.files(work.open_input(training, "model.onnx"), work.open_input(training, "schema.json"), origin.id)
    files["params.json"] = work.open_input(training, "params.json").read_bytes()
    files["report.json"] = work.open_input(evaluation, "report.json").read_bytes()
    folder = f"{origin.artifacts}/{package.FOLDER}"
    with work.progress("uploading", len(files), "files") as tick:
        for name, data in files.items():
            server.put_file(f"{folder}/{name}", data)
            tick()
    return folder


def _tags(work: Work, training: Manifest, params: RegisterParams) -> dict[str, str]:
    verdict = work.input("verdict")
    numbers = {k: f"{v:.6g}" for k, v in verdict.result.get("metrics", {}).items()}
    tags = {
        ADDRESS_TAG: training.address,
        "orrery.manifest": training.path,
        "orrery.digest": training.digest,
        "orrery.window": training.key,
        "orrery.registered_by": params.actor,
        "orrery.registered_why": params.reason,
        **numbers,
    }
    return {k: v[:MAX_TAG] for k, v in tags.items() if v}


def _challenge(work: Work, server: Mlflow, version: Version) -> None:
    """Set the alias, unless this version is the champion, or a later one challenges already."""
    project = work.config.project
    if server.alias(project, "champion") == version.number:
        return
    if (server.alias(project, "challenger") or 0) < version.number:
        server.set_alias(project, "challenger", version.number)


def approved(work: Work) -> Manifest:
    """Return the candidate. Raises `RequestError` when the gate kept the champion; the planner never asks for that."""
    verdict = work.input("verdict")
    if verdict.result.get("verdict") != "promote":
        raise RequestError(f"the gate kept the champion ({verdict.path}): there is nothing to release")
    return work.input("candidate")


def owned(server: Mlflow, project: str, number: str, training: Manifest) -> Version:
    """Return a version, checked to be the one made from `training`. Raises `UserError` when it is not there."""
    version = server.version(project, number)
    if version is None:
        there = ", ".join(str(v.number) for v in server.versions(project)[-20:]) or "none"
        raise UserError(
            f"{project} has no version {number!r} in MLflow at {server.address}; there are: {there}",
            hint="was the registry reset? a new candidate is registered by the next release",
        )
    if version.tags.get(ADDRESS_TAG) != training.address:
        made = version.tags.get("orrery.manifest", "something that Orrery did not register")
        raise UserError(
            f"version {number} of {project} was made from {made}, not from {training.path}",
            hint=f"is {server.address} another installation's MLflow?",
        )
    return version
