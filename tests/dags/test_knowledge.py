"""A knowledge base's Dags as Airflow runs them, by `dag.test()`: true steps in their environment, one run after another."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from notes import CHAIN, DAY, PROJECT, ROOT, Notes

pytestmark = pytest.mark.slow
# Name -> Dag, conf, and what is done to the documents before. One process for all of them.
RUNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown key": ("reindex", {"partition": DAY}, ""),
    "nothing live": ("evaluate", {}, ""),
    "dry run": ("reindex", {"dry_run": True}, ""),
    "first": ("reindex", {"reason": "the first night"}, ""),
    "same": ("reindex", {}, ""),
    "changed": ("reindex", {"reason": "a page changed"}, "change"),
    "lost": ("reindex", {}, "lose"),
    "shrunk": ("reindex", {"partial": True, "reason": "they are gone for good"}, ""),
    "proven anew": ("evaluate", {}, ""),
    "back": ("rollback", {"reason": "a bad page"}, ""),
    "back again": ("rollback", {"version": "9"}, ""),
}
CODE = """
import json, logging, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from airflow.utils.db import initdb
initdb()
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from airflow.dag_processing.bundles.manager import DagBundlesManager
DagBundlesManager().sync_bundles_to_db()
dags, guides = sys.argv[1], Path(sys.argv[3])
bag = DagBag(dags)
assert not bag.import_errors, bag.import_errors
sync_bag_to_db(bag, "dags-folder", None)
from airflow.models.asset import AssetEvent
from airflow.utils.session import create_session
from sqlalchemy import select
def after(run):
    with create_session() as session:
        events = session.scalars(select(AssetEvent).where(AssetEvent.source_run_id == run.run_id))
        return session.get(type(run), run.id).note, sorted([e.asset.uri, e.partition_key] for e in events)
for name, (verb, conf, what) in json.loads(sys.argv[2]).items():
    logging.getLogger("orrery").addHandler(logging.StreamHandler(sys.stdout))
    logging.getLogger("orrery").setLevel(logging.INFO)
    if what == "change":
        page = guides / "apple.md"
        page.write_text(page.read_text().replace("cool and dry", "in the cellar"))
    if what == "lose":
        for page in sorted(guides.glob("*.md"))[-4:]:
            page.unlink()
    print(f"BEGIN {name}", flush=True)
    dag = DagBag(dags).dags[f"notes.{verb}"]
    dag.deadline = []
    run = dag.test(run_conf=conf)
    note, events = after(run)
    tasks = {t.task_id: str(t.state) for t in run.get_task_instances()}
    end = {"state": str(run.state), "tasks": tasks, "note": note, "events": events}
    print("END" + json.dumps(end), flush=True)
"""


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Notes:
    return Notes(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="module")
def runs(notes: Notes) -> dict[str, tuple[dict[str, Any], str]]:
    """Run them all; return for each its end and its log."""
    env = notes.env | {
        "AIRFLOW_HOME": str(notes.home / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(notes.home / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{notes.home}/airflow.db",
    }
    guides = notes.folder / "documents" / "guides"
    argv = [sys.executable, "-c", CODE, str(notes.home / "dags"), json.dumps(RUNS), str(guides)]
    done = subprocess.run(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:]
    found = {}
    for part in done.stdout.split("BEGIN ")[1:]:
        name, _, log = part.partition("\n")
        end = next(line for line in log.splitlines() if line.startswith("END"))
        found[name] = (json.loads(end.removeprefix("END")), log)
    assert list(found) == list(RUNS)
    return found


def ok(runs: dict[str, tuple[dict[str, Any], str]], name: str) -> tuple[dict[str, Any], str]:
    end, log = runs[name]
    assert end["state"] == "success", f"{end}\n{log[-6000:]}"
    return end, log


def test_a_request_that_cannot_be_ends_at_the_first_task(runs: dict) -> None:
    end, log = runs["unknown key"]
    assert end["state"] == "failed" and "unknown key 'partition'" in log and "unknown key" in end["note"]
    end, log = runs["nothing live"]
    assert end["state"] == "failed" and "no live generation yet" in log


def test_a_dry_run_does_nothing(runs: dict) -> None:
    end, log = ok(runs, "dry run")
    assert set(end["tasks"].values()) == {"skipped"} and "would run promote" in log


def test_the_first_night_goes_from_documents_to_a_live_generation(notes: Notes, runs: dict) -> None:
    end, log = ok(runs, "first")
    assert end["tasks"] == dict.fromkeys(CHAIN, "success"), log[-4000:]
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    ((uri, key),) = end["events"]
    assert uri == f"x-orrery://{PROJECT}/live" and key <= today
    assert "gate" in end["note"] and "promote" in end["note"]
    first = notes.ledger.find(PROJECT, "promotion", phase="done")[0]
    assert first.payload["version"] == "1" and first.payload["reason"] == "the first night"
    assert first.payload["evidence"].keys() == {"evaluation", "verdict"}


def test_a_night_on_which_nothing_changed_makes_nothing(runs: dict) -> None:
    end, log = ok(runs, "same")
    assert end["tasks"]["promote"] == "skipped" and end["events"] == []
    for verb in ("chunk", "embed", "index"):
        assert f"{verb} " in log and "unchanged since" in log


def test_a_changed_page_is_embedded_alone_and_goes_live(notes: Notes, runs: dict) -> None:
    end, _ = ok(runs, "changed")
    assert end["tasks"]["promote"] == "success" and len(end["events"]) == 1
    embeds = [e.payload for e in notes.ledger.find(PROJECT, "run") if e.payload["verb"] == "embed"]
    done = [p["metrics"]["embedded"] for p in embeds if not p.get("skipped")]
    assert done[1] == 1, "one passage has changed"


def test_documents_that_vanish_stop_the_run_and_nothing_is_deleted(notes: Notes, runs: dict) -> None:
    end, log = runs["lost"]
    assert end["state"] == "failed" and end["tasks"]["collect"] == "failed"
    assert "guides" in end["note"] and "4" in end["note"], end["note"]
    assert end["tasks"]["promote"] == "upstream_failed"
    end, log = ok(runs, "shrunk")
    assert "gone" in log


def test_the_live_generation_can_be_proven_anew(runs: dict) -> None:
    end, _ = ok(runs, "proven anew")
    assert end["tasks"] == {"evaluate": "success"}


def test_a_rollback_goes_back_to_what_was_live_before(notes: Notes, runs: dict) -> None:
    end, log = ok(runs, "back")
    assert end["tasks"] == {"rollback": "success"} and len(end["events"]) == 1
    stack = notes.ledger.champions(PROJECT)
    assert notes.live["version"] == stack[-1]
    now = notes.ledger.champion(PROJECT)
    assert now is not None and now.model == notes.live["generation"] and now.reason == "a bad page"
    end, log = runs["back again"]
    assert end["state"] == "failed" and "cannot roll back to version '9'" in log


def test_a_file_of_dags_that_is_light(notes: Notes) -> None:
    code = (
        "import sys; from orrery.orchestration import lifecycle; lifecycle('notes', 'a runbook');"
        "print([m for m in ('torch', 'numpy', 'qdrant_edge', 'tokenizers', 'langchain_core', 'openai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=notes.env, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_dag_file_of_the_handbook_names_each_task_in_its_runbook() -> None:
    text = (ROOT / "dags" / "handbook.py").read_text()
    assert all(f"`{verb}`" in text for verb in (*CHAIN, "rollback"))
    assert Path(ROOT / "include" / "projects" / "handbook" / "spec.yaml").is_file()
