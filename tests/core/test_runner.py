"""From request to ledger: what a step may see, how its process ends, and effects that are repaired."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from core_house import House, ended
from core_verbs import wait_for

from orrery import runner
from orrery.contract import Result, StepError
from orrery.errors import Interrupted, RequestError, TryAgain, UserError
from orrery.ledger import Ledger, unfinished
from orrery.plan import Plan, Request
from orrery.runner import LocalProcess, StepFailed, StepVanished
from orrery.servers import processes


def book() -> Ledger:
    return Ledger(os.environ["ORRERY_LEDGER"])


def go(house: House, launch: runner.Launcher | None = None, attempt: int = 1, **options: object) -> Result:
    options.setdefault("marks", str(house.marks))
    request = house.request(attempt=attempt, options=options, actor="eve", reason="because")
    return runner.run(house.planner(), request, launch or LocalProcess(on_line=lambda line: None))


def forked(house: House) -> runner.Launcher:
    """Launch in a fork: as a process of its own, without the imports."""
    return lambda plan: ended(house.fork(plan.config))


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


# -- the process -------------------------------------------------------------------------------------


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
    assert runner._source_secrets(config) == {}
    assert runner._source_secrets(reads) == {"ORRERY_SOURCE_SHOP": "hunter2"}
    assert "ORRERY_SOURCE_SHOP" not in runner.step_environment({})


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


def worker_and_step(house: House, mode: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a worker that carries one `probe`; return it and the step's process number once the verb has begun."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import core_verbs; core_verbs.register()\n"
        "from orrery.plan import Planner, Request; from orrery import runner; runner.LONGEST_TMP = 500\n"
        "options = {'mode': sys.argv[3], 'marks': sys.argv[2]}\n"
        "request = Request('delays', 'probe', ('2013-01',), 'run-1', 'probe', options=options)\n"
        "runner.run(Planner('delays'), request, runner.LocalProcess(on_line=lambda line: None))\n"
    )
    here = str(Path(__file__).resolve().parent)
    argv = [sys.executable, "-c", code, here, str(house.marks), mode]
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
    monkeypatch.setattr(runner, "LONGEST_TMP", longest)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("ORRERY_CACHE", raising=False)
    seen: list[dict[str, str]] = []
    start = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        seen.append(kwargs["env"])
        (Path(kwargs["env"]["TMPDIR"]) / "left").write_text("by a step that was killed")
        return start(*args, **kwargs)

    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    with contextlib.suppress(StepFailed):
        go(house, mode=mode)
    (env,) = seen
    folder = Path(env["TMPDIR"])
    assert folder.parent == (house.home / "var" / "tmp" if longest == 500 else tmp_path)
    assert not folder.exists()
    assert env["ORRERY_CACHE"] == str(house.home / "var" / "cache")


def test_what_a_killed_worker_left_is_removed_by_the_next(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LONGEST_TMP", 500)
    worker, step = worker_and_step(house, "wait")
    (mine,) = (house.home / "var" / "tmp").iterdir()
    with runner._scratch():
        assert mine.exists()  # a worker that is alive keeps its own
    worker.kill()
    worker.wait()
    gone(step)
    with runner._scratch() as folder:
        assert list(folder.parent.iterdir()) == [folder]


def test_an_environment_that_is_not_there(house: House) -> None:
    with pytest.raises(UserError, match="environment 'ml' is not there.*\n.*docker/venv.py ml"):
        runner.interpreter("ml")


# -- results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("user", UserError, "the column is not there"),
        ("again", TryAgain, "the server is down"),
        ("bug", StepFailed, "division by zero"),
        ("vanish", StepVanished, r"left no result \(exit code 9\)"),
    ],
)
def test_how_a_step_ended_is_raised_and_recorded(house: House, mode: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as e:
        go(house, forked(house), mode=mode) if mode != "vanish" else go(house, vanishing(house))
    assert type(e.value) is kind
    assert e.value.details["config"] == "delays/runs/run-1/probe-2013-01/1/config.json"  # type: ignore[attr-defined]
    assert e.value.hint.endswith("to repeat it: orrery reproduce delays delays/runs/run-1/probe-2013-01/1")  # type: ignore[attr-defined]
    (entry,) = book().find("delays", "run")
    assert entry.actor == "eve"
    assert entry.payload["attempt"] == "delays/runs/run-1/probe-2013-01/1"
    assert entry.payload["status"] in ("user", "try_again", "bug")


def vanishing(house: House) -> runner.Launcher:
    return lambda plan: 9


def test_a_vanished_process_is_judged_by_the_store(house: House) -> None:
    def committed_then_killed(plan: Plan) -> int:
        assert house.tell(plan.config)[0] == 0
        Path(house.store.full(f"{plan.config.folder}/result.json")).unlink()
        return -signal.SIGKILL

    result = go(house, committed_then_killed)
    assert result.status == "done"
    assert result.metrics == {"value": 1.0}
    assert "the process vanished after it had committed" in result.reasons
    # Committed by another attempt is not this one's doing.
    other = house.config(9)
    assert runner.read_result(house.store, other, -signal.SIGKILL).status == "bug"


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        (-9, "bug", "killed by SIGKILL"),
        (-15, "interrupted", "SIGTERM"),
        (143, "interrupted", "143"),
        (0, "bug", "exit code 0"),
    ],
)
def test_no_result_no_commit(house: House, code: int, status: str, text: str) -> None:
    result = runner.read_result(house.store, house.config(), code)
    assert (result.status, result.output) == (status, None)
    assert result.error is not None and text in result.error.message


def test_a_result_of_another_version_is_told(house: House) -> None:
    config = house.config()
    house.store.put(f"{config.folder}/result.json", b'{"version": 1, "colour": "red"}')
    with pytest.raises(StepFailed, match=r"result\.json is not a result document"):
        runner.read_result(house.store, config, 0)


def test_what_is_not_done_is_never_passed_over(house: House) -> None:
    plan = house.planner().plan(house.request())
    for status in ("bug", "user", "try_again", "interrupted"):
        with pytest.raises(StepFailed, match=f"ended as {status} and does not say why"):
            runner.raise_for(plan, Result(status=status))
    with pytest.raises(Interrupted, match="told"):
        runner.raise_for(plan, Result(status="interrupted", error=StepError(kind="Interrupted", message="told")))
    runner.raise_for(plan, Result())


def test_a_skip_is_recorded_and_starts_nothing(house: House) -> None:
    go(house, forked(house))

    def never(plan: Plan) -> int:
        raise AssertionError("a process was started")

    result = go(house, never, attempt=2)
    assert result.skipped is not None
    assert len(book().find("delays", "run")) == 2


# -- effects -----------------------------------------------------------------------------------------


def promotion(house: House, version: str = "1", run: str = "run-1", attempt: int = 1, key: str = "2013-01") -> Request:
    options = {"version": version}
    return house.request("promote", key, run=run, attempt=attempt, options=options, actor="eve", reason="better")


def phases() -> list[tuple[str, str]]:
    return [(e.phase, e.payload["version"]) for e in book().find("delays", "promotion")]


def test_a_promotion_is_intended_driven_and_done(house: House) -> None:
    candidate = house.verdict("2013-01..2013-01")
    runner.run(house.planner(), promotion(house), forked(house))
    assert phases() == [("intent", "1"), ("done", "1")]
    assert house.store.read("alias") == b"1"
    champion = book().champion("delays")
    assert champion is not None
    assert (champion.version, champion.model, champion.actor, champion.reason) == ("1", candidate.path, "eve", "better")
    evidence = book().find("delays", "promotion")[-1].payload["evidence"]
    assert set(evidence) == {"evaluation", "verdict"}
    # The same run once more changes nothing; another run promotes from what is there now.
    assert "is the champion since" in str(
        runner.run(house.planner(), promotion(house, attempt=2), forked(house)).skipped
    )
    assert phases() == [("intent", "1"), ("done", "1")]
    house.verdict("2013-02..2013-02", version="2", champion=candidate)
    runner.run(house.planner(), promotion(house, "2", "run-2", key="2013-02"), forked(house))
    assert [e.payload["from"] for e in book().find("delays", "promotion")] == [None, None, "1", "1"]


@pytest.mark.parametrize("where", ["before the effect", "after the effect", "before done"])
def test_a_crash_in_a_promotion_is_repaired_by_the_next_attempt(
    house: House, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.verdict("2013-01..2013-01")
    if where == "before the effect":
        with pytest.raises(StepVanished):
            runner.run(house.planner(), promotion(house), lambda plan: -9)
    elif where == "after the effect":
        house.store.put("crash-after-effect", b"")
        with pytest.raises(StepVanished):
            runner.run(house.planner(), promotion(house), forked(house))
        Path(house.store.full("crash-after-effect")).unlink()
        assert house.store.read("alias") == b"1"
    else:
        with monkeypatch.context() as m:
            m.setattr(runner, "_complete", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                runner.run(house.planner(), promotion(house), forked(house))
        assert house.store.read("alias") == b"1"
    assert phases() == [("intent", "1")]
    assert book().champion("delays") is None
    # Whoever clears the task finishes what was intended, in the words of the one who intended it.
    again = dataclasses.replace(promotion(house, attempt=2), actor="bob", reason="cleared")
    runner.run(house.planner(), again, forked(house))
    assert phases() == [("intent", "1"), ("done", "1")]
    intent, done = book().find("delays", "promotion")
    assert (done.actor, done.payload) == ("eve", intent.payload)
    assert house.store.read("alias") == b"1"


@pytest.mark.parametrize("effect", ["before the effect", "after the effect"])
def test_a_run_of_another_name_finishes_what_was_intended(house: House, effect: str) -> None:
    """A cleared run and a repeat at the command line have a name of their own: the intent must not stay open."""
    house.verdict("2013-01..2013-01")
    if effect == "after the effect":
        house.store.put("crash-after-effect", b"")
    with pytest.raises(StepVanished):
        runner.run(house.planner(), promotion(house), forked(house) if "after" in effect else lambda plan: -9)
    house.store.remove("crash-after-effect")
    assert len(unfinished(book().find("delays"))) == 1
    runner.run(house.planner(), promotion(house, run="run-1--cleared-1"), forked(house))
    intent, done = book().find("delays", "promotion")
    assert (intent.phase, done.phase, done.key) == ("intent", "done", intent.key)
    assert unfinished(book().find("delays")) == []


def test_only_the_same_change_is_taken_over(house: House) -> None:
    house.verdict("2013-01..2013-01")
    with pytest.raises(StepVanished):
        runner.run(house.planner(), promotion(house), lambda plan: -9)
    house.verdict("2013-02..2013-02", version="2")
    runner.run(house.planner(), promotion(house, "2", "run-2", key="2013-02"), forked(house))
    assert phases() == [("intent", "1"), ("intent", "2"), ("done", "2")]
    assert unfinished(book().find("delays")) == []  # overtaken: nobody will finish it, and nobody should


def test_a_run_whose_name_was_used_before_records_its_own_change(house: House) -> None:
    """REST may name a run as one that was deleted: its promotion is another one all the same."""
    first = house.verdict("2013-01..2013-01")
    runner.run(house.planner(), promotion(house), forked(house))
    house.verdict("2013-02..2013-02", version="2", champion=first)
    runner.run(house.planner(), promotion(house, "2", "run-1", key="2013-02"), forked(house))
    assert phases() == [("intent", "1"), ("done", "1"), ("intent", "2"), ("done", "2")]
    champion = book().champion("delays")
    assert champion is not None and champion.version == "2"


def test_a_rollback_holds_for_the_champion_it_was_chosen_from(house: House) -> None:
    models = {v: house.verdict(f"2013-0{v}..2013-0{v}") for v in ("1", "2", "3")}
    for version in ("1", "2"):
        payload = {"version": version, "model": models[version].path}
        book().record("delays", "promotion", f"run-{version}", "done", "me", payload)
    options = {"version": "1", "model": models["1"].path, "previous": "2"}
    request = house.request("rollback", "2013-01", options=options)
    book().record("delays", "promotion", "run-3", "done", "me", {"version": "3", "model": models["3"].path})
    with pytest.raises(RequestError, match="the champion is version 3 now, not version 2"):
        runner.run(house.planner(), request, forked(house))
    assert book().find("delays", "rollback") == []


def test_a_result_from_before_is_not_believed(house: House) -> None:
    """The same attempt is started again after its worker was lost, and vanishes."""
    plan = house.planner().plan(house.request())
    house.store.put(f"{plan.config.folder}/result.json", Result().model_dump_json().encode())
    with pytest.raises(StepVanished):
        go(house, vanishing(house))


def test_a_crash_after_done_keeps_what_was_recorded(house: House) -> None:
    first = house.verdict("2013-01..2013-01")
    runner.run(house.planner(), promotion(house, "1", "run-0"), forked(house))
    house.verdict("2013-02..2013-02", version="2", champion=first)
    runner.run(house.planner(), promotion(house, "2", "run-1", key="2013-02"), forked(house))
    runner.run(house.planner(), promotion(house, "2", "run-1", attempt=2, key="2013-02"), forked(house))
    last = book().find("delays", "promotion", phase="done")[-1]
    assert (last.payload["from"], last.payload["version"]) == ("1", "2")


def test_a_candidate_measured_against_another_champion_is_not_promoted(house: House) -> None:
    """Otherwise a model that beat the champion of yesterday replaces a better one that came since."""
    first = house.verdict("2013-01..2013-01")
    runner.run(house.planner(), promotion(house, "1", "run-0"), forked(house))
    house.verdict("2013-02..2013-02", version="2", champion=first)
    house.verdict("2013-03..2013-03", version="3", champion=first)
    runner.run(house.planner(), promotion(house, "2", "run-1", key="2013-02"), forked(house))
    with pytest.raises(RequestError, match=r"was not compared with the present champion \(version 2\)"):
        runner.run(house.planner(), promotion(house, "3", "run-2", key="2013-03"), forked(house))
    assert [e.payload["version"] for e in book().find("delays", "promotion", phase="intent")] == ["1", "2"]
    assert house.store.read("alias") == b"2"


def test_a_version_that_is_another_candidate_is_not_promoted(house: House) -> None:
    house.verdict("2013-01..2013-01")
    with pytest.raises(RequestError, match="version '7' is not the candidate of 2013-01.*\n.*its version is 1"):
        runner.run(house.planner(), promotion(house, "7"), forked(house))
    assert phases() == []


# -- small things ------------------------------------------------------------------------------------


def test_lines_of_a_log_are_relayed() -> None:
    got: list[tuple[int, str, dict[str, object]]] = []
    for line in (
        '{"event": "done", "level": "warning", "rows": 3, "timestamp": "x"}', "plain", '{"no": "event"}', "{broken", "[1]",
        '{"event": "odd", "level": "shout"}',
    ):  # fmt: skip
        runner.relay(line, lambda *a: got.append(a))
    assert got == [
        (30, "done", {"rows": 3}), (20, "plain", {}), (20, '{"no": "event"}', {}), (20, "{broken", {}), (20, "[1]", {}),
        (20, "odd", {}),
    ]  # fmt: skip
