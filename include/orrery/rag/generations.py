"""A generation, opened to be asked: its points, the embedder that made them, and the sparse model.

A generation never changes. Whoever asks several things of one holds it meanwhile; `close` takes effect when nobody
holds it any more, so a service may put another in its place at any moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orrery.errors import OrreryError, UserError
from orrery.rag.embedding.session import Embedder, store_folder
from orrery.rag.embedding.sparse import SparseModel
from orrery.rag.engines import Engine, Hit, Search, Sparse, Vector
from orrery.store import CHUNK, File, Manifest, Store, trouble

SHARD, FACTS, POINTS = "shard.tar", "generation.json", "points.txt"


class Facts(BaseModel):
    """generation.json: what a generation is."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    backend: str = Field(pattern="^(embedded|server)$")
    collection: str | None = None
    count: int = Field(ge=0)
    embedder: str
    dimensions: int = Field(ge=1)
    ids: str = Field(description="sha256 over the sorted ids, a line each.")
    sparse: dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question as it is looked up: its dense vector (unit length), and its terms."""

    dense: Vector
    sparse: Sparse


class Generation:
    """One generation, open. Any number of threads may ask at once."""

    def __init__(
        self, manifest: Manifest, facts: Facts, engine: Engine, embedder: Embedder, sparse: SparseModel
    ) -> None:
        self.manifest, self.facts, self.engine, self.embedder, self.sparse = manifest, facts, engine, embedder, sparse
        self._folder: Path | None = None
        self._lock, self._holders, self._closing, self._gone = threading.Lock(), 0, False, False

    @property
    def id(self) -> str:
        """Its address in the store."""
        return self.manifest.address

    @property
    def path(self) -> str:
        """Its manifest's path in the store."""
        return self.manifest.path

    def embed_query(self, text: str) -> Question:
        """Return what a question is looked up by."""
        dense = self.embedder.embed([text], query=True)[0]
        indices, values = self.sparse.encode_query(text)
        return Question(np.asarray(dense, np.float32), ([int(i) for i in indices], [float(v) for v in values]))

    def search(self, search: Search) -> list[Hit]:
        """Return the best points. Raises `OrreryError` once it is closed."""
        with self.held():
            return self.engine.search(search)

    @contextlib.contextmanager
    def held(self) -> Iterator[Generation]:
        """Keep it open until the block ends. Raises `OrreryError` when it is closed already."""
        with self._lock:
            if self._closing and not self._holders:
                raise OrreryError(f"generation {self.id} is closed", hint="open the live one")
            self._holders += 1
        try:
            yield self
        finally:
            with self._lock:
                self._holders -= 1
            self._let_go()

    def close(self) -> None:
        """Close it as soon as nobody holds it; twice is fine."""
        with self._lock:
            self._closing = True
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            last = self._closing and not self._holders and not self._gone
            self._gone = self._gone or last
        if last:
            self.engine.close()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)


def open_generation(
    store: Store, manifest_path: str, scratch: Path, *, qdrant: str | None = None, threads: int = 0
) -> Generation:
    """Open a generation: its index is unpacked below `scratch`, or its server (`qdrant`) connected to.

    `threads`: of the embedder; 0: as many as there are cores. Raises `UserError` when it is gone, damaged, or on
    a server that nobody has named; `TryAgain` when the store or the server does not answer.
    """
    manifest = store.manifest(manifest_path)
    if manifest is None:
        raise UserError(f"{store.uri}/{manifest_path}: there is no such generation", hint="run index")
    facts = facts_of(store, manifest)
    embedder = Embedder.open(store_folder(store, facts.embedder, scratch), threads)
    if embedder.dimensions != facts.dimensions:
        raise UserError(
            f"{manifest.path}: vectors of {facts.dimensions} dimensions, embedder {facts.embedder} has "
            f"{embedder.dimensions}",
            hint="run embed and index again",
        )
    engine, folder = open_engine(store, manifest, facts, scratch, qdrant)
    generation = Generation(manifest, facts, engine, embedder, SparseModel.of(facts.sparse))
    generation._folder = folder
    return generation


def facts_of(store: Store, manifest: Manifest) -> Facts:
    """Return a generation's facts, verified. Raises `UserError` when they are damaged."""
    data = verified(store, manifest, FACTS)
    try:
        return Facts.model_validate_json(data)
    except ValidationError as e:
        first = e.errors()[0]
        raise UserError(f"{manifest.uri(FACTS)}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def open_engine(
    store: Store, manifest: Manifest, facts: Facts, scratch: Path, qdrant: str | None
) -> tuple[Engine, Path | None]:
    """Open the points of a generation; return the folder too that is removed with them."""
    if facts.backend == "server":
        from orrery.rag.engines.server import ServerEngine, connect

        if qdrant is None:
            raise UserError(
                f"{manifest.path} lies on a Qdrant server, and none is named", hint="`qdrant` in platform.yaml"
            )
        assert facts.collection is not None
        return ServerEngine.load(connect(qdrant), facts.collection, qdrant), None
    from orrery.rag.engines.archive import FOLDER, unpack
    from orrery.rag.engines.edge import EdgeEngine

    with trouble(str(scratch)):
        scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{manifest.address[:16]}-", dir=scratch))
    try:
        unpack(fetch(store, manifest, SHARD, scratch), folder)
        return EdgeEngine.load(folder / FOLDER), folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# -- files of a generation, verified -------------------------------------------------------------------


def verified(store: Store, manifest: Manifest, name: str) -> bytes:
    """Return a small file's bytes. Raises `UserError` when they are not those that were committed."""
    path = manifest.uri(name)
    try:
        data = store.read(path)
    except FileNotFoundError:
        raise _damaged(store, path, "it is gone") from None
    _check(store, path, manifest.files[name], len(data), hashlib.sha256(data).hexdigest())
    return data


def fetch(store: Store, manifest: Manifest, name: str, scratch: Path) -> Path:
    """Return a local path of a file's bytes, verified. Raises `UserError` when they are not those committed."""
    path = manifest.uri(name)
    try:
        local = store.local(path, scratch)
    except FileNotFoundError:
        raise _damaged(store, path, "it is gone") from None
    digest = hashlib.sha256()
    with trouble(str(local)), local.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    _check(store, path, manifest.files[name], local.stat().st_size, digest.hexdigest())
    return local


def _check(store: Store, path: str, file: File, size: int, sha256: str) -> None:
    if size != file.size:
        raise _damaged(store, path, f"{size:,} bytes instead of {file.size:,}")
    if sha256 != file.sha256:
        raise _damaged(store, path, f"its content has digest {sha256[:12]}, committed was {file.sha256[:12]}")


def _damaged(store: Store, path: str, why: str) -> UserError:
    folder = "/".join(path.split("/")[:3])
    return UserError(
        f"{store.uri}/{path}: {why}",
        hint=f"the generation is damaged: delete {folder} and run the reindex again, or roll back",
    )
