"""`orrery cost`: a row per training, the attempts of a version or a run, JSON, and answers to wrong questions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from core_house import House
from cost_house import T0, attempt, record

from orrery import cli, cost_text
from orrery.ledger import Ledger

Call = Callable[..., tuple[int, str]]
PLATFORM = """\
version: 1
environments: {airflow: {image: "orrery/airflow:1"}}
compute:
  gpu: {spot: true, price_per_hour: 3.6, on_demand_price_per_hour: 14.4}
"""


@pytest.fixture
def cost(house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Plant two trainings, one of them version 1, and call `orrery cost p` as the shell does."""
    folder = house.home / "include" / "projects" / "p"
    folder.mkdir()
    (folder / "spec.yaml").write_text((house.folder / "spec.yaml").read_text())
    (house.home / "include" / "platform.yaml").write_text(PLATFORM)
    book = Ledger(f"sqlite:///{house.home}/ledger.db")
    record(book, attempt(steps=(0, 1000, 900)), 1)
    record(book, attempt(T0 + 5000, cause=None, steps=(900, 9000, 9000), number=2), 2)
    record(book, attempt(T0 + 20_000, cause=None, steps=None, compute="free", price_per_hour=0.0), 1, verb="evaluate")
    record(book, attempt(T0 + 30_000, cause="bug", steps=(0, 50, 0)), 1, run="r2", address="a2", key="2013-04..2013-06")
    model = {"version": "1", "model": "p/train/a1/manifest.json"}
    book.record("p", "run", "p/runs/r1/register-w/1", "done", "t", {"verb": "register", **model})
    book.record(
        "p", "run", "p/runs/r0/register-w/1", "done", "t", {"verb": "register", "version": "0", "model": "x/y/z"}
    )
    book.record("p", "promotion", "r1", "done", "t", {**model, "from": None})
    monkeypatch.setenv("COLUMNS", "200")

    def call(*argv: str, project: str = "p") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["orrery", "cost", project, *argv])
        code: object = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        caught = capsys.readouterr()
        return int(str(code)), (caught.out + caught.err).replace(cost_text.SPACE, " ")

    return call


def test_a_row_per_training_and_a_line_per_verb(cost: Call) -> None:
    code, said = cost()
    assert code == 0
    champion = next(line for line in said.splitlines() if "1★" in line)
    assert "2013-01..2013-03" in champion and "2 (1 interrupted)" in champion and "2.5 h" in champion
    assert "not done" in said and "2013-04..2013-06" in said
    assert "useful 2.5 h" in said and "lost 100.0 s" in said
    assert "train: 3 attempts" in said and "evaluate: 1 attempts, 30.0 s, cost –" in said


def test_json_has_every_figure(cost: Call) -> None:
    code, said = cost("--json")
    told = json.loads(said)
    assert code == 0 and [t["versions"] for t in told["trainings"]] == [["1"], []]
    first = told["trainings"][0]
    assert first["steps"] == {"kept": 9000, "done": 9100} and first["seconds"]["lost"] == 100
    assert first["cost"] == pytest.approx(9174 * 3.6 / 3600, abs=1e-5)
    assert first["saved"] == pytest.approx(first["on_demand"] - first["cost"])
    assert told["total"]["attempts"] == 4 and told["steps"]["evaluate"]["unpriced"] == 1


def test_a_version_and_a_run_show_their_attempts(cost: Call) -> None:
    _, said = cost("--version", "1")
    assert "#1" in said and "#2" in said and "interrupted" in said and "0→1,000, 900 kept" in said
    assert "evaluate" not in said and "2013-04" not in said
    _, said = cost("--run", "r1")
    assert "evaluate 2013-01..2013-03 #1" in said and "2013-04" not in said
    rows = json.loads(cost("--run", "r1", "--json")[1])["attempts"]
    assert [(r["verb"], r["cause"], (r["steps"] or {}).get("kept")) for r in rows] == [
        ("train", "interrupted", 900), ("train", None, 8100), ("evaluate", None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--version", "7"), "version '7' is not registered"),
        (("--version", "0"), "version '0' was trained before attempts were counted"),
        (("--run", "r9"), "no attempt of a run 'r9' is on record"),
        (("--run", "r1", "--version", "1"), "are two questions"),
    ],
)
def test_wrong_questions_are_answered(cost: Call, argv: tuple[str, ...], said: str) -> None:
    code, text = cost(*argv)
    assert code == 64 and said in text and "Traceback" not in text


def test_a_project_without_attempts_has_an_empty_table(house: House, cost: Call) -> None:
    code, said = cost(project=house.project)
    assert code == 0 and "all steps on record: 0 attempts, 0, cost –" in said


def test_times_and_money_as_people_read_them() -> None:
    plain = [cost_text.span(s).replace(cost_text.SPACE, " ") for s in (0, 3.21, 150, 9000)]
    assert plain == ["0", "3.2 s", "2.5 min", "2.5 h"]
    assert [cost_text.money(v) for v in (None, 0.04212, 1234.5, -2.5)] == ["–", "0.0421", "1,234.50", "-2.50"]
    assert cost_text.money(1.0, 2) == "1.00 + 2 unpriced"
