"""What Airflow's UI shows of Orrery: buttons on tasks, notes on runs, and reports from the store. No business logic."""

from __future__ import annotations

from typing import Any

from airflow.plugins_manager import AirflowPlugin

from orrery.orchestration.links import EVIDENCE, LINKS
from orrery.orchestration.notes import Notes


def _in_api_server() -> bool:
    """Tell whether this process serves Airflow's API: only there is the app needed, and its imports are slow."""
    import sys

    return "airflow.api_fastapi.app" in sys.modules


def _apps() -> list[dict[str, Any]]:
    if not _in_api_server():
        return []
    from orrery.orchestration.evidence import app

    return [{"app": app, "url_prefix": EVIDENCE, "name": "orrery evidence"}]


class OrreryPlugin(AirflowPlugin):
    """Orrery in Airflow's UI."""

    name = "orrery"
    operator_extra_links = [link() for link in LINKS]  # noqa: RUF012  Airflow reads plain lists
    listeners = [Notes()]  # noqa: RUF012
    fastapi_apps = _apps()
