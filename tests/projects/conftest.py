"""One loop for the tests of the second project."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loop import Loop
from mlflow_house import mlflow_server


@pytest.fixture(scope="session")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    home = tmp_path_factory.mktemp("loop")
    with mlflow_server(home / "mlflow") as address:
        yield Loop(home, address)
