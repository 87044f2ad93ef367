"""What a user may declare of a knowledge base: `kind: knowledge_base`. Light."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from orrery.fields import ComputeName, Cron, Duration, Frozen, Name
from orrery.partitions import Grain
from orrery.uri import has_secret

Group = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=200)]
WebAddress = Annotated[str, StringConstraints(pattern=r"^https?://[^\s<>\"'@]+$", max_length=2000)]
EVERYONE = "everyone"
PACKAGED = "minilm"  # the embedder that comes as a package


def reader(groups: Iterable[str]) -> frozenset[str]:
    """Return the groups of somebody who is known: their own, and everyone."""
    return frozenset(groups) | {EVERYONE}


class DocumentSource(Frozen):
    """One source of documents: a folder or object store, web pages, or an export of Notion; and who may read it."""

    uri: str | None = Field(
        None, description="Folder or bucket, below which all files are looked at; ${root} and ${data} are known."
    )
    pages: tuple[WebAddress, ...] = Field((), max_length=1000, description="Web pages, one by one.")
    sitemap: WebAddress | None = Field(None, description="A sitemap whose pages are read.")
    notion: str | None = Field(None, description="Folder of an unpacked Notion export (Markdown and CSV).")
    groups: tuple[Group, ...] = Field((EVERYONE,), min_length=1, description="Who may read what comes from it.")
    include: tuple[Pattern, ...] = Field(("**/*",), description="Which files or page paths, by pattern.")
    exclude: tuple[Pattern, ...] = Field((), description="Which of these not.")
    missing: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of the documents known before that may be gone, unreadable or turned into another's text; "
        "above, the run stops before anything is deleted.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> DocumentSource:
        given = [name for name in ("uri", "pages", "sitemap", "notion") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of `uri`, `pages`, `sitemap` and `notion`, not {given or 'none'}")
        for name in ("uri", "sitemap", "notion"):
            if has_secret(getattr(self, name) or ""):
                raise ValueError(f"a password must not stand in `{name}`: give it in the environment of the steps")
        return self


class Limits(Frozen):
    """What a document may be at most; one beyond it is left out, and the outcome says why."""

    megabytes: float = Field(20, gt=0, le=1000, description="Size of one file or page.")
    pages: int = Field(2000, ge=1, le=100_000, description="Pages of one PDF.")
    characters: int = Field(2_000_000, ge=1000, description="Text of one document.")
    documents: int = Field(100_000, ge=1, description="Documents of one source; of more, the run stops.")
    seconds: float = Field(30, gt=0, le=600, description="Time for one document: to fetch it, and to read it.")


class Chunking(Frozen):
    """How documents are cut. Lengths in tokens of the embedder, headings included."""

    tokens: int = Field(200, ge=32, le=8000, description="Longest chunk; the embedder's own limit bounds it, too.")
    overlap: int = Field(30, ge=0, le=1000, description="Tokens that two neighbours share.")

    @model_validator(mode="after")
    def _overlap_fits(self) -> Chunking:
        if self.overlap * 2 > self.tokens:
            raise ValueError(f"`overlap` {self.overlap} is more than half of `tokens` {self.tokens}")
        return self


class Embedding(Frozen):
    """Which model makes the vectors."""

    model: str = Field(
        PACKAGED,
        description="`minilm` (all-MiniLM-L6-v2, from its package), or the URI of a folder in Hugging Face's layout "
        "(config.json, tokenizer.json, model.safetensors).",
    )
    precision: Literal["fp32", "int8"] = Field("fp32", description="int8: faster, cosines differ by about 0.01.")
    query_prefix: str = Field("", max_length=200, description="What this model wants before a question.")
    document_prefix: str = Field("", max_length=200, description="What this model wants before a passage.")
    compute: ComputeName = Field("cpu-small", description="Compute class of `embed`; one with a GPU uses it.")
    language: Literal["english", "german", "french", "spanish", "italian", "portuguese", "dutch", "none"] = Field(
        "english", description="Stemmer and stop words of the sparse vectors (BM25)."
    )


class Retrieval(Frozen):
    """How passages are found. Dense and sparse ranks are fused by reciprocal rank (RRF) inside Qdrant."""

    top_k: int = Field(6, ge=1, le=50, description="Passages that an answer may rest on.")
    candidates: int = Field(50, ge=1, le=1000, description="Of each kind, before they are fused.")
    mmr: float | None = Field(
        None, ge=0, le=1, description="Maximal marginal relevance: 1 relevance alone, 0 diversity alone; none: off."
    )
    reranker: str | None = Field(
        None,
        description="URI of a cross-encoder's folder in ONNX (model.onnx, tokenizer.json), a relative path from the "
        "project folder; none: off.",
    )


class Floor(Frozen):
    """A bound on one figure of a generation."""

    min: float | None = Field(None, ge=0, le=1)
    max: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _some(self) -> Floor:
        if self.min is None and self.max is None:
            raise ValueError("give `min`, `max` or both")
        return self


FIGURES = ("ndcg_at_10", "recall_at_10", "mrr", "abstained", "wrongly_abstained", "p99_ms")


class KnowledgeGate(Frozen):
    """What a new generation must keep to become the live one."""

    bounds: dict[str, Floor] = Field(default_factory=dict, description=f"Per figure: {', '.join(FIGURES)}.")
    worse: float = Field(
        0.01, ge=0, le=1, description="How far nDCG@10, recall@10 and MRR may lie below the live generation's."
    )

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: Any) -> Any:
        """Lift `ndcg_at_10: {min: 0.6}` into `bounds`."""
        if not isinstance(data, dict):
            return data
        bounds = {**(data.get("bounds") or {}), **{k: v for k, v in data.items() if k in FIGURES}}
        return {**{k: v for k, v in data.items() if k not in FIGURES}, "bounds": bounds}

    @field_validator("bounds")
    @classmethod
    def _known(cls, value: dict[str, Floor]) -> dict[str, Floor]:
        unknown = sorted(set(value) - set(FIGURES))
        if unknown:
            raise ValueError(f"unknown figure {unknown[0]!r}; allowed: {', '.join(FIGURES)}")
        return value


class KnowledgeAlerts(Frozen):
    """What the owner is told of."""

    stale: Duration = Field("36h", description="Since the last reindex that ended well: older, and an alert goes out.")
    late: Duration = Field("4h", description="A reindex that has not ended by then is late.")


class Answers(Frozen):
    """How questions are answered."""

    max_tokens: int = Field(300, ge=16, le=4000, description="Longest answer.")
    timeout: float = Field(20, gt=0, le=300, description="Seconds until the passages are given without an answer.")
    log_questions: bool = Field(False, description="Write questions into the service's log.")
    abstain: float | None = Field(
        None, ge=0, le=1, description="Abstain below this probability; none: the threshold fitted on the questions."
    )


class KnowledgeBaseSpec(Frozen):
    """A knowledge base: `kind: knowledge_base`."""

    version: Literal[1]
    kind: Literal["knowledge_base"]
    owner: str = Field(min_length=1, max_length=100, description="The team that is called when it is red.")
    description: str = ""
    sources: dict[Name, DocumentSource] = Field(min_length=1)
    schedule: Cron = Field("0 2 * * *", description="Cron of the nightly reindex (UTC).")
    questions: str | None = Field(None, description="A file of labelled questions in the project folder (JSON lines).")
    limits: Limits = Limits()
    chunk: Chunking = Chunking()
    embedder: Embedding = Embedding()
    retrieval: Retrieval = Retrieval()
    gate: KnowledgeGate = KnowledgeGate()
    alerts: KnowledgeAlerts = KnowledgeAlerts()
    answers: Answers = Answers()
    llm: Name | None = Field(None, description="Language model of platform.yaml (`llms`); none: passages alone.")
    judge: Name | None = Field(None, description="Language model that judges answers in `evaluate`; none: no judge.")
    runbook: Annotated[str, StringConstraints(pattern=r"^https?://[^\s<>\"']+$")] | None = Field(
        None, description="Where an alert sends its reader; by default the Dag's page, which shows the Dag file's text."
    )

    @property
    def grain(self) -> Grain:
        """A generation is named by the day on which its sources were read."""
        return "day"

    @field_validator("questions")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        if value is not None and (value.startswith(("/", "~")) or ".." in re.split(r"[/\\]", value)):
            raise ValueError(f"{value!r} is not inside of the project folder")
        return value
