"""The note on a run, and the buttons on its tasks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from orrery.contract import Result
from orrery.ledger import Ledger


def test_what_a_person_wrote_stays_and_ours_is_written_anew() -> None:
    from orrery.orchestration.notes import MAX_LENGTH, merged

    red = merged("look at this, Ada", "validate 2013-02: a check fails")
    green = merged(red, "ingest 2013-02: done")
    # The UI shows the first line.
    assert green.splitlines() == ["ingest 2013-02: done", "— Orrery", "look at this, Ada"]
    assert merged(merged(None, "x"), "y") == merged("", "y") == "y\n— Orrery"
    assert len(merged("a" * 5000, "b" * 5000)) == MAX_LENGTH


def test_a_note_tells_how_each_step_ended_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orrery.orchestration.notes import note

    monkeypatch.setenv("ORRERY_LEDGER", f"sqlite:///{tmp_path}/ledger.db")
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")

    def record(attempt: int, status: str, **more: object) -> None:
        payload = {"verb": "score", "key": "2013-04", "status": status, "verdict": None, "skipped": None, **more}
        ledger.record("flight_delay", "run", f"flight_delay/runs/r/score-2013-04/{attempt}", "done", "ada", payload)

    record(1, "try_again", error="the store does not answer")
    assert note("flight_delay", "r") == "score 2013-04: the store does not answer"
    record(2, "done", reasons=["28,330 rows"])
    assert note("flight_delay", "r") == "score 2013-04: done\n- 28,330 rows"
    assert note("flight_delay", "another") == ""
    # Refused before it was known on what, then tried again: only the end counts.
    refused = {"verb": "ingest", "key": "", "status": "try_again", "error": "the store does not answer"}
    ledger.record("flight_delay", "run", "flight_delay/runs/s/ingest-/1-unstarted", "done", "ada", refused)
    assert note("flight_delay", "s") == "ingest: the store does not answer"
    done = {"verb": "ingest", "key": "2013-04", "status": "done", "verdict": None, "skipped": None, "reasons": []}
    ledger.record("flight_delay", "run", "flight_delay/runs/s/ingest-2013-04/2", "done", "ada", done)
    assert note("flight_delay", "s") == "ingest 2013-04: done"


def test_a_note_tells_what_the_attempts_before_came_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orrery.attempts import Attempt
    from orrery.goodput import Progress
    from orrery.orchestration.notes import note

    monkeypatch.setenv("ORRERY_LEDGER", f"sqlite:///{tmp_path}/ledger.db")
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    came = Progress(began=0, now=1, step=130, committed=100, total=500, step_s=2.0)
    more = {"compute": "cpu-large", "placed": "8 min are left"}
    for number, cause, rest in (
        (1, "interrupted", {"progress": came}),
        (2, "lost", {}),
        (3, "lost", {}),
        (4, None, more),
    ):
        attempt = Attempt(number=number, cause=cause, started="2026-01-01T00:00:00+00:00", **rest)  # type: ignore[arg-type]
        payload = {"verb": "train", "key": "w", "status": "bug" if cause else "done", "verdict": None, "skipped": None}
        payload |= {"attempt": attempt.model_dump(mode="json"), "folder": "f"} | ({"error": "x"} if cause else {})
        ledger.record("p", "run", f"p/runs/r/train-w/{number}", "done", "ada", payload)
    assert note("p", "r") == (
        "train w: 4 attempts: interrupted 1 time, lost 2 times, 60 s of work lost; on cpu-large: 8 min are left"
    )


def test_buttons_point_to_mlflow_or_to_the_evidence_of_the_dag() -> None:
    from orrery.orchestration.links import urls

    links = {"MLflow run": "http://127.0.0.1:5500/#/x", "Data Docs": "p/runs/a b/1/evidence/data_docs/index.html"}
    assert urls(Result(links={**links, "private": "p/x"}), "p.ingest") == {
        "link_mlflow_run": "http://127.0.0.1:5500/#/x",
        "link_data_docs": "/orrery/evidence/p.ingest/p/runs/a%20b/1/evidence/data_docs/index.html",
    }


@pytest.mark.parametrize(
    ("verb", "key", "url"),
    [
        ("validate", "link_data_docs", "/orrery/evidence/p.d/p/runs/r/t-k/1/evidence/data_docs/index.html"),
        ("evaluate", "link_curves", "/orrery/evidence/p.d/p/runs/r/t-k/1/evidence/curves.html"),
        ("report", "link_evidently_report", "/orrery/evidence/p.d/p/runs/r/t-k/1/evidence/evidently.html"),
        ("train", "link_mlflow_run", "/orrery/mlflow/p.d/run/p/runs/r/t-k/1"),
        ("train", "link_attempts", "/dags/p.d/runs/manual__2013-04-02T06%3A10%2B00%3A00/plugin/orrery-verdict"),
        ("promote", "link_mlflow_model", "/orrery/mlflow/p.d/version/p/runs/r/t-k/1"),
        ("gate", "link_verdict", "/dags/p.d/runs/manual__2013-04-02T06%3A10%2B00%3A00/plugin/orrery-verdict"),
        ("monitor", "link_health", "/orrery/evidence/p.d/p/runs/r/t-k/1/evidence/health.html"),
        ("monitor", "link_verdict", "/dags/p.d/runs/manual__2013-04-02T06%3A10%2B00%3A00/plugin/orrery-verdict"),
    ],
)
def test_a_button_has_its_url_when_its_step_is_launched(
    verb: str, key: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orrery.orchestration import operators

    pushed: dict[str, str] = {}
    context = {
        "ti": SimpleNamespace(xcom_push=lambda key, value: pushed.update({key: value})),
        "dag_run": SimpleNamespace(dag_id="p.d", run_id="manual__2013-04-02T06:10+00:00"),
    }

    def run(planner, request, launch, started) -> Result:
        started(SimpleNamespace(config=SimpleNamespace(folder="p/runs/r/t-k/1")))
        assert pushed[key] == url  # the step would be launched now
        return Result()

    monkeypatch.setattr(operators, "run", run)
    task = operators.StepOperator(task_id=verb, project="p", verb=verb)
    monkeypatch.setattr(type(task), "_make_launcher", lambda *a: None)
    monkeypatch.setattr(type(task), "_next_attempt", lambda self, context, planner, request: request)
    task._one(context, None, None)
    assert pushed[key] == url


@pytest.mark.parametrize(
    ("verb", "on"), [("validate", set()), ("train", {"link_attempts"}), ("gate", {"link_verdict"})]
)
def test_a_step_that_is_skipped_has_no_button_for_what_it_does_not_make(
    verb: str, on: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orrery.orchestration import operators

    pushed: dict[str, str] = {}
    context = {
        "ti": SimpleNamespace(xcom_push=lambda key, value: pushed.update({key: value})),
        "dag_run": SimpleNamespace(dag_id="p.d", run_id="r"),
    }
    monkeypatch.setattr(operators, "run", lambda planner, request, launch, started: Result(skipped="unchanged"))
    task = operators.StepOperator(task_id=verb, project="p", verb=verb)
    monkeypatch.setattr(type(task), "_make_launcher", lambda *a: None)
    monkeypatch.setattr(type(task), "_next_attempt", lambda self, context, planner, request: request)
    task._one(context, None, SimpleNamespace(key="k"))
    assert set(pushed) == on


def test_buttons_survive_the_storing_of_a_dag() -> None:
    from airflow.dag_processing.dagbag import DagBag
    from airflow.serialization.serialized_objects import DagSerialization

    root = Path(__file__).resolve().parents[2]
    for dag, task, name in (("train", "train", "MLflow run"), ("ingest", "validate", "Data Docs")):
        whole = DagBag(str(root / "dags")).dags[f"flight_delay.{dag}"]
        stored = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(whole))))
        assert name in stored.get_task(task).extra_links
