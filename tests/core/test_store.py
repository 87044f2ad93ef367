"""The store: put only when absent, whatever the race; manifests and pointers; what a person is told when it fails."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from core_house import House

from orrery.errors import OrreryError, RequestError, TryAgain, UserError
from orrery.store import File, Manifest, Store, content_digest

RACER = """
import sys
from orrery.store import Store
store, me = Store(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
print([i for i in range(10) if store.put_if_absent(f"race/{i}", me.encode())])
"""


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, and a bucket of a real S3 server."""
    if request.param == "file":
        return Store(f"file://{tmp_path}/store")
    return Store(f"{request.getfixturevalue('s3_bucket')}/some/prefix")


def manifest(project: str = "p", verb: str = "probe", address: str = "a", text: str = "x", **more: object) -> Manifest:
    files = {"out": File(path="a1/out", size=len(text), sha256=text)}
    values = {"key": "2013-01", "digest": content_digest(files), "files": files, **more}
    return Manifest.model_validate({"project": project, "verb": verb, "address": address, **values})


def commit(store: Store, made: Manifest) -> Manifest:
    assert store.put_if_absent(made.path, made.model_dump_json().encode())
    return made


# -- plain files -------------------------------------------------------------------------------------


def test_put_read_list(store: Store) -> None:
    assert store.names("folder") == []
    assert not store.exists("folder/a")
    with pytest.raises(FileNotFoundError):
        store.read("folder/a")
    store.put("folder/a", b"1")
    store.put("folder/a", b"22")
    store.put("folder/sub/b", b"")
    assert store.read("folder/a") == b"22"
    assert store.size("folder/a") == 2
    assert store.names("folder") == ["a", "sub"]
    assert store.names("folder/a") == []
    with store.open("folder/a") as f:
        assert f.read() == b"22"


def test_what_is_removed_is_gone_and_nothing_else(store: Store) -> None:
    for path in ("folder/a1/x", "folder/a1/sub/y", "folder/a11/x", "folder/b"):
        store.put(path, b"1")
    store.remove("folder/a1")
    store.remove("folder/none")
    assert store.names("folder") == ["a11", "b"]
    store.remove("folder/b")
    store.remove("folder/b")
    assert store.names("folder") == ["a11"]
    with pytest.raises(RequestError):
        store.remove("../x")


def test_put_if_absent_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("x/y", b"first")
    assert not store.put_if_absent("x/y", b"second")
    assert store.read("x/y") == b"first"
    assert store.names("x") == ["y"]


def test_of_many_threads_exactly_one_wins(store: Store) -> None:
    names, wins = [f"race/{i}" for i in range(8)], Counter[str]()
    barrier = threading.Barrier(8)

    def race(me: int) -> None:
        barrier.wait()
        for name in names:
            if store.put_if_absent(name, str(me).encode() * 1000):
                wins[name] += 1

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wins == dict.fromkeys(names, 1)
    assert all(len(set(store.read(n))) == 1 and len(store.read(n)) == 1000 for n in names)
    assert store.names("race") == sorted(str(i) for i in range(8))


def test_of_many_processes_exactly_one_wins(store: Store) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, store.uri, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for i in range(3 if store.is_local else 2)
    ]
    for r in racers:
        assert r.stdout is not None and r.stdout.readline() == "ready\n"
    for r in racers:
        assert r.stdin is not None
        r.stdin.write("go\n")
        r.stdin.flush()
    won: dict[str, list[int]] = {}
    for i, r in enumerate(racers):
        out, _ = r.communicate(timeout=60)
        assert r.returncode == 0
        won[str(i)] = [int(n) for n in out.strip("[]\n").split(",") if n]
    assert sorted(n for numbers in won.values() for n in numbers) == list(range(10))
    for me, numbers in won.items():
        assert all(store.read(f"race/{n}") == me.encode() for n in numbers)


