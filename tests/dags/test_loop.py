"""The loop's Dags on Airflow's own scheduler functions: each source asks once and starts one training; nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loop_scenes import PROJECTS, WINDOW, YEAR
from small_airflow import write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Play all scenes in one Airflow; the process that begins the first one is killed in it."""
    home = tmp_path_factory.mktemp("loop")
    write(home, PROJECTS)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("ORRERY_", "AIRFLOW_"))}
    env = own | {
        "AIRFLOW_HOME": str(home / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "ORRERY_HOME": str(ROOT),
        "ORRERY_PROJECTS": str(home / "projects"),
        "ORRERY_STORE": f"file://{home}/store",
        "ORRERY_LEDGER": f"sqlite:///{home}/ledger.db",
    }

    def play(*args: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(HERE / "loop_scenes.py"), str(home), *args]
        return subprocess.run(
            argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=900
        )

    done = play("kill")
    assert done.returncode == -signal.SIGKILL, done.stdout[-4000:]
    done = play()
    assert done.returncode == 0, done.stdout[-4000:]
    ends = [json.loads(line.removeprefix("END")) for line in done.stdout.splitlines() if line.startswith("END")]
    found = {end["scene"]: end for end in ends}
    assert list(found) == list(PROJECTS)
    return found


def trained(scene: dict[str, Any]) -> list[str]:
    """Return the windows whose training went all the way, in the order in which their runs began."""
    return [
        key_of(scene, run)
        for run in scene["train"]
        if run["tasks"]["request"] == "success" and run["tasks"].get("promote") == "success"
    ]


def key_of(scene: dict[str, Any], run: dict[str, Any]) -> str:
    if run["key"]:
        return str(run["key"])
    name = run["note"].split(":")[0].removeprefix("request ")
    assert ".." in name, run
    return str(name)


@pytest.mark.parametrize(
    ("name", "by", "why"),
    [
        ("each", "each.request", "the features of 2013-01 have landed"),
        ("quarterly", "quarterly.request", "the features of 2013-01 have landed"),
        ("cron", "cron.request", "cron 0 6 2 * *"),
        ("sensor", "sensor.watch", "the features of 2013-01 have landed"),
    ],
)
def test_a_calendar_writes_one_request_and_starts_one_training(scenes: dict, name: str, by: str, why: str) -> None:
    scene = scenes[name]
    (request,) = scene["requests"]
    assert (request["source"], request["window"], request["by"], request["why"]) == (name, WINDOW, by, why)
    (train,) = scene["train"]
    assert train["key"] == WINDOW and trained(scene) == [WINDOW]
    assert train["run_id"][:30].replace(":", "_") in request["taken_by"]
    assert train["note"].startswith(f"request {WINDOW}: taken up, {name}, by {by}: {why}")
    # Who asked and why is what the steps tell of themselves, and so the ledger of a promotion.
    assert ["promote", WINDOW, by, why] in scene["steps"]


def test_a_cron_asks_once_for_a_window_and_says_why_not(scenes: dict) -> None:
    notes = [r["note"].splitlines()[0] for r in scenes["cron"]["request"]]
    assert notes == [
        f"request {WINDOW}: asked, cron, by cron.request: cron 0 6 2 * *",
        f"request 2013-04: skipped, asked for already: {WINDOW}",
        "request 2013-06: skipped, 2013-03..2013-05 is not complete: no features of 2013-04, 2013-05",
    ]


def test_the_monitors_verdict_writes_one_request_and_starts_one_training(scenes: dict) -> None:
    scene = scenes["drift"]
    (request,) = scene["requests"]
    assert (request["source"], request["window"], request["by"]) == ("drift", "2013-02..2013-04", "drift.monitor")
    assert request["why"] == "auc fell by 0.05" and request["evidence"] == {"health": "p/monitor/x/manifest.json"}
    assert trained(scene) == ["2013-02..2013-04"]
    assert [r["key"] for r in scene["labels"]] == [r["key"] for r in scene["monitor"]] == ["2013-03", "2013-04"]
    quiet, loud = (r["tasks"] for r in scene["monitor"])
    assert quiet["request"] == "skipped" and loud["request"] == "success"
    assert quiet["report"] == loud["report"] == "success"
    assert "the monitor's verdict is none" in scene["monitor"][0]["note"]


@pytest.mark.parametrize("name", ["ui", "rest", "cli"])
def test_a_person_asks_by_triggering_the_training_or_the_request(scenes: dict, name: str) -> None:
    scene = scenes[name]
    told = [(r["source"], r["window"], r["by"], r["why"]) for r in scene["requests"]]
    assert told == [(name, WINDOW, "ada", "a try"), (name, "2013-02..2013-04", "bob", "another")]
    assert trained(scene) == [WINDOW, "2013-02..2013-04"] and len(scene["train"]) == 2
    assert all(r["taken_by"] for r in scene["requests"])
    assert ["promote", WINDOW, "ada", "a try"] in scene["steps"]
    assert ["promote", "2013-02..2013-04", "bob", "another"] in scene["steps"]


def test_an_event_posted_on_the_asset_is_a_request_too(scenes: dict) -> None:
    (request,) = scenes["posted"]["requests"]
    assert (request["source"], request["window"], request["why"]) == ("rest", WINDOW, "by hand")
    assert trained(scenes["posted"]) == [WINDOW]


def test_a_crash_between_record_and_event_is_mended_by_the_retry(scenes: dict) -> None:
    scene = scenes["killed"]
    # The process was killed when the request was on record, and nobody had heard of it.
    assert scene["lost"] == ["killed.request.request"]
    assert scene["between"] == [WINDOW] and scene["trained_before"] == 0
    every = [WINDOW, "2013-02..2013-04", "2013-03..2013-05"]
    assert [r["window"] for r in scene["requests"]] == every
    assert trained(scene) == every and len(scene["train"]) == 3


def test_clears_and_repeated_events_ask_and_train_nothing_twice(scenes: dict) -> None:
    scene = scenes["repeated"]
    assert [r["window"] for r in scene["requests"]] == [WINDOW]
    assert sum(verb == "train" for verb, *_ in scene["steps"]) == 1
    # The run that was cleared is still the one that serves the request.
    (train,) = [r for r in scene["train"] if r["tasks"]["request"] == "success"]
    assert "taken up" in train["note"]


def test_double_clicks_train_once_and_each_click_is_on_record(scenes: dict) -> None:
    scene = scenes["clicked"]
    told = [(r["window"], r["by"], r["why"]) for r in scene["requests"]]
    assert told.count((WINDOW, "ada", "now")) == 3 and told.count(("2013-02..2013-04", "bob", "please")) == 2
    assert len(told) == 6 and all(r["taken_by"] for r in scene["requests"])
    # What was asked after a training began is another one.
    assert trained(scene) == [WINDOW, "2013-02..2013-04", WINDOW]
    late = [r for r in scene["train"] if r["tasks"]["request"] == "skipped"]
    assert len(late) == 2 and all("it began after this was asked" in r["note"] for r in late)
    assert all(set(r["tasks"].values()) == {"skipped"} and r["state"] == "success" for r in late)


def test_an_incomplete_window_is_skipped_with_the_reason(scenes: dict) -> None:
    scene = scenes["incomplete"]
    assert scene["requests"] == scene["train"] == []
    said = scene["request"][-1]["note"].splitlines()[0]
    assert said == f"request 2013-03: skipped, {WINDOW} is not complete: no features of 2013-02"


def test_a_year_in_any_order_is_asked_for_and_trained_in_key_order(scenes: dict) -> None:
    scene = scenes["shuffled"]
    every = [f"{a}..{b}" for a, b in zip(YEAR, YEAR[2:], strict=False)]
    assert [r["window"] for r in scene["requests"]] == every
    assert len(scene["request"]) == 12 and {r["state"] for r in scene["request"]} == {"success"}
    assert [r["key"] for r in scene["train"]] == every  # runs began in this order, one at a time
    assert len({r["taken_by"] for r in scene["requests"]}) == len(every)


def test_with_a_champion_a_month_is_judged_before_it_is_asked_for_and_two_causes_are_one_training(scenes: dict) -> None:
    scene = scenes["judged"]
    assert scene["before"] == []
    assert "judged.monitor asks when the labels of 2013-04 are in" in scene["request"][0]["note"]
    told = [(r["source"], r["window"], r["by"]) for r in scene["requests"]]
    assert told == [("drift", "2013-02..2013-04", "judged.monitor"), ("each", "2013-02..2013-04", "judged.monitor")]
    assert trained(scene) == ["2013-02..2013-04"] and len(scene["train"]) == 1
    assert len({r["taken_by"] for r in scene["requests"]}) == 1


def test_the_monitor_looks_at_earlier_partitions_first_whatever_event_came_first(scenes: dict) -> None:
    scene = scenes["disorder"]
    assert [r["key"] for r in scene["monitor"]] == ["2013-03", "2013-01", "2013-04", "2013-02"]
    assert list(dict.fromkeys(scene["order"])) == YEAR[:4]


def test_labels_wait_off_the_workers_until_they_are_known(scenes: dict) -> None:
    scene = scenes["waiting"]
    (run,) = scene["labels"]
    assert run["tasks"] == {"labels": "deferred"} and scene["monitor"] == []
    ((path, kwargs),) = scene["triggers"]
    assert path.endswith("temporal.DateTimeTrigger")
    assert kwargs["moment"].startswith("2286-11-16")  # the end of January 2013 and 99,999 days
    # Of a partition long past nothing waits.
    assert {r["tasks"]["labels"] for r in scenes["drift"]["labels"]} == {"success"}


def test_a_hostile_run_is_refused_by_its_first_task(scenes: dict) -> None:
    scene = scenes["hostile"]
    assert scene["requests"] == [] and scene["steps"] == []
    for dag, said in (("request", "is not a month"), ("monitor", "unknown key"), ("rollback", "unknown key")):
        (run,) = scene[dag]
        assert run["state"] == "failed" and said in run["note"], run
    assert all(r["tasks"]["request"] == "failed" for r in scene["train"]) and len(scene["train"]) == 2
