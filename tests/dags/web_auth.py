"""An auth manager that lets one user, mallory, read no Dag of flight_delay: Airflow's own, with one exception."""

from __future__ import annotations

from typing import Any

from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager


class Picky(SimpleAuthManager):
    def is_authorized_dag(self, *, method: Any, user: Any, access_entity: Any = None, details: Any = None) -> bool:
        named = (details.id if details else None) or ""
        if user.get_name() == "mallory" and named.startswith(("flight_delay.", "nothing.")):
            return False
        return super().is_authorized_dag(method=method, user=user, access_entity=access_entity, details=details)
