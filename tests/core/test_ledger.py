"""The append-only record."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import exc

from orrery.databases import with_driver
from orrery.errors import OrreryError, RequestError, TryAgain, UserError
from orrery.ledger import Ledger, _reachable, moment

WRITER = """
import sys
from orrery.ledger import Ledger
print("ready", flush=True)
sys.stdin.readline()
book = Ledger(sys.argv[1])
print(sum(book.record("p", "run", f"k{i}", "done", "me", {"i": i}) for i in range(40)))
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/deep/ledger.db"


def promote(book: Ledger, version: str, key: str, kind: str = "promotion", phase: str = "done") -> bool:
    payload = {"version": version, "model": f"p/train/{version}/manifest.json", "reason": f"because {version}"}
    return book.record("p", kind, key, phase, "eve", payload)  # type: ignore[arg-type]


def test_once_per_project_kind_key_and_phase(url: str) -> None:
    book = Ledger(url)
    assert book.record("p", "run", "k", "done", "me", {"n": 1})
    assert not book.record("p", "run", "k", "done", "you", {"n": 2})
    for other in (
        ("q", "run", "k", "done"),
        ("p", "decision", "k", "done"),
        ("p", "run", "l", "done"),
        ("p", "run", "k", "intent"),
    ):
        assert book.record(*other, "me", {})
    entry = book.get("p", "run", "k", "done")
    assert entry is not None
    assert (entry.actor, entry.payload) == ("me", {"n": 1})
    assert book.get("p", "run", "none", "done") is None
    assert [e.key for e in book.find("p", "run")] == ["k", "l", "k"]
    assert [e.key for e in book.find("p", "run", "decision", phase="done")] == ["k", "k", "l"]
    assert len(book.find("p")) == 4


def test_long_keys_stay_apart(url: str) -> None:
    book, stem = Ledger(url), "x" * 400
    assert book.record("p", "run", f"{stem}/1", "done", "a" * 900, {})
    assert book.record("p", "run", f"{stem}/2", "done", "me", {})
    assert not book.record("p", "run", f"{stem}/2", "done", "me", {})
    assert book.get("p", "run", f"{stem}/1", "done") is not None
    assert all(len(e.key) <= 250 and len(e.actor) <= 250 for e in book.find("p"))


def test_the_champion_now_and_at_a_time(url: str) -> None:
    book = Ledger(url)
    assert book.champion("p") is None
    promote(book, "1", "run-1", phase="intent")
    assert book.champion("p") is None  # about to is not done
    promote(book, "1", "run-1")
    first = book.champion("p")
    assert first is not None
    assert (first.version, first.model, first.actor, first.reason) == (
        "1",
        "p/train/1/manifest.json",
        "eve",
        "because 1",
    )
    while moment(first.since) == now():
        pass  # the ledger's clock ticks in milliseconds
    promote(book, "2", "run-2")
    promote(book, "1", "run-3", "rollback")
    assert [book.champion("p", at).version for at in (first.since,)] == ["1"]  # type: ignore[union-attr]
    assert book.champion("p", "2000-01-01") is None
    assert book.champion("p", "2999-01-01") == book.champion("p")
    assert book.champion("p").version == "1"  # type: ignore[union-attr]
    assert book.versions("p") == {"1": "p/train/1/manifest.json", "2": "p/train/2/manifest.json"}
    assert book.champion("q") is None


def now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="milliseconds")


def test_registered_versions(url: str) -> None:
    book = Ledger(url)
    book.record("p", "run", "a", "done", "me", {"verb": "register", "version": "3", "model": "m3"})
    book.record("p", "run", "b", "done", "me", {"verb": "train"})
    assert book.registered("p") == {"3": "m3"}


def test_writers_at_once_in_threads(url: str) -> None:
    won, barrier = Counter[int](), threading.Barrier(6)

    def write(me: int) -> None:
        barrier.wait()
        book = Ledger(url)
        for i in range(15):
            if book.record("p", "run", f"k{i}", "done", str(me), {}):
                won[i] += 1

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert won == dict.fromkeys(range(15), 1)
    assert len(Ledger(url).find("p")) == 15


def test_writers_at_once_in_processes_make_the_table_too(url: str) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for w in writers:
        assert w.stdout is not None and w.stdout.readline() == "ready\n"
    for w in writers:
        assert w.stdin is not None
        w.stdin.write("go\n")
        w.stdin.flush()
    counts = []
    for w in writers:
        out, _ = w.communicate(timeout=60)
        assert w.returncode == 0
        counts.append(int(out))
    assert sum(counts) == 40
    assert [e.payload["i"] for e in sorted(Ledger(url).find("p"), key=lambda e: e.payload["i"])] == list(range(40))


