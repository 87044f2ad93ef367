"""Both engines give the same answers to the same questions; a server's errors are told, its key is not.

The server's code runs on qdrant-client's local mode here, which has no HTTP, no keys, no HNSW graph and no payload
indexes; a small HTTP server that refuses, hangs or breaks off stands in for the first two.
"""

from __future__ import annotations

import http.server
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import models
from rag_points import DIMENSIONS, URL, Lasting, TermEmbedder, chunk, points

from orrery.errors import OrreryError, TryAgain, UserError
from orrery.rag.embedding.sparse import encode_query
from orrery.rag.engines import Condition, Engine, Point, Search, edge, fused, server, tied
from orrery.rag.engines.edge import EdgeEngine
from orrery.rag.engines.server import ServerEngine, connect, point_alias, remove
from orrery.rag.records import Chunk

WORDS = [f"word{i}" for i in range(24)] + ["gate", "champion", "promote", "lease", "vector", "chunk", "team", "budget"]
GROUPS = (("everyone",), ("team",), ("everyone", "team"), ("board",))
ANYONE = (Condition("groups", ("board", "everyone", "team")),)


def corpus(count: int = 200) -> list[Chunk]:
    rng = np.random.default_rng(7)
    return [
        chunk(
            " ".join(rng.choice(WORDS, size=rng.integers(4, 14))) + f" n{i}",
            f"{'guides' if i % 3 else 'team'}/{i // 4}.md",
            groups=GROUPS[i % len(GROUPS)],
            position=i % 4,
        )
        for i in range(count)
    ]


def untied(made: list[Point]) -> list[Point]:
    """Return points whose sparse weights are all different: equal scores have another order in each engine."""
    rng = np.random.default_rng(3)
    return [replace(p, sparse=(p.sparse[0], (np.array(p.sparse[1]) * rng.uniform(0.8, 1.2)).tolist())) for p in made]


def search(question: str, where: tuple[Condition, ...] = ANYONE, **more: object) -> Search:
    return Search(where, TermEmbedder().embed([question])[0], encode_query(question), **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("edge") / "shard"
    building = EdgeEngine.create(folder, DIMENSIONS, 200)
    building.upsert(untied(points(corpus())))
    building.seal()
    building.close()
    engine = EdgeEngine.load(folder)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Engine]:
    client = Lasting(":memory:")
    engine = ServerEngine.create(client, "notes-0", DIMENSIONS, URL)
    engine.upsert(untied(points(corpus())))
    yield engine
    client.end()


