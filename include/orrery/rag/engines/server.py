"""A Qdrant server (qdrant-client over HTTP): a collection per generation, an alias for people and other readers.

The key comes from ORRERY_QDRANT_KEY, and stands in no message.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from orrery.errors import OrreryError, TryAgain, UserError
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
    Search,
    Vector,
    batches,
)
from orrery.uri import masked

KEY = "ORRERY_QDRANT_KEY"
TIMEOUT_S = 30
# A batch of points is a request of some megabytes.
UPSERTED, SCROLLED = 256, 2000
REFUSED, ABSENT = (401, 403), 404


def connect(url: str, timeout: int = TIMEOUT_S) -> QdrantClient:
    """Return a client of the server at `url`; nothing is asked of it yet. Raises `UserError` for what is no address."""
    try:
        with warnings.catch_warnings():
            # A key over plain HTTP is the platform's decision; a cluster's own network is often meant.
            warnings.simplefilter("ignore")
            return QdrantClient(
                url=url, api_key=os.environ.get(KEY) or None, timeout=timeout, check_compatibility=False
            )
    except (ValueError, OSError) as e:
        raise UserError(f"qdrant: {masked(url)!r} is no address of a server ({e})", hint="http://host:6333") from None


@contextlib.contextmanager
def talking(address: str) -> Iterator[None]:
    """Tell what a server or the network says as an error that a person can act on."""
    where = f"Qdrant at {masked(address)}"
    try:
        yield
    except UnexpectedResponse as e:
        raise _told(where, e) from None
    except QdrantException as e:  # too many requests, with a time to wait
        raise TryAgain(f"{where} has too much to do: {e}") from None
    except ResponseHandlingException as e:
        why = f"{type(e.source).__name__}: {e.source}" if str(e.source) else type(e.source).__name__
        raise TryAgain(f"{where} does not answer: {_hidden(why)}", hint="is it running, and reachable?") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ApiException):
        raise TryAgain(f"{where} does not answer as Qdrant does", hint="is a proxy in between?") from None


def _told(where: str, e: UnexpectedResponse) -> OrreryError:
    status = e.status_code or 0
    if status in REFUSED:
        given = "the key is not accepted" if os.environ.get(KEY) else "it wants a key, and none is given"
        return UserError(f"{where}: {given} ({status})", hint=f"{KEY} in the environment of steps and service")
    said = f"{status} {e.reason_phrase}: {_hidden(e.content[:300].decode('utf-8', 'replace'))}"
    if status == ABSENT:
        return UserError(f"{where}: {said}", hint="run index again, it makes the collection anew")
    if status >= 500 or status in (408, 429):
        return TryAgain(f"{where}: {said}")
    return UserError(f"{where}: {said}", hint="is this a Qdrant server of version 1.16 or later?")


def _hidden(text: str) -> str:
    key = os.environ.get(KEY)
    return text.replace(key, "***") if key else text


class ServerEngine(Engine):
    """An engine on one collection of a server."""

    def __init__(self, client: QdrantClient, collection: str, address: str) -> None:
        self.client, self.collection, self.address = client, collection, address

    @classmethod
    def create(cls, client: QdrantClient, collection: str, dimensions: int, address: str) -> ServerEngine:
        """Make the collection with its indexes, unless it is there. Raises `UserError` when it is another's."""
        engine = cls(client, collection, address)
        with talking(address):
            if not client.collection_exists(collection):
                client.create_collection(
                    collection,
                    vectors_config={DENSE: models.VectorParams(size=dimensions, distance=models.Distance.COSINE)},
                    sparse_vectors_config={SPARSE: models.SparseVectorParams(modifier=models.Modifier.IDF)},
                )
            engine._refuse_another(dimensions)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the local mode says that it has no payload indexes
                for field in KEYWORDS:
                    client.create_payload_index(collection, field, models.PayloadSchemaType.KEYWORD, wait=True)
        return engine

    @classmethod
    def load(cls, client: QdrantClient, collection: str, address: str) -> ServerEngine:
        """Open a collection. Raises `UserError` when it is not there."""
        with talking(address):
            there = client.collection_exists(collection)
        if not there:
            raise UserError(
                f"Qdrant at {masked(address)} has no collection {collection!r}",
                hint="it was removed behind our back: run index again, or roll back",
            )
        return cls(client, collection, address)

    def _refuse_another(self, dimensions: int) -> None:
        params = self.client.get_collection(self.collection).config.params
        dense = params.vectors.get(DENSE) if isinstance(params.vectors, dict) else None
        sparse = (params.sparse_vectors or {}).get(SPARSE)
        fits = dense is not None and dense.size == dimensions and dense.distance == models.Distance.COSINE
        if not fits or sparse is None or sparse.modifier != models.Modifier.IDF:
            raise UserError(
                f"Qdrant at {masked(self.address)}: collection {self.collection!r} has other vectors than this "
                f"generation ({DENSE} of {dimensions}, cosine; {SPARSE} with IDF)",
                hint="somebody else has made it: remove or rename it, and run index again",
            )

    def upsert(self, points: Iterable[Point]) -> int:
        """Put points in, by batches, each waited for."""
        count = 0
        for batch in batches(points, min(BATCH, UPSERTED)):
            with talking(self.address):
                self.client.upsert(self.collection, [_point(point) for point in batch], wait=True)
            count += len(batch)
        return count

    def delete(self, ids: Iterable[str]) -> int:
        """Take points out."""
        named = list(ids)
        for start in range(0, len(named), SCROLLED):
            chosen = models.PointIdsList(points=list(named[start : start + SCROLLED]))
            with talking(self.address):
                self.client.delete(self.collection, chosen, wait=True)
        return len(named)

    def rows(self, fields: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return every point's id, and fields of its payload."""
        after: Any = None
        while True:
            with talking(self.address):
                found, after = self.client.scroll(
                    self.collection,
                    offset=after,
                    limit=SCROLLED,
                    with_payload=list(fields) if fields else False,
                    with_vectors=False,
                )
            yield from ((str(one.id), one.payload or {}) for one in found)
            if after is None:
                return

    def count(self) -> int:
        """Return the number of points."""
        with talking(self.address):
            return int(self.client.count(self.collection, exact=True).count)

    def rank(self, search: Search) -> Ranked:
        """Ask for the outcome and both lists in one request."""
        where = _filter(search.where)
        queries = [_query(search, kind) for kind in search.kinds]
        asked = [
            models.QueryRequest(query=query, using=kind, filter=where, limit=search.candidates)
            for kind, query in zip(search.kinds, queries, strict=True)
        ]
        if search.mmr is not None or len(queries) > 1:
            asked.append(_request(search, queries, where))
        with talking(self.address):
            told = self.client.query_batch_points(self.collection, asked)
        lists = [[(str(one.id), float(one.score)) for one in found.points] for found in told]
        named = dict(zip(search.kinds, lists, strict=False))
        return Ranked(lists[-1], named.get(DENSE, []), named.get(SPARSE, []))

    def fetch(self, ids: Sequence[str], where: tuple[Condition, ...]) -> dict[str, tuple[dict[str, Any], Vector]]:
        """Return payload and dense vector of these points, as far as the conditions hold for them."""
        if not ids:
            return {}
        chosen = models.Filter(must=[models.HasIdCondition(has_id=list(ids)), *_conditions(where)])
        with talking(self.address):
            found, _ = self.client.scroll(
                self.collection, scroll_filter=chosen, limit=len(ids), with_payload=True, with_vectors=[DENSE]
            )
        return {str(one.id): (one.payload or {}, _dense(one.vector)) for one in found}

    def close(self) -> None:
        """Let go of the connections."""
        self.client.close()


def remove(client: QdrantClient, collection: str, address: str) -> bool:
    """Remove a generation's collection; return whether it was there."""
    with talking(address):
        there: bool = client.collection_exists(collection)
        if there:
            client.delete_collection(collection)
    return there


def point_alias(client: QdrantClient, alias: str, collection: str, address: str) -> str | None:
    """Let an alias name this collection, from one moment to the next; return which one it named before."""
    with talking(address):
        before = next((a.collection_name for a in client.get_aliases().aliases if a.alias_name == alias), None)
        if before != collection:
            # Both in one request, so Qdrant does both or none.
            old = [models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))] if before else []
            new = models.CreateAlias(collection_name=collection, alias_name=alias)
            client.update_collection_aliases([*old, models.CreateAliasOperation(create_alias=new)])
    return before


