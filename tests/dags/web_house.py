"""An Airflow API server with our plugin, Dags, runs and a planted ledger: what the tests of the web pages look at.

The Dags are stand-ins with our names and tags: what they do is not the subject here. `python web_house.py seed`
fills the database (in a process of its own, as Airflow wants its settings before it is imported).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PROJECT = "flight_delay"
START_S = 180
USERS = {"ada": "admin", "viv": "viewer", "mallory": "admin"}
# One Dag of ours per verb, one of somebody else's that is called like ours, and one that is not.
DAGS = {
    "ingest": ("ingest", "validate", "materialize"),
    "request": ("request",),
    "train": ("request", "materialize", "train", "evaluate", "gate", "approve", "register", "promote"),
    "score": ("score",),
    "monitor": ("monitor", "report"),
    "rollback": ("rollback",),
}
DAG_FILE = f'''
"""Stand-ins for airflow: a dag per verb."""
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Param

for verb, tasks in {DAGS!r}.items():
    params = {{"reason": Param("", type="string"), "version": Param(None, type=["null", "string"])}}
    tags = ["orrery", "{PROJECT}", "binary", "owner:ops-ml"]
    with DAG("{PROJECT}." + verb, schedule=None, tags=tags, params=params, is_paused_upon_creation=False) as dag:
        before = None
        for name in tasks:
            task = EmptyOperator(task_id=name)
            if before is not None:
                before >> task
            before = task
    globals()[verb] = dag
with DAG("elsewhere.train", schedule=None, tags=["somebody"]) as named_alike:
    EmptyOperator(task_id="x")
with DAG("reports", schedule=None) as another:
    EmptyOperator(task_id="x")
'''
RUNS = {
    "promoted": ("train", "manual__2013-04-02T06:10:00+00:00", "success", "2013-01..2013-03"),
    "kept": ("train", "asset__2013-10-02", "success", "2013-07..2013-09"),
    "asking": ("train", "asset__2014-01-02", "running", "2013-10..2013-12"),
    "monitored": ("monitor", "asset__2013-12", "success", "2013-12"),
    "failed": ("ingest", "manual__bad", "failed", "2013-12"),
    "going": ("ingest", "manual__going", "running", "2014-01"),
}
# Marks that must never come out as they went in.
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> \u202e\u2028 ${71*73} {{71*73}} ' OR 1=1 --"


def environment(home: Path, port: int, mlflow: str) -> dict[str, str]:
    """Return the variables of this Airflow: its own home, database, port and users."""
    base = f"http://127.0.0.1:{port}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ORRERY_", "AIRFLOW_", "MLFLOW_"))}
    return clean | {
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(Path(__file__).resolve().parent),
        "ORRERY_HOME": str(ROOT),
        "ORRERY_LEDGER": f"sqlite:///{home}/ledger.db",
        "ORRERY_STORE": f"file://{home}/store",
        "ORRERY_MLFLOW": mlflow,
        "AIRFLOW_HOME": str(home / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__AUTH_MANAGER": "web_auth.Picky",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{n}:{role}" for n, role in USERS.items()),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": base,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__SECRET_KEY": "a" * 64,
        "AIRFLOW__API_AUTH__JWT_SECRET": "b" * 64,
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING",
    }


@contextmanager
def api_server(home: Path, port: int, mlflow: str = "http://127.0.0.1:9") -> Iterator[str]:
    """Seed the database, run the server and yield its address; all its processes are ended."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "passwords.json").write_text(json.dumps({name: name for name in USERS}))
    (home / "dags").mkdir(exist_ok=True)
    (home / "dags" / "stand_ins.py").write_text(DAG_FILE)
    env = environment(home, port, mlflow)
    done = subprocess.run(
        [sys.executable, __file__, "seed", str(home)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    argv = [str(Path(sys.executable).parent / "airflow"), "api-server"]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/version", timeout=2):
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (home / "log").read_text()[-3000:]
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def name_of(run: str) -> str:
    """Return what store and ledger call one of `RUNS`."""
    from orrery.plan import safe_name

    verb, run_id, _, _ = RUNS[run]
    return safe_name(f"{PROJECT}.{verb}--{run_id}")


def attempt(run: str, verb: str, number: int = 1) -> str:
    """Return the folder of an attempt in one of `RUNS`."""
    return f"{PROJECT}/runs/{name_of(run)}/{verb}-{RUNS[run][3]}/{number}"


# -- what is planted ------------------------------------------------------------------------------------

OBSERVED = (0.761, 0.752, 0.768, 0.771, 0.744, 0.739, 0.724, 0.709, 0.721)
VERDICTS = ("none", "none", "none", "none", "watch", "none", "watch", "retrain", "watch")
VERSIONS = ("1", "1", "2", "2", "2", "3", "3", "3", "3")


def plant(book: Any, project: str = PROJECT) -> None:
    """Write a year into the ledger: promotions, a rollback, the health of nine months, requests, an open question."""
    from orrery import alerts, approvals, requests
    from orrery.spec import Approval
    from orrery.store import Manifest

    def step(run: str, verb: str, key: str, number: int = 1, **more: Any) -> None:
        folder = f"{project}/runs/{run}/{verb}-{key}/{number}"
        payload = {
            "verb": verb, "key": key, "folder": folder, "status": "done", "verdict": None, "skipped": None,
            "seconds": {"total": 3.2}, "metrics": {}, "reasons": [], "links": {}, "facts": {}, **more,
        }  # fmt: skip
        book.record(project, "run", folder, "done", "airflow (asset_triggered)", payload)
        if verb in ("gate", "monitor"):
            book.record(project, "decision", f"{run}/{key}", "done", "airflow (asset_triggered)", payload)

    def train(run: str, window: str, version: str | None, why: list[str], source: Any = "each") -> None:
        asked = requests.submit(
            book, project, window=window, source=source, by="ada", why="a new quarter is complete", id=run[-12:]
        )
        requests.take(book, project, asked.window, run)
        for key in ("a", "b"):
            step(run, "materialize", f"{window[:7]}-{key}", skipped="unchanged since 2013-04-02: same code", seconds={})
        gone = {"1": 0, "2": 3, "3": 1}.get(version or "", 0)
        for number in range(1, gone + 1):
            step(run, "train", window, number, status="interrupted", attempt=spent(version, number, gone))
        step(
            run, "train", window, gone + 1, attempt=spent(version, gone + 1, gone),
            output=f"{project}/train/{version or run}/manifest.json", metrics={"fit_loss": 0.4211, "tune_loss": 0.4301, "epochs": 12.0, "rows": 68211.0},
            links={"MLflow run": "http://127.0.0.1:9/#/experiments/1/runs/abc"}, seconds={"total": 48.4},
        )  # fmt: skip
        curves = f"{project}/runs/{run}/evaluate-{window}/1/evidence/curves.html"
        step(run, "evaluate", window, metrics={"auc": 0.758, "brier": 0.134}, links={"Curves": curves}, seconds={"total": 21.0})  # fmt: skip
        verdict = "promote" if version else "kept"
        if why:
            step(run, "gate", window, verdict=verdict, metrics={"auc": 0.758, "p99_ms": 0.03}, reasons=why)
        if version:
            step(run, "register", window, version=version, model=f"{project}/train/{version}/manifest.json",
                 facts={"model_version": version})  # fmt: skip

    def change(kind: Any, key: str, before: str | None, version: str, window: str, by: str, reason: str) -> None:
        payload = {"from": before, "version": version, "model": f"{project}/train/{version}/manifest.json",
                   "reason": reason, "window": window, "evidence": {}}  # fmt: skip
        for phase in ("intent", "done"):
            book.record(project, kind, key, phase, by, payload)

    better = ["auc 0.758 ≥ 0.65", "better than the baseline: auc better by +0.0167, 95 % interval over 14 days +0.0039 … +0.0327"]  # fmt: skip
    for i in range(12):
        key = f"2013-{i + 1:02d}"
        for verb in ("ingest", "validate", "materialize"):
            step(f"ingest-{key}", verb, key, verdict="new" if verb == "ingest" else None)
    first = name_of("promoted")
    train(first, "2013-01..2013-03", "1", [*better, "no champion yet"])
    change("promotion", first, None, "1", "2013-01..2013-03", "ada", "the first model")
    train(
        "second",
        "2013-04..2013-06",
        "2",
        ["better than the champion of 2013-01..2013-03: auc better by +0.0316", *better],
    )
    change("promotion", "second", "1", "2", "2013-04..2013-06", "airflow (asset_triggered)", "")
    train("third", "2013-05..2013-07", "3", better, "drift")
    change("promotion", "third", "2", "3", "2013-05..2013-07", "airflow (asset_triggered)", "drift, by the monitor")
    change("rollback", "back", "3", "2", "2013-04..2013-06", "bob", "p99 went up in the serving tier")
    change("rollback", "again", "2", "3", "2013-05..2013-07", "ada", "it was the network after all")
    worse = ["not better than the champion of 2013-05..2013-07: auc better by +0.0011, 95 % interval over 14 days −0.0042 … +0.0069", *better]  # fmt: skip
    train(name_of("kept"), RUNS["kept"][3], None, worse)
    for i, (observed, verdict, version) in enumerate(zip(OBSERVED, VERDICTS, VERSIONS, strict=True)):
        key, promised = f"2013-{i + 4:02d}", {"1": 0.758, "2": 0.781, "3": 0.752}[version]
        run = name_of("monitored") if key == "2013-12" else f"monitor-{key}"
        metrics = {
            "observed": observed, "observed_low": observed - 0.011, "observed_high": observed + 0.011,
            "promised": promised, "promised_low": promised - 0.014, "promised_high": promised + 0.014,
            "loss": promised - observed, "loss_low": promised - observed - 0.018, "loss_high": promised - observed + 0.018,
            "rows": 28330.0 + i, "labelled": 0.973, "quarantine": 0.0004, "prediction_psi": 0.04 + i / 100,
        }  # fmt: skip
        said = [
            f"auc {observed:.3f}, promised {promised:.3f}: worse by {promised - observed:+.3f}, effect 0.015",
            "prediction drift: PSI 0.07 over 30 days", "2 of 32 features drifted after correction: temp, wind_speed",
        ]  # fmt: skip
        step(run, "monitor", key, verdict=verdict, metrics=metrics, reasons=said, facts={"model_version": version, "primary": "auc"})  # fmt: skip
    step(name_of("monitored"), "report", "2013-12", links={"Evidently report": f"{attempt('monitored', 'report')}/evidence/evidently.html"})  # fmt: skip
    asking = name_of("asking")
    train(asking, RUNS["asking"][3], None, [])
    _asking(book, project, asking, step, Approval(), Manifest, approvals, datetime.now(UTC), timedelta)
    requests.submit(book, project, window="2013-11..2014-01", source="drift", by="airflow (asset_triggered)",
                    why="auc 0.721 on 2013-12, promised 0.752: 2 partitions in a row", id="m12")  # fmt: skip
    for kind, subject, severity, reason in (
        ("quarantine", "2013-11", "warning", "3.1% of flights of 2013-11 are in quarantine; at most 2.0% should"),
        ("late", "2014-01", "critical", "the scores of 2014-01 are late: its ingest has not ended well within 6h"),
    ):  # fmt: skip
        alert = alerts.Alert(
            kind, subject, project, "ops-ml", severity, reason, "https://runbooks.example/flight_delay"
        )
        before = [
            t.alert for t in alerts.told_of(book.find(project, "alert")) if not t.ended and t.alert.kind == "late"
        ]
        known = alerts.told_of(book.find(project, "alert"))
        alerts.settle(book, project, [alert, *before], ("slack",), known)
    failed = name_of("failed")
    step(failed, "ingest", "2013-12", verdict="new")
    docs = f"{project}/runs/{failed}/validate-2013-12/1/evidence/data_docs/index.html"
    step(failed, "validate", "2013-12", status="user", links={"Data Docs": docs},
         error="flights of 2013-12: 4 checks fail: distance is outside of 0 … 6000 in 812 rows, such as -1")  # fmt: skip


def spent(version: str | None, number: int, gone: int) -> dict[str, Any]:
    """Return what the ledger keeps of an attempt: `gone` were interrupted, then one was done. Version 1 has no price."""
    began, last = 1365000000.0 + 100_000 * int(version or 9) + 4000 * number, number > gone
    resumed, step = 2900 * (number - 1), 2900 * number + (0 if last else 100)
    seconds = {"step": 0.4 * (step - resumed), "checkpoint": 6.0, "evaluate": 90.0}
    now = began + sum(seconds.values())
    progress = {"began": began, "now": now, "resumed": resumed, "step": step, "committed": 2900 * number,
                "total": 20000, "step_s": 0.39, "seconds": seconds}  # fmt: skip
    firm = version == "3" and last  # its deadline came near: on the fallback class
    return {
        "number": number, "cause": None if last else "interrupted", "compute": "gpu-large" if firm else "gpu-small",
        "spot": not firm, "price_per_hour": 0.0 if version == "1" else 2.7 if firm else 0.9, "queued_s": 35.0 * number,
        "started": datetime.fromtimestamp(began - 48, UTC).isoformat(), "wall_s": now - began + 61,
        "resumed": resumed, "committed": 2900 * number, "progress": progress,
    }  # fmt: skip


def _asking(book: Any, project: str, run: str, step: Any, terms: Any, manifest: Any, approvals: Any, now: Any, delta: Any) -> None:  # fmt: skip
    """Plant a candidate that passed the gate and waits for a person: version 4, registered, not promoted."""
    window = RUNS["asking"][3]
    step(run, "gate", window, verdict="promote", reasons=["better than the champion of 2013-05..2013-07: auc better by +0.0214"])  # fmt: skip
    step(
        run, "register", window, version="4", model=f"{project}/train/{run}/manifest.json", facts={"model_version": "4"}
    )
    verdict = manifest(project=project, verb="gate", key=window, address="4", digest="d", files={})
    approvals.ask(
        book, project, run=run, window=window, verdict=verdict, candidate="c", terms=terms,
        approvers=["ada", "bob"], actor="airflow (asset_triggered)", now=now - delta(hours=1),
    )  # fmt: skip


def _seed(home: Path) -> None:
    """Fill Airflow's database: Dags from their file, runs and their tasks; plant the ledger."""
    import warnings

    warnings.simplefilter("ignore")
    from airflow.utils.db import initdb

    initdb()
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db

    DagBundlesManager().sync_bundles_to_db()
    bag = DagBag(str(home / "dags"))
    assert not bag.import_errors, bag.import_errors
    sync_bag_to_db(bag, "dags-folder", None)
    from airflow.models.dagrun import DagRun
    from airflow.models.serialized_dag import SerializedDagModel
    from airflow.utils.session import create_session
    from airflow.utils.state import DagRunState
    from airflow.utils.types import DagRunTriggeredByType, DagRunType
    from pendulum import datetime as when

    from orrery.ledger import Ledger

    ended = {"asking": {"register": None, "promote": None, "approve": "awaiting_input"}, "failed": {"validate": "failed", "materialize": "upstream_failed"}, "going": {"ingest": "running", "validate": None, "materialize": None}}  # fmt: skip
    with create_session() as session:
        for name, (verb, run_id, state, key) in RUNS.items():
            dag = SerializedDagModel.get_dag(f"{PROJECT}.{verb}", session=session)
            run = dag.create_dagrun(
                run_id=run_id, run_type=DagRunType.MANUAL, logical_date=None, run_after=when(2013, 4, 2, 6, 10),
                conf={"reason": f"why {name}"}, state=DagRunState(state), triggered_by=DagRunTriggeredByType.UI,
                triggering_user_name="ada", session=session,
            )  # fmt: skip
            run.partition_key = key
            run.start_date = when(2013, 4, 2, 6, 10)
            run.end_date = when(2013, 4, 2, 6, 14) if state != "running" else None
            for task in run.get_task_instances(session=session):
                task.state = ended.get(name, {}).get(task.task_id, "success")
                task.try_number = 1
            assert isinstance(run, DagRun)
    plant(Ledger(os.environ["ORRERY_LEDGER"]))
    folder = home / "store" / attempt("kept", "evaluate") / "evidence"
    folder.mkdir(parents=True)
    (folder / "curves.html").write_text("<h1>curves</h1><script>document.title='ran'</script>")
    begun = home / "store" / attempt("going", "validate")
    begun.mkdir(parents=True)
    (begun / "config.json").write_text("{}")


if __name__ == "__main__":
    _seed(Path(sys.argv[2]))
