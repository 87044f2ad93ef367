"""The step operator looks at `train.budget` before each attempt of a training or of a trial."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from orrery import platform
from orrery.attempts import Attempt
from orrery.errors import UserError
from orrery.ledger import Ledger
from orrery.plan import Planner, Request

WINDOW = ("2013-01", "2013-02", "2013-03")


@pytest.mark.parametrize("verb", ["train", "trial"])
def test_no_attempt_is_started_over_the_budget(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orrery.orchestration.operators import StepOperator

    shutil.copytree(platform.projects_folder() / "flight_delay", tmp_path / "projects" / "flight_delay")
    spec = tmp_path / "projects" / "flight_delay" / "spec.yaml"
    spec.write_text(spec.read_text().replace("train: {", "train: {budget: 0.5, ", 1))
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    places = {"PROJECTS": f"{tmp_path}/projects", "LEDGER": ledger, "STORE": f"file://{tmp_path}/store"}
    for name, value in places.items():
        monkeypatch.setenv(f"ORRERY_{name}", value)
    task = StepOperator(task_id=verb, project="flight_delay", verb=verb, number=3 if verb == "trial" else None)
    context = {"ti": SimpleNamespace(start_date=datetime.now(UTC)), "dag_run": SimpleNamespace(clear_number=0)}
    request = Request("flight_delay", verb, WINDOW, "r", verb, attempt=2)
    folder = f"flight_delay/runs/r/{verb}-{request.key}/1"

    def next_attempt(run: str = "r") -> Request:
        asked = Request("flight_delay", verb, WINDOW, run, verb, attempt=2)
        return task._next_attempt(context, Planner("flight_delay"), asked)  # type: ignore[arg-type]

    assert next_attempt().compute in ("", "cpu-small")
    spent = Attempt(cause="interrupted", started="2026-01-01T00:00:00+00:00", price_per_hour=0.5, wall_s=3600)
    payload = {"verb": verb, "key": request.key, "folder": folder, "attempt": spent.model_dump(mode="json")}
    assert Ledger(ledger).record("flight_delay", "run", folder, "done", "ada", payload)
    with pytest.raises(UserError, match="have cost 0.5 of train.budget 0.5"):
        next_attempt()
    next_attempt("r--cleared-1")  # a person has said: again
