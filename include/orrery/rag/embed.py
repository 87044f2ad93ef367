"""The verb `embed`: a dense and a sparse vector for every chunk; only texts that were never embedded are computed.

`vectors.npy` (float32, row i is line i of chunks.jsonl) and `sparse.npz` (BM25's weights), with `embedder.json`, which
says what a question must be embedded with. A vector computed in another batch differs by about 1e-7: the same chunks
give the same bytes as long as their vectors are kept.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import BinaryIO

import numpy as np

from orrery.contract import Result
from orrery.errors import OrreryError
from orrery.rag.contract import EmbedParams
from orrery.rag.embedding import export, sparse
from orrery.rag.embedding import source as sources
from orrery.rag.embedding.session import FACTS, Embedder, Facts, Rows, Vectors, store_folder
from orrery.rag.records import CHUNKS, Chunk
from orrery.rag.records import chunks as chunks_of
from orrery.rag.spec import Embedding
from orrery.rag.vectors import KEY, Cache, Keys, key_of
from orrery.step import Work

VECTORS, SPARSE = "vectors.npy", "sparse.npz"
CACHE = "embedding-cache"


def run(work: Work, params: EmbedParams) -> Result:
    """Embed the chunks. Metrics: `embedded` texts were computed, `reused` ones were known, of `chunks`."""
    wanted = work.knowledge.embedder
    name = export.prepare(work.store, wanted, work.scratch / "export", work.project_folder)
    folder = store_folder(work.store, name, work.scratch)
    facts = Facts.read(folder / FACTS)
    lines = Lines(work.open_input(work.input("chunks"), CHUNKS), facts.document_prefix)
    model, weights = sparse.fit(lines.texts(), wanted.language)
    _write_sparse(work.path(SPARSE), weights)
    cache = Cache(work.store, f"{work.config.project}/{CACHE}/{name}", facts.dimensions, work.scratch / "cache")
    vectors = _matrix(work.path(VECTORS), len(lines), facts.dimensions)
    own = lines.first == np.arange(len(lines))
    missing = np.flatnonzero(own & ~cache.fill(lines.keys, vectors))
    if len(missing):
        embedder = _opened(work, wanted, folder, facts, params.device)
        _compute(work, embedder, lines, missing, cache, vectors)
    repeated = np.flatnonzero(~own)
    vectors[repeated] = vectors[lines.first[repeated]]
    _sync(vectors)
    work.write_json(FACTS, {**facts.told(), "language": wanted.language, "sparse": model.told()})
    cache.tidy(lines.keys, date.fromisoformat(work.config.key).toordinal())
    reused = int(own.sum()) - len(missing)
    work.log.info("chunks are embedded", chunks=len(lines), computed=len(missing), reused=reused, embedder=name)
    metrics = {"chunks": len(lines), "embedded": len(missing), "reused": reused, "terms": float(model.average)}
    return Result(metrics=metrics, facts={"embedder": name, "dimensions": facts.dimensions})


class Lines:
    """The chunks' file, read once for what is needed of every line, and then line by line where texts are asked for."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix = path, prefix
        self._offsets = array("q", [0])
        self.lengths = array("q")
        self._keys = bytearray()
        self._first = array("q")

    def texts(self) -> Iterator[str]:
        """Yield each chunk's text as it is embedded; the rest is known when they have all been read."""
        seen: dict[bytes, int] = {}
        for row, chunk in enumerate(chunks_of(self._path)):
            key = key_of(self._prefix + chunk.embedded)
            self._keys += key
            self._first.append(seen.setdefault(key, row))
            self.lengths.append(chunk.tokens)
            # A line is canonical ASCII: as long as it is written.
            self._offsets.append(self._offsets[-1] + len(chunk.line()))
            yield chunk.embedded

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def keys(self) -> Keys:
        """The texts' keys, (n, 32)."""
        return np.frombuffer(self._keys, np.uint8).reshape(-1, KEY)

    @property
    def first(self) -> Rows:
        """Of each line, the first one with the same text."""
        return np.array(self._first, np.int64)

    def at(self, rows: Rows) -> list[str]:
        """Return the texts of some lines. May be called by several threads at once."""
        with self._path.open("rb") as file:
            return [self._text(file, int(row)) for row in rows]

    def _text(self, file: BinaryIO, row: int) -> str:
        file.seek(self._offsets[row])
        return Chunk.from_line(file.read(self._offsets[row + 1] - self._offsets[row])).embedded


def _compute(work: Work, embedder: Embedder, lines: Lines, missing: Rows, cache: Cache, vectors: Vectors) -> None:
    """Embed the lines `missing` into their rows; what is done is kept, whatever ends this."""
    lengths = [lines.lengths[row] for row in missing]
    keys = lines.keys
    try:
        with work.progress("embedded", sum(lengths), "tokens") as tick:
            for positions, made in embedder.stream(lengths, lambda some: lines.at(missing[some])):
                rows = missing[positions]
                vectors[rows] = made
                cache.add(keys[rows], made)
                tick(sum(lengths[position] for position in positions))
    except BaseException:
        with contextlib.suppress(OrreryError, OSError):  # the error that led here is the one to tell
            cache.flush()
        raise
    cache.flush()


def _opened(work: Work, wanted: Embedding, folder: Path, facts: Facts, device: str) -> Embedder:
    if device == "cpu":
        return Embedder.open(folder)
    from orrery.rag.embedding.gpu import open_on_gpu

    return open_on_gpu(sources.source(wanted, work.scratch / "export" / "model", work.project_folder), folder, facts)


def _matrix(path: Path, rows: int, dimensions: int) -> Vectors:
    """Return a new .npy file's matrix, mapped into memory."""
    if not rows:
        np.save(path, np.empty((0, dimensions), np.float32), allow_pickle=False)
        return np.empty((0, dimensions), np.float32)
    return np.lib.format.open_memmap(path, "w+", np.dtype(np.float32), (rows, dimensions))


def _sync(vectors: Vectors) -> None:
    if isinstance(vectors, np.memmap):
        vectors.flush()


def _write_sparse(path: Path, weights: sparse.Csr) -> None:
    indptr, indices, values = weights
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, indptr=indptr, indices=indices, values=values)
