"""A generation opens only when it is what was committed, and closes only when nobody asks it any more."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rag_points import URL, Lasting, chunk, inputs, opened, run_index

from orrery.errors import OrreryError, UserError
from orrery.rag import generations
from orrery.rag.engines import archive, server
from orrery.rag.generations import FACTS, SHARD, Generation
from orrery.rag.retrieval import retrieve
from orrery.store import Manifest, Store

EVERYONE = frozenset({"everyone"})
MADE = [chunk(f"passage {i} of the store", f"guides/{i}.md") for i in range(5)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a store with one generation, and its manifest's path: made once, copied for each test."""
    folder = tmp_path_factory.mktemp("template")
    store = Store(f"file://{folder / 'store'}")
    return folder / "store", str(run_index(store, inputs(store, MADE, folder), folder / "s").output)


@pytest.fixture
def store(tmp_path: Path, template: tuple[Path, str]) -> Store:
    shutil.copytree(template[0], tmp_path / "store")
    return Store(f"file://{tmp_path / 'store'}")


@pytest.fixture
def made(store: Store, template: tuple[Path, str]) -> Manifest:
    found = store.manifest(template[1])
    assert found is not None
    return found


@pytest.fixture
def generation(store: Store, made: Manifest, tmp_path: Path) -> Iterator[Generation]:
    it = opened(store, made.path, tmp_path / "open")
    yield it
    it.close()


def damage(store: Store, made: Manifest, name: str, change: object) -> None:
    file = Path(store.full(made.uri(name)))
    data = bytearray(file.read_bytes())
    if change is None:
        file.unlink()
    elif change == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)


@pytest.mark.parametrize("name", [SHARD, FACTS])
@pytest.mark.parametrize(("how", "told"), [(None, "is gone"), ("cut", "bytes instead of"), ("bit", "has digest")])
def test_damage_is_refused(store: Store, made: Manifest, tmp_path: Path, name: str, how: str | None, told: str) -> None:
    damage(store, made, name, how)
    with pytest.raises(UserError, match=told) as caught:
        opened(store, made.path, tmp_path / "open")
    assert made.uri(name) in caught.value.message
    assert f"delete {made.project}/index/{made.address}" in caught.value.hint
    assert list((tmp_path / "open").glob("*")) == []


def test_a_manifest_that_is_cut_off(store: Store, made: Manifest, tmp_path: Path) -> None:
    file = Path(store.full(made.path))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is not a manifest"):
        generations.open_generation(store, made.path, tmp_path / "open")


