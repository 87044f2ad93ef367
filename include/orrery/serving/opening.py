"""Opens real generations: `orrery.rag` behind what the service knows of one (`knowledge.Knowledge`)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from orrery import log
from orrery.errors import UserError
from orrery.rag.abstention import CALIBRATION, Calibration, open_calibration
from orrery.rag.embedding.session import FOLDER
from orrery.rag.embedding.sparse import terms
from orrery.rag.engines import Hit, Search
from orrery.rag.generations import Generation, Question, open_generation, verified
from orrery.rag.rerank import open_reranker
from orrery.rag.retrieval import Found as Hits
from orrery.rag.retrieval import Reranker, conditions, retrieve
from orrery.rag.spec import EVERYONE, KnowledgeBaseSpec, Retrieval
from orrery.serving.knowledge import Asking, Found, Knowledge, Stages
from orrery.store import Manifest, Ref, Store

PROBE = "What is described here?"
NO_RERANKER = (
    "the reranker that the evaluation used cannot be had: passages are found as the spec says, which nothing has "
    "evaluated, and no question is abstained for what they score"
)
NO_EFFECT = "`answers.abstain` has no effect: no evaluation has fitted when to abstain"


class RagKnowledge:
    """An open generation."""

    def __init__(self, generation: Generation, sources: frozenset[str]) -> None:
        self._generation, self._sources = generation, sources

    @property
    def count(self) -> int:
        """How many passages it has."""
        return int(self._generation.facts.count)

    @property
    def embedder(self) -> str:
        """The embedder's id."""
        return str(self._generation.facts.embedder)

    def probe(self, asking: Asking) -> None:
        """Answer a question once, for everyone; that nothing is found is fine. Raises when it cannot."""
        self.find(PROBE, frozenset({EVERYONE}), self._sources, asking.retrieval.top_k, None, {}, asking)

    def find(
        self,
        question: str,
        groups: frozenset[str],
        sources: frozenset[str],
        top_k: int,
        filters: Mapping[str, list[str]] | None,
        stages: Stages,
        asking: Asking,
    ) -> Sequence[Found]:
        """Return the best passages of these sources that these groups may read, best first."""
        timed = _Timed(self._generation, stages)
        reranker = _TimedReranker(asking.reranker, stages) if asking.reranker else None
        return retrieve(
            cast(Generation, timed),
            question,
            groups=groups,
            top_k=top_k,
            candidates=asking.retrieval.candidates,
            filters=filters,
            mmr=asking.retrieval.mmr,
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
    """Opens what `live.json` names; a reranker by a relative path is looked for in `folder`, the project's."""

    def __init__(self, spec: KnowledgeBaseSpec, qdrant: str | None, threads: int, folder: Path | None = None) -> None:
        self._spec, self._qdrant, self._threads, self._folder = spec, qdrant, threads, folder

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
        except BaseException:
            generation.close()
            raise
        return RagKnowledge(generation, frozenset(self._spec.sources))

    def asking(self, store: Store, evaluation: str | None, scratch: Path) -> Asking:
        """Return how to ask: as the evaluation did; as the spec says where none tells.

        When the evaluation's reranker cannot be had, and the spec has another, the spec's settings are used: the
        calibration is not one of theirs, so it is dropped. Raises `UserError` when the evaluation is damaged.
        """
        manifest = None if evaluation is None else _evaluation(store, evaluation)
        calibration = None if manifest is None else open_calibration(store, manifest, scratch)
        declared, problems = self._spec.retrieval, list[str]()
        used = _evaluated(manifest) or declared
        try:
            reranker = self._reranker(used, scratch)
        except UserError as e:
            if used.reranker == declared.reranker:
                raise
            log.get().warning(NO_RERANKER, why=e.message)
            problems.append(NO_RERANKER)
            used, calibration = declared, None
            reranker = self._reranker(used, scratch)
        below = self._spec.answers.abstain
        if below is not None and calibration is None:
            log.get().warning(NO_EFFECT)
            problems.append(NO_EFFECT)
        abstainer = None if calibration is None else RagAbstainer(calibration, below)
        return Asking(used, abstainer, reranker, tuple(problems))

    def _reranker(self, settings: Retrieval, scratch: Path) -> Reranker | None:
        if settings.reranker is None:
            return None
        # Of its own: the one in use may have its files in the same generation's folder.
        fetched = Path(tempfile.mkdtemp(prefix="reranker-", dir=scratch))
        return open_reranker(settings.reranker, fetched, self._threads, folder=self._folder)


def _evaluation(store: Store, path: str) -> Manifest:
    manifest = store.manifest(path)
    if manifest is None:
        raise UserError(f"{store.uri}/{path}: the evaluation is gone", hint="evaluate, and promote again")
    verified(store, manifest, CALIBRATION)
    return manifest


def _evaluated(manifest: Manifest | None) -> Retrieval | None:
    """Return the settings that an evaluation asked with; None when it does not tell, or not as this version does."""
    told = manifest.facts.get("retrieval") if manifest is not None else None
    try:
        return None if told is None else Retrieval.model_validate(told)
    except ValidationError:
        return None
