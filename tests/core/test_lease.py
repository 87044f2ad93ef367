"""Leases: fencing tokens, taking over, waiting."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orrery import lease as leases
from orrery.errors import Fenced, LeaseHeld
from orrery.lease import Lease
from orrery.store import Store

HOLDER = """
import sys, time
from orrery.lease import Lease
from orrery.store import Store
with Lease(Store(sys.argv[1]), "l", "other/task", "attempt-1"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    monkeypatch.setattr(leases, "DEAD_AFTER_S", 0.6)


def lease(store: Store, owner: str = "run/task", attempt: str = "1", **kwargs: float) -> Lease:
    return Lease(store, "l", owner, attempt, **kwargs)


def test_one_after_another(store: Store) -> None:
    with lease(store) as a:
        a.check()
        assert a.token == 1
    with lease(store, "other/task") as b:
        assert b.token == 2
    documents = [json.loads(store.read(f"l/{n}")) for n in store.names("l")]
    assert [(d["owner"], d["done"]) for d in documents] == [("run/task", True), ("other/task", True)]


def test_the_same_owner_takes_over_at_once_and_fences_the_old_attempt(store: Store) -> None:
    with lease(store, attempt="1") as old:
        waits: list[int] = []
        new = lease(store, attempt="2")
        new.acquire(lambda: waits.append(1))
        assert waits == []
        new.check()
        with pytest.raises(Fenced, match="attempt 2 has taken over"):
            old.check()
    new.check()


def test_another_owner_waits_for_the_release(store: Store) -> None:
    first, ended = lease(store), threading.Event()
    first.__enter__()
    second = lease(store, "other/task", patience=60)

    def release() -> None:
        if not ended.is_set():
            ended.set()
            first.__exit__(None, None, None)

    second.acquire(release)
    assert ended.is_set()
    assert second.token == 2


def test_a_live_holder_is_not_robbed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "DEAD_AFTER_S", 2.5)  # each renewal waits for the disk, which others keep busy
    with (
        lease(store, attempt="folder-of-1") as first,
        pytest.raises(LeaseHeld, match=r"run/task \(folder-of-1\) is writing") as e,
    ):
        lease(store, "other/task", patience=4).acquire()
    assert e.value.exit_code == 75
    assert first.token == 1


def test_a_dead_holder_is_taken_over(store: Store) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, store.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.kill()
    process.communicate()
    ticks: list[int] = []
    with lease(store) as mine:
        assert mine.token == 2
    fresh = lease(store, "third/task")
    fresh.acquire(lambda: ticks.append(1))
    assert ticks == []  # released: no wait


def test_of_many_of_one_owner_the_last_may_commit(store: Store) -> None:
    held = [lease(store, attempt=str(i)) for i in range(8)]
    threads = [threading.Thread(target=h.acquire) for h in held]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(h.token for h in held) == list(range(1, 9))
    top = max(held, key=lambda h: h.token)
    top.check()
    for h in held:
        if h is not top:
            with pytest.raises(Fenced):
                h.check()


@pytest.mark.parametrize("data", [b"", b"[]"])
def test_a_damaged_lease_ends(store: Store, data: bytes) -> None:
    store.put("l/000001.json", data)
    with lease(store) as mine:
        assert mine.token == 2


def test_a_store_that_fails_once_does_not_end_the_renewing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from orrery.errors import TryAgain

    calls, again = [], threading.Event()
    put = store.put

    def failing(path: str, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise TryAgain("a hiccup")
        put(path, data)
        again.set()

    monkeypatch.setattr(store, "put", failing)
    with lease(store):
        assert again.wait(30)
