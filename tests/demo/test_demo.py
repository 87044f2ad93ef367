"""`make demo` as a newcomer runs it: real flights through real servers; then once more, with something wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from mlflow_house import free_port

from orrery import requests, servers
from orrery.airflow_api import AirflowApi
from orrery.ledger import Ledger
from orrery.servers import config, processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
VENVS = Path(os.environ.get("ORRERY_VENVS") or ROOT / ".venvs")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a home of its own, as a fresh clone would be; nothing is left running in it."""
    home = tmp_path_factory.mktemp("demo")
    for part in ("dags", "plugins", "include", "docker"):
        shutil.copytree(ROOT / part, home / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "airflow_settings.yaml", home)
    yield home
    for name in servers.SERVERS:
        processes.end(partial(processes.family, config.marker(home, name)), grace=5)


@pytest.fixture(scope="module")
def env(home: Path) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("ORRERY_", "AIRFLOW_", "MLFLOW_"))}
    ports = {"ORRERY_AIRFLOW_PORT": str(free_port()), "ORRERY_MLFLOW_PORT": str(free_port())}
    return {**own, **ports, "ORRERY_HOME": str(home), "ORRERY_VENVS": str(VENVS), "COLUMNS": "120"}


def demo(home: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(home / "include" / "demo" / "demo.py")]
    return subprocess.run(argv, env=env, cwd=home, capture_output=True, text=True, check=False, timeout=900)


def test_the_demo(home: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    done = demo(home, env)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((home / "var" / "demo" / "report.json").read_text())
    scored = report["scored"]
    assert report["verdict"] == "promote"
    assert scored["auc"] >= 0.73 and scored["auc"] > scored["baseline_auc"]
    assert scored["rows_scored"] == scored["rows"] == 28_330
    verbs = {s["verb"] for s in report["steps"]}
    assert verbs >= {"ingest", "validate", "materialize", "train", "evaluate", "gate", "register", "promote", "score"}
    assert verbs >= {"monitor", "report", "request"}
    # April kept what the model had promised; a training on four months was asked for, and had to be better.
    assert report["monitor"]["verdict"] == "none"
    assert abs(report["monitor"]["metrics"]["observed"] - scored["auc"]) < 1e-6
    assert report["request"]["window"] == "2013-01..2013-04" and report["request"]["by"] == "flight_delay.monitor"
    assert report["retrained"]["verdict"] in ("kept", "promote") and report["retrained"]["reasons"]
    for said in (
        "champion version 1",
        "verdict on the first model: promote",
        "monitor of 2013-04: none",
        "28,330 of 28,330 rows",
        "import",
        "sign in to Airflow as",
    ):
        assert said in done.stdout, said
    password = json.loads((home / "var" / "airflow" / "passwords.json").read_text())["admin"]
    assert password not in done.stdout + done.stderr
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with AirflowApi.of(home) as api:
        train = api.run("flight_delay.train", report["runs"]["train"])
        # Files landed, and all the rest came of it: the sensor found each month once and is named in the request.
        ingests = [run for run in api.runs("flight_delay.ingest") if run.run_id.startswith("watch__")]
        months = [run.conf["partition"] for run in sorted(ingests, key=lambda run: str(run.started))]
        assert months == ["2013-01", "2013-02", "2013-03", "2013-04"] and len(api.runs("flight_delay.ingest")) == 4
        asked = requests.find(Ledger(f"sqlite:///{home}/var/ledger.db"), "flight_delay", "2013-01..2013-03")
        assert [request.source for request in asked] == ["sensor"]
        # The list of runs alone tells what came of it.
        assert train.partition_key == "2013-01..2013-03"
        assert "gate 2013-01..2013-03: promote" in str(train.note)
        assert api.xcom(train, "train", "link_mlflow_run").startswith(config.url("mlflow"))


def test_what_fails_ends_it_with_the_log(home: Path, env: dict[str, str]) -> None:
    """On the same servers, after a bound has become too strict: an exit code, the reason, and no old report."""
    spec = home / "include" / "projects" / "flight_delay" / "spec.yaml"
    spec.write_text(spec.read_text().replace("min_rows: 10000\n", "min_rows: 90000\n"))
    done = demo(home, env)
    assert done.returncode == 64
    said = done.stdout + done.stderr
    assert "flight_delay.ingest 2013-01 failed" in said
    assert "rows [90000, 100000]: 27,004 rows" in said
    assert not (home / "var" / "demo" / "report.json").exists()


def test_down_leaves_nothing_running(home: Path, env: dict[str, str]) -> None:
    argv = [str(VENVS / "airflow" / "bin" / "orrery"), "down"]
    done = subprocess.run(argv, env=env, cwd=home, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in servers.SERVERS:
        assert not list(processes.family(config.marker(home, name)))
