"""How a worker comes by the cluster: what Airflow lacks for it is told as a person can mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from airflow.sdk.exceptions import AirflowNotFoundException
from kubernetes.config import ConfigException

from orrery.errors import UserError


@contextmanager
def reaching(connection: str | None) -> Iterator[None]:
    """Make the client of a connection within. Raises `UserError` where Airflow has none of it."""
    try:
        yield
    except (ConfigException, AirflowNotFoundException) as e:
        by = f"connection {connection!r}" if connection else "Airflow's own service account"
        raise UserError(
            f"the cluster cannot be reached by {by}: {e}",
            hint="kubernetes.connection in platform.yaml names an Airflow connection of type kubernetes; "
            "without one, Airflow itself runs in the cluster",
        ) from None
