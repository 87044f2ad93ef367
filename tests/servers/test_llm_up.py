"""`orrery up --llm`: the language model as a third server, started only when it is asked for."""

from __future__ import annotations

import io
import os
import socket
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from orrery import servers
from orrery.errors import UserError
from orrery.servers import config, processes

ROOT = Path(__file__).resolve().parents[2]
VENVS = Path(os.environ.get("ORRERY_VENVS") or ROOT / ".venvs")
EVERY = (*servers.SERVERS, servers.LLM)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give an empty home with free ports, and leave nothing running in it."""
    for name in [n for n in os.environ if n.startswith(("ORRERY_", "AIRFLOW_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ORRERY_VENVS", str(VENVS))
    for variable, _ in config.PORTS.values():
        monkeypatch.setenv(variable, str(free_port()))
    yield tmp_path
    for name in EVERY:
        processes.end(partial(processes.family, config.marker(tmp_path, name)), grace=5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def stand_in(home: Path, monkeypatch: pytest.MonkeyPatch, llm: str | None) -> None:
    """Put programs in the place of the environments: Airflow's and MLflow's sleep, the model's does what is said."""
    fake = home / "venvs"
    programs = {("airflow", "airflow"): "exec sleep 600", ("ml", "mlflow"): "exec sleep 600"}
    if llm is not None:
        programs["llm", "python"] = llm
    for (environment, name), line in programs.items():
        file = fake / environment / "bin" / name
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/bin/sh\n{line}\n")
        file.chmod(stat.S_IRWXU)
    monkeypatch.setenv("ORRERY_VENVS", str(fake))


def test_without_the_flag_nobody_hears_of_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(place, monkeypatch, "echo it was started; exit 1")
    monkeypatch.setattr(servers, "PATIENCE", dict.fromkeys(EVERY, 0.3))
    with pytest.raises(UserError, match="is not healthy"):
        servers.up(place, console=quiet())
    assert not (place / "var" / "log" / "llm.log").exists()
    assert [item.name for item in servers.statuses(place)] == ["airflow", "mlflow"]
    console = quiet()
    servers.down(place, console=console)
    assert "language model" not in printed(console)


def test_an_environment_that_is_missing_is_said_before_anything_starts(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(place, monkeypatch, None)
    with pytest.raises(UserError, match="the language model's environment is not made") as caught:
        servers.up(place, console=quiet(), llm=True)
    assert "python3.11 docker/venv.py llm" in caught.value.hint
    assert [item.state for item in servers.statuses(place)] == ["stopped", "stopped"]


def test_its_port_is_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_LLM_PORT", os.environ["ORRERY_MLFLOW_PORT"])
    with pytest.raises(UserError, match="MLflow and the language model both have port") as caught:
        servers.up(place, console=quiet(), llm=True)
    assert "ORRERY_MLFLOW_PORT and ORRERY_LLM_PORT" in caught.value.hint
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("ORRERY_LLM_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="which the language model needs, is taken by process") as caught:
            servers.up(place, console=quiet(), llm=True)
    assert "ORRERY_LLM_PORT" in caught.value.hint
    monkeypatch.delenv("ORRERY_LLM_PORT")
    assert config.url("llm") == "http://127.0.0.1:8090"


def test_one_that_ends_at_once_shows_its_last_words(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(place, monkeypatch, "echo out of memory; exit 3")
    with pytest.raises(UserError, match=r"the language model ended while it was starting(.|\n)*out of memory"):
        servers.up(place, console=quiet(), llm=True)
    # It was asked for: what became of it is told until it is ended in order.
    assert [(i.name, i.state) for i in servers.statuses(place)][-1] == ("llm", "stopped")
    servers.down(place, console=quiet())
    assert [item.name for item in servers.statuses(place)] == ["airflow", "mlflow"]


def test_the_real_one_is_started_told_of_left_alone_and_ended(place: Path) -> None:
    if not (VENVS / "llm" / "bin" / "python").exists():
        pytest.skip("the environment llm is not made: make test-environments")
    console = quiet()
    (place / "var" / "run").mkdir(parents=True)
    record = servers._start(place, servers.LLM)
    servers._wait(place, {servers.LLM: record}, console)
    assert record.url == config.url("llm")
    said = httpx.get(f"{record.url}/v1/models", timeout=10, trust_env=False).json()
    assert [m["id"] for m in said["data"]] == ["smollm2"]
    status = servers.statuses(place)[-1]
    assert (status.name, status.state, status.pid) == ("llm", "healthy", record.pid)
    # A launcher that asks again finds it; one whose note is lost finds it by its marker.
    assert servers._running(place, servers.LLM, console) == servers._read(place, servers.LLM)
    servers._record_file(place, servers.LLM).unlink()
    assert "left behind: 1 processes; `orrery up --llm` replaces them" in servers.statuses(place)[-1].detail
    servers._write(place, servers.LLM, record)
    servers.down(place, console=console)
    assert "the language model: ended 1 processes" in printed(console)
    assert processes.family(config.marker(place, servers.LLM)) == []
    assert [item.name for item in servers.statuses(place)] == ["airflow", "mlflow"]