def test_upload_and_local(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(os.urandom(300_000))
    done = store.upload(source, "deep/er/big")
    assert done.size == 300_000
    first = store.local("deep/er/big", tmp_path / "scratch")
    assert first.read_bytes() == source.read_bytes()
    assert store.local("deep/er/big", tmp_path / "scratch") == first
    with pytest.raises(FileNotFoundError):
        store.local("deep/er/none", tmp_path / "scratch")
    assert store.upload(source, "again").sha256 == done.sha256


ESCAPES = [
    "",
    "..",
    "a/../b",
    "../b",
    "/a",
    "a//b",
    "a/",
    ".hidden",
    "a/.b",
    "a\n",
    "a\x00b",
    "a b",
    "-a",
    "a\\b",
    "ä",
    "a" * 300,
]


@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leaves_the_root(store: Store, path: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put(path, b""), lambda: store.put_if_absent(path, b""), lambda: store.read(path),
        lambda: store.exists(path), lambda: store.names(path), lambda: store.local(path, Path("x")),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RequestError, match="not a path of the store"):
            call()


# -- manifests and pointers --------------------------------------------------------------------------


def test_a_manifest_comes_back_and_its_files_are_checked(store: Store) -> None:
    made = commit(store, manifest(facts={"rows": 3}))
    assert store.manifest(made.path) == made
    assert store.manifest("p/probe/b/manifest.json") is None
    assert store.need(made.ref) == made
    assert store.missing_files(made) == ["out is gone"]
    store.put(made.uri("out"), b"longer")
    assert store.missing_files(made) == ["out has 6 bytes instead of 1"]
    store.put(made.uri("out"), b"x")
    assert store.missing_files(made) == []
    with pytest.raises(RequestError, match="has no file 'in'; it has out"):
        made.uri("in")
    with pytest.raises(UserError, match="expected"):
        store.need(made.ref.model_copy(update={"digest": "other"}))
    with pytest.raises(UserError, match="is gone"):
        store.need(made.ref.model_copy(update={"path": "p/probe/b/manifest.json"}))


def test_the_digest_is_of_names_and_bytes_alone() -> None:
    a, b = File(path="a1/x", size=1, sha256="1"), File(path="a2/y", size=1, sha256="2")
    assert content_digest({"x": a, "y": b}) == content_digest({"y": b, "x": a})
    moved = a.model_copy(update={"path": "a9/x"})
    assert content_digest({"x": moved, "y": b}) == content_digest({"x": a, "y": b})
    assert content_digest({"x": b, "y": a}) != content_digest({"x": a, "y": b})
    assert content_digest({"z": a, "y": b}) != content_digest({"x": a, "y": b})


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"project": "p"}', b"\xff\xfe"])
def test_damaged_documents_are_told(store: Store, data: bytes) -> None:
    store.put("p/probe/a/manifest.json", data)
    with pytest.raises(UserError, match="is not a manifest") as e:
        store.manifest("p/probe/a/manifest.json")
    assert "run again" in e.value.hint
    store.put("p/datasets/probed/2013-01/000001.json", data)
    with pytest.raises(UserError, match="does not name a manifest"):
        store.latest("p", "probed", "2013-01")


def test_publishing_twice_is_once_and_a_b_a_is_three(store: Store) -> None:
    a, b = commit(store, manifest(address="a", text="a")), commit(store, manifest(address="b", text="b"))

    def publish(made: Manifest) -> str | None:
        before = store.publish("p", "probed", "2013-01", made, "now")
        return before.manifest if before else None

    assert [publish(a), publish(a)] == [None, None]
    assert [publish(b), publish(b)] == [a.path, a.path]
    assert [publish(a), publish(a)] == [b.path, b.path]
    assert [p.manifest for p in store.pointers("p", "probed", "2013-01")] == [a.path, b.path, a.path]
    assert store.latest_manifest("p", "probed", "2013-01") == a
    assert store.keys("p", "probed") == ["2013-01"]
    assert store.latest("p", "probed", "2013-02") is None


