"""The watch Dag: the wait itself on a real folder, what it remembers, and what it asks for."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowSkipException, ErrorType, TaskDeferred
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import ErrorResponse, OKResponse, TriggerDagRun

from orrery import landing
from orrery.errors import TryAgain, UserError
from orrery.orchestration import triggers, watching
from orrery.orchestration.assets import asset
from orrery.orchestration.triggers import LandingTrigger, Watermark
from orrery.orchestration.watching import HandOverOperator, WatchOperator, run_id, watch_dag
from orrery.spec import load_model

MONTHS = [f"2013-{m:02d}" for m in range(1, 13)]
EVERY = 0.05
SPEC = """\
version: 1
kind: model
owner: tests
task: binary
label: {column: late}
sources:
  rows: {uri: "${data}/rows/{partition}.csv"}
  near: {uri: "${data}/near/{partition}.csv"}
  planes: {table: planes, connection: db, time_column: at}
watch: 30s
ends: 2013-12
"""


class Shelf:
    """Airflow's store of one asset's state, as a dict that passes JSON as Airflow does."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def get(self, key: str) -> Any:
        return json.loads(self.values[key]) if key in self.values else None

    def set(self, key: str, value: Any) -> None:
        self.values[key] = json.dumps(value)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    made = Shelf()
    monkeypatch.setattr(triggers.Watermark, "of", classmethod(lambda cls, name: cls(made)))
    return made


class Told:
    """The log of a trigger, as text."""

    def __init__(self) -> None:
        self.text = ""

    def info(self, text: str, *args: Any) -> None:
        self.text += text % args + "\n"

    warning = info


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    made = Told()
    monkeypatch.setattr(LandingTrigger, "log", made)
    return made


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "projects" / "tiny").mkdir(parents=True)
    (tmp_path / "projects" / "tiny" / "spec.yaml").write_text(SPEC)
    monkeypatch.setenv("ORRERY_PROJECTS", str(tmp_path / "projects"))
    monkeypatch.setenv("ORRERY_DATA", f"file://{tmp_path}")
    return "tiny"


def land(root: Path, *keys: str, text: str = "a\n") -> None:
    for source in ("rows", "near"):
        (root / source).mkdir(exist_ok=True)
        for key in keys:
            (root / source / f"{key}.csv").write_text(text)


def trigger(root: Path, **changed: Any) -> LandingTrigger:
    uris = {name: f"file://{root}/{name}/{{partition}}.csv" for name in ("rows", "near")}
    values = {"asset": "tiny/landed", "uris": uris, "grain": "month", "last": None, "every": EVERY, "renew": 30.0}
    return LandingTrigger(**{**values, **changed})


def fired(waiting: LandingTrigger, timeout: float = 20) -> list[list[str]]:
    async def first() -> Any:
        return await anext(waiting.run())

    return list(asyncio.run(asyncio.wait_for(first(), timeout)).payload["landed"])


# -- the wait -----------------------------------------------------------------------------------------


def test_twelve_months_at_once_come_in_key_order_and_not_again(tmp_path: Path, shelf: Shelf) -> None:
    land(tmp_path, *reversed(MONTHS))
    landed = fired(trigger(tmp_path))
    assert [key for key, _, _ in landed] == MONTHS
    mark = Watermark(shelf)
    for key, fingerprint, _ in landed[:7]:
        mark.set(key, fingerprint)
    assert [key for key, _, _ in fired(trigger(tmp_path))] == MONTHS[7:]
    for key, fingerprint, _ in landed[7:]:
        mark.set(key, fingerprint)
    assert fired(trigger(tmp_path, renew=0.3)) == []
    land(tmp_path, "2013-03", text="other\n")
    again = fired(trigger(tmp_path))
    assert [key for key, _, _ in again] == ["2013-03"] and again[0][1] != landed[2][1]


def test_a_file_that_grows_is_told_of_once_it_has_stopped(tmp_path: Path, shelf: Shelf) -> None:
    async def watch() -> tuple[Any, float, float]:
        waiting = trigger(tmp_path, every=0.2)
        first = asyncio.ensure_future(anext(waiting.run()))
        for n in range(8):
            with (tmp_path / "rows" / "2013-01.csv").open("a") as file:
                file.write("a row\n" * (n + 1))
            await asyncio.sleep(0.1)
            assert not first.done()
        ended = time.monotonic()
        return (await asyncio.wait_for(first, 10)).payload, ended, time.monotonic()

    land(tmp_path, "2013-01")
    payload, ended, fired_at = asyncio.run(watch())
    assert [key for key, _, _ in payload["landed"]] == ["2013-01"]
    uris = trigger(tmp_path).uris
    assert payload["landed"][0][1] == landing.look(uris, "month").landed["2013-01"].fingerprint
    assert fired_at - ended < 5


