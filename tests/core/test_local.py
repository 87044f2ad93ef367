"""A step as a process on this machine: what it may see, what it leaves, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_house import House, go
from core_verbs import wait_for

from orrery import local
from orrery.contract import Result
from orrery.errors import Interrupted, UserError
from orrery.local import LocalProcess
from orrery.plan import outlives
from orrery.runner import StepFailed, StepVanished, prepare
from orrery.servers import processes


def gone(pid: int) -> None:
    """Wait until a process is no more (a zombie is no more either)."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} is still there")


def test_the_log_comes_line_by_line_and_the_orchestrators_secrets_stay_behind(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    withheld = (
        "AIRFLOW__CORE__FERNET_KEY", "AIRFLOW_CONN_SHOP", "AIRFLOW_HOME", "_AIRFLOW_X", "ORRERY_LEDGER", "ORRERY_SOURCE_SHOP",
        "ORRERY_SERVER_PASSWORD", "ORRERY_AIRFLOW_PASSWORD", "PYTHONSTARTUP", "VIRTUAL_ENV", "PYTHONPATH",
    )  # fmt: skip
    for name in withheld:
        monkeypatch.setenv(name, os.environ.get(name, "hunter2"))
    monkeypatch.setenv("AWS_REGION", "here")
    monkeypatch.setenv("ORRERY_SERVER", "home:airflow")
    lines: list[str] = []
    result = go(house, LocalProcess(on_line=lines.append), mode="environment")
    assert result.output is not None
    manifest = house.store.manifest(result.output)
    assert manifest is not None
    seen = json.loads(house.store.read(manifest.uri("names.json")))
    assert set(seen) & set(withheld) == set()
    assert "hunter2" not in seen.values()
    assert "ORRERY_PARENT" not in seen  # read once; what a step starts has another parent
    assert seen["AWS_REGION"] == "here"
    assert seen["ORRERY_SERVER"] == "home:airflow"
    assert seen["ORRERY_LOG"] == "json"
    assert [json.loads(line)["event"] for line in lines] == ["probe 2013-01: done"]


def test_a_sources_secret_reaches_the_step_that_reads_it_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_SOURCE_SHOP", "hunter2")
    config = house.config()
    reads = config.model_copy(update={"params": {"sources": {"shop": {"secret_env": "ORRERY_SOURCE_SHOP"}, "x": {}}}})
    assert local._source_secrets(config) == {}
    assert local._source_secrets(reads) == {"ORRERY_SOURCE_SHOP": "hunter2"}
    assert "ORRERY_SOURCE_SHOP" not in local.step_environment({})


@pytest.mark.parametrize("how", ["stop", "end", "vanish"])
def test_nothing_that_a_step_started_outlives_it(house: House, how: str) -> None:
    """A step's child holds the log open: without its end the reader would wait for ever."""
    launch, ends = LocalProcess(on_line=lambda line: None), list[object]()

    def carry() -> None:
        try:
            ends.append(go(house, launch, mode="spawn"))
        except Exception as e:
            ends.append(e)

    carrier = threading.Thread(target=carry)
    carrier.start()
    child = int(wait_for(house.marks / "child"))
    os.kill(child, 0)
    if how == "stop":
        launch.stop()
        launch.stop()
    else:
        if how == "vanish":
            (house.marks / "vanish").touch()
        (house.marks / "go").touch()
    carrier.join(60)
    assert not carrier.is_alive()
    gone(child)
    (end,) = ends
    kind = {"stop": Interrupted, "end": Result, "vanish": StepVanished}[how]
    assert isinstance(end, kind), end
    launch.stop()


def worker_and_step(house: House, mode: str, value: float = 1.0, **more: Any) -> tuple[subprocess.Popen[bytes], int]:
    """Start a worker that carries one `probe`; return it and the step's process number once the verb has begun."""
    code = (
        "import json, signal, sys; sys.path.insert(0, sys.argv[1]); import core_verbs; core_verbs.register()\n"
        "from dataclasses import replace; from orrery import local, runner; local.LONGEST_TMP = 500\n"
        "from orrery.plan import Planner, Request\n"
        "options = {'mode': sys.argv[3], 'marks': sys.argv[2], 'value': float(sys.argv[4])}\n"
        "request = Request('delays', 'probe', ('2013-01',), 'run-1', 'probe', options=options)\n"
        "launch, told = local.LocalProcess(on_line=lambda line: None), json.loads(sys.argv[5])\n"
        # As Airflow's task: SIGTERM asks the launcher to stop, and the main thread goes on waiting.
        "signal.signal(signal.SIGTERM, lambda *_: launch.stop())\n"
        "runner.run(Planner('delays'), request, lambda plan: launch(replace(plan, **told)))\n"
    )
    here = str(Path(__file__).resolve().parent)
    argv = [sys.executable, "-c", code, here, str(house.marks), mode, str(value), json.dumps(more)]
    worker = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    wait_for(house.marks / "started")
    (step,) = [int(p) for p in Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()]
    return worker, step


def test_the_step_follows_its_parent(house: House) -> None:
    """SIGKILL of the worker ends the step, which leaves a result and no output."""
    worker, step = worker_and_step(house, "wait")
    worker.kill()
    worker.wait()
    gone(step)
    assert house.result(house.config()).status == "interrupted"
    assert house.manifests() == []


def saved(house: House) -> int:
    """Return the step of the newest checkpoint."""
    address = house.config(mode="train", value=VALUE).address
    return int(house.store.read(f"delays/probe/{address}/checkpoints/step"))


VALUE = 4.0  # seconds that the step saves for, in each of the next tests


def test_a_step_that_saves_outlives_the_worker_that_told_it_to_stop(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow kills the worker five seconds after SIGTERM; here at once."""
    monkeypatch.setattr(local, "LONGEST_TMP", 500)
    worker, step = worker_and_step(house, "train", VALUE, outlive=20)
    folder = "delays/runs/run-1/probe-2013-01/1"
    (scratch,) = (house.home / "var" / "tmp").iterdir()
    before = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    worker.kill()
    worker.wait()
    with local._scratch():
        assert scratch.exists()  # another step begins here meanwhile, and takes nothing away
    assert local._is_alive(json.loads(house.store.read(f"{folder}/{local.PROCESS}")))
    local.wait_for_end(house.store, folder, 20)
    assert VALUE - 0.2 < time.monotonic() - before < 10
    gone(step)
    result = house.result(house.config())
    assert result.status == "interrupted" and result.error is not None
    assert result.error.details["committed"] == saved(house) > 0
    with local._scratch():
        assert not scratch.exists()
    local.wait_for_end(house.store, folder, 20)  # nothing to wait for


def test_a_worker_that_is_not_killed_waits_for_the_saving(house: House) -> None:
    worker, step = worker_and_step(house, "train", VALUE, outlive=20)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 1  # Interrupted
    gone(step)
    assert house.result(house.config()).status == "interrupted"
    assert saved(house) > 0


def test_the_plan_says_how_long_a_step_may_save_whoever_launches_it(house: House) -> None:
    """`within` is 25 s when the spec does not say; what the step needs to end comes on top."""
    assert house.planner().plan(house.request()).outlive == 0.0
    launch, spec = LocalProcess(on_line=lambda line: None), house.planner().spec
    assert outlives("train", spec) == outlives("trial", spec) == 28.0 and outlives("score", spec) == 0.0
    plan = replace(house.planner().plan(house.request(options={"mode": "environment"})), outlive=28.0)
    prepare(plan, house.store)
    assert launch(plan) == 0
    (manifest,) = house.manifests()
    assert json.loads(house.store.read(manifest.uri("names.json")))["ORRERY_OUTLIVE"] == "28.0"


def test_an_earlier_attempt_that_does_not_end_is_killed_by_the_next(house: House) -> None:
    worker, step = worker_and_step(house, "deaf", outlive=20)
    worker.kill()
    worker.wait()
    before = time.monotonic()
    local.wait_for_end(house.store, "delays/runs/run-1/probe-2013-01/1", 0.5)
    gone(step)
    assert time.monotonic() - before < 10


def test_a_step_that_may_not_outlive_is_killed_after_the_grace(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    launch, ends = LocalProcess(on_line=lambda line: None), list[BaseException]()

    def carry() -> None:
        try:
            go(house, launch, mode="train", value=30.0)
        except StepVanished as e:
            ends.append(e)

    carrier = threading.Thread(target=carry)
    carrier.start()
    wait_for(house.marks / "started")
    launch.stop()
    carrier.join(20)
    assert "killed by SIGKILL" in str(ends[0])


def test_a_process_is_told_from_another_of_its_number(house: House) -> None:
    mine = local._identity(os.getpid())
    assert local._is_alive(mine)
    assert not local._is_alive({**mine, "born": "another boot/1"})
    assert not local._is_alive({**mine, "machine": "abcdef"})
    assert not local._is_alive({})
    house.store.put(f"x/{local.PROCESS}", b"[1]")
    local.wait_for_end(house.store, "x", 20)
    local.wait_for_end(house.store, "nothing", 20)


def test_down_finds_a_step_that_outlived_its_worker_and_heeds_no_sigterm(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = f"{house.home}:airflow"
    monkeypatch.setenv("ORRERY_SERVER", marker)
    worker, step = worker_and_step(house, "deaf")
    worker.kill()
    worker.wait()
    time.sleep(0.2)
    assert Path(f"/proc/{step}").exists()  # native code and the like: told to stop, it goes on
    assert processes.end(lambda: processes.family(marker), grace=0.2) >= 1
    gone(step)


@pytest.mark.parametrize("mode", ["environment", "vanish", "bug"])
@pytest.mark.parametrize("longest", [500, 10])
def test_a_steps_temporary_files_end_with_it(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, longest: int
) -> None:
    """However it ended. A path too long for a socket gives way to the system's own folder."""
    monkeypatch.setattr(local, "LONGEST_TMP", longest)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("ORRERY_CACHE", raising=False)
    seen: list[dict[str, str]] = []
    start = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        seen.append(kwargs["env"])
        (Path(kwargs["env"]["TMPDIR"]) / "left").write_text("by a step that was killed")
        return start(*args, **kwargs)

    monkeypatch.setattr(local.subprocess, "Popen", popen)
    with contextlib.suppress(StepFailed):
        go(house, mode=mode)
    (env,) = seen
    folder = Path(env["TMPDIR"])
    assert folder.parent == (house.home / "var" / "tmp" if longest == 500 else tmp_path)
    assert not folder.exists()
    assert env["ORRERY_CACHE"] == str(house.home / "var" / "cache")


def test_what_a_killed_worker_left_is_removed_by_the_next(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LONGEST_TMP", 500)
    worker, step = worker_and_step(house, "wait")
    (mine,) = (house.home / "var" / "tmp").iterdir()
    with local._scratch():
        assert mine.exists()  # a worker that is alive keeps its own
    worker.kill()
    worker.wait()
    gone(step)
    with local._scratch() as folder:
        assert list(folder.parent.iterdir()) == [folder]


def test_an_environment_that_is_not_there(house: House) -> None:
    with pytest.raises(UserError, match="environment 'ml' is not there.*\n.*docker/venv.py ml"):
        local.interpreter("ml")


def test_lines_of_a_log_are_relayed() -> None:
    got: list[tuple[int, str, dict[str, object]]] = []
    for line in (
        '{"event": "done", "level": "warning", "rows": 3, "timestamp": "x"}', "plain", '{"no": "event"}', "{broken", "[1]",
        '{"event": "odd", "level": "shout"}',
    ):  # fmt: skip
        local.relay(line, lambda *a: got.append(a))
    assert got == [
        (30, "done", {"rows": 3}), (20, "plain", {}), (20, '{"no": "event"}', {}), (20, "{broken", {}), (20, "[1]", {}),
        (20, "odd", {}),
    ]  # fmt: skip
