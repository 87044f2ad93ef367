"""What the service needs of an open generation, and the real one: `orrery.rag` behind it.

The service's own parts know these protocols alone, so that they can be tried without an index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orrery.rag.retrieval import Reranker
from orrery.rag.spec import Retrieval
from orrery.store import Store

# Seconds by stage: embed, retrieve, rerank.
Stages = dict[str, float]


class Found(Protocol):
    """A passage that was found (`orrery.rag.retrieval.Found`)."""

    @property
    def id(self) -> str:
        """The chunk's id."""

    @property
    def score(self) -> float:
        """The fused score."""

    @property
    def text(self) -> str:
        """The passage."""

    @property
    def title(self) -> str:
        """The document's title."""

    @property
    def uri(self) -> str:
        """Where a reader finds the document."""

    @property
    def heading(self) -> Sequence[str]:
        """Headings above the passage."""

    @property
    def page(self) -> int | None:
        """Page of a PDF."""

    @property
    def document(self) -> str:
        """The document's id."""

    @property
    def source(self) -> str:
        """The source's name in the spec."""

    @property
    def cosine(self) -> float:
        """Of question and passage."""

    @property
    def bm25(self) -> float:
        """0 when it is no candidate of the sparse list."""

    @property
    def rank_dense(self) -> int | None:
        """From 1."""

    @property
    def rank_sparse(self) -> int | None:
        """From 1."""


class Abstainer(Protocol):
    """Knows when passages do not answer a question (`orrery.rag.abstention`)."""

    def abstains(self, question: str, found: Sequence[Found]) -> bool:
        """Tell whether no answer should be tried."""


@dataclass(frozen=True)
class Asking:
    """How a generation is asked: with the settings that its evaluation asked with, and when no answer is tried.

    `problems`: what is not as it was declared or evaluated, in sentences that may be shown to anybody.
    """

    retrieval: Retrieval
    abstainer: Abstainer | None = None
    reranker: Reranker | None = None
    problems: tuple[str, ...] = ()


class Knowledge(Protocol):
    """An open generation. All calls block; several threads may call at once."""

    @property
    def count(self) -> int:
        """How many passages it has."""

    @property
    def embedder(self) -> str:
        """The embedder's id."""

    def probe(self, asking: Asking) -> None:
        """Answer a question once, so that the first asker does not wait. Raises when it cannot."""

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

    def passage(self, id: str, groups: frozenset[str], sources: frozenset[str]) -> Found | None:
        """Return one passage, or None when there is none of these sources that these groups may read."""

    def terms(self, text: str) -> Sequence[str]:
        """Return the terms that retrieval compares."""

    def tokens(self, text: str) -> int:
        """Return how many tokens the embedder counts."""

    def close(self) -> None:
        """Give up its files and memory."""


class Opener(Protocol):
    """Opens generations and what belongs to them. Its calls block."""

    def open(self, store: Store, manifest: str, digest: str, scratch: Path) -> Knowledge:
        """Open a generation; its files go below `scratch`. Raises `OrreryError` when it is not whole."""

    def asking(self, store: Store, evaluation: str | None, scratch: Path) -> Asking:
        """Return how to ask by an evaluation; None: nothing is known but the spec."""
