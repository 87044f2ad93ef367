"""Opens real generations: `orrery.rag` behind what the service knows of one (`knowledge.Knowledge`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from orrery.errors import UserError
from orrery.rag.abstention import CALIBRATION, Calibration, open_calibration
from orrery.rag.embedding.session import FOLDER
from orrery.rag.embedding.sparse import terms
from orrery.rag.engines import Hit, Search
from orrery.rag.generations import Generation, Question, open_generation, verified
from orrery.rag.rerank import open_reranker
from orrery.rag.retrieval import Found as Hits
from orrery.rag.retrieval import Reranker, conditions, retrieve
from orrery.rag.spec import EVERYONE, KnowledgeBaseSpec
from orrery.serving.knowledge import Abstainer, Found, Knowledge, Stages
from orrery.store import Ref, Store

PROBE = "What is described here?"


class RagKnowledge:
    """An open generation, asked as the spec says."""

    def __init__(self, generation: Generation, spec: KnowledgeBaseSpec, reranker: Reranker | None = None) -> None:
        self._generation, self._retrieval, self._reranker = generation, spec.retrieval, reranker
        self._sources = frozenset(spec.sources)

    @property
    def count(self) -> int:
        """How many passages it has."""
        return int(self._generation.facts.count)

    @property
    def embedder(self) -> str:
        """The embedder's id."""
        return str(self._generation.facts.embedder)

    def probe(self) -> None:
        """Answer a question once, for everyone; that nothing is found is fine. Raises when it cannot."""
        self.find(PROBE, frozenset({EVERYONE}), self._sources, self._retrieval.top_k, None, {})

    def find(
        self,
        question: str,
        groups: frozenset[str],
        sources: frozenset[str],
        top_k: int,
        filters: Mapping[str, list[str]] | None,
        stages: Stages,
    ) -> Sequence[Found]:
        """Return the best passages of these sources that these groups may read, best first."""
        timed = _Timed(self._generation, stages)
        reranker = _TimedReranker(self._reranker, stages) if self._reranker else None
        return retrieve(
            cast(Generation, timed),
            question,
            groups=groups,
            top_k=top_k,
            candidates=self._retrieval.candidates,
            filters=filters,
            mmr=self._retrieval.mmr,
            reranker=reranker,
            sources=sources,
        )

    def passage(self, id: str, groups: frozenset[str], sources: frozenset[str]) -> Found | None:
        """Return one passage; groups and sources stand in the engine's own conditions, as for a search."""
        with self._generation.held():
            rows = self._generation.engine.fetch([id], conditions(groups, None, sources)) if groups else {}
        if id not in rows:
            return None
        payload, _ = rows[id]
        fields: dict[str, Any] = {f: payload[f] for f in ("text", "title", "uri", "page", "document", "source")}
        heading = tuple(payload["heading"])
        return Hits(id, 1.0, heading=heading, cosine=0.0, bm25=0.0, rank_dense=None, rank_sparse=None, **fields)

    def terms(self, text: str) -> Sequence[str]:
        """Return the terms of the sparse vectors."""
        return terms(text, self._generation.sparse.language)

    def tokens(self, text: str) -> int:
        """Return how many tokens the embedder counts."""
        return int(self._generation.embedder.count(text))

    def close(self) -> None:
        """Give up its files and memory."""
        self._generation.close()


class _Timed:
    """A generation for one question, which notes what its parts took."""

    def __init__(self, generation: Generation, stages: Stages) -> None:
        self._generation, self._stages = generation, stages

    @contextmanager
    def held(self) -> Iterator[_Timed]:
        """Keep it open."""
        with self._generation.held():
            yield self

    def embed_query(self, text: str) -> Question:
        """Return what a question is looked up by."""
        with _noted(self._stages, "embed"):
            return self._generation.embed_query(text)

    def search(self, search: Search) -> list[Hit]:
        """Return the best points."""
        with _noted(self._stages, "retrieve"):
            return list(self._generation.search(search))


class _TimedReranker:
    def __init__(self, reranker: Reranker, stages: Stages) -> None:
        self._reranker, self._stages = reranker, stages

    def scores(self, question: str, texts: Sequence[str]) -> Sequence[float]:
        """Return each text's probability of answering the question."""
        with _noted(self._stages, "rerank"):
            return self._reranker.scores(question, texts)


@contextmanager
def _noted(stages: Stages, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - began


class RagAbstainer:
    """Abstains by an evaluation's calibration; `below`, from the spec, replaces its threshold."""

    def __init__(self, calibration: Calibration, below: float | None) -> None:
        self._calibration, self._below = calibration, below

    def abstains(self, question: str, found: Sequence[Found]) -> bool:
        """Tell whether no answer should be tried."""
        told = self._calibration.signals(question, found)
        if self._below is not None:
            return float(self._calibration.score(told)) < self._below
        return bool(self._calibration.abstains(told))


class RagOpener:
    """Opens what `live.json` names."""

    def __init__(self, spec: KnowledgeBaseSpec, qdrant: str | None, threads: int) -> None:
        self._spec, self._qdrant, self._threads = spec, qdrant, threads

    def open(self, store: Store, manifest: str, digest: str, scratch: Path) -> Knowledge:
        """Open a generation. Raises `OrreryError` when it is gone, damaged, or another than the pointer's."""
        store.need(Ref(path=manifest, digest=digest))
        # The next generation mostly has the same embedder: it is fetched once, and outlives the generation's folder.
        shared = scratch.parent / FOLDER
        shared.mkdir(exist_ok=True)
        (scratch / FOLDER).symlink_to(shared)
        generation = open_generation(store, manifest, scratch, qdrant=self._qdrant, threads=self._threads)
        try:
            held = generation.engine.count()
            if held != generation.facts.count:
                raise UserError(f"{manifest}: {held:,} passages instead of {generation.facts.count:,}")
            reranker = self._reranker(scratch / "reranker")
        except BaseException:
            generation.close()
            raise
        return RagKnowledge(generation, self._spec, reranker)

    def _reranker(self, scratch: Path) -> Reranker | None:
        uri = self._spec.retrieval.reranker
        return None if uri is None else open_reranker(uri, scratch, self._threads)

    def abstainer(self, store: Store, evaluation: str | None, scratch: Path) -> Abstainer | None:
        """Return when to abstain; None when no evaluation vouches for it. Raises `UserError` when it is damaged."""
        if evaluation is None:
            return None
        manifest = store.manifest(evaluation)
        if manifest is None:
            raise UserError(f"{store.uri}/{evaluation}: the evaluation is gone", hint="evaluate, and promote again")
        verified(store, manifest, CALIBRATION)
        calibration = open_calibration(store, manifest, scratch)
        return None if calibration is None else RagAbstainer(calibration, self._spec.answers.abstain)
