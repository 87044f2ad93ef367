"""A house with one knowledge base: its project, documents, store and ledger below one folder; steps run in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orrery import runner, step
from orrery.contract import Result
from orrery.planner import Plan, Request
from orrery.rag.planning import KnowledgePlanner
from orrery.store import Manifest, Store

PROJECT = "notes"
DAY = "2026-01-05"
CHAIN = ("collect", "chunk", "embed", "index", "evaluate", "gate", "promote")
SPEC: dict[str, Any] = {
    "version": 1,
    "kind": "knowledge_base",
    "owner": "docs",
    "sources": {"guides": {"uri": "documents/guides"}, "team": {"uri": "documents/team", "groups": ["team"]}},
}
PLATFORM: dict[str, Any] = {
    "version": 1,
    "environments": {name: {"image": f"orrery/{name}:1"} for name in ("airflow", "rag", "serve")},
    "compute": {"cpu-light": {"cpu": "1"}, "cpu-small": {"cpu": "1"}},
}


@dataclass(frozen=True)
class House:
    """Where everything of one test lies."""

    home: Path

    @property
    def folder(self) -> Path:
        return self.home / "include" / "projects" / PROJECT

    @property
    def store(self) -> Store:
        return Store(f"file://{self.home / 'store'}")

    def planner(self) -> KnowledgePlanner:
        return KnowledgePlanner(PROJECT)

    def document(self, name: str, content: str | bytes | None) -> None:
        """Write a document below documents/, or remove it."""
        path = self.folder / "documents" / name
        if content is None:
            path.unlink()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def questions(self, *lines: Mapping[str, Any]) -> None:
        """Write the labelled questions, and name their file in the spec."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.folder / "questions.jsonl").write_text(text)
        self.spec(questions="questions.jsonl")

    def spec(self, **fields: Any) -> None:
        """Change fields of the spec."""
        file = self.folder / "spec.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **fields}, sort_keys=False))

    def request(self, verb: str, key: str = DAY, *, run: str = "run-1", **options: Any) -> Request:
        return Request(
            PROJECT, verb, (key,), run, verb, actor="tester", reason="a test", options=options, kind="knowledge_base"
        )

    def plan(self, verb: str, key: str = DAY, **options: Any) -> Plan:
        return self.planner().plan(self.request(verb, key, **options))

    def run(self, verb: str, key: str = DAY, *, run: str = "run-1", force: bool = False, **options: Any) -> Result:
        """Carry one verb to its end as the Dags do, but in this process. Raises the error that its result tells."""
        request = replace(self.request(verb, key, run=run, **options), force=force)
        return runner.run(self.planner(), request, self._launch)

    def reindex(self, key: str = DAY, *, run: str = "run-1", until: str = "promote") -> dict[str, Result]:
        """Carry the chain from collect to `until`; return each verb's result."""
        verbs = CHAIN[: CHAIN.index(until) + 1]
        return {verb: self.run(verb, key, run=run) for verb in verbs}

    def manifest(self, dataset: str, key: str = DAY) -> Manifest:
        """Return what counts as a dataset's partition."""
        found = self.store.latest_manifest(PROJECT, dataset, key)
        assert found is not None, f"there is no {dataset} of {key}"
        return found

    def read(self, dataset: str, file: str, key: str = DAY) -> bytes:
        """Return one file of a dataset's partition."""
        return self.store.read(self.manifest(dataset, key).uri(file))

    def _launch(self, plan: Plan) -> int:
        config = plan.config
        code, result = step._guarded(f"{config.store}/{config.folder}/config.json", {})
        self.store.put(f"{config.folder}/result.json", result.model_dump_json().encode())
        return code


def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: Mapping[str, str | bytes], **spec: Any) -> House:
    """Make a house; `documents` by path below documents/ (guides/… or team/…); `spec` overrides fields."""
    house = House(tmp_path / "home")
    house.folder.mkdir(parents=True)
    (house.folder / "spec.yaml").write_text(yaml.safe_dump({**SPEC, **spec}, sort_keys=False))
    for source in ("guides", "team"):
        (house.folder / "documents" / source).mkdir(parents=True)
    for name, content in documents.items():
        house.document(name, content)
    (house.home / "include" / "platform.yaml").write_text(yaml.safe_dump(PLATFORM))
    for name in PLATFORM["environments"]:
        pins = house.home / "docker" / name / "requirements.txt"
        pins.parent.mkdir(parents=True)
        pins.write_text("")
    for name in ("ORRERY_PLATFORM", "ORRERY_PROJECTS", "ORRERY_QDRANT", "MLFLOW_TRACKING_URI", "ORRERY_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ORRERY_HOME", str(house.home))
    monkeypatch.setenv("ORRERY_STORE", house.store.uri)
    monkeypatch.setenv("ORRERY_LEDGER", f"sqlite:///{house.home / 'ledger.db'}")
    return house
