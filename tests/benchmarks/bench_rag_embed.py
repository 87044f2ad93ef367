"""Embedding against sentence-transformers, the same MiniLM on the same cores: passages per second, in the same run.

    .venvs/rag/bin/python tests/benchmarks/bench_rag_embed.py

Both sides start from texts and end with normalised vectors. The texts are Cranfield's abstracts
(../shared/data/cranfield), else the handbook's documents. The rival is taken at its best batch size of 32, 64 and 128;
all are measured in turn, five times, and their medians compared. Then, on Cranfield alone: how much of nDCG@10 int8
costs, by exact search over its 1,398 abstracts. A ratio above 1 means that ours is faster; that of the loss is the share
of the 0.005 that it may be.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orrery.rag.embedding import source as sources
from orrery.rag.embedding.export import prepare
from orrery.rag.embedding.session import Embedder, store_folder
from orrery.rag.spec import Embedding
from orrery.store import Store

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
ROOT = Path(__file__).resolve().parents[2]
CRANFIELD = ROOT.parent / "shared" / "data" / "cranfield"
HANDBOOK = ROOT / "include" / "projects" / "handbook" / "documents"
TEXTS, ROUNDS, BATCHES, BOUND = 192, 5, (32, 64, 128), 0.005


def texts() -> list[str]:
    """Return passages: as many as are measured, spread over the collection."""
    if CRANFIELD.exists():
        found = [each["text"] for each in _lines("corpus") if each["text"]]
    else:
        print("../shared/data/cranfield is not there: the handbook's documents instead", file=sys.stderr)
        parts = [p for f in sorted(HANDBOOK.rglob("*.md")) for p in f.read_text().split("\n\n")]
        found = [" ".join(parts[i : i + 4]) for i in range(0, len(parts), 4)]
    return found[:: max(1, len(found) // TEXTS)][:TEXTS]


def run(scratch: Path) -> list[dict[str, Any]]:
    """Measure, and return the rows."""
    embedders = {precision: _opened(scratch, precision) for precision in ("fp32", "int8")}
    rows = _speeds(embedders, texts())
    if CRANFIELD.exists():
        rows.append(_loss(embedders))
    else:
        print("../shared/data/cranfield is not there: embed_int8_ndcg_loss is left out", file=sys.stderr)
    return rows


def _opened(scratch: Path, precision: str) -> Embedder:
    store = Store(f"file://{scratch / 'store'}")
    name = prepare(store, Embedding(precision=precision), scratch)  # type: ignore[arg-type]
    return Embedder.open(store_folder(store, name, scratch))


def _speeds(embedders: dict[str, Embedder], passages: list[str]) -> list[dict[str, Any]]:
    from sentence_transformers import SentenceTransformer

    rival = SentenceTransformer(sources.source(Embedding(), Path(), Path()).uri, device="cpu")
    ways: dict[str, Callable[[], Any]] = {name: lambda e=e: e.embed(passages) for name, e in embedders.items()}
    ways |= {str(size): lambda size=size: rival.encode(passages, batch_size=size) for size in BATCHES}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    took = {name: statistics.median(each) for name, each in seconds.items()}
    best = min(BATCHES, key=lambda size: took[str(size)])
    exact = rival.encode(passages, batch_size=best)
    assert ((embedders["fp32"].embed(passages) * exact).sum(1) > 0.9999).all(), "the two have other vectors"
    return [
        {
            "name": name,
            "value": round(len(passages) / took[precision], 1),
            "unit": "passages/s",
            "against": f"sentence-transformers ({precision} against fp32, batches of {best})",
            "ratio": round(took[str(best)] / took[precision], 3),
        }
        for name, precision in (
            ("embed_vs_sentence_transformers", "fp32"),
            ("embed_int8_vs_sentence_transformers", "int8"),
        )
    ]


def _loss(embedders: dict[str, Embedder]) -> dict[str, Any]:
    found = {precision: _ndcg(embedder) for precision, embedder in embedders.items()}
    return {
        "name": "embed_int8_ndcg_loss",
        "value": round(found["fp32"] - found["int8"], 4),
        "unit": "nDCG@10",
        "against": f"fp32 on Cranfield ({found['fp32']:.4f}); at most {BOUND}",
        "ratio": round((found["fp32"] - found["int8"]) / BOUND, 3),
    }


def _ndcg(embedder: Embedder) -> float:
    import ir_measures
    from ir_measures import nDCG

    documents = [each for each in _lines("corpus") if each["text"]]
    queries = _lines("queries")
    table = (line.split("\t") for line in (CRANFIELD / "qrels.tsv").read_text().splitlines()[1:])
    judged = [ir_measures.Qrel(query, document, int(score)) for query, document, score in table]
    scores = embedder.embed([q["text"] for q in queries], query=True) @ embedder.embed([d["text"] for d in documents]).T
    found = [
        ir_measures.ScoredDoc(query["_id"], documents[i]["_id"], float(row[i]))
        for query, row in zip(queries, scores, strict=True)
        for i in np.argsort(-row)[:10]
    ]
    return float(ir_measures.calc_aggregate([nDCG @ 10], judged, found)[nDCG @ 10])


def _lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (CRANFIELD / f"{name}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder))))
