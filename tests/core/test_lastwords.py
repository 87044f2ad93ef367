"""A step's last words: whole at any moment, about the right memory, and never the step's trouble."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_house import House, ended
from core_verbs import wait_for

from orrery import lastwords
from orrery.contract import Result, StepError
from orrery.lastwords import Memory


def told(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_bytes())
    assert isinstance(found, dict)
    return found


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def failed(message: str, kind: str = "ValueError") -> Result:
    return Result(status="bug", error=StepError(kind=kind, message=message))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "termination-log"
    monkeypatch.setenv(lastwords.VARIABLE, str(path))
    monkeypatch.setattr(lastwords, "EVERY_S", 0.01)
    return path


# -- what is written ---------------------------------------------------------------------------------


def test_memory_while_it_runs_and_the_result_at_its_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use = iter([*range(100, 150), *[40] * 100_000])
    monkeypatch.setattr(lastwords, "meter", lambda: lambda: Memory(next(use), 200))
    words = lastwords.begin(time.time() - 60)
    assert words is not None
    until(lambda: file.read_bytes() and told(file)["memory_peak"] == 149)
    assert told(file)["memory_limit"] == 200
    assert told(file)["at"] >= 60
    assert "status" not in told(file)
    words.end(failed("no such column"))
    assert told(file) == {
        "memory_peak": 149, "memory_limit": 200, "at": told(file)["at"],
        "status": "bug", "kind": "ValueError", "message": "no such column",
    }  # fmt: skip


def test_nothing_is_done_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lastwords.VARIABLE, raising=False)
    assert lastwords.begin(0.0) is None
    monkeypatch.setenv(lastwords.VARIABLE, "")
    assert lastwords.begin(0.0) is None


@pytest.mark.parametrize("length", [0, 10, 1_000, 4_000, 5_000, 100_000])
@pytest.mark.parametrize("letter", ["a", "ä", "🪐", '"', "\x00"])
def test_never_longer_than_the_kubelet_keeps(length: int, letter: str) -> None:
    text = lastwords.fitting({"memory_peak": 1, "at": 2.0, "status": "bug", "kind": "K", "message": letter * length})
    assert len(text) <= lastwords.LONGEST
    found = json.loads(text)
    assert found["status"] == "bug"
    assert found["message"].startswith(letter * min(length, 300))
    if length >= 5_000:
        assert len(text) > lastwords.LONGEST * 0.6, "cut too much"


def test_a_kind_that_is_too_long_by_itself_is_left_out() -> None:
    text = lastwords.fitting({"status": "bug", "kind": "k" * 9_000, "message": "m"})
    assert json.loads(text) == {"status": "bug"}


def test_whole_at_every_moment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = itertools.cycle([10**15, 1, 10**12])
    monkeypatch.setattr(lastwords, "EVERY_S", 0.0)
    monkeypatch.setattr(lastwords, "meter", lambda: lambda: Memory(1, next(sizes)))  # documents of changing lengths
    words = lastwords.begin(time.time())
    assert words is not None
    until(file.read_bytes)
    for _ in range(500):
        assert told(file)["memory_peak"] == 1
    words.end(Result())
    assert told(file)["status"] == "done"


# -- what must not matter ----------------------------------------------------------------------------


def test_a_file_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in (str(tmp_path), str(tmp_path / "no" / "folder"), "\0"):
        monkeypatch.setattr(os, "environ", {lastwords.VARIABLE: path})
        assert lastwords.begin(0.0) is None


@pytest.mark.parametrize("path", ["/dev/full", "/proc/self/oom_score_adj"])
def test_a_file_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv(lastwords.VARIABLE, path)
    words = lastwords.begin(0.0)
    assert words is not None
    words._thread.join(60)  # it has given up
    words.end(Result())


def test_memory_that_cannot_be_measured(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Memory:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(lastwords, "meter", lambda: broken)
    words = lastwords.begin(time.time())
    assert words is not None
    words._thread.join(60)
    words.end(Result())  # and no error


# -- which memory ------------------------------------------------------------------------------------


def proc(root: Path, cgroup: str, mounts: str) -> None:
    folder = root / "proc" / "self"
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text(cgroup)
    (folder / "mountinfo").write_text(mounts)


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


V2 = "31 23 0:26 {root} {at} ro,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "34 31 0:32 {root} {at}/cpu ro - cgroup cgroup rw,cpu\n35 31 0:33 {root} {at}/memory ro - cgroup cgroup rw,memory\n"
)


def test_a_containers_own_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastwords, "PROC", tmp_path / "proc")
    at = tmp_path / "cgroup"
    proc(tmp_path, "0::/\n", V2.format(root="/", at=at))
    write(at, memory__max=2**31, memory__current=5, memory__peak=7)
    assert lastwords.meter()() == Memory(7, 2**31)
    (at / "memory.peak").unlink()  # before Linux 5.19
    assert lastwords.meter()() == Memory(5, 2**31)


def test_a_group_below_a_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastwords, "PROC", tmp_path / "proc")
    at = tmp_path / "cgroup"
    proc(tmp_path, "0::/kubepods/pod1/ctr\n", V2.format(root="/", at=at))
    write(at / "kubepods" / "pod1" / "ctr", memory__max=99, memory__current=5, memory__peak=7)
    assert lastwords.meter()() == Memory(7, 99)


@pytest.mark.parametrize("root", ["/", "/kubepods/pod1/ctr", "/elsewhere"])
def test_the_old_hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    monkeypatch.setattr(lastwords, "PROC", tmp_path / "proc")
    at = tmp_path / "cgroup"
    proc(
        tmp_path, "9:cpu:/kubepods/pod1/ctr\n4:memory:/kubepods/pod1/ctr\n0::/\n",
        V1.format(root=root, at=at),
    )  # fmt: skip
    write(at / "memory", memory__limit_in_bytes=123, memory__max_usage_in_bytes=45)
    assert lastwords.meter()() == Memory(45, 123)


@pytest.mark.parametrize(
    ("cgroup", "values"),
    [
        ("0::/\n", {"memory__max": "max", "memory__current": 5}),
        ("0::/\n", {"memory__max": "many", "memory__current": 5}),
        ("0::/\n", {"memory__max": 5, "memory__current": ""}),
        ("0::/\n", {}),
        ("4:memory:/\n", {"memory__limit_in_bytes": 9223372036854771712, "memory__max_usage_in_bytes": 5}),
        ("", {}),
        ("nonsense\n", {}),
        ("0::\n4\n", {}),
    ],
)
def test_without_a_limit_it_is_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, values: dict[str, object]
) -> None:
    proc(tmp_path, cgroup, V2.format(root="/", at=tmp_path / "a") + V1.format(root="/", at=tmp_path))
    write(tmp_path / "a", **values)
    write(tmp_path / "memory", **values)
    monkeypatch.setattr(lastwords, "PROC", tmp_path / "proc")
    measure = lastwords.meter()
    monkeypatch.setattr(lastwords, "PROC", Path("/proc"))
    found = measure()
    assert found.limit is None
    assert 2**20 < found.peak < 2**36


def test_no_proc_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastwords, "PROC", tmp_path / "none")
    assert lastwords.meter()() == Memory(0, None)


def test_processes_below_are_counted() -> None:
    code = "import sys; b = bytearray(200 << 20); print('ready', flush=True); sys.stdin.read()"
    below = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert below.stdout is not None
    below.stdout.readline()
    with_it, alone = lastwords.resident(os.getpid()), lastwords.resident(below.pid)
    assert alone > 200 << 20
    assert with_it > alone
    below.communicate()
    assert lastwords.resident(os.getpid()) < with_it - (150 << 20)


# -- in a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "status", "kind"),
    [("done", "done", None), ("user", "user", "UserError"), ("bug", "bug", "ZeroDivisionError")],
)
def test_a_step_says_how_it_ended(house: House, file: Path, mode: str, status: str, kind: str | None) -> None:
    _, result = house.tell(house.config(mode=mode))
    assert result is not None
    words = told(file)
    assert (words["status"], words.get("kind")) == (status, kind)
    assert words.get("message") == (result.error.message if result.error else None)
    assert words["memory_peak"] > 2**20
    assert 0 <= words["at"] < 600


def test_a_killed_step_leaves_its_memory(house: House, file: Path) -> None:
    child = house.fork(house.config(mode="wait"))
    wait_for(house.marks / "started")
    until(file.read_bytes)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    words = told(file)
    assert words["memory_peak"] > 2**20
    assert "status" not in words


def test_sigterm_still_comes_to_the_step(house: House, file: Path) -> None:
    child = house.fork(house.config(mode="wait"))
    wait_for(house.marks / "started")
    os.kill(child, signal.SIGTERM)
    assert ended(child) == 143
    assert told(file)["status"] == "interrupted"


def test_a_step_whose_words_go_nowhere_is_done(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/dev/full", "/proc/version", str(house.home)):
        monkeypatch.setenv(lastwords.VARIABLE, path)
        code, result = house.tell(house.config(value=len(path)))
        assert code == 0
        assert result is not None and result.status == "done"
