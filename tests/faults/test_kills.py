"""Processes are killed at random moments; run again, everything is as if nothing had happened.

`make test` kills 20 times, `make test-faults` (ORRERY_FAULT_KILLS) more. The moments come from a fixed seed,
but a machine's speed moves what they hit, on purpose: any moment must be safe.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from loop import DAYS, NEXT, PROJECT, WINDOW, Loop, registered

pytestmark = [pytest.mark.faults, pytest.mark.slow]
KILLS = int(os.environ.get("ORRERY_FAULT_KILLS", "20"))
VERBS = ("ingest", "validate", "materialize", "train", "evaluate", "gate", "register", "promote", "score")
DAY = DAYS[-1]


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
    targets = {"orchestrator": [process.pid], "step": below[:1], "all": [*below, process.pid]}[whom]
    for pid in targets:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate(timeout=60)
    # A step whose orchestrator died is told to stop by the kernel: nothing may be left writing.
    assert gone(below), f"{verb}: left running: {below}"
    return True


def digests(loop: Loop) -> dict[str, str]:
    """Return what must be the same with and without kills: content of Parquet, weights, verdict, scores."""
    found = {f"{d} {k}": loop.manifest(d, k).digest for d in ("raw", "clean", "features") for k in DAYS}
    found |= {d: loop.manifest(d, WINDOW).digest for d in ("candidate", "evaluation", "verdict")}
    found["weights"] = loop.manifest("candidate", WINDOW).facts["weights_digest"]
    found["verdict"] = str(loop.manifest("verdict", WINDOW).result["verdict"])
    found["scores"] = loop.manifest("scores", NEXT).digest
    return found


def test_killed_anywhere_the_outcome_is_the_same(tmp_path: Path, mlflow: str) -> None:
    reference = Loop(tmp_path / "reference", mlflow)
    reference.data(DAYS[:-1])
    spent: dict[str, float] = {}
    for verb in VERBS:
        key, more = target(reference, verb)
        began = time.monotonic()
        reference.run(verb, key, *more)
        spent[verb] = time.monotonic() - began
    wanted = digests(reference)

    loop = Loop(tmp_path / "killed", mlflow)
    loop.data(DAYS[:-1])
    moments = random.Random(2013)
    hits = dict.fromkeys(VERBS, 0)
    for number, verb in enumerate(VERBS):
        share = KILLS // len(VERBS) + (number < KILLS % len(VERBS))
        key, more = target(loop, verb)
        committed = False
        for _ in range(3 * share):
            if hits[verb] == share:
                break
            # What is committed would be skipped in no time; forced, the work is done again beside it.
            force = ("--force",) if committed and verb not in ("register", "promote") else ()
            whom = moments.choice(["step", "orchestrator", "all"])
            hit = kill_once(loop, verb, key, (*more, *force), moments.uniform(0.05, 0.95) * spent[verb], whom)
            hits[verb] += hit
            committed = committed or not hit
        loop.run(verb, key, *more)
    print(f"hits: {hits}")
    assert sum(hits.values()) >= 0.8 * KILLS, f"too few kills hit anything: {hits}"
    assert digests(loop) == wanted
    done = loop.ledger.find(PROJECT, "promotion", phase="done")
    assert len({e.payload["version"] for e in done}) == 1, "a promotion went elsewhere"
    assert len({e.key for e in done}) == len(done), "a promotion was recorded twice"
    champion = loop.ledger.champion(PROJECT)
    assert champion is not None and champion.version == done[-1].payload["version"]


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
