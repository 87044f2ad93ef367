"""A project's whole loop through the command line, in a folder of its own: for projects/ and faults/."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from orrery.ledger import Ledger
from orrery.store import Manifest, Store

ROOT = Path(__file__).resolve().parents[1]
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
PROJECT = "house_energy"
DAYS = tuple(f"2025-01-{d:02d}" for d in range(6, 10))
WINDOW = f"{DAYS[0]}..{DAYS[-1]}"
NEXT = "2025-01-10"
ORRERY = str(VENVS / "airflow" / "bin" / "orrery")


class Loop:
    """One store, ledger and data folder, and the environment that points to them."""

    def __init__(
        self, home: Path, mlflow: str, project: str = PROJECT, projects: Path = ROOT / "tests" / "projects"
    ) -> None:
        self.home, self.project = home, project
        data = home / "data" / "readings"
        code = "import sys; sys.path.insert(0, sys.argv[1]); import house_energy_data as h; from pathlib import Path; h.land(Path(sys.argv[2]), 5, houses=120)"
        subprocess.run([str(VENVS / "ml" / "bin" / "python"), "-c", code, str(ROOT / "tests"), str(data)], check=True)
        self.env = {
            **os.environ,
            "ORRERY_HOME": str(ROOT),
            "ORRERY_VENVS": str(VENVS),
            "ORRERY_PROJECTS": str(projects),
            "ORRERY_STORE": f"file://{home}/store",
            "ORRERY_LEDGER": f"sqlite:///{home}/ledger.db",
            "ORRERY_DATA": f"file://{home}/data",
            "ORRERY_FEAST": f"{home}/feast",
            "ORRERY_CACHE": f"{home}/cache",
            "ORRERY_MLFLOW": mlflow,
        }

    @property
    def store(self) -> Store:
        return Store(self.env["ORRERY_STORE"])

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.env["ORRERY_LEDGER"])

    def argv(self, verb: str, key: str, *more: str) -> list[str]:
        scope = "--window" if ".." in key else "--partition"
        return [ORRERY, "run", self.project, verb, scope, key, *more]

    def start(self, verb: str, key: str, *more: str) -> subprocess.Popen[str]:
        argv = self.argv(verb, key, *more)
        return subprocess.Popen(
            argv, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def run(self, verb: str, key: str, *more: str, code: int = 0) -> str:
        done = subprocess.run(self.argv(verb, key, *more), env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{verb} {key}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def orrery(self, *args: str, code: int = 0) -> str:
        done = subprocess.run([ORRERY, *args], env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def manifest(self, dataset: str, key: str) -> Manifest:
        found = self.store.latest_manifest(self.project, dataset, key)
        assert found is not None, f"no {dataset} for {key}"
        return found

    def data(self, days: tuple[str, ...] = DAYS) -> None:
        """Bring days in: ingest, validate, materialize."""
        window = f"{days[0]}..{days[-1]}"
        for verb in ("ingest", "validate", "materialize"):
            self.run(verb, window)

    def release(self) -> str:
        """Train, evaluate, gate, register and promote; return the model version."""
        for verb in ("train", "evaluate", "gate"):
            self.run(verb, WINDOW)
        version = registered(self.run("register", WINDOW))
        self.run("promote", WINDOW, "--version", version)
        return version


def registered(output: str) -> str:
    """Return the model version that `orrery run … register` printed."""
    found = re.search(r"version (\d+)", output)
    assert found, output
    return found.group(1)
