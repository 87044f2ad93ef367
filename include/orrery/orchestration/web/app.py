"""The FastAPI app that Airflow's API server mounts: pages, their JSON twins, evidence, the way on to MLflow."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from airflow.models.taskinstance import TaskInstance
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy import select
from starlette.exceptions import HTTPException as AnyHTTPException

from orrery import platform
from orrery.errors import OrreryError
from orrery.ledger import Ledger
from orrery.orchestration import evidence
from orrery.orchestration.params import actor, first_name, run_name
from orrery.orchestration.web import addresses, elsewhere, model, pages, verdict
from orrery.orchestration.web.access import (
    READ_RUNS,
    USER,
    AnyDag,
    OurDag,
    OurRun,
    Seen,
    Session,
    User,
    find_run,
    may_start,
    runs_by_name,
)


@asynccontextmanager
async def _ready(app: FastAPI) -> AsyncIterator[None]:
    """Compile the templates and open the ledger when Airflow starts: the first person to look need not wait for it."""
    pages.prepare()
    with suppress(OrreryError):
        Ledger(platform.load().ledger)
    yield


app = FastAPI(title="Orrery", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_ready)
app.include_router(evidence.router)
app.include_router(elsewhere.router)
# An entry's id in the ledger, as far as a database's integer goes.
Before = Annotated[int | None, Query(ge=1, le=2**31 - 1)]


@app.get(addresses.MODEL_PAGE, dependencies=[READ_RUNS])
def model_page(seen: AnyDag, session: Session, user: User, before: Before = None) -> Response:
    """Show the Model tab of a Dag."""
    if not seen.project:
        return pages.render("foreign.html", dag_id=seen.dag_id)
    rollback = f"{seen.project}.rollback"
    there = rollback in seen.dags
    return pages.render(
        "model.html",
        seen=seen,
        rollback_dag=rollback if there else "",
        may_roll_back=there and may_start(user, rollback),
        **_model(seen, session, before),
    )


@app.get(addresses.MODEL_JSON, dependencies=[READ_RUNS])
def model_json(seen: OurDag, session: Session, before: Before = None) -> Response:
    """Return what the Model tab shows, for scripts."""
    return JSONResponse(_model(seen, session, before), headers=_private())


@app.get(addresses.VERDICT_PAGE, dependencies=[READ_RUNS])
def verdict_page(seen: AnyDag, run_id: str, session: Session) -> Response:
    """Show the Verdict tab of a run."""
    if not seen.project:
        return pages.render("foreign.html", dag_id=seen.dag_id)
    return pages.render("verdict.html", seen=seen, **_verdict(seen, find_run(seen, run_id, session), session))


@app.get(addresses.VERDICT_JSON, dependencies=[READ_RUNS])
def verdict_json(seen: OurDag, run: OurRun, session: Session) -> Response:
    """Return what the Verdict tab shows, for scripts."""
    return JSONResponse(_verdict(seen, run, session), headers=_private())


@app.get(addresses.STATIC, dependencies=[USER])
def static(name: str) -> Response:
    """Return one of our own files."""
    try:
        data, _ = pages.static_file(name)
    except KeyError:
        raise HTTPException(404, "there is no such file") from None
    kept = {**pages.HEADERS, "Cache-Control": "private, max-age=86400"}
    return Response(data, media_type=pages.FILES[name], headers=kept)


def _private() -> dict[str, str]:
    return {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def _model(seen: Seen, session: Any, before: int | None) -> dict[str, Any]:
    return model.read(Ledger(platform.load().ledger), seen.project, runs_by_name(seen, session), before)


def _verdict(seen: Seen, run: Any, session: Any) -> dict[str, Any]:
    columns = (TaskInstance.task_id, TaskInstance.state, TaskInstance.try_number, TaskInstance.duration)
    found = session.execute(
        select(*columns).where(TaskInstance.dag_id == run.dag_id, TaskInstance.run_id == run.run_id)
    )
    tasks = tuple(verdict.Task(t.task_id, _text(t.state), t.try_number or 0, t.duration) for t in found)
    conf = run.conf or {}
    asked = verdict.Run(
        project=seen.project,
        dag_id=run.dag_id,
        run_id=run.run_id,
        name=run_name(run),
        state=_text(run.state),
        partition=str(conf.get("partition") or conf.get("window") or run.partition_key or ""),
        source=_text(run.triggered_by),
        by=actor(run),
        why=str(conf.get("reason") or ""),
        asked=_iso(run.queued_at),
        started=_iso(run.start_date),
        ended=_iso(run.end_date),
        first=first_name(run),
        tasks=tasks,
    )
    return verdict.read(Ledger(platform.load().ledger), asked)


def _text(value: Any) -> str:
    return "" if value is None else str(getattr(value, "value", value))


def _iso(value: Any) -> str:
    return value.isoformat() if value else ""


# -- refusals -----------------------------------------------------------------------------------------

TITLES = {401: "Please log in", 403: "Not for you", 404: "Nothing here", 422: "Not understood"}


def _refusal(request: Request, status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """Return a refusal as a page where a person looks, as JSON where a script does."""
    if "/api/" in request.url.path or "/static/" in request.url.path:
        return JSONResponse({"detail": text}, status, headers={**_private(), **(headers or {})})
    title = TITLES.get(status, "This did not work")
    return pages.render("message.html", status, headers, title=title, text=text)


@app.exception_handler(AnyHTTPException)
def _http_error(request: Request, error: AnyHTTPException) -> Response:
    return _refusal(request, error.status_code, str(error.detail), dict(error.headers or {}))


@app.exception_handler(RequestValidationError)
def _invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    return _refusal(request, 422, f"{first['loc'][-1]}: {first['msg']}")


@app.exception_handler(OrreryError)
def _trouble(request: Request, error: OrreryError) -> Response:
    return _refusal(request, 503 if error.exit_code == 75 else 500, error.message, {"Retry-After": "10"})
