"""What OpenLineage is told: one chain from source to scores, valid, without secrets, and never in a task's way."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from loop import DAYS as FIRST_DAYS
from loop import PROJECT, ROOT, Loop
from mlflow_house import mlflow_server

from orrery.servers import airflow_environment

DAYS, BAD = FIRST_DAYS[:3], FIRST_DAYS[3]
GOOD, WINDOW = DAYS[0], f"{DAYS[0]}..{DAYS[-1]}"
Event = dict[str, Any]
# Runs the Dags named in argv as Airflow does, by `dag.test()`; a Dag's own events come from the scheduler alone.
CODE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from airflow.utils.db import initdb
initdb()
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from airflow.dag_processing.bundles.manager import DagBundlesManager
DagBundlesManager().sync_bundles_to_db()
bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
sync_bag_to_db(bag, "dags-folder", None)
states = []
for name, conf in json.loads(sys.argv[2]):
    dag = DagBag(sys.argv[1]).dags[f"house_energy.{name}"]
    dag.deadline = None  # Airflow 3.3's dag.test() cannot start a Dag that has one
    states.append(str(dag.test(run_conf=conf).state))
print("STATES" + json.dumps(states))
"""


def play(loop: Loop, home: Path, runs: list[tuple[str, dict[str, str]]], **env: str) -> tuple[list[str], str]:
    """Run the Dags as the laptop's Airflow is configured in `home`; return their states and the log."""
    folder = ROOT / "tests" / "projects" / "dags"
    code = "import json, sys; from pathlib import Path; from orrery.servers import airflow_environment as e; print(json.dumps(e(Path(sys.argv[1]))))"
    mine = {k: v for k, v in loop.env.items() if not k.startswith(("AIRFLOW_", "OPENLINEAGE"))} | env
    told = subprocess.run([sys.executable, "-c", code, str(home)], env=mine, capture_output=True, text=True, check=True)
    # What the project is comes from the repository, and where Airflow is at home from the test.
    ours = {**mine, **json.loads(told.stdout), "ORRERY_HOME": str(ROOT), "AIRFLOW__CORE__DAGS_FOLDER": str(folder)}
    argv = [sys.executable, "-c", CODE, str(folder), json.dumps(runs)]
    done = subprocess.run(
        argv, env=ours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:]
    states = next(line for line in done.stdout.splitlines() if line.startswith("STATES"))
    return json.loads(states.removeprefix("STATES")), done.stdout


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield Loop(tmp_path_factory.mktemp("lineage"), address)


@pytest.fixture(scope="module")
def events(loop: Loop) -> list[Event]:
    """Return the events of a first loop: days, a training, scores, a day again, a day that is wrong."""
    bad = Path(loop.env["ORRERY_DATA"].removeprefix("file://")) / "readings" / f"{BAD}.csv"
    bad.write_text(bad.read_text().replace(",gas,", ",coal,"))
    days = [("ingest", {"partition": day}) for day in DAYS]
    runs = [
        ("score", {"partition": GOOD}),
        *days,
        ("train", {"window": WINDOW, "reason": "a test"}),
        ("score", {"partition": GOOD}),
        ("ingest", {"partition": GOOD}),
        ("ingest", {"partition": BAD}),
    ]
    states, log = play(loop, loop.home, runs)
    assert states == ["success"] * (len(runs) - 1) + ["failed"], log[-4000:]
    file = loop.home / "var" / "lineage" / "events.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [e for e in found if e["job"]["name"].count(".") == 2]


def ends(events: list[Event], task: str) -> list[Event]:
    """Return the last events of a task's runs, such as `ingest.validate`, in order."""
    return [e for e in events if e["job"]["name"] == f"{PROJECT}.{task}" and e["eventType"] != "START"]


def names(datasets: list[Event]) -> list[str]:
    return [d["name"] for d in datasets]


def steps(event: Event) -> list[dict[str, Any]]:
    return event["run"]["facets"]["orrery"]["steps"]


@pytest.mark.slow
def test_each_task_tells_its_start_and_its_end_once(events: list[Event]) -> None:
    seen = Counter((e["run"]["runId"], e["eventType"] == "START") for e in events)
    assert set(seen.values()) == {1}
    assert {run for run, start in seen if start} == {run for run, start in seen if not start}


