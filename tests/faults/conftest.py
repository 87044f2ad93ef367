"""One MLflow server for the fault tests; each test has a loop of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mlflow_house import mlflow_server


@pytest.fixture(scope="session")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address
