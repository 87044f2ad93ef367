"""A real MLflow server on loopback, one for the session, with SQLite and artifacts in a temporary folder."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

# The planted rows and models are evaluation's.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "evaluation"))

from planted import HOLDOUT, House, linear, rows

from orrery.contract import Result
from orrery.data.tables import write_parquet
from orrery.evaluation import exported, holdout
from orrery.registry.client import Mlflow
from orrery.store import Manifest

START_S = 180


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    argv = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--workers", "1", "--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(argv, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}", server, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(server)


def _wait(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"MLflow did not start:\n{log.read_text()[-3000:]}")


def _end(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture
def server(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    """The server, named to the steps as the engine does."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return Mlflow(mlflow_server)


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
