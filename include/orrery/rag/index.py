"""`index`: the chunks with their vectors, as a generation that can be asked.

Embedded, a folder is built apart and committed as an archive. On a server, a collection of the generation's own is
driven to what it should hold: points that lack or differ are put in, strays taken out, and what is there already stays.
Either way index and chunks are compared id by id before the commit. What another generation holds is never touched.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery import fingerprint
from orrery.contract import Result
from orrery.errors import OrreryError, UserError
from orrery.rag.contract import IndexParams
from orrery.rag.embedding.sparse import SparseModel
from orrery.rag.engines import DIGEST, GROUPS, Condition, Engine, Point, Search
from orrery.rag.engines.archive import FOLDER, pack, unpack
from orrery.rag.engines.edge import EXACT, EdgeEngine
from orrery.rag.generations import FACTS, POINTS, SHARD, Facts
from orrery.rag.reconcile import reconcile
from orrery.rag.records import CHUNKS, Chunk, chunks
from orrery.step import Work
from orrery.store import trouble

VECTORS, SPARSE_FILE, EMBEDDER = "vectors.npy", "sparse.npz", "embedder.json"
PROBES = 20
FOUND_AGAIN = 0.999  # the cosine of a vector and itself, as an engine computes it
AS_PLANNED = "run embed again, then index"


@dataclass(frozen=True)
class Given:
    """The inputs: chunks by line, and row by row their vectors; facts of embedder and sparse model."""

    chunks: Path
    dense: npt.NDArray[np.float32]
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.uint32]
    values: npt.NDArray[np.float32]
    embedder: str
    sparse: SparseModel

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return len(self.dense)

    def points(self) -> Iterator[Point]:
        """Yield the points, in the order of the chunks. Raises `UserError` when there are more or fewer chunks."""
        number = -1
        for number, chunk in enumerate(chunks(self.chunks)):
            if number < self.count:
                yield self._point(number, chunk)
        if number + 1 != self.count:
            raise UserError(f"{number + 1:,} chunks, {self.count:,} vectors", hint=AS_PLANNED)

    def some(self) -> Iterator[Point]:
        """Yield about `PROBES` of the points, spread evenly."""
        step = max(1, self.count // PROBES)
        for number, chunk in enumerate(chunks(self.chunks)):
            if number % step == 0:
                yield self._point(number, chunk)

    def _point(self, row: int, chunk: Chunk) -> Point:
        part = slice(int(self.indptr[row]), int(self.indptr[row + 1]))
        dense, indices, values = self.dense[row], self.indices[part], self.values[part]
        payload = payload_of(chunk)
        digest = hashlib.sha256(fingerprint.canonical(payload).encode())
        for array in (dense, indices, values):
            digest.update(array.tobytes())
        payload[DIGEST] = digest.hexdigest()[:32]
        return Point(chunk.id, dense, (indices.tolist(), values.tolist()), payload)


def payload_of(chunk: Chunk) -> dict[str, Any]:
    """Return what a point tells of its chunk: all that a reader sees, and who may."""
    return {
        "document": chunk.document,
        "source": chunk.source,
        "uri": chunk.uri,
        "title": chunk.title,
        GROUPS: list(chunk.groups),
        "heading": list(chunk.heading),
        "page": chunk.page,
        "text": chunk.text,
        "position": chunk.position,
    }


def run(work: Work, params: IndexParams) -> Result:
    """Make the generation, compare it with the chunks, and say what was done.

    Raises `UserError` when chunks and vectors do not fit, `TryAgain` when the server does not answer, and
    `OrreryError` when index and chunks differ in the end.
    """
    given = read(work)
    if params.qdrant is None:
        return embedded(work, given)
    address = work.config.address or fingerprint.digest(work.config.fingerprint)[:32]
    with work.at(address) as fresh:
        return on_server(work, given, params.qdrant, fresh)


def read(work: Work) -> Given:
    """Open the inputs; the dense vectors stay on disk. Raises `UserError` when they do not fit together."""
    made, cut = work.input("vectors"), work.input("chunks")
    dense = np.load(work.open_input(made, VECTORS), mmap_mode="r", allow_pickle=False)
    with np.load(work.open_input(made, SPARSE_FILE), allow_pickle=False) as sparse:
        indptr, indices, values = sparse["indptr"], sparse["indices"], sparse["values"]
    facts = json.loads(work.open_input(made, EMBEDDER).read_bytes())
    if dense.ndim != 2 or dense.shape[1] != facts["dimensions"] or len(indptr) != len(dense) + 1:
        raise UserError(
            f"{made.path}: {VECTORS} {dense.shape}, {SPARSE_FILE} {len(indptr) - 1:,} rows, the embedder's "
            f"{facts['dimensions']} numbers",
            hint=AS_PLANNED,
        )
    model = SparseModel.of(facts["sparse"])
    return Given(work.open_input(cut, CHUNKS), dense, indptr, indices, values, facts["id"], model)


# -- embedded ------------------------------------------------------------------------------------------


def embedded(work: Work, given: Given) -> Result:
    """Build the folder and make it an archive, which is read back."""
    if not given.count:
        work.log.warning("there are no chunks: the generation will find nothing")
    folder = work.scratch / "index"
    with trouble(str(folder)):
        building = EdgeEngine.create(folder, given.dense.shape[1], given.count)
        with work.progress("index", given.count, "points") as tick:
            building.upsert(_told(given.points(), tick))
        building.seal()
        building.close()
    archive = work.path(SHARD)
    pack(folder, archive)
    shutil.rmtree(folder)
    unpack(archive, folder)  # as a service will: what is committed is what is compared
    engine = EdgeEngine.load(folder / FOLDER)
    try:
        ids = compare(engine, given)
    finally:
        engine.close()
    reasons = []
    if given.count > EXACT:
        reasons.append(f"{given.count:,} chunks: above {EXACT:,} a Qdrant server is the better place (`qdrant`)")
    return tell(work, given, ids, None, reasons)


def _told(points: Iterator[Point], tick: Callable[..., object]) -> Iterator[Point]:
    for point in points:
        yield point
        tick()


# -- on a server ---------------------------------------------------------------------------------------


def on_server(work: Work, given: Given, url: str, fresh: bool) -> Result:
    """Drive the generation's collection to what it should hold."""
    from orrery.rag.engines.server import ServerEngine, connect

    collection = collection_of(work)
    engine = ServerEngine.create(connect(url), collection, given.dense.shape[1], url)
    try:
        mended = drive(work, engine, given)
        ids = compare(engine, given)
    finally:
        engine.close()
    result = tell(work, given, ids, collection, [])
    if mended and not fresh:
        work.log.warning(f"the collection was changed behind our back; {mended}")
        result.skipped = f"the same generation; {mended}"
    return result