@pytest.fixture(params=["embedded", "served"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


QUESTIONS = ("gate champion promote", "vector chunk embed index", "lease", "nothing of the kind", "n17", "team budget")


@pytest.mark.parametrize("mode", ["hybrid", "dense", "sparse"])
@pytest.mark.parametrize("mmr", [None, 0.6, 1.0])
def test_engines_agree(embedded: Engine, served: Engine, mode: str, mmr: float | None) -> None:
    for question in QUESTIONS:
        asked = search(question, ANYONE, mode=mode, mmr=mmr, candidates=200, limit=6)
        one, other = embedded.search(asked), served.search(asked)
        assert [h.score for h in one] == pytest.approx([h.score for h in other], abs=1e-4), question
        assert [h.cosine for h in one] == pytest.approx([h.cosine for h in other], abs=1e-4)
        assert {h.id: (h.rank_dense, h.rank_sparse) for h in one} == {
            h.id: (h.rank_dense, h.rank_sparse) for h in other
        }
        assert [h.payload for h in one] == [h.payload for h in other]


def test_dense_is_the_exact_cosine(engine: Engine) -> None:
    made = points(corpus())
    question = TermEmbedder().embed(["gate champion"])[0]
    cosines = {p.id: float(np.dot(p.dense, question)) for p in made}
    best = sorted(cosines, key=lambda i: -cosines[i])[:10]
    hits = engine.search(search("gate champion", mode="dense", limit=10))
    assert [h.id for h in hits] == best
    assert [h.score for h in hits] == pytest.approx([cosines[i] for i in best], abs=1e-5)
    assert [h.cosine for h in hits] == pytest.approx([h.score for h in hits], abs=1e-5)
    assert [h.rank_dense for h in hits] == list(range(1, 11))
    assert all(h.bm25 == 0 and h.rank_sparse is None for h in hits)


def test_fusion_is_by_reciprocal_rank(engine: Engine) -> None:
    hits = engine.search(search("gate champion promote", candidates=30, limit=60))
    assert {(h.rank_dense is None, h.rank_sparse is None) for h in hits} == {
        (False, False),
        (True, False),
        (False, True),
    }
    for hit in hits:
        ranks = [rank for rank in (hit.rank_dense, hit.rank_sparse) if rank is not None]
        assert hit.score == pytest.approx(sum(1 / (59 + rank) for rank in ranks), abs=1e-6)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)


@pytest.mark.parametrize("mode", ["hybrid", "dense", "sparse"])
def test_equal_scores_do_not_depend_on_the_order_of_writing(tmp_path: Path, mode: str) -> None:
    """Of 60 documents of three texts, each in one score: ranks of equals are by id, before they are fused."""
    made = [replace(point, dense=like.dense, sparse=like.sparse) for point, like in zip(
        points(corpus())[:60], points(corpus())[:3] * 20, strict=True
    )]  # fmt: skip
    told = []
    for name, order in (("one", made), ("other", made[::-1])):
        engine = EdgeEngine.create(tmp_path / name, DIMENSIONS, 60)
        engine.upsert(order)
        engine.seal()
        asked = [search(question, mode=mode, candidates=100, limit=60) for question in QUESTIONS]
        told.append([[(h.id, h.score, h.rank_dense, h.rank_sparse) for h in engine.search(a)] for a in asked])
        engine.close()
    assert told[0] == told[1]
    assert max(len(found) for found in told[0]) > 10


def test_fused_here_is_fused_by_qdrant(engine: Engine) -> None:
    for question in QUESTIONS:
        ranked = engine.rank(search(question, candidates=30))
        lists = [ranked.dense, ranked.sparse]
        assert not any(map(tied, lists))
        if ranked.sparse:
            found = dict(fused(lists))
            assert found.keys() == dict(ranked.found).keys()
            assert [found[id_] for id_, _ in ranked.found] == pytest.approx([s for _, s in ranked.found], abs=1e-6)


def test_the_same_search_gives_the_same_answer(engine: Engine) -> None:
    for question in QUESTIONS:
        first = [(h.id, h.score) for h in engine.search(search(question))]
        for _ in range(5):
            assert [(h.id, h.score) for h in engine.search(search(question))] == first


def test_conditions_hold(engine: Engine) -> None:
    where = (Condition("groups", ("team",)), Condition("source", ("guides",)))
    hits = engine.search(search("gate champion", where, limit=200, candidates=200))
    assert hits
    assert all("team" in h.payload["groups"] and h.payload["source"] == "guides" for h in hits)
    expected = [c for c in corpus() if "team" in c.groups and c.source == "guides"]
    assert len(hits) == len(expected)


def test_no_groups_find_nothing_and_a_search_without_any_is_refused(engine: Engine) -> None:
    assert engine.search(search("gate", (Condition("groups", ()),))) == []
    assert engine.search(search("gate", (*ANYONE, Condition("source", ())))) == []
    with pytest.raises(OrreryError, match="without the groups"):
        search("gate", (Condition("source", ("guides",)),))


def test_a_question_without_terms(engine: Engine) -> None:
    assert engine.search(search("of the and", mode="sparse")) == []
    assert len(engine.search(search("of the and", limit=3))) == 3


def test_fetch_keeps_to_the_conditions(engine: Engine) -> None:
    board = next(c for c in corpus() if c.groups == ("board",))
    assert engine.fetch([board.id], (Condition("groups", ("everyone",)),)) == {}
    (payload, dense) = engine.fetch([board.id, str(uuid.uuid4())], (Condition("groups", ("board",)),))[board.id]
    assert payload["text"] == board.text
    assert np.linalg.norm(dense) == pytest.approx(1, abs=1e-5)
    assert engine.fetch([], ANYONE) == {}


def test_ids_count_and_fields(engine: Engine) -> None:
    assert engine.count() == 200
    assert sorted(engine.ids()) == sorted(c.id for c in corpus())
    id_, told = next(engine.rows(("groups",)))
    assert set(told) == {"groups"}
    assert told["groups"] == list(next(c for c in corpus() if c.id == id_).groups)


def test_upsert_again_and_delete(tmp_path: Path) -> None:
    client = Lasting(":memory:")
    made = points(corpus(30))
    for engine in (
        EdgeEngine.create(tmp_path / "s", DIMENSIONS, 30),
        ServerEngine.create(client, "notes-1", DIMENSIONS, URL),
    ):
        assert engine.upsert(made) == 30
        assert engine.upsert(made[:7]) == 7
        assert engine.count() == 30
        assert engine.delete([made[0].id, made[1].id]) == 2
        assert engine.delete([]) == 0
        assert set(engine.ids()) == {p.id for p in made[2:]}
        engine.close()
    client.end()


def test_above_the_bound_eight_bits_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "EXACT", 100)
    made = points(corpus(1500))
    engine = EdgeEngine.create(tmp_path / "s", DIMENSIONS, len(made))
    engine.upsert(made)
    engine.seal()
    engine.close()
    engine = EdgeEngine.load(tmp_path / "s")
    assert engine.count() == 1500
    for question in QUESTIONS:
        asked = TermEmbedder().embed([question])[0]
        cosines = sorted((float(np.dot(p.dense, asked)) for p in made), reverse=True)
        hits = engine.search(search(question, mode="dense", limit=20))
        assert [h.score for h in hits] == pytest.approx(cosines[:20], abs=1e-4)
    engine.close()


