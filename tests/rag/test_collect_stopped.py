"""A collector that is told to stop, or killed, leaves neither documents nor processes behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rag_house
from rag_house import PROJECT

from orrery import bundle

SLOW = b"*a " * 300_000  # minutes for a reader of Markdown


def children(number: int) -> set[int]:
    """The processes that a process has started."""
    found = set()
    for task in Path(f"/proc/{number}/task").glob("*/children"):
        try:
            found |= set(map(int, task.read_text().split()))
        except OSError:
            continue
    return found


def alive(number: int) -> bool:
    """Tell whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: signal.Signals) -> None:
    house = rag_house.make(tmp_path, monkeypatch, {"guides/slow.md": SLOW, "guides/a.md": "# A", "team/b.md": "# B"})
    house.spec(limits={"seconds": 300})
    plan = house.plan("collect")
    assert plan.packed
    bundle.push(house.store, plan.packed)
    house.store.put(f"{plan.config.folder}/config.json", plan.config.model_dump_json().encode())
    base = f"{plan.config.store}/{plan.config.folder}"
    argv = [
        sys.executable,
        "-m",
        "orrery",
        "step",
        "--config",
        f"{base}/config.json",
        "--result",
        f"{base}/result.json",
    ]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        readers: set[int] = set()
        while not any(_busy(number) for number in readers):
            assert process.poll() is None
            time.sleep(0.05)
            readers = children(process.pid)
        process.send_signal(told)
        assert process.wait(60) == (143 if told == signal.SIGTERM else -signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    for number in readers:
        while alive(number):
            time.sleep(0.05)
    assert [name for name in house.store.names(f"{PROJECT}/collect") if not name.startswith("at-")] == []


def _busy(number: int) -> bool:
    """Tell whether a reader has used a second of processor time: it reads the slow document."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[11]) / os.sysconf("SC_CLK_TCK") > 0.6
