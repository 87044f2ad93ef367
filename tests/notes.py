"""A small knowledge base of its own, driven through the command line and the Dags: for dags/ and faults/."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from orrery.ledger import Ledger
from orrery.store import Manifest, Store

ROOT = Path(__file__).resolve().parents[1]
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
ORRERY = str(VENVS / "airflow" / "bin" / "orrery")
PROJECT, DAY = "notes", "2026-01-05"
CHAIN = ("collect", "chunk", "embed", "index", "evaluate", "gate", "promote")
FRUIT = ("apple", "pear", "plum", "cherry", "quince", "medlar", "peach", "grape", "lemon", "orange")
DAG = """An Airflow Dag file: the runbook of a test."""
# Where pods find the code is where it is here: each is a process of this machine.
SPEC: dict[str, Any] = {
    "version": 1,
    "kind": "knowledge_base",
    "owner": "docs",
    "sources": {
        "guides": {"uri": "documents/guides", "missing": 0.3},
        "team": {"uri": "documents/team", "groups": ["team"], "missing": 1.0},
    },
    "questions": "questions.jsonl",
    # A hash of words finds what shares words; how well is no matter here, only that it gets no worse.
    "gate": {"worse": 0.2},
}


class Notes:
    """Its project, store and ledger below one folder, and the environment that points to them."""

    def __init__(self, home: Path, embedder: Path | None = None) -> None:
        self.home, self.project = home, PROJECT
        self.folder = home / "projects" / PROJECT
        embedder = embedder or tiny(home / "tiny")
        for number, name in enumerate(FRUIT):
            self.page(name, f"The {name} ripens in week {20 + number}.")
        self.document("team/rota.md", "# Rota\n\nThe orchard is watched by the night team on Mondays.\n")
        (self.folder / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "embedder": {"model": str(embedder)}}))
        asked = [
            {
                "id": f"q{number}", "question": f"When does the {name} ripen?", "answerable": True,
                "passages": [{"uri": f"{name}.md", "quote": f"The {name} ripens in week"}],
            }
            for number, name in enumerate(FRUIT[:6])
        ]  # fmt: skip
        asked.append({"id": "q9", "question": "Who may drive the lorry?", "answerable": False, "passages": []})
        (self.folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
        dags = home / "dags"
        dags.mkdir()
        text = f'"""{DAG}"""\n\nfrom orrery.orchestration import lifecycle\n\nlifecycle("{PROJECT}", __doc__)\n'
        (dags / f"{PROJECT}.py").write_text(text)
        self.env = {
            **os.environ,
            "ORRERY_HOME": str(ROOT),
            "ORRERY_VENVS": str(VENVS),
            "ORRERY_PROJECTS": str(home / "projects"),
            "ORRERY_STORE": f"file://{home}/store",
            "ORRERY_LEDGER": f"sqlite:///{home}/ledger.db",
            "ORRERY_CACHE": f"{home}/cache",
            "ORRERY_MLFLOW": "http://127.0.0.1:9",
        }

    @property
    def store(self) -> Store:
        return Store(self.env["ORRERY_STORE"])

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.env["ORRERY_LEDGER"])

    @property
    def live(self) -> dict[str, Any]:
        """What a service would answer from."""
        return dict(json.loads(self.store.read(f"{PROJECT}/live.json")))

    def page(self, name: str, text: str) -> None:
        """Write one page of the guides."""
        self.document(f"guides/{name}.md", f"# The {name}\n\n{text}\n\n## Storing\n\nKeep the {name} cool and dry.\n")

    def document(self, name: str, text: str | None) -> None:
        """Write a document below documents/, or remove it."""
        path = self.folder / "documents" / name
        if text is None:
            path.unlink()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def argv(self, verb: str, *more: str, day: str = DAY) -> list[str]:
        return [ORRERY, "run", PROJECT, verb, "--partition", day, *more]

    def start(self, verb: str, *more: str, day: str = DAY) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv(verb, *more, day=day), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, verb: str, *more: str, day: str = DAY, code: int = 0) -> str:
        return self._done(self.argv(verb, *more, day=day), code)

    def orrery(self, *args: str, code: int = 0) -> str:
        return self._done([ORRERY, *args], code)

    def _done(self, argv: list[str], code: int) -> str:
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{argv[1:]}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def manifest(self, dataset: str, day: str = DAY) -> Manifest:
        found = self.store.latest_manifest(PROJECT, dataset, day)
        assert found is not None, f"no {dataset} for {day}"
        return found


def tiny(folder: Path) -> Path:
    """Write the tests' quick embedder, which takes onnx: in the environment that has it."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import tiny_embedder; from pathlib import Path; tiny_embedder.write(Path(sys.argv[2]))"
    argv = [str(VENVS / "rag" / "bin" / "python"), "-c", code, str(ROOT / "tests" / "rag"), str(folder)]
    subprocess.run(argv, check=True)
    return folder
