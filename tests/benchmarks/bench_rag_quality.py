"""rag_ndcg_*: nDCG@10 of retrieval, hybrid against BM25 alone (bm25s) and against dense alone; and when it abstains.

    rag_ndcg_hybrid, _bm25, _dense, _int8     Cranfield (../shared/data/cranfield; left out without it): 225 questions,
                                              1,400 abstracts, graded; of documents, by their best chunk
    rag_ndcg_handbook_hybrid, …               the handbook's own questions and pages, of chunks
    rag_abstained, rag_wrongly_abstained      the handbook's: share of the unanswerable and of the answerable questions
                                              that are abstained, cross-fitted, with Wilson's intervals
    rag_cranfield_abstained, …                Cranfield's: each question with its documents, and without them

Chunks, embedder, index and search are the product's with its defaults; the fusion's constant is the method's (RRF,
k = 60), both lists count alike, and nothing was fitted to these questions. bm25s has its own defaults, stop words
and the same stemmer, on whole documents where these are what is judged.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from ir_measures import nDCG

from orrery.rag import calibrate, questions, reading
from orrery.rag.abstention import signals
from orrery.rag.chunk import Cutter
from orrery.rag.embedding.export import prepare
from orrery.rag.embedding.session import MODEL, Embedder, store_folder
from orrery.rag.embedding.sparse import fit
from orrery.rag.embedding.tokens import Tokens
from orrery.rag.engines import Point
from orrery.rag.engines.edge import EdgeEngine
from orrery.rag.generations import Facts, Generation
from orrery.rag.index import payload_of
from orrery.rag.reading import Bounds, Source
from orrery.rag.records import Chunk, Document, Section
from orrery.rag.retrieval import Found, retrieve
from orrery.rag.spec import Chunking, Embedding, Retrieval
from orrery.spec import load_knowledge
from orrery.store import Manifest, Store

ROOT = Path(__file__).resolve().parents[2]
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
CRANFIELD = ROOT.parent / "shared" / "data" / "cranfield"
HANDBOOK = ROOT / "include" / "projects" / "handbook"
DEPTH, DEEP = 10, 60
NDCG = nDCG @ DEPTH
ANYBODY = frozenset({"everyone"})
KINDS = {".md": reading.MARKDOWN, ".html": reading.HTML, ".pdf": reading.PDF, ".txt": reading.TEXT}
Run = dict[str, dict[str, float]]
Grades = dict[str, dict[str, int]]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="orrery-bench-") as folder:
        rows = measured(Path(folder))
    print(json.dumps(rows))


def measured(scratch: Path) -> list[dict[str, object]]:
    made = Making(scratch)
    rows = handbook(made)
    if CRANFIELD.is_dir():
        rows += cranfield(made)
    else:
        print("../shared/data/cranfield is not there: its figures are left out", file=sys.stderr)
    return rows


class Making:
    """Embedders, exported once, and generations made with them."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.store = scratch, Store(f"file://{scratch / 'store'}")
        self.cutter = Cutter(Tokens.of(Embedding(), scratch / "model", ROOT), Chunking())
        self._known: dict[str, tuple[Embedder, Path]] = {}

    def embedder(self, precision: str = "fp32") -> tuple[Embedder, Path]:
        if precision not in self._known:
            wanted = Embedding.model_validate({"precision": precision})
            folder = store_folder(self.store, prepare(self.store, wanted, self.scratch), self.scratch)
            self._known[precision] = Embedder.open(folder), folder
        return self._known[precision]

    def generation(self, chunks: Sequence[Chunk], precision: str = "fp32") -> Generation:
        embedder, _ = self.embedder(precision)
        texts = [c.embedded for c in chunks]
        dense = embedder.embed(texts)
        sparse, (starts, indices, values) = fit(texts)
        engine = EdgeEngine.create(Path(tempfile.mkdtemp(dir=self.scratch)), embedder.dimensions, len(chunks))
        engine.upsert(
            Point(c.id, dense[i], (indices[a:b].tolist(), values[a:b].tolist()), payload_of(c))
            for i, (c, a, b) in enumerate(zip(chunks, starts, starts[1:], strict=False))
        )
        engine.seal()
        facts = Facts(
            backend="embedded", count=len(chunks), embedder=embedder.id, dimensions=embedder.dimensions, ids="",
            sparse=sparse.told(),
        )  # fmt: skip
        manifest = Manifest(project="bench", verb="index", key="", address="0" * 32, digest="", files={})
        return Generation(manifest, facts, engine, embedder, sparse)

    def lexicon(self, chunks: Sequence[Chunk]) -> Any:
        embedder, folder = self.embedder()
        pieces = calibrate.piece_vectors(folder / MODEL, embedder.tokenizer.get_vocab_size())
        return calibrate.lexicon((c.embedded for c in chunks), "english", pieces, embedder.tokenizer)


