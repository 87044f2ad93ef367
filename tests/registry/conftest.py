"""What the registry's tests share: a real MLflow server, and releases to register and promote."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

# The planted rows and models are evaluation's.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "evaluation"))

from mlflow_house import free_port, mlflow_server
from planted import HOLDOUT, House, linear, rows

from orrery.contract import Result
from orrery.data.tables import write_parquet
from orrery.evaluation import exported, holdout
from orrery.registry import tracking
from orrery.registry.client import Mlflow
from orrery.store import Manifest


@pytest.fixture(scope="session")
def mlflow_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address, one server for the session."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture
def server(mlflow_address: str, monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    """The server, named to the steps as the engine does."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_address)
    for name in ("ANSWER_S", "LIVE_S"):  # its SQLite waits for a disk that others keep busy
        monkeypatch.setattr(tracking, name, 60.0)
    return Mlflow(mlflow_address)


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address at which nothing listens."""
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@dataclass
class Release:
    """A house whose candidate passed the gate; its project has a name of its own, the server is shared."""

    house: House
    features: Manifest

    def candidate(self, address: str = "c1", b: float = 1.0, verdict: str = "promote") -> dict[str, list[Manifest]]:
        """Commit a candidate, its predictions and a verdict; return the inputs of register and promote.

        As evaluate and gate would, without their figures and timings: `measured` runs those.
        """
        house, training = self.house, self._training(address, b)
        model = exported.load(lambda m, n: Path(house.store.full(m.uri(n))), training, "planted")
        table = holdout.read([Path(house.store.full(self.features.uri("features.parquet")))], HOLDOUT.isoformat())
        file = house.root / f"{address}.parquet"
        write_parquet(table.select(["key"]).append_column("candidate", pa.array(model.predict(table))), file)
        result = {"verdict": verdict, "metrics": {"auc": 0.75}}
        evaluation = house.commit(
            "evaluate",
            f"e-{address}",
            {"predictions.parquet": file.read_bytes(), "report.json": b'{"task":"binary"}'},
            inputs={"features": (self.features.ref,), "candidate": (training.ref,)},
        )
        decided = house.commit("gate", f"v-{address}", {"verdict.json": b"{}"}, result=result)
        return {"candidate": [training], "evaluation": [evaluation], "verdict": [decided]}

    def measured(self, address: str = "c1") -> dict[str, list[Manifest]]:
        """Like `candidate`, by evaluate and gate themselves."""
        training = self._training(address, 1.0)
        _, evaluation, _ = self.house.evaluate(training, [self.features], address=f"e-{address}")
        verdict = self.house.store.manifest(str(self.house.gate(evaluation, f"v-{address}").output))
        assert verdict is not None
        return {"candidate": [training], "evaluation": [evaluation], "verdict": [verdict]}

    def _training(self, address: str, b: float) -> Manifest:
        return self.house.candidate(linear({"a": 1.0, "b": b}, categories=["c"]), [self.features], address)

    def register(self, inputs: dict[str, list[Manifest]]) -> Result:
        """Register a candidate."""
        return self.house.run("register", inputs, {"actor": "ann", "reason": "drift"})

    def promote(self, inputs: dict[str, list[Manifest]], version: str, previous: str | None = None) -> Result:
        """Promote a version."""
        params = {"version": version, "previous": previous, "actor": "ann", "reason": "drift"}
        return self.house.run("promote", inputs, params)


@pytest.fixture
def release(tmp_path: Path, request: pytest.FixtureRequest) -> Release:
    """A release of a project of this test's own."""
    house = House(tmp_path, project=f"t{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}")
    return Release(house, house.features(rows(2000)))
