"""The way on to MLflow: a run or a version found there by the attempt that makes it. Asked for when a person clicks."""

from __future__ import annotations

import re

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import RedirectResponse

from orrery import platform
from orrery.ledger import Ledger
from orrery.orchestration.web import addresses
from orrery.orchestration.web.access import READ_RUNS, OurDag, Seen
from orrery.orchestration.web.pages import not_yet
from orrery.orchestration.web.waiting import ended
from orrery.registry.client import Mlflow
from orrery.registry.tracking import ATTEMPT_TAG

ANSWER_S = 5.0  # a person waits for it
# What `plan` makes of names. No quote is in it: the path goes into a filter of MLflow's search.
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,129}"
ATTEMPT = re.compile(f"[a-z][a-z0-9_]{{0,62}}/runs/{NAME}/{NAME}/[0-9]{{1,6}}", re.ASCII)

router = APIRouter(dependencies=[READ_RUNS])


@router.get(addresses.MLFLOW_RUN)
def mlflow_run(seen: OurDag, attempt: str) -> Response:
    """Lead on to the MLflow run of a training's attempt; while there is none, say so and look again."""
    _refuse(seen, attempt)
    server = Mlflow(platform.load().mlflow, ANSWER_S)
    experiment = server.find_experiment(seen.project)
    found = server.find_run(experiment, ATTEMPT_TAG, attempt) if experiment else None
    if found is None:
        return not_yet("MLflow run", ended(seen.project, attempt))
    return RedirectResponse(server.run_page(found), 303)


@router.get(addresses.MLFLOW_VERSION)
def mlflow_version(seen: OurDag, attempt: str) -> Response:
    """Lead on to the version that an attempt registered, promoted or went back to."""
    _refuse(seen, attempt)
    entry = Ledger(platform.load().ledger).get(seen.project, "run", attempt, "done")
    payload = entry.payload if entry else {}
    version = str(payload.get("version") or (payload.get("facts") or {}).get("model_version") or "")
    if not re.fullmatch("[0-9]{1,9}", version, re.ASCII):
        return not_yet("MLflow model", ended(seen.project, attempt))
    return RedirectResponse(Mlflow(platform.load().mlflow).version_page(seen.project, int(version)), 303)


def _refuse(seen: Seen, attempt: str) -> None:
    if not ATTEMPT.fullmatch(attempt) or not attempt.startswith(f"{seen.project}/"):
        raise HTTPException(404, "not an attempt of this project")
