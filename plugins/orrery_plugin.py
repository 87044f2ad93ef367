"""What Airflow's UI shows of Orrery: buttons on tasks, notes on runs, tabs, and reports. No business logic."""

from __future__ import annotations

from typing import Any

from airflow.plugins_manager import AirflowPlugin

from orrery.orchestration.links import LINKS
from orrery.orchestration.notes import Notes
from orrery.orchestration.origin import Origin
from orrery.orchestration.web import addresses


def _in_api_server() -> bool:
    """Tell whether this process serves Airflow's API: only there is the app needed, and its imports are slow."""
    import sys

    return "airflow.api_fastapi.app" in sys.modules


def _apps() -> list[dict[str, Any]]:
    if not _in_api_server():
        return []
    from orrery.orchestration.web.app import app

    return [{"app": app, "url_prefix": addresses.PREFIX, "name": "orrery"}]


def _tab(name: str, destination: str, page: str, route: str) -> dict[str, Any]:
    """Declare a tab. Airflow shows it on every Dag; for one that is not ours, the page says so."""
    icon = f"{addresses.base()}{addresses.PREFIX}/static/{name.lower()}"
    return {
        "name": name,
        "destination": destination,
        "href": f"{addresses.base()}{addresses.PREFIX}{page}",
        "url_route": route,
        "icon": f"{icon}.svg",
        "icon_dark_mode": f"{icon}-dark.svg",
    }


def _views() -> list[dict[str, Any]]:
    if not _in_api_server():
        return []
    model = addresses.MODEL_PAGE.replace("{dag_id}", "{DAG_ID}")
    verdict = addresses.VERDICT_PAGE.replace("{dag_id}", "{DAG_ID}").replace("{run_id}", "{RUN_ID}")
    return [
        _tab("Model", "dag", model, addresses.MODEL_TAB),
        _tab("Verdict", "dag_run", verdict, addresses.VERDICT_TAB),
    ]


class OrreryPlugin(AirflowPlugin):
    """Orrery in Airflow's UI."""

    name = "orrery"
    operator_extra_links = [link() for link in LINKS]  # noqa: RUF012  Airflow reads plain lists
    listeners = [Notes(), Origin()]  # noqa: RUF012
    fastapi_apps = _apps()
    external_views = _views()
