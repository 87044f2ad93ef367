from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from features_house import FEATURES, SPEC, TIME, Project, at, definitions, flights, labelled, weather

from orrery import bundle, platform, step
from orrery.errors import RequestError, TryAgain, UserError
from orrery.features.definitions import Definitions
from orrery.features.known import latest_known
from orrery.features.online import Home, _store, lookup, lookup_with, online_config, push
from orrery.features.shapes import view_table
from orrery.plan import Planner, Request

ROOT = Path(__file__).resolve().parents[2]
ONLINE = "features: {online: true}\n"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home("tiny", str(tmp_path / "feast"), "sqlite")


@pytest.fixture
def defined(tmp_path: Path) -> Definitions:
    return definitions(FEATURES, tmp_path)


def known(defined: Definitions, table: pa.Table) -> dict[str, pa.Table]:
    return {v.name: latest_known(v, view_table(v, table)) for v in defined.views}


def ask(defined: Definitions, home: Home, when: datetime, *origins: str | None) -> list[Any]:
    rows = pa.table({"key": [str(i) for i in range(len(origins))], "origin": pa.array(origins, pa.string())})
    return lookup_with(defined, rows, at=when, home=home)["weather__wind"].to_pylist()


def test_online_gives_what_materialize_gives_at_that_time(project: Project) -> None:
    """Every type of value, missing ones, entities that are unknown or stale: equal, value for value."""
    project.features = FEATURES.replace(
        "def weather(raw):\n    return raw",
        "def weather(raw):\n    return raw.append_column('wind_y', raw['wind'])",
    )
    names = [*[f"A{i}" for i in range(30)], "UNKNOWN"]
    now = 12.0
    reports = weather(*[(f"A{i % 30}", i / 20, i / 20 + (i % 7) / 10, i / 3 if i % 5 else None) for i in range(400)])
    reports = reports.append_column("count", pa.array([2**60 + i if i % 3 else None for i in range(400)], pa.int64()))
    reports = reports.append_column("fog", pa.array([bool(i % 2) if i % 4 else None for i in range(400)]))
    reports = reports.append_column("sky", pa.array([f"sky {i}" if i % 6 else None for i in range(400)]))
    reports = reports.append_column("never", pa.nulls(400, pa.string()))
    reports = reports.filter(pc.less_equal(reports["available_time"], pa.scalar(at(now), TIME)))
    rows = labelled(flights(*[(n, now) for n in names]))
    home = Home("tiny", str(project.root / "feast"), "sqlite")
    clean = project.clean("2013-03", flights=rows, weather=reports)
    project.spec += ONLINE
    result = project.materialize(clean, feast_registry=home.registry, feast_online=home.online)
    offline = project.table(result).drop_columns(["label", "label_time"])
    asked = offline.select(["key", "origin"])
    online = lookup_with(definitions(project.features, project.folder), asked, at=at(now), home=home)
    assert online.select(offline.column_names).to_pylist() == offline.to_pylist()
    assert online.select(offline.column_names).schema.equals(offline.schema)
    missing = offline["weather__wind"].null_count
    assert 0 < missing < len(names)
    assert offline["weather__never"].null_count == len(names)