def _point(point: Point) -> models.PointStruct:
    dense = point.dense.tolist() if isinstance(point.dense, np.ndarray) else list(point.dense)
    sparse = models.SparseVector(indices=point.sparse[0], values=point.sparse[1])
    return models.PointStruct(id=point.id, vector={DENSE: dense, SPARSE: sparse}, payload=point.payload)


def _conditions(where: tuple[Condition, ...]) -> list[Any]:
    return [models.FieldCondition(key=one.key, match=models.MatchAny(any=list(one.values))) for one in where]


def _filter(where: tuple[Condition, ...]) -> models.Filter:
    return models.Filter(must=_conditions(where))


def _query(search: Search, kind: str) -> Any:
    if kind == DENSE:
        return models.NearestQuery(nearest=search.vector)
    return models.NearestQuery(nearest=models.SparseVector(indices=search.sparse[0], values=search.sparse[1]))


def _request(search: Search, queries: list[Any], where: models.Filter) -> models.QueryRequest:
    """Return the request for the outcome where it is not one list as it is: both fused, or either made diverse."""
    every = search.candidates * len(queries)
    lists = [
        models.Prefetch(query=query, using=kind, filter=where, limit=search.candidates)
        for kind, query in zip(search.kinds, queries, strict=True)
    ]
    fused = models.RrfQuery(rrf=models.Rrf(k=RRF_K))
    if search.mmr is None:
        return models.QueryRequest(query=fused, prefetch=lists, filter=where, limit=every)
    if len(lists) > 1:
        lists = [models.Prefetch(query=fused, prefetch=lists, filter=where, limit=every)]
    mmr = models.Mmr(diversity=1 - search.mmr, candidates_limit=every)
    query = models.NearestQuery(nearest=search.vector, mmr=mmr)
    return models.QueryRequest(query=query, using=DENSE, prefetch=lists, filter=where, limit=search.limit)


def _dense(vector: Any) -> Vector:
    return np.asarray(vector[DENSE], np.float32)
