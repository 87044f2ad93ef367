"""`evaluate` and `gate` as whole steps: real documents, a real index, a quick embedder."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import rag_house
import tiny_embedder
from rag_house import DAY, PROJECT, House

from orrery.errors import UserError
from orrery.rag import evaluate
from orrery.rag.abstention import open_calibration
from orrery.rag.gate import QUALITY
from orrery.rag.questions import Labels, Question
from orrery.rag.retrieval import Found

SUBJECTS = [
    "anchor",
    "basket",
    "candle",
    "dragon",
    "engine",
    "feather",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "magnet",
    "needle",
    "orchid",
    "pencil",
    "quarry",
    "ribbon",
    "saddle",
    "tunnel",
    "umbrella",
    "violin",
    "window",
    "yellow",
]
STRANGE = [
    "zebra",
    "walrus",
    "pepper",
    "tomato",
    "guitar",
    "rocket",
    "carpet",
    "monkey",
    "planet",
    "silver",
    "butter",
    "throne",
]
NEXT = "2026-01-06"


def documents() -> dict[str, str]:
    told = {
        f"guides/{name}.md": f"# The {name}\n\nThe {name} is kept in room {100 + n} and cleaned on day {n + 1}.\n"
        for n, name in enumerate(SUBJECTS)
    }
    return {**told, "team/pay.md": "# Pay\n\nSalaries are paid on the last day of the month.\n"}


def labelled() -> list[dict[str, Any]]:
    yes = [
        {
            "id": f"q{n:02d}",
            "question": f"Where is the {name} kept?",
            "answerable": True,
            "passages": [{"uri": f"{name}.md", "quote": f"The {name} is kept in room {100 + n}"}],
        }
        for n, name in enumerate(SUBJECTS)
    ]
    no = [
        {"id": f"u{n:02d}", "question": f"Where is the {name} stored by pirates?", "answerable": False}
        for n, name in enumerate(STRANGE)
    ]
    return yes + no


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    model = tiny_embedder.write(tmp_path / "model")
    return rag_house.make(tmp_path, monkeypatch, documents(), embedder={"model": str(model)})


def report(house: House, key: str = DAY) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(house.read("evaluation", "report.json", key))
    return found


def evidence(house: House, result: Any, name: str) -> bytes:
    return house.store.read(result.links[name])


def test_a_first_generation_is_measured_and_promoted(house: House, tmp_path: Path) -> None:
    house.questions(*labelled())
    done = house.reindex(until="gate")
    told = report(house)
    assert told["reconciliation"]["sound"]
    assert told["reconciliation"]["expected"] == len(SUBJECTS) + 1
    assert (told["questions"], told["unanswerable"]) == (24, 12)
    assert told["metrics"]["recall_at_10"] > 0.9
    assert told["live"] is None
    assert "latency" not in told
    assert done["evaluate"].metrics["p99_ms"] >= done["evaluate"].metrics["p50_ms"] > 0
    assert done["evaluate"].facts["proven"] is True
    # Names of nothing that is in the corpus are told apart by any of these signals.
    assert told["metrics"]["abstained"] >= 0.85
    assert told["metrics"]["wrongly_abstained"] <= 0.25
    assert done["gate"].verdict == "promote"
    assert json.loads(house.read("verdict", "verdict.json"))["proven"] is True

    page = evidence(house, done["evaluate"], "Retrieval").decode()
    assert page.count("<img") == 4
    assert evidence(house, done["evaluate"], "Abstention").startswith(b"\x89PNG")

    calibration = open_calibration(house.store, house.manifest("evaluation"), tmp_path)
    assert calibration is not None
    assert calibration.lexicon is not None
    assert calibration.lexicon.frequency("engin") == 1
    assert calibration.abstains(calibration.signals("Where is the zebra?", []))

    again = house.run("evaluate", run="run-2", force=True)
    assert again.digest == done["evaluate"].digest
    assert house.run("evaluate", run="run-3").skipped


def test_without_questions_there_is_reconciliation_alone(house: House) -> None:
    done = house.reindex(until="gate")
    told = report(house)
    assert told["reconciliation"]["sound"]
    assert told["metrics"] == dict.fromkeys(("ndcg_at_10", "recall_at_10", "mrr", "abstained", "wrongly_abstained"))
    assert house.read("evaluation", "calibration.json") == b"null\n"
    assert done["evaluate"].facts["proven"] is False
    assert "unproven: no questions" in done["evaluate"].reasons
    assert (done["gate"].verdict, done["gate"].facts["proven"]) == ("promote", False)
    assert b"unproven" in evidence(house, done["evaluate"], "Retrieval")


def test_too_few_questions_teach_nothing_of_abstaining(house: House) -> None:
    house.questions(*labelled()[:22])
    done = house.reindex(until="evaluate")["evaluate"]
    assert any("0 unanswerable questions" in reason for reason in done.reasons)
    assert house.read("evaluation", "calibration.json") == b"null\n"
    assert report(house)["metrics"]["mrr"] > 0.5


def test_a_passage_that_is_gone_counts_as_missed_and_is_told(house: House) -> None:
    house.questions(*labelled())
    house.document("guides/anchor.md", "# The anchor\n\nThe anchor has been thrown away.\n")
    done = house.reindex(until="evaluate")["evaluate"]
    told = report(house)
    assert [one["id"] for one in told["lost"]] == ["q00"]
    assert next(q for q in told["per_question"] if q["id"] == "q00")["rank"] is None
    assert told["questions"] == 24
    assert any("relabel" in reason for reason in done.reasons)
    assert b"lost their passage" in evidence(house, done, "Retrieval")


def test_an_error_in_the_questions_names_the_project_s_own_file(house: House) -> None:
    house.questions({"id": "q1", "question": "Where?", "answerable": True})
    house.reindex(until="index")
    with pytest.raises(UserError, match=f"projects/{PROJECT}/questions.jsonl: line 1: `passages`"):
        house.run("evaluate")


def test_a_generation_that_lost_documents_is_kept(house: House) -> None:
    house.questions(*labelled())
    house.spec(sources={**rag_house.SPEC["sources"], "guides": {"uri": "documents/guides", "missing": 1}})
    house.reindex()
    for name in SUBJECTS[:8]:
        house.document(f"guides/{name}.md", None)
    done = house.reindex(NEXT, run="run-2", until="gate")
    told = report(house, NEXT)
    assert told["reconciliation"]["sound"]
    assert told["live"]["proven"] is True
    assert told["live"]["metrics"]["recall_at_10"] > 0.9
    difference = told["live"]["differences"]["recall_at_10"]
    assert difference["low"] <= difference["delta"] < -0.2
    assert difference["high"] < 0
    # First or second: the words of all pages but two are the same, so their places in the list of words are anybody's.
    was = next(q for q in told["per_question"] if q["id"] == "q00")["live_rank"]
    assert was in (1, 2)
    assert len(told["lost"]) == 8
    assert done["gate"].verdict == "kept"
    assert any("that is worse by more than 0.01" in reason for reason in done["gate"].reasons)
    assert f"live has it at {was}" in evidence(house, done["evaluate"], "Retrieval").decode()


def test_a_live_generation_that_cannot_be_opened_holds_by_what_was_measured_of_it(house: House) -> None:
    house.questions(*labelled())
    house.reindex()
    live = house.manifest("generation")
    archive = next(name for name in live.files if name.startswith("shard"))
    data = house.store.read(live.uri(archive))
    house.document("guides/anchor.md", "# The anchor\n\nThe anchor is kept in room 100, as ever.\n")
    house.reindex(NEXT, run="run-2", until="index")
    house.store.put(live.uri(archive), data[:-1] + bytes([data[-1] ^ 1]))
    house.run("evaluate", NEXT, run="run-2")
    assert "digest" in report(house, NEXT)["live"]["unusable"]
    assert report(house, NEXT)["live"]["metrics"] == pytest.approx(
        {name: report(house)["metrics"][name] for name in QUALITY}
    )
    verdict = house.run("gate", NEXT, run="run-2")
    assert verdict.verdict == "promote"
    assert any("which cannot be asked now" in reason for reason in verdict.reasons)


class Tracking(BaseHTTPRequestHandler):
    """As much of MLflow's API as an evaluation speaks to."""

    calls: ClassVar[list[tuple[str, Any]]] = []

    def _answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        body = json.loads(data) if path.startswith("/api/2.0/mlflow/") and data else len(data)
        self.calls.append((path.removeprefix("/api/2.0/"), body))
        info = {"run_id": "r1", "experiment_id": "1", "artifact_uri": "mlflow-artifacts:/1/r1", "start_time": 5}
        told = {"experiment": {"experiment_id": "1"}, "runs": [], "run": {"info": info}}
        answer = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *args: object) -> None:
        pass