def collection_of(work: Work) -> str:
    """Return the name of the collection of this generation, and of no other."""
    return f"{work.config.project}-{work.address[:16]}"


def drive(work: Work, engine: Engine, given: Given) -> str:
    """Put in what lacks or differs, take out strays; say how much that was, nothing when all was as it should be."""
    wanted = {point.id: (point.payload[DIGEST], tuple(point.payload[GROUPS])) for point in given.points()}
    strays, same = list[str](), set[str]()
    for id_, told in engine.rows((DIGEST, GROUPS)):
        if id_ not in wanted:
            strays.append(id_)
        elif wanted[id_] == (told.get(DIGEST), tuple(told.get(GROUPS) or ())):
            same.add(id_)
    lacked = len(wanted) - len(same)
    if lacked:
        with work.progress("index", lacked, "points") as tick:
            engine.upsert(_told((point for point in given.points() if point.id not in same), tick))
    engine.delete(strays)
    return f"{lacked:,} points put in, {len(strays):,} strays taken out" if lacked or strays else ""


# -- both ----------------------------------------------------------------------------------------------


def compare(engine: Engine, given: Given) -> list[str]:
    """Compare index and chunks; return the ids, sorted. Raises `OrreryError` when they differ."""
    compared = reconcile(engine, chunks(given.chunks))
    if not compared.sound:
        raise OrreryError(
            f"index and chunks differ: {compared.sentence()}",
            hint="nothing was committed; does somebody else write into it?",
            details=compared.told(),
        )
    probe(engine, given)
    return sorted(engine.ids())


def probe(engine: Engine, given: Given) -> None:
    """Look some chunks up by their own vectors. Raises `OrreryError` when one finds neither itself nor its like."""
    for point in given.some():
        where = (Condition(GROUPS, tuple(point.payload[GROUPS])),)
        found = engine.search(Search(where, np.asarray(point.dense), point.sparse, "dense", limit=1))
        if not found or found[0].score < FOUND_AGAIN:
            raise OrreryError(
                f"chunk {point.id} ({point.payload['uri']}) is not found by its own vector",
                hint=f"{VECTORS} must hold vectors of length 1: {AS_PLANNED}",
            )


def tell(work: Work, given: Given, ids: list[str], collection: str | None, reasons: list[str]) -> Result:
    """Write generation.json and points.txt; return the result."""
    lines = "".join(f"{id_}\n" for id_ in ids).encode()
    work.write(POINTS, lines)
    facts = Facts(
        backend="server" if collection else "embedded",
        collection=collection,
        count=len(ids),
        embedder=given.embedder,
        dimensions=int(given.dense.shape[1]),
        ids=hashlib.sha256(lines).hexdigest(),
        sparse=given.sparse.told(),
    )
    work.write_json(FACTS, facts.model_dump(mode="json"))
    told = facts.model_dump(mode="json", include={"backend", "collection", "count", "embedder"})
    return Result(reasons=reasons, metrics={"points": float(len(ids))}, facts=told)
