"""Processes are killed at random moments; run again, everything is as if nothing had happened.

`make test` kills some 20 times in all, `make test-faults` (ORRERY_FAULT_KILLS) each of two projects often: one
with boosted trees and no Feast, and one with a view and a network, which starts processes of its own. The moments come
from a fixed seed, but a machine's speed moves what they hit, on purpose: any moment must be safe.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from loop import DAYS, NEXT, WINDOW, Loop, registered

from orrery.ledger import unfinished

pytestmark = [pytest.mark.faults, pytest.mark.slow]
TESTS = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("ORRERY_FAULT_KILLS", "12"))
VERBS = ("ingest", "validate", "materialize", "train", "evaluate", "gate", "register", "promote", "score")
DAY = DAYS[-1]
FEW = dict.fromkeys(VERBS, KILLS // (2 * len(VERBS)))


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, the nearest first."""
    found, queue = [], [pid]
    while queue:
        here = queue.pop(0)
        try:
            children = [
                int(c) for t in Path(f"/proc/{here}/task").iterdir() for c in (t / "children").read_text().split()
            ]
        except (OSError, ValueError):
            continue
        found += children
        queue += children
    return found


def gone(pids: list[int], patience: float = 20) -> bool:
    """Wait until none of the processes is left (a zombie is gone: it can write nothing)."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        left = []
        for pid in pids:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if state != "Z":
                left.append(pid)
        if not left:
            return True
        time.sleep(0.05)
    return False


def kill_once(loop: Loop, verb: str, key: str, more: tuple[str, ...], after: float, whom: str) -> bool:
    """Start a step, SIGKILL it (or its orchestrator, or both) after some seconds; return whether it was hit."""
    process = loop.start(verb, key, *more)
    try:
        process.communicate(timeout=after)
        return False
    except subprocess.TimeoutExpired:
        pass
    below = descendants(process.pid)
    # Before there is a step, its orchestrator is what can be killed.
    step = below[:1] or [process.pid]
    targets = {"orchestrator": [process.pid], "step": step, "all": [*below, process.pid]}[whom]
    for pid in targets:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate(timeout=60)
    # A step whose orchestrator died is told to stop by the kernel: nothing may be left writing.
    assert gone(below), f"{verb}: left running: {below}"
    return True


def digests(loop: Loop, verbs: Sequence[str]) -> dict[str, str]:
    """Return what must be the same with and without kills: content of Parquet, weights, verdict, scores."""
    found = {f"{d} {k}": loop.manifest(d, k).digest for d in ("raw", "clean", "features") for k in DAYS}
    made = [d for d, verb in (("candidate", "train"), ("evaluation", "evaluate"), ("verdict", "gate")) if verb in verbs]
    found |= {d: loop.manifest(d, WINDOW).digest for d in made}
    found["weights"] = loop.manifest("candidate", WINDOW).facts["weights_digest"]
    if "score" in verbs:
        found["verdict"] = str(loop.manifest("verdict", WINDOW).result["verdict"])
        found["scores"] = loop.manifest("scores", NEXT).digest
    return found


def kill(loop: Loop, verb: str, kills: int, spent: float, moments: random.Random) -> None:
    """Kill a verb until it was hit so many times, then let it end. `spent` is how long it takes unharmed."""
    key, more = target(loop, verb)
    hits, misses, committed, reach = 0, 0, False, 0.95
    while hits < kills:
        assert misses < 10 + 3 * kills, f"{verb}: {hits} of {kills} kills hit, {misses} came too late"
        # What is committed would be skipped in no time; forced, the work is done again beside it.
        force = ("--force",) if committed and verb not in ("register", "promote") else ()
        whom = moments.choice(["step", "orchestrator", "all"])
        if kill_once(loop, verb, key, (*more, *force), moments.uniform(0.05, reach) * spent, whom):
            hits += 1
        else:
            misses, committed, reach = misses + 1, True, max(0.1, 0.8 * reach)
    loop.run(verb, key, *more)


@pytest.mark.parametrize(
    ("project", "projects", "kills"),
    [
        ("house_energy", TESTS / "projects", dict.fromkeys(VERBS, KILLS // len(VERBS) + 1)),
        ("house_network", TESTS / "faults" / "projects", FEW if KILLS >= 60 else dict.fromkeys(VERBS[:4], 1)),
    ],
)
def test_killed_anywhere_the_outcome_is_the_same(
    tmp_path: Path, mlflow: str, project: str, projects: Path, kills: dict[str, int]
) -> None:
    wanted: dict[str, str] = {}
    spent: dict[str, float] = {}
    moments = random.Random(2013)
    for name in ("reference", "killed"):
        loop = Loop(tmp_path / name, mlflow, project, projects)
        loop.data(DAYS[:-1])
        for verb, hits in kills.items():
            if name == "killed":
                kill(loop, verb, hits, spent[verb], moments)
                continue
            key, more = target(loop, verb)
            began = time.monotonic()
            loop.run(verb, key, *more)
            spent[verb] = time.monotonic() - began
        wanted = wanted or digests(loop, tuple(kills))
    assert digests(loop, tuple(kills)) == wanted
    if "promote" not in kills:
        return
    # However often it was begun, it was promoted once, and nothing is left to finish.
    changes = loop.ledger.find(project, "promotion", "rollback")
    assert [e.phase for e in changes].count("done") == 1, [(e.phase, e.key) for e in changes]
    assert unfinished(changes) == []
    champion = loop.ledger.champion(project)
    assert champion is not None and champion.model == loop.manifest("candidate", WINDOW).path


def target(loop: Loop, verb: str) -> tuple[str, tuple[str, ...]]:
    """Return the key and the options with which a verb is run."""
    if verb in ("ingest", "validate", "materialize"):
        return DAY, ()
    if verb == "promote":
        return WINDOW, ("--version", registered(loop.run("register", WINDOW)))
    if verb == "score":
        loop.data((NEXT,))
        return NEXT, ()
    return WINDOW, ()