def test_a_fork_has_connections_of_its_own(url: str) -> None:
    book = Ledger(url)
    book.record("p", "run", "parent", "done", "me", {})
    child = os.fork()
    if child == 0:
        code = 1
        try:
            other = Ledger(url)
            code = 0 if other.engine is not book.engine and other.record("p", "run", "child", "done", "me", {}) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [e.key for e in book.find("p")] == ["parent", "child"]


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2013-04-01", "2013-04-01T23:59:59.999+00:00"),
        ("20130401", "2013-04-01T23:59:59.999+00:00"),
        ("2013-04-01T12:00", "2013-04-01T12:00:00.000+00:00"),
        ("2013-04-01T00", "2013-04-01T00:00:00.000+00:00"),
        ("2013-04-01T12:00:00+02:00", "2013-04-01T10:00:00.000+00:00"),
        ("2013-04-01T12:00:00Z", "2013-04-01T12:00:00.000+00:00"),
        ("2013-04-01 12:00:00.123456", "2013-04-01T12:00:00.123+00:00"),
    ],
)
def test_moments(text: str, utc: str) -> None:
    assert moment(text) == utc
    assert moment(utc) == utc


@pytest.mark.parametrize("text", ["", "yesterday", "2013", "2013-13-01", "2013-04-01T25:00", "1' or '1'='1", "0001-01-01T00:00+14:00", "２０１３-04-01"])  # fmt: skip
def test_no_moments(text: str) -> None:
    with pytest.raises(RequestError, match="is not a time"):
        moment(text)


def test_text_is_never_sql(url: str) -> None:
    book, evil = Ledger(url), "'; drop table orrery_ledger; --"
    assert book.record(evil[:60], "run", evil, "done", evil, {"reason": evil})
    assert book.find(evil[:60])[0].payload == {"reason": evil}
    assert book.find("p") == []


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ("nonsense", UserError),
        ("nosuch://x/y", UserError),
        ("sqlite:////dev/null/x/ledger.db", UserError),
        ("postgresql+psycopg://me:hunter2@127.0.0.1:9/x?connect_timeout=1", TryAgain),
    ],
)
def test_ledgers_that_cannot_be_opened(bad: str, kind: type[OrreryError]) -> None:
    with pytest.raises(kind) as e:
        Ledger(bad)
    assert "hunter2" not in str(e.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"hello, I am a letter" * 100)
    with pytest.raises(UserError, match="ledger.db cannot be used: file is not a database"):
        Ledger(f"sqlite:///{tmp_path}/ledger.db")


@pytest.mark.parametrize(
    ("kind", "said", "wanted"),
    [
        (exc.OperationalError, 'FATAL: password authentication failed for user "me"', UserError),
        (exc.OperationalError, 'FATAL: database "orrery" does not exist', UserError),
        (exc.OperationalError, "attempt to write a readonly database", UserError),
        (exc.ProgrammingError, "permission denied for table orrery_ledger", UserError),
        (exc.OperationalError, "connection refused: hunter2", TryAgain),
        (exc.OperationalError, "database is locked", TryAgain),
        (exc.InterfaceError, "connection already closed", TryAgain),
        (exc.OperationalError, "database or disk is full", TryAgain),
    ],
)
def test_what_a_database_says_has_the_right_code(
    kind: type[exc.DBAPIError], said: str, wanted: type[OrreryError]
) -> None:
    with pytest.raises(wanted) as e, _reachable("postgresql+psycopg://me:hunter2@db/orrery"):
        raise kind("SELECT 1", {}, Exception(said))
    assert type(e.value) is wanted
    assert "hunter2" not in str(e.value)


def test_a_plain_postgresql_url_takes_the_driver_that_is_there() -> None:
    assert with_driver("postgresql://me@db/x") == "postgresql+psycopg://me@db/x"
    assert with_driver("postgres://me@db/x") == "postgresql+psycopg://me@db/x"
    for url in ("postgresql+psycopg2://me@db/x", "sqlite:////srv/x.db"):
        assert with_driver(url) == url
    with pytest.raises(TryAgain, match="cannot be reached"):
        Ledger("postgresql://me:hunter2@127.0.0.1:9/x?connect_timeout=1")


def test_a_rollback_takes_off_what_lies_above(url: str) -> None:
    book = Ledger(url)
    assert book.champions("p") == []
    for n, (kind, version) in enumerate(
        (("promotion", "1"), ("promotion", "2"), ("promotion", "3"), ("rollback", "2"), ("promotion", "4"))
    ):
        promote(book, version, f"run-{n}", kind)
    assert book.champions("p") == ["1", "2", "4"]
    promote(book, "1", "run-9", "rollback", "intent")
    assert book.champions("p") == ["1", "2", "4"]
    promote(book, "1", "run-9", "rollback")
    assert book.champions("p") == ["1"]
