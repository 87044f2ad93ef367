"""The verbs of a knowledge base, and what each is told. Light."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from orrery.contract import Params, PromoteParams, Verb


class OriginRef(BaseModel):
    """One source of documents, placeholders filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    uri: str | None = None
    pages: tuple[str, ...] = ()
    sitemap: str | None = None
    notion: str | None = None


class CollectParams(Params):
    """`collect`: where each source is. Its terms (groups, patterns, limits) are the spec's.

    `before` is the manifest of the documents collected last (store path): what is compared with, and taken over from.
    `partial`: the share that may be missing is not looked at in this run; somebody has said that the sources shrank.
    """

    sources: dict[str, OriginRef]
    before: str | None = None
    partial: bool = False


class ChunkParams(Params):
    """`chunk` is told everything by the spec and the documents."""


class EmbedParams(Params):
    """`embed` is told everything by the spec and the chunks."""

    device: str = Field("cpu", pattern="^(cpu|cuda)$", description="Where vectors are computed (a hint).")


class IndexParams(Params):
    """`index`: the server's address, or none for a folder per generation. Its key comes from ORRERY_QDRANT_KEY."""

    qdrant: str | None = None


class ProveParams(Params):
    """`evaluate`: seed of the cross-fitting and the bootstrap, and the server's address."""

    seed: int = 0
    draws: int = 1000
    qdrant: str | None = None
    live_is_proven: bool = Field(False, description="Whether what is live was proven on questions.")
    judge: dict[str, Any] | None = Field(None, description="`LanguageModel` of platform.yaml that judges answers.")
    llm: dict[str, Any] | None = Field(None, description="`LanguageModel` of platform.yaml that answers questions.")


class KnowledgeGateParams(Params):
    """`gate` is told everything by the spec and the evaluation."""


class PublishParams(PromoteParams):
    """`promote` and `rollback`: as for models; and the server whose alias follows, when there is one."""

    qdrant: str | None = None


def _verb(name: str, params: type[Params], dataset: str | None = None, **more: object) -> Verb:
    return Verb(name, f"orrery.rag.{name}", "rag", params, "partition", dataset, **more)  # type: ignore[arg-type]


SERVER = frozenset({"qdrant"})
KNOWLEDGE_VERBS: dict[str, Verb] = {
    v.name: v
    for v in (
        _verb("collect", CollectParams, "documents", observes=True, hints=frozenset({"sources", "before", "partial"})),
        _verb("chunk", ChunkParams, "chunks"),
        _verb("embed", EmbedParams, "vectors", compute="cpu-small", hints=frozenset({"device"})),
        _verb("index", IndexParams, "generation"),
        _verb("evaluate", ProveParams, "evaluation", hints=SERVER),
        _verb("gate", KnowledgeGateParams, "verdict", by_address=True),
        _verb("promote", PublishParams, effect=True),
        _verb("rollback", PublishParams, effect=True),
    )
}
