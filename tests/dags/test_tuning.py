"""The Dag of a search: as many trials as the spec wants, named by their result, then the decision that trainings read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loop import DAYS, PROJECT, ROOT, Loop

from orrery.contract import Result

WINDOW = f"{DAYS[0]}..{DAYS[2]}"
TUNE = "train: {window: 3, compute: cpu-small}\ntune: {trials: 5, parallel: 2, compute: cpu-large}\n"
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
from airflow.utils.session import create_session
dag = bag.dags["house_energy.tune"]
run = dag.test(run_conf={"window": sys.argv[2], "reason": "a test"})
with create_session() as session:
    note = session.get(type(run), run.id).note
tasks = [[t.task_id, t.map_index, str(t.state), t.rendered_map_index] for t in run.get_task_instances()]
print("END" + json.dumps({"state": str(run.state), "tasks": tasks, "note": note}), flush=True)
"""


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """Three days of the second project, with a search in its spec, and no MLflow."""
    home = tmp_path_factory.mktemp("tuning")
    shutil.copytree(ROOT / "tests" / "projects" / PROJECT, home / "projects" / PROJECT)
    spec = home / "projects" / PROJECT / "spec.yaml"
    lines = [line for line in spec.read_text().splitlines() if not line.startswith("train:")]
    spec.write_text("\n".join(lines) + "\n" + TUNE)
    made = Loop(home, "http://127.0.0.1:9", projects=home / "projects")
    made.env |= {"ORRERY_TUNING": str(home / "tuning"), "OMP_NUM_THREADS": "1"}
    made.data(DAYS[:3])
    return made


@pytest.fixture(scope="module")
def ended(loop: Loop) -> dict[str, Any]:
    folder = loop.home / "dags"
    shutil.copytree(ROOT / "tests" / "projects" / "dags", folder)
    env = loop.env | {
        "AIRFLOW_HOME": str(loop.home / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{loop.home}/airflow.db",
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), WINDOW],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600,
    )  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith("END")), None)
    assert line is not None, done.stdout[-4000:]
    return {**json.loads(line.removeprefix("END")), "log": done.stdout}


@pytest.mark.slow
def test_a_search_ends_with_a_decision_that_the_note_tells(loop: Loop, ended: dict[str, Any]) -> None:
    assert ended["state"] == "success", ended["log"][-4000:]
    numbers = [number for task, number, *_ in ended["tasks"] if task == "trial"]
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    assert ended["note"].startswith(f"tune {WINDOW}: ") and "than the defaults" in ended["note"]
    decided = loop.manifest("tuned", WINDOW)
    assert decided.result["verdict"] in ("tuned", "defaults")
    assert len(list((loop.home / "store" / PROJECT / "trial").glob("*/manifest.json"))) == 5


@pytest.mark.slow
def test_every_trial_is_called_by_its_result(ended: dict[str, Any]) -> None:
    names = {number: name for task, number, _, name in ended["tasks"] if task == "trial"}
    assert all(name.startswith(f"trial {number} · RMSE ") for number, name in names.items()), names


@pytest.mark.slow
def test_the_command_line_finds_the_search_done_and_a_training_takes_it(loop: Loop, ended: dict[str, Any]) -> None:
    said = loop.run("tune", WINDOW)
    assert "5 of 5: trial" in said and said.count("(done before)") == 5 and "skipped, unchanged since" in said
    loop.run("train", WINDOW)
    trained = loop.manifest("candidate", WINDOW)
    decided = loop.manifest("tuned", WINDOW)
    found = json.loads(loop.store.read(decided.uri("params.json")))
    params = json.loads(loop.store.read(trained.uri("params.json")))
    if decided.result["verdict"] == "tuned":
        assert found and found.items() <= params.items()
        assert trained.inputs["tuned"][0].digest == decided.digest
    else:
        assert found == {} and "tuned" not in trained.inputs


def test_a_trial_has_the_spec_s_class_its_own_retries_and_a_bound_on_how_many_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orrery import platform
    from orrery.orchestration import lifecycle

    shutil.copytree(ROOT / "tests" / "projects" / PROJECT, tmp_path / PROJECT)
    spec = tmp_path / PROJECT / "spec.yaml"
    monkeypatch.setenv("ORRERY_PROJECTS", str(tmp_path))
    assert "tune" not in lifecycle(PROJECT, "a runbook")
    spec.write_text(spec.read_text() + TUNE.splitlines()[1] + "\n")
    dag = lifecycle(PROJECT, "a runbook")["tune"]
    trial, tune = dag.get_task("trial"), dag.get_task("tune")
    assert trial.max_active_tis_per_dagrun == 2
    assert trial.partial_kwargs["compute"] == "cpu-large"
    assert trial.pool == platform.load().compute_class("cpu-large").pool
    assert trial.retries == tune.retries > 5
    assert trial.downstream_task_ids == {"tune"}


@pytest.mark.parametrize(
    ("facts", "metrics", "verdict", "name"),
    [
        ({"primary": "auc"}, {"auc": 0.7412}, None, "trial 7 · AUC .741"),
        ({"primary": "log_loss"}, {"log_loss": 1.2}, None, "trial 7 · log_loss 1.200"),
        ({"primary": "auc"}, {}, "pruned", "trial 7 · pruned"),
    ],
)
def test_how_a_trial_is_called(facts: dict, metrics: dict, verdict: str | None, name: str) -> None:
    from orrery.orchestration.operators import trial_name

    assert trial_name(7, Result(facts=facts, metrics=metrics, verdict=verdict)) == name