@pytest.mark.slow
def test_the_chain_from_the_scores_leads_back_to_the_source(events: list[Event], loop: Loop) -> None:
    made: dict[tuple[str, str, str], list[Event]] = {}
    for event in events:
        for out in event["outputs"]:
            made[out["namespace"], out["name"], out["facets"]["version"]["datasetVersion"]] = event["inputs"]
    scores = loop.manifest("scores", GOOD)
    queue = [(loop.env["ORRERY_STORE"], f"{PROJECT}/scores/{GOOD}", scores.digest)]
    reached = set()
    while queue:
        here = queue.pop()
        if here in reached:
            continue
        reached.add(here)
        for one in made.get(here, ()):
            version = one["facets"].get("version", {}).get("datasetVersion", "")
            queue.append((one["namespace"], one["name"], version))
    names_ = {name for _, name, _ in reached}
    data = loop.env["ORRERY_DATA"].removeprefix("file://")
    sources = {f"{data}/readings/{day}.csv" for day in DAYS}
    steps_ = {f"{PROJECT}/{dataset}/{day}" for dataset in ("raw", "clean", "features") for day in DAYS}
    assert names_ == sources | steps_ | {f"{PROJECT}/scores/{GOOD}", f"{PROJECT}/candidate/{WINDOW}"}
    assert {namespace for namespace, name, _ in reached if name in sources} == {"file"}


@pytest.mark.slow
def test_a_dataset_has_its_version_columns_and_counts(events: list[Event], loop: Loop) -> None:
    raw, manifest = ends(events, "ingest.ingest")[0], loop.manifest("raw", GOOD)
    (source,), (out,) = raw["inputs"], raw["outputs"]
    assert source["inputFacets"]["inputStatistics"]["rowCount"] == manifest.facts["readings"]["rows"] == 120 * 24
    columns = {f["name"]: f["type"] for f in source["facets"]["schema"]["fields"]}
    assert columns == manifest.facts["readings"]["columns"]
    assert out["facets"]["version"]["datasetVersion"] == manifest.digest
    assert out["facets"]["schema"]["fields"][0]["name"] == "readings"
    size = sum(f.size for f in manifest.files.values())
    statistics = out["outputFacets"]["outputStatistics"]
    assert (statistics["rowCount"], statistics["size"], statistics["fileCount"]) == (2880, size, 1)
    scored = ends(events, "score.score")[1]["outputs"][0]["facets"]["schema"]["fields"]
    assert [f["name"] for f in scored] == ["key", "prediction_time", "prediction", "model_version"]


@pytest.mark.slow
def test_checks_are_told_as_assertions(events: list[Event]) -> None:
    (raw,) = ends(events, "ingest.validate")[0]["inputs"]
    found = raw["inputFacets"]["dataQualityAssertions"]["assertions"]
    assert {"readings.heating", "readings.reading_id"} <= {a.get("column") for a in found}
    assert all(a["success"] and a["severity"] in ("error", "warn") for a in found)


@pytest.mark.slow
def test_a_job_has_owner_document_code_and_its_run_a_parent(events: list[Event], loop: Loop) -> None:
    train = ends(events, "train.train")[0]
    facets = train["job"]["facets"]
    assert [o["name"] for o in facets["ownership"]["owners"]] == ["grid-planning"]
    assert "`train` in environment `ml`" in facets["documentation"]["description"]
    manifest = loop.manifest("candidate", WINDOW)
    bundle = facets["sourceCodeLocation"]
    assert bundle["version"] == manifest.fingerprint["project"]
    assert loop.store.exists(bundle["url"].removeprefix(f"{loop.env['ORRERY_STORE']}/"))
    assert train["run"]["facets"]["parent"]["job"]["name"] == f"{PROJECT}.train"
    assert steps(train)[0]["fingerprint"] == manifest.fingerprint


@pytest.mark.slow
def test_a_release_tells_its_verdict_and_version(events: list[Event]) -> None:
    assert steps(ends(events, "train.gate")[0])[0]["verdict"] == "promote"
    for task in ("train.register", "train.promote"):
        (model,) = ends(events, task)[0]["outputs"]
        assert (model["name"], model["facets"]["version"]["datasetVersion"]) == (f"models/{PROJECT}", "1")
        assert steps(ends(events, task)[0])[0]["modelVersion"] == "1"


@pytest.mark.slow
def test_what_was_skipped_says_so_and_claims_no_writing(events: list[Event]) -> None:
    first, second = ends(events, "ingest.materialize")[0], ends(events, "ingest.materialize")[-1]
    assert "skipped" not in steps(first)[0]
    assert steps(second)[0]["skipped"].startswith("unchanged since")
    assert second["outputs"][0]["facets"]["version"] == first["outputs"][0]["facets"]["version"]
    assert names(second["inputs"]) == names(first["inputs"])
    assert not second["outputs"][0].get("outputFacets")
    window = ends(events, "train.materialize")[0]
    assert [s["key"] for s in steps(window)] == list(DAYS) and all("skipped" in s for s in steps(window))
    unscored = ends(events, "score.score")[0]
    assert steps(unscored)[0]["skipped"] == "no champion yet" and unscored["outputs"] == []


