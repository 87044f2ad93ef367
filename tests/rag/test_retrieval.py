"""From a question to passages: modes, filters, diversity, a reranker; and what is told of each passage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import rag_house
import tiny_embedder
from onnx import TensorProto, helper
from rag_points import DIMENSIONS, URL, Lasting, TermEmbedder, chunk, generation_of, points
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from orrery.errors import UserError
from orrery.rag.engines import Engine, Hit
from orrery.rag.engines.edge import EdgeEngine
from orrery.rag.engines.server import ServerEngine
from orrery.rag.generations import Generation
from orrery.rag.rerank import CrossEncoder, open_reranker
from orrery.rag.retrieval import diverse, passage, retrieve

EVERYONE = frozenset({"everyone"})
MADE = [
    chunk("A lease numbers the attempts and the highest may commit.", "guides/lease.md", title="Leases"),
    chunk("A lease numbers attempts; the highest surely may commit.", "guides/lease-again.md", title="Leases"),
    chunk("A fence keeps an orphan from its commit.", "guides/fence.md", title="Fences", heading=("Laws", "Third")),
    chunk("The manifest is put once and never changed.", "guides/store.md", title="The store", page=4),
    chunk("The champion is the model that is used.", "names/champion.md"),
    chunk("A challenger has passed the gate.", "names/challenger.md"),
    chunk("Zirconium is mentioned here alone.", "names/zirconium.md"),
]
BY_URI = {c.uri: c for c in MADE}


@pytest.fixture(scope="module", params=["embedded", "server"])
def generation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generation]:
    client, engine = Lasting(":memory:"), None
    if request.param == "embedded":
        engine = EdgeEngine.create(tmp_path_factory.mktemp("edge") / "s", DIMENSIONS, len(MADE))
    it: Engine = engine or ServerEngine.create(client, "notes-0", DIMENSIONS, URL)
    it.upsert(points(MADE))
    yield generation_of(it, MADE)
    it.close()
    client.end()


def uris(found: Sequence) -> list[str]:
    return [f.uri for f in found]


def test_what_is_told_of_a_passage(generation: Generation) -> None:
    question = "orphan fence"
    first = retrieve(generation, question, groups=EVERYONE)[0]
    wanted = BY_URI["guides/fence.md"]
    assert (first.id, first.text, first.title, first.uri) == (wanted.id, wanted.text, "Fences", wanted.uri)
    assert (first.heading, first.page, first.document, first.source) == (
        ("Laws", "Third"),
        None,
        wanted.document,
        "guides",
    )
    vectors = TermEmbedder().embed([question, wanted.embedded])
    assert first.cosine == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
    assert (first.rank_dense, first.rank_sparse) == (1, 1)
    assert first.score == pytest.approx(2 / 60, abs=1e-5)
    assert first.bm25 > 0


def test_one_list_alone(generation: Generation) -> None:
    sparse = retrieve(generation, "zirconium", groups=EVERYONE, mode="sparse")
    assert uris(sparse) == ["names/zirconium.md"]
    assert sparse[0].score == sparse[0].bm25 > 0
    assert sparse[0].rank_dense is None
    assert sparse[0].cosine > 0  # is told in every mode
    dense = retrieve(generation, "zirconium", groups=EVERYONE, mode="dense", top_k=3)
    assert [f.score for f in dense] == pytest.approx([f.cosine for f in dense], abs=1e-5)
    assert [f.rank_dense for f in dense] == [1, 2, 3]
    assert all(f.rank_sparse is None and f.bm25 == 0 for f in dense)


def test_rare_terms_weigh_more(generation: Generation) -> None:
    """The weights are BM25's, the rarity is Qdrant's: `zirconium` is in one passage, `commit` in three."""
    found = retrieve(generation, "zirconium commit", groups=EVERYONE, mode="sparse")
    assert found[0].uri == "names/zirconium.md"
    assert len(found) == 4
    n, held = len(MADE), 1
    idf = math.log(1 + (n - held + 0.5) / (held + 0.5))
    weight = dict(zip(*points(MADE)[6].sparse, strict=True))
    (term,) = set(weight) & set(generation.embed_query("zirconium").sparse[0])
    assert found[0].bm25 == pytest.approx(idf * weight[term], rel=1e-3)


def test_filters(generation: Generation) -> None:
    ask = "the gate commit lease champion"
    assert set(uris(retrieve(generation, ask, groups=EVERYONE, filters={"source": ["names"]}))) == {
        c.uri for c in MADE if c.source == "names"
    }
    some = ["guides/lease.md", "names/champion.md"]
    assert sorted(uris(retrieve(generation, ask, groups=EVERYONE, filters={"uri": some}))) == some
    both = retrieve(generation, ask, groups=EVERYONE, filters={"uri": some, "source": ["names"]})
    assert uris(both) == ["names/champion.md"]
    one = BY_URI["guides/store.md"]
    assert uris(retrieve(generation, ask, groups=EVERYONE, filters={"document": [one.document]})) == [one.uri]
    assert retrieve(generation, ask, groups=EVERYONE, filters={"source": []}) == []
    assert len(retrieve(generation, ask, groups=EVERYONE, filters={})) == len(MADE)


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        ({"groups": ["board"]}, "unknown field 'groups'"),
        ({"sourcce": ["guides"]}, "unknown field 'sourcce'"),
        ({"source": "guides"}, "is not a list of texts"),
        ({"source": [7]}, "is not a list of texts"),
        ({"source": ["x"] * 101}, "101 values"),
    ],
)
def test_filters_that_are_refused(generation: Generation, filters: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        retrieve(generation, "lease", groups=EVERYONE, filters=filters)


def test_an_unknown_filter_is_told_what_there_is(generation: Generation) -> None:
    with pytest.raises(UserError) as caught:
        retrieve(generation, "lease", groups=EVERYONE, filters={"sourcce": ["guides"]})
    assert caught.value.hint == "did you mean 'source'? allowed: document, source, uri"
    with pytest.raises(UserError, match="mode: 'fuzzy'"):
        retrieve(generation, "lease", groups=EVERYONE, mode="fuzzy")  # type: ignore[arg-type]


def test_nothing_to_ask(generation: Generation) -> None:
    assert retrieve(generation, "lease", groups=frozenset()) == []
    assert retrieve(generation, "lease", groups=EVERYONE, top_k=0) == []
    assert len(retrieve(generation, "", groups=EVERYONE)) == len(MADE)
    assert retrieve(generation, "", groups=EVERYONE, mode="sparse") == []


def test_more_passages_than_candidates(generation: Generation) -> None:
    assert len(retrieve(generation, "lease", groups=EVERYONE, top_k=7, candidates=2)) == 7


@pytest.mark.parametrize("mode", ["hybrid", "dense"])
def test_diversity(generation: Generation, mode: str) -> None:
    """Two passages say the same: relevance alone takes both, diversity another one second."""
    ask = "lease highest attempts commit"
    alike = {"guides/lease.md", "guides/lease-again.md"}
    plain = retrieve(generation, ask, groups=EVERYONE, top_k=2, mode=mode)  # type: ignore[arg-type]
    relevant = retrieve(generation, ask, groups=EVERYONE, top_k=2, mmr=1.0, mode=mode)  # type: ignore[arg-type]
    mixed = retrieve(generation, ask, groups=EVERYONE, top_k=2, mmr=0.3, mode=mode)  # type: ignore[arg-type]
    assert set(uris(plain)) == set(uris(relevant)) == alike
    assert mixed[0].uri in alike
    assert mixed[1].uri not in alike


def test_diversity_as_qdrant_has_it(generation: Generation) -> None:
    """What is made diverse by hand (after a reranker) chooses as Qdrant does, given the same scores."""
    ask = "lease commit gate"
    hits = [
        Hit(f.id, f.cosine, {}, TermEmbedder().embed([BY_URI[f.uri].embedded])[0])
        for f in retrieve(generation, ask, groups=EVERYONE, mode="dense")
    ]
    for share in (0.1, 0.5, 0.9):
        found = retrieve(generation, ask, groups=EVERYONE, mode="dense", mmr=share, top_k=4)
        assert [h.id for h in diverse(hits, share, 4)] == [f.id for f in found]


# -- a reranker ----------------------------------------------------------------------------------------


class Prefers:
    def __init__(self, word: str) -> None:
        self.word, self.seen = word, list[str]()

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        self.seen = list(texts)
        return [0.9 if self.word in text else 0.1 for text in texts]


def test_a_reranker_orders_all_candidates(generation: Generation) -> None:
    it = Prefers("Zirconium")
    found = retrieve(generation, "lease commit", groups=EVERYONE, top_k=2, reranker=it)
    assert len(it.seen) == len(MADE)
    assert found[0].uri == "names/zirconium.md"
    assert found[0].score == 0.9
    assert found[0].rank_dense is not None
    assert "Fences > Laws > Third\nA fence keeps an orphan from its commit." in it.seen


def test_a_reranker_and_diversity(generation: Generation) -> None:
    found = retrieve(generation, "lease commit", groups=EVERYONE, top_k=2, mmr=0.3, reranker=Prefers("lease"))
    assert found[0].uri in {"guides/lease.md", "guides/lease-again.md"}
    assert found[1].score == 0.1


def test_nothing_to_rerank(generation: Generation) -> None:
    assert retrieve(generation, "", groups=EVERYONE, mode="sparse", reranker=Prefers("x")) == []


def test_title_and_headings_are_said_once() -> None:
    hit = Hit("1", 0, {"title": "Laws", "heading": ["Laws", "Third"], "text": "t"})
    assert passage(hit) == "Laws > Third\nt"


WORDS = ["[CLS]", "[SEP]", "[UNK]", "lease", "commit", "gate", "model", "other"]


def cross_encoder(folder: Path, *, extra: str | None = "token_type_ids", logits: int = 1) -> Path:
    """Write a cross-encoder whose logit is the number of the passage's tokens that are `gate`, less one half."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ["input_ids", "attention_mask", *([extra] if extra else [])]
    counted = "token_type_ids" if extra == "token_type_ids" else "attention_mask"
    nodes = [
        helper.make_node("Equal", ["input_ids", "gate"], ["is_gate"]),
        helper.make_node("Cast", ["is_gate"], ["ones"], to=TensorProto.INT64),
        helper.make_node("Mul", ["ones", counted], ["counted"]),
        helper.make_node("ReduceSum", ["counted", "axis"], ["sum"], keepdims=1),
        helper.make_node("Cast", ["sum"], ["sums"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["sums", "half"], ["one"]),
        helper.make_node("Concat", ["one"] * logits, ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "cross",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in names],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", logits])],
        [
            helper.make_tensor("gate", TensorProto.INT64, [1], [WORDS.index("gate")]),
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("half", TensorProto.FLOAT, [1], [0.5]),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), folder / "model.onnx"
    )
    return folder


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_a_cross_encoder(tmp_path: Path) -> None:
    it = open_reranker(f"file://{cross_encoder(tmp_path / 'c')}", tmp_path / "scratch")
    # The question's own `gate` does not count: it has another token type.
    scores = it.scores("gate gate", ["gate lease", "model", "gate gate commit " + "lease " * 50])
    assert scores == pytest.approx([sigmoid(0.5), sigmoid(-0.5), sigmoid(1.5)])
    assert it.scores("gate", []) == []


def test_a_cross_encoder_without_token_types_and_passages_that_are_too_long(tmp_path: Path) -> None:
    it = CrossEncoder.open(cross_encoder(tmp_path / "c", extra=None))
    assert it.scores("lease", ["lease " * 2000 + "gate"]) == pytest.approx([sigmoid(-0.5)])
    many = [("gate " * (i % 3)).strip() + " lease" * i for i in range(40)]
    assert it.scores("lease", many) == pytest.approx([sigmoid(i % 3 - 0.5) for i in range(40)])


def test_a_question_that_fills_the_model_leaves_room_for_the_passage(tmp_path: Path) -> None:
    folder = cross_encoder(tmp_path / "c")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=True)  # a character is a token
    tokenizer.save(str(folder / "tokenizer.json"))
    it = CrossEncoder.open(folder)
    assert it.scores("風" * 600, ["gate lease", "model"]) == pytest.approx([sigmoid(0.5), sigmoid(-0.5)])
    assert it.scores("風" * 600, ["gate " + "lease " * 600]) == pytest.approx([sigmoid(0.5)])


