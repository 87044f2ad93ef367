"""What Airflow's UI shows of Orrery: buttons on tasks, notes on runs, and reports from the store. No business logic."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin

from orrery.orchestration.links import LINKS
from orrery.orchestration.notes import Notes


class OrreryPlugin(AirflowPlugin):
    """Orrery in Airflow's UI."""

    name = "orrery"
    operator_extra_links = [link() for link in LINKS]  # noqa: RUF012  Airflow reads a plain list
    listeners = [Notes()]  # noqa: RUF012
