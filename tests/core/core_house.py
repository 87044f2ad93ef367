"""A house of its own for every test: home, projects, store, ledger and environments below one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orrery import runner
from orrery.bundle import push
from orrery.contract import Result, StepConfig
from orrery.ledger import Ledger
from orrery.local import LocalProcess
from orrery.log import configure as log_setup
from orrery.plan import Planner, Request
from orrery.step import attempt
from orrery.store import File, Manifest, Ref, Store, content_digest

ROOT = Path(__file__).resolve().parents[2]
DRIVE = Path(__file__).resolve().parent / "drive.py"
SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {column: late}
sources:
  flights: {uri: "${data}/flights/{partition}.parquet", partition: month}
  weather: {uri: "${data}/weather/{partition}.parquet", partition: month}
checks:
  unique: id
  distance: {between: [0, 6000]}
  weather:
    temp: {nulls: 0.1}
gate:
  auc: {min: 0.7}
  disparity: {by: carrier, max: 0.1}
retrain: {on: [drift]}
"""
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
compute:
  cpu-small: {cpu: "1"}
"""


@dataclass(frozen=True)
class House:
    """Where everything of one test lies. `uri` is the store's."""

    home: Path
    uri: str
    project: str = "delays"

    @property
    def folder(self) -> Path:
        return self.home / "include" / "projects" / self.project

    @property
    def store(self) -> Store:
        return Store(self.uri)

    @property
    def marks(self) -> Path:
        return self.home / "marks"

    def planner(self) -> Planner:
        return Planner(self.project)

    def request(self, verb: str = "probe", *keys: str, **kwargs: Any) -> Request:
        values: dict[str, Any] = {"run": "run-1", "task": verb, **kwargs}
        return Request(self.project, verb, keys or ("2013-01",), **values)

    def config(self, attempt: int = 1, *, run: str = "run-1", publish: bool = True, **options: Any) -> StepConfig:
        """Return the planned config of a `probe` with these params; marks go to this house."""
        options.setdefault("marks", str(self.marks))
        plan = self.planner().plan(self.request(run=run, attempt=attempt, options=options))
        if plan.packed:
            push(self.store, plan.packed)
        return plan.config.model_copy(update={"publish": publish})

    def put(self, config: StepConfig) -> list[str]:
        """Write a config document; return the step's arguments."""
        self.store.put(f"{config.folder}/config.json", config.model_dump_json().encode())
        base = f"{config.store}/{config.folder}"
        return ["orrery", "step", "--config", f"{base}/config.json", "--result", f"{base}/result.json"]

    def start(self, config: StepConfig) -> subprocess.Popen[str]:
        """Start an attempt as a process of its own."""
        argv = [sys.executable, str(DRIVE), *self.put(config)]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def step(self, config: StepConfig) -> tuple[int, Result, str]:
        """Run an attempt as a process; return exit code, result document and log."""
        process = self.start(config)
        out, _ = process.communicate(timeout=120)
        return process.returncode, self.result(config), out

    def fork(self, config: StepConfig, result: str = "") -> int:
        """Start an attempt in a fork, which has imported all already; return its process number."""
        argv = self.put(config)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                log = os.open(self.home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout = sys.stderr = os.fdopen(log, "w")
                log_setup()
                code = attempt(argv[3], result or argv[5], time.time())
            finally:
                os._exit(code)
        return child

    def tell(self, config: StepConfig, result: str = "") -> tuple[int, Result | None]:
        """Run an attempt in a fork; return exit code and result document."""
        code = ended(self.fork(config, result))
        return code, None if result else self.result(config)

    def result(self, config: StepConfig) -> Result:
        return Result.model_validate_json(self.store.read(f"{config.folder}/result.json"))

    def manifests(self, verb: str = "probe") -> list[Manifest]:
        """Return every committed output of a verb."""
        folder = f"{self.project}/{verb}"
        found = (self.store.manifest(f"{folder}/{a}/manifest.json") for a in self.store.names(folder))
        return [m for m in found if m is not None]

    def commit(
        self, verb: str, dataset: str, key: str, *, inputs: Mapping[str, tuple[Ref, ...]] | None = None, **result: Any
    ) -> Manifest:
        """Commit and publish an output made up by the test; its content is its key and `result`."""
        address = content_digest({"x": File(path="x", size=0, sha256=f"{verb}{key}{result}{inputs}")})[:32]
        data = json.dumps([key, result]).encode()
        self.store.put(f"{self.project}/{verb}/{address}/a1/out.json", data)
        files = {"out.json": File(path="a1/out.json", size=len(data), sha256=f"{key}{result}")}
        manifest = Manifest(
            project=self.project, verb=verb, key=key, address=address, files=files,
            digest=content_digest(files), inputs=dict(inputs or {}), result=result, created="2013-01-01T00:00:00.000+00:00",
        )  # fmt: skip
        self.store.put_if_absent(manifest.path, manifest.model_dump_json().encode())
        self.store.publish(self.project, dataset, key, manifest, manifest.created)
        return manifest

    def verdict(
        self, window: str, verdict: str = "promote", version: str = "1", champion: Manifest | None = None
    ) -> Manifest:
        """Commit candidate, evaluation (against a champion) and verdict of a window, register it; return the candidate."""
        features = self.commit("materialize", "features", window.partition("..")[0])
        candidate = self.commit("train", "candidate", window, inputs={"features": (features.ref,)})
        measured = {"candidate": (candidate.ref,)} | ({"champion": (champion.ref,)} if champion else {})
        evaluation = self.commit("evaluate", "evaluation", window, inputs=measured)
        inputs = {"evaluation": (evaluation.ref,)}
        self.commit("gate", "verdict", window, inputs=inputs, verdict=verdict, reasons=["auc 0.8 is above 0.7"])
        payload = {"verb": "register", "version": version, "model": candidate.path}
        Ledger(os.environ["ORRERY_LEDGER"]).record(
            self.project, "run", f"{self.project}/{window}", "done", "t", payload
        )
        return candidate


def go(house: House, launch: runner.Launcher | None = None, attempt: int = 1, **options: object) -> Result:
    """Carry one step to its end and into the ledger."""
    options.setdefault("marks", str(house.marks))
    request = house.request(attempt=attempt, options=options, actor="eve", reason="because")
    return runner.run(house.planner(), request, launch or LocalProcess(on_line=lambda line: None))


def ended(child: int) -> int:
    """Wait for a fork; return its exit code (negative: the signal)."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def build(home: Path, spec: str = SPEC) -> House:
    """Make a house's files."""
    house = House(home, f"file://{home}/store")
    for folder in (house.folder, house.marks, home / "dags", home / "venvs" / "airflow" / "bin"):
        folder.mkdir(parents=True)
    (house.folder / "spec.yaml").write_text(spec)
    (house.folder / "features.py").write_text("ANSWER = 42\n")
    (home / "include" / "platform.yaml").write_text(PLATFORM)
    for environment in ("airflow", "ml", "spark"):
        pins = home / "docker" / environment / "requirements.txt"
        pins.parent.mkdir(parents=True)
        pins.write_text(f"# {environment}\nnumpy==2.0\n")
    python = home / "venvs" / "airflow" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {DRIVE} "$@"\n')
    python.chmod(0o755)
    return house


def environment(house: House) -> dict[str, str]:
    """Return the variables that make everything stay in the house."""
    return {
        "ORRERY_HOME": str(house.home),
        "ORRERY_PROJECTS": str(house.home / "include" / "projects"),
        "ORRERY_PLATFORM": str(house.home / "include" / "platform.yaml"),
        "ORRERY_STORE": house.uri,
        "ORRERY_LEDGER": f"sqlite:///{house.home}/ledger.db",
        "ORRERY_DATA": f"file://{house.home}/upstream",
        "ORRERY_VENVS": str(house.home / "venvs"),
        "ORRERY_LOG": "text",
        "HOME": os.environ.get("HOME", str(house.home)),
    }
