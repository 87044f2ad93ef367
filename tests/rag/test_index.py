"""`index`: what it commits can be asked and agrees with the chunks; on a server it mends what others changed.

The server is qdrant-client's local mode: no HTTP, and one process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import models
from rag_points import DIMENSIONS, URL, Lasting, TermEmbedder, chunk, inputs, opened, run_index

from orrery.errors import OrreryError, TryAgain, UserError
from orrery.rag import index
from orrery.rag.engines import server
from orrery.rag.generations import FACTS, POINTS, SHARD
from orrery.rag.reconcile import reconcile
from orrery.rag.retrieval import retrieve
from orrery.store import Manifest, Store

EVERYONE = frozenset({"everyone"})
MADE = [
    chunk("A lease numbers the attempts; the highest may commit.", "guides/lease.md", title="Leases"),
    chunk("A manifest is put once and never changed.", "guides/store.md", title="The store", position=1),
    chunk("The champion is the model that is used.", "guides/champion.md", heading=("Names", "Models"), page=3),
    chunk("Salaries are paid on the last day.", "team/pay.md", groups=("team",)),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path / 'store'}")


def manifest(store: Store, path: str | None) -> Manifest:
    found = store.manifest(str(path))
    assert found is not None
    return found


def test_embedded(store: Store, tmp_path: Path) -> None:
    result = run_index(store, inputs(store, MADE, tmp_path), tmp_path / "s")
    made = manifest(store, result.output)
    assert set(made.files) == {SHARD, FACTS, POINTS}
    facts = json.loads(store.read(made.uri(FACTS)))
    ids = sorted(c.id for c in MADE)
    lines = store.read(made.uri(POINTS))
    assert lines.decode().split() == ids
    assert facts == {
        "backend": "embedded",
        "collection": None,
        "count": 4,
        "embedder": TermEmbedder.id,
        "dimensions": DIMENSIONS,
        "ids": hashlib.sha256(lines).hexdigest(),
        "sparse": facts["sparse"],
    }
    assert facts["sparse"]["language"] == "english"
    assert result.metrics == {"points": 4.0}
    assert store.size(made.uri(SHARD)) < 1_000_000  # the folder's holes are not kept
    assert store.latest_manifest("notes", "generation", made.key) == made
    generation = opened(store, made.path, tmp_path / "open")
    found = retrieve(generation, "who may commit with a lease", groups=EVERYONE, top_k=2)
    assert (found[0].uri, found[0].title, found[0].text) == ("guides/lease.md", "Leases", MADE[0].text)
    generation.close()


def test_every_field_of_a_chunk_comes_back(store: Store, tmp_path: Path) -> None:
    result = run_index(store, inputs(store, MADE, tmp_path), tmp_path / "s")
    generation = opened(store, str(result.output), tmp_path / "open")
    found = retrieve(generation, "champion", groups=EVERYONE, top_k=1)[0]
    wanted = MADE[2]
    assert (found.id, found.document, found.source) == (wanted.id, wanted.document, "guides")
    assert (found.heading, found.page) == (("Names", "Models"), 3)
    assert found.rank_dense == found.rank_sparse == 1
    assert found.bm25 > 0
    generation.close()


def test_no_chunks_make_a_generation_that_finds_nothing(store: Store, tmp_path: Path) -> None:
    result = run_index(store, inputs(store, [], tmp_path), tmp_path / "s")
    generation = opened(store, str(result.output), tmp_path / "open")
    assert result.metrics == {"points": 0.0}
    assert retrieve(generation, "anything", groups=EVERYONE) == []
    generation.close()


def test_again_is_not_done_again(store: Store, tmp_path: Path) -> None:
    given = inputs(store, MADE, tmp_path)
    first = run_index(store, given, tmp_path / "s1")
    again = run_index(store, given, tmp_path / "s2")
    assert again.skipped
    assert again.output == first.output


def test_a_chunk_that_is_there_twice_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(OrreryError, match="1 duplicate"):
        run_index(store, inputs(store, [*MADE, MADE[1]], tmp_path), tmp_path / "s")
    assert store.names("notes/datasets") == []


def test_vectors_of_other_chunks_are_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = inputs(store, MADE, tmp_path), inputs(store, MADE[:3], tmp_path / "other", "two")
    with pytest.raises(UserError, match="4 chunks, 3 vectors"):
        run_index(store, {**one, "vectors": other["vectors"]}, tmp_path / "s")
    with pytest.raises(UserError, match="3 chunks, 4 vectors"):
        run_index(store, {**one, "chunks": other["chunks"]}, tmp_path / "s2", "1" * 32)


def test_damaged_chunks_are_told_by_line(store: Store, tmp_path: Path) -> None:
    given = inputs(store, MADE, tmp_path)
    store.put("notes/chunk/one/a1/chunks.jsonl", MADE[0].line().encode() + b"{\n")
    with pytest.raises(UserError, match="line 2 is no chunk"):
        run_index(store, given, tmp_path / "s")


def test_vectors_that_are_not_what_they_say(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(store, MADE, tmp_path)
    monkeypatch.setattr(TermEmbedder, "dimensions", DIMENSIONS)
    facts = json.loads(store.read("notes/embed/one/a1/embedder.json"))
    store.put("notes/embed/one/a1/embedder.json", json.dumps({**facts, "dimensions": 7}).encode())
    with pytest.raises(UserError, match="the embedder's 7 numbers"):
        run_index(store, given, tmp_path / "s")


def test_points_that_the_engine_lost_stop_the_step(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsert = index.EdgeEngine.upsert
    monkeypatch.setattr(index.EdgeEngine, "upsert", lambda self, points: upsert(self, list(points)[1:]))
    with pytest.raises(OrreryError, match=f"1 missing; missing: {MADE[0].id}"):
        run_index(store, inputs(store, MADE, tmp_path), tmp_path / "s")
    assert store.manifest(f"notes/index/{'0' * 32}/manifest.json") is None


def test_vectors_mixed_up_stop_the_step(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upsert = index.EdgeEngine.upsert

    def turned(self: index.EdgeEngine, points: Iterator[index.Point]) -> int:
        made = [index.Point(p.id, -np.asarray(p.dense), p.sparse, p.payload) for p in points]
        return upsert(self, made)

    monkeypatch.setattr(index.EdgeEngine, "upsert", turned)
    with pytest.raises(OrreryError, match="not found by its own vector"):
        run_index(store, inputs(store, MADE, tmp_path), tmp_path / "s")


def test_many_say_that_a_server_is_better(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "EXACT", 3)
    result = run_index(store, inputs(store, MADE, tmp_path), tmp_path / "s")
    assert "a Qdrant server is the better place" in result.reasons[0]


# -- on a server ---------------------------------------------------------------------------------------


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lasting]:
    made = Lasting(":memory:")
    monkeypatch.setattr(server, "connect", lambda url, timeout=0: made)
    yield made
    made.end()


class Counted(Lasting):
    """Counts points that are put in, and breaks off when told so."""

    put = 0
    breaks_at: int | None = None

    def upsert(self, collection_name: str, points: list[models.PointStruct], **kwargs: object) -> object:
        for point in points:
            if self.put == self.breaks_at:
                raise TryAgain("the server went away")
            super().upsert(collection_name, [point], **kwargs)
            self.put += 1
        return None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    made = Counted(":memory:")
    monkeypatch.setattr(server, "connect", lambda url, timeout=0: made)
    yield made
    made.end()


def ids(client: Lasting, collection: str) -> set[str]:
    return {str(p.id) for p in client.scroll(collection, limit=1000)[0]}


def collection(store: Store, path: str | None) -> str:
    return str(json.loads(store.read(manifest(store, path).uri(FACTS)))["collection"])


def test_served(store: Store, tmp_path: Path, client: Lasting) -> None:
    result = run_index(store, inputs(store, MADE, tmp_path), tmp_path / "s", qdrant=URL)
    made = manifest(store, result.output)
    assert set(made.files) == {FACTS, POINTS}
    name = collection(store, made.path)
    assert name == f"notes-{made.address[:16]}"
    assert ids(client, name) == {c.id for c in MADE}
    generation = opened(store, made.path, tmp_path / "open", URL)
    found = retrieve(generation, "who may commit with a lease", groups=EVERYONE, top_k=2)
    assert found[0].uri == "guides/lease.md"
    assert result.skipped is None


def test_what_others_did_to_a_collection_is_mended(store: Store, tmp_path: Path, counted: Counted) -> None:
    given = inputs(store, MADE, tmp_path)
    first = run_index(store, given, tmp_path / "s1", qdrant=URL)
    name = collection(store, first.output)
    counted.put = 0
    again = run_index(store, given, tmp_path / "s2", qdrant=URL)
    assert (counted.put, again.output) == (0, first.output)
    assert "mended" not in str(again.skipped)

    wanted = {str(p.id): p.payload for p in counted.scroll(name, limit=100)[0]}
    stray = chunk("Nobody knows where this came from.", "guides/stray.md")
    lost, opened_up, replaced = MADE[0].id, MADE[3].id, MADE[1].id
    counted.delete(name, [lost])
    counted.set_payload(name, {"groups": ["everyone"]}, [opened_up])  # who may read it was changed
    counted.set_payload(name, {"digest": "0" * 32}, [replaced])
    Lasting.upsert(
        counted,
        name,
        [models.PointStruct(id=stray.id, vector={"dense": [1.0] * DIMENSIONS}, payload={"groups": ["everyone"]})],
    )
    mended = run_index(store, given, tmp_path / "s3", qdrant=URL)
    assert mended.skipped == "the same generation; 3 points put in, 1 strays taken out"
    assert mended.output == first.output
    assert counted.put == 3
    assert {str(p.id): p.payload for p in counted.scroll(name, limit=100)[0]} == wanted


def test_a_run_that_was_cut_off_goes_on(store: Store, tmp_path: Path, counted: Counted) -> None:
    many = [chunk(f"passage {i} of the lease", f"guides/{i}.md") for i in range(40)]
    given = inputs(store, many, tmp_path)
    counted.breaks_at = 17
    with pytest.raises(TryAgain, match="went away"):
        run_index(store, given, tmp_path / "s1", qdrant=URL)
    assert store.names("notes/datasets") == []
    counted.breaks_at = None
    result = run_index(store, given, tmp_path / "s2", qdrant=URL)
    assert counted.put == 40  # what was there already stayed
    assert ids(counted, collection(store, result.output)) == {c.id for c in many}


def test_another_generation_is_never_touched(store: Store, tmp_path: Path, client: Lasting) -> None:
    first = run_index(store, inputs(store, MADE, tmp_path), tmp_path / "s1", qdrant=URL)
    name = collection(store, first.output)
    before = client.scroll(name, limit=100, with_vectors=True)[0]
    fewer = inputs(store, MADE[:2], tmp_path, "two")
    second = run_index(store, fewer, tmp_path / "s2", "1" * 32, qdrant=URL)
    assert collection(store, second.output) != name
    assert client.scroll(name, limit=100, with_vectors=True)[0] == before
    assert ids(client, collection(store, second.output)) == {c.id for c in MADE[:2]}


def test_who_writes_meanwhile_stops_the_step(
    store: Store, tmp_path: Path, client: Lasting, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = index.drive

    def disturbed(work: object, engine: server.ServerEngine, given: object) -> str:
        told = drive(work, engine, given)  # type: ignore[arg-type]
        client.delete(engine.collection, [MADE[0].id])
        return told

    monkeypatch.setattr(index, "drive", disturbed)
    with pytest.raises(OrreryError, match="1 missing") as caught:
        run_index(store, inputs(store, MADE, tmp_path), tmp_path / "s", qdrant=URL)
    assert caught.value.details["missing"] == [MADE[0].id]
    assert store.names("notes/datasets") == []


def test_reconciliation_sees_what_is_wrong_on_a_server(store: Store, tmp_path: Path, client: Lasting) -> None:
    result = run_index(store, inputs(store, MADE, tmp_path), tmp_path / "s", qdrant=URL)
    generation = opened(store, str(result.output), tmp_path / "open", URL)
    assert reconcile(generation.engine, MADE, {c.document for c in MADE}).sound
    client.delete(collection(store, result.output), [MADE[2].id])
    found = reconcile(generation.engine, MADE)
    assert not found.sound
    assert found.missing == (MADE[2].id,)
