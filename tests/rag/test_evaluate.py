"""`evaluate` and `gate` as whole steps: real documents, a real index, a quick embedder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rag_house
import tiny_embedder
from rag_house import DAY, PROJECT, House

from orrery.errors import UserError
from orrery.rag import evaluate
from orrery.rag.abstention import open_calibration
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
    assert page.count("<img") == 3
    assert evidence(house, done["evaluate"], "Abstention").startswith(b"\x89PNG")

    calibration = open_calibration(house.store, house.manifest("evaluation"), tmp_path)
    assert calibration is not None
    assert calibration.lexicon is not None
    assert calibration.lexicon.frequency("engin") == 1
    assert calibration.abstains(calibration.signals("Where is the zebra?", []))


def test_the_same_generation_gives_the_same_bytes(house: House) -> None:
    house.questions(*labelled())
    house.reindex(until="evaluate")
    first = house.manifest("evaluation")
    again = house.run("evaluate", run="run-2", force=True)
    assert again.digest == first.digest
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
