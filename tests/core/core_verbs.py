"""A light verb, `probe`, and effects without a registry: what the engine is tested with. Modes say how it ends."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orrery.contract
from orrery import goodput
from orrery.contract import VERBS, Result, Verb
from orrery.errors import Interrupted, TryAgain, UserError
from orrery.goodput import Progress
from orrery.step import Work


class ProbeParams(orrery.contract.Params):
    """`marks` is a folder in which a test and the verb tell each other where they are."""

    mode: str = "done"
    value: float = 1.0
    marks: str = ""


def register() -> None:
    """Add the verb to the catalogue, and let effects run here instead of in MLflow."""
    VERBS["probe"] = Verb(
        "probe", __name__, "airflow", ProbeParams, "partition", "probed", hints=frozenset({"mode", "marks"})
    )
    VERBS["look"] = dataclasses.replace(VERBS["probe"], name="look", observes=True, dataset="looked")
    # A training that saves and goes on, in the place of the real one; see `go_on`.
    VERBS["train"] = dataclasses.replace(VERBS["train"], module=__name__, environment="airflow")
    for name in ("promote", "rollback"):
        VERBS[name] = dataclasses.replace(VERBS[name], module=__name__, environment="airflow")


def run(work: Work, params: Any) -> Result:
    """Do what the mode says."""
    if work.verb.effect:
        return effect(work)
    if work.verb.name == "train":
        asked = params.overrides
        return go_on(work, Path(asked["marks"]), asked.get("save_s", 0.0))
    modes = {k.removeprefix("mode_"): v for k, v in globals().items() if k.startswith("mode_")}
    result = modes[params.mode](work, params)
    assert isinstance(result, Result)
    return result


def effect(work: Work) -> Result:
    """Drive the alias, a file in the store, to the version that is wanted."""
    version = work.config.params["version"]
    work.store.put("alias", str(version).encode())
    if work.store.exists("crash-after-effect"):
        os._exit(1)
    return Result(facts={"version": version})


def mode_observe(work: Work, params: ProbeParams) -> Result:
    """Like `ingest`: the address follows from what is seen; says so, and waits to be let on."""
    seen = f"{params.value:.0f}" * 32
    with work.at(seen[:32]) as fresh:
        if fresh:
            work.write_json("out.json", {"value": params.value})
    if params.marks:
        mark(params, "started")
        wait_for(Path(params.marks) / "go")
    return Result(metrics={"value": params.value})


def _write(work: Work, params: ProbeParams | float) -> Result:
    value = params.value if isinstance(params, ProbeParams) else params
    work.write_json("out.json", {"value": value})
    work.write_json("nested/more.json", {"sources": work.config.partitions})
    return Result(metrics={"value": value}, facts={"rows": 3}, reasons=["it was asked for"])


def mode_done(work: Work, params: ProbeParams) -> Result:
    if work.store.exists("no-probe"):
        raise UserError("it may not be probed")
    return _write(work, params)


def mode_user(work: Work, params: ProbeParams) -> Result:
    path = work.evidence("report.html", b"<p>why</p>")
    raise UserError("the column is not there", hint="add it", details={"links": {"report": path}})


def mode_again(work: Work, params: ProbeParams) -> Result:
    raise TryAgain("the server is down")


def mode_bug(work: Work, params: ProbeParams) -> Result:
    work.write("out.json", b"half")
    return Result(metrics={"value": 1 / 0})


def mode_full(work: Work, params: ProbeParams) -> Result:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mode_big(work: Work, params: ProbeParams) -> Result:
    work.write("out.json", bytes(1 << 20))
    return Result()


def mode_exit(work: Work, params: ProbeParams) -> Result:
    sys.exit(0)


def mode_vanish(work: Work, params: ProbeParams) -> Result:
    os._exit(9)


def mode_fork_return(work: Work, params: ProbeParams) -> Result:
    """Like a project's function that forks: both processes come back, the parent when the child has ended."""
    return _forked(work, params) or _write(work, params)


