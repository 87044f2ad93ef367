"""The Dags as Airflow runs them, by `dag.test()`: true steps in their environments, on the second project's data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loop import DAYS, PROJECT, ROOT, Loop
from mlflow_house import mlflow_server

pytestmark = pytest.mark.slow

GOOD, BAD = DAYS[0], DAYS[3]
WINDOW = f"{DAYS[0]}..{DAYS[2]}"
# Name -> Dag and conf, in this order. One process for all of them: Airflow takes longer to start than they to run.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown key": ("ingest", {"partition": GOOD, "partitoin": "x"}),
    "shell fragment as a key": ("ingest", {"partition": GOOD, "$(touch pwned)": "x"}),
    "no partition": ("ingest", {}),
    "dry run": ("ingest", {"partition": GOOD, "dry_run": True}),
    "first": ("ingest", {"partition": GOOD, "reason": "a test"}),
    "second": ("ingest", {"partition": GOOD}),
    "bad data": ("ingest", {"partition": BAD}),
    "no champion": ("score", {"partition": GOOD}),
    "second day": ("ingest", {"partition": DAYS[1]}),
    "third day": ("ingest", {"partition": DAYS[2]}),
    "promoted": ("train", {"window": WINDOW, "reason": "the first"}),
    "kept": ("train", {"window": WINDOW, "reason": "again"}),
    "scored": ("score", {"partition": GOOD}),
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
bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
sync_bag_to_db(bag, "dags-folder", None)
from airflow.models.asset import AssetEvent
from airflow.utils.session import create_session
from sqlalchemy import select
def after(run):
    with create_session() as session:
        events = session.scalars(select(AssetEvent).where(AssetEvent.source_run_id == run.run_id))
        note = session.get(type(run), run.id).note
        return note, sorted([e.asset.uri, e.partition_key] for e in events)
store = Path(sys.argv[3])
for name, (verb, conf) in json.loads(sys.argv[2]).items():
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger("orrery").addHandler(handler)
    logging.getLogger("orrery").setLevel(logging.INFO)
    print(f"BEGIN {name}", flush=True)
    # A fresh bag each time: dag.test() writes a run's conf into the params of the Dag object itself.
    dag = DagBag(sys.argv[1]).dags[f"house_energy.{verb}"]
    dag.deadline = []  # dag.test() looks for a deadline in the database, where it has not put it (Airflow 3.3)
    run = dag.test(run_conf=conf)
    tasks = {t.task_id: str(t.state) for t in run.get_task_instances()}
    committed = sorted(p.parts[-3] for p in store.glob("*/*/manifest.json"))
    note, events = after(run)
    end = {"state": str(run.state), "tasks": tasks, "committed": committed, "note": note, "events": events}
    print("END" + json.dumps(end), flush=True)
"""


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield Loop(tmp_path_factory.mktemp("dags"), address)


@pytest.fixture(scope="module")
def runs(loop: Loop) -> dict[str, tuple[dict[str, Any], str]]:
    """Run them all; return for each its end and its log."""
    bad = Path(loop.env["ORRERY_DATA"].removeprefix("file://")) / "readings" / f"{BAD}.csv"
    bad.write_text(bad.read_text().replace(",gas,", ",coal,"))
    folder = ROOT / "tests" / "projects" / "dags"
    env = loop.env | {
        "AIRFLOW_HOME": str(loop.home / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{loop.home}/airflow.db",
    }
    argv = [sys.executable, "-c", CODE, str(folder), json.dumps(RUNS), str(loop.home / "store" / PROJECT)]
    done = subprocess.run(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
    found = {}
    for part in done.stdout.split("BEGIN ")[1:]:
        name, _, log = part.partition("\n")
        end = next(line for line in log.splitlines() if line.startswith("END"))
        found[name] = (json.loads(end.removeprefix("END")), log)
    assert list(found) == list(RUNS)
    return found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unknown key", "unknown key 'partitoin'"),
        ("shell fragment as a key", "unknown key"),
        ("no partition", "names no partition"),
    ],
)
def test_a_hostile_or_empty_request_ends_at_the_first_task(loop: Loop, runs: dict, name: str, said: str) -> None:
    end, log = runs[name]
    assert end["state"] == "failed"
    assert said in log
    assert said in end["note"]
    assert end["committed"] == []
    assert not list(loop.home.rglob("pwned")) and not list(ROOT.glob("pwned"))


def test_a_dry_run_says_what_it_would_do_and_does_nothing(runs: dict) -> None:
    end, log = runs["dry run"]
    assert end["state"] == "success" and set(end["tasks"].values()) == {"skipped"}
    assert "would run materialize" in log
    assert end["committed"] == []


def test_a_partition_goes_through_ingest_and_a_second_time_it_is_skipped(runs: dict) -> None:
    end, log = runs["first"]
    assert end["state"] == "success", log[-4000:]
    assert end["committed"] == ["ingest", "materialize", "validate"]
    assert end["events"] == [[f"x-orrery://{PROJECT}/features", GOOD], [f"x-orrery://{PROJECT}/raw", GOOD]]
    end, log = runs["second"]
    assert end["state"] == "success"
    assert f"materialize {GOOD}: skipped, unchanged since" in log
    assert end["committed"] == ["ingest", "materialize", "validate"]


def test_scoring_without_a_champion_is_green_and_says_so(runs: dict) -> None:
    end, log = runs["no champion"]
    assert end["state"] == "success" and end["tasks"] == {"score": "skipped"}
    assert "has no champion yet" in log
    assert "no champion yet" in end["note"]
    assert end["events"] == []  # nothing was scored, so nobody may hear of scores


def test_a_training_ends_in_a_promotion_that_others_hear_of(loop: Loop, runs: dict) -> None:
    end, log = runs["promoted"]
    assert end["state"] == "success", log[-4000:]
    assert set(end["tasks"].values()) == {"success"}
    assert f"gate {WINDOW}: promote" in end["note"] and "better than the baseline" in end["note"]
    assert [f"x-orrery://{PROJECT}/champion", DAYS[2]] in end["events"]
    champion = loop.ledger.champion(PROJECT)
    assert champion is not None and champion.reason == "the first"


def test_a_refused_candidate_is_a_green_run_with_a_note_and_no_champion_event(loop: Loop, runs: dict) -> None:
    end, log = runs["kept"]
    assert end["state"] == "success", log[-4000:]
    assert end["tasks"]["gate"] == "success"
    assert end["tasks"]["register"] == end["tasks"]["promote"] == "skipped"
    assert f"gate {WINDOW}: kept" in end["note"] and "not better than the champion" in end["note"]
    assert f"x-orrery://{PROJECT}/champion" not in [uri for uri, _ in end["events"]]
    assert len(loop.ledger.find(PROJECT, "promotion", phase="done")) == 1


def test_scores_are_announced_by_partition(runs: dict) -> None:
    end, log = runs["scored"]
    assert end["state"] == "success", log[-4000:]
    assert end["events"] == [[f"x-orrery://{PROJECT}/scores", GOOD]]


def test_bad_data_fail_at_once_with_a_message_and_data_docs(loop: Loop, runs: dict) -> None:
    end, log = runs["bad data"]
    assert end["tasks"]["validate"] == "failed"
    assert "heating" in log and "coal" in log
    assert f"validate {BAD}:" in end["note"] and "coal" in end["note"]
    assert list((loop.home / "store" / PROJECT / "runs").rglob("data_docs/index.html"))