def test_a_relative_cross_encoder_lies_in_the_project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cross_encoder(tmp_path / "project" / "models" / "c")
    it = open_reranker("models/c", tmp_path / "scratch", folder=tmp_path / "project")
    assert it.scores("gate", ["gate"]) == pytest.approx([sigmoid(0.5)])
    with pytest.raises(UserError, match="models/c is relative, and no project folder is known"):
        open_reranker("models/c", tmp_path / "scratch")


def test_an_evaluation_finds_a_relative_cross_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orrery.rag.collect.READERS_AT_ONCE", 1)
    told = {"guides/lease.md": "# Lease\n\nA lease numbers attempts.", "team/gate.md": "# Gate\n\nThe gate is open."}
    model = tiny_embedder.write(tmp_path / "model")
    house = rag_house.make(
        tmp_path, monkeypatch, told, embedder={"model": str(model)}, retrieval={"reranker": "models/c"}
    )
    cross_encoder(house.folder / "models" / "c")
    passages = [{"uri": "lease.md", "quote": "numbers attempts"}]
    house.questions({"id": "a", "question": "What numbers attempts?", "answerable": True, "passages": passages})
    assert house.reindex(until="evaluate")["evaluate"].metrics["mrr"] == 1


def test_a_cross_encoder_ranks(generation: Generation, tmp_path: Path) -> None:
    it = CrossEncoder.open(cross_encoder(tmp_path / "c"))
    found = retrieve(generation, "lease commit", groups=EVERYONE, top_k=1, reranker=it)
    assert found[0].uri == "names/challenger.md"
    assert found[0].score == pytest.approx(sigmoid(0.5))


def test_folders_that_are_no_cross_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.onnx is not there"):
        open_reranker(str(tmp_path), tmp_path)
    odd = cross_encoder(tmp_path / "odd", extra="position_ids")
    with pytest.raises(UserError, match="wants the input 'position_ids'"):
        CrossEncoder.open(odd)
    two = CrossEncoder.open(cross_encoder(tmp_path / "two", logits=2))
    with pytest.raises(UserError, match="2 logits a pair"):
        two.scores("lease", ["gate"])
    (odd / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded"):
        CrossEncoder.open(odd)
    (odd / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        CrossEncoder.open(odd)


def test_a_cross_encoder_of_a_bucket(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        open_reranker("memory://nowhere/at/all", tmp_path / "scratch")
    import fsspec

    source = cross_encoder(tmp_path / "c")
    fs = fsspec.filesystem("memory")
    fs.put(str(source), "/rerankers/one", recursive=True)
    try:
        it = open_reranker("memory://rerankers/one", tmp_path / "scratch")
        assert np.argmax(it.scores("lease", ["gate", "model"])) == 0
    finally:
        fs.rm("/rerankers", recursive=True)
