"""The only room that imports Airflow: it turns a project's spec into its lifecycle Dags.

from orrery.orchestration import lifecycle     # in dags/<project>.py
lifecycle("flight_delay", __doc__)
"""

from __future__ import annotations

from orrery.orchestration.dags import lifecycle

__all__ = ["lifecycle"]