@pytest.fixture
def planned(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """March of the project `tiny`, asked for as the command line and the Dags do; its feature store in a folder."""
    project.spec += ONLINE
    (project.folder / "spec.yaml").write_text(project.spec)
    (project.folder / "features.py").write_text(project.features)
    text = (ROOT / "include" / "platform.yaml").read_text()
    (project.root / "platform.yaml").write_text(text.replace("${root}/var/feast", f"{project.root}/feast"))
    addresses = {"HOME": ROOT, "PROJECTS": project.root, "PLATFORM": project.root / "platform.yaml"}
    addresses |= {"STORE": project.store.uri, "LEDGER": f"sqlite:///{project.root}/ledger.db"}
    for name, value in addresses.items():
        monkeypatch.setenv(f"ORRERY_{name}", str(value))
    rows = labelled(flights(("JFK", 11.0), ("LGA", 11.0)))
    clean = project.clean("2013-03", flights=rows, weather=weather(("JFK", 9, 10, 9.0), ("LGA", 9, 10, 90.0)))
    project.store.publish("tiny", "clean", "2013-03", project.store.need(clean), "now")

    def run(name: str, **changes: Any) -> Any:
        config = (
            Planner("tiny").plan(Request("tiny", "materialize", ("2013-03",), name, "materialize", **changes)).config
        )
        bundle.push(project.store, bundle.pack(project.folder))
        (project.root / name).mkdir()
        return step.execute(config, project.store, project.root / name, {})

    return run


def winds(project: Project) -> list[float | None]:
    """What is online for JFK and LGA at 11:00."""
    rows = pa.table({"key": ["a", "b"], "origin": ["JFK", "LGA"]})
    found: list[float | None] = lookup("tiny", rows, at=at(11))["weather__wind"].to_pylist()
    return found


def test_a_spec_that_says_online_is_enough(project: Project, planned: Callable[..., Any]) -> None:
    """From the spec through the planner and the step to `lookup`, with no address but the platform's."""
    assert str(project.root) in platform.load().feast.registry
    features = project.table(planned("first"))
    assert winds(project) == features["weather__wind"].to_pylist() == [9.0, 90.0]


def test_a_forced_run_pushes_again(project: Project, planned: Callable[..., Any]) -> None:
    planned("first")
    shutil.rmtree(project.root / "feast")
    _store.cache_clear()
    planned("again", force=True)
    assert winds(project) == [9.0, 90.0]


def test_who_is_killed_between_push_and_commit_pushes_again(
    project: Project, planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step.Work, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            planned("killed")
    assert winds(project) == [9.0, 90.0]
    again = planned("again")
    assert again.skipped is None
    assert winds(project) == project.table(again)["weather__wind"].to_pylist()


def test_a_sample_is_not_pushed(project: Project, planned: Callable[..., Any]) -> None:
    planned("part", sample=0.999)
    with pytest.raises(RequestError, match=r"nothing online yet\n.*online: true.*materialize"):
        winds(project)


def test_without_the_word_nothing_is_pushed(project: Project) -> None:
    registry = project.root / "feast"
    clean = project.clean("2013-03", flights=labelled(flights(("JFK", 11))), weather=weather(("JFK", 9, 10, 9.0)))
    project.materialize(clean, feast_registry=str(registry), feast_online="sqlite")
    assert not registry.exists()


def test_the_ttl_and_the_future_hold_online_as_well(defined: Definitions, home: Home) -> None:
    push(defined, known(defined, weather(("JFK", 9, 10, 9.0))), home)
    micro = 1 / 3.6e9
    seen = [ask(defined, home, at(h), "JFK")[0] for h in (10 - micro, 10.0, 12 - micro, 12.0)]
    assert seen == [None, 9.0, 9.0, None]


def test_an_older_partition_overwrites_nothing_newer(defined: Definitions, home: Home) -> None:
    march = weather(("JFK", 9, 10, 9.0), ("LGA", 9, 9, 90.0))
    assert push(defined, known(defined, march), home) == {"weather": 2}
    february = weather(("JFK", 8, 9, 8.0), ("EWR", 8, 9.5, 800.0))
    assert push(defined, known(defined, february), home) == {"weather": 1}
    assert ask(defined, home, at(10.5), "JFK", "LGA", "EWR", "SFO", None) == [9.0, 90.0, 800.0, None, None]


def test_a_correction_and_a_newer_report_replace_what_is_there(defined: Definitions, home: Home) -> None:
    push(defined, known(defined, weather(("JFK", 9, 10, 9.0), ("LGA", 9, 10, 90.0))), home)
    push(defined, known(defined, weather(("JFK", 9, 10, None), ("LGA", 10, 11, 91.0))), home)
    assert ask(defined, home, at(11), "JFK", "LGA") == [None, 91.0]


def test_a_partition_without_any_value_leaves_the_others_readable(defined: Definitions, home: Home) -> None:
    """Its column has no type; what is there keeps its own, and so does what comes later."""
    for hour, sky in ((8, None), (9, "clear"), (10, None), (11, "fog")):
        table = weather(("JFK", hour, hour, 1.0), *([("LGA", hour, hour, 1.0)] if hour == 9 else []))
        values = pa.nulls(table.num_rows) if sky is None else pa.array([sky] * table.num_rows)
        push(defined, known(defined, table.append_column("sky", values)), home)
        rows = pa.table({"key": ["a", "b"], "origin": ["JFK", "LGA"]})
        found = lookup_with(defined, rows, at=at(hour), home=home)["weather__sky"].to_pylist()
        assert found == [sky, "clear" if hour in (9, 10) else None]


def test_pushes_at_once_leave_the_newest(defined: Definitions, home: Home) -> None:
    tables = [known(defined, weather(("JFK", h, h, float(h)))) for h in (3, 1, 4, 2)]
    threads = [threading.Thread(target=push, args=(defined, table, home)) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ask(defined, home, at(4.5), "JFK") == [4.0]


def test_projects_share_a_registry_and_no_values(defined: Definitions, home: Home) -> None:
    other = Home("other", home.registry, "sqlite")
    push(defined, known(defined, weather(("JFK", 9, 10, 9.0))), home)
    push(defined, known(defined, weather(("LGA", 9, 10, 1.0))), other)
    assert ask(defined, home, at(10), "JFK", "LGA") == [9.0, None]
    assert ask(defined, other, at(10), "JFK", "LGA") == [None, 1.0]


def test_a_lookup_by_name_finds_the_project_and_the_derives_apply(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "projects" / "tiny"
    folder.mkdir(parents=True)
    (folder / "spec.yaml").write_text(SPEC)
    monkeypatch.setenv("ORRERY_PROJECTS", str(folder.parent))
    defined = definitions(FEATURES, folder)
    push(defined, known(defined, weather(("JFK", 9, 10, 9.0))), home)
    found = lookup("tiny", pa.table({"key": ["f0"], "origin": ["JFK"]}), at=at(11), home=home)
    assert found["double_wind"].to_pylist() == [18.0]
    assert found["prediction_time"].to_pylist() == [at(11)]


def test_what_was_never_pushed_is_said(defined: Definitions, home: Home) -> None:
    with pytest.raises(RequestError, match="view weather of tiny has nothing online yet"):
        ask(defined, home, at(1), "JFK")
    with pytest.raises(RequestError, match="has no time zone"):
        ask(defined, home, datetime(2013, 3, 1), "JFK")


def test_addresses_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEAST_PASSWORD", "p%40ss")
    redis = online_config(Home("tiny", "/feast", "redis://:$FEAST_PASSWORD@cache:6380/2"))
    assert redis == {"type": "redis", "connection_string": "cache:6380,password=p@ss,db=2"}
    database = online_config(Home("tiny", "/feast", "postgresql://feast:$FEAST_PASSWORD@db/features"))
    assert {k: database[k] for k in ("host", "port", "database", "user", "password")} == {
        "host": "db", "port": 5432, "database": "features", "user": "feast", "password": "p@ss",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"feast\.online is 'mysql'"):
        online_config(Home("tiny", "/feast", "mysql://x"))
    with pytest.raises(UserError, match="no folder to put it in"):
        online_config(Home("tiny", "postgresql://db/x", "sqlite"))


def test_a_server_that_cannot_be_reached_is_worth_another_attempt(defined: Definitions, tmp_path: Path) -> None:
    home = Home("tiny", str(tmp_path / "feast"), "postgresql://feast:secret@127.0.0.1:1/features")
    with pytest.raises(TryAgain) as error:
        push(defined, known(defined, weather(("JFK", 9, 10, 9.0))), home)
    assert "secret" not in str(error.value)
