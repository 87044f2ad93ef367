"""A reindex is killed at random moments, on documents that change each time: what is live is always a proven generation.

`make test` kills a few times, `make test-faults` (ORRERY_FAULT_KILLS) as often as that says. The moments come from a
fixed seed, but a machine's speed moves what they hit, on purpose: any moment must be safe.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from notes import FRUIT, PROJECT, Notes
from test_kills import descendants, gone

from orrery.ledger import unfinished

pytestmark = [pytest.mark.faults, pytest.mark.slow]
KILLS = int(os.environ.get("ORRERY_FAULT_KILLS", "8"))


def killed(notes: Notes, after: float, whom: str) -> bool:
    """Start a reindex and SIGKILL its step, its orchestrator, or both; return whether it was hit."""
    process = notes.start("reindex")
    try:
        process.communicate(timeout=after)
        return False
    except subprocess.TimeoutExpired:
        pass
    below = descendants(process.pid)
    targets = {"orchestrator": [process.pid], "step": below[:1] or [process.pid], "all": [*below, process.pid]}[whom]
    for pid in targets:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate(timeout=60)
    assert gone(below), f"left running: {below}"
    return True


def proven(notes: Notes) -> dict[str, Any]:
    """Return what is live, having checked that a verdict said so, and that it is whole."""
    live = notes.live
    generation = notes.store.manifest(live["generation"])
    assert generation is not None and not notes.store.missing_files(generation)
    evaluation = notes.store.manifest(live["evaluation"])
    assert evaluation is not None and evaluation.inputs["generation"][0].path == generation.path
    verdicts = [notes.store.manifest(f"{PROJECT}/gate/{a}/manifest.json") for a in notes.store.names(f"{PROJECT}/gate")]
    said = [v for v in verdicts if v is not None and v.inputs["evaluation"][0].path == evaluation.path]
    assert [v.result["verdict"] for v in said] == ["promote"]
    return live


def content(notes: Notes) -> dict[str, Any]:
    """Return what must be the same with and without kills."""
    found: dict[str, Any] = {"chunks": notes.manifest("chunks").digest}
    found["documents"] = notes.manifest("documents").files["documents.jsonl"].sha256  # beside it: what had changed
    generation = notes.store.manifest(notes.live["generation"])
    assert generation is not None
    for file in ("points.txt", "generation.json"):
        found[file] = notes.store.read(generation.uri(file))
    metrics = notes.manifest("evaluation").result["metrics"]
    return found | {name: value for name, value in metrics.items() if not name.endswith("_ms")}


def test_killed_anywhere_what_is_live_is_proven(tmp_path: Path) -> None:
    notes, moments = Notes(tmp_path / "killed"), random.Random(2026)
    began = time.monotonic()
    notes.run("reindex")
    spent = time.monotonic() - began
    before, hits, tries = proven(notes), 0, 0
    while hits < KILLS:
        tries += 1
        assert tries < 4 * KILLS + 10, f"{hits} of {KILLS} kills hit"
        notes.page(moments.choice(FRUIT[6:]), f"This page was written for the {tries}th time.")
        hits += killed(notes, moments.uniform(0.05, 0.95) * spent, moments.choice(["step", "orchestrator", "all"]))
        now = proven(notes)
        assert int(now["version"]) - int(before["version"]) in (0, 1)
        before = now
    notes.run("reindex")
    last = proven(notes)

    done = notes.ledger.find(PROJECT, "promotion", phase="done")
    # A generation that went live is evaluated once more, now against itself, and keeps its version: that is no second one.
    each = list(dict.fromkeys((e.payload["version"], e.payload["model"]) for e in done))
    assert [version for version, _ in each] == [str(n + 1) for n in range(len(each))], "lost or doubled"
    assert done[-1].payload["model"] == last["generation"] and done[-1].payload["version"] == last["version"]
    assert unfinished(notes.ledger.find(PROJECT, "promotion", "rollback")) == []
    report = notes.store.read_json(notes.manifest("evaluation").uri("report.json"))
    assert report["reconciliation"]["sound"] and report["reconciliation"]["missing"] == []

    undisturbed = Notes(tmp_path / "undisturbed", tmp_path / "killed" / "tiny")
    for page in (notes.folder / "documents" / "guides").iterdir():
        undisturbed.document(f"guides/{page.name}", page.read_text())
    undisturbed.run("reindex")
    assert content(notes) == content(undisturbed)


def test_a_damaged_store_is_found_and_nothing_goes_live_unproven(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    notes.run("reindex")
    live = proven(notes)
    generation = notes.store.manifest(live["generation"])
    assert generation is not None
    shard = Path(notes.store.full(generation.uri("shard.tar")))
    whole = shard.read_bytes()

    shard.write_bytes(whole[: len(whole) // 2])
    said = notes.run("index", code=64)
    assert "damaged" in said and "delete that folder" in said
    # The size is right, the bytes are not: seen when the generation is opened.
    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "its content has digest" in notes.run("evaluate", "--force", code=64)
    assert notes.live == live

    shard.write_bytes(whole)
    manifest = Path(notes.store.full(generation.path))
    text = manifest.read_bytes()
    manifest.write_bytes(text[: len(text) // 2])
    assert notes.run("evaluate", "--force", code=64)
    assert notes.live == live
    manifest.write_bytes(text)
    notes.run("reindex", "--force")
    assert json.loads(notes.store.read(f"{PROJECT}/live.json"))["version"] >= live["version"]
    proven(notes)


def test_stopped_from_the_keyboard_it_says_so_and_goes_on(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    process = notes.start("reindex")
    below: list[int] = []
    while not below:  # its first step
        assert process.poll() is None
        below = descendants(process.pid)
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of them
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in said and "Traceback" not in said
    assert gone(below)
    notes.run("reindex")
    proven(notes)
