"""Weights & Biases beside MLflow: the real client writes a run; nothing of this machine is in it, and it costs nobody."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from orrery.registry import tracking, wandb_log

PARAMS = {"dim": 16, "learning_rate": 0.01}
HISTORY = [{"fit_loss": 0.6, "tune_loss": 0.61}, {"fit_loss": 0.5, "tune_loss": float("nan")}]
BLOCK = 32768


def records(file: Path) -> list[Any]:
    """Read a .wandb file: LevelDB's log format after a header of 7 bytes, a protobuf record in each entry."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # the rest of a block is too small for an entry
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole entry, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv(wandb_log.VARIABLE, json.dumps({"project": "house", "mode": "offline", "entity": None}))


def logged(release, name: str = "", within: tracking.Search | None = None) -> tuple[Any, Path]:
    work = release.house.work("train", {"features": [release.features]}, address="c1")
    tracking.log_training(work, PARAMS, HISTORY, {"tune_loss": 0.61, "bad": float("inf")}, within, name)
    folder = Path(work.store.full(f"{work.config.folder}/evidence/wandb"))
    return work, folder


def test_a_run_offline_is_with_the_evidence_and_holds_params_curve_and_metrics(release, offline: None) -> None:
    work, folder = logged(release, "trial 3", tracking.Search("0" * 32, "tune x"))
    (file,) = [p for p in folder.rglob("*") if p.is_file()]
    assert file.parent.name.startswith("offline-run-")  # as `wandb sync` wants it
    found = records(file)
    (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.display_name, run.run_group, run.job_type) == ("house", "trial 3", "0" * 32, "train")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["dim"] == 16 and config["learning_rate"] == 0.01
    assert config["orrery"]["data"] == [release.features.digest] and config["orrery"]["window"] == work.config.key
    points = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    assert [(p["_step"], p["fit_loss"], p.get("tune_loss")) for p in points] == [(0, 0.6, 0.61), (1, 0.5, None)]
    summary = {}
    for r in found:
        if r.WhichOneof("record_type") == "summary":
            summary |= {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.summary.update}
    assert summary["tune_loss"] == 0.61 and "bad" not in summary


def test_nothing_of_this_machine_is_in_the_run(release, offline: None) -> None:
    _, folder = logged(release)
    (file,) = [p for p in folder.rglob("*") if p.is_file()]
    (run,) = [r.run for r in records(file) if r.WhichOneof("record_type") == "run"][:1]
    assert run.host == "step" and not run.git.remote_url
    for place in (str(Path.home()), str(release.house.root), str(Path.cwd())):
        assert place.encode() not in file.read_bytes(), place


def test_online_without_a_key_is_a_warning(release, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv(wandb_log.VARIABLE, json.dumps({"project": "house", "mode": "online"}))
    _, folder = logged(release)
    assert not folder.exists() and "WANDB_API_KEY is not in the step's environment" in capsys.readouterr().out


def test_a_server_that_is_away_is_a_warning(release, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(wandb_log, "WHOLE_S", 4.0)
    monkeypatch.setattr(wandb_log, "INIT_S", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(wandb_log.VARIABLE, json.dumps({"project": "house", "mode": "online"}))
    logged(release)
    assert "not (wholly) in Weights & Biases" in capsys.readouterr().out


def test_without_it_in_the_platform_nothing_is_imported_or_written(release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(wandb_log.VARIABLE, raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "of the person's shell")
    _, folder = logged(release)
    assert not folder.exists()
