"""A person's yes before a promotion: on a whole Airflow, by REST as its users; and what the question says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from live_house import Live

from orrery import approvals
from orrery.errors import RequestError, UserError

TRAIN = "toy.train"
WAITING = "awaiting_input"
EVIL = "<script>x</script> [sign here](http://evil.example) `c` **d** | e\n# f\n- g www.evil.example <a@evil.example> ![i](j)"


def ask(live: Live, window: str, *reasons: str, dag: str = TRAIN) -> str:
    """Commit a verdict to promote and start a run for it; return the run when it waits for a person."""
    live.verdict(dag.partition(".")[0], window, reasons=reasons or ("auc 0.81 ≥ 0.7",))
    run = live.trigger(dag, window=window)
    live.wait(dag, run, "approve", WAITING, "failed")
    assert live.states(dag, run)["approve"] == WAITING, live.task_log(dag, run, "approve")
    live.settled(run, "approve", WAITING)
    return run


def on_record(live: Live, window: str, project: str = "toy") -> list[Any]:
    return [e for e in live.ledger.find(project, "approval") if e.payload["window"] == window]


@pytest.mark.slow
def test_only_a_named_approver_may_answer_and_the_answer_is_recorded_once(live: Live) -> None:
    window = "2013-01..2013-01"
    run = ask(live, window, "auc 0.81 ≥ 0.7", EVIL)
    (question,) = live.questions("ada", run)
    assert question["subject"] == f"toy: promote the challenger of {window}?"
    # A field that the form requires would keep the buttons off until it is filled in.
    assert "null" in question["params"]["comment"]["schema"]["type"]
    assert question["options"] == ["Approve", "Reject"] and question["defaults"] == ["Reject"]
    assert sorted(u["id"] for u in question["assigned_users"]) == ["ada", "bob"]
    body = question["body"]
    assert "| auc | 0.8100 | 0.8000 | 0.7000 |" in body and "Better than the champion by +0.0100" in body
    assert "<script>" not in body and "](http" not in body

    refused = live.answer("eve", TRAIN, run, "Approve")  # an admin, and not named
    assert refused.status_code == 403 and "is not a respondent" in refused.text
    assert live.states(TRAIN, run)["approve"] == WAITING and len(on_record(live, window)) == 1
    assert live.answer("ada", TRAIN, run, "Promote!").status_code == 400
    taken = live.answer("ada", TRAIN, run, "Approve", "looks\nfine <b>")
    assert taken.is_success, taken.text
    assert live.answer("bob", TRAIN, run, "Reject").status_code == 409  # the first answer counts
    assert live.ended(TRAIN, run)["state"] == "success", live.task_log(TRAIN, run, "approve")[-5000:]
    assert live.states(TRAIN, run)["register"] == "success"

    asked, answered = on_record(live, window)
    assert (asked.phase, answered.phase, answered.actor) == ("intent", "done", "ada")
    assert answered.payload["approved"] is True and answered.payload["comment"] == "looks fine <b>"
    assert answered.payload["verdict"].startswith("toy/gate/") and answered.payload["answered"].startswith("20")
    # It went out as an alert when it was asked, and ended with the answer.
    alerts = live.ledger.find("toy", "alert", prefix=f"approval/{window}-{asked.id}/1")
    assert {"intent", "done"} <= {e.phase for e in alerts}


@pytest.mark.slow
def test_a_rejection_skips_the_release_and_the_note_says_why(live: Live) -> None:
    window = "2013-02..2013-02"
    run = ask(live, window)
    assert live.answer("bob", TRAIN, run, "Reject", "not before the holidays").is_success
    end = live.ended(TRAIN, run)
    states = live.states(TRAIN, run)
    assert end["state"] == "success" and states["register"] == states["promote"] == "skipped"
    assert f"approve {window}: rejected" in end["note"] and "“not before the holidays”" in end["note"]
    with pytest.raises(RequestError, match="bob rejected it"):
        approvals.require(live.ledger, "toy", window, on_record(live, window)[0].payload["verdict"])


@pytest.mark.slow
def test_nobody_is_asked_when_the_gate_kept_the_champion(live: Live) -> None:
    window = "2013-03..2013-03"
    live.verdict("toy", window, "kept", reasons=("not better",))
    run = live.trigger(TRAIN, window=window)
    assert live.ended(TRAIN, run)["state"] == "success"
    assert set(live.states(TRAIN, run).values()) == {"success", "skipped"}
    assert live.states(TRAIN, run)["approve"] == "skipped"
    assert live.questions("ada", run) == [] and on_record(live, window) == []


@pytest.mark.slow
def test_a_task_marked_a_success_by_hand_has_approved_nothing(live: Live) -> None:
    window = "2013-04..2013-04"
    run = ask(live, window)
    path = f"dags/{TRAIN}/dagRuns/{run}/taskInstances/approve"
    marked = live.call("eve", "PATCH", path, json={"new_state": "success"})
    assert marked.is_success, marked.text
    assert live.ended(TRAIN, run)["state"] == "failed"
    assert live.states(TRAIN, run)["register"] == "failed"
    assert "is not approved: the question is open until" in live.task_log(TRAIN, run, "register")
    assert [e.phase for e in on_record(live, window)] == ["intent"]


@pytest.mark.slow
def test_clear_asks_anew_and_a_question_about_another_verdict_is_never_answered(live: Live) -> None:
    window = "2013-05..2013-05"
    run = ask(live, window)
    assert live.answer("ada", TRAIN, run, "Approve").is_success
    assert live.ended(TRAIN, run)["state"] == "success"
    live.clear(TRAIN, run, "approve", "register", "promote")
    live.wait(TRAIN, run, "approve", WAITING)
    assert [e.phase for e in on_record(live, window)] == ["intent", "done", "intent"]
    with pytest.raises(RequestError, match="the question is open"):
        approvals.require(live.ledger, "toy", window, on_record(live, window)[0].payload["verdict"])
    # Airflow keeps an earlier question's text: the numbers shown would be another candidate's.
    live.verdict("toy", window, reasons=("auc 0.99, and quite another candidate",))
    live.clear(TRAIN, run, "approve", "register", "promote")
    live.wait(TRAIN, run, "approve", "failed")
    number = live.call("eve", "GET", f"dags/{TRAIN}/dagRuns/{run}/taskInstances/approve").json()["try_number"]
    assert "still shows the question that this run asked earlier" in live.task_log(TRAIN, run, "approve", number)
    other = live.trigger(TRAIN, window=window)
    live.wait(TRAIN, other, "approve", WAITING)
    assert "quite another candidate" in live.questions("ada", other)[0]["body"]


@pytest.mark.slow
@pytest.mark.parametrize(("project", "approved"), [("hurry_keep", False), ("hurry_promote", True)])
def test_the_deadline_answers_by_the_specs_default(live: Live, project: str, approved: bool) -> None:
    window, dag = "2013-06..2013-06", f"{project}.train"
    live.verdict(project, window)
    run = live.trigger(dag, window=window)
    assert live.ended(dag, run)["state"] == "success"
    assert live.states(dag, run)["register"] == ("success" if approved else "skipped")
    answered = on_record(live, window, project)[-1]
    assert (answered.phase, answered.actor) == ("done", approvals.NOBODY)
    assert (answered.payload["approved"], answered.payload["by"]) == (approved, None)


# -- without an Airflow ---------------------------------------------------------------------------------


def test_everything_of_a_project_is_escaped() -> None:
    from orrery.orchestration.approval import escape

    text = escape(EVIL)
    assert "\n" not in text
    assert not re.search(r"(?<!\\)[<>\[\]()`*|#!_&~{}]", text)
    assert "://" not in text and ":\\/" in text and "www." not in text
    assert escape("better by +0.0031 (95 %)").replace("\\", "") == "better by +0.0031 (95 %)"


def test_huge_reasons_make_no_huge_question(live_spec: Any) -> None:
    from orrery.orchestration.approval import body
    from orrery.store import Manifest

    def manifest(**result: Any) -> Manifest:
        return Manifest(
            project="toy", verb="gate", key="w", address="a", files={}, digest="d" * 64, created="x", result=result
        )

    text = body(
        live_spec, manifest(reasons=["é" * 100_000] * 5000), manifest(metrics={"auc": 0.8, "champion_delta": "<b>"})
    )
    assert len(text) < 20_000 and "and 4980 more" in text and "<b>" not in text
    assert "Without an answer within 2d, the champion is kept." in text


@pytest.fixture
def live_spec(tmp_path: Path) -> Any:
    from live_house import SPEC

    from orrery.spec import load_model

    (tmp_path / "spec.yaml").write_text(SPEC.format(approval="human"))
    return load_model(tmp_path)


def test_an_answer_that_airflow_let_through_from_somebody_else_is_refused(
    live_spec: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`simple_auth_manager_all_admins` lets everybody answer."""
    from orrery.ledger import Ledger
    from orrery.orchestration import approval

    book = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    payload = {"window": "w", "verdict": "v", "digest": "d", "approvers": ["ada"], "until": "2030-01-01T00:00:00+00:00"}
    book.record("toy", "approval", "toy.train--r/w", "intent", "t", payload)
    monkeypatch.setattr(approval, "Planner", lambda project: SimpleNamespace(ledger=book))
    task = approval.approve_task("toy", live_spec)
    context = {"dag_run": SimpleNamespace(dag_id="toy.train", run_id="r", clear_number=0)}

    def answer(user: str, *options: str) -> None:
        event = {
            "chosen_options": list(options),
            "params_input": {},
            "responded_at": "now",
            "responded_by_user": {"id": user},
        }
        task.execute_complete(context, event)

    with pytest.raises(UserError, match="mallory answered, and is not an approver"):
        answer("mallory", "Approve")
    with pytest.raises(UserError, match="the answer is"):
        answer("ada", "Approve", "Reject")
    with pytest.raises(UserError, match="the answer is"):
        answer("ada")
    assert [e.phase for e in book.find("toy", "approval")] == ["intent"]