@pytest.mark.slow
def test_a_failure_tells_the_error_and_what_was_read(events: list[Event]) -> None:
    failed = ends(events, "ingest.validate")[-1]
    assert failed["eventType"] == "FAIL"
    assert "coal" in failed["run"]["facets"]["errorMessage"]["message"]
    assert names(failed["inputs"]) == [f"{PROJECT}/raw/{BAD}"] and failed["outputs"] == []
    assert steps(failed)[0]["status"] == "failed" and steps(failed)[0]["key"] == BAD


@pytest.mark.slow
def test_every_event_is_what_the_standard_asks_for(events: list[Event]) -> None:
    assert len(events) > 40
    for event in events:
        UUID(event["run"]["runId"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|[+-]\d\d:\d\d)", event["eventTime"])
        assert event["producer"].startswith("https://") and event["schemaURL"].endswith("/RunEvent")
        assert event["job"]["namespace"] == "orrery" and event["eventType"] in ("START", "COMPLETE", "FAIL")
        valid_facets(event["run"]["facets"], event["job"]["facets"])
        for dataset in event["inputs"] + event["outputs"]:
            assert dataset["namespace"] and dataset["name"]
            valid_facets(dataset["facets"], dataset.get("inputFacets", {}), dataset.get("outputFacets", {}))


def valid_facets(*groups: dict[str, dict[str, Any]]) -> None:
    """Make each facet anew by the client's class of its schema: a field it does not know, or lacks, is an error."""
    classes = facet_classes()
    for name, facet in ((n, f) for group in groups for n, f in group.items()):
        assert facet["_producer"].startswith("https://") and "#/$defs/" in facet["_schemaURL"], name
        kind = classes[facet["_schemaURL"].rpartition("/")[2]]
        if kind.__name__ == "RunFacet":  # a facet that is not the standard's: its own fields are free
            assert name in ("airflow", "airflowState", "orrery", "unknownSourceAttribute", "log"), name
            continue
        kind(**{key: value for key, value in facet.items() if not key.startswith("_")})


def facet_classes() -> dict[str, Any]:
    from openlineage.client import facet_v2

    modules = [m for _, m in inspect.getmembers(facet_v2, inspect.ismodule)]
    found = {n: c for m in modules for n, c in inspect.getmembers(m, inspect.isclass) if n.endswith("Facet")}
    return found | {"RunFacet": facet_v2.RunFacet, "JobFacet": facet_v2.JobFacet}


# -- no secret ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://bucket/a/b.parquet", ("s3://bucket", "a/b.parquet")),
        ("https://me:pw@host:8443/a.csv?sig=pw", ("https://host:8443", "a.csv")),
        ("file:///data/a.csv", ("file", "/data/a.csv")),
        ("/data/a.csv", ("file", "/data/a.csv")),
    ],
)
def test_a_file_is_named_as_the_standard_says_and_without_a_login(uri: str, said: tuple[str, str]) -> None:
    from orrery.orchestration.lineage import address

    assert address(uri) == said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgres://me:pw@db/shop?password=pw", ("postgres://db:5432", "shop.public.orders")),
        ("postgresql+psycopg://me:pw@db:6543/shop", ("postgres://db:6543", "shop.public.orders")),
        ("mysql://me:p%40w@db/shop", ("mysql://db:3306", "shop.public.orders")),
        ("sqlite:////data/shop.db", ("sqlite:////data/shop.db", "public.orders")),
    ],
)
def test_a_table_is_named_as_the_standard_says_and_without_a_login(url: str, said: tuple[str, str]) -> None:
    from orrery.orchestration.lineage import table

    assert table(url, "public.orders") == said


