"""Task logs in the store: as Airflow finds the module, hands logs over and asks for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from orrery.orchestration import task_logs
from orrery.store import Store

LOG = "dag_id=delays.train/run_id=manual__2013-01-01T00:00:00+00:00/task_id=train/attempt=1.log"
FINDS = """
from airflow.logging_config import get_remote_task_log
from airflow.sdk.log import load_remote_log_handler
from orrery.orchestration.task_logs import REMOTE_TASK_LOG
assert get_remote_task_log() is REMOTE_TASK_LOG
assert load_remote_log_handler() is REMOTE_TASK_LOG
"""


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that Airflow writes into."""
    folder = tmp_path / "logs"
    monkeypatch.setattr(task_logs, "conf", SimpleNamespace(get=lambda *_: str(folder)))
    monkeypatch.setenv("ORRERY_STORE", f"file://{tmp_path}/store")
    return folder


def written(folder: Path, text: str, name: str = LOG) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_airflow_finds_it_by_its_setting(tmp_path: Path) -> None:
    """In the server and in a task alike, with nothing else set."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("AIRFLOW_")}
    setting = {"AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS": "orrery.orchestration.task_logs.LOGGING_CONFIG"}
    own = {**env, **setting, "AIRFLOW_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FINDS], env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_log_comes_back_when_its_machine_is_gone(logs: Path) -> None:
    written(logs, "one\n")
    task_logs.REMOTE_TASK_LOG.upload(LOG)
    written(logs, "waits\n", f"{LOG}.trigger.7.log")
    task_logs.REMOTE_TASK_LOG.upload(f"{LOG}.trigger.7.log")
    written(logs, "other\n", LOG.replace("attempt=1", "attempt=11"))
    task_logs.REMOTE_TASK_LOG.upload(LOG.replace("attempt=1", "attempt=11"))
    (logs / LOG).unlink()
    sources, texts = task_logs.REMOTE_TASK_LOG.read(LOG, None)
    assert texts == ["one\n", "waits\n"]
    assert all(s.startswith("file://") for s in sources)


def test_a_task_that_goes_on_keeps_what_it_said_before(logs: Path) -> None:
    written(logs, "planned\n")
    task_logs.REMOTE_TASK_LOG.upload(LOG)
    written(logs, "planned\nended\n")  # on the same machine: one file
    task_logs.REMOTE_TASK_LOG.upload(LOG)
    written(logs, "recorded\n")  # on another one
    task_logs.REMOTE_TASK_LOG.upload(LOG)
    assert task_logs.REMOTE_TASK_LOG.read(LOG, None)[1] == ["planned\nended\nrecorded\n"]


def test_machines_that_take_turns_double_no_line(logs: Path) -> None:
    """A task that waits twice goes on where a scheduler is free: on A, on B, on A again, whose file has its own part."""
    first, second = "planned\n", "planned\nasked again\n"
    for text in (first, "judged\n", second, "judged\nrecorded\n", f"{second}ended", f"{second}ended", "judged\n"):
        written(logs, text)
        task_logs.REMOTE_TASK_LOG.upload(LOG)
    assert task_logs.REMOTE_TASK_LOG.read(LOG, None)[1] == ["planned\njudged\nasked again\nrecorded\nended"]
    written(logs, "on a third\n")
    task_logs.REMOTE_TASK_LOG.upload(LOG)
    assert task_logs.REMOTE_TASK_LOG.read(LOG, None)[1] == [
        "planned\njudged\nasked again\nrecorded\nended\non a third\n"
    ]


def test_what_is_not_there_is_no_log(logs: Path) -> None:
    assert task_logs.REMOTE_TASK_LOG.read(LOG, None) == ([], None)
    task_logs.REMOTE_TASK_LOG.upload(LOG)  # nothing was written: nothing happens
    written(logs, "")
    task_logs.REMOTE_TASK_LOG.upload(LOG)
    assert task_logs.REMOTE_TASK_LOG.read(LOG, None) == ([], None)


def test_a_path_that_leaves_the_folder_reads_nothing(logs: Path) -> None:
    (sources, texts) = task_logs.REMOTE_TASK_LOG.read("../../platform.yaml", None)
    assert texts is None and "no path below the logs" in sources[0]


def test_two_runs_never_share_a_log(logs: Path) -> None:
    """What a run's id may hold is more than what a path of the store may."""
    ids = ["a:b", "a,3a,b", "a/b", "x" * 240, "x" * 239 + "y", "Ä"]
    for run in ids:
        written(logs, run, f"run_id={run}/attempt=1.log")
        task_logs.REMOTE_TASK_LOG.upload(f"run_id={run}/attempt=1.log")
    for run in ids:
        assert task_logs.REMOTE_TASK_LOG.read(f"run_id={run}/attempt=1.log", None)[1] == [run]


def test_a_store_that_is_down_costs_no_task(
    logs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def down(*_: object) -> None:
        raise ConnectionError("no route")

    written(logs, "one\n")
    monkeypatch.setattr(Store, "exists", down)
    task_logs.REMOTE_TASK_LOG.upload(LOG)
    assert "stays on this machine: no route" in caplog.text