def test_figures_and_plots_are_in_mlflow_and_one_that_is_away_costs_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.questions(*labelled()[:22])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Tracking)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    try:
        done = house.reindex(until="evaluate")["evaluate"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    batches = [body for path, body in Tracking.calls if path == "mlflow/runs/log-batch"]
    logged = {m["key"]: m["value"] for m in batches[0]["metrics"]}
    assert logged == pytest.approx(done.metrics)
    assert [p for p, _ in Tracking.calls if p.startswith("mlflow-artifacts")] == [
        "mlflow-artifacts/artifacts/1/r1/figures.png",
        "mlflow-artifacts/artifacts/1/r1/ranks.png",
        "mlflow-artifacts/artifacts/1/r1/answers.png",
    ]
    again = house.run("evaluate", run="run-2", force=True)  # nobody listens there any more
    assert again.digest == done.digest


def question(id_: str) -> Question:
    return Question.model_validate(
        {"id": id_, "question": "what is it", "answerable": True, "passages": [{"uri": "a", "quote": "text"}]}
    )


def hit(id_: str) -> Found:
    return Found(id_, 0.5, "", "", "", (), None, "", "", 0.5, 0.0, None, None)


def test_figures_are_those_of_their_definitions() -> None:
    asked = [question(id_) for id_ in ("first", "second", "two", "lost", "none")]
    relevant = {"first": {"a"}, "second": {"b"}, "two": {"a", "c"}, "lost": set(), "none": {"x"}}
    labels = Labels({k: frozenset(v) for k, v in relevant.items()})
    # Equal scores: the order given counts.
    found = {
        "first": [hit("a"), hit("b")],
        "second": [hit("a"), hit("b")],
        "two": [hit("a"), hit("b")],
        "lost": [hit("a")],
    }
    values = evaluate.measure(asked, labels, {**found, "none": []})
    assert values["mrr"] == {"first": 1.0, "second": 0.5, "two": 1.0, "lost": 0.0, "none": 0.0}
    assert values["recall_at_10"] == {"first": 1.0, "second": 1.0, "two": 0.5, "lost": 0.0, "none": 0.0}
    ideal = 1 + 1 / 1.584962500721156
    expected = {"first": 1.0, "second": 1 / 1.584962500721156, "two": 1 / ideal, "lost": 0.0, "none": 0.0}
    assert values["ndcg_at_10"] == pytest.approx(expected)