def test_the_url_of_a_sql_source_stays_in_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of an ingest from a database holds its URL; the event has host, database and table of it."""
    from attr import asdict

    from orrery.contract import VERBS, Result, StepConfig
    from orrery.orchestration.lineage import of_task
    from orrery.orchestration.operators import Told
    from orrery.plan import Plan, Request

    monkeypatch.setenv("ORRERY_STORE", f"file://{tmp_path}")
    source = {"table": "public.orders", "time_column": "at", "secret_env": "ORRERY_SOURCE_ORDERS"}
    config = StepConfig(
        project="shop",
        verb="ingest",
        key="2024-01",
        partitions=("2024-01",),
        params={"sources": {"orders": source}},
        store=f"file://{tmp_path}",
        bundle="0" * 64,
        run="r",
        task="ingest",
        folder="shop/runs/r/ingest/1",
    )
    plan = Plan(config, VERBS["ingest"], {"ORRERY_SOURCE_ORDERS": "postgresql://me:hunter2@db/shop"})
    told = Told(Request("shop", "ingest", ("2024-01",), "r", "ingest"), plan, Result())
    lineage = of_task("shop", "ingest", [told])
    assert [(d.namespace, d.name) for d in lineage.inputs] == [("postgres://db:5432", "shop.public.orders")]
    everything = json.dumps(
        [asdict(x) for x in (*lineage.inputs, *lineage.run_facets.values(), *lineage.job_facets.values())], default=str
    )
    assert "db:5432" in everything and "hunter2" not in everything


def test_a_step_does_not_see_where_lineage_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from orrery.local import step_environment

    monkeypatch.setenv("OPENLINEAGE_API_KEY", "hunter2")
    monkeypatch.setenv("AIRFLOW__OPENLINEAGE__TRANSPORT", "hunter2")
    assert "hunter2" not in step_environment({}).values()


# -- where events go --------------------------------------------------------------------------------------


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import os

    for name in [n for n in os.environ if n.startswith(("OPENLINEAGE", "AIRFLOW__OPENLINEAGE"))]:
        monkeypatch.delenv(name)
    yield lambda: airflow_environment(tmp_path)


def test_by_default_events_go_into_a_file_below_var(configured: Any, tmp_path: Path) -> None:
    transport = json.loads(configured()["AIRFLOW__OPENLINEAGE__TRANSPORT"])
    assert transport == {
        "type": "file",
        "log_file_path": str(tmp_path / "var" / "lineage" / "events.jsonl"),
        "append": True,
    }


def test_a_server_is_named_by_one_variable(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLINEAGE_URL", "http://marquez:5000")
    transport = json.loads(configured()["AIRFLOW__OPENLINEAGE__TRANSPORT"])
    assert (transport["type"], transport["url"]) == ("http", "http://marquez:5000")


@pytest.mark.parametrize(
    "variable",
    [
        "AIRFLOW__OPENLINEAGE__CONFIG_PATH",
        "AIRFLOW__OPENLINEAGE__CONFIG_CONN_ID",
        "OPENLINEAGE_CONFIG",
        "OPENLINEAGE__TRANSPORT__TYPE",
        "OPENLINEAGE_DISABLED",
    ],
)
def test_openlineages_own_settings_win(configured: Any, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    assert "AIRFLOW__OPENLINEAGE__TRANSPORT" not in configured()


class Marquez(BaseHTTPRequestHandler):
    """Takes events in, up to the end of the first task; then it is gone."""

    def do_POST(self) -> None:
        event = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.taken.append((self.path, self.headers["authorization"], event))  # type: ignore[attr-defined]
        if event["eventType"] == "COMPLETE":
            self.server.socket.close()
        self.send_response(201)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Stay silent."""


@contextmanager
def marquez() -> Iterator[tuple[str, list[tuple[str, str, Event]]]]:
    taken: list[tuple[str, str, Event]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Marquez)
    server.timeout, server.taken = 0.2, taken  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=_serve, args=(server,))
    thread.start()
    try:
        yield url, taken
    finally:
        server.server_close()
        thread.join(30)


def _serve(server: ThreadingHTTPServer) -> None:
    while server.socket.fileno() >= 0:
        server.handle_request()


@pytest.mark.slow
def test_a_server_is_sent_the_events_and_one_that_is_gone_fails_nothing(
    events: list[Event], loop: Loop, tmp_path: Path
) -> None:
    with marquez() as (url, taken):
        states, log = play(
            loop, tmp_path, [("ingest", {"partition": GOOD})], OPENLINEAGE_URL=url, OPENLINEAGE_API_KEY="hunter2"
        )
    assert states == ["success"], log[-4000:]
    assert {(path, key) for path, key, _ in taken} == {("/api/v1/lineage", "Bearer hunter2")}
    start, end = (event for _, _, event in taken)
    assert (start["eventType"], end["eventType"]) == ("START", "COMPLETE")
    assert end["job"] == ends(events, "ingest.ingest")[-2]["job"]
    assert end["inputs"] == ends(events, "ingest.ingest")[-2]["inputs"]
    assert "hunter2" not in json.dumps([start, end])
    assert log.count("Failed to emit OpenLineage") >= 4  # of validate and of materialize
    assert not (tmp_path / "var" / "lineage").exists()
