"""Qdrant inside of this process (qdrant-edge-py): a folder per generation.

Every vector is compared, so a search finds the best there are, the same each time. Above `EXACT` points that is done on
a copy of 8 bits a number first, and the best twice as many as asked for are compared exactly: at 100,000 a search takes
3 ms instead of 15 and finds the same 50; a graph (HNSW) takes 2 ms, and two minutes to build.

The library keeps Python's lock (the GIL) during a call: searches of several threads are safe, one after the other. Its
files have holes: nearly all of a small folder's 120 MB is unwritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as qdrant

from orrery.errors import UserError
from orrery.rag.engines import (
    BATCH,
    DENSE,
    KEYWORDS,
    RRF_K,
    SPARSE,
    Condition,
    Engine,
    Point,
    Ranked,
    Scored,
    Search,
    Vector,
    batches,
)

EXACT = 20_000
# Of how many more than asked for the exact distance is taken, where they were found by 8 bits a number.
MORE = 2.0
RESCORED = qdrant.SearchParams(quantization=qdrant.QuantizationSearchParams(rescore=True, oversampling=MORE))
EIGHT_BITS = qdrant.ScalarQuantizationConfig(qdrant.ScalarType.Int8, quantile=0.99, always_ram=True)
NO_GRAPH = qdrant.HnswIndexConfig(m=0, ef_construct=4, full_scan_threshold=10**9)
NEVER = 10**9  # kilobytes of vectors


class EdgeEngine(Engine):
    """An engine on a folder of its own."""

    def __init__(self, shard: qdrant.EdgeShard) -> None:
        self.shard = shard

    @classmethod
    def create(cls, folder: Path, dimensions: int, expected: int) -> EdgeEngine:
        """Begin an empty one, for about so many points. The folder must be empty, or not there."""
        folder.mkdir(parents=True, exist_ok=True)
        large = expected > EXACT
        shard = qdrant.EdgeShard.create(
            str(folder),
            qdrant.EdgeConfig(
                vectors={DENSE: qdrant.EdgeVectorParams(dimensions, qdrant.Distance.Cosine)},
                sparse_vectors={SPARSE: qdrant.EdgeSparseVectorParams(modifier=qdrant.Modifier.Idf)},
                hnsw_config=NO_GRAPH,
                quantization_config=EIGHT_BITS if large else None,
                optimizers=qdrant.EdgeOptimizersConfig(
                    indexing_threshold=1 if large else NEVER, default_segment_number=1
                ),
                wal_enabled=False,  # nobody reads before `seal`, and a killed run begins anew
            ),
        )
        for field in KEYWORDS:
            shard.update(qdrant.UpdateOperation.create_field_index(field, qdrant.PayloadSchemaType.Keyword))
        return cls(shard)

    @classmethod
    def load(cls, folder: Path) -> EdgeEngine:
        """Open a folder that `seal` has finished. Raises `UserError` when it cannot be read."""
        try:
            return cls(qdrant.EdgeShard.load(str(folder)))
        except Exception as e:  # the library raises plain exceptions
            raise UserError(f"{folder}: not an index that can be read ({e})", hint="run index again") from None

    def upsert(self, points: Iterable[Point]) -> int:
        """Put points in, by batches."""
        count = 0
        for batch in batches(points):
            self.shard.update(qdrant.UpdateOperation.upsert_points([_point(p) for p in batch]))
            count += len(batch)
        return count

    def delete(self, ids: Iterable[str]) -> int:
        """Take points out."""
        named = list(ids)
        if named:
            self.shard.update(qdrant.UpdateOperation.delete_points(named))
        return len(named)

    def seal(self) -> None:
        """Write everything to disk, and make the small copy of a large one's vectors."""
        self.shard.flush()
        self.shard.optimize()
        self.shard.flush()

    def rows(self, fields: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return every point's id, and fields of its payload."""
        after = None
        while True:
            told = list(fields) if fields else False
            found, after = self.shard.scroll(
                qdrant.ScrollRequest(offset=after, limit=BATCH, with_payload=told, with_vector=False)
            )
            yield from ((str(one.id), one.payload or {}) for one in found)
            if after is None:
                return

    def count(self) -> int:
        """Return the number of points."""
        return int(self.shard.count(qdrant.CountRequest(exact=True)))

    def rank(self, search: Search) -> Ranked:
        """Ask for the outcome and both lists at once."""
        where = _filter(search.where)
        queries = [_query(search, kind) for kind in search.kinds]
        asked = [qdrant.QueryRequest(search.candidates, query=q, filter=where, params=RESCORED) for q in queries]
        if search.mmr is not None or len(queries) > 1:
            asked.append(_request(search, queries, where))
        told = [_scored(found) for found in self.shard.query_batch(qdrant.QueryBatchRequest(asked))]
        named = dict(zip(search.kinds, told, strict=False))
        return Ranked(told[-1], named.get(DENSE, []), named.get(SPARSE, []))

    def fetch(self, ids: Sequence[str], where: tuple[Condition, ...]) -> dict[str, tuple[dict[str, Any], Vector]]:
        """Return payload and dense vector of these points, as far as the conditions hold for them."""
        if not ids:
            return {}
        found, _ = self.shard.scroll(
            qdrant.ScrollRequest(
                limit=len(ids),
                filter=qdrant.Filter(must=[qdrant.HasIdCondition(set(ids)), *_conditions(where)]),
                with_payload=True,
                with_vector=[DENSE],
            )
        )
        return {str(one.id): (one.payload or {}, _dense(one.vector)) for one in found}

    def close(self) -> None:
        """Let go of the folder."""
        self.shard.close()


def _point(point: Point) -> qdrant.Point:
    dense = point.dense.tolist() if isinstance(point.dense, np.ndarray) else list(point.dense)
    return qdrant.Point(point.id, {DENSE: dense, SPARSE: qdrant.SparseVector(*point.sparse)}, point.payload)


def _conditions(where: tuple[Condition, ...]) -> list[Any]:
    return [qdrant.FieldCondition(one.key, match=qdrant.MatchAny(list(one.values))) for one in where]


def _filter(where: tuple[Condition, ...]) -> qdrant.Filter:
    return qdrant.Filter(must=_conditions(where))


def _query(search: Search, kind: str) -> qdrant.Query:
    if kind == DENSE:
        return qdrant.Query.Nearest(search.vector, using=DENSE)
    return qdrant.Query.Nearest(qdrant.SparseVector(*search.sparse), using=SPARSE)


def _request(search: Search, queries: list[qdrant.Query], where: qdrant.Filter) -> qdrant.QueryRequest:
    """Return the request for the outcome where it is not one list as it is: both fused, or either made diverse.

    All that was fused is asked for: where scores are equal, Qdrant cuts now here, now there.
    """
    every = search.candidates * len(queries)
    lists = [qdrant.Prefetch(search.candidates, query, filter=where, params=RESCORED) for query in queries]
    fused = qdrant.Fusion.Rrf(k=RRF_K)
    if search.mmr is not None:
        if len(lists) > 1:
            lists = [qdrant.Prefetch(every, fused, prefetches=lists, filter=where)]
        mmr = qdrant.Mmr(search.vector, search.mmr, every, using=DENSE)
        return qdrant.QueryRequest(limit=search.limit, query=mmr, prefetches=lists, filter=where)
    return qdrant.QueryRequest(limit=every, query=fused, prefetches=lists, filter=where)


def _scored(found: list[Any]) -> Scored:
    return [(str(one.id), float(one.score)) for one in found]


def _dense(vector: Any) -> Vector:
    return np.asarray(vector[DENSE], np.float32)