def test_threads_may_ask_at_once(embedded: Engine) -> None:
    expected = [[(h.id, h.score) for h in embedded.search(search(q))] for q in QUESTIONS]
    wrong: list[str] = []

    def ask(number: int) -> None:
        for i in range(40):
            at = (i + number) % len(QUESTIONS)
            if [(h.id, h.score) for h in embedded.search(search(QUESTIONS[at]))] != expected[at]:
                wrong.append(QUESTIONS[at])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_folder_that_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "edge_config.json").write_text("{")
    with pytest.raises(UserError, match="not an index that can be read"):
        EdgeEngine.load(tmp_path)


# -- the server's own ------------------------------------------------------------------------------------


@pytest.fixture
def client() -> Iterator[Lasting]:
    made = Lasting(":memory:")
    yield made
    made.end()


def test_a_collection_that_is_gone(client: Lasting) -> None:
    with pytest.raises(UserError, match="no collection 'notes-9'"):
        ServerEngine.load(client, "notes-9", URL)


def test_somebody_elses_collection_is_refused(client: Lasting) -> None:
    client.create_collection("notes-2", vectors_config={"dense": models.VectorParams(size=3, distance="Cosine")})
    with pytest.raises(UserError, match="has other vectors"):
        ServerEngine.create(client, "notes-2", DIMENSIONS, URL)
    assert client.get_collection("notes-2").config.params.vectors["dense"].size == 3


def test_alias_and_removal(client: Lasting) -> None:
    for name in ("notes-a", "notes-b"):
        ServerEngine.create(client, name, DIMENSIONS, URL).upsert(points(corpus(5 if name == "notes-a" else 8)))
    assert point_alias(client, "notes", "notes-a", URL) is None
    assert client.count("notes").count == 5
    assert point_alias(client, "notes", "notes-b", URL) == "notes-a"
    assert client.count("notes").count == 8
    assert point_alias(client, "notes", "notes-b", URL) == "notes-b"
    assert remove(client, "notes-a", URL)
    assert not remove(client, "notes-a", URL)
    assert client.count("notes").count == 8


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def listening() -> Iterator[Callable[[Answer], str]]:
    """Return what starts a server that answers every request so, and tells its address."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            do_POST = do_PUT = do_GET

            def log_message(self, *args: object) -> None:
                pass

        made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        made.daemon_threads = True
        servers.append(made)
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{made.server_address[1]}"

    yield start
    for made in servers:
        made.shutdown()
        made.server_close()


def says(status: int, body: str) -> Answer:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        data = body.replace("KEY", request.headers.get("api-key", "none")).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    return answer


def ask(url: str, timeout: int = 5) -> None:
    client = connect(url, timeout)
    try:
        ServerEngine(client, "notes-0", url).count()
    finally:
        client.close()


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (401, UserError, "the key is not accepted"),
        (403, UserError, "the key is not accepted"),
        (404, UserError, "404"),
        (400, UserError, "400"),
        (429, TryAgain, "429"),
        (500, TryAgain, "500"),
        (503, TryAgain, "503"),
    ],
)
def test_what_a_server_refuses(
    listening: Callable[[Answer], str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    kind: type[OrreryError],
    told: str,
) -> None:
    monkeypatch.setenv(server.KEY, "s3cr3t-key")
    url = listening(says(status, '{"status": {"error": "you said KEY"}}'))
    with pytest.raises(kind, match=told) as caught:
        ask(url)
    assert url in str(caught.value)
    assert "s3cr3t-key" not in str(caught.value)


def test_a_server_that_wants_a_key(listening: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server.KEY, raising=False)
    with pytest.raises(UserError, match="none is given") as caught:
        ask(listening(says(401, "")))
    assert server.KEY in caught.value.hint


def test_a_server_that_hangs_breaks_off_or_talks_nonsense(listening: Callable[[Answer], str]) -> None:
    over = threading.Event()
    with pytest.raises(TryAgain, match="does not answer"):
        ask(listening(lambda request: over.wait(20) and None), timeout=1)
    over.set()
    with pytest.raises(TryAgain, match="does not answer"):
        ask(listening(lambda request: request.connection.close()))
    with pytest.raises(TryAgain, match="does not answer as Qdrant does"):
        ask(listening(says(200, "<html>a proxy</html>")))


def test_no_server_at_all() -> None:
    with pytest.raises(TryAgain, match="Qdrant at http://127.0.0.1:9 does not answer"):
        ask("http://127.0.0.1:9")


def test_an_address_that_is_none() -> None:
    with pytest.raises(UserError, match="is no address"):
        connect("http://:notaport")
