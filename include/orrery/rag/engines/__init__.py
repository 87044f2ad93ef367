"""What an engine of vectors does for a knowledge base, whichever it is: Qdrant inside of this process, or a server.

A point has a dense vector (unit length, cosine), a sparse one (BM25 weights of its terms, to which Qdrant adds each
term's rarity), and a payload. A search names who asks: an engine refuses one that does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from orrery.errors import OrreryError

Vector: TypeAlias = npt.NDArray[np.float32]
Sparse = tuple[list[int], list[float]]
Scored = list[tuple[str, float]]
Mode = Literal["hybrid", "dense", "sparse"]

DENSE, SPARSE = "dense", "sparse"
GROUPS, DIGEST = "groups", "digest"
# Fields of the payload that are looked up by value, so Qdrant indexes them.
KEYWORDS = (GROUPS, "source", "document", "uri")
# Reciprocal rank fusion: the sum of 1 / (60 + rank) over both lists, which count alike; Qdrant's ranks begin at 0.
# The constant of the method's paper (Cormack et al. 2009): fixed beforehand, and fitted to no questions of ours.
RRF_K = 60
BATCH = 500


@dataclass(frozen=True)
class Point:
    """One chunk as an engine holds it; `id` is a UUID."""

    id: str
    dense: Vector | Sequence[float]
    sparse: Sparse
    payload: dict[str, Any]


@dataclass(frozen=True)
class Condition:
    """A field of the payload must hold one of these values (a list: one of its values one of these); none: nothing."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Search:
    """What is looked for: by `dense`, by `sparse`, or by both, their ranks fused. Every condition must hold.

    `candidates`: of each kind, before they are fused; `limit`: of the passages found, with payload and dense vector;
    `mmr`: 1 is relevance alone (the cosine), 0 diversity alone, none is off.
    """

    where: tuple[Condition, ...]
    dense: Vector
    sparse: Sparse
    mode: Mode = "hybrid"
    candidates: int = 50
    limit: int = 8
    mmr: float | None = None

    def __post_init__(self) -> None:
        if not any(condition.key == GROUPS for condition in self.where):
            raise OrreryError("a search without the groups of who asks", hint="orrery.rag.retrieval.allowed(groups)")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The lists that are asked for. A question of stop words alone has no terms, and so no sparse list."""
        wanted = (DENSE, SPARSE) if self.mode == "hybrid" else (self.mode,)
        return tuple(kind for kind in wanted if kind == DENSE or self.sparse[0])

    @property
    def vector(self) -> list[float]:
        """The dense vector as engines take it."""
        return [float(value) for value in self.dense]


@dataclass(frozen=True)
class Hit:
    """A point that was found. Ranks begin at 1; none: not among that list's candidates (`bm25` is 0 then)."""

    id: str
    score: float
    payload: dict[str, Any]
    dense: Vector | None = None
    cosine: float = 0.0
    bm25: float = 0.0
    rank_dense: int | None = None
    rank_sparse: int | None = None


@dataclass(frozen=True)
class Ranked:
    """What one search has ranked: the outcome, and the lists it was fused from; (id, score), best first."""

    found: Scored
    dense: Scored
    sparse: Scored


class Engine(ABC):
    """One generation's points."""

    @abstractmethod
    def upsert(self, points: Iterable[Point]) -> int:
        """Put points in, by batches, over those of the same ids; return how many."""

    @abstractmethod
    def delete(self, ids: Iterable[str]) -> int:
        """Take points out; return how many were named."""

    @abstractmethod
    def rows(self, fields: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return every point's id, in the engine's order, and these fields of its payload."""

    @abstractmethod
    def count(self) -> int:
        """Return the number of points, counted."""

    @abstractmethod
    def rank(self, search: Search) -> Ranked:
        """Ask for all candidates of a search in one round trip, without payloads."""

    @abstractmethod
    def fetch(self, ids: Sequence[str], where: tuple[Condition, ...]) -> dict[str, tuple[dict[str, Any], Vector]]:
        """Return payload and dense vector of these points, as far as the conditions hold for them."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections."""

    def ids(self) -> Iterator[str]:
        """Return every point's id, in the engine's order."""
        return (id_ for id_, _ in self.rows())

    def search(self, search: Search) -> list[Hit]:
        """Return the best points, best first. Equal scores are in the order of their ids."""
        if not search.kinds:
            return []
        ranked = self.rank(search)
        lists = [ordered(ranked.dense), ordered(ranked.sparse)]
        best = ranked.found
        if search.mmr is None:
            best = ordered(fused(lists) if len(search.kinds) > 1 and any(map(tied, lists)) else best)
        best = best[: search.limit]
        rows = self.fetch([id_ for id_, _ in best], search.where)
        dense = {id_: rank for rank, (id_, _) in enumerate(lists[0], 1)}
        sparse = {id_: (rank, score) for rank, (id_, score) in enumerate(lists[1], 1)}
        hits = [Hit(id_, score, *rows[id_]) for id_, score in best if id_ in rows]
        return [_told(hit, search, dense.get(hit.id), *sparse.get(hit.id, (None, 0.0))) for hit in hits]


def _told(hit: Hit, search: Search, rank_dense: int | None, rank_sparse: int | None, bm25: float) -> Hit:
    """Return a hit with its place in both lists. Its cosine is computed: it need not be a dense candidate."""
    assert hit.dense is not None
    cosine = float(np.dot(hit.dense, search.dense))
    return replace(hit, cosine=cosine, bm25=bm25, rank_dense=rank_dense, rank_sparse=rank_sparse)


def ordered(scored: Scored) -> Scored:
    """Return points best first; equal scores in the order of their ids."""
    return sorted(scored, key=lambda one: (-one[1], one[0]))


def tied(scored: Scored) -> bool:
    """Tell whether two points have one score: Qdrant ranks them now this way, now that, and fuses these ranks."""
    return len({score for _, score in scored}) < len(scored)


def fused(lists: Iterable[Scored]) -> Scored:
    """Return what Qdrant makes of lists by RRF, by the ranks as they are given here."""
    found: dict[str, float] = {}
    for scored in lists:
        for rank, (id_, _) in enumerate(scored):
            found[id_] = found.get(id_, 0.0) + 1 / (RRF_K + rank)
    return list(found.items())


def batches(points: Iterable[Point], size: int = BATCH) -> Iterator[list[Point]]:
    """Cut a stream of points into lists."""
    batch: list[Point] = []
    for point in points:
        batch.append(point)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