def test_one_source_alone_is_not_enough(tmp_path: Path, shelf: Shelf, told: Told) -> None:
    land(tmp_path, "2013-01")
    (tmp_path / "rows" / "2013-02.csv").write_text("a")
    (tmp_path / "rows" / "notes.txt").write_text("a")
    waiting = trigger(tmp_path)
    assert [key for key, _, _ in fired(waiting)] == ["2013-01"]
    assert "1 partitions have landed; 1 lack a source; 1 names there are no partition" in told.text


def test_sources_that_fail_are_told_and_looked_at_again_with_growing_pauses(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    land(tmp_path, "2013-01")
    true, calls = landing.look, list[float]()

    def failing(*args: Any) -> Any:
        calls.append(time.monotonic())
        if len(calls) <= 2:
            raise TryAgain("the network is gone") if len(calls) == 1 else RuntimeError("not foreseen")
        return true(*args)

    monkeypatch.setattr(landing, "look", failing)
    waiting = trigger(tmp_path, every=0.2)
    assert [key for key, _, _ in fired(waiting)] == ["2013-01"]
    assert len(calls) == 4
    assert calls[1] - calls[0] >= 0.4 and calls[2] - calls[1] >= 0.8
    assert "the network is gone" in told.text and "RuntimeError: not foreseen" in told.text


def test_sources_that_always_fail_end_the_wait_with_a_renewal_not_with_silence(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> Any:
        raise TryAgain("gone")

    monkeypatch.setattr(landing, "look", failing)
    assert fired(trigger(tmp_path, renew=0.2)) == []


def test_the_triggerer_is_free_while_the_sources_are_slow(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    land(tmp_path, "2013-01")
    true, running, most = landing.look, 0, 0

    def slow(*args: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.5)
        running -= 1
        return true(*args)

    async def beside() -> tuple[Any, int]:
        first, ticks = asyncio.ensure_future(anext(waiting.run())), 0
        while not first.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return first.result().payload, ticks

    monkeypatch.setattr(landing, "look", slow)
    monkeypatch.setattr(triggers, "SLOW", 0.2)
    waiting = trigger(tmp_path)
    payload, ticks = asyncio.run(beside())
    assert payload["landed"] and most == 1
    assert ticks > 20  # of about 100 in the second that two looks take
    assert "have not answered" in told.text


def test_a_backlog_comes_in_parts(tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triggers, "MOST", 5)
    land(tmp_path, *MONTHS)
    seen: list[str] = []
    mark = Watermark(shelf)
    for most in (5, 5, 2):
        part = fired(trigger(tmp_path))
        assert len(part) == most
        for key, fingerprint, _ in part:
            mark.set(key, fingerprint)
            seen.append(key)
    assert seen == MONTHS and fired(trigger(tmp_path, renew=0.3)) == []


def test_another_triggerer_can_go_on_from_what_is_serialized(tmp_path: Path, shelf: Shelf) -> None:
    land(tmp_path, "2013-01")
    path, kwargs = trigger(tmp_path, last="2013-12").serialize()
    assert path == "orrery.orchestration.triggers.LandingTrigger"
    assert json.loads(json.dumps(kwargs)) == kwargs
    again = LandingTrigger(**kwargs)
    assert again.serialize() == (path, kwargs)
    assert [key for key, _, _ in fired(again)] == ["2013-01"]


def test_the_watermark_is_kept_by_the_month_and_stays_small() -> None:
    shelf = Shelf()
    mark = Watermark(shelf)
    for day in range(1, 32):
        for hour in range(24):
            mark.set(f"2013-01-{day:02d}T{hour:02d}", "0123456789ab")
    mark.set("2013-02-01T00", "0123456789ab")
    assert list(shelf.values) == ["landed-2013-01", "landed-2013-02"]
    assert len(shelf.values["landed-2013-01"]) < 65_535
    fresh = Watermark(shelf)
    assert fresh.get("2013-01-31T23") == "0123456789ab" and fresh.get("2013-03-01T00") is None


# -- the Dag ------------------------------------------------------------------------------------------


def dag_of(project: str) -> Any:
    return watch_dag(project, load_model(watching.platform.project_folder(project)), "the runbook")


def test_the_dag_is_one_run_at_a_time_that_never_stops(project: str) -> None:
    dag = dag_of(project)
    assert (dag.dag_id, dag.max_active_runs, dag.timetable.__class__.__name__) == (
        "tiny.watch",
        1,
        "ContinuousTimetable",
    )
    assert dag.task_dict["watch"].downstream_task_ids == {"ingest"}
    assert all(task.inlets == [asset(project, "landed")] for task in dag.tasks)
    assert dag.doc_md == "the runbook"


def test_the_task_hands_its_wait_to_the_triggerer(project: str, tmp_path: Path) -> None:
    with pytest.raises(TaskDeferred) as deferred:
        dag_of(project).task_dict["watch"].execute({})
    waiting = deferred.value.trigger
    assert isinstance(waiting, LandingTrigger)
    assert (waiting.every, waiting.last, waiting.grain, waiting.asset) == (30.0, "2013-12", "month", "tiny/landed")
    assert waiting.uris == {name: f"file://{tmp_path}/{name}/{{partition}}.csv" for name in ("rows", "near")}
    assert deferred.value.timeout is None


def test_tables_alone_cannot_be_watched(project: str, tmp_path: Path) -> None:
    spec = SPEC.replace('  rows: {uri: "${data}/rows/{partition}.csv"}\n', "").replace(
        '  near: {uri: "${data}/near/{partition}.csv"}\n', ""
    )
    (tmp_path / "projects" / "tiny" / "spec.yaml").write_text(spec)
    with pytest.raises(UserError, match="only sources with a `uri` by partition can be watched"):
        dag_of(project).task_dict["watch"].execute({})


def test_a_renewed_wait_is_a_skip(project: str) -> None:
    watch = dag_of(project).task_dict["watch"]
    assert isinstance(watch, WatchOperator)
    assert watch.found({}, {"landed": [["2013-01", "f", "at"]]}) == [["2013-01", "f", "at"]]
    with pytest.raises(AirflowSkipException):
        watch.found({}, {"landed": []})


class Supervisor:
    """What answers a task: keeps the runs, and dies after so many messages."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.left = 10**6

    def send(self, message: Any) -> Any:
        assert isinstance(message, TriggerDagRun) and message.dag_id == "tiny.ingest"
        if self.left == 0:
            raise SystemExit(-9)
        self.left -= 1
        if message.run_id in self.runs:
            return ErrorResponse(error=ErrorType.DAGRUN_ALREADY_EXISTS)
        self.runs[message.run_id] = message.conf or {}
        return OKResponse(ok=True)


class Pulled:
    def __init__(self, value: Any) -> None:
        self.value = value

    def xcom_pull(self, task_ids: str) -> Any:
        assert task_ids == "watch"
        return self.value


LANDED = [[key, f"{n:012x}", "2026-11-24T16:50:30+00:00"] for n, key in enumerate(MONTHS)]


def hand_over(project: str, shelf: Any, landed: list[list[str]] = LANDED) -> dict[str, str]:
    task = dag_of(project).task_dict["ingest"]
    assert isinstance(task, HandOverOperator)
    return task.execute({"asset_state_store": {asset(project, "landed"): shelf}, "ti": Pulled(landed)})


def test_each_landing_is_asked_for_once_in_key_order_whenever_the_task_dies(
    project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, shelf = Supervisor(), Shelf()
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", supervisor, raising=False)
    for died in (0, 3, 5):
        supervisor.left = died
        with pytest.raises(SystemExit):
            hand_over(project, shelf)
    supervisor.left = 10**6
    assert list(hand_over(project, shelf)) == MONTHS
    assert list(supervisor.runs) == [run_id(key, fingerprint) for key, fingerprint, _ in LANDED]
    assert [conf["partition"] for conf in supervisor.runs.values()] == MONTHS
    assert supervisor.runs["watch__2013-01__000000000000"]["reason"] == "landed at 2026-11-24T16:50:30+00:00"


def test_a_crash_between_the_run_and_the_watermark_doubles_nothing(
    project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Shelf):
        def set(self, key: str, value: Any) -> None:
            raise SystemExit(-9)

    supervisor = Supervisor()
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", supervisor, raising=False)
    with pytest.raises(SystemExit):
        hand_over(project, Broken())
    assert len(supervisor.runs) == 1
    shelf = Shelf()
    hand_over(project, shelf)
    assert len(supervisor.runs) == 12
    assert all(Watermark(shelf).get(key) == fingerprint for key, fingerprint, _ in LANDED)


def test_an_ingest_dag_that_cannot_run_is_an_error_and_is_not_remembered(
    project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def send(self, message: Any) -> Any:
            return ErrorResponse(error=ErrorType.GENERIC_ERROR)

    shelf = Shelf()
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Refusing(), raising=False)
    with pytest.raises(RuntimeError, match="did not start"):
        hand_over(project, shelf)
    assert shelf.values == {}


@pytest.mark.parametrize("key", ["2013", "2013-03", "2013-03-14", "2013-03-14T05"])
def test_a_run_s_name_is_one_that_airflow_takes(key: str) -> None:
    import re

    from airflow.configuration import conf

    assert re.fullmatch(conf.get("scheduler", "allowed_run_id_pattern"), run_id(key, "0123456789ab"))