def test_no_such_generation(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such generation"):
        generations.open_generation(store, "notes/index/0/manifest.json", tmp_path)


def test_facts_that_are_none(store: Store, made: Manifest) -> None:
    data = json.dumps({"backend": "elsewhere"}).encode()
    store.put(made.uri(FACTS), data)
    file = made.files[FACTS].model_copy(update={"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    with pytest.raises(UserError, match="backend"):
        generations.facts_of(store, made.model_copy(update={"files": {**made.files, FACTS: file}}))


def test_its_own_folder_goes_with_it(store: Store, made: Manifest, tmp_path: Path) -> None:
    one, other = (opened(store, made.path, tmp_path / "open") for _ in range(2))
    assert len(list((tmp_path / "open").iterdir())) == 2
    one.close()
    one.close()
    assert len(list((tmp_path / "open").iterdir())) == 1
    assert len(retrieve(other, "passage", groups=EVERYONE)) == 5
    other.close()
    assert list((tmp_path / "open").iterdir()) == []


def test_closed_while_it_is_held(generation: Generation) -> None:
    with generation.held():
        generation.close()
        assert len(retrieve(generation, "store", groups=EVERYONE)) == 5
    with pytest.raises(OrreryError, match="is closed"):
        retrieve(generation, "store", groups=EVERYONE)


def test_one_is_put_in_the_place_of_another_while_threads_ask(store: Store, tmp_path: Path, made: Manifest) -> None:
    """Each thread takes whichever is live, holds it, and asks twice: both answers are of the same generation."""
    other = [chunk(f"another passage {i}", f"guides/other-{i}.md") for i in range(5)]
    (tmp_path / "two").mkdir()
    given = inputs(store, other, tmp_path / "two", "two")
    paths = [made.path, str(run_index(store, given, tmp_path / "s2", "1" * 32).output)]
    live = [opened(store, paths[0], tmp_path / "open")]
    wrong: list[object] = []
    asked = [0, 0]
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            now = live[0]
            try:
                with now.held():
                    first, second = (retrieve(now, "passage", groups=EVERYONE, top_k=5) for _ in range(2))
            except OrreryError:  # closed between looking and holding: look again, as a service does
                continue
            kinds = {"other" in f.uri for f in first + second}
            if len(kinds) != 1 or len(first) != 5:
                wrong.append(first)
            asked[kinds.pop()] += 1

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(1, 7):
        new, old = opened(store, paths[turn % 2], tmp_path / "open"), live[0]
        live[0] = new
        old.close()
    over.set()
    for thread in threads:
        thread.join()
    live[0].close()
    assert wrong == []
    assert min(asked) > 0
    assert list((tmp_path / "open").iterdir()) == []


def test_a_server_that_nobody_names_or_that_lost_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Lasting(":memory:")
    monkeypatch.setattr(server, "connect", lambda url, timeout=0: client)
    result = run_index(store, inputs(store, MADE, tmp_path, "served"), tmp_path / "s", qdrant=URL)
    with pytest.raises(UserError, match="none is named") as caught:
        opened(store, str(result.output), tmp_path / "open")
    assert "platform.yaml" in caught.value.hint
    server.remove(client, str(result.facts["collection"]), URL)
    with pytest.raises(UserError, match="has no collection"):
        opened(store, str(result.output), tmp_path / "open", URL)
    client.end()


# -- the archive ---------------------------------------------------------------------------------------


def test_an_archive_gives_back_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep" / "empty").mkdir(parents=True)
    (folder / "nothing").write_bytes(b"")
    (folder / "short").write_bytes(b"abc")
    with (folder / "deep" / "holes").open("wb") as f:
        f.seek(5_000_000)
        f.write(b"middle")
        f.truncate(20_000_000)
    with (folder / "hole").open("wb") as f:
        f.truncate(3_000_000)
    archive.pack(folder, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").stat().st_size < 100_000
    archive.unpack(tmp_path / "a.tar", tmp_path / "out")
    out = tmp_path / "out" / archive.FOLDER
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == sorted(
        p.relative_to(folder) for p in folder.rglob("*")
    )
    for file in (p for p in folder.rglob("*") if p.is_file()):
        assert (out / file.relative_to(folder)).read_bytes() == file.read_bytes()
    archive.pack(folder, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def _tar(file: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(file, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return file


def _member(name: str, **fields: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(member, key, value)
    return member


@pytest.mark.parametrize(
    "member",
    [
        _member("../outside", size=3),
        _member("/tmp/outside", size=3),
        _member("shard/../../outside", size=3),
        _member("elsewhere/file", size=3),
        _member("shard/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        _member("shard/link", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        _member("shard/device", type=tarfile.CHRTYPE),
    ],
    ids=lambda m: f"{m.name}-{m.type.decode()}",
)
def test_an_archive_that_reaches_outside_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    file = _tar(tmp_path / "a.tar", member)
    (tmp_path / "deep").mkdir()
    with pytest.raises(UserError, match="not a file of an index"):
        archive.unpack(file, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("outside"))


def test_an_archive_without_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_BYTES", 1000)
    file = _tar(tmp_path / "a.tar", _member("shard/a", size=600), _member("shard/b", size=600))
    with pytest.raises(UserError, match="more than"):
        archive.unpack(file, tmp_path / "out")
    (tmp_path / "b.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(UserError, match="not an index's archive"):
        archive.unpack(tmp_path / "b.tar", tmp_path / "out2")
