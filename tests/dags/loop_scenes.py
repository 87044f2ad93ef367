"""Scenes of the loop, played in one small Airflow (see `small_airflow`); each prints how it ended as a line of JSON."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from pathlib import Path
from typing import Any

from small_airflow import SmallAirflow, publish, say, told

YEAR = [f"2013-{m:02d}" for m in range(1, 13)]
WINDOW = "2013-01..2013-03"
SHUFFLED = [*YEAR]
random.Random(3).shuffle(SHUFFLED)
# Project -> its `retrain`, and its label's delay.
PROJECTS: dict[str, dict[str, str]] = {
    "each": {"retrain": "{on: [each]}"},
    "quarterly": {"retrain": "{on: [quarterly]}"},
    "cron": {"retrain": "{cron: '0 6 2 * *'}"},
    "drift": {"retrain": "{on: [drift]}"},
    "sensor": {"retrain": "{on: [each]}"},
    "ui": {"retrain": "{on: [manual]}"},
    "rest": {"retrain": "{on: [manual]}"},
    "cli": {"retrain": "{on: [manual]}"},
    "posted": {"retrain": "{on: [manual]}"},
    "killed": {"retrain": "{on: [each]}"},
    "repeated": {"retrain": "{on: [each]}"},
    "clicked": {"retrain": "{on: [manual]}"},
    "incomplete": {"retrain": "{on: [each]}"},
    "shuffled": {"retrain": "{on: [each]}"},
    "hostile": {"retrain": "{on: [manual]}"},
    "waiting": {"retrain": "{on: [drift]}", "delay": "99999d"},
    "judged": {"retrain": "{on: [drift, each]}"},
    "disorder": {"retrain": "{on: [drift]}"},
}


def each(a: SmallAirflow, p: str) -> Any:
    a.land(p, YEAR[:3])
    a.settle(p)


quarterly = each


def sensor(a: SmallAirflow, p: str) -> Any:
    a.land(p, YEAR[:3], extra={"source": "sensor"})
    a.settle(p)


def cron(a: SmallAirflow, p: str) -> Any:
    for key in YEAR[:3]:
        publish(a.planner(p).store, p, "materialize", "features", key)
    # Two ticks in April: the window that ended before both is asked for once.
    for _ in range(2):
        a.trigger(f"{p}.request", "timetable", None, run_type="scheduled", partition_key="2013-04")
        a.settle(p)
    a.trigger(f"{p}.request", "timetable", None, run_type="scheduled", partition_key="2013-06")
    a.settle(p)


def drift(a: SmallAirflow, p: str) -> Any:
    for key in YEAR[:4]:
        publish(a.planner(p).store, p, "materialize", "features", key)
        publish(a.planner(p).store, p, "score", "scores", key)
    for key, verdict in (("2013-03", "none"), ("2013-04", "retrain")):
        a.played.verdict = verdict
        a.announce(p, "scores", [key])
        a.settle(p)
    a.played.verdict = "none"


def person(a: SmallAirflow, p: str) -> Any:
    by = {"ui": "ui", "rest": "rest_api", "cli": "cli"}[p]
    a.trigger(f"{p}.train", by, "ada", conf={"window": WINDOW, "reason": "a try"})
    a.settle(p)
    a.trigger(f"{p}.request", by, "bob", conf={"window": "2013-02..2013-04", "reason": "another"})
    a.settle(p)


ui = rest = cli = person


def posted(a: SmallAirflow, p: str) -> Any:
    from airflow.assets.manager import asset_manager
    from airflow.models.asset import AssetModel
    from sqlalchemy import select

    with a.session() as session:
        found = session.scalar(select(AssetModel).where(AssetModel.name == f"{p}/request"))
        asset_manager.register_asset_change(
            asset=found, extra={"reason": "by hand"}, partition_key=WINDOW, session=session, source_is_api=True
        )
    a.settle(p)


def kill(a: SmallAirflow, p: str) -> Any:
    """Played in a process of its own, which does not survive it."""
    a.land(p, YEAR[:5])
    a.killed_in("InOrder")
    a.settle(f"{p}.request")


def killed(a: SmallAirflow, p: str) -> Any:
    between, trained = [r["window"] for r in a.requests(p)], len(a.runs(f"{p}.train"))
    lost = a.find_lost()
    a.settle(p)
    return {"between": between, "trained_before": trained, "lost": lost}


def repeated(a: SmallAirflow, p: str) -> Any:
    a.land(p, YEAR[:3])
    a.settle(f"{p}.request")
    last = a.runs(f"{p}.request")[0]["run_id"]
    # Cleared while the training waits for its turn, and again once it is done; then the features once more.
    a.clear(f"{p}.request", last, "request")
    a.settle(p)
    a.clear(f"{p}.request", last, "request")
    a.settle(p)
    a.land(p, YEAR[:3])
    a.settle(p)
    train = next(r for r in a.runs(f"{p}.train") if r["tasks"]["promote"] == "success")
    a.clear(f"{p}.train", train["run_id"], "request")
    a.settle(p)


def clicked(a: SmallAirflow, p: str) -> Any:
    for _ in range(3):
        a.trigger(f"{p}.train", "ui", "ada", conf={"window": WINDOW, "reason": "now"})
    a.settle(p)
    for _ in range(2):
        a.trigger(f"{p}.request", "ui", "bob", conf={"window": "2013-02..2013-04", "reason": "please"})
    a.settle(p)
    # Asked after that training began: that is another one.
    a.trigger(f"{p}.train", "ui", "ada", conf={"window": WINDOW, "reason": "again"})
    a.settle(p)


def incomplete(a: SmallAirflow, p: str) -> Any:
    a.land(p, [YEAR[0], YEAR[2]])
    a.settle(p)


def shuffled(a: SmallAirflow, p: str) -> Any:
    a.land(p, SHUFFLED)
    a.settle(f"{p}.request")
    a.settle(f"{p}.train", first=True)


def judged(a: SmallAirflow, p: str) -> Any:
    """With a champion, a month is judged before it is trained on; here drift asks for the same window as well."""
    planner = a.planner(p)
    for key in YEAR[:3]:
        publish(planner.store, p, "materialize", "features", key)
    crowned = {"version": "1", "model": "m", "window": WINDOW}
    planner.ledger.record(p, "promotion", "run-1", "done", "ada", crowned)
    a.land(p, [YEAR[3]])
    a.settle(p)
    before = [r["window"] for r in a.requests(p)]
    publish(planner.store, p, "score", "scores", YEAR[3])
    a.played.verdict = "retrain"
    a.announce(p, "scores", [YEAR[3]])
    a.settle(p)
    a.played.verdict = "none"
    return {"before": before}


def disorder(a: SmallAirflow, p: str) -> Any:
    for key in YEAR[:4]:
        publish(a.planner(p).store, p, "score", "scores", key)
    a.played.done.clear()
    a.announce(p, "labels", ["2013-03", "2013-01", "2013-04", "2013-02"])
    a.settle(p)
    return {"order": [key for verb, key, *_ in a.played.done if verb == "monitor"]}


def waiting(a: SmallAirflow, p: str) -> Any:
    publish(a.planner(p).store, p, "score", "scores", "2013-01")
    a.announce(p, "scores", ["2013-01"])
    for id in a.begin():
        a.carry(id, p)
    from airflow.models.trigger import Trigger
    from sqlalchemy import select

    with a.session() as session:
        found = [[t.classpath, t.kwargs] for t in session.scalars(select(Trigger))]
    return {"triggers": found}


def hostile(a: SmallAirflow, p: str) -> Any:
    for dag, conf in (
        ("train", {"window": WINDOW, "$(touch pwned)": "x"}),
        ("request", {"window": "2013-13"}),
        ("train", {}),
        ("rollback", {"partition": "2013-01"}),
        ("monitor", {"window": WINDOW}),
    ):
        a.trigger(f"{p}.{dag}", "rest_api", "eve", conf=conf)
    a.settle(p)
    return {"rollback": a.runs(f"{p}.rollback")}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    a = SmallAirflow(Path(sys.argv[1]))
    if sys.argv[2:] == ["kill"]:
        kill(a, "killed")
        raise AssertionError("it lives")
    for name in sys.argv[2:] or PROJECTS:
        a.played.done.clear()
        more = globals()[name](a, name) or {}
        say({"scene": name, "steps": a.played.done, **told(a, name, **more)})


if __name__ == "__main__":
    main()