def ndcg(wanted: Grades, run: Run) -> float:
    given = {q: run.get(q) or {"nothing": 0.0} for q in wanted}
    return float(ir_measures.calc_aggregate([NDCG], wanted, given)[NDCG])


def bm25(texts: Mapping[str, str], asked: Mapping[str, str]) -> Run:
    """Rank texts by bm25s with its own defaults."""
    sys.path.append(str(VENVS / "bench"))
    import bm25s
    import Stemmer

    stemmer, names = Stemmer.Stemmer("english"), list(texts)
    held = bm25s.BM25()
    held.index(
        bm25s.tokenize(list(texts.values()), stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False
    )
    said = bm25s.tokenize(list(asked.values()), stopwords="en", stemmer=stemmer, show_progress=False)
    found, _ = held.retrieve(said, k=DEPTH, show_progress=False)
    return {q: {names[int(i)]: float(-n) for n, i in enumerate(row)} for q, row in zip(asked, found, strict=True)}


def row(name: str, value: float, unit: str, against: str, ratio: float) -> dict[str, object]:
    return {"name": name, "value": value, "unit": unit, "against": against, "ratio": ratio}


def compared(prefix: str, what: str, hybrid: float, sparse: float, dense: float) -> list[dict[str, object]]:
    return [
        row(f"{prefix}_hybrid", hybrid, "nDCG@10", f"bm25s alone, {what} (ratio: hybrid to it)", hybrid / sparse),
        row(f"{prefix}_bm25", sparse, "nDCG@10", "hybrid", sparse / hybrid),
        row(f"{prefix}_dense", dense, "nDCG@10", "hybrid", dense / hybrid),
    ]


def abstention(prefix: str, what: str, m: calibrate.Measured, yes: int, no: int) -> list[dict[str, object]]:
    def told(low: float, high: float, count: int, bar: str) -> str:
        return f"{what}: {count} questions, 95 % {low:.3f} … {high:.3f}; bar {bar} (ratio: to it); AUC {m.auc:.3f}"

    return [
        row(f"{prefix}abstained", m.abstained, "share", told(m.abstained_low, m.abstained_high, no, "≥ 0.85"), m.abstained / 0.85),
        row(f"{prefix}wrongly_abstained", m.wrongly, "share", told(m.wrongly_low, m.wrongly_high, yes, "≤ 0.10"), m.wrongly / 0.10),
    ]  # fmt: skip


# -- the handbook --------------------------------------------------------------------------------------


def handbook(made: Making) -> list[dict[str, object]]:
    spec = load_knowledge(HANDBOOK)
    asked = questions.read(HANDBOOK / str(spec.questions))
    chunks = list(pages(made.cutter))
    labels = questions.label(asked, chunks)
    assert not labels.lost, labels.lost
    answerable = [q for q in asked if q.answerable]
    wanted: Grades = {q.id: dict.fromkeys(labels.relevant[q.id], 1) for q in answerable}
    generation = made.generation(chunks)

    def ranked(mode: Any) -> tuple[Run, dict[str, list[Found]]]:
        found = {q.id: retrieve(generation, q.question, groups=q.reader, top_k=DEPTH, mode=mode) for q in asked}
        return {q: {f.id: float(-n) for n, f in enumerate(some)} for q, some in found.items()}, found

    (hybrid, found), (dense, _) = ranked("hybrid"), ranked("dense")
    sparse: Run = {}
    for reader in {q.reader for q in answerable}:  # bm25s knows no groups: it is given what each may read
        texts = {c.id: c.embedded for c in chunks if reader & set(c.groups)}
        sparse |= bm25(texts, {q.id: q.question for q in answerable if q.reader == reader})
    words, top_k = made.lexicon(chunks), spec.retrieval.top_k
    rows = [signals(q.question, found[q.id][:top_k], words) for q in asked]
    fitted = calibrate.cross_fit(calibrate.matrix(rows), [q.answerable for q in asked])
    what = f"the handbook's {len(answerable)} questions, {len(chunks)} chunks"
    figures = [ndcg(wanted, run) for run in (hybrid, sparse, dense)]
    return [
        *compared("rag_ndcg_handbook", what, *figures),
        *abstention("rag_", "the handbook, near misses", fitted, len(answerable), len(asked) - len(answerable)),
    ]


def pages(cutter: Cutter) -> Iterable[Chunk]:
    """Yield the chunks of the handbook's pages."""
    for source, told in load_knowledge(HANDBOOK).sources.items():
        folder = HANDBOOK / str(told.uri)
        for file in sorted(p for p in folder.rglob("*") if p.suffix in KINDS):
            read = reading.read(Source(file.read_bytes(), KINDS[file.suffix]), Bounds())
            uri = file.relative_to(HANDBOOK).as_posix()
            yield from cutter.cut(document(source, uri, read.title or file.stem, tuple(told.groups), read.sections))


def document(source: str, uri: str, title: str, groups: tuple[str, ...], sections: tuple[Section, ...]) -> Document:
    id_ = hashlib.sha256(f"{source}\n{uri}".encode()).hexdigest()[:32]
    return Document(id_, source, uri, title, "text/plain", groups, "", 0, sections)


# -- Cranfield -----------------------------------------------------------------------------------------


def cranfield(made: Making) -> list[dict[str, object]]:
    lines = (CRANFIELD / "corpus.jsonl").read_text().splitlines()
    texts = {d["_id"]: d for d in map(json.loads, lines)}
    asked = {q["_id"]: q["text"] for q in map(json.loads, (CRANFIELD / "queries.jsonl").read_text().splitlines())}
    wanted: Grades = {}
    for line in (CRANFIELD / "qrels.tsv").read_text().splitlines()[1:]:
        question, one, grade = line.split("\t")
        wanted.setdefault(question, {})[one] = int(grade)
    chunks = [c for name, d in texts.items() for c in made.cutter.cut(abstract(name, d))]
    generation = made.generation(chunks)
    found = {q: retrieve(generation, text, groups=ANYBODY, top_k=DEEP, candidates=DEEP) for q, text in asked.items()}
    dense = {q: retrieve(generation, text, groups=ANYBODY, top_k=DEEP, candidates=DEEP, mode="dense") for q, text in asked.items()}  # fmt: skip
    eight = made.generation(chunks, "int8")
    small = {q: retrieve(eight, text, groups=ANYBODY, top_k=DEEP, candidates=DEEP) for q, text in asked.items()}
    sparse = bm25({name: d["text"] for name, d in texts.items()}, asked)
    figures = [ndcg(wanted, run) for run in (best(found), sparse, best(dense), best(small))]
    words, top_k = made.lexicon(chunks), Retrieval().top_k
    rows, kinds, groups = [], [], []
    for q, text in asked.items():
        without = [f for f in found[q] if f.uri not in wanted[q]]
        for answerable, passages in ((True, found[q]), (False, without)):
            rows.append(signals(text, passages[:top_k], words))
            kinds.append(answerable)
            groups.append(q)
    fitted = calibrate.cross_fit(calibrate.matrix(rows), kinds, groups=groups, repeats=2)
    return [
        *compared("rag_ndcg", f"Cranfield, {len(asked)} questions, {len(chunks)} chunks", *figures[:3]),
        row("rag_ndcg_int8", figures[3], "nDCG@10", "hybrid with fp32, Cranfield", figures[3] / figures[0]),
        *abstention("rag_cranfield_", "Cranfield with and without its documents", fitted, len(asked), len(asked)),
    ]


def abstract(name: str, told: Mapping[str, str]) -> Document:
    # The text repeats the title.
    body = told["text"].removeprefix(told["title"]).strip() or told["text"]
    return document("cranfield", name, told["title"], ("everyone",), (Section((), body),))


def best(found: Mapping[str, Sequence[Found]]) -> Run:
    """Return documents in the order of their best chunks."""
    order: Callable[[Sequence[Found]], list[str]] = lambda some: list(dict.fromkeys(f.uri for f in some))[:DEPTH]  # noqa: E731
    return {q: {uri: float(-n) for n, uri in enumerate(order(some))} for q, some in found.items()}


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