def test_publishers_at_once_leave_one_chain(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    made = [commit(store, manifest(address=f"a{i}", text=str(i))) for i in range(8)]
    threads = [threading.Thread(target=store.publish, args=("p", "probed", "k", m, "now")) for m in made]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    chain = store.pointers("p", "probed", "k")
    assert [p.number for p in chain] == list(range(1, 9))
    assert {p.manifest for p in chain} == {m.path for m in made}
    assert [p.supersedes for p in chain] == [None, *[p.manifest for p in chain[:-1]]]


def test_dependents_are_found_at_any_depth_and_only_when_committed(store: Store) -> None:
    def child(of: Manifest, address: str) -> Manifest:
        store.put_if_absent(f"p/dependents/{of.address}/probe.{address}", b"")
        return commit(store, manifest(address=address, text=address, inputs={"of": (of.ref,)}))

    root = commit(store, manifest(address="root"))
    one = child(root, "one")
    two = child(one, "two")
    store.put_if_absent("p/dependents/root/probe.never", b"")
    assert store.dependents(root) == [one, two]
    assert store.dependents(two) == []


# -- trouble -----------------------------------------------------------------------------------------


def outcome(code: str, store: str, preexec: Callable[[], None] | None = None) -> str:
    """Run code with a `store` in a process; return what it prints, or the error's class and message."""
    body = (
        "import sys\nfrom orrery.store import Store\nfrom orrery.errors import OrreryError\n"
        f"try:\n    store = Store(sys.argv[1])\n    {code}\n"
        "except OrreryError as e:\n    print(e.exit_code, type(e).__name__, e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", body, store], capture_output=True, text=True, timeout=60, preexec_fn=preexec, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_nobody(call: Callable[[], object]) -> str:
    """Return the error of a call made by a user without rights; a fork, since root's Python may be closed to others."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            call()
        except OrreryError as e:
            os.write(writing, f"{e.exit_code} {e}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as f:
        return f.read()


def test_a_folder_that_may_not_be_written() -> None:
    store = Store("file:///usr/orrery-nobody")
    for call in (lambda: store.put("x/y", b""), lambda: store.put_if_absent("x/y", b"")):
        told = as_nobody(call)
        assert told.startswith("64 file:///usr/orrery-nobody/x/y: Permission denied")
        assert "may be written" in told


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    store = Store(f"file://{tmp_path}/store")
    for call in (lambda: store.put("x", b""), lambda: store.put("x/y", b""), lambda: store.put_if_absent("x", b"")):
        with pytest.raises(UserError, match="Not a directory|File exists"):
            call()


def test_a_file_too_large_for_the_limit_leaves_nothing(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    out = outcome("store.put_if_absent('x/y', bytes(5000))", f"file://{tmp_path}", limit)
    assert out.startswith("75 TryAgain")
    assert list((tmp_path / "x").iterdir()) == []


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no right to mount a file system: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_store_is_tried_again_and_leaves_nothing(full: Path, tmp_path: Path) -> None:
    store = Store(f"file://{full}")
    (tmp_path / "big").write_bytes(bytes(200_000))
    calls: list[Callable[[], object]] = [
        lambda: store.put("a/b", bytes(200_000)),
        lambda: store.put_if_absent("a/c", bytes(200_000)),
        lambda: store.upload(tmp_path / "big", "d/e"),
    ]
    for call in calls:
        with pytest.raises(TryAgain, match="no space left") as e:
            call()
        assert e.value.exit_code == 75
    assert [p for p in full.rglob("*") if p.is_file()] == []
    assert store.put_if_absent("a/c", b"small")
    subprocess.run(["mount", "-o", "remount,ro", str(full)], check=True)
    with pytest.raises(UserError, match="read-only"):
        store.put("a/b", b"")


@pytest.mark.parametrize("uri", ["nosuch://x", "memory://x", "http://127.0.0.1:9/x", "gs://bucket/x"])
def test_stores_that_cannot_be_one(uri: str) -> None:
    with pytest.raises(OrreryError) as e:
        Store(uri).put("x", b"")
    assert e.value.exit_code == 64


def test_a_bucket_that_is_not_there(s3_bucket: str) -> None:
    store = Store("s3://no-such-bucket-here/x")
    for call in (lambda: store.put("a", b""), lambda: store.put_if_absent("a", b"")):
        with pytest.raises(UserError, match="bucket"):
            call()
    assert store.manifest("p/v/a/manifest.json") is None


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    out = outcome("store.fs.retries = 1; store.read('a')", "s3://bucket/x")
    assert out.startswith("75 TryAgain")
    assert "127.0.0.1:9" in out


def test_credentials_that_are_missing(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    out = outcome("store.put('a', b'')", "s3://bucket/x")
    assert out.startswith("64 UserError")
    assert "credentials" in out.lower()


def test_a_folder_needs_no_s3_library(house: House) -> None:
    out = outcome(
        "store.put('a', b''); print(sorted({'s3fs', 'aiobotocore', 'botocore', 'aiohttp'} & set(sys.modules)))",
        house.uri,
    )
    assert out == "[]\n"
