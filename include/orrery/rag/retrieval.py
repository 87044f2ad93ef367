"""From a question to passages: who asks decides what can be found at all, then ranks are fused.

`allowed` is the only place that says what a set of groups may see. The condition that it makes stands in every
prefetch and in every request to the engine: nothing is left out afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, get_args

import numpy as np

from orrery.errors import UserError, nearest
from orrery.rag.engines import GROUPS, Condition, Hit, Mode, Search, Vector

if TYPE_CHECKING:
    from orrery.rag.generations import Generation

MODES: tuple[Mode, ...] = get_args(Mode)
FILTERS = ("document", "source", "uri")
MOST_VALUES = 100


@dataclass(frozen=True)
class Found:
    """A passage that was found.

    `score`: fused from the ranks (RRF), the cosine in mode `dense` and with MMR, BM25 in mode `sparse`, the reranker's
    probability where there is one. `rank_dense` and `rank_sparse` begin at 1; none: not among that list's candidates,
    and `bm25` is 0 without a rank. `cosine` is always that of question and passage.
    """

    id: str
    score: float
    text: str
    title: str
    uri: str
    heading: tuple[str, ...]
    page: int | None
    document: str
    source: str
    cosine: float
    bm25: float
    rank_dense: int | None
    rank_sparse: int | None


class Reranker(Protocol):
    """What looks at question and passage together."""

    def scores(self, question: str, texts: Sequence[str]) -> Sequence[float]:
        """Return each text's probability of answering the question."""


def allowed(groups: frozenset[str]) -> Condition:
    """Return what a chunk must fulfil to be seen by these groups: one of its own is among them. No groups: nothing."""
    return Condition(GROUPS, tuple(sorted(groups)))


def conditions(
    groups: frozenset[str], filters: Mapping[str, Sequence[str]] | None, sources: frozenset[str] | None = None
) -> tuple[Condition, ...]:
    """Return all that a chunk must fulfil; `sources`: to come from one of these (none of them: nothing).

    Raises `UserError` for a filter that is unknown or malformed.
    """
    where = [allowed(groups)]
    if sources is not None:
        where.append(Condition("source", tuple(sorted(sources))))
    for key, values in (filters or {}).items():
        if key not in FILTERS:
            raise UserError(f"filters: unknown field {key!r}", hint=nearest(key, FILTERS))
        if isinstance(values, str) or not all(isinstance(value, str) for value in values):
            raise UserError(
                f"filters.{key}: {values!r} is not a list of texts", hint="one of them has to be the field's"
            )
        if len(values) > MOST_VALUES:
            raise UserError(f"filters.{key}: {len(values)} values", hint=f"at most {MOST_VALUES}")
        where.append(Condition(key, tuple(values)))
    return tuple(where)


def retrieve(
    generation: Generation,
    question: str,
    *,
    groups: frozenset[str],
    top_k: int = 8,
    candidates: int = 50,
    filters: Mapping[str, Sequence[str]] | None = None,
    mmr: float | None = None,
    mode: Mode = "hybrid",
    reranker: Reranker | None = None,
    sources: frozenset[str] | None = None,
) -> list[Found]:
    """Return the best passages that these groups may read, best first; none for no groups.

    `sources`: those that may be read now; a generation's groups are as old as it is. None: all.
    Raises `UserError` for a filter or mode that is unknown, `TryAgain` when a server does not answer.
    """
    if mode not in MODES:
        raise UserError(f"mode: {mode!r} is unknown", hint=nearest(mode, MODES))
    where = conditions(groups, filters, sources)
    if not groups or top_k < 1:
        return []
    with generation.held():
        asked = generation.embed_query(question)
        search = Search(
            where,
            asked.dense,
            asked.sparse,
            mode,
            candidates=max(candidates, top_k),
            limit=max(candidates, top_k) if reranker else top_k,
            mmr=None if reranker else mmr,
        )
        hits = generation.search(search)
    if reranker is not None:
        hits = rerank(reranker, question, hits)
        hits = diverse(hits, mmr, top_k) if mmr is not None else hits[:top_k]
    return [_found(hit) for hit in hits]


def read(generation: Generation, id: str, *, groups: frozenset[str]) -> Found | None:
    """Return one passage by its id, unscored; None when there is none that these groups may read."""
    if not groups:
        return None
    with generation.held():
        rows = generation.engine.fetch([id], (allowed(groups),))
    return next((_found(Hit(id, 0.0, *row)) for row in rows.values()), None)


def rerank(reranker: Reranker, question: str, hits: list[Hit]) -> list[Hit]:
    """Return hits in the order of the reranker's scores."""
    scores = reranker.scores(question, [passage(hit) for hit in hits]) if hits else []
    scored = [replace(hit, score=float(score)) for hit, score in zip(hits, scores, strict=True)]
    return sorted(scored, key=lambda hit: (-hit.score, hit.id))


def passage(hit: Hit) -> str:
    """Return a chunk's text with its title and headings, as a reranker reads it."""
    told = [hit.payload["title"], *hit.payload["heading"]]
    return "\n".join([" > ".join(dict.fromkeys(filter(None, told))), hit.payload["text"]])


def diverse(hits: Sequence[Hit], share: float, count: int) -> list[Hit]:
    """Return `count` hits by maximal marginal relevance: each the best of share × score - (1 - share) × likeness.

    Likeness is the highest cosine with one that was chosen before. As Qdrant does it, with scores of our own.
    """
    left, chosen = list(hits), list[Hit]()
    closest: dict[str, float] = {}
    worth: Callable[[Hit], float] = lambda hit: share * hit.score - (1 - share) * closest.get(hit.id, 0.0)  # noqa: E731
    while left and len(chosen) < count:
        best = max(left, key=worth)
        left.remove(best)
        chosen.append(best)
        for hit in left:
            closest[hit.id] = max(closest.get(hit.id, -1.0), _cosine(hit.dense, best.dense))
    return chosen


def _cosine(one: Vector | None, other: Vector | None) -> float:
    assert one is not None
    assert other is not None
    return float(np.dot(one, other))


def _found(hit: Hit) -> Found:
    payload = hit.payload
    return Found(
        id=hit.id,
        score=hit.score,
        text=payload["text"],
        title=payload["title"],
        uri=payload["uri"],
        heading=tuple(payload["heading"]),
        page=payload["page"],
        document=payload["document"],
        source=payload["source"],
        cosine=hit.cosine,
        bm25=hit.bm25,
        rank_dense=hit.rank_dense,
        rank_sparse=hit.rank_sparse,
    )
