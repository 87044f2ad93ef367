"""Who may see what. Everything here is answered to whom Airflow lets read the Dag's runs, and to nobody else.

Without a token, or with one that is no longer good: 401 (a forged one: 403). A user who may not read the Dag: 403,
whether or not there is such a Dag. A Dag or run that is not there: 404. A project is shown as a whole to whoever may
read one of its Dags. Airflow's token comes in its cookie (`HttpOnly`, `SameSite=Lax`) or as a bearer token.

Nothing here changes anything: every route is a GET. A rollback is asked of Airflow's own REST API by the page's
script, so Airflow's authorization decides. A foreign site cannot do the same in a user's name: the cookie is not
sent with its requests (SameSite), and JSON from another origin needs a CORS permission that Airflow does not give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import GetUserDep, get_user, requires_access_dag
from airflow.models.dag import DagModel
from airflow.models.dagrun import DagRun
from fastapi import Depends, HTTPException
from sqlalchemy import select

from orrery.orchestration.assets import ALL_DAGS
from orrery.orchestration.params import first_name, run_name

LONGEST = 250  # of Airflow's ids
USER = Depends(get_user)
READ_RUNS = Depends(requires_access_dag("GET", DagAccessEntity.RUN))
READ_LOGS = Depends(requires_access_dag("GET", DagAccessEntity.TASK_LOGS))
LATEST_RUNS = 500  # of a project, whose pages the Model tab links to


@dataclass(frozen=True)
class Seen:
    """A Dag that there is. `project` is empty when it is none of ours."""

    dag_id: str
    project: str
    verb: str
    owner: str = ""
    dags: frozenset[str] = frozenset()


def _seen(dag_id: str, session: SessionDep) -> Seen:
    found = session.get(DagModel, dag_id) if _possible(dag_id) else None
    if found is None:
        raise HTTPException(404, "there is no such Dag")
    project, _, verb = dag_id.partition(".")
    tags = {tag.name for tag in found.tags}
    if verb not in ALL_DAGS or not {"orrery", project} <= tags:
        return Seen(dag_id, "", "")
    ids = session.scalars(select(DagModel.dag_id).where(DagModel.dag_id.in_([f"{project}.{v}" for v in ALL_DAGS])))
    owner = next((tag.removeprefix("owner:") for tag in sorted(tags) if tag.startswith("owner:")), "")
    return Seen(dag_id, project, verb, owner, frozenset(ids))


def _ours(seen: Annotated[Seen, Depends(_seen)]) -> Seen:
    if not seen.project:
        raise HTTPException(404, "this Dag is not one of Orrery's")
    return seen


def find_run(seen: Seen, run_id: str, session: Any) -> DagRun:
    """Return a run of a Dag as Airflow has it. Raises 404."""
    found = None
    if _possible(run_id):
        found = session.scalar(select(DagRun).where(DagRun.dag_id == seen.dag_id, DagRun.run_id == run_id))
    if found is None:
        raise HTTPException(404, "there is no such run")
    return found


def _run(seen: Annotated[Seen, Depends(_ours)], run_id: str, session: SessionDep) -> DagRun:
    return find_run(seen, run_id, session)


def _possible(name: str) -> bool:
    """Tell whether Airflow could have such an id; PostgreSQL refuses a text with a NUL."""
    return 0 < len(name) <= LONGEST and name.isprintable()


AnyDag = Annotated[Seen, Depends(_seen)]
OurDag = Annotated[Seen, Depends(_ours)]
OurRun = Annotated[Any, Depends(_run)]
Session = SessionDep
User = GetUserDep


def may_start(user: Any, dag_id: str) -> bool:
    """Tell whether Airflow would let a user start a run of a Dag: for what is offered, not for what is done."""
    from airflow.api_fastapi.app import get_auth_manager

    team = DagModel.get_team_name(dag_id)
    details = DagDetails(id=dag_id, team_name=team)
    allowed = get_auth_manager().is_authorized_dag(
        method="POST", access_entity=DagAccessEntity.RUN, details=details, user=user
    )
    return bool(allowed)


def runs_by_name(seen: Seen, session: Any) -> dict[str, tuple[str, str]]:
    """Return the project's latest runs by their name in the ledger: (Dag id, run id)."""
    columns = (DagRun.dag_id, DagRun.run_id, DagRun.clear_number)
    query = select(*columns).where(DagRun.dag_id.in_(seen.dags)).order_by(DagRun.id.desc()).limit(LATEST_RUNS)
    found: dict[str, tuple[str, str]] = {}
    for row in session.execute(query):
        found[run_name(row)] = (row.dag_id, row.run_id)
        found.setdefault(first_name(row), (row.dag_id, row.run_id))
    return found