def mode_fork_raise(work: Work, params: ProbeParams) -> Result:
    if _forked(work, params):
        raise UserError("in the fork")
    return _write(work, params)


def _forked(work: Work, params: ProbeParams) -> Result | None:
    work.write_json("out.json", {"value": params.value})
    child = os.fork()
    if child == 0:
        return Result(metrics={"value": -1.0})
    mark(params, "forked", str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    return None


def mode_nan(work: Work, params: ProbeParams) -> Result:
    result = _write(work, params)
    result.metrics |= {"auc": float("nan"), "loss": float("inf")}
    return result


def mode_stubborn(work: Work, params: ProbeParams) -> Result:
    """Like a library that thinks every exception is its own."""
    for _ in range(600):
        try:
            (Path(params.marks) / "started").touch()
            time.sleep(0.1)
        except Exception:
            continue
    return _write(work, params)


def mode_deaf(work: Work, params: ProbeParams) -> Result:
    """Like native code that never comes back to Python: no handler runs."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark(params, "started")
    wait_for(Path(params.marks) / "go")
    return _write(work, params)


def mode_wait(work: Work, params: ProbeParams) -> Result:
    """Write half, say so, wait to be let on, write the rest."""
    work.write_json("out.json", {"value": params.value})
    mark(params, "started")
    wait_for(Path(params.marks) / "go")
    return _write(work, params)


def mode_train(work: Work, params: ProbeParams) -> Result:
    return go_on(work, Path(params.marks), params.value)


TOTAL, EVERY, STEP_S = 100_000, 10, 0.02


def go_on(work: Work, marks: Path, save_s: float) -> Result:
    """Like a training: take steps until `go` is there, a checkpoint each ten; told to stop, save.

    Saving lasts for `save_s` seconds at most, and ends before when `saved` is there.
    `started` holds the step that it went on from. What it saves lies at the address, so every attempt finds it.
    """
    told = list[int]()
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    saved = f"{work.config.project}/{work.verb.name}/{work.address}/checkpoints/step"
    resumed = step = committed = int(work.store.read(saved)) if work.store.exists(saved) else 0
    began = time.time()
    mark(marks, "started", str(resumed))
    while not (marks / "go").exists():
        time.sleep(STEP_S)
        step += 1
        stop = bool(told)  # once: it may come at any line, and nothing of the saving is left out
        if stop:
            end = time.monotonic() + save_s
            while time.monotonic() < end and not (marks / "saved").exists():
                time.sleep(STEP_S)
        if stop or step % EVERY == 0:
            work.store.put(saved, str(step).encode())
            committed = step
        now = Progress(
            began=began, now=time.time(), resumed=resumed, step=step, committed=committed, total=TOTAL, step_s=STEP_S
        )
        work.store.put(f"{work.config.folder}/{goodput.NAME}", now.model_dump_json().encode())
        if stop:
            details = {"step": step, "resumed": resumed, "committed": committed}
            raise Interrupted(f"SIGTERM: saved at step {step}", details=details)
    return _write(work, resumed)


def mode_chunks(work: Work, params: ProbeParams) -> Result:
    for i in range(5):
        work.write_json(f"part-{i}.json", list(range(50)))
        time.sleep(0.001)
    return _write(work, params)


def mode_environment(work: Work, params: ProbeParams) -> Result:
    work.write_json("names.json", dict(os.environ))
    return Result()


def mode_spawn(work: Work, params: ProbeParams) -> Result:
    """Start a process that would hold the log open for an hour, say its number, and wait."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    mark(params, "child", str(child.pid))
    wait_for(Path(params.marks) / "go")
    if (Path(params.marks) / "vanish").exists():
        os._exit(9)
    return _write(work, params)


def mark(where: ProbeParams | Path, name: str, text: str = "") -> None:
    marks = where if isinstance(where, Path) else Path(where.marks)
    part = marks / f"{name}.part"
    part.write_text(text)
    part.rename(marks / name)


def wait_for(path: Path, seconds: float = 60) -> str:
    """Return what a file holds, once it is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)
    return path.read_text()
