"""Chunks with vectors that cost nothing, committed as `chunk` and `embed` do; generations made of them, and opened."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qdrant_client import QdrantClient

from orrery import step
from orrery.contract import Result, StepConfig
from orrery.rag import generations
from orrery.rag.embedding.sparse import SparseModel, fit, index, terms
from orrery.rag.engines import Engine, Point
from orrery.rag.generations import Facts, Generation
from orrery.rag.index import payload_of
from orrery.rag.records import Chunk
from orrery.store import File, Manifest, Ref, Store, content_digest

PROJECT = "notes"
DAY = "2026-01-05"
DIMENSIONS = 24
URL = "http://qdrant.example:6333"


@lru_cache(maxsize=10_000)
def _direction(term: str) -> NDArray[np.float32]:
    return np.random.default_rng(index(term)).standard_normal(DIMENSIONS).astype(np.float32)


class TermEmbedder:
    """A text's vector is the sum of its terms', each drawn by the term's index: like texts have like vectors."""

    id = "terms-fp32-0123456789ab"
    dimensions = DIMENSIONS
    limit = 200

    def embed(self, texts: Sequence[str], *, query: bool = False, on_batch: Any = None) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in zip(rows, texts, strict=True):
            row[0] = 1e-3  # a text without terms has a direction, too
            for term in terms(text):
                row += _direction(term)
            row /= np.linalg.norm(row)
        return rows


def chunk(text: str, uri: str = "guides/a.md", *, groups: Iterable[str] = ("everyone",), **fields: Any) -> Chunk:
    source, title = uri.split("/", maxsplit=1)[0], fields.pop("title", "")
    document = hashlib.sha256(uri.encode()).hexdigest()[:32]
    told = {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{uri}\n{text}")),
        "document": document,
        "source": source,
        "uri": uri,
        "title": title,
        "groups": tuple(sorted(groups)),
        "heading": (),
        "page": None,
        "text": text,
        "embedded": f"{title}\n{text}".strip(),
        "tokens": len(text.split()),
        "position": 0,
    }
    return Chunk(**{**told, **fields})


def points(made: Sequence[Chunk]) -> list[Point]:
    """Return the chunks as points."""
    dense = TermEmbedder().embed([one.embedded for one in made])
    _, (starts, indices, values) = fit(one.embedded for one in made)
    return [
        Point(one.id, dense[i], (indices[a:b].tolist(), values[a:b].tolist()), payload_of(one))
        for i, (one, a, b) in enumerate(zip(made, starts, starts[1:], strict=False))
    ]


def commit(store: Store, verb: str, name: str, files: Mapping[str, bytes], inputs: Mapping[str, Ref]) -> Ref:
    """Commit files as a verb's output at an address `name`."""
    kept = {}
    for file, data in files.items():
        store.put(f"{PROJECT}/{verb}/{name}/a1/{file}", data)
        kept[file] = File(path=f"a1/{file}", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = Manifest(
        project=PROJECT,
        verb=verb,
        key=DAY,
        address=name,
        digest=content_digest(kept),
        files=kept,
        inputs={k: (ref,) for k, ref in inputs.items()},
    )
    store.put(manifest.path, manifest.model_dump_json().encode())
    return manifest.ref


def inputs(store: Store, made: Sequence[Chunk], scratch: Path, name: str = "one") -> dict[str, tuple[Ref, ...]]:
    """Commit chunks and their vectors; return what `index` is given."""
    cut = commit(store, "chunk", name, {"chunks.jsonl": "".join(one.line() for one in made).encode()}, {})
    model, (indptr, indices, values) = fit(one.embedded for one in made)
    embedder = TermEmbedder()
    facts = {"id": embedder.id, "dimensions": DIMENSIONS, "sparse": model.told()}
    np.save(scratch / "vectors.npy", embedder.embed([one.embedded for one in made]))
    np.savez(scratch / "sparse.npz", indptr=indptr, indices=indices, values=values)
    files = {file: (scratch / file).read_bytes() for file in ("vectors.npy", "sparse.npz")}
    files["embedder.json"] = json.dumps(facts).encode()
    return {"chunks": (cut,), "vectors": (commit(store, "embed", name, files, {"chunks": cut}),)}


def run_index(
    store: Store, given: dict[str, tuple[Ref, ...]], scratch: Path, address: str = "0" * 32, qdrant: str | None = None
) -> Result:
    """Run `index` as a step does, in this process. On a server, the address follows from `address` by itself."""
    config = StepConfig(
        project=PROJECT,
        kind="knowledge_base",
        verb="index",
        key=DAY,
        partitions=(DAY,),
        params={"qdrant": qdrant},
        inputs=given,
        store=store.uri,
        bundle="",
        address=None if qdrant else address,
        fingerprint={"inputs": address},
        run="run-1",
        task="index",
        folder=f"{PROJECT}/runs/run-1/index/{scratch.name}",
    )
    scratch.mkdir(parents=True)
    return step.execute(config, store, scratch, {})


def opened(store: Store, manifest: str, scratch: Path, qdrant: str | None = None) -> Generation:
    """Open a generation with the embedder above."""
    found = store.manifest(manifest)
    assert found is not None
    facts = generations.facts_of(store, found)
    engine, folder = generations.open_engine(store, found, facts, scratch, qdrant)
    generation = Generation(found, facts, engine, TermEmbedder(), SparseModel.of(facts.sparse))  # type: ignore[arg-type]
    generation._folder = folder
    return generation


class Lasting(QdrantClient):
    """qdrant-client's local mode, left open when an engine lets go of it: its folder has room for one client."""

    def close(self, *args: Any, **kwargs: Any) -> None:
        pass

    def end(self) -> None:
        super().close()


def generation_of(engine: Engine, made: Sequence[Chunk]) -> Generation:
    """Return a generation on an engine that holds these chunks' points, without a store."""
    sparse, _ = fit(one.embedded for one in made)
    facts = Facts(
        backend="embedded",
        count=len(made),
        embedder=TermEmbedder.id,
        dimensions=DIMENSIONS,
        ids="",
        sparse=sparse.told(),
    )
    manifest = Manifest(project=PROJECT, verb="index", key=DAY, address="0" * 32, digest="", files={})
    return Generation(manifest, facts, engine, TermEmbedder(), sparse)  # type: ignore[arg-type]
